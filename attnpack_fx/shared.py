"""What layers share: objects that derive others remember the last, so that layer after layer gets the same one; and
copies of one tensor that several layers hold stay one.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class Memo:
    """The last result of every derivation, by name; arguments are the same by identity, or by value if plain."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, Hashable, Any]] = {}

    def derive(self, name: str, argument: object, version: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned for this argument, at this version of it (of a tensor that may be written to)."""
        known = self._known.get(name)
        if known is not None and known[1] == version and (known[0] is argument or _equal(known[0], argument)):
            return known[2]
        made = make()
        self._known[name] = (argument, version, made)
        return made


class Copies:
    """Tensors made from others, found again while both are alive: layers that hold one tensor get one made of it."""

    def __init__(self) -> None:
        self._known: dict[Hashable, tuple[weakref.ref[Tensor], ...]] = {}

    def of(self, source: Tensor, argument: Tensor | Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` made of source, which nothing writes to, for this argument: a tensor by identity, or plain."""
        tensors = [source]
        if isinstance(argument, Tensor):
            tensors.append(argument)
            argument = id(argument), version_of(argument)
        # As long as the source is alive, what is at its address is the same memory.
        place = source.data_ptr(), tuple(source.shape), source.stride(), source.dtype, source.device
        key = place, argument
        known = self._known.get(key)
        if known is not None and all(each() is not None for each in known):
            found = known[-1]()
            if found is not None:
                return found
        made = make()
        self._known[key] = tuple(weakref.ref(each) for each in (*tensors, made))
        weakref.finalize(made, self._forget, key).atexit = False
        return made

    def _forget(self, key: Hashable) -> None:
        known = self._known.get(key)
        if known is not None and known[-1]() is None:
            del self._known[key]


#: Of every cache there is.
copies = Copies()


def version_of(tensor: Tensor) -> Hashable:
    """What changes whenever a tensor is written to. Inference tensors count nothing, so that is what they hold."""
    return tuple(tensor.flatten().tolist()) if tensor.is_inference() else tensor._version


def _equal(left: object, right: object) -> bool:
    return not isinstance(left, Tensor) and left == right
