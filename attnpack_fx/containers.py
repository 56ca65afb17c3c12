"""What is the same for every container of a packed cache: which tensors it has, others in their place, a saved form."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_leaves

from attnpack_fx.kernels.parts import Angles, Block, RowForm, Rows, Segment

C = TypeVar("C")

#: Containers by the name that is saved.
_CONTAINERS: dict[str, type[Any]] = {each.__name__: each for each in (Angles, Block, RowForm, Rows, Segment)}


def container(cls: type[C]) -> type[C]:
    """Make a dataclass a container. Fields that it is not made from are its own, and no part of what it holds."""
    register_dataclass(cls)
    _CONTAINERS[cls.__name__] = cls
    return cls


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor that a container holds, or containers in tuples do."""
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


def map_tensors(function: Callable[[str, Tensor], Tensor], value: Any, name: str = "") -> Any:
    """The same with another tensor for each, given the name of the field that it, or a tuple with it, stands in."""
    if isinstance(value, Tensor):
        return function(name, value)
    if isinstance(value, tuple):
        return tuple(map_tensors(function, each, name) for each in value)
    held = _held(value)
    if held is None:
        return value
    return type(value)(**{name: map_tensors(function, each, name) for name, each in held.items()})


def saved(value: Any) -> Any:
    """A container in dicts, lists and tensors; `restored` is the inverse."""
    if isinstance(value, tuple):
        return list(map(saved, value))
    held = _held(value)
    if held is None:
        return value
    return {"container": type(value).__name__} | {name: saved(each) for name, each in held.items()}


def restored(state: Any) -> Any:
    """The container that `saved` took apart. Raises ValueError for what another version wrote."""
    if isinstance(state, list | tuple):
        return tuple(map(restored, state))
    if not isinstance(state, dict):
        return state
    name, held = state.get("container"), {name: restored(each) for name, each in state.items() if name != "container"}
    known = _CONTAINERS.get(name)  # type: ignore[arg-type]
    if known is None or held.keys() != {each.name for each in fields(known) if each.init}:
        raise ValueError(
            f"saved cache: got {name or 'fields'} with {', '.join(map(str, held))}, as another version wrote it, "
            "expected what this version writes; read the prompt again and save its cache with this version"
        )
    return known(**held)


def _held(value: Any) -> dict[str, Any] | None:
    """The fields of a container; None for anything else."""
    if _CONTAINERS.get(type(value).__name__) is not type(value):
        return None
    return {each.name: getattr(value, each.name) for each in fields(value) if each.init}
