"""Every way from a packed tensor to memory gives the dense contents, or an error that names `.dense()`.

A packed tensor is a wrapper: its shape is that of the dense tensor, and the address behind it is null. So

- a way that may copy (`numpy()`, NumPy's `__array__`, `tolist()`, DLPack) gives the contents of `dense()`;
- a way that hands out the address or the storage itself is refused;
- what C++ reads past these methods finds a storage that throws when it is asked for an address to write to
  (`forbid_pointer`), where it would otherwise end the process.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

#: What asks for storages to compare them, or for their size, and never for what is in them: tracing tells so which
#: tensors share memory, and a distributed checkpoint which of them are views.
_NEVER_READ = (
    *("torch._subclasses.", "torch._dynamo.", "torch._functorch.", "torch._export.", "torch.export."),
    "torch.distributed.checkpoint.",
)


class Memoryless(torch.Tensor):
    """A tensor that stands for a dense one and has no memory of its own; the base of `PackedTensor`.

    rows: one of its parts, which is fake while Dynamo traces.
    """

    rows: Tensor

    def dense(self) -> Tensor:
        """The dense tensor this stands for, in memory of its own."""
        raise NotImplementedError

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Every tensor that takes memory."""
        raise NotImplementedError

    # ---- ways that may copy

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """`dense()` as an array; read-only unless `force`, as a write would have to reach this tensor and cannot."""
        array = self.dense().numpy(force=force)
        if not force:
            array.flags.writeable = False
        return array

    def __array__(self, dtype=None, copy: bool | None = None) -> np.ndarray:
        if copy is False:  # NumPy's protocol: ValueError
            raise ValueError(_no_memory("an array that shares memory"))
        array = self.dense().numpy()
        if not copy and dtype in (None, array.dtype):  # as `numpy()`: of a dense tensor it would share memory
            array.flags.writeable = False
        return array if dtype is None else array.astype(dtype, copy=False)

    def tolist(self):
        """`dense()` as nested lists of numbers."""
        return self.dense().tolist()

    @torch.compiler.disable  # an address cannot be traced
    def __dlpack__(self, *, copy: bool | None = None, **options):
        if copy is False:  # DLPack's protocol: BufferError
            raise BufferError(_no_memory("a DLPack capsule that shares memory"))
        return self.dense().__dlpack__(**options)

    def share_memory_(self):
        """Move every part to shared memory."""
        for tensor in self.tensors:
            tensor.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(tensor.is_shared() for tensor in self.tensors)

    # ---- ways to the address

    def data_ptr(self) -> int:
        if is_fake(self):
            return super().data_ptr()
        raise RuntimeError(_no_memory("an address"))

    def const_data_ptr(self) -> int:
        if is_fake(self):
            return super().const_data_ptr()  # type: ignore[misc]
        raise RuntimeError(_no_memory("an address"))

    def untyped_storage(self) -> torch.UntypedStorage:
        if is_fake(self) or sys._getframe(1).f_globals.get("__name__", "").startswith(_NEVER_READ):
            return super().untyped_storage()
        raise RuntimeError(_no_memory("a storage"))

    # ---- ways to write

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise NotImplementedError(_no_writing("assigning to `data`"))

    def __setitem__(self, key, value):
        raise NotImplementedError(_no_writing("assigning to items"))

    def apply_(self, callable):
        raise NotImplementedError(_no_writing("`apply_`"))

    def map_(self, tensor, callable):
        raise NotImplementedError(_no_writing("`map_`"))

    def map2_(self, x, y, callable):
        raise NotImplementedError(_no_writing("`map2_`"))


def is_fake(tensor: object) -> bool:
    """Whether Dynamo traces: a packed value then means its dense form, and the rewrite decides what really happens."""
    return isinstance(tensor, Memoryless) and isinstance(tensor.rows, FakeTensor)


def forbid_pointer(tensor: Tensor) -> None:
    """Make C++ throw where it would write to the memory of `tensor`, or hand out its address."""
    torch._C._set_throw_on_mutable_data_ptr(tensor)


def refuse_writes(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raise NotImplementedError if this call writes into a memoryless tensor; it may read any."""
    arguments = func._schema.arguments
    if func._schema.is_mutable:
        written = [place for place, each in enumerate(arguments) if each.alias_info and each.alias_info.is_write]
    elif func._schema.name.endswith("_"):
        written = [0]  # operators of torch.distributed, which declare nothing: what they write comes first
    else:
        return
    for place in written:
        value = args[place] if place < len(args) else kwargs.get(arguments[place].name)
        if any(isinstance(leaf, Memoryless) for leaf in tree_leaves(value)):
            raise NotImplementedError(_no_writing(str(func)))


def _no_memory(wanted: str) -> str:
    return (
        f"a PackedTensor has no memory of its own: got a request for {wanted}, expected one that reads or copies. "
        "Its contents are stored as factors; call `.dense()` and use the tensor that it returns."
    )


def _no_writing(what: str) -> str:
    return (
        f"{what} would write into a PackedTensor, whose dense form does not exist in memory. "
        "Got an in-place operation, expected one that returns a new tensor; "
        "call `.dense()` first and use its result instead."
    )
