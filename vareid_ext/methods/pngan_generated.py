"""PN-GAN with its own generator: the pictures of a person in eight poses are drawn from the photograph.

An earlier stage trains the generator on pairs of an identity's photographs: it is given one and the drawing of the
other's pose, and has to give the other (Qian et al., ECCV 2018). Its eight poses are a standing person from eight
sides, so that test images need no keypoints; the paper takes those of eight clusters of its training images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from vareid_ext._limits import check_limits
from vareid_ext.data import Batch
from vareid_ext.methods.base import About, Term, TrainingClasses, full_precision, is_trained
from vareid_ext.methods.pngan import Pngan, check_networks
from vareid_ext.models import ModelConfig
from vareid_ext.models.joints import check_joints
from vareid_ext.models.pose_gan import PatchDiscriminator, PoseGenerator, draw_pose, standing_poses

_RANGE = 3.0  # normalised images lie in [-3, 3], the generator's in [-1, 1]


@dataclass(frozen=True)
class PnganGeneratedConfig:
    """The networks of PN-GAN, the generator and its discriminator."""

    name: Literal["pngan-generated"] = "pngan-generated"
    """the method"""
    viewpoint_aware: bool = False
    """the viewpoint-aware loss in place of the photograph's cross entropy"""
    embed_dim: int = 1024
    """length of a feature"""
    dropout: float = 0.5
    """share of a feature that is left out in training, in [0, 1)"""
    fusion: Literal["max", "mean", "concat"] = "max"
    """the photograph's feature and the pictures': the maximum or mean of each entry, or all side by side"""
    generator_width: int = 64
    """channels of the first convolution of generator and discriminator"""
    generator_blocks: int = 9
    """residual blocks of the generator"""
    difference_weight: float = 10.0
    """weight of the mean absolute difference of generated pictures to photographs in that pose"""

    def __post_init__(self) -> None:
        check_networks(self)
        check_limits("method", self, generator_width=(1, 1024), generator_blocks=(0, 100))
        check_limits("method", self, difference_weight=(0, 10_000))


def partners(identity: Tensor) -> Tensor:
    """int64 [N]: for each image the next one of its identity in the batch, from the last on the first; or itself."""
    n = len(identity)
    number = torch.arange(n, device=identity.device)
    ahead = (number[None] - number[:, None] - 1) % n
    return ahead.masked_fill(identity[:, None] != identity[None], n).argmin(1)


def _scaled(image: Tensor) -> Tensor:
    """Images as the generator takes them; ValueError for a size that it or the discriminator does not."""
    height, width = image.shape[2:]
    if height % 4 or width % 4 or min(height, width) < 56:
        raise ValueError(
            f"data.height, data.width: {height}, {width} was given; allowed are multiples of 4, from 56 on"
        )
    return image / _RANGE


class PnganGenerated(Pngan):
    """The test feature is that of PN-GAN; the pictures are drawn for it."""

    about = About(
        title="PN-GAN, own generator",
        paper="Qian et al., ECCV 2018",
        claim="in the manner of",
        needs="keypoints in training; viewpoint labels in training with viewpoint_aware",
        published={"market1501-pngan-generated": (72.58, 89.43), "dukemtmc-pngan-generated": (53.20, 73.58)},
        measured={"synthetic-pngan-generated": (40.7, 56.9)},
    )
    Config = PnganGeneratedConfig
    inputs = ("keypoints",)
    test_inputs = ()
    needs_whole_identities = ("generator",)
    poses: Tensor

    def __init__(self, config: PnganGeneratedConfig, model: ModelConfig, classes: TrainingClasses) -> None:
        super().__init__(config, model, classes)
        self.generator = PoseGenerator(width=config.generator_width, blocks=config.generator_blocks)
        self.discriminator = PatchDiscriminator(width=config.generator_width)
        self.register_buffer("poses", standing_poses())

    def pictures(self, batch: Batch) -> Tensor:
        """The photographs in eight poses [N, 8, 3, H, W], normalised as the images are; no gradient flows into them."""
        image = _scaled(batch.image)
        poses = draw_pose(self.poses, (256, 128), (image.shape[2], image.shape[3]))
        with torch.no_grad():
            pictures = [self.generator(image, pose.expand_as(image)) for pose in poses]
        return torch.stack(pictures, 1) * _RANGE

    def forward(self, batch: Batch) -> dict[str, Term]:
        """The losses of what the stage trains: generator and discriminator, the identity loss of each network."""
        generation = self._generation(batch) if is_trained(self.generator) else {}
        return generation | super().forward(batch)

    def _generation(self, batch: Batch) -> dict[str, Term]:
        """The losses of a least-squares GAN and the difference to the photographs in whose poses it draws."""
        keypoints, size = batch.extras["keypoints"], (batch.image.shape[2], batch.image.shape[3])
        check_joints(keypoints, batch.image)
        image, other = _scaled(batch.image), partners(batch.identity)
        drawn = self.generator(image, draw_pose(keypoints[other], size, size))
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        judged = functional_call(self.discriminator, fixed, drawn)
        real, false = self.discriminator(image), self.discriminator(drawn.detach())
        with full_precision(drawn):
            return {
                "adversarial": Term((judged.float() - 1).square().mean()),
                "difference": Term(F.l1_loss(drawn.float(), image[other].float()), self.config.difference_weight),
                "discriminator": Term((real.float() - 1).square().mean() / 2 + false.float().square().mean() / 2),
            }
