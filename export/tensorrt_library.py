"""TensorRT and TensorRT-RTX, whose Python modules are alike: which of the two there is, and what it logs."""

import logging
from functools import cache
from types import ModuleType
from typing import Any

from attnpack_fx.export.require import require

#: Modules by preference, and the names of what they are.
LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
_LOG = logging.getLogger(__name__)


def library(name: str | None = None) -> ModuleType:
    """One of `LIBRARIES`, by name, or the first that there is.

    Raises `ImportError` that says what to install, ValueError for another name.
    """
    if name is not None:
        if name not in LIBRARIES:
            raise ValueError(
                f"library: got {name!r}, expected one of {', '.join(LIBRARIES)}, or None for what there is"
            )
        return require(name, _EXTRAS[name])
    failures = []
    for each, extra in _EXTRAS.items():
        try:
            return require(each, extra)
        except ImportError as error:
            failures.append(str(error))
    raise ImportError(f"TensorRT or TensorRT-RTX is needed: {'; '.join(failures)}", name="tensorrt")


def told(trt: ModuleType) -> str:
    """Name and version."""
    return f"{LIBRARIES[trt.__name__]} {trt.__version__}"


@cache
def logger(trt: ModuleType) -> Any:
    """The library's log, for the whole process, to ours; the errors since its `errors` were cleared are kept there.

    A process has one logger of each library: where another part of it was first, ours hears nothing.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.INFO,
        severity.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity)
            if level is None:
                return
            if level == logging.ERROR:
                self.errors.append(message.strip())
            _LOG.log(level, "%s: %s", trt.__name__, message)

    return Logger()
