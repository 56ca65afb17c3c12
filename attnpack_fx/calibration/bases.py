"""One basis per layer, modality and kind of tensor for a whole model, from samples: `calibrate_bases`."""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf, model_bases
from attnpack_fx.backend import attnpack_backend
from attnpack_fx.compiling import called_through
from attnpack_fx.kernels import ops
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.policy import PackPolicy, PolicyError


def calibrate_bases(
    model: torch.nn.Module,
    samples: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    rank: int = 64,
    key_space: str = "auto",
    text: bool = False,
) -> PackPolicy:
    """Write the leading right singular vectors of all samples' cached tokens, and return a policy that uses them.

    samples: inputs of the model as its processor gives them, one prompt or batch each. path: of a `.safetensors` file.
    rank: components kept; key_space: as in `PackPolicy`; text: whether text tokens are packed too.

    The tokens of one layer and modality of all samples, stacked, have the same right singular vectors as the stack of
    each sample's `diag(singular values) basis`; that is kept at `2 rank` rows while samples are added. With the
    policy, packing is a projection, and the cache holds coefficients alone; a sample of which the basis leaves out more
    than `basis_tolerance` of the squared norm still gets its own. Raises `PolicyError` where nothing was packed.
    """
    full = PackPolicy(vision_rank="full", text_rank="full" if text else None, key_space=key_space)  # type: ignore[arg-type]
    found: dict[tuple[int, str, str], Tensor] = {}
    original = getattr(model, "_orig_mod", model)
    hf.check_whole(original, "calibrate_bases", "a basis is one of all heads; leave bases out")
    count = 0
    with torch.no_grad(), called_through(original, partial(attnpack_backend, options={"policy": full})):
        for sample in samples:
            count += 1
            cache = original(**sample, use_cache=True).past_key_values
            for number, pair in enumerate(hf.keys_and_values(cache)):
                _add(found, number, pair, rank)
    if not found:
        raise PolicyError(
            f"calibrate_bases: got {count} samples in which nothing was packed, expected at least one with vision "
            "tokens; pass text=True for a model without any, and look at attnpack_fx.explain"
        )
    model_bases.save(path, {place: rows[:, :, :rank] / _norms(rows[:, :, :rank]) for place, rows in found.items()})
    ranks = {"vision_rank": rank, "text_rank": rank if text else None}
    return PackPolicy(**ranks, key_space=key_space, bases=os.fspath(path))  # type: ignore[arg-type]


def _add(found: dict[tuple[int, str, str], Tensor], number: int, pair: tuple[Tensor, Tensor], rank: int) -> None:
    for packed, kind in zip(pair, ("key", "value"), strict=True):
        if not isinstance(packed, PackedTensor):
            continue
        if packed.held.angles is not None:
            kind = f"unrotated {kind}"
        for name, segment in zip(packed.modalities, packed.segments, strict=True):
            block = segment.factors[0]
            # Columns of the coefficients are orthogonal: of the tokens only their norms matter here.
            norms = block.coefficient.float().norm(dim=1)[:, None, :, None]
            rows = (block.basis.float() * norms).transpose(0, 1).flatten(1, 2)[None]
            place = number, name, kind
            stacked = torch.cat([found[place], rows], 2) if place in found else rows
            found[place] = _leading(stacked, 2 * rank)


def _leading(rows: Tensor, rank: int) -> Tensor:
    """The best approximation of rows `[1, H, n, D]`, heads concatenated, by at most `rank` rows."""
    index = torch.arange(rows.shape[2], device=rows.device)[None]
    coefficient, basis = ops.compress(rows, index, rank)
    return basis * coefficient.norm(dim=1)[:, None, :, None]


def _norms(rows: Tensor) -> Tensor:
    norms = rows.square().sum((1, 3), keepdim=True).sqrt()
    return norms.clamp(min=torch.finfo(rows.dtype).tiny)
