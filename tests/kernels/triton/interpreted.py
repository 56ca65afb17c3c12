"""The kernels' modules a second time, in Triton's interpreter: on CPU tensors, step by step, without a GPU.

Whether a kernel is interpreted is decided where it is defined. The modules of the package itself stay as they are: an
operator whose kernels are interpreted is left out of torch.compile's caches.
"""

import importlib
import sys
from types import ModuleType

from triton import knobs

import attnpack_fx.kernels

_PACKAGE = "attnpack_fx.kernels.triton"


def _imported_anew() -> dict[str, ModuleType]:
    def take() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if f"{name}.".startswith(f"{_PACKAGE}.")}

    package = importlib.import_module(_PACKAGE)
    usual = take()
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        importlib.import_module(_PACKAGE)
        modules = take()
    for module in modules.values():
        if hasattr(module, "wrap_triton"):
            module.wrap_triton = lambda kernel: kernel  # type: ignore[attr-defined]  # nothing traces these
    sys.modules.update(usual)
    attnpack_fx.kernels.triton = package
    return modules


_MODULES = _imported_anew()
append = _MODULES[f"{_PACKAGE}.append"]
attend = _MODULES[f"{_PACKAGE}.attend"]
codes = _MODULES[f"{_PACKAGE}.codes"]
factorize = _MODULES[f"{_PACKAGE}.factorize"]
gather = _MODULES[f"{_PACKAGE}.gather"]
jacobi = _MODULES[f"{_PACKAGE}.jacobi"]
unrotated = _MODULES[f"{_PACKAGE}.unrotated"]
