"""From the outputs of a compiled graph to what its caller gets: packed results are put together."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from attnpack_fx import windows
from attnpack_fx.angles import SharedAngles
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.asks import keeps_angles, moves_tokens
from attnpack_fx.passes.state import Grown, OutputSpec, Packed, Plain
from attnpack_fx.placement import Placement
from attnpack_fx.policy import PackPolicy
from attnpack_fx.shared import Alike
from attnpack_fx.storing import Factored, assemble


class Collector:
    """The outputs of one graph. What layers share, their placement and angles, is made once.

    results: of the compiled graph; grown: packed arguments with room for this call's tokens, by position; alike: what
    graphs of this call have made before.
    """

    def __init__(
        self, results: Sequence[Any], grown: dict[int, PackedTensor], policy: PackPolicy, alike: Alike
    ) -> None:
        self._results = results
        self._grown = grown
        self._policy = policy
        self._alike = alike
        self._placements: dict[int, Placement] = {}
        self._angles: dict[Any, SharedAngles] = {}

    def collect(self, spec: OutputSpec) -> Any:
        match spec:
            case Plain(index):
                return self._results[index]
            case Grown():
                return self._extended(spec)
            case Packed():
                return self._assembled(spec)

    def _extended(self, spec: Grown) -> PackedTensor:
        packed = self._grown[spec.position]
        angles = packed.held.angles
        if angles is not None and spec.angles is not None:
            cos, sin = (self._results[number] for number in spec.angles)
            packed = packed.turned(angles.appended(cos, sin, packed.held.heads))
        elif angles is not None and angles.tail is not None:
            packed = packed.turned(angles.untracked())
        return packed if spec.window is None else packed.newest(spec.window)

    def _assembled(self, spec: Packed) -> PackedTensor:
        results = self._results
        indices = [results[number] for number in spec.indices]
        if spec.slot not in self._placements:
            slot = results[spec.slot]
            vision = None if spec.vision is None else results[spec.vision].expand(slot.shape) & (slot >= 0)
            placed = Placement.from_plan(
                indices, slot, vision, moves=moves_tokens(self._policy), window=spec.window is not None
            )
            # Layers of different ranks decide for themselves whether packing pays, and mostly decide alike.
            self._placements[spec.slot] = self._alike.one(placed)
        factored = {}
        for name, columns, outputs, index in zip(spec.modalities, spec.columns, spec.factors, indices, strict=False):
            owner = None if outputs.owner is None else results[outputs.owner]
            factors = results[outputs.coefficient], results[outputs.basis]
            factored[name] = Factored(*factors, columns, index, owner, outputs.given)
        placement = self._placements[spec.slot]
        return assemble(
            factored,
            results[spec.tail],
            placement,
            squares=None if spec.squares is None else results[spec.squares],
            angles=partial(self._angles_of, spec),
            heads=spec.heads,
            room=None if spec.window is None else windows.room(placement.tokens, spec.window),
        )

    def _angles_of(self, spec: Packed, packed: int) -> SharedAngles | None:
        keep = keeps_angles(self._policy)
        if spec.angles is None or not (packed or keep):
            return None
        placement = self._placements[spec.slot]
        known = spec.angles, id(placement), packed
        if known not in self._angles:
            cos, sin = (self._results[number] for number in spec.angles)
            made = SharedAngles.of_prompt(cos, sin, placement.index, packed, spec.interleaved, keep)
            self._angles[known] = self._alike.one(made if spec.window is None else made.by_number())
        return self._angles[known]
