"""The methods that read joints: their part images, networks and stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.tiny import BACKBONE, batch_of
from vareid_ext.data.extras import BODY_PAIRS
from vareid_ext.methods import METHODS, TrainingClasses
from vareid_ext.methods.pdc import with_own_norms
from vareid_ext.methods.pngan_generated import partners
from vareid_ext.models import Backbone, ModelConfig
from vareid_ext.models.joints import HEAD_LINES, body_regions, bones, box_along, compose, part_images, to_canvas
from vareid_ext.models.pose_gan import PatchDiscriminator, PoseGenerator, draw_pose, standing_poses
from vareid_ext.models.posebox import draw_posebox
from vareid_ext.training.command_line import parse
from vareid_ext.training.optimizers import train_only

STANDING = torch.tensor(
    [[32, 14], [32, 24], [22, 28], [18, 42], [17, 58], [42, 28], [46, 42], [47, 58],
     [26, 62], [25, 88], [25, 118], [38, 62], [39, 88], [39, 118]],
    dtype=torch.float32,
)  # fmt: skip
"""Joints in an image of 128 x 64 pixels, seen from behind: the person's right is the image's left."""


def joints(n, height=128, width=64):
    points = to_canvas(STANDING.expand(n, 14, 2), (128, 64), (height, width))
    return torch.cat([points, torch.ones(n, 14, 1)], 2)


def mirrored(keypoints, width):
    order = list(range(14))
    for right, left in BODY_PAIRS:
        order[right], order[left] = left, right
    found = keypoints[:, order].clone()
    found[..., 0] = width - 1 - found[..., 0]
    return found


def build(name, identities=5, model=None, **settings):
    torch.manual_seed(0)
    kind = METHODS[name]
    classes = TrainingClasses(identities, 3, torch.ones(identities, 3, dtype=torch.bool))
    model = ModelConfig("resnet10t", BACKBONE, pretrained=False) if model is None else model
    return kind(kind.Config(**settings), model, classes)


def pose_batch(n=6, height=64, width=32):
    torch.manual_seed(1)
    batch = batch_of(torch.rand(n, 3, height, width))
    views = torch.rand(n, 8, 3, height, width)
    return replace(batch, extras={"keypoints": joints(n, height, width), "views": views})


SMALL = {
    "pie": {"posebox_size": 56},
    "pdc": {"part_height": 64, "part_width": 64, "localizer_pool": 1},
    "pgr": {"region_dim": 12},
    "pngan": {"embed_dim": 12},
    "pngan-generated": {"embed_dim": 12, "generator_width": 4, "generator_blocks": 1},
}


def build_small(name, **settings):
    return build(name, **SMALL[name], **settings)


def trained_and_reached(method, batch, parts=None):
    """The parameters that a stage with these parts trains, and those that get a gradient."""
    trainable = {name for name, p in method.named_parameters() if p.requires_grad}
    train_only(method, trainable, parts)
    method.train()
    terms = method(batch)
    sum(term.weight * term.value for term in terms.values()).backward()
    trained = {name for name, p in method.named_parameters() if p.requires_grad}
    return trained, {name for name, p in method.named_parameters() if p.grad is not None}, set(terms)


def test_a_box_stands_along_its_line():
    top, bottom = (
        torch.tensor([[10.0, 5.0], [4.0, 4.0], [3.0, 3.0]]),
        torch.tensor([[10.0, 25.0], [10.0, 4.0], [3.0, 3.0]]),
    )
    upright, lying, nothing = box_along(top, bottom, 3, 2)
    assert upright.tolist() == [[7, 3], [13, 3], [13, 27], [7, 27]]
    # The line points to the right, so that what is above it in the image is at the box's right.
    assert lying.tolist() == [[2, 7], [2, 1], [12, 1], [12, 7]]
    assert torch.equal(nothing, torch.full((4, 2), 3.0))


def test_an_upright_limb_is_cut_out_where_it_stands():
    """At 256 x 128 a leg from (40, 100) to (40, 197): 20 to either side, 15 beyond the ends, 128 rows of 32 columns."""
    row, column = torch.meshgrid(torch.arange(256.0), torch.arange(128.0), indexing="ij")
    image = torch.stack([column, row, torch.ones_like(row)])[None]
    keypoints = torch.ones(1, 14, 3)
    keypoints[:, 8, :2], keypoints[:, 10, :2] = torch.tensor([40.0, 100.0]), torch.tensor([40.0, 197.0])
    leg = part_images(image, keypoints, (256, 128))[4]
    assert leg.shape == (1, 3, 128, 32)
    torch.testing.assert_close(leg[0, 0, 0], 20 + (torch.arange(32) + 0.5) * 40 / 32, atol=1e-3, rtol=0)
    torch.testing.assert_close(leg[0, 1, :, 0], 85 + (torch.arange(128) + 0.5) * 127 / 128, atol=1e-3, rtol=0)
    assert leg[0, 2].min() > 0.999
    # The head is 60 x 60 around its joint; where that lies outside, the image's sides go on and its top does not.
    keypoints[:, 0, :2] = torch.tensor([0.0, 0.0])
    head = part_images(image, keypoints, (256, 128))[0]
    assert head.shape == (1, 3, 64, 64)
    assert head[0, 2, :31].max() == 0
    assert head[0, 0, 40, :30].abs().max() == 0
    assert head[0, 2, 40, :30].min() > 0.999


@pytest.mark.parametrize("size", [(128, 64), (64, 96)])
def test_the_parts_of_a_mirrored_image_are_mirrored(size):
    torch.manual_seed(0)
    images, keypoints = torch.rand(2, 3, *size), joints(2, *size)
    whole = compose(part_images(images, keypoints, (256, 128)))
    other = compose(part_images(images.flip(3), mirrored(keypoints, size[1]), (256, 128)))
    assert whole.shape == (2, 3, 256, 128)
    torch.testing.assert_close(other, whole.flip(3), atol=1e-4, rtol=0)
    limbs = draw_posebox(images, keypoints)
    mirrored_limbs = draw_posebox(images.flip(3), mirrored(keypoints, size[1])).flip(3)
    for part in (slice(0, 112), slice(112, 224)):
        columns = [*range(40), *range(184, 224)] if part.start == 0 else list(range(224))
        torch.testing.assert_close(mirrored_limbs[:, :, part, columns], limbs[:, :, part, columns], atol=1e-4, rtol=0)


def test_parts_with_a_missing_joint_are_black_and_only_they():
    images, keypoints = torch.ones(1, 3, 128, 64), joints(1)
    keypoints[:, :, 1] = keypoints[:, :, 1] / 2 + 32  # well within the image
    full = part_images(images, keypoints, (64, 64))
    assert all(part.min() > 0.999 for part in full)
    used = [(0,), (1, 8, 11), (2, 4), (5, 7), (8, 10), (11, 13)]
    for joint in range(14):
        without = keypoints.clone()
        without[:, joint, 2] = 0
        found = part_images(images, without, (64, 64))
        for part, before, needed in zip(found, full, used, strict=True):
            assert torch.equal(part, torch.zeros_like(part) if joint in needed else before)
    without[:, :, 2] = 0
    assert compose(part_images(images, without, (64, 64))).abs().max() == 0
    assert draw_posebox(images, without).abs().max() == 0


def test_the_posebox_puts_every_part_in_its_place():
    """Each part of a figure has a colour of its own; the PoseBox has it in the part's rectangle."""
    canvas, lines = torch.zeros(1, 3, 368, 184), joints(1, 368, 184)
    point = lines[0, :, :2]
    segments = {
        (2, 3): 0.1,
        (3, 4): 0.2,
        (5, 6): 0.3,
        (6, 7): 0.4,
        (8, 9): 0.5,
        (9, 10): 0.6,
        (11, 12): 0.7,
        (12, 13): 0.8,
    }
    for (one, other), colour in segments.items():
        for share in torch.linspace(0.15, 0.85, 60):
            x, y = (point[one] * (1 - share) + point[other] * share).round().int().tolist()
            canvas[:, :, y - 1 : y + 2, x - 1 : x + 2] = colour
    box = draw_posebox(canvas, lines)
    middles = {
        (28, 20): 0.1, (84, 20): 0.2, (28, 204): 0.3, (84, 204): 0.4,
        (140, 56): 0.5, (196, 56): 0.6, (140, 168): 0.7, (196, 168): 0.8,
    }  # fmt: skip
    for (row, column), colour in middles.items():
        assert box[0, 0, row, column] == pytest.approx(colour, abs=0.02), (row, column)
    # The joints' names do not matter, only where they are in the image.
    crossed = mirrored(lines, 184)
    crossed[..., 0] = 183 - crossed[..., 0]
    torch.testing.assert_close(draw_posebox(canvas, crossed), box)
    torso_only, with_legs = (draw_posebox(canvas + 1, lines, parts=parts) for parts in (1, 2))
    assert torso_only[:, :, :112, 40:184].min() > 0.5
    assert torso_only[:, :, 112:].abs().max() == torso_only[:, :, :, :40].abs().max() == 0
    assert with_legs[:, :, 112:].min() > 0.5
    assert with_legs[:, :, :112, 184:].abs().max() == 0


