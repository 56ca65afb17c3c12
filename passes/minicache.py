"""MiniCache: adjacent layers of the deeper half share the directions of their keys and values."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnpack_fx.passes.fields import checked_choice, checked_count, checked_share, share_of
from attnpack_fx.passes.merging import Merged, Merging

#: Sine of the angle between two rows from which on interpolation along the arc divides by it.
_STRAIGHT = 1e-4


@dataclass(frozen=True)
class MiniCache(Merging):
    """Merging in depth (Liu et al., NeurIPS 2024, arXiv 2405.14366).

    Row by row (one head of one token), with unit vectors u of the lower and v of the upper layer, W the angle between:

        direction = sin((1 - t) W) / sin W  u + sin(t W) / sin W  v

    and a straight line where W is so small that this is one. Each layer puts its own length back. Keys may come before
    or after rotary embedding: it turns both layers' rows alike, and the direction with them.

    Tokens are retained, kept as they are in both layers, by d, the angle of a token: the mean over its heads. The
    paper's index set is one of tokens, with one d each; to retain a token for any one head would, with many heads,
    retain most. Over the tokens of a sample,

        "distinct"  d >= d_max - gamma (d_max - d_min)    the stated intent: keep what differs most unmerged
        "literal"   d <= d_min + gamma (d_max - d_min)    the paper's formula, with d as an angle: keeps what differs
                                                          least, as a public re-implementation (xKV) does, by head

    The formula states the intent if d is a similarity. `gamma=0` retains nothing, `gamma=1` everything.

    first: share of the decoder layers before the first pair, rounded up; the paper's half. 1 merges none.
    t: where between the layers the direction lies, 0 the lower's and 1 the upper's. 0.5 is the default of the code
        that could be read (xKV); the paper's own, which has none published, is said to be 0.6.
    gamma: share of the range of d that is retained; the paper's 0.05.
    residual: tokens that come after the prompt are merged when so many have come.
    """

    first: float = 0.5
    t: float = 0.5
    gamma: float = 0.05
    retention: Literal["distinct", "literal"] = "distinct"
    residual: int = 128

    def __post_init__(self) -> None:
        checked_share(self.name, "first", self.first)
        checked_share(self.name, "t", self.t)
        checked_share(self.name, "gamma", self.gamma)
        checked_choice(self.name, "retention", self.retention, ("distinct", "literal"))
        checked_count(self.name, "residual", self.residual, 1)

    def pairs(self, count: int) -> list[tuple[int, int]]:
        return [(lower, lower + 1) for lower in range(share_of(self.first, count), count - 1, 2)]

    def due(self, rows: int, prefill: bool) -> int:
        """All of a prompt, later blocks of `residual`."""
        return rows if prefill else rows - rows % self.residual

    def merge(self, lower: Tensor, upper: Tensor) -> Merged:
        work = torch.promote_types(lower.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(x, dim=-1, dtype=work) for x in (lower, upper)]
        # Rows of zeros have no direction: they take the other layer's.
        least = torch.finfo(work).tiny
        u, v = (x.to(work) / norm.clamp(min=least)[..., None] for x, norm in zip((lower, upper), norms, strict=True))
        both = (norms[0] > 0) & (norms[1] > 0)
        # Exact for the smallest angles too, where the cosine is 1.
        angle = 2 * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))
        direction = torch.where(both[..., None], self._between(u, v, angle[..., None]), u + v)
        lower_norm, upper_norm = (norm.float() for norm in norms)
        return Merged(direction.to(lower.dtype), lower_norm, upper_norm, self._retained(angle, both))

    def _between(self, u: Tensor, v: Tensor, angle: Tensor) -> Tensor:
        """Unit rows on the arc from u to v; opposite ends have none between them, and the nearer one is taken."""
        sine = angle.sin()
        straight = sine.abs() < _STRAIGHT
        opposite = straight & (angle > 1)
        safe = torch.where(straight, 1, sine)
        near = torch.where(straight, 1 - self.t, torch.sin((1 - self.t) * angle) / safe)
        far = torch.where(straight, self.t, torch.sin(self.t * angle) / safe)
        found = torch.where(opposite, u if self.t <= 0.5 else v, near * u + far * v)
        return found / torch.linalg.vector_norm(found, dim=-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)

    def _retained(self, angle: Tensor, both: Tensor) -> Tensor:
        """Bool `[B, n]` from angles `[B, n, H]` of rows that have a direction in both layers."""
        there = both.any(-1)
        if self.gamma == 0 or angle.shape[1] == 0:
            return torch.zeros_like(there)
        distance = (angle * both).sum(-1) / both.sum(-1).clamp(min=1)
        least = distance.masked_fill(~there, torch.inf).amin(1, keepdim=True)
        most = distance.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
        if self.retention == "distinct":
            return there & (distance >= most * (1 - self.gamma) + least * self.gamma)
        return there & (distance <= least * (1 - self.gamma) + most * self.gamma)
