"""The limits of a configuration's numbers."""

from __future__ import annotations


def check_limits(section: str, config: object, **limits: tuple[float, float]) -> None:
    """ValueError unless every named number of a section lies within its limits, both included; None is no number."""
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if value is not None and not low <= value <= high:  # NaN is in none
            raise ValueError(f"{section}.{name}: {value!r} was given; allowed are values from {low:,} to {high:,}")
