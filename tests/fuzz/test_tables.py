"""Manifests and viewpoint label files."""

from __future__ import annotations

import pickle
from pathlib import Path

from tests.fuzz import runner
from vareid_ext.data.readers.manifest import read_manifest
from vareid_ext.data.viewpoint_classes import PERSON
from vareid_ext.data.viewpoints import read_viewpoint_labels


def seeds() -> dict[str, bytes]:
    """Both tables as CSV, and the labels in every protocol of pickle."""
    views = [(name, PERSON.number(name)) for name in (*PERSON.names, *PERSON.between)]
    labels = {f"{i:04}_c1s1_{i:06}_00.jpg": views[i % 6] for i in range(12)}
    splits = ("train", "query", "gallery")
    rows = [f"{name},{i % 4},{i % 3},{view},{splits[i % 3]}" for i, (name, (view, _)) in enumerate(labels.items())]
    table = {name: (number, view) for name, (view, number) in labels.items()}
    pickles = {f"labels-{p}.pkl": pickle.dumps(table, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)}
    return {
        "manifest.csv": "\n".join(["path,identity,camera,viewpoint,split", *rows, ""]).encode(),
        "manifest-quoted.csv": b'"path","split","identity"\r\n"a,b.jpg",train,anna\r\nb.jpg,query,1\r\nc.jpg,gallery,1',
        "labels.csv": "\n".join(["path,viewpoint", *(f"{n},{view}" for n, (view, _) in labels.items())]).encode(),
        **pickles,
    }


def read(path: Path) -> None:
    """Reads a table of either kind."""
    if path.name.startswith("manifest"):
        read_manifest(path)
    else:
        read_viewpoint_labels(path)


TOKENS = (
    b",", b'"', b'""', b"\n", b"\r", b"\0", b"\t", b" ", b"../", b"./", b"/", b"\\", b"\xef\xbb\xbf", b"\xff",
    b"\xed\xa0\x80", "é".encode(), "é".encode(), b"-1", b"train", b"query", b"path", b"viewpoint", b"identity",
    b".jpg", b"x" * 200_000, b"(", b"}", b"]", b"q\x00", b"h\x00", b"r\xff\xff\xff\x7f", b"\x94", b"2", b"0", b"t",
    b"\x86", b"u", b"s", b".", b"X\xff\xff\xff\x7f", b"X\x01\x00\x00\x00a", b"K\x01", b"I01\n", b"V\\ud800\n",
    b"I" + b"9" * 5000 + b"\n",
    b"\x8a\xff", b"L9L\n", b"cos\nsystem\n", b"R", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x80\x05", b"p0\n",
    b"g0\n",
)  # fmt: skip
SUBJECT = runner.Subject(seeds, read, ValueError, TOKENS)


def test_mutated_tables_are_read_or_refused() -> None:
    runner.check(SUBJECT)
