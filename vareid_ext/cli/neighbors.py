"""``vareid neighbors query.npz gallery.npz --output lists.npz``: the neighbour lists of features in files."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vareid_ext.cli.common import Parser, Result, TerminatedError, command_parser, run_command
from vareid_ext.cli.rerank import (
    JointFeatures,
    add_joint_features,
    add_memory_arguments,
    identity_of,
    read_joint_features,
)
from vareid_ext.cli.shards import Parts, add_shard_arguments, check_merge_alone, is_done, marks, read_shard, read_shards
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.files.numpy_files import write_npz
from vareid_ext.ops._progress import listen
from vareid_ext.retrieval.joint_lists import METRICS, JointLists, part_of_rows

_DESCRIPTION = """\
The exact neighbour lists of all images, the queries and then the gallery, among all of them: what `vareid rerank
--neighbors` re-ranks. Features are memory-mapped where the format can be.

OUTPUT.npz holds index int32 [M, K] and distance float32 [M, K], ascending, row_max float32 [M], each row's largest
distance to any other, and num_query; where the gallery holds junk, which is in nobody's list, also gallery_row, the
rows of its file that are none.

`vareid rerank QUERY GALLERY --neighbors` looks at max(k1 + 1, k2) images of a list, 21 unless you say otherwise, and
measures all other distances from the features: -k 21 suffices. Where lists are re-ranked without the features, what
they do not hold is missing: longer ones, such as of 100, come nearer.

--shard 2/5 takes the second fifth of the rows, so that five machines can share them; --merge puts the outputs of all
five together, bit for bit what one machine would have written. A command that was interrupted goes on where it was
when it is given again, and one that is done says so.
"""
_EXAMPLES = """\
  vareid neighbors query.npz gallery.npz --output lists.npz -k 100
  vareid neighbors query.npz gallery.npz --output lists-1.npz --shard 1/2 --max-memory 2G --plan
  vareid neighbors --merge lists-1.npz lists-2.npz --output lists.npz
"""
LISTED = ("index", "distance", "row_max")
"""The arrays of lists that have a row for each image."""
_FORMAT = 1  # raised whenever what stands in the file changes its meaning


def _parser() -> Parser:
    parser = command_parser("neighbors", _DESCRIPTION, _EXAMPLES)
    add_joint_features(parser)
    parser.add_argument("--output", required=True, metavar="OUTPUT", help="the lists: .npz")
    parser.add_argument("-k", type=int, metavar="K", help="images in a list (default: 100, or all where they are less)")
    parser.add_argument("--metric", choices=METRICS, default=METRICS[0], help="distance (default: %(default)s)")
    add_shard_arguments(parser, "rows", ", in whole blocks of 1,024 rows (or ROWS of --block-rows)")
    add_memory_arguments(parser)
    return parser


def _run(options: argparse.Namespace) -> Result:
    inputs = filter(None, (options.query, options.gallery, *(options.merge or ())))
    output = check_writable(options.output, (".npz",), inputs)
    if options.merge:
        check_merge_alone(options, _parser())
        return _merge(options.merge, output)
    features = read_joint_features(options)
    lists = JointLists(
        features.query, features.gallery, k=options.k, metric=options.metric, shard=options.shard or (1, 1),
        block_rows=options.block_rows, max_memory=options.max_memory,
    )  # fmt: skip
    if options.plan:
        print(lists.plan, file=sys.stderr)
    request = _request(features, lists, options.metric)
    (Q, G), count = lists.shape, lists.end - lists.begin
    whole = f"{output}: the {lists.k} nearest of {Q + G} rows, {Q} queries and {G} of the gallery"
    text = whole if options.shard is None else "{}, for shard {}/{}: {} rows".format(whole, *options.shard, count)
    values = {
        "output": str(output), "queries": Q, "gallery": G, "junk": int((~features.kept).sum()), "k": lists.k,
        "rows": count, "shard": options.shard, "done_before": 0,
    }  # fmt: skip
    told = request if options.shard is None else "{} {}/{}".format(request, *options.shard)
    folder = Path(f"{output}.parts")
    if is_done(output, request, options.shard):
        Parts.forget(folder, told)
        return Result(f"{text}\nis done already", values | {"done_before": count})
    parts = Parts(folder, told, "features or options")
    values["done_before"], notes = parts.done, parts.notes()
    record = np.dtype([("index", np.int32, (lists.k,)), ("distance", np.float32, (lists.k,)), ("row_max", np.float32)])
    _make(lists, parts, record, progress=not options.quiet)
    rows = [*parts.read(count), np.empty(0, record)]
    arrays: dict[str, Any] = {name: [part[name] for part in rows] for name in LISTED}
    arrays["num_query"] = np.array(Q)
    if not features.kept.all():
        arrays["gallery_row"] = np.flatnonzero(features.kept)
    arrays["request"] = np.array(request)
    with atomic_file(output) as file:
        write_npz(file, arrays | marks(request, options.shard))
    parts.remove()
    return Result("\n".join([text, *notes, features.note]), values)


def _request(features: JointFeatures, lists: JointLists, metric: str) -> str:
    """What the lists are of: it differs where they would."""
    told = {
        "format": _FORMAT, **identity_of(features), "k": lists.k, "metric": metric, "scale": lists.scale,
        "block_rows": lists.plan.block_rows,
    }  # fmt: skip
    return json.dumps(told)


def _make(lists: JointLists, parts: Parts, record: np.dtype, *, progress: bool) -> None:
    """The lists of the rows that are left, into the parts."""
    M, count = sum(lists.shape), lists.end - lists.begin
    total, before = count * M, parts.done * M
    with (
        tqdm(total=total, initial=before, desc="neighbours", unit="pair", unit_scale=True, disable=not progress) as bar,
        listen(bar.update),
    ):
        try:
            while parts.done < count:
                first = lists.begin + parts.done
                found = lists.rows(first, lists.piece(first))
                rows = np.empty(len(found[0]), record)
                for name, part in zip(LISTED, found, strict=True):
                    rows[name] = part.numpy()
                parts.add(rows)
        except (KeyboardInterrupt, TerminatedError):
            print(f"{parts.done} of {count} rows are done; the same command goes on there", file=sys.stderr)
            raise


def _merge(names: Sequence[str], output: Path) -> Result:
    read = functools.partial(read_shard, command="neighbors", shapes=_shapes)
    shards, request = read_shards(names, read, "other features or options")
    arrays: dict[str, Any] = {name: [shard[name] for shard in shards] for name in LISTED}
    arrays |= {name: shards[0][name] for name in shards[0] if name not in LISTED}
    with atomic_file(output) as file:
        write_npz(file, arrays | {"request": np.array(request)})
    told = json.loads(request)
    Q, G, k = told["queries"], told["gallery"], told["k"]
    text = f"{output}: the {k} nearest of {Q + G} rows, {Q} queries and {G} of the gallery, of {len(shards)} shards"
    return Result(text, {"output": str(output), "queries": Q, "gallery": G, "k": k, "shards": len(shards)})


def _shapes(told: Any, shard: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """What the arrays of a shard of the request `told` are."""
    begin, end = part_of_rows(told["queries"], told["gallery"], told["block_rows"], *shard)
    lists = (end - begin, told["k"])
    return dict(zip(LISTED, (lists, lists, lists[:1]), strict=True))


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