def test_joints_move_at_random_only_where_they_are_unsure():
    images, keypoints = torch.rand(2, 3, 128, 64), joints(2)
    keypoints[1, :, 2] = 0.1
    plain = draw_posebox(images, keypoints, size=56)
    torch.manual_seed(0)
    first = draw_posebox(images, keypoints, size=56, jitter=True)
    other = draw_posebox(images, keypoints, size=56, jitter=True)
    torch.manual_seed(0)
    assert torch.equal(draw_posebox(images, keypoints, size=56, jitter=True), first)
    assert torch.equal(first[0], plain[0])
    assert not torch.equal(first[1], plain[1])
    assert not torch.equal(first[1], other[1])


@pytest.mark.parametrize(
    ("name", "dims"), [("pie", [16, 16, 14]), ("pdc", [16, 16])]
)  # fmt: skip
def test_features_are_those_of_every_network(name, dims):
    method, batch = build_small(name).eval(), pose_batch()
    assert [list(part.shape) for part in method.features(batch)] == [[6, dim] for dim in dims]
    alone = method.embed(
        replace(batch.to("cpu"), image=batch.image[2:3], extras={"keypoints": batch.extras["keypoints"][2:3]})
    )
    torch.testing.assert_close(method.embed(batch)[2:3], alone, atol=1e-5, rtol=1e-4)
    # Both the photograph and the joints count.
    moved = replace(batch, extras={"keypoints": batch.extras["keypoints"] + torch.tensor([3.0, 3.0, 0.0])})
    changed = [not torch.equal(a, b) for a, b in zip(method.features(batch), method.features(moved), strict=True)]
    assert changed[:2] == [False, True]


