"""Reading features and labels from every kind of file: right contents, named errors, nothing believed unseen."""

from __future__ import annotations

import io
import itertools
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from vareid_ext.files.features import FeatureFileError, Features, open_arrays, read_features

scipy_io = pytest.importorskip("scipy.io")  # writes the MATLAB files; reading them needs no SciPy
KINDS = ("npz", "mat", "pt")


def images(seed, N, dtype=np.float32):
    rng = np.random.default_rng(seed)
    identity = rng.integers(0, 5, N)
    centers = np.random.default_rng(99).standard_normal((5, 12))
    return {
        "feature": (centers[identity] + rng.standard_normal((N, 12))).astype(dtype),
        "identity": identity,
        "camera": rng.integers(0, 3, N),
        "viewpoint": rng.integers(0, 3, N),
    }


def save(path, arrays, compressed=False):
    if path.suffix == ".npz":
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
    elif path.suffix == ".mat":
        scipy_io.savemat(path, arrays, do_compression=compressed)
    elif path.suffix == ".pt":
        torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, path)
    return path


def read_all(path, **keywords):
    return {key: entry.read() for key, entry in open_arrays(path, **keywords).items()}


# ---- the formats


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("compressed", [False, True])
def test_every_kind_with_labels(tmp_path, kind, dtype, compressed):
    arrays = images(2, 9, dtype)
    found = read_features(save(tmp_path / f"file.{kind}", arrays, compressed), "query")
    for name, value in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert found.feature.dtype == torch.from_numpy(arrays["feature"]).dtype
    assert found.identity.dtype == np.int64


def test_arrays_are_memory_maps_where_they_can_be(tmp_path):
    arrays = images(5, 7)
    extra = {"fortran": np.asfortranarray(arrays["feature"]), "empty": np.zeros((0, 3))}
    np.save(tmp_path / "a.npy", arrays["feature"])
    save(tmp_path / "a.npz", {**arrays, **extra})
    save(tmp_path / "a.mat", {**arrays, **extra})
    save(tmp_path / "a.pt", arrays)
    assert isinstance(read_all(tmp_path / "a.npy")[""], np.memmap)
    for kind in ("npz", "mat"):
        found = read_all(tmp_path / f"a.{kind}")
        assert isinstance(found["feature"].base if kind == "mat" else found["feature"], np.memmap)
        for name, value in {**arrays, **extra}.items():
            np.testing.assert_array_equal(found[name].reshape(value.shape), value)
    found = read_all(tmp_path / "a.pt")["feature"]
    np.testing.assert_array_equal(found, arrays["feature"])
    with (tmp_path / "a.pt").open("rb+") as file:  # a map sees what is written to the file
        at = file.read().index(arrays["feature"].tobytes())
        file.seek(at)
        file.write(bytes(4))
    assert found[0, 0] == 0


def test_bfloat16_and_plain_tensors(tmp_path):
    feature = torch.randn(5, 3).bfloat16()
    torch.save(feature, tmp_path / "a.pt")
    torch.save(feature, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "old.pt"):
        assert torch.equal(read_features(tmp_path / name, "query").feature, feature)


@pytest.mark.parametrize("zipped", [True, False])
def test_pt_files_are_read_as_torch_reads_them(tmp_path, zipped):
    """Views, shared storages, parameters, every dtype, plain values; in today's format and the one before."""
    base = torch.arange(24.0).reshape(4, 6)
    content = {
        "base": base, "transposed": base.T, "rows": base[1:3, ::2], "expanded": base[:1].expand(5, 6),
        "scalar": torch.tensor(3.0), "none": torch.zeros(0, 4), "parameter": torch.nn.Parameter(base + 1),
        **{str(dtype): torch.arange(6).to(dtype).reshape(2, 3) for dtype in (
            torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16,
            torch.float64, torch.uint16, torch.uint32, torch.uint64)},
    }  # fmt: skip
    torch.save({**content, "size": base.shape, "text": ["a", 1, 2.5, None]}, tmp_path / "a.pt",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    found = read_all(tmp_path / "a.pt")
    assert found.pop("text") == ["a", 1, 2.5, None]
    assert found.pop("size") == (4, 6)
    assert found.keys() == content.keys()
    for name, value in content.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value.detach()), name
    assert found["base"].data_ptr() % 4 == 0


def test_a_state_dict_is_read(tmp_path):
    model = torch.nn.Linear(3, 2)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert torch.equal(read_all(tmp_path / "a.pt")["weight"], model.weight.detach())


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_numpy_arrays_in_pt_files_are_read(tmp_path, protocol):
    arrays = images(1, 6)
    content = {**arrays, "camera": list(arrays["camera"]), "fortran": np.asfortranarray(arrays["feature"]),
               "big": arrays["feature"].astype(">f8")}  # fmt: skip
    torch.save(content, tmp_path / "a.pt", pickle_protocol=protocol)
    found = read_features(tmp_path / "a.pt", "query")
    for name, value in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), value)
    everything = read_all(tmp_path / "a.pt")
    np.testing.assert_array_equal(everything["fortran"], arrays["feature"])
    np.testing.assert_array_equal(everything["big"], arrays["feature"])


