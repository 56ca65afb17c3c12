"""`PackedTensor`: the meaning of a dense `[B, H, T, D]` key or value cache, stored as low-rank factors and a dense
tail.

Operations a cache needs stay packed (`cat` along T, selecting and repeating samples, dropping the newest tokens, `to`,
`clone`, `detach`, `zero_`: `packed_ops.py`); every other operation decompresses first and is therefore still correct.
Nothing writes through a decompressed copy: in-place operations it cannot honour are refused (`memoryless.py`).
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad as _pad
from torch.utils._pytree import tree_map_only

from attnpack_fx.angles import SharedAngles
from attnpack_fx.containers import restored, saved
from attnpack_fx.held import ROW_SEGMENT, Held, fake_parts
from attnpack_fx.kernels import ops
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import SPARE_ROWS, Form, PackedParts, Segment, rank_of
from attnpack_fx.memoryless import Memoryless, forbid_pointer, is_fake, refuse_writes
from attnpack_fx.packed_ops import PACKED, each_sample, slice_packed
from attnpack_fx.placement import Placement
from attnpack_fx.shared import made_of
from attnpack_fx.tail import TailBuffer, TailLease, allocate, exact


class PackedTensor(Memoryless):
    """Packed keys or values of one layer; behaves as the dense `[B, H, T, D]` tensor it stands for.

    Made by the compiled graph, or by `attnpack_fx.pack`. Fields, none of them to be written to:

    held: the packed part: segments, where each token is stored, rotary embedding.
    lease: the dense tail's rows; `lease.length` of them hold tokens.
    importance: None, or fp32 `[B, N]`, how much queries attended to each token: of the first segment, or of all slots
        there were at the last step (`observing.py`).
    taken_back: None, or what to go back to when the last call's newest tokens are cropped (`taking_back.py`), and
        whether this is its key (0) or its value (1).

    Where every KV head keeps tokens of its own (`held.heads`), a sample of these is a (sample, head) pair.

    Not differentiable. Saves and loads with `torch.save` / `torch.load(weights_only=True)` once `attnpack_fx` is
    imported. What reads its memory gets the dense contents or an error that names `dense()` (`memoryless.py`).
    """

    held: Held
    lease: TailLease
    importance: Tensor | None
    taken_back: "tuple[Any, int] | None"
    rows: Tensor
    sizes: Tensor

    @staticmethod
    def __new__(
        cls,
        held: Held,
        lease: TailLease,
        importance: Tensor | None = None,
        traced: tuple[Tensor, Any] | None = None,
    ) -> "PackedTensor":
        rows = lease.buffer.rows
        if traced is None:
            _, batch, heads, dim = rows.shape
            if held.heads:
                batch, heads = batch // held.heads, held.heads
            size = batch, heads, held.placement.tokens + lease.length - held.kept, dim
        else:
            size = traced[1]
        packed = torch.Tensor._make_wrapper_subclass(cls, size, dtype=rows.dtype, device=rows.device)
        if traced is None:
            forbid_pointer(packed)
        return packed

    def __init__(self, held, lease=None, importance=None, traced=None):
        if lease is None:  # `torch.Tensor(packed)` makes an alias, and initialises it with its own argument
            return
        self.held = held
        self.lease = lease
        self.importance = importance
        self.taken_back = None
        if traced is not None:
            self.rows, self.sizes = lease.buffer.rows, traced[0]
            return
        self.rows = lease.buffer.template
        self._dynamo_weak_dynamic_indices, self._dynamo_static_indices = {2}, {1, 3}
        self.sizes = _shape(lease.length + SPARE_ROWS, *held.sizes)

    @property
    def index(self) -> Tensor:  # type: ignore[override]
        return self.held.placement.index

    @property
    def slot(self) -> Tensor:
        return self.held.placement.slot

    @property
    def placement(self) -> Placement:
        return self.held.placement

    @property
    def segments(self) -> tuple[Segment[Tensor], ...]:
        return self.held.segments

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.held.modalities

    @property
    def parts(self) -> PackedParts[Tensor]:
        angles = None if self.held.angles is None else self.held.angles.packed
        rows, length = self.lease.buffer.rows, self.lease.length
        return PackedParts(self.segments, rows, length, self.index, None, angles, self.placement.ragged)

    @property
    def form(self) -> Form:
        """What compiled graphs are made for."""
        return self.held.forms[self.importance is not None]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that takes memory."""
        before = [] if self.taken_back is None else self.taken_back[0].tensors[self.taken_back[1]]
        known = [] if self.importance is None else [self.importance]
        return [*self.held.tensors, self.lease.buffer.rows, *known, *before]

    @property
    def ranks(self) -> dict[str, int]:
        """Rank by modality, of what is low rank."""
        return {
            name: sum(map(rank_of, segment.factors))
            for name, segment in zip(self.modalities, self.segments, strict=True)
            if name != ROW_SEGMENT
        }

    @property
    def tokens(self) -> dict[str, int]:
        """Stored tokens (of the longest sample) by where they are: each modality packed, and `"dense"`."""
        return dict(zip(self.modalities, self.held.counts, strict=True)) | {"dense": self.lease.length}

    @property
    def slots(self) -> int:
        """How many slots hold tokens or filler."""
        return self.held.packed + self.lease.length

    @property
    def placed(self) -> Placement:
        """The placement with places for appended tokens too."""
        appended = self.lease.length - self.held.kept
        return self.placement.extend(appended) if appended else self.placement

    @property
    def positions(self) -> Tensor:
        """Logical position of every slot, int64 `[B, slots]`, -1 for filler."""
        return self.placed.index

    @property
    def is_vision(self) -> Tensor:
        """Which slots hold vision tokens, as far as that is known: bool `[B, slots]`; appended tokens are none."""
        known = self.placement.vision_slots
        return _pad(known, (0, self.slots - known.shape[1]))

    @property
    def scores(self) -> Tensor | None:
        """The importance of every slot, fp32 `[B, slots]`; 0 of tokens that came after it was found."""
        known = self.importance
        if known is None or known.shape[1] == self.slots:
            return known
        known = known[:, : self.slots]
        return _pad(known, (0, self.slots - known.shape[1]))

    @property
    def stored(self) -> Tensor:
        """Which placed tokens are stored, not padding nor evicted: bool `[B, H or 1, P]`."""
        stored = self.slot >= 0
        return stored[:, None] if not self.held.heads else stored.unflatten(0, (-1, self.held.heads))

    def dense(self) -> Tensor:
        """The dense `[B, H, T, D]` tensor this stands for; padding and what is not read any more is zero."""
        if is_fake(self):  # only shapes matter while tracing, and they are to be those that Dynamo gave
            return self.rows.new_empty(self.shape)
        tensors, (layout,) = flatten(replace(self.parts, slot=self.slot))
        dense = ops.decompress(tensors, layout, self.lease.length)
        return dense if not self.held.heads else dense.unflatten(0, (-1, self.held.heads)).squeeze(2)

    def grow(self, count: int) -> "PackedTensor":
        """A handle with room for `count` more tokens, whose rows the caller must write: tail rows `lease.length -
        count` on.
        """
        lease = self.lease.buffer.extend(self.lease, count)
        return PackedTensor(self.held, lease, self.importance)

    def attended(self, importance: Tensor) -> "PackedTensor":
        """The same with another importance."""
        return PackedTensor(self.held, self.lease, importance)

    def turned(self, angles: SharedAngles) -> "PackedTensor":
        """The same with other angles of the tail's rows."""
        return PackedTensor(replace(self.held, angles=angles), self.lease, self.importance)

    def append(self, new: Tensor) -> "PackedTensor":
        """`cat([self, new], dim=2)` with new `[B, H, k, D]`; self stays as it is."""
        grown = self.grow(new.shape[2])
        if self.held.heads:
            new = new.flatten(0, 1)[:, None]
        ops.append_([grown.lease.buffer.rows], [new], [self.lease.length])
        return grown if self.held.angles is None else grown.turned(self.held.angles.untracked())

    def crop(self, tokens: int) -> "PackedTensor":
        """Only the first `tokens` tokens; without those of the last call that are gone, for what methods know, too."""
        if self.taken_back is not None:
            before, which = self.taken_back
            pair = before.cropped(tokens)
            if pair is not None:
                return pair[which].handle()
        placed, length = self.placement.tokens, self.held.kept
        held = self.held
        if tokens < placed:
            held = replace(held, placement=held.placement.crop(tokens))
        else:
            length += tokens - placed
        if held.angles is not None:
            held = replace(held, angles=held.angles.cropped(length))
        if held.resting is not None:
            held = replace(held, resting=held.resting.crop(tokens))
        importance = self.importance
        if importance is not None:  # slots that are free again say nothing about tokens that will take them
            importance = importance[:, : held.packed + length].clone()
        return PackedTensor(held, self.lease.buffer.lease(length), importance)

    def newest(self, tokens: int) -> "PackedTensor":
        """Only the last `tokens` tokens. The others' slots become filler, which `windows.compacted` frees."""
        gone = self.shape[2] - tokens
        if gone <= 0:
            return self
        held = replace(self.held, placement=self.placed.newest(tokens), left=self.held.left + gone)
        return PackedTensor(held, self.lease, self.importance)

    def samples(self, rows: Tensor) -> "PackedTensor":
        """The samples `rows` (int64 `[B']`) of the batch, copied."""
        length, heads = self.lease.length, self.held.heads
        if heads:
            samples = rows
            rows = made_of(
                samples,
                ("heads", heads),
                lambda: (samples[:, None] * heads + torch.arange(heads, device=samples.device)).flatten(),
            )
        lease = allocate(self.lease.buffer.rows[:length].index_select(1, rows), length).lease(length)
        importance = None if self.importance is None else self.importance.index_select(0, rows)
        return PackedTensor(self.held.select(rows), lease, importance)

    def map(
        self, function: Callable[[Tensor], Tensor], to: torch.device | None = None, name: Hashable = None
    ) -> "PackedTensor":
        """Apply a shape-preserving `function` that copies to every floating part; `to`, `name`: as in `Held.map`."""
        length = self.lease.length
        lease = allocate(function(self.lease.buffer.rows[:length]), length).lease(length)
        importance = self.importance if to is None or self.importance is None else self.importance.to(to)
        return PackedTensor(self.held.map(function, to, name), lease, importance)

    def handle(self) -> "PackedTensor":
        """Another handle on the same."""
        made = PackedTensor(self.held, self.lease.buffer.lease(self.lease.length), self.importance)
        made.taken_back = self.taken_back
        return made

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """What Dynamo sees, and guards on at every call: no part, only the dims of the tail and what varies."""
        return ["rows", "sizes"], self.form

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: Any, outer_size: Any, outer_stride: Any
    ) -> "PackedTensor":
        rows, sizes = inner["rows"], inner["sizes"]
        if not isinstance(rows, FakeTensor):
            raise NotImplementedError(
                "a PackedTensor cannot be rebuilt from `__tensor_flatten__`, which gives sizes for tracing and no "
                f"contents; got parts of type {type(rows).__name__}, expected fake ones. Use `clone`, `to` or "
                "`torch.save`."
            )
        _, count, *varying = sizes.shape
        segments, index, placed, angles = fake_parts(context, rows, varying)
        shared = None if angles is None else SharedAngles(angles)
        held = Held(segments, context.modalities, Placement(index, placed, context.ragged), shared, heads=context.heads)
        # Only whether there is one matters to a graph.
        importance = rows.new_empty((), dtype=torch.float32) if context.weighed else None
        lease = TailBuffer(rows).lease(count - SPARE_ROWS)
        return PackedTensor(held, lease, importance, (sizes, outer_size))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        handler = PACKED.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(PackedTensor, PackedTensor.dense, (args, kwargs))
        return func(*args, **kwargs)

    def __getitem__(self, key):
        # Straight to the slice: through autograd the result would be a view that keeps `self` and its lease alive, and
        # the next append
        # after a crop would have to copy the tail.
        if isinstance(key, tuple) and len(key) in (3, 4) and not is_fake(self):
            *leading, tokens, last = key
            full = all(item is Ellipsis or item == slice(None) for item in (*leading, last))
            if full and isinstance(tokens, slice) and (Ellipsis in leading or len(key) == 4):
                result = slice_packed(self, 2, tokens.start, tokens.stop, tokens.step or 1)
                if result is not NotImplemented:
                    return result
        return super().__getitem__(key)

    def repeat_interleave(self, repeats, dim=None, *, output_size=None):
        # The operator is composite: below Python only its `unsqueeze` and `expand` would be seen.
        if dim != 0 or not isinstance(repeats, int) or is_fake(self):
            return super().repeat_interleave(repeats, dim, output_size=output_size)
        return self.samples(each_sample(0, self.shape[0], repeats, self.device))

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol):
        rows = self.lease.buffer.rows[: self.lease.length]
        if get_spawning_popen() is None:
            rows = rows.clone()  # without the room behind them; a process that starts shares what outlives the call
        return import_attnpack_fx_before_loading, (saved(self.held), rows, self.importance)

    def __repr__(self, *, tensor_contents=None):
        ranks = self.ranks
        held = ", ".join(
            f"{name} {self.shape[0], count} " + (f"at rank {ranks[name]}" if name in ranks else "in codes")
            for name, count in zip(self.modalities, self.held.counts, strict=True)
        )
        return (
            f"PackedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"packed=[{held}], dense rows={self.lease.length})"
        )


def _shape(*sizes: int) -> Tensor:
    """Sizes as Dynamo sees them and knows that they vary: the shape of a tensor without elements.

    Every value has one of its own. Dynamo compiles for which of a graph's inputs are one object, and layers that have
    the same sizes at one step, after eviction say, have others at the next.
    """
    made = torch.empty_strided((0, *sizes), (0,) * (1 + len(sizes)), dtype=torch.uint8)
    made._dynamo_weak_dynamic_indices = set(range(1, 1 + len(sizes)))  # type: ignore[attr-defined]
    return made


def import_attnpack_fx_before_loading(state, rows, importance) -> PackedTensor:
    """Rebuild a saved PackedTensor.

    `torch.load(weights_only=True)` quotes this name, and can quote nothing else, where `attnpack_fx` is not imported.
    """
    # Nothing is read or copied here: files as before torch 1.6 fill the tensors afterwards.
    return PackedTensor(restored(state), exact(rows), importance)


torch.serialization.add_safe_globals([import_attnpack_fx_before_loading])
