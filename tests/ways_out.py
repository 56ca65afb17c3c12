"""Ways from a packed tensor to memory that end the process if they are not guarded, each tried in a process of its own.

`python -m tests.ways_out` prints one line of JSON: by way, what came of it.
"""

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from tests.packing_inputs import packed_pair


def at_address(packed: Tensor) -> Any:
    numbers = (ctypes.c_float * packed.numel()).from_address(packed.data_ptr())
    return np.ctypeslib.as_array(numbers).reshape(packed.shape)


def in_module(packed: Tensor) -> Tensor:
    module = torch.nn.Module()
    module.register_buffer("cache", packed)
    return module.share_memory().cache  # type: ignore[return-value]


def scatter(packed: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        received = torch.zeros(packed.shape)
        dist.scatter(received, [packed])
    return received


GUARDED: dict[str, Callable[[Tensor], Any]] = {
    "__dlpack__": lambda packed: from_dlpack(packed.__dlpack__()),
    "__dlpack__ versioned": lambda packed: from_dlpack(packed.__dlpack__(max_version=(1, 0))),
    "__dlpack__ without a copy": lambda packed: packed.__dlpack__(copy=False),
    "torch.from_dlpack": torch.from_dlpack,
    "np.from_dlpack": np.from_dlpack,
    "data_ptr": at_address,
    "untyped_storage": lambda packed: torch.tensor([]).set_(packed.untyped_storage()).reshape(packed.shape),
    "shared file of the storage": lambda packed: packed.untyped_storage()._share_fd_cpu_(),
    "share_memory_": lambda packed: packed.share_memory_(),
    "share_memory of a module": in_module,
    "apply_": lambda packed: packed.apply_(lambda number: number + 1),
    "map2_": lambda packed: packed.map2_(packed.clone(), packed.clone(), lambda *numbers: numbers[0]),
}
#: C++ that asks nothing of the tensor: it throws before it reads, but in words of its own.
THROWN: dict[str, Callable[[Tensor], Any]] = {"to_dlpack": to_dlpack, "scatter": scatter}


def outcome(way: Callable[[Tensor], Any]) -> str:
    """`equal`, `other: ...` or the error a way ends in."""
    packed = packed_pair()[0]
    expected = packed.dense()
    try:
        result = way(packed)
        same = torch.allclose(torch.as_tensor(result).clone(), expected)
        return "equal" if same else f"other: {result!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def outcome_apart(way: Callable[[Tensor], Any]) -> str:
    """The same, of a process of its own; `died` with its signal where it ends without a word."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, outcome(way).encode()[:4096])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        words = pipe.read()
    _, status = os.waitpid(child, 0)
    return words or f"died: {status}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: outcome_apart(way) for name, way in (GUARDED | THROWN).items()}, sys.stdout)
