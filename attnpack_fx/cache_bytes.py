"""How many bytes a key/value cache holds, counted on storages: packing and spare room show as they are."""

from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from attnpack_fx.packed_tensor import PackedTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: What an object must have to pass for a cache while it holds no tensor yet.
_CACHE_ATTRIBUTES = ("layers", "self_attention_cache", "keys", "key_cache")


def cache_bytes(past_key_values: object, *, group: "ProcessGroup | None" = None) -> int:
    """Count the bytes of memory behind a cache, on all devices together.

    Counted is every storage that the cache keeps alive and that holds numbers, on whatever device, once, and *whole*: a
    view costs what it is a view of, and spare room counts. Of a `PackedTensor` these are

        coefficients, bases, codes, scales, zero points, codebooks, outliers and residuals of its segments;
        the rows of the dense tail, with the room that the tail has to grow;
        the index of its slots, and where methods ask for it which tokens are vision tokens and how many are absent;
        cos and sin of keys stored before rotary embedding, and the rows of slots in these tables;
        columns in reserve, resting tokens, bounds on errors, and what attention remembers of each token.

    What layers, keys and values share counts once. A basis of the model counts as well, since the cache refers to it,
    though requests share it. Any other wrapper subclass counts as its parts. Weak references keep nothing, and are not
    followed: a cache remembers what was derived from it only in this way. Not counted are Python's own objects, and
    memory that an allocator holds back.

    Args:
        past_key_values: a transformers cache of any kind (dynamic, static, quantized, encoder-decoder), an object of
            your own with tensors in its attributes, tuples, lists or mappings of those, or a single tensor.
        group: processes of `torch.distributed` that hold parts of one cache, as tensor-parallel ones do
            (`torch.distributed.group.WORLD` is all there are). Every one of them must make the call. None counts this
            process alone.

    Returns:
        Bytes, of all processes of the group together; 0 for a cache that holds nothing yet.

    Raises:
        ValueError: for something that is no cache, and for meta and fake tensors, which have no bytes.
    """
    held = _held(past_key_values)
    if group is None:
        return held
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise ValueError(
            f"group: got {group!r}, expected processes of torch.distributed, such as torch.distributed.group.WORLD "
            "after they were started"
        )
    parts: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, held, group)
    return sum(parts)


def _held(past_key_values: object) -> int:
    if isinstance(past_key_values, torch.nn.Module) or hasattr(past_key_values, "past_key_values"):
        raise ValueError(
            f"cache_bytes: got {type(past_key_values).__name__}, expected a cache; "
            "pass the past_key_values of a model output"
        )
    storages: dict[tuple[torch.device, int], int] = {}
    tensors = 0
    seen: dict[int, object] = {}
    pending: list[object] = [past_key_values]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # Keeps the item alive too, so that no later one can take its id.
        if isinstance(item, torch.Tensor):
            tensors += 1
            if isinstance(item, PackedTensor):
                pending.extend(item.tensors)
            elif is_traceable_wrapper_subclass(item):
                names, _ = item.__tensor_flatten__()
                pending.extend(getattr(item, name) for name in names)
            else:
                key, size = _storage(item)
                storages[key] = max(size, storages.get(key, 0))
        else:
            pending.extend(_children(item))
    if not tensors and not _empty_cache(past_key_values):
        raise ValueError(
            f"cache_bytes: got {type(past_key_values).__name__} with no tensor in it, expected a cache; "
            "pass past_key_values, or tensors in tuples, lists or mappings"
        )
    return sum(storages.values())


def _storage(tensor: torch.Tensor) -> tuple[tuple[torch.device, int], int]:
    """`(device, address), bytes` of the storage behind a plain tensor."""
    if tensor.device.type == "meta" or is_fake(tensor):
        kind = "meta" if tensor.device.type == "meta" else "fake"
        raise ValueError(
            f"cache_bytes: got a {kind} tensor of shape {tuple(tensor.shape)}, expected one that holds "
            "memory; run the model on a real device"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(f"cache_bytes: got a tensor with layout {tensor.layout}, expected torch.strided")
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return (storage.device, 0), 0
    try:
        address = storage.data_ptr()
    except RuntimeError as error:  # How torch says that a wrapper's own storage is only a description.
        raise ValueError(
            f"cache_bytes: got a {type(tensor).__name__}, whose parts are hidden, expected plain tensors "
            "or a wrapper with __tensor_flatten__ and __tensor_unflatten__"
        ) from error
    return (storage.device, address), storage.nbytes()


def _children(item: object) -> list[Any]:
    if isinstance(item, Mapping):
        return list(item.values())
    if isinstance(item, (list, tuple, set, frozenset)):
        return list(item)
    # Behind a model, a class or a Python module lies much that no cache holds.
    if isinstance(item, (torch.nn.Module, type, ModuleType)):
        return []
    slots = [name for cls in type(item).__mro__ for name in _slot_names(cls)]
    return [*getattr(item, "__dict__", {}).values(), *(getattr(item, name, None) for name in slots)]


def _slot_names(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _empty_cache(item: object) -> bool:
    """Whether something without tensors can be a cache that holds nothing yet."""
    if item is None:
        return False
    if isinstance(item, Mapping):
        item = list(item.values())
    if isinstance(item, (list, tuple)):
        return all(entry is None or _empty_cache(entry) for entry in item)
    return not isinstance(item, type) and any(hasattr(item, name) for name in _CACHE_ATTRIBUTES)
