"""The limits of a configuration's numbers."""

from __future__ import annotations


def check_limits(section: str, config: object, **limits: tuple[float, float]) -> None:
    """ValueError unless every named number of a section lies within its limits, both included; None is no number."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:  # NaN is in none
            raise ValueError(f"{section}.{name}: {value!r} was given; allowed are values from {low:,} to {high:,}")


def check_below(section: str, config: object, **limits: float) -> None:
    """ValueError unless every named number of a section lies in [0, its limit)."""
    for name, limit in limits.items():
        value = getattr(config, name)
        if not 0 <= value < limit:
            raise ValueError(f"{section}.{name}: {value!r} was given; allowed are values in [0, {limit})")
