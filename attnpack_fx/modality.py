"""Which tokens are vision tokens, as the caller states it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_stated: ContextVar[Tensor | None] = ContextVar("attnpack_modality", default=None)


@contextmanager
def modality(mask: Tensor) -> Iterator[None]:
    """State which prompt tokens are vision tokens; what a model's graphs or token ids say of them does not count then.

    mask: bool `[B, T]`, True for vision, in the order of the prompt; later tokens are text. A batch of one stands for
    every sample, and each sample's mask is repeated for its beams. Local to the current thread and asynchronous task.

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


def fit(mask: Tensor, batch: int, tokens: int, device: torch.device, newest: bool) -> Tensor:
    """`mask` as bool `[batch, tokens]`: samples repeated, other tokens text; it covers the newest tokens or the first.

    Raises ValueError when it has more tokens than there are, or a batch that does not divide.
    """
    samples, covered = mask.shape
    if covered > tokens or batch % samples:
        raise ValueError(
            f"modality mask: got [{samples}, {covered}], expected at most {tokens} tokens and a batch that divides "
            f"{batch}; give one row per prompt and one column per prompt token, padding included"
        )
    mask = mask.to(device).repeat_interleave(batch // samples, dim=0)
    missing = tokens - covered
    return torch.nn.functional.pad(mask, (missing, 0) if newest else (0, missing))


def said(known: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """What is said of tokens beside what a graph shows, int8 `[batch, tokens]`: 1 vision, -1 none, 0 nothing.

    A stated mask says something of every token. known: of the newest tokens of this call, which are vision tokens.
    """
    mask = _stated.get()
    if mask is not None:
        return fit(mask, batch, tokens, device, newest=False).to(torch.int8) * 2 - 1
    if known is not None and known.shape[1] <= tokens and batch % known.shape[0] == 0:
        return fit(known, batch, tokens, device, newest=True).to(torch.int8)
    return torch.zeros((batch, tokens), dtype=torch.int8, device=device)
