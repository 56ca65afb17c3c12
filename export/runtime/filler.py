"""Filler for steps that take no empty tensors: slots that no token sees, put in before a step and taken out after."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.export.manifest import StepFiles
from attnpack_fx.export.signature import TensorSpec, terms

#: Dimensions of slots that a mask or an index can leave out.
_MASKED = {"feature_length", "vision_length", "text_length", "prompt_length", "past_sequence_length"}


def filled(step: StepFiles, tensors: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Some of a step's inputs, not checked yet, with filler in front of what is shorter than the step takes.

    An index of filler is -1, all else 0, masks too. Returns besides how much filler there is, by dimension.
    """
    short: dict[str, int] = {}
    specs = [spec for spec in step.inputs if _fits(spec, tensors.get(spec.name))]
    for spec in specs:
        for size, length in zip(spec.shape, tensors[spec.name].shape, strict=True):
            if size in _MASKED and length < step.ranges[str(size)].least:
                short[str(size)] = step.ranges[str(size)].least - length
    found = dict(tensors)
    if short:
        found |= {spec.name: _longer(spec, tensors[spec.name], short) for spec in specs}
    return found, short


def unfilled(spec: TensorSpec, made: Tensor, short: Mapping[str, int]) -> Tensor:
    """What a step returned, without filler."""
    for place, size in enumerate(spec.shape):
        if missing := _missing(size, short):
            made = made.narrow(place, missing, made.shape[place] - missing)
    return made.contiguous()


def _fits(spec: TensorSpec, given: Any) -> bool:
    return isinstance(given, Tensor) and given.dim() == len(spec.shape)


def _longer(spec: TensorSpec, tensor: Tensor, short: Mapping[str, int]) -> Tensor:
    for place, size in enumerate(spec.shape):
        if missing := _missing(size, short):
            shape = [*tensor.shape[:place], missing, *tensor.shape[place + 1 :]]
            filler = tensor.new_full(shape, -1 if spec.name.endswith("_index") else 0)
            tensor = torch.cat([filler, tensor], place)
    return tensor


def _missing(size: int | str, short: Mapping[str, int]) -> int:
    return sum(short.get(name, 0) for name in terms(size)) if isinstance(size, str) else 0
