"""ASAP: vision tokens seen by attention both ways, similar ones merged, others salvaged in their place."""

from dataclasses import dataclass

import torch

from attnpack_fx.passes.token_pruning import Prompt, Pruning, TokenPruning, checked_count, checked_share

#: More tokens than there ever are.
_ALL = 2**62


@dataclass(frozen=True)
class ASAP(TokenPruning):
    """ASAP (Pathak and Han, arXiv 2603.14549).

    layer: the first layer that sees fewer tokens. The paper prunes "after decoder layer L"; 2 is FastV's.
    keep: how many vision tokens stay, or None for all. The paper's budgets for LLaVA-1.5 are 192 and 128; the default
        is the larger.
    lambda_max: the largest weight of a later vision token in the soft mask (eq. 4), in (0, 1]. The paper gives no
        value; 1.0, full weight for the most attended token, is ours.
    threshold: tokens whose hidden states have a cosine above it are merged (eq. 6). The paper gives no value; 0.9 is
        ours. At 1.0 nothing is merged.

    The paper ranks tokens "by this bidirectional attention" without saying whose: here it is what all queries of the
    prompt give a token. Similarity and scores are of layer `layer - 1` and its output, heads averaged: ours too.
    """

    keep: int | None = 192
    lambda_max: float = 1.0
    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            checked_count(self, "keep", self.keep, "192; None keeps all", least=0)
        checked_share(self, "lambda_max", self.lambda_max, "1.0")
        if self.lambda_max == 0:
            raise ValueError(f"ASAP.lambda_max: got {self.lambda_max!r}, expected a number in (0, 1]; e.g. 1.0")
        checked_share(self, "threshold", self.threshold, "0.9; 1.0 merges nothing")

    def prune(self, prompt: Prompt) -> Pruning:
        prune = torch.ops.attnpack
        arguments = prompt.query, prompt.key, prompt.vision, prompt.mask, prompt.scale, float(self.lambda_max)
        attention, raw = prompt.items(prompt.call(prune.bidirectional_scores, *arguments), 2)
        most = _ALL if self.keep is None else self.keep
        given = prompt.hidden, attention, raw, prompt.vision, prompt.mask, most, float(self.threshold)
        rows, group, weight = prompt.items(prompt.call(prune.merged_rows, *given), 3)
        return Pruning(rows, prompt.call(prune.merge_tokens, prompt.hidden, rows, group, weight))
