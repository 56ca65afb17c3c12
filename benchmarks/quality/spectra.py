"""How well a rank holds keys as attended, keys before rotary embedding, and values: what the knee comes from."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.data import Batch
from benchmarks.quality.sweeps import RANKS


def spectra(batch: Batch) -> list[dict[str, Any]]:
    """For every layer and kind, the relative Frobenius error of the best approximation at each rank.

    Of the vision tokens `[N, H * D]`; means over samples.
    rank_of_99_percent: the rank that holds so much of the energy.
    """
    rows = []
    for number, layer in enumerate(batch.layers):
        kinds = {"keys, rotated": layer.key, "keys, un-rotated": layer.plain, "values": layer.value}
        for kind, dense in kinds.items():
            energy = _energy(dense, batch.vision)
            left = 1 - energy.cumsum(1) / energy.sum(1, keepdim=True)
            rows.append(
                {
                    "layer": number,
                    "kind": kind,
                    "error": {
                        str(rank): float(left[:, rank - 1].clamp(min=0).sqrt().mean())
                        for rank in RANKS
                        if isinstance(rank, int) and rank <= left.shape[1]
                    },
                    "rank_of_99_percent": float(((left > 0.01).sum(1) + 1).double().mean()),
                }
            )
    return rows


def _energy(dense: Tensor, vision: Tensor) -> Tensor:
    """Squared singular values, descending, `[B, min(N, H * D)]`."""
    matrix = dense.transpose(1, 2).flatten(2)[vision].view(dense.shape[0], -1, dense.shape[1] * dense.shape[3])
    return torch.linalg.svdvals(matrix.float()).double().square()
