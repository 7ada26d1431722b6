"""`vareid report`: what it measures against brute force, the page it writes, and that page in a real browser."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from _vareid_cli import run
from tests.test_feature_files import images
from tests.test_train import SMALL
from vareid_ext import pairwise_distance
from vareid_ext._labels import Labels
from vareid_ext.cli import report, train
from vareid_ext.files.features import Features
from vareid_ext.report.activation import activation_maps, grad_cam, why_no_activation
from vareid_ext.report.feature_map import (
    METHODS,
    MOST_IDENTITIES,
    center_angles,
    centers_of,
    chosen_images,
    feature_map,
    mean_centers,
)
from vareid_ext.report.measure import MOST_JUNK, MOST_MISSED, chosen_queries, distance_histogram, found_lists, measure
from vareid_ext.report.pictures import HEIGHT, Pictures, overlay
from vareid_ext.trained import load_trained
from vareid_ext.training import program
from vareid_ext.training.program import load_run_data


class Elements(html.parser.HTMLParser):
    """The elements of a page in order, and that each that is opened is closed."""

    EMPTY = frozenset(("meta", "link", "br", "img", "input", "hr", "path", "use", "rect"))

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def features_of(arrays):
    return Features(
        feature=torch.from_numpy(arrays["feature"]),
        **{name: arrays[name] for name in ("identity", "camera", "viewpoint")},
    )


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """A small finished run with one global feature, and the centres that it began with."""
    output, begun = tmp_path_factory.mktemp("runs") / "plain", []
    with pytest.MonkeyPatch.context() as patch:
        measure_baselines = program.measure_baselines

        def note(run):
            begun.extend(part.clone() for part in centers_of(run.state.method))
            measure_baselines(run)

        patch.setattr(program, "measure_baselines", note)
        assert train.main([*SMALL, "--seed=3", "--output", str(output)]) == 0
    return output, begun


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Feature files with paths of pictures."""
    folder = tmp_path_factory.mktemp("sides")
    files = []
    for number, (side, N) in enumerate((("query", 12), ("gallery", 50))):
        arrays = images(number, N)
        arrays["path"] = np.array([str(folder / f"{side}{i}.jpg") for i in range(N)])
        for i, path in enumerate(arrays["path"]):
            Image.new("RGB", (8, 16), (5 * i, 90, 200 - 2 * i)).save(path)
        np.savez(folder / f"{side}.npz", **arrays)
        files.append(str(folder / f"{side}.npz"))
    return files


def make(capsys, output, *arguments, status=0):
    capsys.readouterr()
    options = ["--quiet", "--json", "--resamples", "50", "--output", str(output)]
    assert run(["report", *map(str, arguments), *options]) == status, capsys.readouterr().err
    return json.loads(capsys.readouterr().out) if status == 0 else capsys.readouterr().err


# ---- what is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [-1, None])
@pytest.mark.parametrize("rerank", [False, True])
def test_lists_are_those_of_a_loop_over_the_sorted_distances(junk, rerank):
    query, gallery = images(0, 9), images(1, 80)
    gallery["feature"][40:50] = gallery["feature"][30:40]  # ties
    gallery["identity"][::7] = -1
    measured = measure(features_of(query), features_of(gallery), rerank=rerank, junk_identity=junk)
    if rerank:
        reranker = measured.how["rerank"]
        kept = np.flatnonzero(gallery["identity"] != -1) if junk == -1 else np.arange(80)
        distances = np.full((9, 80), np.inf)
        distances[:, kept] = reranker.matrix().numpy()
    else:
        distances = pairwise_distance(query["feature"], gallery["feature"], metric="sqeuclidean").astype(np.float64)
    for q, found in enumerate(found_lists(measured, range(9), 5)):
        rank, expected, junk_seen, missed = 0, [], 0, []
        for g in np.argsort(distances[q], kind="stable"):
            if not np.isfinite(distances[q, g]):
                continue
            same = gallery["identity"][g] == query["identity"][q]
            is_junk = gallery["identity"][g] == junk if junk is not None else False
            is_junk |= same and gallery["camera"][g] == query["camera"][q]
            rank += not is_junk
            if rank > 5 or (rank == 5 and is_junk):
                if same and not is_junk:
                    missed.append((g, "missed", rank))
            elif is_junk:
                junk_seen += 1
                if junk_seen <= MOST_JUNK:
                    expected.append((g, "junk", 0))
            else:
                expected.append((g, "right" if same else "wrong", rank))
        assert [(i.index, i.kind, i.rank) for i in found.images] == expected + missed[:MOST_MISSED]
        assert found.missed == len(missed)
        assert found.more_junk == max(0, junk_seen - MOST_JUNK)
        assert found.more_missed == max(0, len(missed) - MOST_MISSED)
        for image in found.images:
            assert image.distance == pytest.approx(distances[q, image.index], rel=1e-5)


