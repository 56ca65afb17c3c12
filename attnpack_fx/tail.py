"""Growable storage for the dense tail of a packed key or value, shared safely by every handle that can read it.

Appending in place is what makes a decode step cheap, but a cache can fork: beam search, two continuations of one
prompt, a kept copy. So each handle holds a `TailLease`, the promise that the first `length` rows of a buffer are its
own to read. A lease may be extended in place only while no other live lease reads beyond its end; otherwise the rows
are copied to a new buffer first.
"""

import threading
import weakref
from functools import cached_property

import torch
from torch import Tensor

from attnpack_fx.kernels.parts import SPARE_ROWS

_MINIMUM_ROOM = 16


class TailBuffer:
    """Rows `[capacity, B, H, D]`; the leases alive on it decide which of them may be written.

    room: rows that the next buffer has room for when these are full; see `allocate`.
    template: no rows, the same dims: what Dynamo sees of the buffer, so that its capacity never matters to a compiled
    graph.
    """

    def __init__(self, rows: Tensor, room: int | None = None) -> None:
        self.rows, self.room = rows, room
        self._leases: weakref.WeakSet[TailLease] = weakref.WeakSet()
        self._lock = threading.Lock()

    @cached_property
    def template(self) -> Tensor:
        template = _alias(self.rows, 0)
        # Heads and head dims never vary, also where another policy's or model's differ: a graph is made for each.
        template._dynamo_static_indices = {2, 3}  # type: ignore[attr-defined]
        return template

    @property
    def capacity(self) -> int:
        return self.rows.shape[0]

    def lease(self, length: int) -> "TailLease":
        lease = TailLease(self, length)
        with self._lock:
            self._leases.add(lease)
        return lease

    def extend(self, lease: "TailLease", count: int) -> "TailLease":
        """A lease on `count` more rows: on this buffer if they are free, else on a copy with room."""
        needed = lease.length + count
        with self._lock:
            free = count == 0 or all(other.length <= lease.length for other in self._leases)
            if free and needed + SPARE_ROWS <= self.capacity:
                longer = TailLease(self, needed)
                self._leases.add(longer)
                return longer
        return allocate(self.rows[: lease.length], needed, self.room).lease(needed)


class TailLease:
    """The right to read the first `length` rows of `buffer`."""

    __slots__ = ("__weakref__", "buffer", "length")

    def __init__(self, buffer: TailBuffer, length: int) -> None:
        self.buffer = buffer
        self.length = length

    def visible(self) -> Tensor:
        """The rows held plus `SPARE_ROWS`, as a tensor that shares the buffer's memory and knows nothing of its
        capacity.
        """
        return _alias(self.buffer.rows, self.length + SPARE_ROWS)


def allocate(rows: Tensor, needed: int, room: int | None = None) -> TailBuffer:
    """A new buffer that starts with `rows` and holds at least `needed`, with room to grow.

    A quarter of room, unless it is given: each token is copied about five times in all, little beside the reads of
    attention, and little stands empty.
    """
    capacity = needed + (max(_MINIMUM_ROOM, needed // 4) if room is None else room) + SPARE_ROWS
    grown = rows.new_empty((capacity, *rows.shape[1:]))
    grown[: rows.shape[0]].copy_(rows)
    return TailBuffer(grown)


def exact(rows: Tensor) -> TailLease:
    """All of `rows`, which are nobody else's, without room to grow: the next append makes it, and copies them anyway.

    So what a method leaves takes no more memory than it holds.
    """
    return TailBuffer(rows.contiguous()).lease(rows.shape[0])


def _alias(rows: Tensor, count: int) -> Tensor:
    """The first `count` rows sharing memory, but not a view: Dynamo would trace a view's base too, capacity and all."""
    alias = torch.empty(0, dtype=rows.dtype, device=rows.device)
    return alias.set_(rows.untyped_storage(), 0, (count, *rows.shape[1:]), rows.stride())
