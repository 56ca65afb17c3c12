"""What the graphs of one forward call know together: which tokens are vision tokens, and what their layers share.

A model may break into several graphs per call, or be compiled a layer at a time. What one graph finds travels to the
next on the hidden states that lead there, so two requests can never see each other's. Where `attnpack_fx.compile` has
the whole call in hand, it is the context of that call as well, which nothing between the graphs can lose.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

from torch import Tensor

from attnpack_fx import caller
from attnpack_fx.passes.state import SiteReport
from attnpack_fx.shared import Alike

_ATTRIBUTE = "_attnpack_call"
_opened: ContextVar[Optional["Call"]] = ContextVar("attnpack_call", default=None)


class Call:
    """One forward call.

    alike: what layers of it share. reports: of the attention sites of the graphs that have run.
    """

    def __init__(self) -> None:
        self.alike = Alike()
        self.reports: list[SiteReport] = []
        self._shown: Tensor | None = None

    @classmethod
    def of(cls, arguments: Iterable[Any]) -> "Call":
        """The call that a graph with these arguments is part of; a new one where nothing has come with them."""
        opened = _opened.get()
        if opened is not None:
            return opened
        found = (getattr(each, _ATTRIBUTE, None) for each in arguments if isinstance(each, Tensor))
        return next((each for each in found if each is not None), None) or cls()

    @property
    def in_decoder(self) -> bool:
        """Whether decoder layers have run: a mask is of images no more, but may be of the tokens an expert has."""
        return any(report.action in ("compressed", "packed") for report in self.reports)

    def saw(self, vision: Tensor) -> None:
        """The mask of a graph, bool `[B, T]`, True for vision, of the newest T tokens."""
        self._shown = _united(self._shown, vision)

    def vision(self) -> Tensor | None:
        """What graphs have shown and token ids say, a mask of the newest tokens; None while nothing is known."""
        return _united(caller.vision_tokens(), self._shown)

    def travel(self, results: Iterable[Any]) -> None:
        """Go on to the graphs that take a graph's results.

        On hidden states alone: keys and values outlive the call, and so may what a model keeps beside them.
        """
        for each in results:
            if isinstance(each, Tensor) and each.dim() == 3 and each.is_floating_point():
                setattr(each, _ATTRIBUTE, self)


def _united(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """A prompt may have images in one place and a video in another."""
    if one is None or other is None:
        return one if other is None else other
    return one | other if one.shape == other.shape else other


@contextmanager
def opened() -> Iterator[Call]:
    """Let all graphs that run meanwhile be part of one call, however they are reached. Local to thread and task."""
    call = Call()
    token = _opened.set(call)
    try:
        yield call
    finally:
        _opened.reset(token)
