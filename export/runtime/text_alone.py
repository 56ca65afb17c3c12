"""Prompts of which nothing is packed: decode steps over an empty packed cache, as prefill would factorise filler."""

import torch
from torch import Tensor

from attnpack_fx.export.layout import Layout
from attnpack_fx.export.manifest import Manifest
from attnpack_fx.export.runtime.planning import Plan
from attnpack_fx.export.runtime.prompting import Prompt
from attnpack_fx.export.runtime.state import CacheState

#: Tokens that go through a step at once, at most, and at least: each has its logits, and each step reads all weights.
_MOST, _LEAST = 256, 64


def piece(manifest: Manifest, prompt: Prompt, planned: Plan) -> int:
    """How many tokens of a prompt a decode step takes at once; 0 where the prompt is prefill's."""
    packed = [name for name in planned.index if name != "prompt"]
    if not packed or manifest.policy.fold_every is not None or any(planned.index[name].numel() for name in packed):
        return 0
    ranges = manifest.steps["decode"].ranges
    most, room = ranges["sequence_length"].most, ranges["past_sequence_length"].most
    if most < _LEAST or room < manifest.steps["prefill"].ranges["prompt_length"].most:
        return 0
    positions = prompt.positions
    along_one_axis = positions.dim() == 2 or bool((positions == positions[0]).all())
    return min(most, _MOST) if along_one_axis else 0


def empty(layout: Layout, prompt: Prompt, planned: Plan) -> CacheState:
    """A cache without tokens."""
    sizes = {f"{name}_length": 0 for name in planned.index} | {"batch_size": prompt.ids.shape[0]}
    packed = {
        spec.name: torch.zeros(spec.resolved(sizes), dtype=spec.dtype) for spec in (*layout.packed(), *layout.places())
    }
    return CacheState.empty(layout, packed | {"position_offset": prompt.offset}, prompt.positions[..., :0])


def places(prompt: Prompt) -> Tensor:
    """Positions of the prompt's tokens `[B, T]` as decode takes them, counted from the first generated one."""
    positions = prompt.positions if prompt.positions.dim() == 2 else prompt.positions[0]
    return positions - prompt.offset
