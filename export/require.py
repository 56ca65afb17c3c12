"""Optional libraries, imported where they are needed."""

import importlib
from types import ModuleType

#: What to install for an extra.
_HOW = {
    "export": 'pip install "attnpack-fx[export]"',
    "tensorrt": 'pip install "attnpack-fx[tensorrt]"',
}


def require(name: str, extra: str) -> ModuleType:
    """The library of that name. Raises `ImportError` that says which extra has it, and what went wrong.

    Any exception counts: some libraries fail in other ways where a driver is missing.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ImportError(f"{name} is needed, and cannot be imported ({error}); {_HOW[extra]}", name=name) from error
