"""The cache of one generation: what prefill packed, what has grown since, and folds of the one into the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpack_fx.export.layout import KINDS, Layout
from attnpack_fx.export.portable import turned_back
from attnpack_fx.kernels import ops
from attnpack_fx.policy import PackPolicy

#: cos and sin `[B, n, E]` of positions.
Angles = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class CacheState:
    """packed: the inputs of decode that stay, by name. window: `past_key_values`, in turn.

    mask: int64 `[B, W]`, which tokens of the window there are; positions: int64 `[B, W]`, where they stand, from
    `position_offset` on. prompt_positions: int64 `[B, n]`, or `[3, B, n]`, of the prompt's tokens that are as they are.
    """

    packed: dict[str, Tensor]
    window: dict[str, Tensor]
    mask: Tensor
    positions: Tensor
    prompt_positions: Tensor

    @classmethod
    def empty(cls, layout: Layout, packed: Mapping[str, Tensor], prompt_positions: Tensor) -> "CacheState":
        offset = packed["position_offset"]
        batch = offset.shape[0]
        window = {
            spec.name: torch.zeros((batch, layout.heads, 0, layout.dim(spec.name.rsplit(".", 1)[1])), dtype=spec.dtype)
            for spec in layout.window("past_key_values", "past_sequence_length")
        }
        none = offset[:, :0]
        return cls(dict(packed), window, none, none, prompt_positions)

    @property
    def bytes(self) -> int:
        """What the cache takes."""
        held = (*self.packed.values(), *self.window.values(), self.mask, self.positions, self.prompt_positions)
        return sum(tensor.nbytes for tensor in held)

    def grow(self, present: Mapping[str, Tensor], mask: Tensor, positions: Tensor) -> None:
        """Take what a step returned; mask, positions: of the whole window."""
        self.window = {f"past_key_values.{name.removeprefix('present.')}": made for name, made in present.items()}
        self.mask, self.positions = mask, positions


def due(state: CacheState, policy: PackPolicy) -> int:
    """How many of the oldest tokens that are as they are shall join the packed text; as `attnpack_fx/folding.py`."""
    if policy.fold_every is None:
        return 0
    dense = state.packed["prompt_mask"].shape[1] + state.mask.shape[1]
    return max(0, dense - policy.recent) // policy.fold_every * policy.fold_every


def fold(state: CacheState, layout: Layout, count: int, angles: Angles | None) -> None:
    """Fold the oldest `count` tokens into the text. angles: where its keys are packed before rotary embedding."""
    packed, kept = state.packed, state.packed["prompt_mask"].shape[1]
    offset = packed["position_offset"]
    own = state.positions + offset
    if state.prompt_positions.dim() == 3:
        own = own[None].expand(state.prompt_positions.shape[0], -1, -1)
    every = torch.cat([state.prompt_positions, own], -1)
    mask = torch.cat([packed["prompt_mask"], state.mask], 1)
    gone = mask[:, :count] == 0
    turns = None if angles is None else angles(every[..., :count])
    for layer in range(len(layout.plans)):
        for kind in KINDS:
            names = f"prompt.{layer}.{kind}", f"past_key_values.{layer}.{kind}"
            prompt, window = packed[names[0]], state.window[names[1]]
            rows = torch.cat([prompt, window.to(prompt.device)], 2)
            oldest = rows[:, :, :count].masked_fill(gone.to(rows.device)[:, None, :, None], 0)
            if kind == "key" and "text" in layout.turned(layer):
                assert turns is not None
                oldest = turned_back(oldest, *turns)
            packed |= _joined(packed, layout, layer, kind, oldest)
            packed[names[0]] = _copy(prompt[:, :, count:])
            state.window[names[1]] = _copy(window[:, :, max(0, count - kept) :])
    packed["text_mask"] = torch.cat([packed["text_mask"], mask[:, :count]], 1)
    if "text_position_ids" in packed:
        packed["text_position_ids"] = torch.cat([packed["text_position_ids"], every[..., :count]], -1)
    packed["prompt_mask"] = _copy(packed["prompt_mask"][:, count:])
    beyond = max(0, count - kept)
    state.mask, state.positions = _copy(state.mask[:, beyond:]), _copy(state.positions[:, beyond:])
    state.prompt_positions = _copy(state.prompt_positions[..., count:])


def _joined(packed: Mapping[str, Tensor], layout: Layout, layer: int, kind: str, rows: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer's text with more rows `[B, H, n, D]`."""
    segment = next(each for each in layout.segments(layer, kind) if each.modality == "text")
    if segment.rows is not None:
        return {segment.rows: torch.cat([packed[segment.rows], rows], 2)}
    assert len(segment.blocks) == 1, "quantised text takes no folds, which the policy refuses"
    block = segment.blocks[0]
    old, basis = packed[block.coefficient], packed[block.basis]
    coefficient, basis, _ = ops.fold(old, basis, rows.permute(2, 0, 1, 3).contiguous(), block.rank)
    missing = block.rank - coefficient.shape[2]
    return {
        block.coefficient: torch.nn.functional.pad(coefficient, (0, missing)),
        block.basis: torch.nn.functional.pad(basis, (0, 0, 0, missing)),
    }


def _copy(part: Tensor) -> Tensor:
    """Even of what is contiguous: a view would keep all of it alive."""
    return part.clone(memory_format=torch.contiguous_format)