def test_dictionaries_and_objects_saved_by_numpy_are_read(tmp_path):
    arrays = images(1, 6)
    np.save(tmp_path / "a.npy", arrays, allow_pickle=True)
    np.savez(tmp_path / "a.npz", **{**arrays, "identity": arrays["identity"].astype(object)})
    for name in ("a.npy", "a.npz"):
        found = read_features(tmp_path / name, "gallery")
        for label, value in arrays.items():
            np.testing.assert_array_equal(getattr(found, label), value)


def test_matlab_files_hold_what_scipy_reads(tmp_path):
    """SciPy as a peer: all classes, whole numbers kept small as MATLAB does, short arrays within a tag, odd shapes."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{dtype}_{'x'.join(map(str, shape))}": rng.integers(0, 100, shape).astype(dtype)
        for dtype in ("f4", "f8", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
        for shape in ((1, 1), (1, 3), (4, 5), (2, 3, 4), (0, 3))
    }
    other = {"text": "abc", "cell": np.array(["a", 1], dtype=object), "record": {"a": 1}, "complex": np.array([1j])}
    for compressed in (False, True):
        path = tmp_path / f"{compressed}.mat"
        scipy_io.savemat(path, {**other, **arrays}, do_compression=compressed)
        entries, expected = open_arrays(path), scipy_io.loadmat(path)
        assert set(entries) == set(arrays) | set(other)
        for name in arrays:
            found = entries[name].read()
            assert found.dtype == expected[name].dtype
            np.testing.assert_array_equal(found, expected[name])
        for name in other:
            assert isinstance(entries[name].look(), str)


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matlab(name, flags, shape, numbers, compress=False):
    """A MATLAB 5 file by its published format."""
    parts = element(6, struct.pack("<II", flags, 0)) + element(5, struct.pack(f"<{len(shape)}i", *shape))
    variable = element(14, parts + element(1, name.encode()) + numbers)
    if compress:
        packed = zlib.compress(variable)
        variable = struct.pack("<II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x100) + b"IM" + variable


@pytest.mark.parametrize("compress", [False, True])
def test_matlab_keeps_whole_doubles_as_bytes(tmp_path, compress):
    content = matlab("pid", 6, (1, 12), element(2, bytes(range(12))), compress)
    (tmp_path / "a.mat").write_bytes(content)
    found = read_all(tmp_path / "a.mat")["pid"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [range(12)])
    np.testing.assert_array_equal(scipy_io.loadmat(tmp_path / "a.mat")["pid"], found)


def test_text_as_numpy_writes_it(tmp_path):
    arrays = images(3, 6)
    np.savetxt(tmp_path / "ids.txt", arrays["identity"])
    np.savetxt(tmp_path / "cams.txt", arrays["camera"], fmt="%d", header="cameras")
    (tmp_path / "views.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(str, arrays["viewpoint"])).encode())
    np.savetxt(tmp_path / "feature.txt", arrays["feature"].astype(np.float64))
    found = read_features(
        tmp_path / "feature.txt", "query",
        **{label: str(tmp_path / name) for label, name in (
            ("identity", "ids.txt"), ("camera", "cams.txt"), ("viewpoint", "views.txt"))},
    )  # fmt: skip
    for name, value in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), value)
    (tmp_path / "ids.txt").write_text("9007199254740993\n-1\n")
    assert read_all(tmp_path / "ids.txt")[""].ravel().tolist() == [2**53 + 1, -1]
    (tmp_path / "ids.txt").write_text("# identités\n7 # née\n8\n", encoding="utf-8")
    assert read_all(tmp_path / "ids.txt")[""].ravel().tolist() == [7, 8]


@pytest.mark.parametrize("character", ["\u00e9", "\u0663", "\u2003", "\U00010a01", "\U000d1efe", "\U0010ffff"])
def test_characters_of_no_number_in_text_are_refused(tmp_path, character):
    """NumPy looks some of them up outside its tables and dies."""
    file = tmp_path / "ids.txt"
    for text in (f"{character}2\n", f"2{character}\n", f"2\n{character}"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(FeatureFileError, match=r"ids\.txt"):
            read_all(file)


# ---- names

NAMES = {
    "feature": ("feat", "feats", "feature", "features", "embedding", "embeddings", "f"),
    "identity": ("pid", "pids", "label", "labels", "identity", "identities", "id", "ids"),
    "camera": ("cam", "cams", "camid", "camids", "camera", "cameras", "camera_id", "camera_ids"),
    "viewpoint": ("view", "views", "viewid", "viewids", "viewpoint", "viewpoints"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefixes", [("", ""), ("query_", "gallery_"), ("q_", "g_"), ("Query", "Gallery"), ("q", "g")])
def test_every_usual_name_is_found(tmp_path, kind, prefixes):
    query, gallery = images(3, 4), images(4, 6)
    width = max(map(len, NAMES.values()))
    for turn in range(width):
        chosen = {what: names[turn % len(names)] for what, names in NAMES.items()}
        sides = [{prefix + chosen[what]: data[what] for what in chosen}
                 for prefix, data in zip(prefixes, (query, gallery), strict=True)]  # fmt: skip
        paths = [save(tmp_path / f"{number}.{kind}", arrays) for number, arrays in enumerate(sides)]
        if prefixes != ("", ""):  # both sides in one file
            paths = [save(tmp_path / f"both.{kind}", sides[0] | sides[1])] * 2
        for side, path, prefix, data in zip(("query", "gallery"), paths, prefixes, (query, gallery), strict=True):
            found = read_features(path, side)
            for what, value in data.items():
                np.testing.assert_array_equal(getattr(found, what), value)
            assert found.sources == {what: f"{path}:{prefix}{name}" for what, name in chosen.items()}
            assert all(prefix + name in found.used() for name in chosen.values())


def test_the_sides_own_name_comes_before_the_common_one(tmp_path):
    np.savez(tmp_path / "a.npz", feature=np.zeros((3, 2)), pid=[1, 2, 3], gallery_pid=[7, 8, 9])
    assert read_features(tmp_path / "a.npz", "gallery").identity.tolist() == [7, 8, 9]
    assert read_features(tmp_path / "a.npz", "query").identity.tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_the_only_array_is_taken(tmp_path, kind):
    feature = images(3, 4)["feature"]
    for others in ({}, {"pid": np.arange(4)}, {"names": np.array(["a.jpg", "b.jpg"]), "pid": np.arange(4)}):
        if kind == "pt":
            torch.save({"whatever": feature, **others}, tmp_path / "a.pt")
        else:
            save(tmp_path / f"a.{kind}", {"whatever": feature, **others})
        found = read_features(tmp_path / f"a.{kind}", "query")
        np.testing.assert_array_equal(found.feature, feature)
        assert found.sources["feature"] == f"{tmp_path / f'a.{kind}'}:whatever"
    np.savez(tmp_path / "unnamed.npz", feature)
    np.testing.assert_array_equal(read_features(tmp_path / "unnamed.npz", "query").feature, feature)
    save(tmp_path / f"labels.{kind}", {"someone": np.arange(4)})
    source = str(tmp_path / f"labels.{kind}")
    found = read_features(tmp_path / "unnamed.npz", "query", identity=source)
    assert found.identity.tolist() == [0, 1, 2, 3]
    assert found.sources["identity"] == f"{source}:someone"
    save(tmp_path / f"other.{kind}", {"gallery_feature": feature})
    with pytest.raises(FeatureFileError, match=f"other.{kind}"):
        read_features(tmp_path / f"other.{kind}", "query")


def test_labels_from_elsewhere(tmp_path):
    arrays = images(6, 5)
    np.save(tmp_path / "f.npy", arrays["feature"])
    np.save(tmp_path / "ids.npy", arrays["identity"].astype(np.uint8)[:, None])
    (tmp_path / "cameras.txt").write_text("\n".join(map(str, arrays["camera"])))
    np.savez(tmp_path / "labels.npz", direction=arrays["viewpoint"].astype(float))
    found = read_features(
        tmp_path / "f.npy", "gallery", identity=str(tmp_path / "ids.npy"), camera=str(tmp_path / "cameras.txt"),
        viewpoint=f"{tmp_path / 'labels.npz'}:direction",
    )  # fmt: skip
    np.testing.assert_array_equal(found.identity, arrays["identity"])
    np.testing.assert_array_equal(found.camera, arrays["camera"])
    np.testing.assert_array_equal(found.viewpoint, arrays["viewpoint"])
    assert found.sources == {
        "feature": str(tmp_path / "f.npy"), "identity": str(tmp_path / "ids.npy"),
        "camera": str(tmp_path / "cameras.txt"), "viewpoint": f"{tmp_path / 'labels.npz'}:direction",
    }  # fmt: skip
    np.savez(tmp_path / "odd.npz", one=arrays["feature"], two=arrays["feature"], who=arrays["identity"])
    assert read_features(tmp_path / "odd.npz", "query", key="one", identity="who").identity.shape == (5,)


def test_only_the_labels_that_are_asked_for_are_read(tmp_path):
    arrays = images(6, 5)
    np.savez(tmp_path / "a.npz", **{**arrays, "viewpoint": np.array(["front"] * 5)})
    found = read_features(tmp_path / "a.npz", "query", labels=("identity", "camera"))
    assert list(found.sources) == ["feature", "identity", "camera"]
    assert found.viewpoint.tolist() == [-1] * 5
    with pytest.raises(FeatureFileError, match="viewpoint"):
        read_features(tmp_path / "a.npz", "query")


# ---- dtypes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_labels_of_every_dtype(tmp_path, kind, dtype):
    largest = {"f4": 2**24, "f8": 2**53, "u8": 2**63 - 1}.get(dtype, 0) or np.iinfo(dtype).max
    labels = np.array([0, 3, largest], dtype=dtype)
    path = save(tmp_path / f"a.{kind}", {"feature": np.zeros((3, 2)), "pid": labels})
    assert read_features(path, "query").identity.tolist() == [0, 3, largest]


@pytest.mark.parametrize("kind", KINDS)
def test_labels_beyond_int64_are_refused(tmp_path, kind):
    labels = np.array([0, 3, 2**63], dtype=np.uint64)
    with pytest.raises(FeatureFileError, match="query identity"):
        read_features(save(tmp_path / f"a.{kind}", {"feature": np.zeros((3, 2)), "pid": labels}), "query")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "b"])
def test_features_of_whole_numbers_are_exact(tmp_path, kind, dtype):
    largest = 1 if dtype == "b" else min(2**53, np.iinfo(dtype).max)
    feature = np.array([[0, 1], [largest, largest - 1]]).astype(bool if dtype == "b" else dtype)
    found = read_features(save(tmp_path / f"a.{kind}", {"feature": feature}), "query").feature
    assert found.is_floating_point()
    assert found.tolist() == feature.astype(int).tolist()


@pytest.mark.parametrize("value", [2**53 + 1, -(2**53) - 1])
def test_features_that_no_float_holds_are_refused(tmp_path, value):
    with pytest.raises(FeatureFileError, match="query features"):
        read_features(save(tmp_path / "a.npz", {"feature": np.array([[0, value]])}), "query")


# ---- sizes that a file declares


def with_rows(header_and_data, rows, more):
    """A .npy file whose header claims more rows."""
    before, after = f"({rows}, 12)".encode(), f"({rows + more}, 12)".encode()
    assert header_and_data.count(before) == 1
    return header_and_data.replace(before + b" " * (len(after) - len(before)), after)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("more", [-1, 1, 30])
def test_rows_that_a_member_does_not_hold_are_no_features(tmp_path, compressed, more):
    """The bytes behind the member are other members' and the directory's."""
    content = io.BytesIO()
    np.save(content, images(7, 40)["feature"])
    with zipfile.ZipFile(tmp_path / "a.npz", "w", 8 if compressed else 0) as archive:
        archive.writestr("feature.npy", with_rows(content.getvalue(), 40, more))
        archive.writestr("other.npy", bytes(5000))
    with pytest.raises(FeatureFileError, match=r"a\.npz.*feature"):
        read_features(tmp_path / "a.npz", "query")
    (tmp_path / "a.npy").write_bytes(with_rows(content.getvalue(), 40, more) + bytes(5000 if more > 0 else 0))
    with pytest.raises(FeatureFileError, match=r"a\.npy"):
        read_features(tmp_path / "a.npy", "query")


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_beyond_their_storage_are_no_features(tmp_path, zipped):
    """torch.load maps what the pickle declares, and hands out whatever follows in the file."""
    path = tmp_path / "a.pt"
    torch.save({"feature": torch.zeros(4, 8), "other": torch.ones(64, 64)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    K = b"K" + bytes([32])  # the storage's number of elements
    assert whole.count(K) == 1
    path.write_bytes(whole.replace(K, b"K" + bytes([80])))
    with pytest.raises(FeatureFileError, match=r"a\.pt"):
        read_features(path, "query")
    rows = b"K\x04K\x08\x86"  # the shape
    assert whole.count(rows) == 1
    path.write_bytes(whole.replace(rows, b"K\x09K\x08\x86"))
    with pytest.raises(FeatureFileError, match=r"a\.pt"):
        read_features(path, "query")


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 3), (-3, -4), (2**31 - 1, 2**31 - 1)])
def test_matlab_arrays_of_another_size_are_refused(tmp_path, compress, shape):
    (tmp_path / "a.mat").write_bytes(matlab("feature", 6, shape, element(9, bytes(8 * 12)), compress) + bytes(0))
    with pytest.raises(FeatureFileError, match=r"a\.mat"):
        read_features(tmp_path / "a.mat", "query")


def peak_of(function):
    """Bytes that Python and NumPy held at most during the call, and what it raised."""
    tracemalloc.start()
    try:
        function()
        raised = None
    except FeatureFileError as error:
        raised = error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, raised


def bomb(path, size):
    """A file of features with the key "big" that unpacks to ``size`` bytes."""
    N = size // 80
    feature, big = np.ones((2, 10)), np.zeros((N, 10))
    if path.suffix == ".pt":
        torch.save({"feature": torch.from_numpy(feature), "big": torch.zeros(1, 1).double().expand(N, 10)}, path)
    else:
        save(path, {"feature": feature, "big": big}, compressed=True)
    return N


@pytest.mark.parametrize("kind", KINDS)
def test_bombs_are_refused_before_they_unpack(tmp_path, kind):
    path, size, limit = tmp_path / f"a.{kind}", 48 << 20, 8 << 20
    N = bomb(path, size)
    assert path.stat().st_size < limit / 16
    peak, raised = peak_of(lambda: read_features(path, "query", key="big", max_unpacked=limit))
    assert path.name in str(raised)
    assert peak < 2 << 20
    peak, raised = peak_of(lambda: read_features(path, "query", max_unpacked=limit))
    assert raised is None
    assert peak < 2 << 20
    assert read_features(path, "query", key="big", max_unpacked=2 * size).feature.shape == (N, 10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limit_follows_the_size_of_the_file(tmp_path, kind):
    """A large file of real features needs no option, however small the limit."""
    arrays = {"feature": np.random.default_rng(0).standard_normal((200, 50))}
    found = read_features(save(tmp_path / f"a.{kind}", arrays, compressed=True), "query", max_unpacked=0)
    np.testing.assert_array_equal(found.feature, arrays["feature"])


def test_members_that_are_larger_than_declared_do_not_unpack(tmp_path):
    """The directory of the archive says 100 bytes; the stream holds 64 MB."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("feature.npy", bytes(64 << 20))
    whole = path.read_bytes()
    assert whole.count(struct.pack("<I", 64 << 20)) == 2
    path.write_bytes(whole.replace(struct.pack("<I", 64 << 20), struct.pack("<I", 100)))
    peak, raised = peak_of(lambda: read_features(path, "query"))
    assert path.name in str(raised)
    assert peak < 2 << 20
    (tmp_path / "a.mat").write_bytes(
        matlab("feature", 6, (1, 1), element(9, bytes(8)), True)[:128]
        + (lambda packed: struct.pack("<II", 15, len(packed)) + packed)(
            zlib.compress(
                struct.pack("<II", 14, 56) + matlab("feature", 6, (1, 1), element(9, bytes(8)))[136:] + bytes(64 << 20)
            )
        )
    )
    peak, raised = peak_of(lambda: read_features(tmp_path / "a.mat", "query"))
    assert "a.mat" in str(raised)
    assert peak < 2 << 20


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    """Version 2 of .npy has four bytes for the length of its header."""
    head = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("feature.npy", head + b" " * (64 << 20))
    (tmp_path / "a.npy").write_bytes(head)
    os.truncate(tmp_path / "a.npy", 64 << 20)
    for name in ("a.npz", "a.npy"):
        peak, raised = peak_of(lambda name=name: read_features(tmp_path / name, "query"))
        assert name in str(raised)
        assert peak < 2 << 20


