"""What layers share: objects that derive others find the last again, so that layer after layer gets the same one; and
copies of one tensor that several layers hold stay one. All of it holds weakly: what no layer holds any more is gone.
"""

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: Of types that hold no memory to speak of.
_PLAIN = (type(None), bool, int, float, str, torch.device)

_lasting: ContextVar[list[object] | None] = ContextVar("attnpack_lasting", default=None)


@contextmanager
def lasting() -> Iterator[None]:
    """Keep what memos derive meanwhile: layers visited in turn share also what none of them goes on holding."""
    token = _lasting.set([])
    try:
        yield
    finally:
        _lasting.reset(token)


@dataclass(frozen=True)
class _Derivation:
    """One derivation: names of its arguments and of their versions, those that are no plain values, and its result."""

    key: Hashable
    arguments: tuple["weakref.ref[Any]", ...]
    result: Callable[[], Any]


class Memo:
    """The last result of every derivation, by name; arguments are the same by identity, or by value if plain.

    Results and arguments are held weakly, plain ones apart: a memo that kept what was derived would keep a whole chain
    of it alive, since what is derived remembers in turn.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Derivation] = {}

    def derive(self, name: str, arguments: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` returned for these arguments, as long as somebody holds it; tensors may be written to between."""
        key = tuple(map(_key, arguments))
        known = self._known.get(name)
        if known is not None and known.key == key and all(each() is not None for each in known.arguments):
            found = known.result()
            if found is not None:
                return found
        made = make()
        plain = isinstance(made, _PLAIN)
        references = tuple(weakref.ref(each) for each in arguments if not _is_plain(each))
        self._known[name] = _Derivation(key, references, (lambda: made) if plain else weakref.ref(made))
        kept = _lasting.get()
        if kept is not None and not plain:
            kept.append(made)
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


class Alike:
    """What layers of one call have made: of objects with a method `same_as`, the first stands for all alike."""

    def __init__(self) -> None:
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._earlier: weakref.WeakSet[Any] = weakref.WeakSet()

    def next_graph(self) -> None:
        """What is known by now comes from earlier graphs."""
        self._earlier = self._known.copy()

    def one(self, made: Any, earlier: bool = False) -> Any:
        """`made`, or what is known and the same; earlier: what is known of the graphs before this one."""
        for known in self._earlier if earlier else self._known:
            if type(known) is type(made) and known.same_as(made):
                return known
        self._known.add(made)
        return made


#: Index tensors made of others, by those.
_made_of: WeakIdKeyDictionary = WeakIdKeyDictionary()


def made_of(source: Tensor, name: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` made of source, kept for as long as source is: what one layer selects by, others select by too."""
    version, made = _made_of.get(source, (None, {}))
    if version != version_of(source):
        version, made = version_of(source), {}
        _made_of[source] = version, made
    if name not in made:
        made[name] = make()
    return made[name]


def version_of(tensor: Tensor) -> Hashable:
    """What changes whenever a tensor is written to. Inference tensors count nothing, so that is what they hold."""
    return tuple(tensor.flatten().tolist()) if tensor.is_inference() else tensor._version


def _is_plain(value: object) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _PLAIN)


def _key(value: Any) -> Hashable:
    """What names a value: as long as an object is alive, no other has its id."""
    return value if _is_plain(value) else id(value)
