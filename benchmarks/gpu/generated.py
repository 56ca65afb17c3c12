"""What a user runs, on the device: tiny transformers models generate through `attnpack_fx.compile` and Inductor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import attnpack_fx
from attnpack_fx import PackedTensor
from benchmarks.ahead.cases import Case
from benchmarks.gpu.apart import CallFailedError

_TOKENS = 12


@dataclass(frozen=True)
class Check:
    """rank: of the vision tokens, None: that of the setting. limit: of the logits' relative error, None: be finite.

    In 4 bits they differ by 0.05; attention that is off by a fifth makes that 0.09.
    """

    family: str
    setting: str
    rank: Literal["full"] | None = "full"
    limit: float | None = 1e-3


#: One family has a KV head for each query head, the other has groups and rotary axes.
CHECKS: Mapping[str, Check] = {
    "generate: LLaVA, rotated": Check("LLaVA", "rotated"),
    "generate: LLaVA, un-rotated": Check("LLaVA", "default"),
    "generate: Qwen2.5-VL, un-rotated": Check("Qwen2.5-VL", "default"),
    "generate: Qwen2.5-VL, 4 bits": Check("Qwen2.5-VL", "4 bits", limit=0.07),
    "generate: LLaVA, truncated": Check("LLaVA", "default", rank=None, limit=None),
}


@torch.no_grad()
def check(name: str, dry: bool, seed: int) -> dict[str, Any]:
    """Worst error of the logits. Raises CallFailedError for other tokens, or an error above the limit.

    seed: not used; models and prompts have their own.
    """
    asked = CHECKS[name]
    case = Case(asked.family, "tiny", torch.float32, asked.setting)
    policy = replace(case.policy(), strict=True)
    if asked.rank is not None:
        policy = replace(policy, vision_rank=asked.rank)
    device = "cpu" if dry else "cuda"
    torch._dynamo.reset()
    model, inputs = case.model().to(device), {key: value.to(device) for key, value in case.inputs().items()}
    # Convolutions of the vision encoder otherwise round to TF32, and may do so differently when compiled.
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected, _ = _generated(model, inputs)
        attnpack_fx.compile(model, policy=policy)
        found, cache = _generated(model, inputs)
    if not any(isinstance(layer.keys, PackedTensor) and layer.keys.segments for layer in cache.layers):
        raise CallFailedError("no layer of the cache is packed")
    if not found.isfinite().all():
        raise CallFailedError("logits are Inf or NaN")
    chosen, wanted = found.argmax(-1)[0].tolist(), expected.argmax(-1)[0].tolist()
    # From the first other token on, what they are asked differs.
    alike = next(
        (n + 1 for n, (one, other) in enumerate(zip(chosen, wanted, strict=True)) if one != other), len(wanted)
    )
    error = float((found - expected)[:, :alike].norm() / expected[:, :alike].norm())
    if asked.limit is not None and error > asked.limit:
        raise CallFailedError(f"logits differ by {error:.1e}, expected at most {asked.limit:.1e}")
    if asked.limit is not None and asked.limit < 0.01 and chosen != wanted:
        raise CallFailedError(f"token {alike} is {chosen[alike - 1]}, expected {wanted[alike - 1]}, of {_TOKENS}")
    return {"error": error, "says": f"ok, logits differ by {error:.1e}, the first {alike} tokens were compared"}


def _generated(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
    """Logits `[B, _TOKENS, vocabulary]` of greedy generation, and the cache."""
    out = model.generate(
        **inputs,
        max_new_tokens=_TOKENS,
        min_new_tokens=_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(out.logits, 1).float(), out.past_key_values