def in_pt(path, pickled):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickled)


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",  # torch.load takes two gigabytes for this
        b"\x80\x02}r\xff\xff\xff\x7f.",  # Python's own reader takes 32 gigabytes
        b"\x80\x02}(X\x07\x00\x00\x00feature" + b"]" * 600_001 + b"u.",
        b"\x80\x02}X\x07\x00\x00\x00featurecnumpy._core.multiarray\n_reconstruct\n)Rq\x00"
        b"(K\x01J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R\x89X\x00\x00\x00\x00tbs.",
    ],
    ids=["call", "memo", "instructions", "shape"],
)
def test_pickles_that_ask_for_memory_get_none(tmp_path, pickled):
    in_pt(tmp_path / "a.pt", pickled)
    (tmp_path / "old.pt").write_bytes(pickled)
    for name in ("a.pt", "old.pt"):
        peak, raised = peak_of(lambda name=name: read_features(tmp_path / name, "query", max_unpacked=2**20))
        assert name in str(raised)
        assert peak < 16 * len(pickled) + (2 << 20)


# A tuple that holds twice one that holds twice ... : two to the sixty when it is hashed, copied or printed.
DEEP = b"K\x00\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60
SHAPE, BEGIN = b"K\x01\x85K\x01\x85", b"ctorch._utils\n_rebuild_tensor_v2\n("
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n%sX\x03\x00\x00\x00cpuK\x01%stQ"
ARRAY = b"cnumpy._core.multiarray\n_reconstruct\n)R(K\x01%scnumpy\ndtype\n%s\x85R\x89NtbX\x00\x00\x00\x00"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "program",
    [
        lambda view: BEGIN + STORAGE % (b"h\x00", view) + b"K\x00" + SHAPE + b"\x89NtR",
        lambda view: BEGIN + STORAGE % (b"X\x01\x00\x00\x000", view) + b"K\x00h\x00h\x00\x89NtR",
        lambda view: ARRAY % (b"h\x00", b"X\x02\x00\x00\x00f8"),
        lambda view: ARRAY % (b"K\x01\x85", b"h\x00"),
        lambda view: b"ccollections\nOrderedDict\n(h\x00K\x01\x86lq\x01\x85R",
        lambda view: b"ctorch\nSize\nh\x00\x85R",
        lambda view: b"h\x00",
    ],
    ids=["key", "shape", "array", "dtype", "dictionary", "size", "value"],
)
def test_tuples_of_tuples_do_not_hang(tmp_path, program, zipped):
    value = b"X\x07\x00\x00\x00feature" + program(b"" if zipped else b"N") + b"s."
    content = b"}X\x04\x00\x00\x00junk(" + DEEP + b"ts" + value
    path = tmp_path / "a.pt"
    if zipped:
        in_pt(path, b"\x80\x02" + content)
    else:
        torch.save(torch.zeros(1), path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().partition(b"ctorch._utils")[0] + content + b"\x80\x02].")
    np.save(tmp_path / "f.npy", np.zeros((3, 2)))
    for file, keywords in ((path, {}), (path, {"key": "x"}), ("f.npy", {"identity": f"{path}:feature"})):
        with pytest.raises(FeatureFileError, match=r"a\.pt"):
            read_features(tmp_path / file, "query", **keywords)


