"""A measurement in a process of its own, so that neither its peak of memory nor its end touches the next one."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def in_child(function: Callable[..., dict[str, Any]], *arguments: Any, threads: int) -> dict[str, Any]:
    """What `function(*arguments)` returns in a new process with so many CPU threads.

    function: of a module, by whose name it is found there. `{"skipped": reason}` where it raises ImportError, for a
    package that is missing; `{"failed": reason}` where it raises RuntimeError or MemoryError, or the process dies.
    """
    context = multiprocessing.get_context("forkserver")  # One process imports all that is needed, and forks.
    context.set_forkserver_preload([function.__module__])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments, threads), daemon=True)
    process.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv()
    except EOFError:  # It was killed, most likely for want of memory, or raised what nobody foresaw, and said so.
        process.join()
        return {"failed": f"the process ended with exit code {process.exitcode}"}
    process.join()
    return found


def _answer(there: Connection, function: Callable[..., dict[str, Any]], arguments: Any, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    torch._inductor.config.compile_threads = 1  # To start processes for it would take longer than it saves.
    try:
        there.send(function(*arguments))
    except ImportError as error:
        there.send({"skipped": " ".join(str(error).split())})
    except (RuntimeError, MemoryError) as error:
        there.send({"failed": f"{type(error).__name__}: {error}"})


def _end_with_parent() -> None:
    """A run that is killed must not leave gigabytes behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
