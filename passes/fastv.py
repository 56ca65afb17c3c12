"""FastV: from an early layer on, only the vision tokens the last prompt token attends to."""

from dataclasses import dataclass

import torch

from attnpack_fx.passes.token_pruning import Prompt, Pruning, TokenPruning, checked_share, keep


@dataclass(frozen=True)
class FastV(TokenPruning):
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764).

    layer: K: layers from K on see the vision tokens that get most attention from the last prompt token in layer K - 1,
        averaged over heads.
    ratio: R, the share of vision tokens that is left out: `round((1 - R) N)` of N stay.

    K = 2 and R = 0.5 are the paper's. Kept tokens keep their positions, as in the released code. That code takes one
    prompt at a time; here each sample of a batch keeps its own share.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_share(self, "ratio", self.ratio, "0.5 to leave out half")

    def prune(self, prompt: Prompt) -> Pruning:
        attended = torch.ops.attnpack.last_row_scores
        scores = prompt.call(attended, prompt.query, prompt.key, prompt.mask, prompt.scale)
        return keep(prompt, scores, 1.0 - self.ratio)
