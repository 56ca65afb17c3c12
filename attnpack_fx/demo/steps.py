"""One line of progress on a terminal, and what is printed beside it."""

import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from tqdm import tqdm

from attnpack_fx.warning import AttnpackWarning


class Steps:
    """A line that says which of how many steps is under way; nothing where standard error is no terminal.

    It vanishes at the end of the `with` block, whatever ends it. Within that, of all warnings only this package's are
    shown, once and in a sentence: others are for developers, who ask for them by `python -W`.
    """

    def __init__(self, total: int, *, unit: str = "step", disable: bool | None = None) -> None:
        # tqdm finds no width where a terminal states none, and then shows nothing.
        width = shutil.get_terminal_size().columns - 1
        self._line = tqdm(total=total, unit=unit, leave=False, file=sys.stderr, disable=disable, ncols=width)
        self._begun = False
        self._warnings = warnings.catch_warnings()
        # Python forgets which warnings it has shown as soon as any library changes their filters.
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        self._warnings.__enter__()
        if not sys.warnoptions:
            warnings.showwarning = self._warned
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()
        self._warnings.__exit__(kind, error, trace)

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

    def advance(self, count: int, text: str) -> None:
        """So many steps are done at once, and this is under way."""
        self._line.set_description_str(text, refresh=False)
        self._line.update(count)

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

    def _warned(self, message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, AttnpackWarning) and str(message) not in self._said:
            self._said.add(str(message))
            with self.aside():
                print(message, file=sys.stderr, flush=True)
