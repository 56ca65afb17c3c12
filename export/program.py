"""From a model and a policy to exported programs: capture, then `attnpack::` operators decomposed (`portable.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from attnpack_fx.export import portable
from attnpack_fx.export.layout import Layout
from attnpack_fx.export.model import Parts, any_count, example_images, exporting, parts_of
from attnpack_fx.export.policies import exportable
from attnpack_fx.export.signature import Range, TensorSpec
from attnpack_fx.export.steps import AnglesStep, DecodeStep, PrefillStep, Step, VisionStep
from attnpack_fx.policy import PackPolicy

#: Sizes that dimensions may have, unless the caller says otherwise.
RANGES = {
    "batch_size": Range(1, 64),
    "sequence_length": Range(1, 131072),
    "image_count": Range(1, 1024),
    "feature_length": Range(0, 131072),
    "vision_length": Range(0, 131072),
    "text_length": Range(0, 131072),
    "prompt_length": Range(0, 131072),
    "past_sequence_length": Range(0, 131072),
}
#: Sizes of the tensors that steps are captured with: all different, none 0 or 1, for which PyTorch makes special cases.
_EXAMPLE = {
    "batch_size": 2,
    "sequence_length": 11,
    "image_count": 3,
    "feature_length": 7,
    "vision_length": 5,
    "text_length": 13,
    "prompt_length": 6,
    "past_sequence_length": 4,
}


@dataclass(frozen=True)
class Program:
    """One step as an exported program."""

    step: Step
    program: ExportedProgram
    ranges: dict[str, Range]


@dataclass(frozen=True)
class Programs:
    """What a model and a policy come to."""

    parts: Parts
    layout: Layout
    policy: PackPolicy
    steps: tuple[Program, ...]


def capture(
    model: nn.Module,
    policy: PackPolicy,
    example: Mapping[str, Any] | None = None,
    dims: Mapping[str, tuple[int, int]] | None = None,
    least: int = 0,
) -> Programs:
    """The steps of a model as programs of ATen operators alone.

    example: inputs as the processor makes them, images included, from which the vision tower is exported; where all
        images are of one size it needs none.
    dims: smallest and largest size of dimensions by name, instead of `RANGES`; least: the smallest that any may have.
    """
    parts = parts_of(model)
    layout = exportable(policy, parts)
    ranges = _ranges(dims, least)
    steps: list[Step] = []
    with exporting(parts):
        images = example_images(parts, example or {})
        if images is not None:
            steps.append(VisionStep(parts, images, any_count(parts.model)))
        steps += [PrefillStep(parts, layout), DecodeStep(parts, layout)]
        if policy.fold_every is not None and "text" in layout.turns:
            steps.append(AnglesStep(parts, layout))
        captured = tuple(_captured(step, parts, ranges) for step in steps)
    return Programs(parts, layout, policy, captured)


def _captured(step: Step, parts: Parts, ranges: Mapping[str, Range]) -> Program:
    names = {size for spec in step.inputs for size in spec.shape if isinstance(size, str) and "+" not in size}
    if step.name != "prefill":  # whose prompts may be longer than what a step takes after them
        ranges = {**ranges, "sequence_length": replace(ranges["sequence_length"], least=1)}
    dims = {name: Dim(name, min=ranges[name].least, max=ranges[name].most) for name in sorted(names)}
    tensors = [_example(spec, parts) for spec in step.inputs]
    shapes = [
        {
            place: Dim.DYNAMIC if "+" in size else dims[size]
            for place, size in enumerate(spec.shape)
            if isinstance(size, str)
        }
        for spec in step.inputs
    ]
    try:
        program = torch.export.export(step, (tensors,), dynamic_shapes=(shapes,), strict=False)
    except RuntimeError as error:
        if not isinstance(step, VisionStep):
            raise
        what = str(error).partition("\n")[0]
        raise NotImplementedError(
            f"export: the vision tower of {type(parts.model).__name__} cannot be captured ({what}); leave `example` "
            "out, and give generate image_features=attnpack_fx.export.features(model, inputs)"
        ) from error
    program = program.run_decompositions({torch.ops.attnpack.attention.default: portable.attention})
    return Program(step, program, {name: ranges[name] for name in sorted(names)})


def _example(spec: TensorSpec, parts: Parts) -> Tensor:
    return torch.zeros(spec.resolved(_EXAMPLE), dtype=spec.dtype, device=parts.device)


def _ranges(dims: Mapping[str, tuple[int, int]] | None, least: int) -> dict[str, Range]:
    found = {name: replace(allowed, least=max(allowed.least, least)) for name, allowed in RANGES.items()}
    for name, bounds in (dims or {}).items():
        if name not in RANGES:
            raise ValueError(f"dims: got {name!r}, expected some of {', '.join(RANGES)}")
        valid = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(isinstance(each, int) for each in bounds)
        if not valid or not found[name].least <= bounds[0] < bounds[1]:
            raise ValueError(
                f"dims: {name}: got {bounds!r}, expected a smallest and a larger largest size, from "
                f"{found[name].least} on; e.g. (1, 4096)"
            )
        found[name] = Range(*bounds)
    return found
