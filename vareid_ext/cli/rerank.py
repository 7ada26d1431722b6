"""``vareid rerank query.npz gallery.npz --output result.npy``: k-reciprocal re-ranking of features in files."""

from __future__ import annotations

import argparse
import functools
import os
import shutil
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vareid_ext.cli.common import Parser, Result, command_parser, run_command
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.files.features import MAX_RATIO, MAX_UNPACKED, FeatureFileError, read_features
from vareid_ext.metrics.ranking import check_junk_identity
from vareid_ext.retrieval import k_reciprocal_rerank

_DESCRIPTION = """\
k-reciprocal re-ranking of features in files (.npy, .npz, .pt, .mat; memory-mapped where the format can be).

Without --topk, OUTPUT is a .npy file with the final distances, float32 [queries, gallery]. With --topk K it holds each
query's K best gallery rows: a .npz file with "index" and "distance" [queries, K], or a .npy file of records with these
two fields. OUTPUT appears when it is complete; until then, and if anything goes wrong, what was there stays.

Where the gallery's identities are known, its junk images are in nobody's neighbourhood and nobody's result: their
columns of a matrix hold 2, more than any distance, and they are not among the K best.
"""
_EXAMPLES = """\
  vareid rerank query.npz gallery.npz --output distances.npy
  vareid rerank query.npz gallery.npz --output best.npz --topk 100
  vareid rerank query.npz gallery.npz --output best.npz --topk 100 --k1 30 --max-memory 2G --plan
"""
_JUNK = 2.0  # the distance to a junk image; all others are 0 to 1


RERANKING: dict[str, Any] = {"k1": 20, "k2": 6, "lambda_value": 0.3}
"""The parameters of the method, and what they are where nobody says otherwise."""


def add_rerank_arguments(parser: argparse._ArgumentGroup, or_run: str = "") -> None:
    """The parameters of the method.

    Args:
        parser: where they are added.
        or_run: what else can say them, for the help; the options' own default is None then.
    """
    helps = {
        "k1": "size of the neighbour sets", "k2": "neighbours in query expansion",
        "lambda_value": "weight of the original distance, 0 to 1",
    }  # fmt: skip
    for name, default in RERANKING.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=None if or_run else default,
            metavar=name[0].upper(), help=f"{helps[name]} (default: {or_run}{default})",
        )  # fmt: skip


def add_junk_identity(parser: argparse.ArgumentParser) -> None:
    """The mark of junk."""
    parser.add_argument(
        "--junk-identity", type=_identity_or_none, default=-1, metavar="ID",
        help='gallery images to leave out, "none" for none (default: %(default)s)',
    )  # fmt: skip


def _identity_or_none(text: str) -> int | None:
    try:
        return None if text.lower() == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} was given; a whole number or none is needed") from None


def junk_note(junk: int, gallery: int) -> str:
    """What is said where so many of the gallery's images are junk."""
    return f"junk, left out: {junk} of {gallery} gallery images"


