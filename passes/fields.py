"""Fields of methods: what a share of something is, and checks.

Each check raises a ValueError that names what was got, what is expected, and a way out.
"""

import math
from collections.abc import Sequence
from typing import Any


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a value is a whole number of at least `least`; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_share(value: Any, least: float = 0.0, most: float = 1.0) -> bool:
    """Whether a value is a number from `least` to `most`; neither a bool nor NaN is."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most


def checked_count(owner: str, name: str, value: Any, least: int = 0) -> None:
    """A number of something."""
    if not is_count(value, least):
        _refuse(owner, name, value, f"a whole number of at least {least}", f"{name}={max(least, 16)}")


def checked_share(owner: str, name: str, value: Any, least: float = 0.0, most: float = 1.0, open: bool = False) -> None:
    """A number in `[least, most]`, or with `open` in `(least, most]`."""
    if not is_share(value, least, most) or (open and value == least):
        _refuse(owner, name, value, f"a number in {'(' if open else '['}{least:g}, {most:g}]", f"{name}=0.5")


def checked_amount(owner: str, name: str, value: Any) -> None:
    """A number of tokens as an int, or a share of them as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        right = False
    elif isinstance(value, int):
        right = value >= 1
    else:
        right = 0 < value <= 1
    if not right:
        expected = "a share of the tokens seen, a float in (0, 1], or a number of tokens, an int of at least 1"
        _refuse(owner, name, value, expected, f"{name}=0.2 or {name}=512")


def checked_recent(owner: str, budget: Any, recent: Any) -> None:
    """How many of the newest tokens stay in any case: no more than a budget that is a number of tokens."""
    checked_count(owner, "recent", recent)
    if isinstance(budget, int) and budget < recent:
        raise ValueError(
            f"{owner}(budget={budget}, recent={recent}): expected a budget of at least the recent tokens; raise budget "
            f"or lower recent"
        )


def checked_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words."""
    if value not in choices:
        _refuse(owner, name, value, f"one of {', '.join(map(repr, choices))}", f"{name}={choices[0]!r}")


def share_of(share: float, count: int) -> int:
    """`ceil(share * count)`, so that 0.1 of 30 are 3, whatever floats say."""
    return math.ceil(round(share * count, 6))


def _refuse(owner: str, name: str, value: Any, expected: str, example: str) -> None:
    raise ValueError(f"{owner}({name}={value!r}): expected {expected}; for example {example}")
