"""How well a rank holds keys as attended, keys before rotary embedding, and values: what the knee comes from."""

from typing import Any

from torch import Tensor

from attnpack_fx import PackedTensor, PackPolicy, hf
from benchmarks.graphs import compiled
from benchmarks.quality.answering import prefilled
from benchmarks.quality.contexts import Contexts

RANKS = (8, 12, 16, 24, 32, 48, 64, 96, 128)


def spectra(model: Any, batch: Contexts) -> list[dict[str, Any]]:
    """For every layer and kind, of the vision tokens `[N, H * D]`, means over samples.

    energy: singular values, as parts of the largest. error: relative Frobenius error of the best approximation at each
    rank. rank_of_99_percent: the rank that holds so much of the energy.
    """
    rows = []
    for space, kinds in (("rotated", ("keys, rotated",)), ("unrotated", ("keys, un-rotated", "values"))):
        cache = hf.empty_cache(model)
        policy = PackPolicy(vision_rank="full", key_space=space)
        prefilled(compiled(model, policy), batch, cache)
        for number, pair in enumerate(hf.keys_and_values(cache)):
            for kind, tensor in zip(kinds, pair if len(kinds) == 2 else pair[:1], strict=True):
                rows.append({"layer": number, "kind": kind, **_row(_values(tensor))})
    return rows


def _values(tensor: Tensor) -> Tensor:
    """Singular values `[B, R]`: bases are orthonormal, so that they are the norms of the coefficients' columns."""
    if not isinstance(tensor, PackedTensor) or not tensor.held.factors:
        raise RuntimeError(f"spectra: got a {type(tensor).__name__} without factors; is the layer packed?")
    return tensor.held.factors[0].coefficient.double().norm(dim=1).sort(descending=True)[0]


def _row(values: Tensor) -> dict[str, Any]:
    energy = values.square()
    left = 1 - energy.cumsum(1) / energy.sum(1, keepdim=True)
    return {
        "energy": [round(float(each), 6) for each in (values / values[:, :1]).mean(0)],
        "error": {
            str(rank): float(left[:, rank - 1].clamp(min=0).sqrt().mean()) for rank in RANKS if rank <= left.shape[1]
        },
        "rank_of_99_percent": float(((left > 0.01).sum(1) + 1).double().mean()),
    }
