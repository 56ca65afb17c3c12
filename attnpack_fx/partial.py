"""Attention-aware partial decompression: vision tokens that are attended to little are read with fewer columns."""

import math
from dataclasses import dataclass, fields
from typing import Any

from attnpack_fx.checks import PolicyError, checked_bool, checked_int, checked_keys, is_number


@dataclass(frozen=True)
class Partial:
    """Which vision tokens are read with how many of their columns (AttentionPack, CVPR 2026, arXiv 2603.23914).

    Every vision token has an importance I, updated by `Tq` new query tokens with attention weights `A[q, token]`,
    averaged over heads:

        I <- w^Tq I + (1 - w^Tq) mean_q A

    Tokens are sorted by I into F = len(shares) groups, most important first. Group f reads the first
    `ceil(fractions[f] * R)` of the R columns: those of the largest singular values, so the best lower rank.

    shares: the part of the vision tokens in each group, each in (0, 1], summing to 1. Paper's default: (0.25, 0.75).
    fractions: the part of the columns each group reads, in (0, 1], the first 1, none above the one before. Paper's
        default: (1, 0.25).
    momentum: w, the paper's omega, in [0, 1); 0 counts the last step alone. Paper's default: 0.25 (its released code
        has 0.5).
    keys: whether keys are truncated as well. Paper's default: values only.
    regroup_every: decode steps between two sortings, an int >= 1. Ours: the released code groups once, at prefill.
    store: whether columns outside a group's share are dropped for good, which frees their memory but leaves a token
        that rises in importance with what it has. Ours, off: the paper truncates what is read, not what is stored.

    Raises `ValueError` for any field of a wrong type or value. Lists count as tuples.
    """

    shares: tuple[float, ...] = (0.25, 0.75)
    fractions: tuple[float, ...] = (1.0, 0.25)
    momentum: float = 0.25
    keys: bool = False
    regroup_every: int = 16
    store: bool = False

    def __post_init__(self) -> None:
        for name in ("shares", "fractions"):
            object.__setattr__(self, name, _checked_parts(f"partial.{name}", getattr(self, name)))
        if not math.isclose(sum(self.shares), 1, abs_tol=1e-6):
            raise PolicyError(
                f"partial.shares: got {self.shares!r}, which sum to {sum(self.shares):g}, expected a sum of 1; "
                "every vision token is in one group, e.g. (0.25, 0.75)"
            )
        if len(self.fractions) != len(self.shares):
            raise PolicyError(
                f"partial.fractions: got {len(self.fractions)} for {len(self.shares)} shares, expected one for each "
                "group; give as many fractions as shares"
            )
        if self.fractions[0] != 1 or any(
            after > before for before, after in zip(self.fractions, self.fractions[1:], strict=False)
        ):
            raise PolicyError(
                f"partial.fractions: got {self.fractions!r}, expected 1 first and none above the one before; "
                "groups are sorted from the most important down, e.g. (1.0, 0.25)"
            )
        if not is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise PolicyError(
                f"partial.momentum: got {self.momentum!r}, expected a number in [0, 1); "
                "1 would never look at a step, 0 looks at the last one alone"
            )
        object.__setattr__(self, "momentum", float(self.momentum))
        checked_bool("partial.keys", self.keys)
        checked_int("partial.regroup_every", self.regroup_every, 1, "1 sorts at every step")
        checked_bool("partial.store", self.store)
        if self.store and len(self.shares) == 1:
            raise PolicyError(
                "partial.store: got True with a single group, expected several groups, since one group drops "
                "nothing; give several shares and fractions, or leave store out"
            )

    def columns(self, rank: int) -> tuple[int, ...]:
        """How many of `rank` columns each group reads: `fraction * rank`, rounded up; non-increasing, at least 1."""
        # 0.1 * 30 is a little above 3 in floating point, and means 3.
        return tuple(math.ceil(fraction * rank - 1e-9) or 1 for fraction in self.fractions)


def checked_partial(value: Any) -> Partial | None:
    """`value` as a `Partial`: that, a mapping with its fields, or None."""
    if value is None or isinstance(value, Partial):
        return value
    names = tuple(field.name for field in fields(Partial))
    if isinstance(value, bool):
        raise PolicyError(f"partial: got {value!r}, expected a Partial, a mapping or None; use Partial() or None")
    return Partial(**checked_keys("partial", value, names))


def _checked_parts(name: str, values: Any) -> tuple[float, ...]:
    if (
        not isinstance(values, (tuple, list))
        or not values
        or not all(is_number(value) and 0 < value <= 1 for value in values)
    ):
        raise PolicyError(f"{name}: got {values!r}, expected one number in (0, 1] for each group; e.g. (0.25, 0.75)")
    return tuple(float(value) for value in values)
