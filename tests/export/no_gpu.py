"""Torch-TensorRT on a machine without a GPU, for programs that convert and build but run nothing.

It asks PyTorch about the GPU as it is imported, moves modules there, and loads every engine that it has built. Only for
a process of its own: what is replaced here stays replaced.
"""

import os
import sys
import types
from types import ModuleType
from typing import Any

import torch


def torch_tensorrt_without_gpu() -> ModuleType:
    """torch_tensorrt, whose converters and builder work."""
    properties = types.SimpleNamespace(name="none", total_memory=1 << 36, major=8, minor=9, multi_processor_count=1)
    cuda: Any = torch.cuda
    cuda.get_device_capability = lambda *args, **kwargs: (8, 9)
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda *args, **kwargs: properties
    cuda.mem_get_info = lambda *args, **kwargs: (1 << 36, 1 << 36)
    if torch.version.cuda is None:
        # Its C++ libraries need those of CUDA: it does without where it finds no file of theirs.
        found = os.path.isfile
        os.path.isfile = lambda path: "libtorchtrt" not in str(path) and found(path)  # type: ignore[assignment]
        if not hasattr(torch._C, "_CudaDeviceProperties"):
            torch._C._CudaDeviceProperties = object  # type: ignore[attr-defined]
    import torch_tensorrt
    import torch_tensorrt.dynamo.conversion._TRTInterpreter as interpreter

    for name, module in list(sys.modules.items()):
        if name.startswith("torch_tensorrt") and hasattr(module, "to_torch_device"):
            module.to_torch_device = lambda device=None: torch.device("cpu")
    interpreter.trt = _Unloaded(interpreter.trt)
    return torch_tensorrt


class _Unloaded:
    """TensorRT, but for a runtime that keeps engines as bytes."""

    def __init__(self, trt: Any) -> None:
        self._trt = trt

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trt, name)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, engine: Any) -> Any:
            return types.SimpleNamespace(serialize=lambda: engine)
