"""What a part of the benchmark is, and what its cases may end with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.timing import first_line

Result = dict[str, Any]
T = TypeVar("T")


class WrongResultError(Exception):
    """Ours computed something else than it should; recorded as that case's result, and the command fails."""


class NotYetError(Exception):
    """A case that needs the results of others first; it stays to be measured."""


@dataclass(frozen=True)
class Failure:
    """Why a contender has no time."""

    reason: str


@dataclass(frozen=True)
class Run:
    """What the cases of a part are given.

    ceilings: `copy` in bytes per second (read plus written) and `matmul` in operations per second, bf16.
    done: results of this part's cases, by name; it grows while the part runs.
    memory_gb: device memories (1e9 bytes) for which the largest batch is looked for.
    seed: of random inputs that are checked; None: a new one for each case.
    """

    machine: Machine
    ceilings: Mapping[str, float]
    done: Mapping[str, Result] = field(default_factory=dict)
    memory_gb: tuple[float, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Part:
    """A group of cases that are measured, stored and shown together.

    about: what is measured, in Markdown. cases: functions that measure, by name, in order of importance.
    table: Markdown lines for the results that are there. verdict: what follows from them, one sentence a line.
    close: called when the part is done.
    """

    name: str
    title: str
    about: str
    cases: Callable[[Run], Mapping[str, Callable[[], Result]]]
    table: Callable[[Mapping[str, Result]], list[str]]
    verdict: Callable[[Mapping[str, Result]], list[str]] = lambda _: []
    close: Callable[[], None] = lambda: None


def attempt(call: Callable[[], T]) -> T | Failure:
    """A peer's result, or why it has none."""
    try:
        return call()
    except torch.OutOfMemoryError as error:
        return Failure(f"out of memory: {first_line(error)}")
    # A peer that fails, in whichever of the ways compilers and libraries have, is a result about that peer. The only
    # broad `except` here: nothing of ours runs inside.
    except Exception as error:
        return Failure(f"does not run: {first_line(error)}")


def within_memory(call: Callable[[], T]) -> T | Failure:
    """Our own result, or that it needs more memory than there is; any other failure is an error."""
    try:
        return call()
    except torch.OutOfMemoryError as error:
        return Failure(f"out of memory: {first_line(error)}")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = ()) -> list[str]:
    """A Markdown table, first column left and numbers right; words: the headers of further columns of words."""
    if not rows:
        return []
    rule = ["---", *("---" if name in words else "---:" for name in header[1:])]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def measured(cases: Mapping[str, Result]) -> dict[str, Result]:
    """The cases that have figures: neither skipped nor wrong."""
    return {name: case for name, case in cases.items() if not case.keys() & {"skipped", "wrong"}}


def left_out(cases: Mapping[str, Result]) -> list[str]:
    """One line for each case without figures."""
    return [
        f"- {name}: {case.get('wrong') or case['skipped']}"
        for name, case in cases.items()
        if case.keys() & {"skipped", "wrong"}
    ]
