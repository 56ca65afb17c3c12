"""What is decoded, and under which cap."""

from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """A decoder, a prompt and a cap.

    hidden, mlp, heads, head_dim, layers: of the decoder. tokens, text: of a prompt, and those of them, the last ones,
    that are no vision tokens. dtype: torch's name of one. cap_bytes: of resident memory beyond the model. steps: timed
    decode steps of each process. rounds: processes that time the largest batch again, in
    turn with those of other contenders.
    """

    hidden: int = 2048
    mlp: int = 5504
    heads: int = 16
    head_dim: int = 128
    layers: int = 8
    tokens: int = 2048
    text: int = 32
    dtype: str = "bfloat16"
    cap_bytes: int = 1 << 29
    steps: int = 6
    rounds: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


#: A quarter of LLaVA-1.5-7B's layers, half as wide.
FULL = Case()
#: Half as wide again, a quarter as deep, an eighth of the cap. Weights this small stay in the processor's cache, and
#: what a step needs besides the cache weighs more than in many layers: ratios are rough.
QUICK = Case(hidden=1024, mlp=2752, heads=8, layers=2, cap_bytes=1 << 26, steps=6, rounds=0)
