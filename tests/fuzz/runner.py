"""Reads mutations of valid files in forked children: each must be read or refused, in time and within memory.

A case is a number, and the same number is the same file in every run. `python -m tests.fuzz.runner test_features 4711`
reads one case in this process and leaves its file behind.
"""

from __future__ import annotations

import gc
import importlib
import io
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

CASES = int(os.environ.get("VAREID_FUZZ_CASES", "20000"))
BATCH = 200  # cases for a child
SECONDS, PATIENCE = 10, 60  # of the processor and of the clock, for a case
DONE = 77  # the exit status of a child that has read all that it was to read
MEGABYTES, CHARACTERS = 500, 2000  # of memory for a case, and of its error's message
HUGE = 8 << 20  # bytes that one change adds at most
_INTEGERS = (0, 1, -1, 2, 10, 127, 128, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 10**9, 2**62, 2**63 - 1)
_NUMBERS = (b"-1", b"0", b"1e400", b"nan", b"1" * 19, b"9" * 5000, b"1_0", b"0x1f", b"2147483648", "²".encode(), b"")


@dataclass(frozen=True)
class Subject:
    """A kind of file: contents by file name (valid ones and bombs), its reader, that one's error, what to weave in."""

    seeds: Callable[[], Mapping[str, bytes]]
    read: Callable[[Path], object]
    refusal: type[Exception]
    tokens: tuple[bytes, ...]


def _edit(rng: random.Random, data: bytearray, others: list[bytes], tokens: tuple[bytes, ...]) -> None:
    """One change of bytes, in place; often within 48 bytes of a token, such as a header's first bytes."""
    at = rng.randrange(len(data) + 1)
    landmark = data.find(rng.choice(tokens), rng.choice((0, at)))
    if landmark >= 0 and rng.random() < 0.5:
        at = min(landmark + rng.randrange(48), len(data))
    end = min(len(data), at + int(2 ** rng.uniform(0, 8)))
    kind = rng.randrange(8)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
        data[at : at + size] = (rng.choice((*_INTEGERS, len(data))) % (1 << 8 * size)).to_bytes(size, order)
    elif kind == 2 and (numbers := list(re.finditer(rb"\d+", bytes(data[: 1 << 16])))):
        number = rng.choice(numbers)
        data[number.start() : number.end()] = rng.choice(_NUMBERS)
    elif kind == 3:
        del data[at : rng.choice((end, len(data)))]
    elif kind == 4:  # the same again and again
        data[at:at] = data[at:end] * int(HUGE ** rng.random() / max(1, end - at))
    elif kind == 5:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        data[at:end] = other[start : start + int(2 ** rng.uniform(0, 12))]
    else:  # a token, in place of something, or nested
        token = rng.choice(tokens)
        data[at : rng.choice((at, end))] = token * min(rng.choice((1, 1, 2, 100, 3000)), HUGE // len(token))


def _edit_zip(rng: random.Random, content: bytes, others: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """The archive packed anew, its sizes and checksums right, after a change of its members."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist() if info.file_size < HUGE]
    place = rng.randrange(len(members) + 1)
    if place < len(members):
        members[place] = members[place][0], mutate(rng, members[place][1], others, tokens)
    else:
        name = rng.choice(("", "../x.npy", "/x.npy", "a/", "ä.npy", "feature.npy", "identity.npy"))
        members += [(name, rng.choice(others))] * rng.choice((1, 1, 1000))
    result, packing = io.BytesIO(), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(result, "w", packing, compresslevel=1) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, packing)
    return result.getvalue()


def _edit_matlab(rng: random.Random, content: bytes, others: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """The first element of a MATLAB file packed anew after a change of what it holds, if that is packed."""
    kind, size = struct.unpack_from("<II", content, 128)
    inside = zlib.decompressobj().decompress(content[136 : 136 + size], HUGE) if kind == 15 else b""
    packed = zlib.compress(mutate(rng, inside, others, tokens), 1)
    return content[:128] + struct.pack("<II", 15, len(packed)) + packed + content[136 + size :]


def mutate(rng: random.Random, content: bytes, others: list[bytes], tokens: tuple[bytes, ...]) -> bytes:
    """The content after one or several changes; packed content is changed inside as often as outside."""
    if rng.random() < 0.5 and zipfile.is_zipfile(io.BytesIO(content)):
        return _edit_zip(rng, content, others, tokens)
    if rng.random() < 0.5 and content.startswith(b"MATLAB 5.0"):
        return _edit_matlab(rng, content, others, tokens)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        _edit(rng, data, others, tokens)
        del data[2 * HUGE :]
    return bytes(data)


def write_case(subject: Subject, seeds: Mapping[str, bytes], case: int, folder: Path) -> Path:
    """Writes the file of a case: the first ones are the contents themselves, and long ones are seldom changed."""
    rng, names = random.Random(case), list(seeds)
    if case < len(seeds):
        name, content = names[case], seeds[names[case]]
    else:
        (name,) = rng.choices(names, [len(content) ** -0.5 for content in seeds.values()])
        others = [content for content in seeds.values() if len(content) < HUGE >> 5]
        content = mutate(rng, seeds[name], others, subject.tokens)
    (folder / name).write_bytes(content)
    return folder / name


def outcome(subject: Subject, path: Path) -> str:
    """Whether a file was read or refused, or what went wrong."""
    try:
        subject.read(path)
        return "read"
    except subject.refusal as error:
        short = len(str(error)) <= CHARACTERS and "\n" not in str(error)
        return "refused" if short else f"a message of several lines or more than {CHARACTERS} characters"
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:100]!a}"


def _peak() -> int:
    """The most memory, in MB, that this process or a child that it waited for has had at once."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) >> 10


def _child(subject: Subject, seeds: Mapping[str, bytes], cases: range, folder: Path, pipe: int) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30),) * 2)  # for the machine's sake
    base = _peak()
    for case in cases:
        path = write_case(subject, seeds, case, folder)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # a signal ends the process
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        text = outcome(subject, path)
        grown = _peak() - base
        os.write(pipe, f"{text if grown <= MEGABYTES else f'{grown} MB of memory'}\n".encode())
        if grown > MEGABYTES:
            break


def outcomes(subject: Subject, seeds: Mapping[str, bytes], cases: range) -> Iterator[str]:
    """What became of each case; a child that ends early is followed by another one."""
    with tempfile.TemporaryDirectory() as folder:
        while cases:
            ours, theirs = os.pipe()
            process = os.fork()
            if process == 0:
                try:
                    _child(subject, seeds, cases[:BATCH], Path(folder), theirs)
                    os._exit(DONE)
                finally:
                    os._exit(1)
            os.close(theirs)
            with open(ours) as pipe:
                found = pipe.read().splitlines()
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            if status != DONE:
                found.append(f"ended by {signal.Signals(-status).name if status < 0 else f'exit status {status}'}")
            yield from found
            cases = cases[len(found) :]


def check(subject: Subject, count: int = CASES) -> None:
    """Reads `count` mutations; an AssertionError lists those that were neither read nor refused as documented."""
    seeds = subject.seeds()
    first = len(seeds)
    gc.freeze()
    for name, text in zip(seeds, outcomes(subject, seeds, range(first)), strict=True):
        assert text == ("refused" if name.startswith("bomb") else "read"), f"{name}, unchanged: {text}"
    found: dict[str, list[int]] = {}
    for case, text in enumerate(outcomes(subject, seeds, range(first, first + count)), first):
        found.setdefault(re.sub(r"\d+ MB", "MB", text), []).append(case)
    read, refused = (len(found.pop(text, [])) for text in ("read", "refused"))
    print(f"{count} cases: {read} read, {refused} refused, {count - read - refused} failed")
    assert not found, "\n".join(f"{len(cases)} cases, such as {cases[:6]}: {text}" for text, cases in found.items())


if __name__ == "__main__":
    chosen: Subject = importlib.import_module(f"tests.fuzz.{sys.argv[1]}").SUBJECT
    written = write_case(chosen, chosen.seeds(), int(sys.argv[2]), Path(tempfile.mkdtemp()))
    print(written, flush=True)
    chosen.read(written)
