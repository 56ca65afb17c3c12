"""Operations of prefill where fewer tokens flow through later layers, counted on the graph that runs.

    python -m benchmarks.prefill_flops                         # LLaVA-1.5-7B, -13B, LLaVA-NeXT-7B
    python -m benchmarks.prefill_flops --out prefill_flops.json

A decoder with the layers, tokens and ratios of the model named, its widths divided by `SCALE`, is compiled with the
backend; while the rewritten graph runs op by op, `torch.utils.flop_counter.FlopCounterMode` counts matrix products and
attention, those inside the methods' own operators too. Embedding, vision tower and head are left out. With T tokens,
T' behind layer K, width d and MLP width m, two operations a multiplication,

    layer(T) = 2 T (4 d^2 + 3 d m) + 4 T^2 d         attention as a full square, as the counter has it
    prefill  = K layer(T) + (L - K) layer(T') + what the method itself multiplies, `own`

must equal the count exactly. The share at full width is that formula's, where T d^2 outweighs T^2 d by as much as in
the model.

paper: the published share. paper's formula: what reproduces published totals for LLaVA-1.5-7B (3.817 T without pruning)
and LLaVA-NeXT-7B (20.825 T) to their last digit: image tokens alone, no layer in full, one operation a multiplication,

    L [ T (4 d^2 + 3 d m) + 2 T^2 d ]

so it leaves out the text, and the first K layers, which see every token.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from attnpack_fx import PackPolicy, attnpack_backend, backend
from attnpack_fx.kernels import aten
from attnpack_fx.passes.asap import ASAP
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.pool import Pool
from attnpack_fx.passes.random_prune import RandomPrune
from attnpack_fx.passes.token_pruning import TokenPruning
from benchmarks import measure

SCALE = 32
#: Text around the image: a system prompt of 35 tokens and a question.
TEXT, BEFORE = 64, 35
_IMAGE, _VOCABULARY = 1, 32


@dataclass(frozen=True)
class Shape:
    """A decoder and the image tokens of its prompt."""

    name: str
    layers: int
    width: int
    mlp: int
    heads: int
    vision: int

    @property
    def tokens(self) -> int:
        return self.vision + TEXT

    def scaled(self, factor: int) -> "Shape":
        return replace(self, width=self.width // factor, mlp=self.mlp // factor, heads=max(1, self.heads // factor))


LLAVA = Shape("LLaVA-1.5-7B", 32, 4096, 11008, 32, 576)
LLAVA_13B = Shape("LLaVA-1.5-13B", 40, 5120, 13824, 40, 576)
NEXT = Shape("LLaVA-NeXT-7B", 32, 4096, 11008, 32, 2880)

#: Shape, method, and the published share of operations that are left.
ROWS: tuple[tuple[Shape, TokenPruning, float | None], ...] = (
    (LLAVA, FastV(2, ratio=0.5), None),
    (LLAVA, FastV(3, ratio=0.5), 0.57),
    (LLAVA, FastV(2, ratio=0.75), None),
    (LLAVA, ASAP(2, keep=128), 0.836 / 3.817),
    (LLAVA, RandomPrune(2, ratio=0.5), None),
    (LLAVA, Pool(2, window=2), None),
    (LLAVA_13B, FastV(2, ratio=0.5), None),
    (LLAVA_13B, ASAP(2, keep=192), 0.319),
    (LLAVA_13B, ASAP(2, keep=128), 0.209),
    (NEXT, FastV(2, ratio=0.5), None),
    (NEXT, ASAP(2, keep=960), None),
    (NEXT, ASAP(2, keep=640), 4.144 / 20.825),
)


def kept(shape: Shape, method: TokenPruning) -> int:
    """Vision tokens that stay."""
    match method:
        case FastV(ratio=ratio) | RandomPrune(ratio=ratio):
            return round((1 - ratio) * shape.vision)
        case ASAP(keep=keep):
            return shape.vision if keep is None else min(keep, shape.vision)
        case Pool(window=window):
            return -(-shape.vision // window)
    raise NotImplementedError(f"kept: got {method.name}, expected FastV, RandomPrune, ASAP or Pool; add its formula")


def own(shape: Shape, method: TokenPruning) -> int:
    """Operations of the method itself: a row of scores; or scores of all pairs, and cosines of those that are kept."""
    match method:
        case FastV():
            return 2 * shape.tokens * shape.width
        case ASAP():
            return 2 * shape.tokens**2 * shape.width + 2 * kept(shape, method) ** 2 * shape.width
    return 0


def layer(shape: Shape, tokens: int) -> int:
    """Operations of one decoder layer."""
    products = 4 * shape.width**2 + 3 * shape.width * shape.mlp
    return 2 * tokens * products + 4 * tokens**2 * shape.width


def closed_form(shape: Shape, method: TokenPruning | None) -> int:
    """Operations of prefill."""
    if method is None:
        return shape.layers * layer(shape, shape.tokens)
    fewer = kept(shape, method) + TEXT
    behind = (shape.layers - method.layer) * layer(shape, fewer)
    return method.layer * layer(shape, shape.tokens) + behind + own(shape, method)


def papers_formula(shape: Shape, vision: int) -> int:
    """Image tokens alone, in every layer, one operation a multiplication."""
    return shape.layers * layer(shape, vision) // 2


class _Opened(TorchDispatchMode):
    """Shows the modes below what the package's operators do inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "attnpack":
            return getattr(aten, func._schema.name.removeprefix("attnpack::"))(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


#: The counter knows attention on devices alone.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


@cache
@torch.no_grad()
def counted(shape: Shape, method: TokenPruning | None) -> int:
    """Operations that the rewritten graph runs."""
    flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)

    def compiled(module: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        policy = PackPolicy(vision_rank=None, passes=() if method is None else (method,), strict=True)
        run = attnpack_backend(module, examples, options={"policy": policy})

        def count(*arguments: Any) -> Any:
            with flops, _Opened():
                return run(*arguments)

        return count

    torch._dynamo.reset()
    decoder = Decoder(shape)
    with mock.patch.object(backend, "_inductor", lambda module, examples, patches: module):
        torch.compile(decoder, backend=compiled, fullgraph=True)(*prompt(shape))
    return int(flops.get_total_flops())


def prompt(shape: Shape) -> tuple[Tensor, ...]:
    """Ids `[1, T]`, features of the image tokens, cos and sin."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, _VOCABULARY, (1, shape.tokens), generator=generator)
    ids[:, BEFORE : BEFORE + shape.vision] = _IMAGE
    features = torch.randn((shape.vision, shape.width), generator=generator)
    pairs = shape.width // shape.heads // 2
    angle = torch.arange(shape.tokens)[:, None] * 1e4 ** (-torch.arange(pairs) / pairs)
    angle = torch.cat([angle, angle], -1)[None]
    return ids, features, angle.cos(), angle.sin()


class Decoder(nn.Module):
    """LLaMA's decoder layers: `forward(ids, features, cos, sin) -> (hidden, cache)`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(_VOCABULARY, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))

    def forward(self, ids: Tensor, features: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, list[Any]]:
        hidden = self.embed(ids)
        hidden = hidden.masked_scatter((ids == _IMAGE)[..., None].expand_as(hidden), features)
        cache = []
        for each in self.layers:
            hidden, pair = each(hidden, cos, sin)
            cache.append(pair)
        return hidden, cache


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.query, self.key, self.value, self.out = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(shape.width, shape.mlp, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.mlp, shape.width, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = F.rms_norm(hidden, hidden.shape[-1:])
        batch, tokens, width = x.shape
        query, key, value = (
            project(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        x = F.rms_norm(hidden, hidden.shape[-1:])
        return hidden + self.down(F.silu(self.gate(x)) * self.up(x)), (key, value)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def run(shape: Shape, method: TokenPruning, paper: float | None) -> dict[str, Any]:
    """One row; raises RuntimeError where the count is not the closed form."""
    small = shape.scaled(SCALE)
    dense, found = counted(small, None), counted(small, method)
    for name, count, formula in (
        ("dense", dense, closed_form(small, None)),
        (method.name, found, closed_form(small, method)),
    ):
        if count != formula:
            raise RuntimeError(f"{shape.name}, {name}: counted {count} operations, expected {formula}")
    return {
        "model": shape.name,
        "method": repr(method),
        "layers": shape.layers,
        "tokens": shape.tokens,
        "vision_tokens": shape.vision,
        "kept": kept(shape, method),
        "counted": found,
        "counted_dense": dense,
        "counted_share": found / dense,
        "own": own(small, method),
        "full_width": closed_form(shape, method),
        "full_width_share": closed_form(shape, method) / closed_form(shape, None),
        "papers_formula_share": papers_formula(shape, kept(shape, method)) / papers_formula(shape, shape.vision),
        "paper": paper,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Shares of dense prefill, in per cent."""
    head = ("kept", "counted", "full width", "paper's formula", "paper")
    lines = [" " * 60 + "".join(name.rjust(17) for name in head)]
    for each in results:
        name = f"{each['model']}, {each['method']}"
        shares = (each["counted_share"], each["full_width_share"], each["papers_formula_share"], each["paper"])
        shown = "".join(("" if share is None else f"{100 * share:.1f} %").rjust(17) for share in shares)
        lines.append(name.ljust(60) + f"{each['kept']} / {each['vision_tokens']}".rjust(17) + shown)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every count, and with what it was made")
    given = parser.parse_args(arguments)
    rows = [run(*row) for row in ROWS]
    print(f"widths divided by {SCALE}; shares of prefill without pruning")
    print(table(rows))
    if given.out:
        result = {**measure.environment(), "scale": SCALE, "prefill_flops": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