def test_compressed_members_of_pt_files_are_refused(tmp_path):
    """torch.save writes none; torch.load maps the compressed bytes as if they were numbers."""
    torch.save({"feature": torch.zeros(100, 10)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as packed:
        for member in whole.namelist():
            packed.writestr(member, whole.read(member))
    with pytest.raises(FeatureFileError, match=r"b\.pt"):
        read_features(tmp_path / "b.pt", "query")


# ---- damage and malice


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile-pickle-ran",))


@pytest.mark.parametrize("kind", ["npy", *KINDS])
def test_truncated_files_are_named(tmp_path, kind):
    arrays = images(7, 50)
    path = tmp_path / f"file.{kind}"
    if kind == "npy":
        np.save(path, arrays["feature"])
    else:
        save(path, arrays)
    whole = path.read_bytes()
    for size in (0, 1, 20, len(whole) // 3, len(whole) - 200):
        path.write_bytes(whole[:size])
        with pytest.raises(FeatureFileError, match=f"file.{kind}: "):
            read_features(path, "query")


@pytest.mark.parametrize("kind", ["npy", *KINDS, "old.pt", "packed.npz", "packed.mat", "numpy.pt", "dict.npy"])
def test_any_damage_is_a_named_error(tmp_path, kind):
    """Changed, lost and added bytes, where the readers of these formats raise errors of many kinds."""
    path, arrays = tmp_path / f"file.{kind}", {"feature": images(7, 9)["feature"], "pid": np.arange(9)}
    if kind == "npy":
        np.save(path, arrays["feature"])
    elif kind == "dict.npy":
        np.save(path, arrays, allow_pickle=True)
    elif kind in ("old.pt", "numpy.pt"):
        torch.save(arrays if kind == "numpy.pt" else {"feature": torch.zeros(9, 12)}, path,
                   _use_new_zipfile_serialization=kind == "numpy.pt")  # fmt: skip
    else:
        save(path, arrays, compressed=kind.startswith("packed"))
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for turn in range(500):
        at, size = rng.integers(0, 200 if turn % 2 else len(whole)), rng.integers(1, 4)
        change = [whole[at : at + size], b"", bytes(rng.integers(0, 256, size).tolist())]
        path.write_bytes(whole[:at] + change[rng.integers(1, 3)] + whole[at + size * rng.integers(0, 2) :])
        try:
            read_features(path, "query")
        except FeatureFileError as error:
            refused += str(path) in str(error)
    assert refused > 100


def test_every_byte_of_a_matlab_description_may_be_wrong(tmp_path):
    """SciPy's reader dies with SIGSEGV at one of them: byte 172, 7 -> 86."""
    path = save(tmp_path / "a.mat", {"feature": images(7, 9)["feature"], "pid": np.arange(9)[None]})
    whole = path.read_bytes()
    for at, value in itertools.product(range(124, 200), (0, 1, 7, 15, 86, 128, 255)):
        path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
        try:
            size = read_features(path, "query").feature.numel()
        except FeatureFileError as error:
            size = 9 * 12 * (str(path) in str(error))
        assert size == 9 * 12


def test_values_that_are_no_arrays_are_described(tmp_path):
    torch.save({"x": [[1], [1, 2]], "y": torch.zeros(3), "z": torch.zeros(4)}, tmp_path / "a.pt")
    with pytest.raises(FeatureFileError, match=r"x \(list\), y \[3\]"):
        read_features(tmp_path / "a.pt", "query")
    np.savez(tmp_path / "a.npz", **{f"key{number}": np.zeros(3) for number in range(500)})
    with pytest.raises(FeatureFileError, match="480 more") as error:
        read_features(tmp_path / "a.npz", "query")
    assert len(str(error.value)) < 1000
    np.savez(tmp_path / "b.npz", **{"\x1b[31mred\n": np.zeros((3, 2)), "k" * 5000: np.zeros((3, 2))})
    with pytest.raises(FeatureFileError, match="red") as error:
        read_features(tmp_path / "b.npz", "query")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    assert read_features(tmp_path / "b.npz", "query", key="\x1b[31mred\n").used().isprintable()


@pytest.mark.parametrize("kind", ["npz", "npy", "pt", "mat"])
def test_what_nobody_asks_for_may_be_anything(tmp_path, kind):
    arrays = images(7, 5)
    path = tmp_path / f"a.{kind}"
    names = np.array(["images/0001.jpg", "é"])
    odd = {"names": names, "list": list(names), "time": np.array("2020-01-01", "M8[D]"), "rows": np.zeros(2, "U3,f4")}
    if kind == "npz":
        np.savez(path, **arrays, names=np.array([Hostile(), None]), records=np.zeros(2, dtype="U3,f4"))
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("README", "no array")
    elif kind == "pt":
        torch.save({**arrays, **odd, "values": ["a", None, ("b", {})], 3: torch.zeros(1)}, path)
    elif kind == "npy":
        np.save(path, {**arrays, **odd})
    else:
        scipy_io.savemat(path, {**arrays, "names": np.array(["a", "bc"], dtype=object), "options": {"a": {"b": 1}}})
    found = read_features(path, "query")
    for name, value in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), value)


def test_pickles_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", feature=np.array([Hostile()], dtype=object))
    torch.save({"feature": Hostile()}, tmp_path / "a.pt")
    torch.save({"feature": Hostile()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.npy", "a.npz", "a.pt", "old.pt", "b.pt"):
        with pytest.raises(FeatureFileError, match=name) as error:
            read_features(tmp_path / name, "query")
        assert "\x1b" not in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "hostile-pickle-ran").exists()


@pytest.mark.parametrize(
    ("arrays", "keywords", "named"),
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, {}, r"x \[3, 2\], y \[3\]"),
        ({"feature": np.zeros((3, 2))}, {"key": "features"}, r"'features'.*feature \[3, 2\]"),
        ({"feature": np.zeros(3)}, {}, r"query features.*\[3\]"),
        ({"feature": np.zeros((3, 0))}, {}, r"query features.*\[3, 0\]"),
        ({"feature": np.zeros((3, 2), dtype=complex)}, {}, "query features.*complex128"),
        ({"feature": np.zeros((3, 2), dtype=np.longdouble)}, {}, "query features"),
        ({"feature": np.full((3, 2), "a")}, {}, "query features.*U1"),
        ({"feature": np.full((3, 2), None)}, {}, "query features"),
        ({"feature": np.zeros((3, 2)), "pid": np.zeros(4, dtype=int)}, {}, "query identity.*4.*3"),
        ({"feature": np.zeros((3, 2)), "pid": np.array([0, 1, 0.5])}, {}, "query identity"),
        ({"feature": np.zeros((3, 2)), "pid": np.array([0, 1, np.nan])}, {}, "query identity"),
        ({"feature": np.zeros((3, 2)), "pid": np.array([0, 1, np.inf])}, {}, "query identity"),
        ({"feature": np.zeros((3, 2)), "pid": np.array(["a", "b", "c"])}, {}, "query identity"),
        ({"feature": np.zeros((3, 2)), "pid": np.array([[1], ["b"], 3], dtype=object)}, {}, "query identity"),
        ({"feature": np.zeros((3, 2)), "pid": np.array([1, 2, 2**70], dtype=object)}, {}, "query identity"),
        ({"feature": np.zeros((3, 2)), "pid": np.array([True, False, True])}, {}, "query identity"),
        ({"feature": np.zeros((3, 2)), "cam": np.zeros((3, 2))}, {}, r"query camera.*\[3, 2\]"),
        ({"feature": np.zeros((3, 2))}, {"identity": "who"}, "who"),
        ({"feature": np.zeros((3, 2))}, {"camera": "none.npz:x"}, "none.npz"),
    ],
)
def test_wrong_contents_are_named(tmp_path, arrays, keywords, named):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(FeatureFileError, match=named):
        read_features(tmp_path / "file.npz", "query", **keywords)


