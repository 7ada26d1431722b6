import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from _vareid_cli import main
from vareid_ext.data import load_data
from vareid_ext.data.inspection import NEAR, _near_pairs, difference_hash, inspect

NUMBERS = itertools.count(1000)


def picture(number=None):
    pixels = np.random.default_rng(next(NUMBERS) if number is None else number).integers(0, 256, (32, 16, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def listed(tmp_path):
    """A manifest of rows (path, identity, camera, viewpoint, split[, picture]), read."""

    def listed(rows, **options):
        lines = ["path,identity,camera,viewpoint,split"]
        for path, identity, camera, viewpoint, split, *given_picture in rows:
            (given_picture[0] if given_picture else picture()).save(tmp_path / path)
            lines.append(f"{path},{identity},{camera},{viewpoint},{split}")
        (tmp_path / "list.csv").write_text("\n".join(lines))
        return load_data("manifest", tmp_path / "list.csv", check_images=False, progress=False, **options)

    return listed


CLEAN = [
    (f"{split}{identity}{camera}{view}.png", identity, camera, view, split)
    for identity, camera, view in itertools.product("ab", "12", ("front", "side", "back"))
    for split in ("train",)
] + [("q.png", "c", "1", "front", "query"), ("g.png", "c", "2", "back", "gallery")]


def found(data):
    return {finding.name: finding for finding in inspect(data)}


def test_a_clean_set_has_a_size_and_nothing_else(listed):
    (size,) = inspect(listed(CLEAN))
    assert (size.name, size.count, size.problem) == ("size", 1, False)
    assert size.text == "size: 16 pixels wide, 32 high"


@pytest.mark.parametrize(
    ("rows", "name", "problem"),
    [
        ([("x.png", "a", "1", "front", "train", picture(1)), ("y.png", "b", "1", "front", "train", picture(1))],
         "identity_clash", True),
        ([("x.png", "a", "1", "front", "train", picture(1)), ("y.png", "d", "1", "front", "gallery", picture(1))],
         "train_and_test", True),
        ([("x.png", "a", "1", "front", "train", picture(1)), ("y.png", "a", "1", "front", "train", picture(1))],
         "doubled", False),
        ([("x.png", "a", "1", "front", "train", picture(1)), ("y.png", "a", "1", "back", "train", picture(1))],
         "viewpoint_clash", True),
        ([("x.png", "e", "1", "front", "query", picture(1)), ("y.png", "e", "2", "front", "gallery", picture(1))],
         "query_and_gallery", True),
        ([("x.png", "e", "", "front", "query", picture(1)), ("y.png", "e", "", "front", "gallery", picture(1))],
         "query_and_gallery", True),
        ([("x.png", "e", "1", "front", "query", picture(1)), ("y.png", "e", "1", "front", "gallery", picture(1))],
         "doubled", False),
        ([("x.png", "a", "3", "front", "gallery")], "trained_and_tested", True),
        ([("x.png", "d", "1", "front", "train")], "one_image", False),
        ([("x.png", "d", "1", "front", "train"), ("y.png", "d", "1", "side", "train")], "one_camera", False),
        ([("x.png", "a", "1", "", "train")], "no_viewpoint", False),
        ([("x.png", "d", "1", "front", "train"), ("y.png", "d", "2", "back", "train")], "missing_views", False),
        ([("x.png", "e", "1", "front", "query"), ("y.png", "e", "1", "back", "gallery")], "no_match", False),
    ],
)  # fmt: skip
def test_what_hurts_is_found_and_named(listed, rows, name, problem):
    finding = found(listed([*CLEAN, *rows]))[name]
    assert (finding.count, finding.problem) == (1, problem)
    if name != "missing_views":
        assert rows[0][0] in finding.text or rows[0][1] in finding.text


def test_queries_without_any_match_are_a_problem(listed):
    rows = [row for row in CLEAN if row[0] != "g.png"]
    assert found(listed([*rows, ("g.png", "d", "2", "back", "gallery")]))["no_match"].problem


def test_images_that_cannot_be_read(listed, tmp_path):
    data = listed(CLEAN)
    (tmp_path / "q.png").write_bytes(b"broken")
    finding = found(data)["unreadable"]
    assert finding.problem
    assert "q.png" in finding.text


def test_pictures_that_look_the_same_between_people(listed):
    smooth = np.tile(np.linspace(0, 255, 16).astype(np.uint8)[None, ::-1, None], (32, 1, 3))
    brighter = np.clip(smooth.astype(int) + 9, 0, 255).astype(np.uint8)
    rows = [
        ("x.png", "a", "1", "front", "train", Image.fromarray(smooth)),
        ("y.png", "b", "1", "front", "train", Image.fromarray(brighter)),
        ("z.png", "b", "1", "front", "train", Image.fromarray(brighter.transpose(0, 1, 2)[::-1].copy())),
    ]
    finding = found(listed([*CLEAN, *rows]))["near_duplicates"]
    assert finding.count == 2
    assert "x.png ~ " in finding.text
    assert not finding.problem


def test_the_hash_is_of_brightness_from_left_to_right():
    ramp = np.tile(np.arange(9, dtype=np.uint8)[None, :, None] * 20, (8, 1, 3))
    assert difference_hash(Image.fromarray(ramp)) == 0
    assert difference_hash(Image.fromarray(ramp[:, ::-1].copy())) == 2**64 - 1


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(0, 2**32))
def test_near_pairs_are_those_of_a_loop(values, seed):
    generator = np.random.default_rng(seed)
    values += [value ^ (1 << int(bit)) for value in values for bit in generator.integers(0, 64, 1)]
    expected = {
        (i, j)
        for i in range(len(values)) for j in range(i + 1, len(values))
        if (values[i] ^ values[j]).bit_count() <= NEAR
    }  # fmt: skip
    assert set(_near_pairs(np.array(values, dtype=np.uint64))) == expected


def test_the_command_says_it_and_its_status(listed, tmp_path, capsys):
    listed(
        [*CLEAN, ("x.png", "d", "1", "front", "gallery", picture(1)), ("y.png", "a", "1", "front", "train", picture(1))]
    )
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(tmp_path / "list.csv"), "--json", "--quiet"])
    assert ended.value.code == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == 1
    assert report["splits"]["train"] == {"images": 13, "identities": 2}
    assert report["findings"][0]["name"] == "train_and_test"
    listed(CLEAN)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(tmp_path / "list.csv"), "--quiet"])
    assert ended.value.code in (None, 0)
    assert capsys.readouterr().out.endswith("no problems\n")
