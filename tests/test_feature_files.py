"""Reading features and labels from every kind of file: right contents, named errors."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch

from vareid_ext.feature_files import FeatureFileError, read_arrays, read_features


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


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".mat":
        pytest.importorskip("scipy.io").savemat(path, arrays)
    elif path.suffix == ".pt":
        torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, path)
    return path


@pytest.mark.parametrize("kind", ["npz", "mat", "pt"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_kind_with_labels(tmp_path, kind, dtype):
    arrays = images(2, 9, dtype)
    found = read_features(save(tmp_path / f"file.{kind}", arrays), "query")
    for name, value in arrays.items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert found.feature.dtype == torch.from_numpy(arrays["feature"]).dtype
    assert found.identity.dtype == torch.int64


@pytest.mark.parametrize("kind", ["npz", "mat", "pt"])
def test_one_file_for_both_sides(tmp_path, kind):
    query, gallery = images(3, 4), images(4, 6)
    both = {
        **{f"{side}_{short}": data[name] for side, data in (("query", query), ("gallery", gallery))
           for short, name in (("f", "feature"), ("label", "identity"), ("cam", "camera"))},
    }  # fmt: skip
    path = save(tmp_path / f"file.{kind}", both)
    for side, data in (("query", query), ("gallery", gallery)):
        found = read_features(path, side)
        np.testing.assert_array_equal(found.feature, data["feature"])
        np.testing.assert_array_equal(found.identity, data["identity"])
        np.testing.assert_array_equal(found.camera, data["camera"])
        assert found.viewpoint is None


def test_npy_npz_and_pt_are_memory_maps(tmp_path):
    arrays = images(5, 7)
    np.save(tmp_path / "a.npy", arrays["feature"])
    np.savez(tmp_path / "a.npz", **arrays, fortran=np.asfortranarray(arrays["feature"]), empty=np.zeros((0, 3)))
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    torch.save({"feature": torch.from_numpy(arrays["feature"])}, tmp_path / "a.pt")
    mapped = read_arrays(tmp_path / "a.npz")
    assert isinstance(read_arrays(tmp_path / "a.npy")[""], np.memmap)
    assert all(isinstance(mapped[name], np.memmap) for name in [*arrays, "fortran"])
    for name, value in arrays.items():
        np.testing.assert_array_equal(mapped[name], value)
        np.testing.assert_array_equal(read_arrays(tmp_path / "packed.npz")[name], value)
    np.testing.assert_array_equal(mapped["fortran"], arrays["feature"])
    assert mapped["empty"].shape == (0, 3)
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.pt")["feature"], arrays["feature"])


def test_bfloat16_and_plain_tensors(tmp_path):
    feature = torch.randn(5, 3).bfloat16()
    torch.save(feature, tmp_path / "a.pt")
    torch.save(feature, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "old.pt"):
        assert torch.equal(read_features(tmp_path / name, "query").feature, feature)


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
    np.savez(tmp_path / "odd.npz", embedding=arrays["feature"], who=arrays["identity"])
    assert read_features(tmp_path / "odd.npz", "query", key="embedding", identity="who").identity.shape == (5,)


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("hostile-pickle-ran",))


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "mat"])
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


@pytest.mark.parametrize("kind", ["npy", "npz", "pt"])
def test_any_damage_is_a_named_error(tmp_path, kind):
    """Flipped, lost and added bytes at the front, where the readers of these formats raise errors of many kinds."""
    path = tmp_path / f"file.{kind}"
    if kind == "npy":
        np.save(path, images(7, 9)["feature"])
    else:
        save(path, {"feature": images(7, 9)["feature"]})
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        at, size = rng.integers(0, 200), rng.integers(1, 4)
        change = [whole[at : at + size], b"", bytes(rng.integers(0, 256, size).tolist())]
        path.write_bytes(whole[:at] + change[rng.integers(1, 3)] + whole[at + size * rng.integers(0, 2) :])
        try:
            read_features(path, "query")
        except FeatureFileError as error:
            refused += str(path) in str(error)
    assert refused > 100


def test_lists_in_a_pt_file_are_described(tmp_path):
    torch.save({"x": [[1], [1, 2]], "y": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(FeatureFileError, match=r"it holds x \(list\), y \[3\]"):
        read_features(tmp_path / "a.pt", "query")


def test_pickles_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "a.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", feature=np.array([Hostile()], dtype=object))
    torch.save({"feature": Hostile()}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.npy", "a.npz", "a.pt", "b.pt"):
        with pytest.raises(FeatureFileError, match=name):
            read_features(tmp_path / name, "query")
    assert not (tmp_path / "hostile-pickle-ran").exists()


@pytest.mark.parametrize(
    ("arrays", "keywords", "message"),
    [
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, {}, r"no key of the usual names .* it holds x \[3, 2\], y \[3\]"),
        ({"feature": np.zeros((3, 2))}, {"key": "features"}, r"no key 'features'; it holds feature \[3, 2\]"),
        ({"feature": np.zeros(3)}, {}, r"shape \[3\] was found"),
        ({"feature": np.zeros((3, 2), dtype=int)}, {}, "dtype int64 was found"),
        ({"feature": np.full((3, 2), "a")}, {}, "dtype <U1 was found"),
        ({"feature": np.zeros((3, 2)), "pid": np.zeros(4, dtype=int)}, {}, "query identity: length 4 was given; 3"),
        ({"feature": np.zeros((3, 2)), "pid": np.array([0, 1, 0.5])}, {}, "query identity: holds values that are not"),
        ({"feature": np.zeros((3, 2)), "pid": np.array([0, 1, np.nan])}, {}, "query identity: holds values that are"),
        ({"feature": np.zeros((3, 2)), "pid": np.array(["a", "b", "c"])}, {}, "query identity holds values that are"),
        ({"feature": np.zeros((3, 2)), "cam": np.zeros((3, 2))}, {}, r"query camera: shape \[3, 2\]"),
        ({"feature": np.zeros((3, 2))}, {"identity": "who"}, "who: is neither a file nor a key"),
        ({"feature": np.zeros((3, 2))}, {"camera": "none.npz:x"}, "none.npz: does not exist"),
    ],
)
def test_wrong_contents_are_named(tmp_path, arrays, keywords, message):
    np.savez(tmp_path / "file.npz", **arrays)
    with pytest.raises(FeatureFileError, match=message):
        read_features(tmp_path / "file.npz", "query", **keywords)


def test_files_that_cannot_be_read_at_all(tmp_path):
    with pytest.raises(FeatureFileError, match=r"none.npy: does not exist"):
        read_arrays(tmp_path / "none.npy")
    with pytest.raises(FeatureFileError, match="is a folder"):
        read_arrays(tmp_path)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(FeatureFileError, match=r"suffix '.csv' was given; allowed are .npy"):
        read_arrays(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_text("1 2\nthree")
    with pytest.raises(FeatureFileError, match="entry 3 is 'three'"):
        read_arrays(tmp_path / "a.txt")
    (tmp_path / "a.mat").write_bytes(b"MATLAB 7.3 MAT-file" + bytes(600))
    with pytest.raises(FeatureFileError, match=r"MATLAB 7\.3"):
        read_arrays(tmp_path / "a.mat")
