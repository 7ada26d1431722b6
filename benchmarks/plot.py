"""The tables and the plot of docs/performance.md and README.md, from what the benchmarks wrote to docs/performance:

bash benchmarks/measure.sh [QUERY GALLERY]      measures everything anew (ten minutes on two cores)
python -m benchmarks.plot [FOLDER]              draws docs/images/performance.png, fills the table
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.harness import write_atomically
from vareid_ext.files.atomic import atomic_file

ROOT = Path(__file__).resolve().parents[1]
_BEGIN, _END = "<!-- numbers: begin (python -m benchmarks.plot) -->", "<!-- numbers: end -->"
_TOOL, _CEILING = "#2f6fb7", "#d98a1f"
_INK, _GREY, _GRID = "#22262b", "#7a828c", "#e4e7eb"


class Row(NamedTuple):
    """One comparison: a contender of a case in a file, against another one of the same case."""

    what: str
    file: str
    case: str
    """text that the case's name begins with"""
    against: str
    named: str
    """how the table calls it"""
    ceiling: bool = False
    """whether it is what the machine can do at best, and not what others use"""
    contender: str = "ours"


_RETRIEVAL, _CROSS_ENTROPY = "retrieval", "viewpoint_aware_cross_entropy"
ROWS = (
    Row("re-ranking, Market-1501, features of a real network", "market1501", "", "fastreid",
        "fast-reid's `re_ranking`"),
    Row("re-ranking, 500 + 3,000 images, D=2048", _RETRIEVAL, "small D=2048", "fastreid", "fast-reid's `re_ranking`"),
    Row("CMC, mAP, mINP, 3,368 x 15,913", "ranking", "Q=3368 G=15913 against", "fastreid",
        "fast-reid's `evaluate_rank` (Cython)"),
    Row("CMC, mAP, mINP, 3,368 x 15,913", "ranking", "Q=3368 G=15913 against", "reference",
        "the definition in plain PyTorch"),
    Row("viewpoint-aware cross-entropy, 256 x (751 + 2,253)", _CROSS_ENTROPY, "B=256 K=751 ", "torch soft-label",
        "PyTorch's soft-label cross-entropy"),
    Row("viewpoint-aware cross-entropy, 256 x 30,000", _CROSS_ENTROPY, "B=256 K=7500 ", "torch label-smoothed",
        "PyTorch's label-smoothed cross-entropy"),
    Row("losses from features, 256 x 40,000 classes, D=2048", "linear", "B=256 D=2048 K=10000 ", "dense",
        "the same from logits"),
    Row("angular regularizer, K=10,000, D=2048", "angular_center", "K=10000 V=3 D=2048 float32", "reference",
        "autograd in plain PyTorch"),
    Row("re-ranking into memory, Market-1501's size, D=2048", _RETRIEVAL, "market1501 D=2048", "product",
        "one float32 product N x N x D", True, "ours, into memory"),
    Row("re-ranking into memory, features of a real network", "market1501", "", "product",
        "one float32 product N x N x D", True, "ours, into memory"),
    Row("metrics from features, Market-1501's size, D=2048", "ranking", "features Q=3368 G=15913 D=2048", "product",
        "one float32 product Q x G x D", True),
    Row("CMC, mAP, mINP, 3,368 x 15,913", "ranking", "Q=3368 G=15913 matches=21 random float32", "sum",
        "`distances.sum()`", True),
    Row("ROC, TPR@FPR, EER, 3,368 x 15,913", "verification", "Q=3368 G=15913 D=256", "sum", "`distances.sum()`", True),
    Row("one query re-ranked, 100,000 images, D=512", "search", "G=100000 D=512", "sum", "reading the features", True,
        "re-ranked"),
    Row("one query, 100,000 images, D=512", "search", "G=100000 D=512", "sum", "reading the features", True, "nearest"),
    Row("losses from features, 256 x 40,000 classes, D=2048", "linear", "B=256 D=2048 K=10000 ", "bare products",
        "the heads' matrix products alone", True),
    Row("viewpoint-aware cross-entropy, 256 x 300,000", _CROSS_ENTROPY, "B=256 K=75000 ", "clone",
        "copying the logits", True),
    Row("viewpoint-aware cross-entropy, forward alone", _CROSS_ENTROPY, "B=256 K=75000 ", "exp into out",
        "`torch.exp(logits, out=...)`", True,
        "ours forward"),
    Row("angular regularizer, K=10,000, D=2048", "angular_center", "K=10000 V=3 D=2048 float32", "clone",
        "copying the centres", True),
)  # fmt: skip

_SHORT = (0, 2, 4)  # of these in README.md


class Number(NamedTuple):
    """A row with what was measured."""

    row: Row
    seconds: float
    against: float
    mebibytes: tuple[float | None, float | None]
    """peaks beyond input and result: ours, theirs"""

    @property
    def ratio(self) -> float:
        """Our time over theirs."""
        return self.seconds / self.against


