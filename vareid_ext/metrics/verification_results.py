"""What verification finds: rates, thresholds and how sure they are, as numbers, as text and for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vareid_ext._text import table

CONFIDENCE = 0.95


@dataclass(frozen=True)
class OperatingPoint:
    """The largest threshold whose false positive rate does not exceed a target, and what it does to the pairs.

    Attributes:
        target: the false positive rate that was allowed.
        threshold: a distance; pairs up to it are accepted.
        fpr: the share of the non-matches that are accepted (false match rate, FMR).
        tpr: the share of the matches that are accepted; no larger one is had at the target, and none is interpolated.
    """

    target: float
    threshold: float
    fpr: float
    tpr: float

    @property
    def fnmr(self) -> float:
        """The share of the matches that are not accepted (false non-match rate)."""
        return 1 - self.tpr


@dataclass(frozen=True)
class OpenSetPoint:
    """The largest threshold whose false alarm rate does not exceed a target.

    Attributes:
        target: the false alarm rate that was allowed.
        threshold: a distance; a query raises an alarm if its nearest image is at most that far.
        far: the share of the unmated queries that raise an alarm.
        dir: detection and identification rate at rank 1: the share of the mated queries whose nearest image is a match
            (ties as in the ranking) and at most that far.
    """

    target: float
    threshold: float
    far: float
    dir: float


@dataclass(frozen=True)
class RecommendedThreshold:
    """The threshold of a target with 95 % confidence intervals of its errors.

    Attributes:
        point: the threshold and the errors on these images.
        fmr_interval: low and high end for the false match rate.
        fnmr_interval: the same for the false non-match rate.
        resamples: draws of the bootstrap over the queries' identities that the intervals are made of.
    """

    point: OperatingPoint
    fmr_interval: tuple[float, float]
    fnmr_interval: tuple[float, float]
    resamples: int


@dataclass(frozen=True)
class VerificationMetrics:
    """Results over all pairs; rates are fractions in [0, 1]. ``print`` shows them as text, in percent.

    Attributes:
        num_matches: pairs of one identity.
        num_non_matches: pairs of two identities.
        eer: equal error rate: where FMR and FNMR cross on the straight line between the two neighbouring thresholds.
        eer_threshold: the smallest distance as threshold at which FMR is at least FNMR.
        points: one :class:`OperatingPoint` for each target.
        open_set: one :class:`OpenSetPoint` for each target.
        num_mated: queries with a match in the gallery.
        num_unmated: the queries that alarms are counted of: those without a match or, where every query has one, all of
            them with their matches taken out of the gallery.
        matches_taken_out: whether it is the latter.
        roc: threshold, FPR and TPR, each float64 [n], thresholds ascending: exact rates at up to 128 thresholds for
            each doubling of a float32 distance, and at all those above.
        recommended: a :class:`RecommendedThreshold` if one was asked for.
    """

    num_matches: int
    num_non_matches: int
    eer: float
    eer_threshold: float
    points: tuple[OperatingPoint, ...]
    open_set: tuple[OpenSetPoint, ...]
    num_mated: int
    num_unmated: int
    matches_taken_out: bool
    roc: tuple[np.ndarray, np.ndarray, np.ndarray]
    recommended: RecommendedThreshold | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers, lists and dictionaries, for JSON."""
        points = [{**vars(point), "fnmr": point.fnmr} for point in self.points]
        result: dict[str, Any] = {
            "num_matches": self.num_matches, "num_non_matches": self.num_non_matches, "eer": self.eer,
            "eer_threshold": self.eer_threshold, "tpr_at_fpr": points, "num_mated": self.num_mated,
            "num_unmated": self.num_unmated, "matches_taken_out": self.matches_taken_out,
            "dir_at_far": [dict(vars(point)) for point in self.open_set],
            "roc": {name: values.tolist() for name, values in zip(("threshold", "fpr", "tpr"), self.roc, strict=True)},
        }  # fmt: skip
        if self.recommended is not None:
            best = self.recommended
            result["recommended"] = {
                **vars(best.point), "fnmr": best.point.fnmr, "fmr_interval": list(best.fmr_interval),
                "fnmr_interval": list(best.fnmr_interval), "confidence": CONFIDENCE, "resamples": best.resamples,
            }  # fmt: skip
        return result

    def cells(self) -> dict[str, str]:
        """The columns of a table by name, in percent."""
        rates = {"EER": self.eer}
        rates.update({f"TPR@FPR={point.target:.0e}": point.tpr for point in self.points})
        rates.update({f"DIR@FAR={point.target:.0e}": point.dir for point in self.open_set})
        return {name.replace("e-0", "e-"): f"{100 * rate:.2f}" for name, rate in rates.items()}

    def threshold_cells(self) -> dict[str, str]:
        """The distances that belong to :meth:`cells`, by the same names."""
        thresholds = [self.eer_threshold, *(point.threshold for point in self.points)]
        thresholds += [point.threshold for point in self.open_set]
        return dict(zip(self.cells(), (f"{threshold:.6g}" for threshold in thresholds), strict=True))

    def notes(self) -> list[str]:
        """What is to be known when reading the results, a line each."""
        lines = [f"pairs: {self.num_matches} matches, {self.num_non_matches} non-matches"]
        few = [point.target for point in self.points if point.target * self.num_non_matches < 1]
        if few:
            targets = ", ".join(f"{target:g}" for target in few)
            lines.append(f"TPR@FPR={targets}: rests on no accepted non-match, as there are too few of them")
        unmated = (
            f"each of {self.num_unmated} queries without its matches, as none is without a match"
            if self.matches_taken_out
            else f"{self.num_unmated} queries without a match"
        )
        lines.append(f"DIR@FAR: alarms are counted of {unmated}")
        if self.recommended is not None:
            best = self.recommended
            lines.append(
                f"recommended threshold for FPR {best.point.target:g}: {best.point.threshold:.9g}; "
                f"FMR {_percent(best.point.fpr)} ({_interval(best.fmr_interval)}), "
                f"FNMR {_percent(best.point.fnmr)} ({_interval(best.fnmr_interval)}): 95 % intervals of "
                f"{best.resamples} bootstrap draws of the queries' identities"
            )
            if best.point.fpr == 0:
                most = _percent(min(1, 3 / self.num_non_matches))
                lines.append(
                    "no non-match is within that threshold, which the interval cannot see beyond: with as many "
                    f"independent pairs the true FMR may be up to {most}"
                )
        return lines

    def __str__(self) -> str:
        return verification_text({"": self})


def _percent(rate: float) -> str:
    return f"{100 * rate:.4g} %"


def _interval(ends: tuple[float, float]) -> str:
    return f"{_percent(ends[0])} to {_percent(ends[1])}"


def verification_text(results: Mapping[str, VerificationMetrics]) -> str:
    """Results by name as tables of rates and of thresholds, and what is to be said about each."""
    parts = []
    for what, cells_of in (("%", VerificationMetrics.cells), ("threshold", VerificationMetrics.threshold_cells)):
        cells = {name: cells_of(result) for name, result in results.items()}
        parts.append(table((what, *next(iter(cells.values()))), [(name, *row.values()) for name, row in cells.items()]))
    lines = [f"{name}: {note}" if name else note for name, result in results.items() for note in result.notes()]
    return "\n".join(["\n\n".join(parts), *lines])
