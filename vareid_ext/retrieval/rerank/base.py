"""What every re-ranker is: an object made of query and gallery that is asked for final distances."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vareid_ext._arrays import returner, to_tensor
from vareid_ext.ops._checks import check_count, check_same_device, check_values, dtype_name
from vareid_ext.ops._features import check_features, check_same_features, largest_magnitude
from vareid_ext.ops._memory import new_distances
from vareid_ext.ops._progress import listen
from vareid_ext.retrieval.distance import rows_in_block


class Reranker(ABC):
    """The final distances of all queries to all of a gallery, of which the Q x G matrix need never exist.

    A re-ranker is a subclass: its ``__init__`` takes query and gallery and, by keyword, its parameters; ``distances``
    gives the rows of some queries. What is done once is done in ``__init__`` or, if it takes long, in ``prepare``. The
    features are read again when rows are asked for: leave the arrays as they are.

    Args:
        query: features [Q, D], float32, float16, bfloat16 or float64; Q at least 1, D at most 16,384.
        gallery: features [G, D] of query's dtype and device; G at least 1.

    Attributes:
        query: the same as a tensor.
        gallery: the same as a tensor.
        largest: the largest absolute value of both.

    Raises:
        TypeError: not arrays, or dtypes that are not floating or differ.
        ValueError: an empty query or gallery; shapes or devices do not fit; a row with NaN or Inf.
    """

    def __init__(self, query: Any, gallery: Any) -> None:
        self._back = returner(query)
        self.query, self.gallery, self.largest = check_sides(query, gallery)

    @property
    def shape(self) -> tuple[int, int]:
        """(Q, G)."""
        return self.query.shape[0], self.gallery.shape[0]

    def prepare(self) -> None:  # noqa: B027, most have nothing to do
        """Does what is done once; all questions do it by themselves."""

    @abstractmethod
    def distances(self, begin: int, end: int) -> Tensor:
        """The final distances of queries begin to end - 1: float32 [end - begin, G], smaller is nearer."""

    def rows(self, begin: int, end: int) -> Any:
        """As :meth:`distances`, in query's kind of array. :func:`vareid_ext.rank_queries` takes this function."""
        end = check_count("end", end, 0, self.shape[0])
        return self._back(self.distances(check_count("begin", begin, 0, end), end))

    def topk(self, k: int) -> tuple[Any, Any]:
        """Each query's k (1 to G) best gallery rows, ties by the lower index.

        Returns:
            distance float32 [Q, k], ascending, and index int64 [Q, k].
        """
        Q, G = self.shape
        k = check_count("k", k, 1, G)
        distance = self.query.new_empty((Q, k), dtype=torch.float32)
        index = torch.empty_like(distance, dtype=torch.int64)
        for begin, end in self._blocks():
            ordered, order = torch.sort(self.distances(begin, end), dim=1, stable=True)
            distance[begin:end], index[begin:end] = ordered[:, :k], order[:, :k]
        return self._back(distance), self._back(index)

    def matrix(self, out: Any = None) -> Any:
        """All final distances, float32 [Q, G]; in ``out`` if it is given (a writable memory map, for example)."""
        result = self._result(out)
        for begin, end in self._blocks():
            result[begin:end] = self.distances(begin, end)
        return self._back(result) if out is None else out

    def _blocks(self) -> Iterator[tuple[int, int]]:
        Q, G = self.shape
        step = rows_in_block(G, self.query.device)
        return ((begin, min(Q, begin + step)) for begin in range(0, Q, step))

    def _result(self, out: Any) -> Tensor:
        """The tensor that receives the matrix: ``out``, checked, or a new one."""
        if out is None:
            return new_distances(self.query, *self.shape)
        return _check_out(out, self.shape, self.query, self.gallery)


def check_sides(query: Any, gallery: Any) -> tuple[Tensor, Tensor, float]:
    """Query and gallery as tensors, and the largest absolute value of both; the errors are those of a re-ranker."""
    query, gallery = to_tensor(query, "query"), to_tensor(gallery, "gallery")
    check_values("query", query)
    check_values("gallery", gallery)
    check_features("query", query)
    check_same_features("gallery", gallery, "query", query)
    Q, G = query.shape[0], gallery.shape[0]
    for name, rows in (("query", Q), ("gallery", G)):
        if rows == 0:
            raise ValueError(f"{name}: no rows were given; at least one is needed")
    if Q + G >= 1 << 31:
        raise ValueError(f"query, gallery: {Q} and {G} rows were given; together less than 2^31 are allowed")
    return query, gallery, largest_magnitude({"query": query, "gallery": gallery})


@contextlib.contextmanager
def progress_bar(show: bool, reranker: Reranker) -> Iterator[None]:
    """A bar on standard error over the pairs of rows that are compared inside."""
    M = sum(reranker.shape)
    with pair_bar(show, M * (M + 1) // 2):
        yield


@contextlib.contextmanager
def pair_bar(show: bool, total: int) -> Iterator[None]:
    """The same over so many pairs."""
    if not show:
        yield
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="re-ranking", unit="pair", unit_scale=True, leave=False) as bar, listen(bar.update):
        yield


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the memory from the first to the last element of one matrix overlaps that of the other."""
    begin = [t.data_ptr() for t in (a, b)]
    size = [t.element_size() * (1 + (t.shape[0] - 1) * t.stride(0) + (t.shape[1] - 1) * t.stride(1)) for t in (a, b)]
    return begin[0] < begin[1] + size[1] and begin[1] < begin[0] + size[0]


def _check_out(out: Any, shape: tuple[int, int], query: Tensor, gallery: Tensor) -> Tensor:
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out: a read-only array was given; a writable one is needed")
    tensor = to_tensor(out, "out")
    if tensor.dtype != torch.float32:
        raise TypeError(f"out: dtype {dtype_name(tensor.dtype)} was given; float32 is needed")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"out: shape {list(tensor.shape)} was given; {list(shape)} is needed")
    check_same_device("out", tensor, "query", query)
    if shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError("out: rows must be contiguous")
    if shape[0] > 1 and tensor.stride(0) < shape[1]:
        raise ValueError("out: rows that overlap were given; each needs memory of its own")
    for name, features in (("query", query), ("gallery", gallery)):
        if _share_memory(tensor, features):
            raise ValueError(
                f"out: lies in the memory between {name}'s first and last element, which is read while out is written"
            )
    if isinstance(out, np.ndarray) and tensor.data_ptr() != out.ctypes.data:
        raise ValueError("out: an aligned array in the machine's byte order and without negative strides is needed")
    return tensor