def test_the_histogram_is_that_of_all_pairs():
    query, gallery = images(0, 30), images(1, 90)
    measured = measure(features_of(query), features_of(gallery))
    edges, *shares = distance_histogram(measured.verification, bins=25)
    distances = pairwise_distance(query["feature"], gallery["feature"], metric="sqeuclidean")
    match = query["identity"][:, None] == gallery["identity"]
    out = match & (query["camera"][:, None] == gallery["camera"])
    for share, pairs in zip(shares, (match & ~out, ~match), strict=True):
        assert share.sum() == pytest.approx(1)
        values = distances[pairs]
        assert values.min() > edges[0]
        for edge, below in zip(edges[1:], np.cumsum(share), strict=True):
            assert below == pytest.approx((values <= edge).mean(), abs=1e-12)
    assert 20 <= len(edges) <= 26
    assert (np.diff(edges) > 0).all()


def test_queries_to_show_are_the_hardest_and_some_of_the_others():
    precision = np.random.default_rng(0).random(100)
    matched = np.arange(100) % 10 != 3
    chosen = chosen_queries(precision, matched, 20)
    order = sorted(np.flatnonzero(matched), key=lambda q: precision[q])
    assert list(chosen[:10]) == order[:10]
    assert chosen[-1] == order[-1]
    assert len(set(chosen.tolist())) == 20
    assert (np.diff(precision[chosen]) >= 0).all()
    assert list(chosen_queries(precision, matched, 90)) == order
    assert len(chosen_queries(precision, matched, 0)) == 0


def test_a_map_of_pca_keeps_the_distances_of_a_plane():
    rng = np.random.default_rng(0)
    plane, turn = rng.standard_normal((30, 2)) * (5, 1), np.linalg.qr(rng.standard_normal((7, 7)))[0]
    feature = torch.from_numpy(np.pad(plane, ((0, 0), (0, 5))) @ turn + 3).float()
    identity, viewpoint = np.arange(30) % 4, np.arange(30) % 3 - 1
    labels = Labels(identity=identity, camera=identity, viewpoint=viewpoint)
    centers = mean_centers(feature, labels)
    found = feature_map(feature, labels, centers, method="pca", what="x")
    assert "100 %" in found.note
    everything = torch.cat([feature, centers[0]])
    np.testing.assert_allclose(
        np.linalg.norm(found.points[:, None] - found.points, axis=2),
        np.linalg.norm(everything[:, None] - everything, axis=2),
        atol=1e-4,
    )
    for center, i, v in zip(*centers, strict=True):
        of = (identity == i) & ((viewpoint == v) if v >= 0 else True)
        np.testing.assert_allclose(center, feature[of].mean(0), atol=1e-6)
    assert len(centers[1]) == 4 + len({(i, v) for i, v in zip(identity, viewpoint, strict=True) if v >= 0})


@pytest.mark.filterwarnings("ignore")  # of UMAP, on graphs of a few points
@pytest.mark.parametrize("method", ["pca", "tsne", "umap"])
@pytest.mark.parametrize("N", [1, 5])
def test_few_images_have_a_map_too(method, N):
    if method != "pca":
        pytest.importorskip(METHODS[method])
    labels = Labels(identity=np.zeros(N), camera=np.zeros(N), viewpoint=np.zeros(N))
    feature = torch.randn(N, 1 if method == "pca" else 3)
    found = feature_map(feature, labels, mean_centers(feature, labels), method=method, what="x")
    assert found.points.shape == (N + 2, 2)
    assert np.isfinite(found.points).all()
    assert ("PCA" in found.note) == (method == "pca" or (method == "umap" and N == 1))


