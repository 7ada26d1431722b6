"""Re-rankers: one file each, one entry each in `RERANKERS`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

from vareid_ext.ops._checks import check_choice
from vareid_ext.retrieval.rerank.base import Reranker

RERANKERS: dict[str, type[Reranker]] = {
    name: getattr(importlib.import_module(f"{__name__}.{name}"), class_name)
    for name, class_name in {
        "k_reciprocal": "KReciprocal",
    }.items()
}
"""Name -> class; the class stands in the file of that name."""

Rerank: TypeAlias = "bool | str | Mapping[str, Any] | Reranker"
"""What a ``rerank`` argument may be; :func:`fit_reranker` says what it means."""

_DEFAULT = "k_reciprocal"


def fit_reranker(rerank: Rerank, query: Any, gallery: Any) -> Reranker | None:
    """The re-ranker that a ``rerank`` argument asks for, of these features; None if it asks for none.

    Args:
        rerank: False; True for k-reciprocal re-ranking; a name from :data:`RERANKERS`; a mapping with some of the
            parameters and, for another re-ranker, ``method``, its name; or a fitted re-ranker, which stays as it is.
        query: features [Q, D].
        gallery: features [G, D].

    Raises:
        TypeError: another kind of ``rerank``; as the re-ranker.
        ValueError: an unknown name or parameter; a fitted re-ranker of other sizes; as the re-ranker.
    """
    if rerank is False:
        return None
    if isinstance(rerank, Reranker):
        sizes = len(query), len(gallery)
        if rerank.shape != sizes:
            raise ValueError(f"rerank: was fitted to {rerank.shape} rows; query and gallery without junk have {sizes}")
        return rerank
    name, options = reranker_options(rerank)
    return RERANKERS[name](query, gallery, **options)


def reranker_options(rerank: Rerank) -> tuple[str, dict[str, Any]]:
    """Name and parameters of the re-ranker that is to be fitted for a ``rerank`` argument; errors as there."""
    if not isinstance(rerank, bool | str | Mapping):
        raise TypeError(
            f"rerank: {type(rerank).__name__} was given; allowed are True, False, a name, a mapping and a re-ranker"
        )
    options: dict[str, Any] = dict(rerank) if isinstance(rerank, Mapping) else {}
    name = rerank if isinstance(rerank, str) else options.pop("method", _DEFAULT)
    check_choice("rerank", name, tuple(RERANKERS))
    keys = [key for key, p in inspect.signature(RERANKERS[name]).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = set(options) - set(keys)
    if unknown:
        given, allowed = ", ".join(sorted(map(repr, unknown))), ", ".join(["method", *keys])
        raise ValueError(f"rerank: {given} was given; allowed keys are {allowed}")
    return name, options
