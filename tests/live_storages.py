"""Every storage that an object keeps alive, found by walking what it refers to rather than what it says it holds."""

import functools
import gc
import types
from typing import Any

import torch

#: Behind these lies a whole program, not what one object holds.
_BORDERS = (type, types.ModuleType, types.FrameType, types.CodeType, torch.dtype, torch.device)


def live_storages(*roots: Any) -> dict[tuple[torch.device, int], int]:
    """Bytes of every storage with memory that the roots refer to strongly, by `(device, address)`.

    Followed is all that Python's garbage collector knows: attributes, slots, containers, memos, closures and defaults
    of functions (but not their globals), attributes of tensors. Weak references are not.
    """
    found: dict[tuple[torch.device, int], int] = {}
    seen: dict[int, Any] = {}
    pending: list[Any] = list(roots)
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, _BORDERS):
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            _add(item, found)
            pending += [item._base, None if item.is_inference() else item.grad, item.grad_fn]
        if isinstance(item, types.FunctionType):
            pending += [item.__closure__, item.__defaults__, item.__kwdefaults__, item.__dict__]
        elif isinstance(item, functools._lru_cache_wrapper):
            pending.append(item.__wrapped__)
        else:
            pending += gc.get_referents(item)
    return found


def all_live_storages() -> dict[tuple[torch.device, int], int]:
    """Bytes of the storage of every tensor in the process that the garbage collector knows."""
    gc.collect()
    found: dict[tuple[torch.device, int], int] = {}
    for item in gc.get_objects():
        if issubclass(type(item), torch.Tensor):
            _add(item, found)
    return found


def _add(tensor: torch.Tensor, found: dict[tuple[torch.device, int], int]) -> None:
    try:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # a wrapper, whose parts are attributes; fake and meta tensors
        return
    if size and address:
        found[storage.device, address] = max(size, found.get((storage.device, address), 0))
