"""One line of progress on a terminal, and what is printed beside it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Steps:
    """A line that says which of how many steps is under way; nothing where standard error is no terminal.

    It vanishes at the end of the `with` block, whatever ends it.
    """

    def __init__(self, total: int, *, disable: bool | None = None) -> None:
        self._line = tqdm(
            total=total, unit="step", leave=False, file=sys.stderr, disable=disable, dynamic_ncols=True, delay=0
        )
        self._begun = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()

    def begin(self, text: str) -> None:
        """The next step, which ends the one before."""
        if self._begun:
            self._line.update()
        self._begun = True
        self._line.set_description_str(text)

    def expect(self, more: int) -> None:
        """As many steps more than were known of."""
        self._line.total += more
        self._line.refresh()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Print to the terminal where the line stands."""
        self._line.clear()
        try:
            yield
        finally:
            self._line.refresh()

    def print(self, text: str) -> None:
        """Print to standard output at once, whatever it is."""
        with self.aside():
            print(text, flush=True)
