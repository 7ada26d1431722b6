import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vareid_ext.data import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Draw,
    PKSampler,
    ReidDataset,
    SyntheticSettings,
    build_transform,
    collate,
    synthetic_data,
    with_soft_labels,
    worker_init,
)


@pytest.fixture(scope="module")
def train():
    return synthetic_data(SyntheticSettings(6, 1, 6, 0, 3, 48, 24)).train


def picture(height=20, width=10):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_evaluation_only_normalises_when_the_size_fits():
    image = build_transform(20, 10, train=False)(picture())
    values = np.asarray(picture()).astype(np.float64) / 255
    expected = ((values - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    assert image.dtype == torch.float32
    assert type(image) is torch.Tensor
    np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)
    assert build_transform(32, 16, train=False)(picture()).shape == (3, 32, 16)


def test_training_without_chances_is_evaluation():
    still = build_transform(20, 10, train=True, flip=0, pad=0, erasing=0)(picture())
    assert torch.equal(still, build_transform(20, 10, train=False)(picture()))


def test_each_augmentation_does_what_it_says():
    plain = build_transform(20, 10, train=False, mean=(0, 0, 0), std=(1, 1, 1))(picture())
    options = {"train": True, "mean": (0, 0, 0), "std": (1, 1, 1)}
    flipped = build_transform(20, 10, flip=1, pad=0, erasing=0, **options)(picture())
    assert torch.equal(flipped, plain.flip(2))
    # A crop is the picture moved by at most `pad`, with zeros (black) coming in.
    torch.manual_seed(0)
    crop = build_transform(20, 10, flip=0, pad=3, erasing=0, **options)
    padded = torch.nn.functional.pad(plain, (3, 3, 3, 3))
    windows = [padded[:, top : top + 20, left : left + 10] for top in range(7) for left in range(7)]
    found = set()
    for _ in range(40):
        image = crop(picture())
        found |= {place for place, window in enumerate(windows) if torch.equal(window, image)}
    assert 15 < len(found) <= 40
    erase = build_transform(20, 10, flip=0, pad=0, erasing=1, **options)
    for _ in range(10):
        image = erase(picture())
        gone = (image == 0).all(dim=0) & ~(plain == 0).all(dim=0)
        assert 0 < gone.float().mean() <= 0.45
        assert torch.equal(image[:, ~gone], plain[:, ~gone])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 10, True), "height"), ((10, 0, True), "width"), ((10, 10, True, {"flip": 1.5}), "flip"),
     ((10, 10, True, {"erasing": -0.1}), "erasing"), ((10, 10, True, {"pad": -1}), "pad")],
)  # fmt: skip
def test_transform_arguments_are_checked(arguments, name):
    options = arguments[3] if len(arguments) > 3 else {}
    with pytest.raises(ValueError, match=name):
        build_transform(*arguments[:3], **options)


def test_batches_hold_what_the_list_says(train):
    dataset = ReidDataset(train, build_transform(48, 24, train=False))
    assert len(dataset) == len(train)
    batch = collate([dataset[index] for index in (5, 0, 17)])
    assert len(batch) == 3
    assert batch.image.shape == (3, 3, 48, 24)
    assert batch.image.dtype == torch.float32
    for name in ("identity", "camera", "viewpoint"):
        values = getattr(batch, name)
        assert values.dtype == torch.int64
        assert values.tolist() == getattr(train, name)[[5, 0, 17]].tolist()
    assert batch.index.tolist() == [5, 0, 17]
    moved = batch.to("meta")
    assert {moved.image.device.type, moved.viewpoint.device.type, moved.index.device.type} == {"meta"}
    with pytest.raises(IndexError, match="index"):
        dataset[len(train)]
    with pytest.raises(ValueError, match="samples"):
        collate([])


def test_soft_viewpoints_become_distributions(train):
    soft = with_soft_labels(train)
    batch = collate([ReidDataset(soft, build_transform(48, 24, train=False))[index] for index in range(4)])
    assert batch.viewpoint.dtype == torch.float32
    assert torch.equal(batch.viewpoint, torch.from_numpy(soft.viewpoint_weight[:4].copy()))


def test_a_draw_is_augmented_by_its_key_alone(train):
    dataset = ReidDataset(train, build_transform(48, 24, train=True))
    torch.manual_seed(1)
    first = dataset[Draw(3, 77)].image
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    assert torch.equal(dataset[Draw(3, 77)].image, first)
    # The generator of everything else is left as it was.
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(dataset[Draw(3, 78)].image, first)
    torch.manual_seed(5)
    plain = dataset[3].image
    torch.manual_seed(5)
    assert torch.equal(dataset[3].image, plain)


def epoch(train, workers, start=0):
    sampler = PKSampler(train, identities_per_batch=3, instances=2, spread=("viewpoint", "camera"), seed=9)
    sampler.set_epoch(1, start_batch=start)
    dataset = ReidDataset(train, build_transform(48, 24, train=True))
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, worker_init_fn=worker_init
    )
    assert len(loader) == 6 - start
    return list(loader)


def test_batches_do_not_depend_on_the_number_of_workers_or_on_resuming(train):
    alone = epoch(train, 0)
    together = epoch(train, 2)
    rest = epoch(train, 0, start=4)
    assert len(alone) == len(together) == 6
    for batch, other in zip(alone, together, strict=True):
        assert torch.equal(batch.image, other.image)
        assert torch.equal(batch.index, other.index)
    for batch, other in zip(alone[4:], rest, strict=True):
        assert torch.equal(batch.image, other.image)


def test_worker_init_seeds_python_and_numpy():
    state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        draws = []
        for seed in (1, 1, 1 << 40):
            torch.manual_seed(seed)
            worker_init(0)
            draws.append((random.random(), np.random.rand()))
        assert draws[0] == draws[1]
        assert draws[0][0] != draws[2][0]
        assert draws[0][1] != draws[2][1]
    finally:
        torch.set_rng_state(state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
