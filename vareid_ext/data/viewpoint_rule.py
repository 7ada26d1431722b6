"""From which side a person is seen, by the shoulders and hips: an ordered model of four numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from vareid_ext._text import VIEWPOINTS

_RIGHT_SHOULDER, _LEFT_SHOULDER, _RIGHT_HIP, _LEFT_HIP = 2, 5, 8, 11  # of the 14 joints of data/keypoints.py
_HIPS, _HIPS_ALONE = 0.25, 1.6  # weight of the hips beside shoulders; shoulders are that much wider than hips
_SHORTEST, _USUAL = 0.12, 0.30  # length of a torso in heights of the image
_SPREAD = 1.0  # standard deviation, in its logarithm, within which a fit expects each number of the rule


def frontness(joints: np.ndarray, height: np.ndarray) -> np.ndarray:
    """How far a person shows the front: about 1 from the front, 0 from the side, -1 from the back.

    It is the width of shoulders and hips, signed by which of them is to the left, in lengths of the torso.

    Args:
        joints: [N, 14, 3] in the order of `BODY_PAIRS`, x and y in pixels, confidence 0 where a joint is not seen.
        height: [N] of the images, in pixels.

    Returns:
        float64 [N], undefined (NaN) where neither both shoulders nor both hips are seen.
    """
    joints = np.asarray(joints, dtype=np.float64)
    x, y, seen = joints[..., 0], joints[..., 1], joints[..., 2] > 0
    shoulders = seen[:, _RIGHT_SHOULDER] & seen[:, _LEFT_SHOULDER]
    hips = seen[:, _RIGHT_HIP] & seen[:, _LEFT_HIP]
    length = y[:, [_RIGHT_HIP, _LEFT_HIP]].mean(axis=1) - y[:, [_RIGHT_SHOULDER, _LEFT_SHOULDER]].mean(axis=1)
    found = shoulders & hips & (length >= _SHORTEST * height)
    length = np.where(found, length, _USUAL * height)
    w = (x[:, _LEFT_SHOULDER] - x[:, _RIGHT_SHOULDER]) / length
    h = (x[:, _LEFT_HIP] - x[:, _RIGHT_HIP]) / length
    both = (w + _HIPS * h) / (1 + 0.6 * _HIPS)
    alone = np.where(shoulders, w, np.where(hips, _HIPS_ALONE * h, np.nan))
    return np.where(shoulders & hips, both, alone)


@dataclass(frozen=True)
class ViewpointRule:
    """Probabilities of front, side and back, which are in this order, from :func:`frontness`.

    P(front) = sigmoid(slope (s - front)), P(back) = sigmoid(slope (back - s)), P(side) is the rest; a share of `doubt`
    is then spread evenly. The numbers below were fitted to OpenPose's keypoints of half the people of Market-1501 and
    the viewpoint labels of VA-reID's authors.

    Attributes:
        slope: above 0.
        front: where front and side are equally likely.
        back: where back and side are, below `front`.
        doubt: how often a label has nothing to do with the joints, in (0, 1).
    """

    slope: float = 18.3
    front: float = 0.543
    back: float = -0.483
    doubt: float = 0.039

    def probabilities(self, s: np.ndarray) -> np.ndarray:
        """float64 [N, 3]; all equal where s [N] is undefined."""
        numbers = torch.tensor([self.slope, self.front, self.back, self.doubt], dtype=torch.float64)
        s = np.asarray(s, dtype=np.float64)
        known = ~np.isnan(s)
        result = np.full((len(s), len(VIEWPOINTS)), 1 / len(VIEWPOINTS))
        result[known] = _probabilities(torch.from_numpy(s[known]), numbers).numpy()
        return result

    def as_dict(self) -> dict[str, float]:
        """The four numbers by name."""
        return asdict(self)


def _probabilities(s: Tensor, numbers: Tensor) -> Tensor:
    """[N], [4] -> [N, 3]."""
    slope, front, back, doubt = numbers
    a, b = torch.sigmoid(slope * (s - front)), torch.sigmoid(slope * (back - s))
    return (1 - doubt) * torch.stack([a, 1 - a - b, b], dim=1) + doubt / len(VIEWPOINTS)


def fit_rule(s: np.ndarray, viewpoint: np.ndarray, start: ViewpointRule | None = None) -> ViewpointRule:
    """The rule that makes the labels of images most likely, given that it resembles `start` (by default the one above).

    Each of its numbers, and how far `front` is above `back`, is expected within a factor of about e of that of `start`,
    so that ten labels change little and a hundred say nearly all; that also keeps it finite where the labels are
    separated without an error.

    Args:
        s: float64 [N], of :func:`frontness`; undefined ones are left out.
        viewpoint: int64 [N], 0 front, 1 side, 2 back.
    """
    s, viewpoint = np.asarray(s, dtype=np.float64), np.asarray(viewpoint)
    known = ~np.isnan(s)
    start = start or ViewpointRule()
    middle = (start.front + start.back) / 2
    odds = start.doubt / (1 - start.doubt)
    first = torch.tensor([start.slope, 1.0, start.front - start.back, odds], dtype=torch.float64).log()
    moved = torch.zeros(4, dtype=torch.float64, requires_grad=True)  # the second: of the middle, not of a logarithm
    x, label = torch.from_numpy(s[known]), torch.from_numpy(viewpoint[known])

    def numbers() -> Tensor:
        slope, _, gap, odds = (first + moved).exp()
        centre = middle + moved[1]
        return torch.stack([slope, centre + gap / 2, centre - gap / 2, odds / (1 + odds)])

    optimizer = torch.optim.LBFGS([moved], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        likely = _probabilities(x, numbers()).gather(1, label[:, None])
        loss = (moved**2).sum() / (2 * _SPREAD**2) - likely.log().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ViewpointRule(*numbers().tolist())