STUDENT = {"invariant", "local", "invariant distance", "local distance"}
GAN = {"adversarial", "difference", "discriminator"}


@pytest.mark.parametrize(
    ("name", "parts", "terms"),
    [
        ("pie", ["photograph", "posebox", "photograph_head", "posebox_head"], {"photograph", "posebox"}),
        ("pie", None, {"photograph", "posebox", "fused"}),
        ("pdc", ["backbone", "tails.0", "photograph_head"], {"photograph"}),
        ("pdc", None, {"photograph", "parts", "fused"}),
        *(
            ("pdc", [part], {"photograph", "parts", "fused"})
            for part in ("localizers", "part_backbone", "tails", "weight", "parts_head", "fused_head")
        ),
        ("pgr", ["part_teacher", "region_teacher"], {"part teacher", "region teacher"}),
        ("pgr", ["student"], STUDENT),
        ("pgr", None, STUDENT | {"part teacher", "region teacher"}),
        ("pngan", None, {"photograph", "generated"}),
        ("pngan", ["photograph"], {"photograph"}),
        ("pngan-generated", ["generator", "discriminator"], GAN),
        ("pngan-generated", ["photograph", "generated"], {"photograph", "generated"}),
        ("pngan-generated", None, {"photograph", "generated"} | GAN),
    ],
)
def test_a_stage_trains_what_it_names_and_all_of_it(name, parts, terms):
    trained, reached, found = trained_and_reached(build_small(name), pose_batch(width=64), parts)
    assert found == terms
    assert trained == reached


