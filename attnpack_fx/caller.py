"""What the model that is being called was given: token ids, which say where images are, and the attention mask.

A graph may be one of many of a call, and of a model that is compiled a layer at a time or has hooks between its layers,
no graph shows where images are. The call itself does: it is on the stack, with the ids, and the model's configuration
names those of images.
"""

import sys
from collections.abc import Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.shared import made_of

_CALL = torch.nn.Module._wrapped_call_impl.__code__


def vision_tokens() -> Tensor | None:
    """Bool `[B, T]` of the tokens of the outermost module call on the stack that says; None where none is of an image.

    A call of one token is a decode step, in which nothing is packed: it is not asked.
    """
    for module, ids in (*_ids_of_calls(), *_ids_of_generate()):
        images = hf.image_tokens(module)
        known = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 1 and not ids.is_floating_point()
        if images and known:
            vision: Tensor = made_of(ids, ("vision", images), partial(_found, ids, images))
            return vision if vision.numel() else None
    return None


def attention_mask() -> Tensor | None:
    """The mask `[B, T]`, 0 for padding, of the outermost module call on the stack that has one."""
    for given in _module_calls():
        mask = given["kwargs"].get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
    return None


def layer_count() -> int | None:
    """How many decoder layers the outermost module that is being called has, where its configuration says so."""
    return next((count for given in _module_calls() if (count := hf.layer_count(given["self"])) is not None), None)


def _module_calls() -> list[dict[str, Any]]:
    """`self`, `args` and `kwargs` of the modules that are being called, outermost first."""
    return [frame.f_locals for frame in _stack() if frame.f_code is _CALL][::-1]


def _ids_of_calls() -> Iterator[tuple[Any, Any]]:
    """Modules that are being called, each with the argument named `input_ids`, or the first."""
    for given in _module_calls():
        yield given["self"], given["kwargs"].get("input_ids", given["args"][0] if given["args"] else None)


def _ids_of_generate() -> Iterator[tuple[Any, Any]]:
    """Models that merge images themselves before another one in them generates, as BLIP-2 does; the call of their
    embeddings alone, of which there is one for each of the prompt's ids.
    """
    embeddings = next((given["kwargs"].get("inputs_embeds") for given in _module_calls()), None)
    if not isinstance(embeddings, Tensor):
        return
    for frame in _stack():
        if frame.f_code.co_name == "generate" and "input_ids" in frame.f_code.co_varnames:
            given = frame.f_locals
            ids = given.get("input_ids")
            if isinstance(ids, Tensor) and ids.shape[-1] == embeddings.shape[1]:
                yield given.get("self"), ids


def _stack() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _found(ids: Tensor, images: tuple[int, ...]) -> Tensor:
    vision = torch.isin(ids, torch.tensor(images, device=ids.device))
    return vision if vision.any() else vision[:0]