@pytest.mark.parametrize("method", ["tsne", "umap"])
def test_a_map_of_neighbours_keeps_groups_together_and_is_the_same_again(method):
    pytest.importorskip(METHODS[method])
    rng = np.random.default_rng(0)
    identity = np.repeat(np.arange(3), 20)
    feature = torch.from_numpy(20 * np.eye(3, 9)[identity] + rng.standard_normal((60, 9))).float()
    labels = Labels(identity=identity, camera=identity, viewpoint=np.full(60, -1))
    found, again = (
        feature_map(feature, labels, mean_centers(feature, labels), method=method, what="x") for _ in range(2)
    )
    np.testing.assert_array_equal(found.points, again.points)
    distance = np.linalg.norm(found.points[:, None] - found.points, axis=2) + np.diag(np.full(63, np.inf))
    nearest = distance.argmin(1)
    assert (found.identity[nearest] == found.identity).all()


def test_a_map_shows_the_identities_with_the_most_images():
    identity = np.repeat(np.arange(20), np.arange(1, 21) * 4)
    labels = Labels(identity=identity, camera=identity, viewpoint=identity)
    chosen = chosen_images(labels, np.array([1, 2, 19]))
    assert np.bincount(identity[chosen])[[1, 2, 19]].tolist() == [8, 12, 40]
    assert set(identity[chosen_images(labels)]) == set(range(20 - MOST_IDENTITIES, 20))


def test_angles_are_those_between_centres():
    W = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    U = torch.tensor([[[1.0, 1.0], [0.0, 3.0]], [[0.0, -1.0], [5.0, 5.0]]])
    mask = torch.tensor([[True, True], [True, False]])
    first, second = center_angles((W, U, mask))
    np.testing.assert_allclose(first, [45, 180], atol=1e-6)
    np.testing.assert_allclose(second, [90], atol=1e-6)