@pytest.mark.parametrize("name", ["pie", "pdc", "pgr", "pngan-generated"])
def test_keypoints_of_another_skeleton_are_named(name):
    batch = pose_batch()
    with pytest.raises(ValueError, match=r"keypoints: \[6, 17, 3\] was given; \[6, 14, 3\] is needed"):
        build_small(name)(replace(batch, extras={"keypoints": torch.ones(6, 17, 3)}))


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"method.posebox_size: 100 was given; allowed are multiples of 28"):
        METHODS["pie"].Config(posebox_size=100)
    with pytest.raises(ValueError, match=r"method.localizer_pool: 4 was given; parts of .* allow at most 1"):
        METHODS["pdc"].Config(part_height=128, part_width=64)
    with pytest.raises(ValueError, match=r"method.part_width: 258 was given; allowed are multiples of 4"):
        METHODS["pdc"].Config(part_width=258)
    with pytest.raises(ValueError, match=r"size: \(100, 50\) was given; both must be multiples of 4"):
        part_images(torch.rand(1, 3, 8, 8), joints(1), (100, 50))


def test_pie_adds_the_confidences_as_they_are():
    method, batch = build("pie", posebox_size=56).eval(), pose_batch()
    batch.extras["keypoints"][:, 3, 2] = 0.25
    assert torch.equal(method.features(batch)[2], batch.extras["keypoints"][..., 2])
    assert method.embed(batch, normalize="parts").shape == (6, 46)


def test_pdc_shares_convolutions_and_not_their_norms():
    method = build_small("pdc")
    pairs = zip(method.backbone.named_modules(), method.part_backbone.modules(), strict=True)
    norms = 0
    for (name, one), other in pairs:
        for key, parameter in one.named_parameters(recurse=False):
            shared = parameter is other._parameters[key]
            assert shared != isinstance(one, nn.BatchNorm2d), f"{name}.{key}"
            norms += not shared
    assert norms > 0
    # The state of one loads into another, whose parameters stay shared.
    other = build_small("pdc")
    other.load_state_dict(method.state_dict())
    weights = [next(network.parameters()) for network in (other.backbone, other.part_backbone)]
    assert weights[0] is weights[1]


def test_pdc_moves_nothing_at_first_and_weighs_by_tanh():
    method, batch = build_small("pdc").eval(), pose_batch()
    parts = compose(part_images(batch.image, batch.extras["keypoints"], (64, 64)))
    torch.testing.assert_close(method.part_image(batch), parts, atol=1e-4, rtol=0)
    assert method.features(batch)[1].abs().max() <= 1
    with torch.no_grad():
        method.weight.zero_()
        method.bias.fill_(0.5)
    torch.testing.assert_close(method.features(batch)[1], torch.full((6, 16), 0.5).tanh())


def test_a_network_with_its_own_norms_is_the_same_at_first():
    torch.manual_seed(0)
    network = Backbone("resnet10t", options=BACKBONE).train()
    twin = with_own_norms(network)
    image = torch.rand(4, 3, 64, 32)
    torch.testing.assert_close(twin(image), network(image))
    for _ in range(3):
        twin(image * 5 + 2)
    assert not torch.allclose(twin.eval()(image), network.eval()(image))


def parameters(method):
    heads = [p for name, p in method.named_parameters() if name.split(".")[0] in method.heads]
    whole = sum(p.numel() for p in method.parameters())
    return whole - sum(p.numel() for p in heads), whole