@pytest.mark.parametrize("kind", ["npy", *KINDS, "pth", "txt"])
def test_only_files_are_opened(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    os.mkfifo(path)  # opening it would wait for a writer for ever
    np.save(tmp_path / "f.npy", np.zeros((3, 2)))
    pipe, other = set(), set()
    for file, keywords in ((path, {}), ("f.npy", {"identity": str(path)}), ("f.npy", {"camera": f"{path}:x"})):
        with pytest.raises(FeatureFileError, match=path.name) as error:
            read_features(tmp_path / file, "query", **keywords)
        pipe.add(str(error.value))
    path.unlink()
    for make in (lambda: None, path.mkdir):
        make()
        with pytest.raises(FeatureFileError, match=path.name) as error:
            open_arrays(path)
        other.add(str(error.value))
    assert (len(pipe), len(other), len(pipe & other)) == (1, 2, 0)  # each has its own reason


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b"1,2"),
        ("a.txt", b"1 2\nthree"),
        ("a.txt", b""),
        ("a.txt", b"1\n2 3\n"),
        ("a.txt", bytes(range(256))),
        ("a.mat", b"MATLAB 7.3 MAT-file" + bytes(600)),
        ("a.mat", struct.pack("<5i", 0, 1, 1, 0, 2) + b"a\0" + bytes(8)),  # MATLAB 4
        ("a.npz", b"PK\x05\x06" + bytes(18)),
        ("a.pt", b"PK\x05\x06" + bytes(18)),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FeatureFileError, match=name):
        read_features(tmp_path / name, "query")


