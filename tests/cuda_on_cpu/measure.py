"""Measures what the kernels move, and writes the table of docs/kernels.md: ``python -m tests.cuda_on_cpu.measure``."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import torch

from tests.cuda_on_cpu import build, rows
from tests.cuda_on_cpu.backend import cuda_on_cpu
from tests.cuda_on_cpu.harness import Launcher, Traffic, package
from tests.cuda_on_cpu.representative import REPRESENTATIVE, Shape

PAGE = build.ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- traffic: begin -->", "<!-- traffic: end -->"


def traffic(row: str) -> dict[tuple[str, Shape], Traffic]:
    """The traffic of a row's representative calls, by kernel and shape."""
    found: dict[tuple[str, Shape], Traffic] = {}
    library = package("checker")
    for shape in REPRESENTATIVE.get(row, []):
        with Launcher(library) as launcher, cuda_on_cpu(launcher), library.measuring() as measured:
            shape.call(torch.device("cpu"))
        found.update({(kernel, shape): t for kernel, t in sorted(measured.items())})
    return found


def table() -> str:
    """All rows' traffic as a Markdown table."""
    lines = [
        "| kernel | shape | bytes moved | minimum | ratio | requests | sectors a request | ideal | coalescing "
        "| shared wavefronts a request | ideal |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows.row_names():
        for (kernel, shape), t in traffic(row).items():
            moved, minimum = t.bytes_loaded + t.bytes_stored, t.distinct_loaded + t.distinct_stored
            shared = "- | -"
            if t.shared_requests:
                shared = f"{t.wavefronts / t.shared_requests:.2f} | {t.ideal_wavefronts / t.shared_requests:.2f}"
            requests = max(1, t.requests)
            lines.append(
                f"| `{kernel}` | {shape.name} | {moved:,} | {minimum:,} | {t.moved_ratio:.2f} | {t.requests:,} | "
                f"{t.sectors / requests:.2f} | {t.ideal_sectors / requests:.2f} | {t.coalescing:.1%} | {shared} |"
            )
    return "\n".join(lines)


def replace_section(page: Path, begin: str, end: str, text: str) -> None:
    """Puts ``text`` between two marker lines of a page."""
    old = page.read_text()
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{page.name}: the markers {begin} and {end} are missing")
    partial = page.with_suffix(".partial")
    partial.write_text(pattern.sub(lambda _: f"{begin}\n{text}\n{end}", old))
    os.replace(partial, page)


def main() -> None:
    """Prints the table, or writes it into docs/kernels.md."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_on_cpu.measure", description=__doc__)
    parser.add_argument("--print", action="store_true", help="print the table instead of writing docs/kernels.md")
    if parser.parse_args().print:
        print(table())
    else:
        replace_section(PAGE, BEGIN, END, table())


if __name__ == "__main__":
    main()
