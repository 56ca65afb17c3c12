"""A CUDA device for Inductor where there is none: its code generator asks for properties, and runs nothing."""

import contextlib
import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._inductor.compile_fx
import torch._inductor.scheduler
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.fx_passes import joint_graph, post_grad
from torch.utils import cpp_extension
from triton.backends.compiler import GPUTarget

#: What code generation and launchers read of an H200.
PROPERTIES = SimpleNamespace(
    type="cuda",
    index=0,
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=60 << 20,
    total_memory=140 << 30,
    gcnArchName="",
)

# Views of fake CUDA tensors are made below Python, under a guard that CPU builds of PyTorch do not have.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


_LIBRARY = torch.library.Library("aten", "IMPL", "CUDA")


@contextlib.contextmanager
def targeting(target: GPUTarget) -> Iterator[None]:
    """Give Triton a GPU to compile for, where there is none or another."""
    before = triton.runtime.driver._active
    asked = {"get_current_target": target, "get_current_device": 0, "get_current_stream": 0}
    triton.runtime.driver.set_active(SimpleNamespace(**{name: _giving(answer) for name, answer in asked.items()}))
    try:
        yield
    finally:
        triton.runtime.driver._active = before


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """Let Inductor write code for an H200. Nothing in it can be run."""
    if not torch.cuda.is_available():
        _register_cuda()
    zero, none, properties = (_giving(each) for each in (0, None, PROPERTIES))
    torch_cuda = {
        "_lazy_init": none,
        "is_available": _giving(True),
        "current_device": zero,
        "device_count": _giving(1),
        "get_device_properties": properties,
        "get_device_capability": _giving((9, 0)),
        "get_rng_state": _giving(torch.zeros(16, dtype=torch.uint8)),
        "set_rng_state": none,
        "_exchange_device": zero,
        "_maybe_exchange_device": zero,
    }
    interface = {
        "current_device": zero,
        "device_count": _giving(1),
        "get_device_properties": properties,
        "is_available": _giving(True),
        "get_compute_capability": _giving(90),
        "is_triton_capable": _giving(True),
        "raise_if_triton_unavailable": none,
        "is_bf16_supported": _giving(True),
        "synchronize": none,
        "exchange_device": zero,
        "maybe_exchange_device": zero,
        "get_raw_stream": zero,
    }
    # Patterns of attention are traced on the device that is asked for; those of a CPU do.
    cpu = torch.device("cpu")
    joint_graph.lazy_init(cpu)
    post_grad.lazy_init(cpu)
    with contextlib.ExitStack() as stack:
        stack.enter_context(targeting(GPUTarget("cuda", 90, 32)))
        for name, function in torch_cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        for name, function in interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(function), create=True))
        for name in ("current_device", "get_device_properties"):
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(interface[name])))
        for module in (torch._inductor.scheduler, torch._inductor.compile_fx):
            stack.enter_context(mock.patch.object(module, "has_triton", _giving(True)))
        for module in (joint_graph, post_grad):
            stack.enter_context(mock.patch.object(module, "lazy_init", none))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", zero, create=True))
        stack.enter_context(config.patch(force_disable_caches=True, compile_threads=1))
        yield


def _made_on_cpu(*sizes: Any, dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    make: Any = torch.empty if len(sizes) == 1 else torch.empty_strided
    return make(*sizes, dtype=dtype, device="cpu")  # type: ignore[no-any-return]


def _giving(value: Any) -> Any:
    return lambda *_, **__: value


@cache
def _register_cuda() -> None:
    """Give a process without a GPU what tracing asks of one; constants, which folding computes, are made on the CPU."""
    for name in ("empty.memory_format", "empty_strided"):
        _LIBRARY.impl(name, _made_on_cpu, allow_override=True)
    if torch.backends.cuda.is_built():
        return
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        link = [f"-L{path}" for path in cpp_extension.library_paths()]
        flags = ["-std=c++20", "-O1", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, *include, str(source), *link, "-lc10", "-o", str(library)], check=True)
        ctypes.CDLL(str(library))
