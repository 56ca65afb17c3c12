"""Calls in a process of their own.

A kernel that reads where nothing is ends the CUDA context of its process: every later call there fails, whatever it
does. One that never ends, or brings the compiler down, would end the run. So checks of kernels run in another process,
which serves them one after another, because a process for each would spend most of the time on its start; after one of
these failures the next call gets a new one.
"""

import contextlib
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any


class CallFailedError(Exception):
    """The call raised, or its process ended, or it took too long: its text says which."""


class Apart:
    """A process that serves calls, started with the first.

    seconds: how long a call may take, that of the start included.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: Any = None
        self._connection: Any = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function of some module. Raises CallFailedError when there is none."""
        if self._process is None:
            # Not forked: a CUDA context cannot be.
            context = get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(other,), daemon=True)
            self._process.start()
            other.close()
        self._connection.send((function, arguments))
        if not self._connection.poll(self._seconds):
            self.close()
            raise CallFailedError(f"not done after {self._seconds:.0f} s, and ended")
        try:
            result, failure, usable = self._connection.recv()
        except EOFError:
            self._process.join()
            status = self._process.exitcode
            self.close()
            raise CallFailedError(f"its process ended with status {status}") from None
        if not usable:
            self.close()
        if failure:
            raise CallFailedError(failure)
        return result

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, arguments = connection.recv()
            result, failure = None, ""
            try:
                result = function(*arguments)
            # Whatever it is, it is what the caller asks about.
            except Exception as error:
                traceback.print_exc()
                failure = described(error)
            usable = not context_lost()
            if not usable:
                failure += "; the CUDA context is lost, and what follows gets another process"
            connection.send((result, failure, usable))


def described(error: BaseException) -> str:
    """An error in one line: of a compiler's the last of its lines, where the reason stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = lines[0] if len(lines) == 1 or "CUDA error" in lines[0] else f"{lines[0]} ... {lines[-1]}"
    return f"{type(error).__name__}: {told}"[:500]


def context_lost() -> bool:
    """Whether nothing runs on the device any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        return False
    except RuntimeError:  # what PyTorch makes of every CUDA error
        return True
