"""Kernels here run in Triton's interpreter, on CPU tensors (`interpreted.py`)."""

import numpy as np
import pytest
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


@pytest.fixture(autouse=True, scope="package")
def interpreted_language():
    """`tl.max` and others like it are kernels' helpers written in Triton themselves: interpret those too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knobs.runtime, "interpret", True)
        for module in (tl, tl.standard):
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, interpreter.InterpretedFunction(value.fn))
        yield


@pytest.fixture(autouse=True, scope="package")
def dot_of_bfloat16():
    """The interpreter multiplies bfloat16 tiles as the integers it stores them in: widen them, which is exact."""
    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *others):
        return original(self, widened(a), widened(b), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield
