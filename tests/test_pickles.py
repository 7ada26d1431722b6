"""The reader of plain pickles: equal to Python's own on plain data, and bounded on everything else."""

from __future__ import annotations

import io
import pickle
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vareid_ext.files.pickles import read_pickle

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers(-(2**63), 2**63)
plain = st.recursive(scalars, lambda part: st.lists(part) | st.tuples(part, part) | st.dictionaries(keys, part))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(plain, st.integers(3, 5))
def test_plain_data_is_read_as_python_reads_it(value, protocol):
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_the_older_protocols_are_read(protocol):
    value = {"a": [1, 2**70, -3, 2.5, None, True], "b": ("größe", ()), "c": {}, "d": [[]]}  # bytes are a call there
    assert read_pickle(io.BytesIO(pickle.dumps(value, protocol))) == value


def test_pickles_that_follow_each_other_are_read_in_turn():
    file = io.BytesIO(pickle.dumps([1]) + pickle.dumps("two") + b"rest")
    assert (read_pickle(file), read_pickle(file), file.read()) == ([1], "two", b"rest")


def test_only_the_given_names_are_called():
    data = pickle.dumps(complex(1, 2), 2)  # names complex in one of its modules' spellings
    with pytest.raises(ValueError, match="complex"):
        read_pickle(io.BytesIO(data))
    names = {"__builtin__.complex": lambda *parts: list(parts), "builtins.complex": lambda *parts: list(parts)}
    assert read_pickle(io.BytesIO(data), names) == [1.0, 2.0]


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}(X\x01\x00\x00\x00a\x86q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x00s.",  # hashing takes 2^60 steps
        b"\x80\x02}q\x00h\x00K\x00s.",  # a dictionary as a key
        b"\x80\x02}\x8b\x00\x00\x10\x00" + b"\x7f" * 2**20 + b"K\x00s.",  # a key of eight million bits
        b"\x80\x02K\x01)R.",  # a number called
        b"\x80\x02K\x01}b.",  # a number given a state
        b"\x80\x02K\x01K\x02.",  # two values
        b"\x80\x02h\x05.",  # a value never stored
        b"\x80\x02]K\x01K\x02s.",  # a list's item by key
        b"\x80\x02(K\x01d.",  # a key alone
        b"\x80\x02}(K\x01NK\x01Nu.",  # a key twice
        b"\x80\x02]",  # cut short
    ],
)
def test_programs_that_are_no_plain_data_raise(data):
    with pytest.raises(ValueError):  # noqa: PT011
        read_pickle(io.BytesIO(data))


@pytest.mark.parametrize(
    "instruction", [b"]", b"}", b"}\x94", b"(", b"K\x00\x85\x94", b"\x8c\x04\xf0\x9f\x98\x80\x94", b"G" + bytes(8)]
)
def test_an_instruction_costs_at_most_128_bytes(instruction):
    file, steps = io.BytesIO(b"\x80\x04" + instruction * 30_000 + b"."), 30_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="30,000"):
        read_pickle(file, max_steps=steps)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * steps + 100_000
