"""The memory table of AttentionPack (CVPR 2026, arXiv 2603.23914), counted on caches that the backend packed.

    python -m benchmarks.memory                                # every row
    python -m benchmarks.memory --out memory.json --dtype bf16 --only 64/64

For each row a decoder with the heads of the model named, attention only and a narrow hidden size (which the cache does
not show), is compiled with the backend and prefills one prompt; then what is alive is counted, as `cache_bytes` does.
Layers are alike, so two are run: the second adds what a layer costs, the first what all layers share besides, the
placement of the tokens and, for keys before rotary embedding, cos and sin. A model of L layers holds the shared part
once and a layer's part L times. Where the deeper half of the layers is merged two by two, four are run.

closed form: what the paper's figures follow, see `closed_form`. The numbers of text tokens are fitted to the paper:
one on LLaVA-1.5-7B, where it then predicts all other rows, and one each on QwenVL-Chat and Video-LLaVA. besides: all
that is counted and that the closed form does not know; it accounts for the difference to the byte.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnpack_fx import PackedTensor, PackPolicy, attnpack_backend
from attnpack_fx.methods import to_mapping
from attnpack_fx.passes.method import Stage
from attnpack_fx.passes.storage import Columns, LayerPlan, Stored
from attnpack_fx.taking_back import settle
from benchmarks import accounting, measure
from benchmarks.memory_rows import ROWS, Model, Row, closed_form

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_HIDDEN = 160
_IMAGE, _VOCABULARY = 1, 32

#: Kinds of bytes that `closed_form` knows: of packed text the basis alone, which has the `Tt H D` numbers it counts.
_IN_CLOSED_FORM = ("coefficients", "bases", "text bases", "codes", "dense", "retained")

Cache = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def run(row: Row, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    """Count one row; all sizes in bytes.

    counted: of the whole model, layers alike but for merged ones. full: the dense cache of the same tokens, counted
    alike. ratio: full over counted. besides: what `closed_form` does not count, by kind.

    Raises RuntimeError where the cache is not packed as the row says, or where bytes are left without a name.
    """
    stack = Stack(row.model, 4 if _merges(row) else 2).to(dtype).eval()
    prompt = _prompt(row, dtype)
    dense = stack(*prompt)[1]
    held = _packed(stack, prompt, row) if row.ranks or row.methods else dense
    full, kinds = (sum(_of_model(dense, row.model.layers).values()), _of_model(held, row.model.layers))
    counted = sum(kinds.values())
    besides = {kind: size for kind, size in kinds.items() if kind not in _IN_CLOSED_FORM}
    if _merges(row):
        besides["retained tokens"] = counted - sum(besides.values()) - closed_form(row)
    if counted != closed_form(row) + sum(besides.values()):
        raise RuntimeError(f"{row.model.name}, {row.name}: {counted} bytes are not {closed_form(row)} and {besides}")
    return {
        "name": row.name,
        "model": row.model.name,
        "layers": row.model.layers,
        "layers_run": len(held),
        "vision_tokens": row.vision,
        "text_tokens": row.text,
        "key_space": "unrotated" if row.unrotated else "rotated",
        "methods": [to_mapping(method) for method in row.methods],
        "paper": row.paper,
        "paper_unit": row.unit,
        "closed_form": closed_form(row),
        "counted": counted,
        "full": full,
        "ratio": full / counted,
        "besides": besides,
        "difference_per_cent": 100 * (counted / closed_form(row) - 1),
    }


def _merges(row: Row) -> bool:
    return any(Stage.MERGE in method.stages for method in row.methods)


def _packed(stack: "Stack", prompt: tuple[Tensor, ...], row: Row) -> Cache:
    torch._dynamo.reset()
    compiled = torch.compile(stack, backend=attnpack_backend, options={"policy": policy(row)})
    cache = compiled(*prompt)[1]
    settle(chain.from_iterable(cache))
    for key, value in cache:
        _check(key, row, row.ranks[0] if row.ranks else 0, row.unrotated)
        _check(value, row, row.ranks[1] if row.ranks else 0, False)
    return cache


def policy(row: Row) -> PackPolicy:
    """What packs a cache as the row says."""
    space = "unrotated" if row.unrotated else "rotated"
    if not row.bits:
        text = row.text_rank or None
        return PackPolicy(vision_rank=row.ranks, text_rank=text, key_space=space, passes=row.methods, strict=True)
    assert row.ranks is not None
    key, value = (Columns(((rank, row.bits),)) for rank in row.ranks)
    text = Columns(((row.text, row.text_bits),)) if row.text_bits else None
    plan = LayerPlan(Stored(key, value), None if text is None else Stored(text, text), space)
    return PackPolicy(layers=(plan,) * 2, strict=True)


def _check(tensor: Tensor, row: Row, rank: int, unrotated: bool) -> None:
    wanted = ({"vision": rank} if rank else {}) | ({"text": row.text_rank} if row.text_rank else {})
    if not isinstance(tensor, PackedTensor) or tensor.ranks != wanted:
        raise RuntimeError(f"{row.model.name}, {row.name}: expected packed {wanted}, got {tensor!r}")
    if (tensor.held.angles is not None) != unrotated:
        raise RuntimeError(f"{row.model.name}, {row.name}: expected keys before rotary embedding: {unrotated}")


def _of_model(cache: Cache, layers: int) -> dict[str, int]:
    """Bytes by kind of a model with so many layers, of two of its layers; of four where the last two are merged.

    Then a model has as many layers that are not.
    """
    counts = [Counter(accounting.by_kind(chain.from_iterable(cache[:count]))) for count in (1, 2, len(cache))]
    one, two, all_ = ({kind: count[kind] for kind in counts[-1] | counts[0]} for count in counts)
    merged = len(cache) > 2
    alone = layers // 2 if merged else layers
    found = {kind: one[kind] + (alone - 1) * (two[kind] - one[kind]) for kind in one}
    if merged:
        found = {kind: size + layers // 4 * (all_[kind] - two[kind]) for kind, size in found.items()}
    return {kind: size for kind, size in found.items() if size}


def _prompt(row: Row, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Ids `[1, T]` with the vision tokens after two thirds of the text, their features, cos and sin."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, _VOCABULARY, (1, row.vision + row.text), generator=generator)
    before = 2 * row.text // 3
    ids[:, before : before + row.vision] = _IMAGE
    features = torch.randn((row.vision, _HIDDEN), generator=generator).to(dtype)
    angles = _angles(row, before)
    return ids, features, angles.cos().to(dtype), angles.sin().to(dtype)


def _angles(row: Row, before: int) -> Tensor:
    """`[1, T, D]`, of one position per token or, with a grid, of axes that take turns in the frequencies as Qwen3-VL's
    do."""
    tokens, pairs = row.vision + row.text, row.model.head_dim // 2
    place = torch.arange(tokens)
    positions = place.expand(3, -1).clone()
    if row.grid is not None:
        inside = torch.arange(row.vision)
        image = torch.stack([torch.zeros_like(inside), inside // row.grid[1], inside % row.grid[1]])
        positions[:, before : before + row.vision] = before + image
    frequency = 1e6 ** (-torch.arange(pairs) / pairs)
    angle = positions[torch.arange(pairs) % 3].T * frequency
    return torch.cat([angle, angle], -1)[None]


class Stack(nn.Module):
    """Decoder layers of attention alone: `forward(ids, features, cos, sin) -> (hidden, cache)`."""

    def __init__(self, model: Model, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(_VOCABULARY, _HIDDEN)
        self.layers = nn.ModuleList(_Layer(model) for _ in range(layers))

    def forward(self, ids: Tensor, features: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Cache]:
        hidden = self.embed(ids)
        hidden = hidden.masked_scatter((ids == _IMAGE)[..., None].expand_as(hidden), features)
        cache: Cache = []
        for layer in self.layers:
            hidden, pair = layer(hidden, cos, sin)
            cache.append(pair)
        return hidden, cache


class _Layer(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.dim, self.grouped = model.head_dim, model.heads != model.kv_heads
        self.query = nn.Linear(_HIDDEN, model.heads * model.head_dim)
        self.key = nn.Linear(_HIDDEN, model.width)
        self.value = nn.Linear(_HIDDEN, model.width)
        self.out = nn.Linear(model.heads * model.head_dim, _HIDDEN)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, tokens, _ = hidden.shape
        query, key, value = (
            project(hidden).view(batch, tokens, -1, self.dim).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)
        return hidden + self.out(attended.transpose(1, 2).reshape(batch, tokens, -1)), (key, value)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rows as text: paper, closed form and counted in the paper's unit."""
    head = ("model", "row", "Tv", "Tt", "paper", "closed form", "counted", "difference", "ratio", "besides, in KB")
    lines = [head, *(_line(result) for result in results)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in (0, 1, 9) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(result: dict[str, Any]) -> tuple[str, ...]:
    megabytes = result["paper_unit"] == "MB" or result["paper"] is None

    def shown(size: float) -> str:
        return f"{size / 1e6:.2f} MB" if megabytes else f"{result['full'] / size:.3f}x"

    paper = "" if result["paper"] is None else f"{result['paper']} {result['paper_unit']}".replace(" x", "x")
    besides = ", ".join(f"{name} {size / 1e3:.1f}" for name, size in result["besides"].items())
    return (
        result["model"],
        result["name"],
        str(result["vision_tokens"]),
        str(result["text_tokens"]),
        paper,
        shown(result["closed_form"]),
        shown(result["counted"]),
        f"{result['difference_per_cent']:+.3f} %",
        f"{result['ratio']:.3f}x",
        besides,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every count, and on what it was made")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16", help="of model and cache (fp16)")
    parser.add_argument("--only", metavar="TEXT", default="", help="rows whose model or name has this in it")
    given = parser.parse_args(arguments)
    rows = [row for row in ROWS if given.only in f"{row.model.name} {row.name}"]
    if not rows:
        names = sorted({row.name for row in ROWS})
        parser.error(f"--only: got {given.only!r}, expected a part of a model or row; rows: {', '.join(names)}")
    result: dict[str, Any] = {**measure.environment(), "dtype": given.dtype}
    result["memory"] = [run(row, DTYPES[given.dtype]) for row in rows]
    print(f"{given.dtype}; two layers of each model run, four where layers are merged; MB = 1e6 bytes")
    print(table(result["memory"]))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
