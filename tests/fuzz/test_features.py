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
from vareid_ext.feature_files import FeatureFileError, read_features

scipy_io = pytest.importorskip("scipy.io")
BOMB = 1 << 31  # bytes: what some megabytes unpack to
PART = bytes(1 << 20)


def _npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


def _pt(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def _mat(content: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    scipy_io.savemat(file, content, **options)
    data = file.getvalue()
    return data if options.get("format") == "4" else b"MATLAB 5.0 MAT-file".ljust(116) + data[116:]  # no date


def _zip(members: dict[str, bytes], huge: str) -> bytes:
    """A compressed archive in which zeros follow one member's bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name, data in members.items():
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member._compressor = zlib.compressobj(wbits=-15)
                member.write(data)
                for _ in range(BOMB // len(PART) if name == huge else 0):
                    member.write(PART)
    return file.getvalue()


def _bombs() -> dict[str, bytes]:
    """Valid files of an array of zeros."""
    rows = BOMB // 4 // 64
    npy = _npy(np.zeros((0, 64), np.float32)).replace(b"(0, 64), }" + b" " * 8, f"({rows}, 64), }}".encode().ljust(18))
    with zipfile.ZipFile(io.BytesIO(_pt({"feature": torch.zeros(1009, 64)}))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (huge,) = (name for name in members if name.endswith("/data/0"))
    (table,) = (name for name in members if name.endswith("/data.pkl"))
    sizes = {b"J" + struct.pack("<i", 1009 * 64): rows * 64, b"M" + struct.pack("<H", 1009): rows}
    for code, size in sizes.items():
        assert code in members[table]
        members[table] = members[table].replace(code, b"J" + struct.pack("<i", size))
    head = struct.pack("<IIIIIIII", 6, 8, 6, 0, 5, 8, rows, 32) + struct.pack("<II8sII", 1, 7, b"feature", 9, BOMB)
    packer = zlib.compressobj()
    parts = [packer.compress(struct.pack("<II", 14, len(head) + BOMB) + head)]
    parts += [packer.compress(PART) for _ in range(BOMB // len(PART))]
    packed = b"".join([*parts, packer.flush()])
    return {
        "bomb.npz": _zip({"feature.npy": npy}, "feature.npy"),
        "bomb.pt": _zip({**members, huge: b""}, huge),
        "bomb.mat": _mat({})[:128] + struct.pack("<II", 15, len(packed)) + packed,
    }


def seeds() -> dict[str, bytes]:
    """Features of 9 images with their labels, in every kind of file."""
    rng = np.random.default_rng(0)
    feature = rng.standard_normal((9, 6)).astype(np.float32)
    labels = {name: rng.integers(0, 4, 9) for name in ("identity", "camera", "viewpoint")}
    arrays = {"feature": feature, **labels}
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    odd = {**arrays, "names": np.array(["a", "bc"], object), "part": {"x": feature, "y": "text"}, "on": np.eye(3) > 0}
    sparse = {**arrays, "weight": pytest.importorskip("scipy.sparse").eye(5).tocsc(), "z": feature * 1j}
    stored, packed = io.BytesIO(), io.BytesIO()
    np.savez(stored, **arrays)
    np.savez_compressed(packed, **arrays)
    text = "\n".join(str(i) for i in labels["identity"])
    return {
        "c-order.npy": _npy(feature),
        "f-order.npy": _npy(np.asfortranarray(feature.astype(">f8")), (2, 0)),
        "stored.npz": stored.getvalue(),
        "packed.npz": packed.getvalue(),
        "table.pt": _pt(tensors),
        "tensor.pt": _pt(tensors["feature"].bfloat16().t()),
        "old.pt": _pt(tensors, _use_new_zipfile_serialization=False),
        "plain.mat": _mat(odd),
        "packed.mat": _mat(arrays, do_compression=True),
        "sparse.mat": _mat(sparse),
        "4.mat": _mat(arrays, format="4"),
        "labels.txt": text.encode(),
        **_bombs(),
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