def size_in_bytes(text: str) -> int:
    """``200M`` or ``1.5G`` as bytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    try:
        return int(float(number.rstrip("KMG")) * units.get(number[-1:], 1))
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; 200M and 1.5G are") from None


def add_max_unpacked(parser: argparse._ActionsContainer) -> None:
    """The limit on compressed files."""
    parser.add_argument(
        "--max-unpacked", type=size_in_bytes, default=MAX_UNPACKED, metavar="SIZE",
        help=f"what a compressed file may unpack to in memory; {MAX_RATIO} times its size is always allowed "
        f"(default: {MAX_UNPACKED >> 20}M)",
    )  # fmt: skip


def add_joint_features(parser: Parser) -> None:
    """Files of a query and of a gallery, and what is left out of it, for :func:`read_joint_features`."""
    parser.add_argument("query", nargs="?", help="file with the query features")
    parser.add_argument("gallery", nargs="?", help="file with the gallery features")
    parser.add_argument("--query-key", metavar="KEY", help="key of the query features (default: the usual names)")
    parser.add_argument("--gallery-key", metavar="KEY", help="key of the gallery features (default: the usual names)")
    parser.add_argument(
        "--gallery-identity", metavar="SOURCE", help="key, file or file:key, to know junk by (default: the usual names)"
    )
    add_junk_identity(parser)
    add_max_unpacked(parser)


class JointFeatures(NamedTuple):
    """A query and a gallery without its junk."""

    query: Tensor
    gallery: Tensor
    kept: np.ndarray
    """bool [rows of the gallery's file]: those that are no junk"""
    note: str
    """where they are from"""


def read_joint_features(options: argparse.Namespace) -> JointFeatures:
    """What the arguments of :func:`add_joint_features` name."""
    if options.gallery is None:
        raise ValueError("QUERY, GALLERY: both are needed")
    check_junk_identity(options.junk_identity)
    found = read_features(options.query, "query", key=options.query_key, labels=(), max_unpacked=options.max_unpacked)
    gallery, kept, note = _read_gallery(options)
    return JointFeatures(found.feature, gallery, kept, f"query: {found.used()}\n{note}")


def add_memory_arguments(parser: Parser) -> None:
    """The limit on memory and what is said about it."""
    parser.add_argument("--max-memory", type=size_in_bytes, metavar="SIZE", help="limit beyond input and result: 200M")
    parser.add_argument("--block-rows", type=int, metavar="ROWS", help="rows of a block of products (default: chosen)")
    parser.add_argument("--plan", action="store_true", help="print how memory will be used")


def _parser() -> Parser:
    parser = command_parser("rerank", _DESCRIPTION, _EXAMPLES)
    add_joint_features(parser)
    parser.add_argument("--output", required=True, metavar="OUTPUT", help="the result: .npy, or .npz with --topk")
    parser.add_argument("--topk", type=int, metavar="K", help="keep each query's K best gallery rows only")
    add_rerank_arguments(parser.add_argument_group("re-ranking"))
    add_memory_arguments(parser)
    return parser


def _run(options: argparse.Namespace) -> Result:
    suffixes = (".npy",) if options.topk is None else (".npy", ".npz")
    output = check_writable(options.output, suffixes, filter(None, (options.query, options.gallery)))
    query, gallery, kept, note = read_joint_features(options)
    values = {
        "output": str(output), "queries": len(query), "gallery": len(kept), "junk": int((~kept).sum()),
        "topk": options.topk,
    }  # fmt: skip
    keywords = {
        "k1": options.k1, "k2": options.k2, "lambda_value": options.lambda_value, "block_rows": options.block_rows,
        "max_memory": options.max_memory, "show_plan": options.plan, "progress": not options.quiet,
    }  # fmt: skip
    if options.topk is not None:
        distance, index = k_reciprocal_rerank(query, gallery, topk=options.topk, **keywords)
        with atomic_file(output) as file:
            _write_best(file, output.suffix.lower(), distance.numpy(), np.flatnonzero(kept)[index])
        text = f"{output}: the {options.topk} best of {len(gallery)} for each of {len(query)} queries"
        return Result(f"{text}\n{note}", values)
    needed = 4 * len(query) * len(kept)
    with atomic_file(output) as file:
        free = shutil.disk_usage(file.name).free
        if needed > free:
            raise ValueError(f"{output}: needs {needed} bytes, but {free} are free; --topk K keeps the best K only")
        shape = (max(1, len(query)), max(1, len(kept)))  # a map cannot be empty; an empty side is refused below
        result = np.lib.format.open_memmap(file.name, "w+", dtype=np.float32, shape=shape)
        # A full disk would kill a process that writes through a memory map.
        os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        k_reciprocal_rerank(query, gallery, out=result[:, : max(1, len(gallery))], **keywords)
        if len(gallery) < len(kept):
            for row in result:
                row[kept], row[~kept] = row[: len(gallery)].copy(), _JUNK
        result.flush()
        del result
    return Result(f"{output}: distances [{len(query)}, {len(kept)}]\n{note}", values)


def _read_gallery(options: argparse.Namespace) -> tuple[Tensor, np.ndarray, str]:
    """The gallery's features without junk, a mask of the rows that are kept, and what is to be said about it."""
    read = functools.partial(
        read_features, options.gallery, "gallery", key=options.gallery_key, max_unpacked=options.max_unpacked
    )
    try:
        found = read(identity=options.gallery_identity, labels=("identity",))
        note = "junk: not known, as the gallery's file holds no identities"
    except FeatureFileError as error:
        if options.gallery_identity is not None:
            raise
        found = read(labels=())  # fails again where the features are at fault
        note = f"junk: not known: {error}"
    kept = np.ones(len(found.feature), dtype=bool)
    if "identity" in found.sources:
        if options.junk_identity is not None:
            kept = found.identity != found.number_of("identity", options.junk_identity)
        note = junk_note(int((~kept).sum()), len(kept))
    if len(kept) and not kept.any():
        raise FeatureFileError(f"{options.gallery}: every image has the junk identity {options.junk_identity}")
    note = f"gallery: {found.used()}\n{note}"
    return found.feature if kept.all() else found.feature[torch.from_numpy(kept)], kept, note


def _write_best(file: BinaryIO, suffix: str, distance: np.ndarray, index: np.ndarray) -> None:
    if suffix == ".npz":
        np.savez(file, index=index, distance=distance)
        return
    records = np.empty(index.shape, dtype=[("index", np.int64), ("distance", np.float32)])
    records["index"], records["distance"] = index, distance
    # np.save leaves the writing to C, and on a full disk says neither why nor where.
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(records))
    file.write(records.tobytes())


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit status."""
    return run_command(_parser(), _run, arguments)