def test_pdc_has_the_published_size():
    """14.74 and 17.82 M without and with the heads, beside the second norms; 5.71 M to 4e, 4.46 M in 5a and 5b."""
    model = ModelConfig("pdc-inception", pretrained=False, last_stride=2)
    method = build("pdc", 751, model, stage="inception5a")
    assert sum(p.numel() for p in method.backbone.parameters()) == 5_708_096
    assert sum(p.numel() for p in method.tails[0].parameters()) == 4_461_888
    assert sum(p.numel() for p in method.localizers.parameters()) == 4 * 16_886 + 37_686
    norms = sum(
        p.numel() for m in method.part_backbone.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()
    )
    without, whole = (count - norms for count in parameters(method))
    assert (round(without / 1e6, 2), round(whole / 1e6, 2)) == (14.74, 17.82)
    assert method.backbone(torch.zeros(1, 3, 512, 256)).shape == (1, 1024, 16, 8)
    with pytest.raises(ValueError, match="pretrained: True was given; 'pdc-inception' has no pretrained weights"):
        Backbone("pdc-inception", pretrained=True)
    with pytest.raises(ValueError, match=r"width: -1 was given; allowed are values in \(0, 16\]"):
        Backbone("pdc-inception", options={"width": -1})


def test_pie_has_the_published_size():
    """47.0 and 53.2 M without and with its three heads."""
    method = build("pie", 751, ModelConfig("resnet50", pretrained=False, last_stride=2))
    without, whole = parameters(method)
    assert (round(without / 1e6, 1), round(whole / 1e6, 1)) == (47.0, 53.2)
    assert method.fused_head.in_features == 4110


def test_soft_lines_against_the_distance_of_every_pixel():
    keypoints = joints(2, 32, 16)
    keypoints[1, 0, 2] = 0
    found = bones(keypoints, [(0, 1), (2, 3), (4, 4)], (32, 16), (32, 16), 24.0)
    for line, (one, other) in enumerate([(0, 1), (2, 3), (4, 4)]):
        a, b = (keypoints[0, joint, :2].double() for joint in (one, other))
        along = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None] * (b - a) + a
        for row, column in [(0, 0), (5, 8), (8, 5), (31, 15), (20, 3)]:
            distance = (along - torch.tensor([column, row])).norm(dim=1).min() * 8  # pixels of 256 x 128
            expected = (-distance.square() / (2 * 24**2)).exp()
            assert found[0, line, row, column].item() == pytest.approx(expected.item(), abs=1e-3)
    assert found[1, 0].abs().max() == 0
    assert torch.equal(found[1, 1:], found[0, 1:])
    # The same lines on a smaller map are there too: its cells are the middles of 4 x 4 pixels.
    small = bones(keypoints, HEAD_LINES, (32, 16), (8, 4), 24.0)
    torch.testing.assert_close(small[0, 0], F.avg_pool2d(found[:1, :1], 4)[0, 0], atol=0.07, rtol=0)


def test_regions_are_where_head_and_legs_are():
    regions = body_regions(joints(1), (128, 64), (16, 8), 16.0)[0]
    assert regions.shape == (3, 16, 8)
    rows = (regions * torch.arange(16.0)[:, None]).sum((1, 2)) / regions.sum((1, 2))
    head, upper, lower = rows.tolist()
    assert head < 4 < upper < 8 < lower
    without = joints(1)
    without[:, 0, 2] = 0
    assert body_regions(without, (128, 64), (16, 8), 16.0)[0, 0].max() == 0


def test_the_student_needs_no_joints_and_learns_from_fixed_teachers():
    method, batch = build_small("pgr"), pose_batch()
    trained_and_reached(method, batch, ["student"])
    alone = replace(batch, extras={})
    parts = method.eval().features(alone)
    assert [list(part.shape) for part in parts] == [[6, 16], *[[6, 12]] * 3]
    method.train()
    terms = method(batch)
    upright = method.part_teacher(batch.image, batch.extras["keypoints"])
    invariant, _ = method.student(batch.image)
    expected = 2 - 2 * F.cosine_similarity(invariant, upright).mean()
    assert terms["invariant distance"].value.item() == pytest.approx(expected.item(), abs=1e-5)
    assert terms["invariant distance"].weight == 1
    # An image without any joint still teaches: its regions and its parts are empty, not undefined.
    batch.extras["keypoints"][:, :, 2] = 0
    assert all(torch.isfinite(term.value) for term in method(batch).values())


