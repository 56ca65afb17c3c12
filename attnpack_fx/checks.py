"""The error every bad option ends in, and the checks that several options share."""

import difflib
import math
from collections.abc import Mapping
from typing import Any


class PolicyError(ValueError):
    """An option has a value no policy can have, or one this model cannot honour."""


def checked_int(name: str, value: Any, least: int, way_out: str) -> int:
    """`value` if it is an int and `>= least`; a bool is no int here."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return value
    raise PolicyError(f"{name}: got {value!r} ({type(value).__name__}), expected an int >= {least}; {way_out}")


def checked_bool(name: str, value: Any) -> bool:
    """`value` if it is a bool."""
    if isinstance(value, bool):
        return value
    raise PolicyError(f"{name}: got {value!r}, expected a bool; use True or False")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; a bool is no number here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def checked_keys(name: str, values: Any, allowed: tuple[str, ...], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """`values` as a dict if it is a mapping with all `required` keys and none beyond `allowed`."""
    if not isinstance(values, Mapping):
        raise PolicyError(
            f"{name}: got {values!r} ({type(values).__name__}), expected a mapping with {', '.join(allowed)}"
        )
    for key in values:
        if key not in allowed:
            raise PolicyError(f"{name}: got the key {key!r}, expected {', '.join(allowed)}{hint(key, allowed)}")
    missing = [key for key in required if key not in values]
    if missing:
        raise PolicyError(f"{name}: got no {', '.join(map(repr, missing))}, expected all of {', '.join(required)}")
    return dict(values)


def hint(got: Any, candidates: tuple[str, ...]) -> str:
    """`; did you mean ...?`, or nothing where no candidate is close."""
    close = difflib.get_close_matches(str(got), candidates, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
