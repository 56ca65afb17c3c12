"""Composable methods: what `PackPolicy.passes` may hold, when each acts, and which may stand together.

A method is a small frozen dataclass in a file of its own. It says *what* is to be done, in plain tensors; the code that
does it is written once for each stage and knows no method. Stages follow one another in the order below whatever the
order of the list, because each works on what the one before leaves:

    TOKENS    at prefill, in the graph: fewer tokens flow through later layers
    FACTORS   at prefill: in how many bits low-rank factors are stored
    EVICT     after prefill and after decode steps: whole tokens leave the cache
    SELECT    after prefill and after decode steps: which vision tokens decode steps read
    MERGE     after prefill and after decode steps: adjacent layers share what they hold
    ROWS      after prefill and after decode steps: older dense tokens are stored in fewer bits
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

#: What attention may be asked to remember; see `Observation`.
Statistic = Literal["sum", "last", "pivotal"]


class Stage(enum.IntEnum):
    """When a method acts."""

    TOKENS = 0
    FACTORS = 1
    EVICT = 2
    SELECT = 3
    MERGE = 4
    ROWS = 5


@dataclass(frozen=True)
class Observation:
    """What attention is asked to remember about every stored token, one fp32 number a token.

    With A the attention weights of a query, averaged over the query heads of a KV head, or over all heads where heads
    keep the same tokens:

        "sum"      I <- I + sum_q A, over all prompt queries and every later one
        "last"     the row of the newest query alone
        "pivotal"  how many of the last `window` prompt queries, and of all later ones, gave it A >= 1 / t,
                   t the tokens a query could see

    kind: of these; text: of tokens that are known not to be vision tokens, None: the same.
    window: prompt queries that count, the last so many; None: all.
    """

    kind: Statistic
    text: Statistic | None = None
    window: int | None = None


@dataclass(frozen=True)
class Method:
    """One entry of `PackPolicy.passes`."""

    #: What it needs to know about every stored token.
    observes: ClassVar[Observation | None] = None

    @property
    def stages(self) -> frozenset[Stage]:
        """When it acts. A class attribute where that depends on no option."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """As people and files write it."""
        return type(self).__name__

    def refuses(self, other: "Method") -> str | None:
        """Why this cannot stand beside another method, or None. Asked both ways round."""
        if type(self) is type(other):
            return f"{self.name} stands twice; give it once"
        return None


#: Stages at which one method acts at most, and what they would fight over.
_ALONE = {
    Stage.TOKENS: "both decide which tokens flow through later layers",
    Stage.EVICT: "both keep a budget of tokens and would each undo the other's choice",
    Stage.SELECT: "both decide which tokens a step reads",
    Stage.MERGE: "both decide what layers share",
    Stage.ROWS: "both store the older dense tokens",
}

#: Stages of two methods that one cache cannot go through, and why.
_APART = {
    (Stage.EVICT, Stage.MERGE): "layers that each evict tokens of their own have none in common to merge",
    (Stage.SELECT, Stage.MERGE): "layers that each read tokens of their own have none in common to merge",
}


def conflict(first: Method, second: Method) -> str | None:
    """Why two methods cannot stand together, or None."""
    reason = first.refuses(second) or second.refuses(first)
    if reason is not None:
        return reason
    for stage in sorted(first.stages & second.stages):
        if stage in _ALONE:
            return f"{first.name} with {second.name}: {_ALONE[stage]}; use one of them"
    for (one, other), why in _APART.items():
        for left, right in ((first, second), (second, first)):
            if one in left.stages and other in right.stages:
                return f"{left.name} with {right.name}: {why}; use one of them"
    if first.observes and second.observes and first.observes != second.observes:
        return (
            f"{first.name} with {second.name}: a cache remembers one number a token, and they ask for different ones "
            f"({first.observes.kind} and {second.observes.kind}); use one of them"
        )
    return None


def conflicts(methods: Sequence[Method]) -> str | None:
    """Why these cannot stand together, or None."""
    for number, first in enumerate(methods):
        for second in methods[number + 1 :]:
            reason = conflict(first, second)
            if reason is not None:
                return reason
    return None
