"""One query at a time against a gallery on disk: time of a search with and without re-ranking, and of opening.

Without re-ranking a search reads every feature once: "sum" reads them and does nothing else, the machine's ceiling.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Suite
from benchmarks.retrieval import features
from vareid_ext import GalleryIndex

_QUERIES = 50


def run_case(suite: Suite, G: int, D: int) -> None:
    name = f"G={G} D={D}"
    if suite.arguments.only not in name:
        return
    data = features(_QUERIES, G, D).feature
    queries, gallery = itertools.cycle(data[:_QUERIES].split(1)), data[_QUERIES:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gallery.index"
        begin = time.perf_counter()
        index = GalleryIndex.build(path, gallery)
        seconds = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        print(f"\nbuilt in {seconds:.1f} s: {size / 2**20:.0f} MiB, of which {gallery.nbytes / 2**20:.0f} are features")
        contenders = {
            "re-ranked": lambda: index.search(next(queries), rerank=True),
            "nearest": lambda: index.search(next(queries), rerank=False),
            "sum": gallery.sum,
            "open": lambda: GalleryIndex(path),
        }
        suite.case(name, contenders, bytes_moved={"nearest": gallery.nbytes, "sum": gallery.nbytes})


def main() -> None:
    suite = Suite("search", description=__doc__ or "")
    for G, D in [(2000, 64)] if suite.quick else [(20_000, 512), (100_000, 512)]:
        run_case(suite, G, D)
    suite.finish()


if __name__ == "__main__":
    main()
