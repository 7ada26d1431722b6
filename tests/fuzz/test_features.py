"""Feature and label files: .npy, .npz (stored and compressed), .pt (both formats), .mat and .txt."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fuzz import runner
from vareid_ext.files.features import MAX_UNPACKED, FeatureFileError, read_features

scipy_io = pytest.importorskip("scipy.io")
PART = bytes(1 << 20)


def _npy(array: Any, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version)
    return file.getvalue()


def _npz(arrays: dict[str, Any], save: Any = np.savez) -> bytes:
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def _pt(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _mat(content: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    scipy_io.savemat(file, content, **options)
    return b"MATLAB 5.0 MAT-file".ljust(116) + file.getvalue()[116:]  # without the date


def _zeros_npz(megabytes: int) -> bytes:
    file, member = io.BytesIO(), zipfile.ZipInfo("feature.npy")
    member.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file, "w") as archive, archive.open(member, "w") as array:
        header = {"descr": "<f4", "fortran_order": False, "shape": (megabytes << 12, 64)}
        np.lib.format.write_array_header_1_0(array, header)
        for _ in range(megabytes):
            array.write(PART)
    return file.getvalue()


def _zeros_mat(megabytes: int) -> bytes:
    size = megabytes << 20
    head = struct.pack("<IIIIIIII", 6, 8, 6, 0, 5, 8, size >> 9, 64) + struct.pack("<II8sII", 1, 7, b"feature", 9, size)
    packer = zlib.compressobj()
    parts = [packer.compress(struct.pack("<II", 14, len(head) + size) + head)]
    packed = b"".join([*parts, *(packer.compress(PART) for _ in range(megabytes)), packer.flush()])
    return _mat({})[:128] + struct.pack("<II", 15, len(packed)) + packed


def seeds() -> dict[str, bytes]:
    """Features of 9 images with their labels, in every kind of file; files of zeros that unpack to much or too much."""
    rng = np.random.default_rng(0)
    feature = rng.standard_normal((9, 6)).astype(np.float32)
    labels = {name: rng.integers(0, 4, 9) for name in ("identity", "camera", "viewpoint")}
    arrays = {"feature": feature, **labels}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    objects = {**arrays, "names": np.array(["a", "bc"], object), "camera": np.array([1] * 9, object)}
    odd = {**arrays, "names": objects["names"], "part": {"x": feature, "y": "text"}, "on": np.eye(3) > 0}
    sparse = {**arrays, "weight": pytest.importorskip("scipy.sparse").eye(5).tocsc(), "z": feature * 1j}
    allowed = (MAX_UNPACKED >> 20) - 1
    return {
        "c-order.npy": _npy(feature),
        "f-order.npy": _npy(np.asfortranarray(feature.astype(">f8")), (2, 0)),
        "saved-dictionary.npy": _npy(arrays),
        "stored.npz": _npz(arrays),
        "packed.npz": _npz(arrays, np.savez_compressed),
        "objects.npz": _npz(objects),
        "table.pt": _pt(tensors),
        "arrays.pt": _pt(arrays),
        "tensor.pt": _pt(tensors["feature"].bfloat16().t()),
        "old.pt": _pt(tensors, _use_new_zipfile_serialization=False),
        "plain.mat": _mat(odd),
        "packed.mat": _mat(arrays, do_compression=True),
        "sparse.mat": _mat(sparse),
        "labels.txt": "\n".join(map(str, labels["identity"])).encode(),
        "fractions.txt": b"1.0 \n2e0\n" * 4 + b"3",
        "large.npz": _zeros_npz(allowed),
        "large.mat": _zeros_mat(allowed),
        "bomb.npz": _zeros_npz(1024),
        "bomb.mat": _zeros_mat(1024),
        "bomb.pt": _pt(torch.zeros(1).expand(1 << 23, 64)),
    }


def read(path: Path) -> None:
    """Reads a file to its last byte: as features, or a text file as the labels of some."""
    if path.suffix == ".txt":
        features = path.with_name("features.npy")
        np.save(features, np.zeros((9, 2), np.float32))
        read_features(features, "query", identity=str(path))
    else:
        read_features(path, "query").feature.sum()


TOKENS = (
    b"\x93NUMPY", b"'descr'", b"'shape'", b"'fortran_order'", b"<f4", b"|O", b">c16", b"<U9", b"(", b"),", b"True",
    b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"\x80\x02", b"ctorch\n_utils\n", b"cos\nsystem\n",
    b"_rebuild_tensor_v2\n", b"}", b"]", b"q\x00", b"h\x00", b"\x94", b"2", b"0", b"t", b"\x85", b"R", b"u", b"Q", b".",
    b"X\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"MATLAB", b"IM", b"MI", b"feature",
    b"\x0e\0\0\0", b"\x0f\0\0\0", b"\x05\0\0\0", b"\x09\0\0\0", b"\x06\0\0\0", b"\x01\0\0\0", b"\n", b" ",
)  # fmt: skip
SUBJECT = runner.Subject(seeds, read, FeatureFileError, TOKENS)


def test_mutated_feature_files_are_read_or_refused() -> None:
    runner.check(SUBJECT)
