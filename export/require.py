"""Optional libraries, imported where they are needed."""

import importlib
from types import ModuleType

#: What to install for an extra.
_HOW = {
    "export": 'pip install "attnpack-fx[export]"',
    "tensorrt": 'pip install "attnpack-fx[tensorrt]", with the package index of NVIDIA as --extra-index-url',
    "tensorrt-rtx": 'pip install "attnpack-fx[tensorrt-rtx]"',
}


def require(name: str, *extras: str) -> ModuleType:
    """The library of that name. Raises `ImportError` that says which extras have it, and what went wrong.

    Any exception counts: some libraries fail in other ways where a driver is missing.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        how = " or ".join(_HOW[extra] for extra in extras)
        raise ImportError(f"{name} is needed, and cannot be imported ({error}); {how}", name=name) from error
