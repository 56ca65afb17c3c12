"""Which kernels launchers launch, on which grids and with which arguments, recorded where they launch them."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

from attnpack_fx.kernels import registering


@dataclass(frozen=True)
class Launch:
    """One launch; arguments by name, those that are compiled in too, `num_warps` and `num_stages` among them."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


def launchers() -> list[ModuleType]:
    """The modules that launch kernels; none where there is no Triton."""
    if registering.triton is None:
        return []
    package = registering.triton.__name__
    return [module for name, module in sorted(sys.modules.items()) if name.startswith(f"{package}.")]


@contextmanager
def recording(modules: Sequence[ModuleType], run: bool = True) -> Iterator[list[Launch]]:
    """Record what these modules launch; without `run`, launch nothing."""
    found: list[Launch] = []

    def recorder(wrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def wrapped(kernel: Any) -> Any:
            return _Recorded(kernel, wrap(kernel) if run else None, found)

        return wrapped

    patches = [
        mock.patch.object(each, "wrap_triton", recorder(vars(each)["wrap_triton"]))
        for each in _having("wrap_triton", modules)
    ]
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in patches:
            patch.stop()


def launched(call: Callable[[], object], processors: int) -> list[Launch]:
    """What a call on tensors of the device "meta" would launch on a GPU with so many multiprocessors.

    Raises RuntimeError where there is no Triton.
    """
    modules = launchers()
    if not modules:
        raise RuntimeError("no kernels to launch: expected Triton to be installed")
    counting = [mock.patch.object(each, "processors", lambda _: processors) for each in _having("processors", modules)]
    for patch in counting:
        patch.start()
    try:
        with recording(modules, run=False) as found:
            call()
    finally:
        for patch in counting:
            patch.stop()
    return found


def _having(name: str, modules: Sequence[ModuleType]) -> list[ModuleType]:
    return [module for module in modules if name in vars(module)]


class _Recorded:
    """A kernel as launchers use it, `kernel[grid](...)`."""

    def __init__(self, kernel: Any, inner: Any, found: list[Launch]) -> None:
        self._kernel, self._inner, self._found = kernel, inner, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = inspect.signature(self._kernel.fn).parameters
            arguments = dict(zip(names, args, strict=False)) | kwargs
            self._found.append(Launch(self._kernel.fn.__name__, tuple(map(int, grid)), arguments))
            if self._inner is not None:
                self._inner[grid](*args, **kwargs)

        return launch
