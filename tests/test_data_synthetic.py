import hashlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from vareid_ext.data import BODY_PAIRS, EXTRAS, SURFACE_PAIRS, SyntheticSettings, synthetic_data
from vareid_ext.data.extras import mirrored
from vareid_ext.data.random_stream import Stream
from vareid_ext.data.synthetic.drawing import TURN, sine, tube
from vareid_ext.data.synthetic.figure import Pose, paint_person
from vareid_ext.data.synthetic.person import draw_details, draw_person
from vareid_ext.data.synthetic.renderer import _person

SMALL = SyntheticSettings(
    identities_train=4, identities_test=3, images_per_identity=7, distractors=2, cameras=3, height=64, width=32
)


def pixels(images):
    return np.stack([np.asarray(images.load(index)) for index in range(len(images))])


def everything(settings):
    data = synthetic_data(settings)
    return np.concatenate([pixels(split) for split in (data.train, data.query, data.gallery)])


@pytest.fixture(scope="module")
def small():
    return synthetic_data(SMALL)


def test_stream_is_splitmix64():
    # The published generator started at 0: its first outputs are known.
    stream = Stream()
    assert [stream.bits() for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_stream_array_is_the_scalar_generator():
    stream = Stream(3)
    start = stream.bits()
    # The array is the stream whose state is its parent's next output, the top byte of each value.
    inner = Stream()
    inner._state = start
    assert Stream(3).array(2, 3).tolist() == np.array([inner.bits() >> 56 for _ in range(6)]).reshape(2, 3).tolist()


def test_stream_draws_stay_in_range_and_reach_it_all():
    stream = Stream(1, 2)
    assert {stream.integer(-2, 2) for _ in range(300)} == {-2, -1, 0, 1, 2}
    assert {stream.weighted((1, 0, 3)) for _ in range(300)} == {0, 2}
    assert sorted(stream.shuffled(range(9))) == list(range(9))
    assert Stream(1, 2).bits() != Stream(2, 1).bits()


@pytest.mark.parametrize(
    ("outfits", "digest"),
    [
        (0, "e5b7740610f8d2b52d611a480af98e4dd2e4a92ed5f28efaf7a13164e9717692"),
        (2, "69bd8da1817b4d05b7b2a4b04f6f63d88429fb99e2263bf1ef78db57e5eb10a7"),
    ],
)
def test_pixels_are_the_same_on_every_machine(outfits, digest):
    # Measured once; a change of the pictures' look changes it, a change of machine or library must not.
    assert hashlib.sha256(everything(replace(SMALL, outfits=outfits)).tobytes()).hexdigest() == digest


def test_seed_and_settings_change_people():
    first, second = everything(SMALL), everything(replace(SMALL, seed=1))
    assert first.shape == second.shape == (4 * 7 + 3 * 7 + 2, 64, 32, 3)
    assert np.abs(first.astype(int) - second).mean() > 20


def test_test_people_do_not_depend_on_the_training_ones(small):
    other = synthetic_data(replace(SMALL, identities_train=1))
    assert other.query.paths == small.query.paths
    assert np.array_equal(pixels(other.query), pixels(small.query))


def test_market_protocol(small):
    train, query, gallery = small.train, small.query, small.gallery
    assert np.bincount(train.identity).tolist() == [7] * 4
    assert small.identity_names == ("0000", "0001", "0002", "0003")
    # One query per person and camera, the other pictures and the distractors (identity 0) in the gallery.
    assert sorted(zip(query.identity.tolist(), query.camera.tolist(), strict=True)) == [
        (identity, camera) for identity in (1, 2, 3) for camera in (1, 2, 3)
    ]
    assert np.bincount(gallery.identity).tolist() == [2, 4, 4, 4]
    few = synthetic_data(replace(SMALL, images_per_identity=3))
    assert np.bincount(few.query.identity).tolist() == [0, 2, 2, 2]
    assert np.bincount(few.gallery.identity).tolist() == [2, 1, 1, 1]
    everyone = [*train.paths, *query.paths, *gallery.paths]
    assert len(set(everyone)) == len(everyone)
    people = [{path.split("_")[2] for path in images.paths} for images in (train, query, gallery)]
    assert people[0].isdisjoint(people[1] | people[2])
    assert people[1] < people[2]


def test_every_query_can_be_answered_by_another_camera():
    data = synthetic_data(replace(SMALL, images_per_identity=12, cameras=6))
    for identity, camera in zip(data.query.identity, data.query.camera, strict=True):
        assert ((data.gallery.identity == identity) & (data.gallery.camera != camera)).any()


def test_viewpoints_follow_the_facing(small):
    renderer = small.train.loader
    names = set()
    data = synthetic_data(replace(SMALL, identities_train=60, height=32, width=16))
    for path, label, name in zip(data.train.paths, data.train.viewpoint, data.train.viewpoint_name, strict=True):
        degrees = data.train.loader.facing(data.train.loader._shots[path]) % TURN * 360 / TURN
        cosine = np.cos(np.radians(degrees))
        # front and back are clear beyond 62 degrees from the side's middle; what lies between is named so.
        assert label == (0 if cosine > 0.48 else 2 if cosine < -0.48 else 1) or abs(abs(cosine) - 0.47) < 0.03
        assert {"front": 0, "front_side": 0, "side": 1, "back_side": 2, "back": 2}[name] == label
        names.add(name)
    assert names == {"front", "front_side", "side", "back_side", "back"}
    assert renderer.settings == SMALL


def test_rendering_is_repeatable_and_survives_pickling(small):
    renderer = small.train.loader
    path = small.train.paths[5]
    again = pickle.loads(pickle.dumps(renderer))
    again._rendered.clear()
    assert np.array_equal(again.pixels(path), renderer.pixels(path))
    with pytest.raises(KeyError):
        renderer("synthetic/train/nobody")


def canvas_of(person, facing):
    canvas = np.full((256, 128, 3), 90, dtype=np.int16)
    paint_person(canvas, person, Pose(facing, 64, 250, 240, 300, 0))
    return canvas


@pytest.fixture
def plain():
    return replace(
        draw_person(Stream(4)), top="sweater", pattern="plain", chest_mark="none", back_mark="none", bag="none",
        scarf=None, haircut="bald", beard=False, side_stripe=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "visible", "hidden"),
    [
        ({"chest_mark": "square", "chest_side": 0}, 0, TURN // 2),
        ({"back_mark": "disc"}, TURN // 2, 0),
        ({"top": "jacket"}, 0, None),
        ({"beard": True}, 0, TURN // 2),
    ],
)
def test_details_are_seen_from_their_side_only(plain, change, visible, hidden):
    changed = replace(plain, **change)
    assert (canvas_of(plain, visible) != canvas_of(changed, visible)).sum() > 60
    if hidden is not None:
        assert np.array_equal(canvas_of(plain, hidden), canvas_of(changed, hidden))


DETAILS = {
    0: ("chest_panel", "chest_mark", "chest_colour"),
    TURN // 4: ("sleeve_stripe", "side_stripe"),
    TURN // 2: ("back_panel", "back_mark", "back_colour"),
}


@pytest.mark.parametrize("side", DETAILS)
def test_people_who_share_an_outfit_differ_in_what_a_side_shows(plain, side):
    first, second = (draw_details(Stream(seed), plain) for seed in (1, 3))
    names = [name for fields in DETAILS.values() for name in fields]
    assert all(getattr(first, name) != getattr(second, name) for name in names)
    assert replace(second, **{name: getattr(first, name) for name in names}) == first
    changed = replace(first, **{name: getattr(second, name) for name in DETAILS[side]})
    front, flank, back, other_flank = (
        (canvas_of(first, turn) != canvas_of(changed, turn)).any(axis=2).sum() for turn in range(0, TURN, TURN // 4)
    )
    if side == TURN // 4:  # front and back show the edges of the stripes
        assert min(flank, other_flank) > 3 * max(front, back)
    else:
        seen, hidden = (front, back) if side == 0 else (back, front)
        assert hidden == 0
        assert seen > 5 * max(flank, other_flank)


def test_people_share_as_many_outfits_as_were_asked_for():
    people = [_person(0, 3, number) for number in range(60)]
    assert len({(person.top_colour, person.bottom_colour, person.build, person.skin) for person in people}) == 3
    assert len({(person.chest_mark, person.chest_colour) for person in people}) > 50
    assert len(set(people)) == 60


@pytest.mark.parametrize(("side", "near"), [(1, 3 * TURN // 4), (-1, TURN // 4)])
def test_a_shoulder_bag_shows_more_on_its_side(plain, side, near):
    bag = replace(plain, bag="shoulder", bag_side=side)
    seen = (canvas_of(plain, near) != canvas_of(bag, near)).sum()
    across = (canvas_of(plain, near + TURN // 2) != canvas_of(bag, near + TURN // 2)).sum()
    assert seen > 1.3 * across


def test_a_person_is_a_person_wide_and_tall(plain):
    where = (canvas_of(plain, 0) != 90).any(axis=2)
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    tall, wide = rows[-1] - rows[0], columns[-1] - columns[0]
    assert rows[-1] == 249
    assert 200 < tall < 260
    assert 0.2 < wide / tall < 0.5
    side = (canvas_of(plain, TURN // 4) != 90).any(axis=2)
    assert side.sum() < where.sum()


def test_a_tube_outside_the_canvas_paints_nothing():
    canvas = np.zeros((8, 8, 3), dtype=np.int16)
    for points in (
        [(-3000, 900, 200), (-200, 900, 200)],
        [(300, 9000, 200), (900, 9000, 200)],
        [(300, 5, 0), (300, 5, 0)],
    ):
        tube(canvas, points, [(200, 200, 200)])
    assert not canvas.any()


def test_sine_quarters():
    assert [sine(angle) for angle in (0, TURN // 4, TURN // 2, -TURN // 4, TURN)] == [0, 1024, 0, -1024, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("identities_train", 0), ("cameras", 0), ("height", 31), ("width", 8), ("distractors", -1), ("seed", 1.5),
     ("images_per_identity", True), ("height", 4096), ("seed", -1), ("seed", 2**63), ("cameras", 10**9),
     ("images_per_identity", 10**9), ("distractors", 10**9), ("outfits", -1)],
)  # fmt: skip
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        SyntheticSettings(**{field: value})


def test_smallest_set():
    data = synthetic_data(SyntheticSettings(1, 1, 1, 0, 1, 32, 16))
    assert (len(data.train), len(data.query), len(data.gallery)) == (1, 1, 0)
    assert data.train.load(0).size == (16, 32)


def test_a_large_set_is_rendered_as_it_is_used(small, monkeypatch):
    monkeypatch.setattr("vareid_ext.data.synthetic.renderer._CACHE_BYTES", 1000)
    data = synthetic_data(SMALL)
    assert not data.train.loader._rendered
    assert np.array_equal(pixels(data.query), pixels(small.query))


def mean_average_precision(feature, query, gallery):
    """Brute force, from the definition."""
    feature = feature / np.maximum(np.linalg.norm(feature, axis=1, keepdims=True), 1e-12)
    similarity = feature[: len(query)] @ feature[len(query) :].T
    precisions = []
    for row in range(len(query)):
        same = gallery.identity == query.identity[row]
        kept = ~(same & (gallery.camera == query.camera[row]))
        right = same[kept][np.argsort(-similarity[row][kept], kind="stable")]
        ranks = np.flatnonzero(right) + 1
        precisions.append(np.mean(np.arange(1, ranks.size + 1) / ranks))
    return np.mean(precisions)


def test_nothing_untrained_solves_the_default_set():
    data = synthetic_data(SyntheticSettings(identities_train=1))
    query, gallery = data.query, data.gallery
    images = np.concatenate([pixels(query), pixels(gallery)])
    flat = images.reshape(len(images), -1).astype(np.float32)
    assert mean_average_precision(flat, query, gallery) < 0.2
    assert mean_average_precision(flat - flat.mean(axis=1, keepdims=True), query, gallery) < 0.2

    code = (images >> 5).astype(np.int64) @ np.array([64, 8, 1])
    for stripes in (1, 6):
        parts = [part.reshape(len(images), -1) for part in np.array_split(code, stripes, axis=1)]
        histogram = np.concatenate(
            [np.stack([np.bincount(row, minlength=512) for row in part]) for part in parts], axis=1
        )
        assert mean_average_precision(np.sqrt(histogram), query, gallery) < 0.2

    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=0).train()
    with torch.no_grad():
        small_images = torch.from_numpy(images[:, ::2, ::2]).permute(0, 3, 1, 2).float() / 255
        feature = torch.cat([network(part) for part in small_images.split(128)])
    assert mean_average_precision(feature.numpy(), query, gallery) < 0.2
    # A feature that knows the answer finds it: the measure itself is not what keeps the others low.
    known = np.eye(100, dtype=np.float32)[np.concatenate([query.identity, gallery.identity])]
    assert mean_average_precision(known, query, gallery) == 1


def labels_of(person, facing, stride=300, centre=64):
    """LIP's classes [256, 128], DensePose's I, U, V [3, 256, 128] and the joints [14, 2] in pixels."""
    canvas, labels = np.full((256, 128, 3), 90, dtype=np.int16), np.zeros((256, 128, 4), np.uint8)
    joints = paint_person(canvas, person, Pose(facing, centre, 250, 240, stride, 0), labels)
    return labels[:, :, 0], labels[:, :, 1:].transpose(2, 0, 1), np.array(joints) / 256 - 0.5


@pytest.mark.parametrize("facing", [0, 300, 1024, 1500, TURN // 2, 3000])
def test_labels_cover_the_person_and_nothing_else(plain, facing):
    """A pixel that is the same on every background is the person's."""
    backgrounds = [np.full((256, 128, 3), value, dtype=np.int16) for value in (0, 200)]
    for canvas in backgrounds:
        paint_person(canvas, plain, Pose(facing, 64, 250, 240, 300, 0))
    seen = (backgrounds[0] == backgrounds[1]).all(axis=2)
    classes, iuv, _ = labels_of(plain, facing)
    assert np.array_equal(classes > 0, seen)
    assert set(np.unique(classes)) <= {0, 5, 9, 12, 13, 14, 15, 16, 17, 18, 19}  # no hat, hair, bag or scarf
    assert (iuv[0][classes == 0] == 0).all()
    assert (iuv[1:, iuv[0] == 0] == 0).all()
    # What the surface leaves out of a bald person without a skirt: the neck.
    assert ((classes > 0) & (iuv[0] == 0)).mean() < 0.01


@pytest.mark.parametrize(("facing", "stride"), [(200, 700), (900, -400), (1400, 0), (2500, 1000)])
def test_the_mirrored_picture_has_the_mirrored_extras(plain, facing, stride):
    """A person who is the same on both sides, drawn in a mirrored pose, against the rule for mirrored pictures."""
    _, iuv, joints = labels_of(plain, facing, stride)
    _, other, other_joints = labels_of(plain, -facing, -stride)
    flipped = mirrored(torch.from_numpy(iuv.copy()), "iuv", SURFACE_PAIRS, 128).numpy()
    body = (flipped[0] > 0) | (other[0] > 0)
    assert (flipped[0] == other[0])[body].mean() > 0.95  # but for pixels that the edges of tubes just touch
    both = body & (flipped[0] == other[0])
    difference = np.abs(flipped[1:].astype(int) - other[1:])[:, both]
    assert np.median(difference) <= 2
    assert (difference < 30).mean() > 0.95
    points = torch.from_numpy(np.column_stack([joints, np.ones(14)]))
    np.testing.assert_allclose(mirrored(points, "keypoints", BODY_PAIRS, 128)[:, :2], other_joints, atol=1)


def test_joints_lie_on_the_parts_they_join(plain):
    _, iuv, joints = labels_of(plain, 0, stride=0)
    at = iuv[0][joints[:, 1].round().astype(int), joints[:, 0].round().astype(int)]
    allowed = [{23, 24}, {0, 2}, {16, 18, 2}, {16, 18, 20, 22}, {3, 20, 22}, {15, 17, 2}, {15, 17, 19, 21}, {4, 19, 21},
               {9, 2}, {9, 13}, {13, 6}, {10, 2}, {10, 14}, {14, 5}]  # fmt: skip
    assert all(part in parts for part, parts in zip(at, allowed, strict=True)), at
    assert 1 not in iuv[0]  # the back
    assert joints[2, 0] < joints[5, 0]  # who looks at the camera has the right hand on the left
    assert labels_of(plain, TURN // 2)[2][2, 0] > labels_of(plain, TURN // 2)[2][5, 0]


def test_extras_of_pictures_are_exact_and_hidden_where_something_stands_in_front():
    data = synthetic_data(SMALL, extras=("keypoints", "parsing", "iuv", "views"))
    assert list(data.train.extras) == list(data.query.extras) == list(EXTRAS)
    renderer = data.train.loader
    hidden = 0
    for index, path in enumerate(data.train.paths):
        extras = {name: np.asarray(value) for name, value in data.train.load_extras(index, 64, 32).items()}
        assert {name: value.shape for name, value in extras.items()} == {
            "keypoints": (14, 3), "parsing": (5, 64, 32), "iuv": (3, 64, 32), "views": (8, 3, 64, 32),
        }  # fmt: skip
        assert np.array_equal(extras["parsing"][0], extras["parsing"][1:].sum(axis=0))
        assert (extras["parsing"][0] >= (extras["iuv"][0] > 0)).all()
        x, y, seen = extras["keypoints"].T
        inside = (x > -0.5) & (x < 31.5) & (y > -0.5) & (y < 63.5)
        assert not seen[~inside].any()
        if (inside & (seen == 0)).any():
            hidden += 1
            columns, rows = (
                np.rint(v[inside & (seen == 0)]).astype(int).clip(0, high) for v, high in ((x, 31), (y, 63))
            )
            assert extras["parsing"][0][rows, columns].mean() < 0.5
        assert np.array_equal(renderer.extra("views", path), extras["views"])
    assert 1 <= hidden <= 10  # of 28


def test_views_are_the_same_person_from_eight_sides(small):
    renderer, path = small.train.loader, small.train.paths[0]
    views = renderer.extra("views", path).astype(int)
    background = np.abs(views[:, :, :6] - views[:1, :, :6]).mean(axis=(1, 2, 3))
    person = np.abs(views - views[:1]).mean(axis=(1, 2, 3))
    assert (background < 1).all()
    assert (person[1:] > 1).all()


def test_extras_cost_nothing_where_they_are_not_asked_for(small):
    assert all(images.extras == {} for images in small.splits.values())
    assert small.train.loader._extras == {}
