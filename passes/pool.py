"""A control: neighbouring vision tokens are averaged."""

from dataclasses import dataclass

import torch

from attnpack_fx.passes.token_pruning import Prompt, Pruning, TokenPruning, checked_count


@dataclass(frozen=True)
class Pool(TokenPruning):
    """Vision tokens are averaged in groups, as in "Token Pruning in Multimodal Large Language Models" (ACL Findings
    2025).

    window: how many tokens a group has. Groups are cut from runs of consecutive vision tokens, in the order of the
        prompt; the last of a run may be smaller. The paper pools images in two dimensions; the prompt shows one.

    A group has the position, and so the rotary angles, of its first token: our choice.
    """

    window: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_count(self, "window", self.window, "2 to halve the number of vision tokens")

    def prune(self, prompt: Prompt) -> Pruning:
        chosen = prompt.call(torch.ops.attnpack.pooled_rows, prompt.vision, prompt.mask, self.window)
        rows, group = prompt.items(chosen, 2)
        alike = prompt.graph.call_function(torch.ones_like, (group,), {"dtype": torch.float32})
        return Pruning(rows, prompt.call(torch.ops.attnpack.merge_tokens, prompt.hidden, rows, group, alike))
