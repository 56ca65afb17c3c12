"""Warnings that point at the user's line, not at the library or at what called it."""

import sys
import warnings
from pathlib import Path
from types import FrameType

#: Packages that stand between a user's line and this one.
_BETWEEN = ("attnpack_fx", "torch", "transformers", "accelerate")


class AttnpackWarning(UserWarning):
    """Something stays dense, slower or larger than asked for; results are right."""


def warn(text: str) -> None:
    """Give an `AttnpackWarning` at the innermost line outside of this library, PyTorch and transformers."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and _stands_between(frame.f_code.co_filename, frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"attnpack: {text}", AttnpackWarning, stacklevel=level if frame is not None else 2)


def _stands_between(file: str, module: str) -> bool:
    # Code that Dynamo has made carries the user's file and module; what it runs is named by neither.
    top = module.partition(".")[0]
    return top in _BETWEEN or file.startswith("<") or Path(file).name == "contextlib.py"