def test_the_centres_before_training_are_those_that_the_run_began_with(plain_run):
    folder, begun = plain_run
    model = load_trained(folder, "cpu")
    before = torch.get_rng_state()
    restored = report._initial_centers(model, load_run_data(model.config, progress=False))
    assert torch.equal(torch.get_rng_state(), before)
    for mine, theirs in zip(restored, begun, strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(restored[0], centers_of(model.method)[0])


def test_activation_of_a_mean_of_the_map_is_its_inner_product_with_the_reference():
    torch.manual_seed(0)
    trunk = nn.Conv2d(3, 5, 3, bias=False).double()
    image, reference = torch.randn(2, 3, 8, 6, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    found = grad_cam(lambda x: trunk(x).mean(dim=(2, 3)), trunk, image.clone(), reference)
    feature_map_ = trunk(image)
    expected = torch.einsum("nc,nchw->nhw", reference, feature_map_).clamp(min=0) / (6 * 4)
    torch.testing.assert_close(found, expected.detach())
    assert not trunk._forward_hooks


def test_a_model_has_activation_maps_where_its_feature_is_one(plain_run, trained_run):
    model = load_trained(plain_run[0], "cpu")
    assert why_no_activation(model) == ""
    assert "parts" in why_no_activation(load_trained(trained_run, "cpu"))
    pictures = [Image.new("RGB", (16, 32), colour) for colour in ("red", "blue", "green")]
    with torch.inference_mode():
        reference = model.embed(pictures)
    maps = activation_maps(model, pictures, reference.flip(0))
    assert maps.shape[0] == 3
    assert np.isfinite(maps).all()
    assert (maps >= 0).all()
    one = activation_maps(model, pictures[:1], reference.flip(0)[:1])
    np.testing.assert_allclose(one[0], maps[0], rtol=1e-3, atol=1e-6)


def test_a_picture_is_small_and_a_missing_one_is_counted_once():
    def load(index):
        if index == 1:
            raise OSError("gone")
        return Image.new("RGB", (600, 1200))

    pictures = Pictures(load)
    assert pictures.uri(0).startswith("data:image/jpeg;base64,")
    assert len(pictures.uri(0)) < 4000
    assert pictures.uri(1) == pictures.uri(1) == ""
    assert pictures.missing == {1: "gone"}
    assert Pictures(None).uri(0) == ""
    over = overlay(Image.new("RGB", (HEIGHT // 2, HEIGHT)), np.zeros((2, 3)))
    assert over.size == (HEIGHT // 2, HEIGHT)


# ---- the page ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(plain_run, tmp_path_factory):
    """The report of a run."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    arguments = ["--quiet", "--queries", "8", "--workers", "0", "--device", "cpu", "--output", str(output)]
    assert run(["report", str(plain_run[0]), *arguments]) == 0
    return output


def test_the_page_of_a_run_has_every_number_of_it(page, plain_run):
    folder = plain_run[0]
    text = " ".join(Elements(page.read_text()).texts)
    metrics, environment = (json.loads((folder / f"{n}.json").read_text()) for n in ("metrics", "environment"))
    for name in ("trained", "reranked"):
        for value in metrics[name].values():
            assert f"{100 * value:.2f}" in text
    for by_view in metrics["by_query_viewpoint"].values():
        for values in by_view.values():
            assert f"{100 * values['mAP']:.2f}" in text
    assert str(metrics["seconds"]) in text
    for name in ("torch", "timm", "time", "platform"):
        assert str(environment[name]) in text
    assert environment["command"] in text
    assert "beta: 0.1" in text  # of config.yaml
    for words in ("Loss over 2 epochs", "before training", "after training", "learned ones", "PCA", "at rank 5"):
        assert words in text


def test_the_page_needs_nothing_beside_it_and_can_be_read_without_seeing(page):
    text = page.read_text()
    elements = Elements(text)
    for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
        assert all(a[name].startswith(("data:", "#")) for _, a in elements.found if name in a)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert elements.all("html")[0]["lang"] == "en"
    for landmark in ("header", "nav", "main"):
        assert len(elements.all(landmark)) == 1
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(elements.all("caption")) == len(elements.all("table")) > 5
    assert all(image["alt"] and image["src"].startswith("data:image/jpeg") for image in elements.all("img"))
    assert any("distance 0." in image["alt"] and "rank 1," in image["alt"] for image in elements.all("img"))
    spoken = [a["aria-label"] for _, a in elements.found if a.get("role") == "img"]
    assert len(spoken) >= 8
    assert all(re.search(r"\d", label) for label in spoken)
    for target in (a["href"] for a in elements.all("a")):
        assert target[1:] in ids


def test_files_of_features_with_pictures(sides, tmp_path, capsys):
    found = make(capsys, tmp_path / "r.html", "--features", *sides)
    text = (tmp_path / "r.html").read_text()
    assert found["bytes"] == len(text.encode())
    assert found["missing_pictures"] == 0
    assert len(Elements(text).all("img")) > 50
    assert 'class="activation"' not in text
    assert "activation maps: features in files have no network" in found["gaps"]


def test_people_and_cameras_are_called_by_their_names(tmp_path, capsys):
    files = []
    for number, N in enumerate((6, 12)):
        arrays = images(number, N)
        named = {f"{label}_name": np.array([f"{label}-{v}" for v in arrays[label]]) for label in ("identity", "camera")}
        files.append(tmp_path / f"{number}.npz")
        np.savez(
            files[-1],
            **arrays
            | {label: np.unique(named[f"{label}_name"], return_inverse=True)[1] for label in ("identity", "camera")},
            **named,
        )
    make(capsys, tmp_path / "r.html", "--features", *files)
    text = (tmp_path / "r.html").read_text()
    for label in ("identity", "camera"):
        assert f"{label} {label}-" in text
        assert not re.search(rf"{label} \d", text)
    assert "<option>camera-" in text


def test_images_that_moved_become_placeholders_and_are_counted(sides, tmp_path, capsys):
    query = dict(np.load(sides[0]))
    query["path"] = np.array([path.replace("query3.jpg", "moved.jpg") for path in query["path"]])
    np.savez(tmp_path / "q.npz", **query)
    found = make(capsys, tmp_path / "r.html", "--features", tmp_path / "q.npz", sides[1])
    assert found["missing_pictures"] == 1
    assert any("1 query images cannot be read" in gap and "moved.jpg" in gap for gap in found["gaps"])
    assert (tmp_path / "r.html").read_text().count('class="placeholder"') == 1


def test_files_without_paths_viewpoints_and_cameras_show_everything_else(sides, tmp_path, capsys):
    for path, name in zip(sides, "qg", strict=True):
        arrays = np.load(path)
        np.savez(tmp_path / f"{name}.npz", feature=arrays["feature"], identity=arrays["identity"])
    found = make(capsys, tmp_path / "r.html", "--features", tmp_path / "q.npz", tmp_path / "g.npz")
    gaps = "\n".join(found["gaps"])
    for words in (
        "holds no paths",
        "an array `path` of texts",
        "metrics by viewpoint",
        "metrics by camera",
        "activation maps",
    ):
        assert words in gaps
    elements = Elements((tmp_path / "r.html").read_text())
    assert elements.all("img") == []
    assert len([a for _, a in elements.found if a.get("class") == "placeholder"]) > 50


def test_one_identity_has_a_page_without_verification(tmp_path, capsys):
    arrays = images(0, 6)
    np.savez(tmp_path / "q.npz", **{**arrays, "identity": np.zeros(6, int)})
    found = make(capsys, tmp_path / "r.html", "--features", tmp_path / "q.npz")
    gaps = "\n".join(found["gaps"])
    assert "there are no non-matches" in gaps
    assert "one identity; its intervals need two" in gaps
    assert found["metrics"][str(tmp_path / "q.npz")]["mAP"] == 1


def test_two_stand_side_by_side_with_the_differences_of_compare(sides, tmp_path, capsys):
    other = []
    for path, name in zip(sides, "qg", strict=True):
        arrays = dict(np.load(path))
        arrays["feature"] += np.random.default_rng(0).standard_normal(arrays["feature"].shape).astype(np.float32)
        np.savez(tmp_path / f"{name}.npz", **arrays)
        other.append(str(tmp_path / f"{name}.npz"))
    both = ["--features", *sides, "--features", *other]
    found = make(capsys, tmp_path / "r.html", *both)
    assert run(["compare", *both, "--quiet", "--json", "--resamples", "50"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert found["differences"] == compared["differences"]
    text = " ".join(Elements((tmp_path / "r.html").read_text()).texts)
    difference = compared["differences"][" ".join(other)]["mAP"]
    low, high = (f"{100 * end:+.2f}" for end in difference["interval"])
    assert f"{100 * difference['difference']:+.2f}" in text
    assert f"{low} to {high}" in text


def test_galleries_that_differ_are_said(sides, tmp_path, capsys):
    arrays = {key: value[:48] for key, value in np.load(sides[1]).items()}
    np.savez(tmp_path / "less.npz", **arrays)
    both = ["--features", *sides, "--features", sides[0], str(tmp_path / "less.npz")]
    said = "galleries differ: query.npz gallery.npz has 50 images, query.npz less.npz has 48"
    assert make(capsys, tmp_path / "r.html", *both)["notes"] == [said]
    assert said in Elements((tmp_path / "r.html").read_text()).texts
    assert run(["report", *both, "--quiet", "--force", "--output", str(tmp_path / "r.html")]) == 0
    assert said in capsys.readouterr().out.splitlines()
    make(capsys, tmp_path / "s.html", "--features", *sides)
    assert "galleries differ" not in (tmp_path / "s.html").read_text()


def test_missed_matches_that_are_not_shown_are_counted(sides, tmp_path, capsys):
    make(capsys, tmp_path / "r.html", "--features", *sides, "--top", "1")
    articles = (tmp_path / "r.html").read_text().split("<article")[1:]
    more = 0
    for article in articles:
        missed = int(re.search(r"(\d+) of \d+ matches behind the first 1", article)[1])
        shown = article.count('class="tile missed"')
        said = re.search(r"; (\d+) more missed matches not shown", article)
        assert missed == shown + (int(said[1]) if said else 0)
        more += said is not None
    assert more > 0


def test_without_queries_the_lists_are_left_out_and_that_is_said(sides, tmp_path, capsys):
    found = make(capsys, tmp_path / "r.html", "--features", *sides, "--queries", "0")
    assert found["notes"] == ["ranked lists: left out, by --queries 0"]
    elements = Elements((tmp_path / "r.html").read_text())
    assert found["notes"][0] in elements.texts
    assert "#ranked" not in [a["href"] for a in elements.all("a")]
    assert "Ranked lists" not in elements.texts
    assert elements.all("form") == elements.all("script") == elements.all("img") == []


def test_rates_that_rest_on_no_non_match_are_marked_in_the_table(sides, tmp_path, capsys):
    make(capsys, tmp_path / "r.html", "--features", *sides)
    text = (tmp_path / "r.html").read_text()
    pairs = int(re.search(r"pairs: matches, non-matches</th><td>\d+, (\d+)", text)[1])
    assert 100 <= pairs < 1000
    cells = dict(re.findall(r"TPR@FPR=(1e-\d), % \(threshold\)</th><td>([^<]*)<", text))
    assert cells.keys() == {"1e-2", "1e-3", "1e-4", "1e-5"}
    for target, cell in cells.items():
        assert cell.endswith("; not measured: too few non-matches)") == (target != "1e-2")


def test_a_shared_model_lacks_nothing_that_it_cannot_have(plain_run, tmp_path, capsys):
    load_trained(plain_run[0], "cpu").save_pretrained(tmp_path / "shared")
    arguments = ("--workers", "0", "--queries", "2", "--device", "cpu")
    found = make(capsys, tmp_path / "r.html", tmp_path / "shared", *arguments)
    assert found["gaps"] == []
    assert found["notes"] == ["shared: a shared model, without the log, the command and the environment of its run"]
    text = " ".join(Elements((tmp_path / "r.html").read_text()).texts)
    metrics = json.loads((plain_run[0] / "metrics.json").read_text())
    assert found["notes"][0] in text
    for name in ("trained", "reranked"):
        assert f"{100 * metrics[name]['mAP']:.2f}" in text
    assert "beta: 0.1" in text


def test_names_of_files_are_shown_as_they_are(sides, tmp_path, capsys):
    names = [str(tmp_path / f"{name}.npz") for name in ("_a$b$c", "<i>&'$")]
    for name in names:
        shutil.copy(sides[0], name)
    make(capsys, tmp_path / "r.html", "--features", names[0], sides[1], "--features", names[1], sides[1])
    elements = Elements((tmp_path / "r.html").read_text())
    assert elements.all("i") == []
    legends = [text.strip() for text in elements.texts if text.startswith("\u200b")]
    for name in ("_a$b$c.npz gallery.npz", "<i>&'$.npz gallery.npz"):
        assert legends.count(f"\u200b{name}") == 2
        assert name in elements.texts


def test_re_ranked_lists_can_be_shown(sides, tmp_path, capsys):
    found = make(capsys, tmp_path / "r.html", "--features", *sides, "--rerank", "--k1", "5")
    assert found["metrics"] != make(capsys, tmp_path / "s.html", "--features", *sides)["metrics"]
    assert "re-ranked" in (tmp_path / "r.html").read_text()


def test_a_folder_of_an_older_version_lacks_what_it_lacks(trained_run, tmp_path, capsys):
    shutil.copy(trained_run / "last.pt", tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    (tmp_path / "metrics.json").write_text('{"trained": {"mAP": 0.25}, "seconds": 7}')
    found = make(capsys, tmp_path / "r.html", tmp_path, "--workers", "0", "--queries", "2")
    gaps = "\n".join(found["gaps"])
    for words in ("there is no config.yaml", "there is no environment.json", "holds no losses", "parts"):
        assert words in gaps
    assert "25.00" in (tmp_path / "r.html").read_text()
    (tmp_path / "metrics.json").write_text("{")
    error = make(capsys, tmp_path / "r.html", tmp_path, "--workers", "0", "--force", status=2)
    assert "metrics.json: is damaged" in error


def test_a_page_that_exists_is_kept_unless_forced(sides, tmp_path, capsys, monkeypatch):
    output = tmp_path / "r.html"
    output.write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(report, "open_sources", lambda *a, **k: pytest.fail("work was done"))
        assert "give --force" in make(capsys, output, "--features", *sides, status=2)
    assert output.read_text() == "mine"
    make(capsys, output, "--features", *sides, "--force")
    assert output.read_text() != "mine"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda q: q.pop("identity"), [], "--query-identity: is needed"),
        (lambda q: q.update(identity=q["identity"] + 100), [], "none of the 12 queries has a match"),
        (None, ["--queries", "-1"], "--queries: -1 was given"),
        (None, ["--top", "0"], "--top: 0 was given"),
        (None, ["--map", "umap"], "umap-learn"),
        (None, ["--output", "r.txt"], "suffix '.txt'"),
        (None, ["--data", "market1501"], "--data: is for runs"),
    ],
)
def test_a_request_that_cannot_be_met_says_why(sides, tmp_path, capsys, monkeypatch, change, arguments, message):
    query = dict(np.load(sides[0]))
    if change:
        change(query)
    if "umap" in arguments:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    np.savez(tmp_path / "q.npz", **query)
    words = ["--features", str(tmp_path / "q.npz"), sides[1], "--quiet", "--output", str(tmp_path / "r.html")]
    assert run(["report", *words, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


# ---- in a browser --------------------------------------------------------------------------------------------------

PROBE = """<script>
const form_ = document.getElementById("filters"), seen = {};
const shown = () => [...document.querySelectorAll("article.query")].filter((row) => row.offsetHeight > 0).length;
const choose = (name, value) => {
  form_.elements[name].value = value;
  form_.dispatchEvent(new Event("change", {bubbles: true}));
  return shown();
};
for (const name of ["view", "camera", "outcome"]) {
  seen[name] = {};
  for (const option of form_.elements[name].options) seen[name][option.value] = choose(name, option.value);
  choose(name, "");
}
const images = (kind) => [...document.querySelectorAll(`img.${kind}`)].filter((image) => image.offsetHeight > 0).length;
seen.before = [images("plain"), images("activation")];
form_.elements.activation.checked = true;
form_.dispatchEvent(new Event("change", {bubbles: true}));
seen.after = [images("plain"), images("activation")];
seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name.slice(0, 30));
seen.broken = [...document.images].filter((image) => image.complete && image.naturalWidth === 0).length;
seen.wide = document.documentElement.scrollWidth - window.innerWidth;
seen.message = document.getElementById("shown").textContent;
document.title = "PROBE" + JSON.stringify(seen) + "END";
</script>"""


def probe(text, script, tmp_path, width, *options):
    """What a script has put into the title of a page in a browser."""
    (tmp_path / "probe.html").write_text(text.replace("</body>", f"{script}</body>"))
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
         f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--enable-logging=stderr", *options,
         "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    return json.loads(re.search(r"PROBE(.*?)END</title>", done.stdout)[1])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_filters_the_lists_without_errors_or_requests(page, tmp_path, width):
    text = page.read_text()
    seen = probe(text, PROBE, tmp_path, width)
    rows = [attributes for attributes in Elements(text).all("article") if attributes["class"] == "query"]
    assert len(rows) == 8
    for name in ("view", "camera", "outcome"):
        assert seen[name].pop("") == len(rows)
        values = [row[f"data-{name}"] for row in rows]
        expected = {value: values.count(value) for value in seen[name]}
        assert seen[name] == expected
        assert set(values) <= set(seen[name])
    plain, activation = seen["before"]
    assert (plain > 0, activation) == (True, 0)
    assert seen["after"][1] > 0
    assert sum(seen["after"]) == plain
    assert [name for name in seen["requests"] if not name.startswith("data:")] == []
    assert (seen["broken"], seen["message"]) == (0, "8 of 8 queries shown")
    assert seen["wide"] <= 0


PRINTED = """<script>
const form_ = document.getElementById("filters");
form_.elements.outcome.value = "right";
form_.dispatchEvent(new Event("change", {bubbles: true}));
const heights = (what) => [...document.querySelectorAll(what)].map((element) => element.offsetHeight);
document.title = "PROBE" + JSON.stringify({
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor,
  series: getComputedStyle(document.documentElement).getPropertyValue("--s1").trim(),
  hidden: document.querySelectorAll("article[hidden]").length,
  articles: heights("article"), form: heights("form")[0],
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  cut: [...document.querySelectorAll("table.heat")].filter((t) => t.offsetWidth > t.parentElement.clientWidth).length,
}) + "END";
</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_printed_page_is_light_and_whole(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, N in (("q", 300), ("g", 900)):
        identity = rng.integers(0, 60, N)
        feature = rng.standard_normal((N, 8)) + 2 * np.eye(60, 8)[identity]
        labels = {"camera": rng.integers(0, 15, N), "viewpoint": rng.integers(0, 8, N)}
        np.savez(tmp_path / f"{name}.npz", feature=feature.astype(np.float32), identity=identity, **labels)
    make(capsys, tmp_path / "r.html", "--features", tmp_path / "q.npz", tmp_path / "g.npz", "--queries", "20")
    text = (tmp_path / "r.html").read_text()
    # A window of the width of a sheet of A4 within its margins, to which the rules of paper apply, and not those of a
    # screen.
    text = text.replace("@media screen", "@media paper").replace("@media print", "@media screen")
    seen = probe(text.replace("@media paper", "@media print"), PRINTED, tmp_path, 718,
                 "--blink-settings=preferredColorScheme=0")  # fmt: skip
    assert seen["dark"]
    assert (seen["paper"], seen["series"]) == ("rgb(255, 255, 255)", "#0b62a4")
    assert seen["hidden"] > 0
    assert all(seen["articles"])
    assert seen["form"] == 0
    assert (seen["wide"], seen["cut"]) == (0, 0)
