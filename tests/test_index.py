"""GalleryIndex: one query at a time is re-ranked as with the whole gallery; galleries that grow; damaged folders."""

from __future__ import annotations

import json
import multiprocessing
import os

import numpy as np
import pytest
import torch

from tests.factories import features
from tests.reranking_truth import rerank, squared_distances
from vareid_ext import GalleryIndex, k_reciprocal_rerank, nearest_neighbors
from vareid_ext.files import gallery_folder
from vareid_ext.files.lock import locked
from vareid_ext.retrieval.rerank.one_query import KnownGallery


def clusters(rows, D=6, seed=0, dtype=torch.float32):
    """People: a centre each, four of them close to another's."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(max(2, rows // 9), D)) * 3
    centers[:4] = centers[-4:] + 0.1 if len(centers) > 8 else centers[:4]
    return torch.from_numpy(centers[rng.integers(0, len(centers), rows)] + rng.normal(size=(rows, D))).to(dtype)


def duplicates(rows, D=5, seed=0):
    """More than k1 equal rows, in two groups."""
    x = features(rows, D, seed)
    x[1 : rows // 2] = x[1]
    x[rows // 2 : rows - 3 : 2] = x[-1]
    return x


def with_query(x, query):
    return torch.cat([torch.as_tensor(query, dtype=x.dtype).view(1, -1), x[1:]])


CASES = {
    "random": features(90, 6),
    "clusters": clusters(120),
    "wide clusters": clusters(300, 12, 1),
    "ties": features(80, 3, levels=3),
    "duplicates": duplicates(70),
    "all equal": features(1, 4).repeat(40, 1),
    "the query is a gallery row": with_query(clusters(90, seed=2), clusters(90, seed=2)[17]),
    "the query is a row that occurs often": with_query(duplicates(60), duplicates(60)[5]),
    "a query far from all": with_query(clusters(90, seed=3), [1000.0] * 6),
    "a query beyond the gallery's scale": with_query(clusters(60, seed=4), [1e25] * 6),
    "a query amid all": with_query(features(90, 6, 5), [0.0] * 6),
    "far from the origin": features(60, 5, 6) + 500,
    "tiny": features(50, 5, 7) * 1e-15,
    "huge": features(50, 5, 8) * 1e15,
    "fewer than k1": features(9, 4, 9),
    "one": features(2, 4, 10),
    "float64": clusters(80, 6, 11, torch.float64),
    "float16": clusters(80, 6, 12, torch.float16),
    "float16 ties": features(80, 4, 13, torch.float16, levels=3),
}


@pytest.mark.parametrize(
    ("k1", "k2", "lambda_value"),
    [(20, 6, 0.3), (7, 3, 0.0), (5, 1, 0.3), (1, 1, 1.0), (3, 9, 0.3), (2, 2, 0.0), (7, 3, 1.0)],
)
@pytest.mark.parametrize("name", CASES)
def test_one_query_is_what_reranking_it_gives(tmp_path, name, k1, k2, lambda_value):
    x = CASES[name]
    query, gallery = x[:1], x[1:]
    index = GalleryIndex.build(tmp_path / "g", gallery, k1=k1, k2=k2)
    for topk in {1, min(7, len(gallery)), len(gallery)}:
        expected = k_reciprocal_rerank(query, gallery, k1=k1, k2=k2, lambda_value=lambda_value, topk=topk)
        distance, order = index.search(query, topk=topk, lambda_value=lambda_value)
        torch.testing.assert_close(distance, expected[0], rtol=0, atol=1e-6)
        assert torch.equal(order, expected[1])


@pytest.mark.parametrize("name", ["clusters", "ties", "duplicates", "a query far from all", "fewer than k1"])
def test_one_query_follows_the_definition(tmp_path, name):
    """Against sets and loops in float64, which know nothing of lists and blocks."""
    x = CASES[name].numpy()
    truth = rerank(squared_distances(x, x), 1, 7, 3, 0.3)[0]
    distance, order = GalleryIndex.build(tmp_path / "g", x[1:], k1=7, k2=3).search(x[:1], topk=len(x))
    assert isinstance(distance, np.ndarray)
    assert distance.shape == order.shape == (1, len(x) - 1)
    np.testing.assert_allclose(distance[0], np.sort(truth), rtol=0, atol=1e-5)
    np.testing.assert_allclose(truth[order[0]], distance[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(25))
def test_small_galleries_of_any_parameters(tmp_path, seed):
    rng = np.random.default_rng(seed)
    G, k1, k2 = int(rng.integers(1, 40)), int(rng.integers(1, 25)), int(rng.integers(1, 12))
    x = features(G + 2, int(rng.integers(1, 5)), seed, levels=int(rng.integers(2, 5)) if seed % 2 else None)
    index = GalleryIndex.build(tmp_path / "g", x[2:], k1=k1, k2=k2)
    distance, order = index.search(x[:2], topk=G)
    for i in range(2):  # each by itself: together they would be in each other's neighbourhoods
        expected = k_reciprocal_rerank(x[i : i + 1], x[2:], k1=k1, k2=k2, topk=G)
        torch.testing.assert_close(distance[i], expected[0][0], rtol=0, atol=1e-6)
        assert torch.equal(order[i], expected[1][0])


@pytest.mark.parametrize("name", CASES)
def test_without_reranking_it_is_the_nearest(tmp_path, name):
    x = CASES[name]
    k = min(30, len(x) - 1)
    distance, order = GalleryIndex.build(tmp_path / "g", x[1:]).search(x[:1], topk=k, rerank=False)
    expected = nearest_neighbors(x[:1], x[1:], k=k)
    torch.testing.assert_close(distance.double(), expected[0].double(), rtol=1e-6, atol=0)
    assert torch.equal(order, expected[1])


@pytest.mark.parametrize("rerank", [True, False])
def test_what_is_excluded_is_in_no_result_and_changes_no_other(tmp_path, rerank):
    x = clusters(60)
    index = GalleryIndex.build(tmp_path / "g", x[2:])
    whole = index.search(x[:2], topk=58, rerank=rerank)
    masks = torch.zeros(2, 58, dtype=torch.bool)
    masks[0, whole[1][0, :5]] = masks[1, 10:] = True
    distance, order = index.search(x[:2], topk=12, rerank=rerank, exclude=masks)
    assert torch.equal(order[0], whole[1][0, 5:17])
    assert torch.equal(distance[0], whole[0][0, 5:17])
    left = whole[1][1][whole[1][1] < 10]
    assert torch.equal(order[1, :10], left)
    assert order[1, 10:].tolist() == [-1, -1]
    assert distance[1, 10:].isinf().all()
    assert (index.search(x[:1], exclude=np.ones(58, bool), rerank=rerank)[1] == -1).all()


def arrays_of(folder):
    return gallery_folder.read_gallery(folder).arrays


@pytest.mark.parametrize("name", ["clusters", "ties", "duplicates", "float16", "fewer than k1", "huge"])
@pytest.mark.parametrize("steps", [(1,), (3, 1, 20)])
def test_a_gallery_that_grew_is_the_one_that_was_built_whole(tmp_path, name, steps):
    x = CASES[name]
    GalleryIndex.build(tmp_path / "whole", x, camera=np.arange(len(x)), paths=[f"{i}.jpg" for i in range(len(x))])
    ends = [min(len(x), sum(steps[: i + 1])) for i in range(len(steps))]
    index = None
    for begin, end in zip([0, *ends], [*ends, len(x)], strict=True):
        if begin == end:
            continue
        known = {"camera": np.arange(begin, end), "paths": [f"{i}.jpg" for i in range(begin, end)]}
        if index is None:
            index = GalleryIndex.build(tmp_path / "grown", x[begin:end], **known)
        else:
            index.add(x[begin:end], **known)
    whole, grown = arrays_of(tmp_path / "whole"), arrays_of(tmp_path / "grown")
    assert whole.keys() == grown.keys()
    for key in whole.keys() - {"row_max"}:
        np.testing.assert_array_equal(grown[key], whole[key], err_msg=key)
    # The largest distances are those of float32 products, whose order of sums may differ by block.
    np.testing.assert_allclose(grown["row_max"], whole["row_max"], rtol=1e-5)
    np.testing.assert_array_equal(index.feature, x)
    assert index.path(len(x) - 1) == f"{len(x) - 1}.jpg"


def test_a_gallery_that_grows_beyond_its_scale(tmp_path):
    x = clusters(50)
    x[40:] *= 1e20
    index = GalleryIndex.build(tmp_path / "g", x[1:40])
    index.add(x[40:])
    expected = k_reciprocal_rerank(x[:1], x[1:], topk=20)
    distance, order = index.search(x[:1], topk=20)
    torch.testing.assert_close(distance, expected[0], rtol=0, atol=1e-6)
    assert torch.equal(order, expected[1])


def test_an_open_index_goes_on_with_what_it_had(tmp_path):
    x = clusters(60)
    first = GalleryIndex.build(tmp_path / "g", x[:40])
    second = GalleryIndex(tmp_path / "g")
    second.add(x[40:50])
    before = k_reciprocal_rerank(x[55:56], x[:40], topk=40)
    assert torch.equal(first.search(x[55:56], topk=40)[1], before[1])
    first.add(x[50:])  # keeps what the other one has added
    assert len(first) == 60
    assert torch.equal(torch.from_numpy(np.array(first.feature)), x)


def test_kinds_of_arrays_and_what_is_kept(tmp_path):
    x = clusters(30)
    names = ["a b.jpg", "ü/é.png", os.fsdecode(b"\xff.jpg"), *map(str, range(27))]
    about = {"checkpoint": "runs/mine", "numbers": [1, 2]}
    index = GalleryIndex.build(
        str(tmp_path / "g"), x.bfloat16(), identity=torch.arange(30), viewpoint=[-1] * 30, paths=names, about=about
    )
    index = GalleryIndex(tmp_path / "g")
    assert [index.path(i) for i in range(30)] == names
    assert index.about == about
    assert index.labels.identity.tolist() == list(range(30))
    assert (index.labels.camera == -1).all()
    assert index.feature.dtype == np.float32
    assert not isinstance(index.feature, np.ndarray) or not index.feature.flags.writeable
    got = index.search(x[:3].bfloat16(), topk=4)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == torch.int64
    assert got[1].shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"query": np.zeros((1, 4), np.float32)}, ValueError, "query: features of 4 elements"),
        ({"query": np.zeros((1, 6))}, TypeError, "query: dtype float64 was given; float32 is needed"),
        ({"query": np.zeros((0, 6), np.float32)}, ValueError, "query: no rows were given"),
        ({"query": np.zeros(6, np.float32)}, ValueError, "query: shape"),
        ({"query": np.full((1, 6), np.nan, np.float32)}, ValueError, "query: row 0 holds NaN or Inf"),
        ({"query": "a.jpg"}, TypeError, "query: str was given"),
        ({"topk": 0}, ValueError, "topk: 0 was given"),
        ({"lambda_value": 2}, ValueError, "lambda_value: 2 was given"),
        ({"exclude": np.zeros(3, bool)}, ValueError, "exclude: shape"),
        ({"exclude": np.zeros(20, int)}, TypeError, "exclude: dtype"),
    ],
)  # fmt: skip
def test_errors_of_a_search_name_the_argument(tmp_path, arguments, error, words):
    index = GalleryIndex.build(tmp_path / "g", features(20))
    with pytest.raises(error, match=words):
        index.search(**{"query": features(1).numpy(), **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"feature": features(0)}, ValueError, "feature: no rows"),
        ({"feature": features(3).int()}, TypeError, "feature: dtype int32"),
        ({"k1": 0}, ValueError, "k1: 0 was given"),
        ({"camera": [1, 2]}, ValueError, "camera: 2 entries were given; 20 are needed"),
        ({"identity": [0.5] * 20}, ValueError, "identity: values of type float64"),
        ({"identity": ["a"] * 19 + [float("nan")]}, TypeError, "identity: nan was given in an array of objects"),
        ({"camera": np.array(["a"] * 19 + [None])}, TypeError, "camera: None was given in an array of objects"),
        ({"paths": ["a"]}, ValueError, "paths: 1 entries were given; 20"),
    ],
)
def test_errors_of_building_come_before_any_file(tmp_path, arguments, error, words):
    with pytest.raises(error, match=words):
        GalleryIndex.build(tmp_path / "g", **{"feature": features(20), **arguments})
    assert not (tmp_path / "g").exists()


def test_what_is_there_is_not_replaced(tmp_path):
    GalleryIndex.build(tmp_path / "g", features(20))
    with pytest.raises(FileExistsError, match="holds an index already; add to it"):
        GalleryIndex.build(tmp_path / "g", features(10))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("")
    with pytest.raises(FileExistsError, match=r"'a\.jpg', which is no part of an index"):
        GalleryIndex.build(tmp_path / "photos", features(10))
    with pytest.raises(NotADirectoryError, match=r"a\.jpg' is a file"):
        GalleryIndex.build(tmp_path / "photos" / "a.jpg", features(10))
    assert len(GalleryIndex(tmp_path / "g")) == 20


def test_features_of_another_kind_are_not_added(tmp_path):
    index = GalleryIndex.build(tmp_path / "g", features(20))
    with pytest.raises(ValueError, match="features of 3 elements were given, but the index's have 6"):
        index.add(features(2, 3))
    with pytest.raises(ValueError, match="paths: 2 were given, but the index has no paths"):
        index.add(features(2), paths=["a", "b"])
    assert len(GalleryIndex(tmp_path / "g")) == 20


def add_and_die(folder, place):
    """Add rows, and end as by kill -9 where `place` is called."""
    torch.set_num_threads(1)  # the pool of threads did not survive the fork, and a product would wait for it
    setattr(gallery_folder, place, lambda *_, **__: os._exit(9))
    GalleryIndex(folder).add(features(10, seed=1))


@pytest.mark.parametrize("place", ["atomic_folder", "atomic_file"])
def test_a_writer_that_is_killed_leaves_the_index_as_it_was(tmp_path, place):
    GalleryIndex.build(tmp_path / "g", features(20))
    process = multiprocessing.get_context("fork").Process(target=add_and_die, args=(tmp_path / "g", place))
    process.start()
    process.join()
    assert process.exitcode == 9
    index = GalleryIndex(tmp_path / "g")
    assert len(index) == 20
    assert (tmp_path / "g" / "features.bin").stat().st_size > index.feature.nbytes
    x, other = features(1, seed=3), features(10, seed=2)
    assert torch.equal(index.search(x)[1], k_reciprocal_rerank(x, features(20), topk=10)[1])
    index.add(other)  # over what the killed one has left
    assert torch.equal(index.search(x)[1], k_reciprocal_rerank(x, torch.cat([features(20), other]), topk=10)[1])
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == [".lock", "features.bin", "index.json", "rows-2"]


def test_a_build_that_was_killed_can_be_done_again(tmp_path):
    (tmp_path / "g" / "rows-1").mkdir(parents=True)
    (tmp_path / "g" / "features.bin").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match=r"holds no index\.json: it is no index, or was not finished"):
        GalleryIndex(tmp_path / "g")
    x = features(1, seed=3)
    found = GalleryIndex.build(tmp_path / "g", features(20)).search(x)[1]
    assert torch.equal(found, k_reciprocal_rerank(x, features(20), topk=10)[1])


def test_a_full_disk_leaves_the_index_as_it_was(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    index = GalleryIndex.build(tmp_path / "g", features(20))
    held = {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()}
    for name in ("os.fsync", "numpy.lib.format.write_array_header_1_0"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(OSError, match=r"No space left on device: .*g/(features\.bin|rows-2)"):
                index.add(features(10, seed=1))
            with pytest.raises(OSError, match="No space left"):
                GalleryIndex.build(tmp_path / "other", features(20))
        assert {path: path.read_bytes() for path in (tmp_path / "g").rglob("*") if path.is_file()} == held
        assert not (tmp_path / "other").exists()


def hold(folder, ready, done):
    with locked(folder):
        ready.set()
        done.wait(30)


def test_two_writers_do_not_both_win(tmp_path):
    index = GalleryIndex.build(tmp_path / "g", features(20))
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "g", ready, done))
    process.start()
    assert ready.wait(30)
    with pytest.raises(BlockingIOError, match="another process is writing"):
        index.add(features(3))
    done.set()
    process.join()
    index.add(features(3))
    assert len(index) == 23


def rewrite(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_array(folder, name, change):
    path = folder / "rows-1" / f"{name}.npy"
    array = np.load(path)
    np.save(path, change(array))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: rewrite(folder, format=0, version="0.0.1"), "has format 0 of vareid_ext 0.0.1; this is"),
        (lambda folder: rewrite(folder, library="faiss"), "is of another program"),
        (lambda folder: rewrite(folder, rows="many"), "is damaged"),
        (lambda folder: rewrite(folder, rows=10**6), r"features.bin' is damaged: it has 480 bytes; 24000000 are"),
        (lambda folder: (folder / "index.json").write_text("{"), "is not JSON"),
        (lambda folder: (folder / "features.bin").write_bytes(b""), "it has 0 bytes; 480 are needed"),
        (lambda folder: (folder / "rows-1" / "index.npy").unlink(), "is damaged: 'index'"),
        (lambda folder: (folder / "rows-1" / "index.npy").write_bytes(b"x" * 90), "cannot be read as a .npy file"),
        (lambda folder: replace_array(folder, "distance", lambda a: a[:-1]), "is damaged: distance is float64"),
        (lambda folder: replace_array(folder, "set_indptr", lambda a: a[::-1].copy()), "do not fit each other"),
        (lambda folder: replace_array(folder, "index", lambda a: a + 20), "names rows beyond the 20 that it has"),
        (lambda folder: replace_array(folder, "set_index", lambda a: -a - 1), "names rows beyond the 20 that it has"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_told_from_a_sound_one(tmp_path, damage, words):
    GalleryIndex.build(tmp_path / "g", features(20))
    damage(tmp_path / "g")
    with pytest.raises(ValueError, match=words):
        GalleryIndex(tmp_path / "g").search(features(1, seed=1))


def test_no_index_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing' is no folder"):
        GalleryIndex(tmp_path / "nothing")


def test_plain_pytorch_gives_the_same(tmp_path, backend):
    x = clusters(50)
    index = GalleryIndex.build(tmp_path / "g", x[1:30])
    index.add(x[30:])
    expected = k_reciprocal_rerank(x[:1], x[1:], topk=12)
    distance, order = index.search(x[:1], topk=12)
    torch.testing.assert_close(distance, expected[0], rtol=0, atol=1e-5)
    assert torch.equal(order, expected[1])


def test_only_new_products_are_made(monkeypatch):
    """Adding costs the pairs of new rows with all."""
    from vareid_ext.ops._progress import listen

    x, pairs = features(500), []
    old = KnownGallery.empty(6, torch.float32, 20, 6).extended(x[:480])
    with listen(pairs.append):
        old.extended(x[480:])
    assert sum(pairs) == 20 * 480 + 20 * 21 // 2


def test_viewpoints_keep_their_names(tmp_path):
    feature = np.eye(4, dtype=np.float32)
    names = {"viewpoint": [0, 1], "viewpoints": ("front", "rear")}
    index = GalleryIndex.build(tmp_path / "g", feature[:2], **names)
    index.add(feature[2:], viewpoint=[0, -1], viewpoints=("left",))
    for found in (index, GalleryIndex(tmp_path / "g")):
        assert found.labels.viewpoints == ("front", "rear", "left")
        assert found.labels.viewpoint.tolist() == [0, 1, 2, -1]


def test_people_and_cameras_may_have_names(tmp_path):
    feature = np.eye(6, dtype=np.float32)
    index = GalleryIndex.build(tmp_path / "g", feature[:2], identity=["bert", "anna"], camera=[3, -1])
    index.add(feature[2:4], identity=["cleo", "bert"], camera=["hall", "3"])
    index.add(feature[4:], identity=[7, -1], camera=["", "hall"])
    for found in (index, GalleryIndex(tmp_path / "g")):
        labels = found.labels
        assert [labels.names["identity"][n] if n >= 0 else None for n in labels.identity] == [
            "bert", "anna", "cleo", "bert", "7", None,
        ]  # fmt: skip
        assert labels.called("camera").tolist() == ["3", "", "hall", "3", "", "hall"]
    for damage in ({"identity": ["bert"]}, ["bert"], {"identity": 3}):
        rewrite(tmp_path / "g", names=damage)
        with pytest.raises(ValueError, match="is damaged"):
            GalleryIndex(tmp_path / "g")


def test_what_another_writer_has_added_is_not_added_again(tmp_path):
    x = features(12)
    index = GalleryIndex.build(tmp_path / "g", x[:4], paths=list("abcd"), identity=[0, 1, 2, 3])
    assert GalleryIndex(tmp_path / "g").add(x[4:8], paths=list("efgh"), identity=[4, 5, 6, 7]) == 4
    late = {"paths": list("gheijk"), "identity": [6, 7, 4, 8, 9, 10], "skip_known": True}
    assert index.add(x[[6, 7, 4, 8, 9, 10]], **late) == 3
    assert index.add(x[[6, 7, 4, 8, 9, 10]], **late) == 0
    assert [index.path(row) for row in range(len(index))] == list("abcdefghijk")
    assert index.labels.identity.tolist() == list(range(11))
    np.testing.assert_array_equal(index.feature, x[:11])
