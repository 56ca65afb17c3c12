"""Sizes that TensorRT engines are for: kernels are chosen for typical ones, memory is reserved for the largest."""

from collections.abc import Mapping
from dataclasses import replace

from attnpack_fx.export.program import Program
from attnpack_fx.export.signature import Range, TensorSpec

#: Sizes of dimensions unless the caller says otherwise: much less than `program.RANGES`, as an engine's memory is what
#: its largest shapes take.
RANGES = {
    "batch_size": (1, 8),
    "sequence_length": (1, 4096),
    "image_count": (1, 8),
    "feature_length": (0, 8192),
    "vision_length": (0, 4096),
    "text_length": (0, 4096),
    "prompt_length": (0, 4096),
    "past_sequence_length": (0, 2048),
}
#: Where they lie as a rule: one prompt with an image or two.
_TYPICAL = {
    "batch_size": 1,
    "sequence_length": 1024,
    "image_count": 1,
    "feature_length": 576,
    "vision_length": 576,
    "text_length": 256,
    "prompt_length": 64,
    "past_sequence_length": 128,
}
#: Tokens that a decode step takes at once: as a rule one, not a prompt.
_NEW, _NEW_MOST = 1, 16


def within(each: Program) -> Program:
    """A step for fewer sizes than it was captured for: no decode step of a prompt's length."""
    if each.step.name != "decode":
        return each
    allowed = each.ranges["sequence_length"]
    narrowed = Range(allowed.least, max(allowed.least, min(allowed.most, _NEW_MOST)))
    return replace(each, ranges={**each.ranges, "sequence_length": narrowed})


def shapes(each: Program, spec: TensorSpec) -> tuple[list[int], list[int], list[int]]:
    """Smallest, typical and largest shape of one of a step's inputs."""
    sizes = {name: (allowed.least, _typical(each, name), allowed.most) for name, allowed in each.ranges.items()}
    least, typical, most = (
        spec.resolved({name: chosen[number] for name, chosen in sizes.items()}) for number in range(3)
    )
    return least, typical, most


def chosen(dims: Mapping[str, tuple[int, int]] | None) -> dict[str, tuple[int, int]]:
    """`RANGES`, but for what the caller says."""
    return {**RANGES, **(dims or {})}


def _typical(each: Program, name: str) -> int:
    typical = _NEW if each.step.name == "decode" and name == "sequence_length" else _TYPICAL[name]
    return min(max(typical, each.ranges[name].least), each.ranges[name].most)
