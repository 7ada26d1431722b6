import re
from collections import Counter

import numpy as np
import pytest

from vareid_ext.data import ImageList, PKSampler, ShuffledSampler


def images_of(identity, viewpoint=None, camera=None):
    count = len(identity)
    return ImageList(
        paths=tuple(map(str, range(count))),
        identity=np.array(identity),
        camera=np.zeros(count) if camera is None else np.array(camera),
        viewpoint=np.zeros(count) if viewpoint is None else np.array(viewpoint),
        viewpoint_name=("",) * count,
    )


def batches(sampler):
    return [[draw.index for draw in batch] for batch in sampler]


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return images_of(rng.integers(0, 10, 200), rng.integers(-1, 3, 200), rng.integers(0, 4, 200))


@pytest.mark.parametrize("spread", [(), ("viewpoint",), ("viewpoint", "camera")])
def test_batches_are_p_identities_with_k_images(images, spread):
    sampler = PKSampler(images, identities_per_batch=3, instances=4, spread=spread)
    assert len(sampler) == 200 // 12
    found = batches(sampler)
    assert len(found) == len(sampler)
    for batch in found:
        groups = images.identity[batch].reshape(3, 4)
        assert (groups == groups[:, :1]).all()
        assert np.unique(groups[:, 0]).size == 3
        assert len(set(batch)) == 12


def test_all_images_of_an_identity_are_used_before_any_again():
    images = images_of([0] * 6 + [1] * 6)
    sampler = PKSampler(images, identities_per_batch=2, instances=2, batches_per_epoch=3)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        assert sorted(index for batch in batches(sampler) for index in batch) == list(range(12))


def test_identities_take_turns(images):
    # 10 identities, 4 at a time: each round of all of them gives two batches, the other two sit this round out.
    sampler = PKSampler(images, identities_per_batch=4, instances=1, batches_per_epoch=400)
    drawn = Counter(images.identity[index] for batch in batches(sampler) for index in batch)
    assert all(100 < drawn[identity] < 220 for identity in range(10))
    first = batches(sampler)[:2]
    assert np.unique(images.identity[first[0] + first[1]]).size == 8


def test_small_identities_are_repeated():
    sampler = PKSampler(images_of([0, 1, 1]), identities_per_batch=2, instances=4)
    assert len(sampler) == 1
    (batch,) = batches(sampler)
    assert Counter(batch) in (Counter({0: 4, 1: 2, 2: 2}),)
    (batch,) = batches(PKSampler(images_of([0]), identities_per_batch=1, instances=1))
    assert batch == [0]


def test_spread_covers_viewpoints_then_cameras():
    # One identity: 20 front images of cameras 0 and 1, one side and one back image.
    viewpoint, camera = [0] * 20 + [1, 2], [0] * 18 + [1, 1] + [0, 0]
    images = images_of([0] * 22, viewpoint, camera)
    seen = Counter()
    for seed in range(20):
        options = {"identities_per_batch": 1, "instances": 4, "seed": seed, "batches_per_epoch": 1}
        (batch,) = batches(PKSampler(images, spread=("viewpoint", "camera"), **options))
        assert set(images.viewpoint[batch]) == {0, 1, 2}
        assert 1 in images.camera[batch]
        (batch,) = batches(PKSampler(images, **options))
        seen[len(set(images.viewpoint[batch]))] += 1
    assert seen[3] < 5


def p_by_k(images, **options):
    return PKSampler(images, **({"identities_per_batch": 2, "instances": 3, "spread": ("viewpoint",)} | options))


def shuffled(images, **options):
    return ShuffledSampler(images, **({"batch_size": 6} | options))


both = pytest.mark.parametrize("sampler_of", [p_by_k, shuffled])


@both
def test_order_is_a_function_of_seed_and_epoch(images, sampler_of):
    first, second = sampler_of(images, seed=3), sampler_of(images, seed=3)
    second.set_epoch(7)
    list(second)
    first.set_epoch(2)
    second.set_epoch(2)
    assert list(first) == list(second) == list(first)
    second.set_epoch(3)
    assert batches(second) != batches(first)
    other = sampler_of(images, seed=2**63 - 1)
    other.set_epoch(2)
    assert batches(other) != batches(first)


@both
def test_resuming_in_the_middle_gives_the_rest(images, sampler_of):
    sampler = sampler_of(images)
    sampler.set_epoch(4)
    whole = list(sampler)
    for start in (0, 1, 20, len(whole)):
        sampler.set_epoch(4, start_batch=start)
        assert len(sampler) == len(whole) - start
        assert list(sampler) == whole[start:]
    with pytest.raises(ValueError, match="start_batch"):
        sampler.set_epoch(4, start_batch=len(whole) + 1)


@both
def test_augmentation_keys_differ_everywhere(images, sampler_of):
    sampler = sampler_of(images)
    keys = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys += [draw.key for batch in sampler for draw in batch]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 1 << 63 for key in keys)


@both
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_processes_share_every_batch(images, sampler_of, count):
    """Unevenly too: 6 images, or 5 identities, for 4 of them."""
    options = {"seed": 5, "batches_per_epoch": 6} | ({"identities_per_batch": 5} if sampler_of is p_by_k else {})
    alone = sampler_of(images, **options)
    ranks = [sampler_of(images, rank=rank, world_size=count, **options) for rank in range(count)]
    for sampler in (alone, *ranks):
        sampler.set_epoch(3, start_batch=2)
    for parts, whole in zip(zip(*ranks, strict=True), alone, strict=True):
        assert [draw for part in parts for draw in part] == whole
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= (3 if sampler_of is p_by_k else 1)
        assert [part == whole[slice(*s.own)] for part, s in zip(parts, ranks, strict=True)] == [True] * count
        if sampler_of is p_by_k:
            people = [set(images.identity[[draw.index for draw in part]]) for part in parts]
            assert sum(map(len, people)) == len(set().union(*people)) == 5
    assert {s.batch_size for s in ranks} == {alone.batch_size}
    assert len(sampler_of(images, world_size=2)) == 200 // 6