def test_the_fusion_takes_the_largest_the_mean_or_all():
    batch = pose_batch(n=3)
    features = {}
    for fusion in ("max", "mean", "concat"):
        method = build_small("pngan", fusion=fusion).eval()
        (features[fusion],) = method.features(batch)
    with torch.no_grad():
        every = [method.photograph(batch.image), *(method.generated(view) for view in batch.extras["views"].unbind(1))]
    every = torch.stack([F.normalize(vector, dim=1) for vector in every], 1)
    assert every.shape == (3, 9, 12)
    torch.testing.assert_close(features["max"], every.max(1).values)
    torch.testing.assert_close(features["mean"], every.mean(1))
    torch.testing.assert_close(features["concat"], every.flatten(1))
    with pytest.raises(ValueError, match=r"views: \[3, 3, 64, 32\] was given; \[3, V, 3, H, W\] is needed"):
        method(replace(batch, extras={"views": batch.extras["views"][:, 0]}))


def test_sizes_that_the_generator_does_not_take_are_named():
    method = build_small("pngan-generated")
    for height, width in ((64, 32), (66, 64)):
        with pytest.raises(ValueError, match=f"data.height, data.width: {height}, {width} was given; allowed are mul"):
            method(pose_batch(height=height, width=width))


def test_partners_are_of_the_same_identity_and_take_turns():
    identity = torch.tensor([3, 1, 3, 2, 3, 1])
    assert partners(identity).tolist() == [2, 5, 4, 3, 0, 1]


def test_the_generator_and_its_judge_have_the_published_size():
    """11.39 and 2.77 M."""
    generator, discriminator = PoseGenerator(), PatchDiscriminator()
    assert sum(p.numel() for p in generator.parameters()) == 11_387_584
    assert sum(p.numel() for p in discriminator.parameters()) == 2_764_737
    small, photograph = PoseGenerator(width=4, blocks=1), torch.rand(2, 3, 64, 56)
    drawn = small(photograph, photograph)
    assert drawn.shape == photograph.shape
    assert drawn.abs().max() <= 1
    assert PatchDiscriminator(width=4)(photograph).shape == (2, 1, 2, 1)


def test_generator_and_judge_work_against_each_other():
    """Each gets the gradient of its own terms: the judge's is that of real and generated pictures, nothing else."""
    method, batch = build_small("pngan-generated"), pose_batch(width=64)
    terms = method(batch)
    (terms["adversarial"].value + terms["difference"].value).backward(retain_graph=True)
    assert all(p.grad is None for p in method.discriminator.parameters())
    assert all(p.grad is not None for p in method.generator.parameters())
    before = [p.grad.clone() for p in method.generator.parameters()]
    terms["discriminator"].value.backward()
    assert all(torch.equal(p.grad, old) for p, old in zip(method.generator.parameters(), before, strict=True))
    assert all(p.grad is not None for p in method.discriminator.parameters())


@pytest.mark.parametrize("dataset", ["market1501", "dukemtmc"])
def test_the_generator_learns_from_whole_photographs(dataset):
    data = parse([f"--recipe={dataset}-pngan-generated", "--root=."]).config.data
    assert (data.pad, data.erasing) == (0, 0)


def test_generated_pictures_are_of_the_photograph_in_eight_poses():
    method, batch = build_small("pngan-generated").eval(), pose_batch(width=64)
    pictures = method.pictures(replace(batch, extras={}))
    assert pictures.shape == (6, 8, 3, 64, 64)
    assert not pictures.requires_grad
    assert all(not torch.equal(pictures[:, 0], pictures[:, k]) for k in range(1, 8))
    poses = standing_poses()
    assert poses.shape == (8, 14, 3)
    # Seen from the front the person's right is the image's left; from behind it is the other way round.
    assert poses[0, 2, 0] < poses[0, 5, 0]
    assert poses[4, 2, 0] > poses[4, 5, 0]
    assert poses[..., :2].min() > 0
    assert poses[..., 0].max() < 127
    assert poses[..., 1].max() < 255
    drawn = draw_pose(poses, (256, 128), (128, 64))
    assert drawn.shape == (8, 3, 128, 64)
    assert drawn.min() == pytest.approx(-1, abs=1e-3)
    assert drawn.max() > 0.9
