"""What a run shows on the terminal while it trains."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from vareid_ext.files.atomic import naming

_SMOOTHING = 0.9
# A terminal is redrawn several times a second, a log file gets a line now and then.
_INTERVAL, _INTERVAL_OF_FILE = 0.2, 20.0


def tell(message: str = "") -> None:
    """Print a line to standard output without disturbing a progress bar; a letter it lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    with naming("standard output"):
        tqdm.write(message.encode(encoding, "replace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()


def one_line(name: str, values: Mapping[str, float]) -> str:
    """A set of metrics as a line of text."""
    return f"{name:<17} mAP {100 * values['mAP']:5.1f} %   rank-1 {100 * values['rank1']:5.1f} %"


class TrainingBar:
    """The progress bar of a training run: loss parts, learning rate, images per second, time left.

    Where nobody reads it any more it is not shown, and the run goes on until it has saved and tells something.

    Args:
        total: steps of the run.
        initial: steps done before.
    """

    def __init__(self, total: int, initial: int) -> None:
        self._bar = tqdm(
            total=total,
            initial=initial,
            unit="step",
            dynamic_ncols=True,
            mininterval=_INTERVAL if sys.stderr.isatty() else _INTERVAL_OF_FILE,
            bar_format="{desc} {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            leave=False,
        )
        self._clock = time.perf_counter()
        self._parts: dict[str, float] = {}
        self.images_per_second = 0.0
        """recent training speed, evaluations not counted"""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Show which epoch (counted from 0) runs now."""
        self._bar.set_description_str(f"epoch {epoch + 1}/{epochs}", refresh=False)
        self._clock = time.perf_counter()

    def update(self, images: int, parts: Mapping[str, float], rate: float) -> None:
        """Count a step of so many images, with the parts of its loss and its learning rate."""
        now = time.perf_counter()
        speed = images / max(now - self._clock, 1e-9)
        self._clock = now
        blend = _SMOOTHING if self.images_per_second else 0.0
        self.images_per_second = blend * self.images_per_second + (1 - blend) * speed
        for name, value in parts.items():
            self._parts[name] = _SMOOTHING * self._parts.get(name, value) + (1 - _SMOOTHING) * value
        terms = ", ".join(f"{name} {value:.2f}" for name, value in self._parts.items() if name != "total")
        text = f"loss {self._parts['total']:.2f} ({terms}), lr {rate:.1e}, {self.images_per_second:.0f} images/s"
        self._bar.set_postfix_str(text, refresh=False)
        with contextlib.suppress(BrokenPipeError):
            self._bar.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block that does not count as training time."""
        try:
            yield
        finally:
            self._clock = time.perf_counter()

    def close(self) -> None:
        """Take the bar off the terminal."""
        with contextlib.suppress(BrokenPipeError):
            self._bar.close()
