"""The viewpoint-aware loss as an option of any method, `viewpoint_aware` of its settings; its weight over time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vareid_ext.data import Batch
from vareid_ext.losses import ViewpointAwareLoss
from vareid_ext.methods.base import Term, TrainingClasses, full_precision


class ViewpointAwareTerms(nn.Module):
    """L_y + L_v + 0.1 L_R of one feature of a method, with the centres of identities and viewpoints.

    It stands in place of that feature's identity loss, or beside the losses of a method's parts. The weights are those
    of Zhu et al. (AAAI 2020), alpha 0.2, all through training.

    Args:
        dim: D, length of the feature.
        classes: what the centres are made for; pairs that do not occur stay out of L_v and L_R.
    """

    def __init__(self, dim: int, classes: TrainingClasses) -> None:
        super().__init__()
        self.loss = ViewpointAwareLoss(
            classes.identities, dim, num_viewpoints=classes.viewpoints, mask=classes.subclasses
        )

    def forward(self, feature: Tensor, batch: Batch) -> dict[str, Term]:
        """Feature [N, D], the one that would be classified -> the terms, computed in float32."""
        with full_precision(feature):
            losses = self.loss(feature.float(), batch.identity, batch.viewpoint)
        return {
            "global identity": Term(losses.identity),
            "viewpoint": Term(losses.viewpoint, self.loss.view_weight),
            "regularizer": Term(losses.regularizer, self.loss.beta),
        }


def view_weight_at(config: Any, epoch: int) -> float:
    """The weight of the viewpoint loss in an epoch, of settings with ``view_weight``, ``_late`` and ``_drop``."""
    dropped = config.view_weight_drop is not None and epoch >= config.view_weight_drop
    return config.view_weight_late if dropped else config.view_weight