def read_numbers(folder: Path) -> list[Number]:
    """The rows for which the folder has results."""
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    numbers = []
    for row in ROWS:
        cases = reports[row.file]["cases"] if row.file in reports else []
        for case in cases:
            found = case["contenders"]
            if case["case"].startswith(row.case) and row.contender in found and row.against in found:
                peaks = case.get("mebibytes_beyond", {})
                times = (found[name]["median_s"] for name in (row.contender, row.against))
                numbers.append(Number(row, *times, (peaks.get(row.contender), peaks.get(row.against))))
                break
    return numbers


def table(numbers: list[Number], environments: dict[str, Any]) -> str:
    """The numbers, and the conditions of each file, as Markdown."""
    lines = ["| what | beside | time | beside | ratio | memory | beside |", f"| --- | --- {'| ---: ' * 5}|"]
    for number in numbers:
        times, sizes = map(_seconds, (number.seconds, number.against)), map(_size, number.mebibytes)
        cells = (number.row.what, number.row.named, *times, f"**{_ratio(number.ratio)}**", *sizes)
        lines.append(f"| {' | '.join(cells)} |")
    conditions = [
        f"- `{name}.json`: {e['device']}, {e['cpu_capability']}, {e['threads']} threads, PyTorch {e['torch']}, "
        f"load average {e['load_average'][0]} at its beginning"
        for name, e in environments.items()
    ]
    return "\n".join([*lines, "", *conditions])


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _size(value: float | None) -> str:
    return "" if value is None else f"{value / 1024:.1f} GiB" if value >= 1000 else f"{value:.0f} MiB"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def draw(numbers: list[Number]) -> Figure:
    """A bar for each row: our time over that of what stands beside it."""
    figure = Figure(figsize=(9, 0.42 * len(numbers) + 1.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for place, number in enumerate(numbers):
        colour, left = _CEILING if number.row.ceiling else _TOOL, number.ratio < 1
        axes.plot([number.ratio, 1], [place, place], color=colour, linewidth=7, solid_capstyle="butt", alpha=0.35)
        axes.plot(number.ratio, place, "o", color=colour, markersize=7)
        axes.annotate(
            _ratio(number.ratio), (number.ratio, place), (-9 if left else 9, 0), fontsize=8, color=_INK,
            textcoords="offset points", va="center", ha="right" if left else "left",
        )  # fmt: skip
    labels = [f"{n.row.what}\nbeside {n.row.named.replace('`', '')}" for n in numbers]
    axes.set_yticks(range(len(numbers)), labels, fontsize=7.5, color=_INK)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.12)
    axes.axvline(1, color=_INK, linewidth=1)
    axes.grid(True, axis="x", color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=_INK)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("time, as a multiple of what stands beside it (less is better)", fontsize=9, color=_GREY)
    for text, colour, at in (("what people use today", _TOOL, 0.0), ("the machine's ceiling", _CEILING, 0.3)):
        axes.text(at, 1.01, f"● {text}", color=colour, fontsize=9, transform=axes.transAxes, va="bottom")
    return figure


def short_table(numbers: list[Number]) -> str:
    """The README's rows, as Markdown."""
    lines = ["| what | here | what people use today |", "| --- | --- | --- |"]
    for number in numbers:
        if ROWS.index(number.row) in _SHORT:
            ours, theirs = (
                ", ".join(filter(None, (_seconds(seconds), _size(size))))
                for seconds, size in zip(number[1:3], number.mebibytes, strict=True)
            )
            lines.append(f"| {number.row.what} | {ours} | {number.row.named}: {theirs} |")
    return "\n".join(lines)


def fill(page: Path, text: str) -> None:
    """Put a text between the two marks of a page."""
    old = page.read_text()
    pattern = re.compile(re.escape(_BEGIN) + r".*?" + re.escape(_END), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{page}: the marks {_BEGIN} and {_END} are missing")
    write_atomically(page, pattern.sub(lambda _: f"{_BEGIN}\n{text}\n{_END}", old))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("root", nargs="?", type=Path, default=ROOT, help="of the project whose pages are filled")
    arguments = parser.parse_args()
    docs = arguments.root / "docs"
    numbers, files = read_numbers(docs / "performance"), sorted((docs / "performance").glob("*.json"))
    if not numbers:
        parser.error(f"{docs / 'performance'} holds no results; bash benchmarks/measure.sh makes them")
    environments = {path.stem: json.loads(path.read_text())["environment"] for path in files}
    fill(docs / "performance.md", table(numbers, environments))
    fill(arguments.root / "README.md", short_table(numbers))
    with atomic_file(docs / "images" / "performance.png") as file:
        FigureCanvasAgg(draw(numbers)).print_png(file)
    print(f"{len(numbers)} of {len(ROWS)} rows: README.md, docs/performance.md, docs/images/performance.png")


if __name__ == "__main__":
    main()
