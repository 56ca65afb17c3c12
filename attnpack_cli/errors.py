"""The errors a person at the command line can do something about."""

import difflib
import importlib.util
from collections.abc import Iterable


class UserError(Exception):
    """What went wrong and what to do about it; the command line prints it and ends with exit code 2."""


def require(*modules: str, extra: str = "demo") -> None:
    """Raise `UserError` unless all `modules`, which come with `extra`, are installed; none is imported."""
    missing = [name for name in modules if not installed(name)]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}, not installed here: pip install 'attnpack-fx[{extra}]'")


def installed(name: str) -> bool:
    """Whether a module at the top could be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def hint(got: object, candidates: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no candidate is close."""
    close = difflib.get_close_matches(str(got), candidates, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
