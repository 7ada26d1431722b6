"""``vareid rerank query.npz gallery.npz --output result.npy``: k-reciprocal re-ranking of features in files."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vareid_ext.cli.common import Parser, Result, command_parser, run_command
from vareid_ext.cli.shards import (
    add_shard_arguments,
    check_merge_alone,
    is_done,
    marks,
    read_shard,
    read_shards,
    share,
)
from vareid_ext.files.atomic import atomic_file, check_writable
from vareid_ext.files.features import MAX_RATIO, MAX_UNPACKED, FeatureFileError, read_features
from vareid_ext.files.neighbor_lists import NeighborLists, read_neighbor_lists
from vareid_ext.files.numpy_files import write_npz
from vareid_ext.metrics.ranking import check_junk_identity
from vareid_ext.retrieval import k_reciprocal_rerank
from vareid_ext.retrieval.joint_lists import rerank_with_lists
from vareid_ext.retrieval.rerank.neighbor_lists import FallingError, rerank_lists
from vareid_ext.retrieval.rerank.one_query import list_width

_DESCRIPTION = """\
k-reciprocal re-ranking of features in files (.npy, .npz, .pt, .mat; memory-mapped where the format can be).

Without --topk, OUTPUT is a .npy file with the final distances, float32 [queries, gallery]. With --topk K it holds each
query's K best gallery rows: a .npz file with "index" and "distance" [queries, K], or a .npy file of records with these
two fields. OUTPUT appears when it is complete; until then, and if anything goes wrong, what was there stays.

With --neighbors LISTS, a file of `vareid neighbors` with lists of k1 + 1 or more, the lists are not made again; the
result is the same to the last bit. --shard 2/5 takes the second fifth of the queries, so that five machines can share
them, and --merge puts their outputs together.

Give QUERY and GALLERY whenever you have them: lists of k1 + 1 suffice then, and nothing is missing. Without them it
re-ranks the lists alone, of any program: LISTS is a file that holds index and distance
[M, K] (and row_max [M], num_query), or it is two or three files, INDEX DISTANCE [ROW_MAX]. The M rows are the queries
and then the gallery, searched for among all M; -1 ends a list. Lists of 100 miss few of the distances that are needed;
how many, is said.

Where the gallery's identities are known, its junk images are in nobody's neighbourhood and nobody's result: their
columns of a matrix hold 2, more than any distance, and they are not among the K best.
"""
_EXAMPLES = """\
  vareid rerank query.npz gallery.npz --output distances.npy
  vareid rerank query.npz gallery.npz --output best.npz --topk 100
  vareid rerank query.npz gallery.npz --output best.npz --topk 100 --k1 30 --max-memory 2G --plan
  vareid rerank query.npz gallery.npz --neighbors lists.npz --output best-1.npz --topk 100 --shard 1/2
  vareid rerank --merge best-1.npz best-2.npz --output best.npz
  vareid rerank --neighbors faiss_index.npy faiss_distance.npy --num-query 3368 --output best.npz --topk 100
