"""Tokens and logits of a `PackedGenerator` and of a model's own `generate`, side by side."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.export import PackedGenerator


def of_model(model: Any, inputs: Mapping[str, Any], tokens: int = 32) -> tuple[Tensor, Tensor]:
    """Greedy tokens `[B, T + new]` and logits `[B, new, V]`."""
    with torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return made.sequences, torch.stack(made.logits, 1).float()


def of_artefact(generator: PackedGenerator, inputs: Mapping[str, Any], tokens: int = 32) -> tuple[Tensor, Tensor]:
    """The same of an artefact."""
    logits: list[Tensor] = []

    def recorded(run: Any) -> Any:
        def running(*args: Any) -> dict[str, Tensor]:
            made = run(*args)
            logits.append(made["logits"][:, -1].float().cpu())
            return made

        return running

    sessions = [generator.sessions[name] for name in ("prefill", "decode")]
    try:
        for session in sessions:
            session.run = recorded(session.run)  # type: ignore[method-assign]
        made = generator.generate(**inputs, max_new_tokens=tokens, eos_token_id=())
    finally:
        for session in sessions:
            del session.run
    return made, torch.stack(logits, 1)


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = 1e-4) -> None:
    """Same tokens, and logits that differ by at most `tolerance` of the largest.

    Where the two most likely tokens are no further apart than that, either may come; after it nothing is compared.
    """
    bound = tolerance * float(expected[1].abs().max())
    steps = expected[1].shape[1]
    made, wanted = actual[0][:, -steps:], expected[0][:, -steps:]
    for sample in range(len(wanted)):
        differ = (made[sample] != wanted[sample]).nonzero()
        same = int(differ[0]) if len(differ) else steps
        # The step whose token differs has still seen the same tokens before it.
        until = min(same + 1, steps)
        assert (actual[1][sample, :until] - expected[1][sample, :until]).abs().max() <= bound
        if same < steps:
            first, second = expected[1][sample, same].topk(2).values.tolist()
            assert first - second <= 2 * bound, f"sample {sample} differs from token {same} on"
