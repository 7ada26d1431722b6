"""Features of which each process of a group holds some rows, checked by all of them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed import ProcessGroup

from vareid_ext._arrays import to_tensor
from vareid_ext._processes import agreed, check_member, together
from vareid_ext._ring import check_group
from vareid_ext.ops._checks import check_values, dtype_name
from vareid_ext.ops._features import check_features, check_same_features, row_magnitudes


class Shares(NamedTuple):
    """Features, checked."""

    own: list[Tensor]
    """this process's rows of each set"""
    sizes: list[list[int]]
    """of each set, rows by process"""
    largest: float
    """the largest absolute value of all rows"""

    @property
    def totals(self) -> list[int]:
        """All rows of each set."""
        return [sum(sizes) for sizes in self.sizes]


def check_shares(
    group: ProcessGroup, features: Mapping[str, Any], check: Callable[[], Mapping[str, Any]], *, nonzero: bool = False
) -> Shares:
    """The sets of features as tensors; all processes raise the error of the first that has one.

    Args:
        group: the processes; all of them call this.
        features: arrays by argument; None is left out, everywhere or nowhere.
        check: looks at the other arguments; gives those that must be the same everywhere, by name.
        nonzero: refuse rows of zeros.

    Raises:
        TypeError: not a group; not arrays, or dtypes that are not floating or differ.
        ValueError: this process is no member of the group; shapes or devices do not fit; a row with NaN or Inf;
            arguments that differ between processes.
        LostProcessError: another process did not take part.
    """
    check_member(group)
    own: list[Tensor] = []
    same: dict[str, Any] = {}

    def check_own() -> tuple[list[int], float]:
        largest = 0.0
        for argument, value in features.items():
            if value is None:
                continue
            name = f"{argument} (process {group.rank()})"
            tensor = to_tensor(value, name)
            check_values(name, tensor)
            if own:
                check_same_features(name, tensor, next(iter(features)), own[0])
            else:
                check_features(name, tensor)
                check_group(group, tensor.device, name)
            magnitudes = row_magnitudes(name, tensor, nonzero=nonzero)
            largest = max([largest, *([float(magnitudes.max())] if len(tensor) else [])])
            own.append(tensor)
        same.update(check())
        return [len(tensor) for tensor in own], largest

    found = together(group, check_own)
    first = next(iter(features))
    given = {name: "None" if value is None else "an array" for name, value in features.items()}
    described = {
        f"dtype of {first}": dtype_name(own[0].dtype), f"elements of a row of {first}": own[0].shape[1],
        f"kind of device of {first}": own[0].device.type,
    }  # fmt: skip
    agreed(group, **given, **described, **same)
    shares = Shares(own, [list(sizes) for sizes in zip(*(sizes for sizes, _ in found), strict=True)],
                    max(largest for _, largest in found))  # fmt: skip
    if sum(shares.totals) >= 1 << 31:
        raise ValueError(f"{', '.join(features)}: {shares.totals} rows were given; together less than 2^31 are allowed")
    return shares