# ---- what the package writes itself


def labelled(dtype=torch.float32, count=5):
    arrays = images(6, count)
    return Features(
        **{name: arrays[name] for name in ("identity", "camera", "viewpoint")},
        feature=torch.from_numpy(arrays["feature"]).to(dtype), paths=tuple(f"b\u00e4r/{i}.jpg" for i in range(count)),
        columns={"clothes": np.arange(count) - 1},
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_features_are_read_as_they_were_saved(tmp_path, dtype):
    written = labelled(dtype)
    written.save(tmp_path / "a.npz")
    found = read_features(tmp_path / "a.npz", "gallery", paths=True)
    assert torch.equal(found.feature, written.feature.to(found.feature.dtype))
    assert found.feature.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    for name in ("identity", "camera", "viewpoint"):
        np.testing.assert_array_equal(getattr(found, name), getattr(written, name))
    assert found.paths == written.paths
    assert found.columns == {}
    found = read_features(tmp_path / "a.npz", "gallery", columns={"clothes": None, "day": None})
    assert {name: values.tolist() for name, values in found.columns.items()} == {"clothes": [-1, 0, 1, 2, 3]}
    assert found.sources["clothes"] == f"{tmp_path / 'a.npz'}:column_clothes"
    assert read_features(tmp_path / "a.npz", "query").paths == ()
    replace(written, paths=()).save(tmp_path / "b.npz")
    assert read_features(tmp_path / "b.npz", "query", paths=True).paths == ()


def test_features_are_selected_with_their_labels():
    some = labelled().select([4, 0])
    assert torch.equal(some.feature, labelled().feature[[4, 0]])
    assert some.identity.tolist() == labelled().identity[[4, 0]].tolist()
    assert some.columns["clothes"].tolist() == [3, -1]
    assert some.paths == ("b\u00e4r/4.jpg", "b\u00e4r/0.jpg")
    assert len(labelled().select(np.arange(5) > 2)) == 2


def test_features_take_the_labels_of_images():
    feature = torch.arange(15.0).reshape(5, 3)
    found = Features.of(feature, labelled())
    assert found.feature is feature
    assert found.camera.tolist() == labelled().camera.tolist()
    assert found.columns["clothes"].tolist() == labelled().columns["clothes"].tolist()
    with pytest.raises(ValueError, match="feature: 4 entries were given; 5 are needed"):
        Features.of(feature[:4], labelled())
    with pytest.raises(ValueError, match="paths: 1 entries were given"):
        Features.of(feature, labelled(), paths=("a",))


def test_a_further_column_of_another_name_or_file_is_found(tmp_path):
    np.savez(tmp_path / "a.npz", **images(6, 5), Clothes=np.arange(5), query_day=[[3.0], [3], [3], [3], [3]])
    np.save(tmp_path / "b.npy", np.arange(5) * 2)
    found = read_features(
        tmp_path / "a.npz", "query", columns={"clothes": None, "day": None, "bag": str(tmp_path / "b.npy")}
    )
    assert {name: values.tolist() for name, values in found.columns.items()} == {
        "clothes": [0, 1, 2, 3, 4], "day": [3] * 5, "bag": [0, 2, 4, 6, 8],
    }  # fmt: skip
    assert read_features(tmp_path / "a.npz", "gallery", columns={"day": None}).columns == {}
    np.savez(tmp_path / "c.npz", **images(6, 5), clothes=np.arange(4))
    with pytest.raises(FeatureFileError, match="query clothes: length 4"):
        read_features(tmp_path / "c.npz", "query", columns={"clothes": None})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"camera": np.arange(5)}, "columns: 'camera' was given"),
        ({"none": np.arange(5)}, "columns: 'none' was given"),
        ({"a|b": np.arange(5)}, "columns: 'a|b' was given"),
        ({3: np.arange(5)}, "columns: 3 was given"),
        ({"day": np.arange(4)}, "day: 4 entries were given; 5 are needed"),
        ({"day": np.arange(5) / 2}, "day: values of type float64"),
        ({"day": np.zeros((5, 1), dtype=int)}, "day: shape"),
    ],
)
def test_further_columns_that_are_none_are_named(columns, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(labelled(), columns=columns)


@pytest.mark.parametrize("path", [np.arange(5), np.array(["a", "b"]), np.array([["a"]] * 5)])
def test_paths_that_are_none_are_named(tmp_path, path):
    np.savez(tmp_path / "a.npz", **images(6, 5), path=path)
    with pytest.raises(FeatureFileError, match=r"path cannot be read .* text \[5\] is needed"):
        read_features(tmp_path / "a.npz", "query", paths=True)
    assert len(read_features(tmp_path / "a.npz", "query")) == 5


def test_names_are_what_identities_and_cameras_are_numbered_by(tmp_path):
    arrays = {"feature": np.eye(4, dtype=np.float32), "identity": [7, 3, -1, 7], "camera": [1, 1, 1, 2]}
    np.savez(tmp_path / "a.npz", **arrays, identity_name=["anna", "bert", "", "anna"])
    found = read_features(tmp_path / "a.npz", "query")
    assert found.names == {"identity": ("anna", "bert")}
    assert found.identity.tolist() == [0, 1, -1, 0]
    assert found.camera.tolist() == [1, 1, 1, 2]
    found.save(tmp_path / "b.npz")
    again = read_features(tmp_path / "b.npz", "query")
    assert again.names == found.names
    assert again.identity.tolist() == found.identity.tolist()
    # Naming the usual key changes nothing; another's numbers are taken as they are, which is said.
    assert read_features(tmp_path / "a.npz", "query", identity="identity").names == found.names
    other = read_features(tmp_path / "a.npz", "query", identity="camera")
    assert other.identity.tolist() == [1, 1, 1, 2]
    assert "identity_name: left aside" in other.used()
    for names in (
        ["anna", "bert", "", "cleo"],
        ["anna"] * 2 + ["", "anna"],
        ["anna", "", "", "anna"],
        ["a", "b", "c", "a"],
    ):
        np.savez(tmp_path / "a.npz", **arrays, identity_name=names)
        with pytest.raises(FeatureFileError, match="a number has no name or two, or a name belongs to two numbers"):
            read_features(tmp_path / "a.npz", "query")
    np.savez(tmp_path / "a.npz", **arrays, identity_name=["anna"])
    with pytest.raises(FeatureFileError, match="identity_name cannot be read"):
        read_features(tmp_path / "a.npz", "query")
