"""Labels that have names: equal names are equal numbers, whatever the numbers were."""

from __future__ import annotations

import numpy as np
import pytest

from vareid_ext._labels import Labels, joined, numbered, same_numbers


def labels(identity, camera, /, **names):
    return Labels(identity, camera, [-1] * len(identity), names=names)


def texts(part, label):
    """What each image's label is called, by a loop."""
    values = getattr(part, label).tolist()
    return ["" if v == -1 else part.names[label][v] if label in part.names else str(v) for v in values]


PARTS = {
    "the same names in another order": (
        labels([0, 1, -1], [1, 0, 1], identity=("anna", "bert"), camera=("hall", "door")),
        labels([2, 0, 1, 1], [-1, -1, -1, 0], identity=("bert", "cleo", "anna"), camera=("roof",)),
    ),
    "names beside numbers": (labels([0, 1, 1], [7, -1, 3], identity=("3", "x")), labels([3, 3, 12], [3, 3, 3])),
    "numbers": (labels([5, 2**62], [1, 1]), labels([2**62, -1], [1, 0])),
    "none": (labels([0], [-1], identity=("anna",)), labels([], []), labels([4], [9])),
}


@pytest.mark.parametrize("name", PARTS)
def test_equal_numbers_are_equal_names(name):
    parts = PARTS[name]
    found = same_numbers(*parts)
    for label in ("identity", "camera"):
        before = [text for part in parts for text in texts(part, label)]
        assert [text for part in found for text in texts(part, label)] == before
        numbers = [n for part in found for n in getattr(part, label).tolist()]
        for i, text in enumerate(before):
            assert [n == numbers[i] for n in numbers] == [other == text for other in before]
            assert (numbers[i] == -1) == (text == "")
        assert texts(joined(*parts), label) == before


def test_texts_are_numbered_in_their_order():
    number, names = numbered(["b", "", "a", "b"])
    assert number.tolist() == [1, -1, 0, 1]
    assert names == ("a", "b")
    assert numbered([])[0].dtype == np.int64


def test_columns_have_names_too():
    clothes = [0, 1, -1]
    one = Labels([0] * 3, [-1] * 3, [-1] * 3, columns={"clothes": clothes}, names={"clothes": ("blue", "red")})
    other = Labels([0], [-1], [-1], columns={"clothes": [7]})
    without = Labels([0], [-1], [-1])
    one, other, without = same_numbers(one, other, without)
    assert one.called("clothes").tolist() == ["blue", "red", ""]
    assert other.called("clothes").tolist() == ["7"]
    assert other.columns["clothes"][0] not in one.columns["clothes"]
    assert not without.columns
    assert joined(one, other).names == {}
    with pytest.raises(ValueError, match="clothes: numbers 0 to 2 were given; 1 have names"):
        Labels([0] * 2, [-1] * 2, [-1] * 2, columns={"clothes": [0, 2]}, names={"clothes": ("blue",)})


@pytest.mark.parametrize("identity", [[2], [-2]])
def test_a_number_without_a_name_is_an_error(identity):
    with pytest.raises(ValueError, match="were given; 2 have names"):
        labels(identity, [0], identity=("anna", "bert"))
