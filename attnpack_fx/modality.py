"""Which tokens are vision tokens, where the graph alone does not show it: stated by the caller, or carried between
graphs.

Some models break into several graphs per forward call. The mask is found in the first and needed in the later ones: it
travels on the
tensors that flow from graph to graph, so two requests can never see each other's.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_stated: ContextVar[Tensor | None] = ContextVar("attnpack_modality", default=None)
_ATTRIBUTE = "_attnpack_modality"


@contextmanager
def modality(mask: Tensor) -> Iterator[None]:
    """State which prompt tokens are vision tokens, for models whose graph does not say.

    mask: bool `[B, T]`, True for vision, in the order of the prompt; later tokens are text. A batch of one stands for
    every sample, and each
    sample's mask is repeated for its beams. Local to the current thread and asynchronous task.

    Raises ValueError when `mask` is not a two-dimensional bool tensor.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"modality mask: got {got}, expected a bool tensor [batch, tokens]; use e.g. input_ids == image_token_id"
        )
    token = _stated.set(mask)
    try:
        yield
    finally:
        _stated.reset(token)


def stated() -> Tensor | None:
    """The mask of the enclosing `modality(...)`, if any."""
    return _stated.get()


def carried(arguments: Iterable[Any]) -> Tensor | None:
    """The mask that travels on one of a graph's arguments, if any."""
    for argument in arguments:
        mask = getattr(argument, _ATTRIBUTE, None) if isinstance(argument, Tensor) else None
        if mask is not None:
            return mask
    return None


def carry(mask: Tensor, tensors: Iterable[Tensor]) -> None:
    """Let `mask` travel on `tensors` to the next graph of the same call."""
    for tensor in tensors:
        setattr(tensor, _ATTRIBUTE, mask)


def fit(mask: Tensor, batch: int, tokens: int, device: torch.device, newest: bool) -> Tensor:
    """`mask` as bool `[batch, tokens]`: samples repeated, other tokens text; it covers the newest tokens or the first.

    Raises ValueError when it has more tokens than there are, or a batch that does not divide.
    """
    samples, covered = mask.shape
    if covered > tokens or batch % samples:
        raise ValueError(
            f"modality mask: got [{samples}, {covered}], expected at most {tokens} tokens and a batch that divides "
            f"{batch}; "
            "give one row per prompt and one column per prompt token, padding included"
        )
    mask = mask.to(device).repeat_interleave(batch // samples, dim=0)
    missing = tokens - covered
    return torch.nn.functional.pad(mask, (missing, 0) if newest else (0, missing))
