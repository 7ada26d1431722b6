"""Measures what the kernels move: ``python -m tests.cuda_on_cpu.measure`` prints the table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.cuda_on_cpu import rows
from tests.cuda_on_cpu.backend import cuda_on_cpu
from tests.cuda_on_cpu.harness import Launcher, Traffic, package
from tests.cuda_on_cpu.minima import Counting
from tests.cuda_on_cpu.representative import REPRESENTATIVE, Shape


@dataclass(frozen=True)
class Measured:
    """What a kernel moved in a representative call, and the least that it had to move."""

    traffic: Traffic
    least: int  # bytes: minima.py's where it has a formula, else the distinct bytes

    @property
    def moved(self) -> int:
        """Bytes, once for each warp request."""
        return self.traffic.bytes_loaded + self.traffic.bytes_stored

    @property
    def ratio(self) -> float:
        """Bytes moved over the least."""
        return self.moved / max(1, self.least)


def traffic(row: str) -> dict[tuple[str, Shape], Measured]:
    """The traffic of a row's representative calls, by kernel and shape."""
    found: dict[tuple[str, Shape], Measured] = {}
    library = package("checker")
    for shape in REPRESENTATIVE.get(row, []):
        with Launcher(library) as launcher, library.measuring() as measured:
            counting = Counting(launcher)
            with cuda_on_cpu(counting):
                shape.call(torch.device("cpu"))
        for kernel, t in sorted(measured.items()):
            least = counting.of(kernel)
            found[kernel, shape] = Measured(t, t.distinct_loaded + t.distinct_stored if least is None else least)
    return found


def table() -> str:
    """All rows' traffic as a Markdown table."""
    lines = [
        "| kernel | shape | bytes moved | minimum | ratio | over distinct bytes | requests | sectors a request | ideal "
        "| coalescing | shared wavefronts a request | ideal |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows.row_names():
        for (kernel, shape), measured in traffic(row).items():
            t = measured.traffic
            shared = "- | -"
            if t.shared_requests:
                shared = f"{t.wavefronts / t.shared_requests:.2f} | {t.ideal_wavefronts / t.shared_requests:.2f}"
            requests = max(1, t.requests)
            lines.append(
                f"| `{kernel}` | {shape.name} | {measured.moved:,} | {measured.least:,} | {measured.ratio:.2f} | "
                f"{t.moved_ratio:.2f} | {t.requests:,} | "
                f"{t.sectors / requests:.2f} | {t.ideal_sectors / requests:.2f} | {t.coalescing:.1%} | {shared} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
