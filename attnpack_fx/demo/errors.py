"""The errors a person at the command line can do something about."""

import importlib.util


class UserError(Exception):
    """What went wrong and what to do about it; the command line prints it and ends with exit code 2."""


def require(*modules: str) -> None:
    """Raise `UserError` unless all `modules`, which come with the extra `demo`, can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"this needs {', '.join(missing)}, not installed here: pip install 'attnpack-fx[demo]'")
