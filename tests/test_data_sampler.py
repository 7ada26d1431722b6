from collections import Counter

import numpy as np
import pytest

from vareid_ext.data import ImageList, PKSampler


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


def test_order_is_a_function_of_seed_and_epoch(images):
    def sampler(seed=3):
        return PKSampler(images, identities_per_batch=3, instances=2, spread=("camera",), seed=seed)

    first, second = sampler(), sampler()
    second.set_epoch(7)
    list(second)
    first.set_epoch(2)
    second.set_epoch(2)
    assert list(first) == list(second) == list(first)
    second.set_epoch(3)
    assert batches(second) != batches(first)
    other = sampler(seed=2**63 - 1)
    other.set_epoch(2)
    assert batches(other) != batches(first)


def test_resuming_in_the_middle_gives_the_rest(images):
    sampler = PKSampler(images, identities_per_batch=2, instances=3, spread=("viewpoint",))
    sampler.set_epoch(4)
    whole = list(sampler)
    for start in (0, 1, 20, len(whole)):
        sampler.set_epoch(4, start_batch=start)
        assert len(sampler) == len(whole) - start
        assert list(sampler) == whole[start:]
    with pytest.raises(ValueError, match="start_batch"):
        sampler.set_epoch(4, start_batch=len(whole) + 1)


def test_augmentation_keys_differ_everywhere(images):
    sampler = PKSampler(images, identities_per_batch=2, instances=3)
    keys = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys += [draw.key for batch in sampler for draw in batch]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 1 << 63 for key in keys)


def test_ranks_share_a_global_batch(images):
    options = {"identities_per_batch": 2, "instances": 3, "spread": ("viewpoint",), "seed": 5, "batches_per_epoch": 6}
    ranks = [PKSampler(images, rank=rank, world_size=3, **options) for rank in range(3)]
    alone = PKSampler(images, **(options | {"identities_per_batch": 6}))
    for parts, together in zip(zip(*map(batches, ranks), strict=True), batches(alone), strict=True):
        assert [index for part in parts for index in part] == together
    keys = [draw.key for sampler in ranks for batch in sampler for draw in batch]
    assert len(set(keys)) == len(keys)
    assert len(PKSampler(images, identities_per_batch=2, instances=3, world_size=3)) == 200 // 18


@pytest.mark.parametrize("seed", [-1, 2**63, 2**70, 1.5, None, "1", True])
def test_a_seed_out_of_range_is_refused(images, seed):
    with pytest.raises(ValueError, match="seed"):
        PKSampler(images, identities_per_batch=2, instances=2, seed=seed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identities_per_batch": 0}, "identities_per_batch must be at least 1"),
        ({"instances": 0}, "instances must be at least 1"),
        ({"identities_per_batch": 11}, "at most 10, for 10 identities shared by 1"),
        ({"identities_per_batch": 6, "world_size": 2}, "at most 5"),
        ({"rank": 1}, r"rank must be in \[0, 1\)"),
        ({"spread": ("colour",)}, "spread must be out of viewpoint, camera, got 'colour'"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be at least 1"),
    ],
)
def test_arguments_are_checked(images, change, message):
    with pytest.raises(ValueError, match=message):
        PKSampler(images, **({"identities_per_batch": 2, "instances": 2} | change))
