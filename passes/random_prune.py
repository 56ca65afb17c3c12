"""A control: vision tokens are left out at random."""

from dataclasses import dataclass

import torch

from attnpack_fx.passes.token_pruning import Prompt, Pruning, TokenPruning, checked_count, checked_share, keep


@dataclass(frozen=True)
class RandomPrune(TokenPruning):
    """Random vision tokens stay, as in "Token Pruning in Multimodal Large Language Models" (ACL Findings 2025).

    ratio: the share of vision tokens that is left out: `round((1 - ratio) N)` of N stay.
    seed: of the generator; prompts of one shape keep tokens at the same places at every call.
    """

    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_share(self, "ratio", self.ratio, "0.5 to leave out half")
        checked_count(self, "seed", self.seed, "0", least=0)

    def prune(self, prompt: Prompt) -> Pruning:
        scores = prompt.call(torch.ops.attnpack.random_scores, prompt.vision, self.seed % (1 << 63))
        return keep(prompt, scores, 1.0 - self.ratio)
