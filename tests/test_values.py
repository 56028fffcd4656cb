from collections.abc import Callable
from typing import Any, Literal

import pytest

from sda_fast.errors import SdaError
from sda_fast.values import checked


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (float | None, None, None),
        (str | None, "a", "a"),
        (bool, True, True),
        (Literal["a", "b"] | int, 4, 4),
        (Literal["a", "b"] | int, "b", "b"),
        (tuple[str, ...], [], ()),
        (tuple[float, ...], [1, 2.5], (1.0, 2.5)),
        (tuple[int, int, int], [1, 2, 3], (1, 2, 3)),
        (dict[str, float] | None, {"a": 1}, {"a": 1.0}),
        (dict[str, dict[str, Any]], {"a": {"b": [None]}}, {"a": {"b": [None]}}),
    ],
)
def test_what_is_of_the_type(hint, value, expected):
    result = checked("key", value, hint, "here")
    assert (result, type(result)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (int, True, "here: key = True is of another type; give a whole number"),
        (int, 3.0, "here: key = 3.0 is of another type; give a whole number"),
        (bool, 1, "here: key = 1 is of another type; give true or false"),
        (str, None, "here: key = None is of another type; give a text"),
        (float | None, "1", "here: key = '1' is of another type; give a number"),
        (Literal["a", "b"], "c", "here: key = 'c' is not known; choose from a, b"),
        (Literal["a"] | int, "c", "here: key = 'c' is not known; choose from a or give a whole number"),
        (tuple[int, ...], [1, "2"], r"here: key = \[1, '2'\] is of another type; give a list of whole numbers"),
        (tuple[int, int], [1], r"here: key = \[1\] is of another type; give a list of 2 whole numbers"),
        (dict[str, str], {"a": 1}, r"here: key = \{'a': 1\} is of another type; give a table of texts"),
        (dict[str, float], {"a": "1"}, r"here: key = \{'a': '1'\} is of another type; give a table of numbers"),
        (dict[str, dict[str, Any]], {"a": 1}, r"here: key = \{'a': 1\} is of another type; give a table of tables"),
        (Callable[[int], int] | None, "f", "here: key cannot be given here, only from Python: leave it out"),
        ("Projection | None", "f", "here: key cannot be given here, only from Python: leave it out"),
    ],
)
def test_what_is_not(hint, value, message):
    with pytest.raises(SdaError, match=f"^{message}$"):
        checked("key", value, hint, "here")