def test_a_batch_smaller_than_asked_for_is_shared_too():
    ranks = [ShuffledSampler(images_of([0] * 8), batch_size=9, rank=rank, world_size=3) for rank in range(3)]
    shares = [index for sampler in ranks for batch in batches(sampler) for index in batch]
    assert [sampler.own for sampler in ranks] == [(0, 2), (2, 5), (5, 8)]
    assert sorted(shares) == list(range(8))


def test_a_shuffled_epoch_shows_every_image_once():
    images = images_of([0] * 12)
    sampler = ShuffledSampler(images, batch_size=4)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = batches(sampler)
        assert [len(batch) for batch in found] == [4, 4, 4]
        orders.append([index for batch in found for index in batch])
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1] != orders[2] != list(range(12))


def test_what_fills_no_shuffled_batch_is_dropped():
    sampler = ShuffledSampler(images_of([0] * 11), batch_size=4)
    dropped = set()
    for epoch in range(60):
        sampler.set_epoch(epoch)
        drawn = [index for batch in sampler for index in (draw.index for draw in batch)]
        assert len(drawn) == len(set(drawn)) == 8
        dropped |= set(range(11)) - set(drawn)
    assert dropped == set(range(11))  # another one in each epoch
    # Unless it is the only one.
    alone = ShuffledSampler(images_of([0] * 3), batch_size=4)
    assert (alone.batch_size, alone.batches_per_epoch, sorted(*batches(alone))) == (3, 1, [0, 1, 2])


def test_every_place_of_a_shuffled_epoch_may_hold_any_image():
    sampler = ShuffledSampler(images_of([0] * 4), batch_size=2)
    orders = Counter()
    for epoch in range(2400):
        sampler.set_epoch(epoch)
        orders[tuple(index for batch in batches(sampler) for index in batch)] += 1
    # 24 orders, 100 of each expected, with a standard deviation of 10.
    assert len(orders) == 24
    assert all(50 < count < 150 for count in orders.values())


def test_more_batches_than_a_round_begin_another(images):
    found = batches(ShuffledSampler(images, batch_size=60, batches_per_epoch=7))
    assert len(found) == 7
    for begin in (0, 3, 6):  # three batches of 60 are in 200 images
        round_ = [index for batch in found[begin : begin + 3] for index in batch]
        assert len(set(round_)) == len(round_)
    assert found[:3] != found[3:6]


def test_a_sampler_says_what_a_batch_is(images):
    sampler = PKSampler(images, identities_per_batch=3, instances=4)
    assert (sampler.description, sampler.batch_size, sampler.batches_per_epoch) == ("3 identities x 4 images", 12, 16)
    sampler = ShuffledSampler(images, batch_size=12)
    assert (sampler.description, sampler.batch_size, sampler.batches_per_epoch) == ("12 images", 12, 16)


@both
@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 1.5, None, "1", True])
def test_a_seed_out_of_range_is_refused(images, sampler_of, seed):
    with pytest.raises(ValueError, match="seed"):
        sampler_of(images, seed=seed)


@pytest.mark.parametrize(
    ("sampler_of", "change", "message"),
    [
        (p_by_k, {"identities_per_batch": 0}, "identities_per_batch: 0 was given; allowed are integers from 1 to 10"),
        (p_by_k, {"instances": 0}, "instances: 0 was given; allowed are integers from 1 to 524,288"),
        (p_by_k, {"instances": 10**9}, "instances: 1000000000 was given"),
        (p_by_k, {"instances": 2.0}, "instances: 2.0 was given"),
        (p_by_k, {"identities_per_batch": 11}, "integers from 1 to 10"),
        (p_by_k, {"world_size": 3}, "world_size: 3 was given; allowed are integers from 1 to 2"),
        (shuffled, {"world_size": 7}, "world_size: 7 was given; allowed are integers from 1 to 6"),
        (p_by_k, {"rank": 1}, "rank: 1 was given; allowed are integers from 0 to 0"),
        (p_by_k, {"world_size": 11}, "world_size: 11 was given; allowed are integers from 1 to 2"),
        (p_by_k, {"spread": ("colour",)}, "spread: 'colour' was given; allowed are viewpoint, camera"),
        (p_by_k, {"batches_per_epoch": 0}, "batches_per_epoch: 0 was given"),
        (shuffled, {"batch_size": 0}, "batch_size: 0 was given"),
        (shuffled, {"batch_size": 10**9}, "batch_size: 1000000000 was given; allowed are integers from 1 to 1,048,576"),
        (shuffled, {"rank": -1, "world_size": 2}, "rank: -1 was given; allowed are integers from 0 to 1"),
        (shuffled, {"world_size": 0}, "world_size: 0 was given; allowed are integers from 1 to 6"),
        (shuffled, {"world_size": 201}, "world_size: 201 was given"),
        (shuffled, {"batches_per_epoch": 0}, "batches_per_epoch: 0 was given"),
    ],
)
def test_arguments_are_checked(images, sampler_of, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sampler_of(images, **change)