"""
_HASHED = 2**24  # bytes read at once
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


def identity_of(features: JointFeatures) -> dict[str, Any]:
    """What differs where the features do, for JSON."""
    query, gallery, kept, _ = features
    digest = hashlib.sha256()
    for part in (query, gallery):
        for rows in part.split(max(1, _HASHED // (part.shape[1] * part.element_size()))):
            digest.update(rows.contiguous().view(torch.uint8).numpy())
    return {
        "queries": len(query), "gallery": len(gallery), "D": query.shape[1],
        "dtype": str(query.dtype).removeprefix("torch."), "features": digest.hexdigest(),
        "kept": None if kept.all() else hashlib.sha256(kept.tobytes()).hexdigest(),
    }  # fmt: skip


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
    group = parser.add_argument_group("neighbour lists")
    group.add_argument("--neighbors", nargs="+", metavar="LISTS", help="lists that are there already")
    group.add_argument("--num-query", type=int, metavar="Q", help="how many of their rows are queries")
    group.add_argument(
        "--metric", choices=_TO_SQUARES,
        help="what their distances are; similarity is a cosine, the larger the nearer, and ROW_MAX each row's smallest "
        "(default: as the file of vareid neighbors says, else sqeuclidean)",
    )  # fmt: skip
    add_shard_arguments(group, "queries")
    return parser


_TO_SQUARES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "sqeuclidean": lambda distance: distance,
    "euclidean": np.square,
    "cosine": lambda distance: distance,
    "similarity": lambda similarity: 2 - 2 * similarity,
}
_OF_FEATURES = ("gallery_identity", "query_key", "gallery_key", "junk_identity")
_OF_NEW_LISTS = ("max_memory", "block_rows", "plan")
_OF_LISTS = ("neighbors", "num_query", "metric", "shard")
_FORMAT = 1  # of shards, raised whenever what stands in them changes its meaning


def _check_together(options: argparse.Namespace) -> None:
    """ValueError where options of features and of lists were given together."""
    if options.merge:
        check_merge_alone(options, _parser())
    elif options.neighbors:
        for name in (*_OF_NEW_LISTS, *(_OF_LISTS[1:3] if options.query else _OF_FEATURES)):
            if getattr(options, name) != _parser().get_default(name):
                what = "lists alone, but QUERY was" if name in _OF_LISTS else "features, but --neighbors was"
                raise ValueError(f"{_shown(name)}: is for {what} given")
        if options.topk is None:
            raise ValueError("--topk: nothing was given; lists are re-ranked for the best K of each query")
    else:
        for name in _OF_LISTS[1:]:
            if getattr(options, name) is not None:
                raise ValueError(f"{_shown(name)}: is for neighbour lists; --neighbors LISTS is needed, too")


def _shown(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run(options: argparse.Namespace) -> Result:
    _check_together(options)
    of_best = options.topk is not None or options.merge
    suffixes = (".npz",) if options.shard else (".npy", ".npz") if of_best else (".npy",)
    inputs = filter(None, (options.query, options.gallery, *(options.neighbors or ()), *(options.merge or ())))
    output = check_writable(options.output, suffixes, inputs)
    if options.merge:
        return _merge(options.merge, output)
    if options.neighbors:
        return _rerank_lists(options, output)
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


def _rerank_lists(options: argparse.Namespace, output: Path) -> Result:
    lists = read_neighbor_lists(options.neighbors, options.max_unpacked)
    features = read_joint_features(options) if options.query else None
    told = {} if lists.about is None else lists.about
    if features is not None:
        _check_lists_of(features, lists, options)
    num_query = _one_of(options, "num_query", lists.num_query)
    if num_query is None:
        raise ValueError("--num-query: is needed, as the lists do not say how many of their rows are queries")
    metric = _one_of(options, "metric", told.get("metric")) or "sqeuclidean"
    parameters = {name: getattr(options, name) for name in ("topk", *RERANKING)}
    request = json.dumps(
        {"format": _FORMAT, "lists": _digest(lists), "of_features": features is not None, "queries": num_query,
         "metric": metric, **parameters}
    )  # fmt: skip
    queries = share(num_query, options.shard)
    count, gallery = queries[1] - queries[0], len(lists.index) - num_query
    asked = f"each of {num_query} queries" if options.shard is None else f"{count} of {num_query} queries"
    text = f"{output}: the {options.topk} best of {gallery} for {asked}"
    values = {
        "output": str(output), "queries": count, "gallery": gallery, "topk": options.topk, "shard": options.shard,
        "done_before": options.shard is not None and is_done(output, request, options.shard),
    }  # fmt: skip
    if values["done_before"]:
        return Result(f"{text}\nis done already", values)
    with np.errstate(over="ignore"):  # beside -1 stands anything; what is infinite elsewhere is refused
        arrays = lists.index, _TO_SQUARES[metric](lists.distance)
        row_max = None if lists.row_max is None else _TO_SQUARES[metric](lists.row_max)
    reach, said = [0, 0, 0], []
    if features is None:
        try:
            found = rerank_lists(*arrays, num_query, row_max=row_max, queries=queries, **parameters)
        except FallingError as error:
            if metric != "similarity":
                raise
            raise ValueError(
                "--metric: similarity was given, but no row's values fall, so they look like distances; sqeuclidean, "
                "euclidean or cosine is needed, or reverse lists that begin with the farthest"
            ) from error
        distance, best = found.distance.numpy(), found.best.numpy()
        reach = [found.short, found.unlisted, found.outside]
        said = _reach(reach, best.size, lists.about is not None)
        if row_max is None:
            said.append("row_max: not given; twice each list's largest distance stands for it")
    else:
        result = rerank_with_lists(*features[:2], *arrays, row_max, queries=queries, **parameters)
        distance, best = (part.numpy() for part in result)
        said = [features.note]
    if lists.gallery_row is not None:
        best = np.where(best < 0, -1, lists.gallery_row[best])
    with atomic_file(output) as file:
        if options.shard is None:
            _write_best(file, output.suffix.lower(), distance, best)
        else:
            held = {"index": best, "distance": distance, "reach": np.array(reach)}
            write_npz(file, held | marks(request, options.shard))
    return Result("\n".join([text, *said]), values | dict(zip(_REACH, reach, strict=True)))


def _check_lists_of(features: JointFeatures, lists: NeighborLists, options: argparse.Namespace) -> None:
    """ValueError unless the lists are those of `vareid neighbors` of these features, and long enough."""
    name, told = options.neighbors[0], lists.about or {}
    if told.get("metric") != "sqeuclidean":
        found = f"{told['metric']} distances" if told else "lists of another program"
        raise ValueError(
            f"--neighbors: {name} holds {found}; with QUERY and GALLERY the squared distances of vareid neighbors are "
            "needed"
        )
    for what, value in identity_of(features).items():
        if told.get(what) != value:
            raise ValueError(
                f"--neighbors: {name} is of other features than {options.query} and {options.gallery}: {what} was "
                f"{told.get(what)!s:.20}, not {value!s:.20}"
            )
    needed = list_width(len(lists.index), options.k1, options.k2)
    if lists.index.ndim == 2 and lists.index.shape[1] < needed:
        raise ValueError(
            f"--neighbors: {name} has lists of {lists.index.shape[1]} images, but k1 and k2 need {needed}; vareid "
            f"neighbors -k {needed} makes them"
        )


_REACH = ("rows_too_short", "distances_beyond_lists", "results_beyond_lists")


def _reach(counts: Sequence[int], results: int, exact: bool) -> list[str]:
    """What is said of how far lists reach; `exact` are those of `vareid neighbors`."""
    short, unlisted, outside = counts
    if not any(counts):
        return ["the lists reach far enough: " + (
            "this is what their features give" if exact else
            "if they and row_max are exact, this is what their features give"
        )]  # fmt: skip
    said = [f"the lists of {short} rows are shorter than k1 and k2 need"] if short else []
    beyond = f"beyond the lists: {unlisted} distances within neighbour sets, {outside} of {results} results"
    return [*said, f"{beyond}; longer lists come nearer to what the features give"]


def _one_of(options: argparse.Namespace, name: str, of_file: Any) -> Any:
    """What was given or what the file says; ValueError where these are two things."""
    given = getattr(options, name)
    if None not in (given, of_file) and given != of_file:
        raise ValueError(f"{_shown(name)}: {given} was given, but {options.neighbors[0]} says {of_file}")
    return of_file if given is None else given


def _digest(lists: NeighborLists) -> str:
    digest = hashlib.sha256()
    for array in (lists.index, lists.distance, lists.row_max, lists.gallery_row):
        if array is not None:
            digest.update(f"{array.dtype} {array.shape}".encode())
            step = max(1, _HASHED // max(1, array[:1].nbytes))
            for begin in range(0, len(array), step):
                digest.update(array[begin : begin + step].tobytes())
    return digest.hexdigest()


def _merge(names: Sequence[str], output: Path) -> Result:
    read = functools.partial(read_shard, command="rerank", shapes=_shapes)
    shards, _ = read_shards(names, read, "other lists or options")
    index, distance = (np.concatenate([shard[name] for shard in shards]) for name in ("index", "distance"))
    with atomic_file(output) as file:
        _write_best(file, output.suffix.lower(), distance, index)
    reach = [*shards[0]["reach"][:2].tolist(), sum(int(shard["reach"][2]) for shard in shards)]
    queries, topk = index.shape
    values = {"output": str(output), "queries": queries, "topk": topk, "shards": len(shards)}
    text = f"{output}: the {topk} best for each of {queries} queries, of {len(shards)} shards"
    said = _reach(reach, index.size, False) if any(reach) else []
    return Result("\n".join([text, *said]), values | dict(zip(_REACH, reach, strict=True)))


def _shapes(told: Any, shard: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """What the arrays of a shard of the request `told` are."""
    begin, end = share(told["queries"], shard)
    best = (end - begin, told["topk"])
    return {"index": best, "distance": best, "reach": (3,)}


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
