"""A hand-written decoder with its own cat-style cache and image features: no transformers needed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = 1
Cache = list[tuple[Tensor, Tensor]]


class Layer(nn.Module):
    """Self-attention on a growing cache; `window` keeps only the newest tokens, as sliding-window layers do."""

    def __init__(self, width: int, heads: int, kv_heads: int, dim: int, window: int | None = None) -> None:
        super().__init__()
        self.dim, self.window, self.grouped = dim, window, heads != kv_heads
        self.query = nn.Linear(width, heads * dim)
        self.key = nn.Linear(width, kv_heads * dim)
        self.value = nn.Linear(width, kv_heads * dim)
        self.out = nn.Linear(heads * dim, width)

    def forward(self, hidden: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, new, _ = hidden.shape
        query, key, value = (
            project(hidden).view(batch, new, -1, self.dim).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            value = torch.cat([past[1], value], dim=2)
        total = key.shape[2]
        mask = torch.ones(new, total, dtype=torch.bool, device=hidden.device).tril(total - new)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=self.grouped)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, new, -1))
        if self.window is not None:
            return hidden, (key[:, :, -self.window :], value[:, :, -self.window :])
        return hidden, (key, value)


class Decoder(nn.Module):
    """`forward(ids, features, cache) -> (logits, cache)`; features take the places where `ids == IMAGE`.

    broken: Dynamo breaks the graph between the embeddings and the layers.
    between: called there, if set.
    """

    def __init__(
        self,
        layers: int = 2,
        width: int = 24,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 8,
        windows: tuple[int | None, ...] | None = None,
        broken: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.broken = broken
        self.between: Callable[[], None] | None = None
        self.embed = nn.Embedding(32, width)
        self.layers = nn.ModuleList(
            Layer(width, heads, kv_heads, dim, window) for window in windows or (None,) * layers
        )
        self.head = nn.Linear(width, 32)
        self.requires_grad_(False).eval()

    def forward(self, ids: Tensor, features: Tensor | None = None, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        hidden = self.embed(ids)
        if features is not None:
            hidden = hidden.masked_scatter((ids == IMAGE)[..., None].expand_as(hidden), features)
        if self.broken:
            torch._dynamo.graph_break()
        if self.between is not None:
            self.between()
        present: Cache = []
        for number, layer in enumerate(self.layers):
            hidden, pair = layer(hidden, None if cache is None else cache[number])
            present.append(pair)
        return self.head(hidden), present


def prompt(text: int = 6, vision: int = 10, width: int = 24, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids `[B, T]` with `vision` image tokens after the first two, and the features that go there."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 32, (batch, text + vision), generator=generator)
    ids[:, 2 : 2 + vision] = IMAGE
    return ids, torch.randn((batch * vision, width), generator=generator)


def next_ids(count: int = 1, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(2, 32, (batch, count), generator=torch.Generator().manual_seed(100 + seed))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance * scale
