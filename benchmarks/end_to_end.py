"""A decoder decodes with its cache held in several ways: same weights, same tokens, same cache contents.

Caches are filled directly, so no long prefill runs. Every contender decodes the same given tokens, in turn
with the others, and its logits are compared with those of the uncompiled model on a dense cache.
"""

import copy
import gc
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache

import attnpack_fx
from attnpack_fx import PackedTensor, PackPolicy, cache_bytes
from benchmarks import measure

#: Steps before timing: the cache is packed on the first; after three, every size that changes was seen.
WARMUP = 4
OURS = "attnpack"
_EAGER = "dense, eager"
#: What results are compared with, and what they are compared for.
REQUIRED = (_EAGER, OURS)
_VOCABULARY = 512


@dataclass(frozen=True)
class Case:
    """A decoder and a cache. The defaults are one layer of LLaVA-1.5-7B.

    rank: of keys and values, or "full"; unless full, the cache contents have half of it, so nothing is lost.
    """

    batch: int = 8
    tokens: int = 4096
    dtype: torch.dtype = torch.float32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    rank: tuple[int, int] | Literal["full"] = (64, 64)
    layers: int = 1
    hidden: int = 4096
    mlp: int = 11008


@dataclass
class Contender:
    """A model, perhaps compiled, and its cache. exact: whether it must give the dense model's logits."""

    model: torch.nn.Module
    cache: Cache
    dense: bool
    exact: bool
    step: int = 0
    logits: Tensor | None = None

    def decode(self, tokens: Tensor, steps: int) -> None:
        """Feed the next `steps` columns of tokens `[B, all steps]`, one at a time."""
        for _ in range(steps):
            column = tokens[:, self.step : self.step + 1]
            self.logits = self.model(input_ids=column, past_key_values=self.cache, use_cache=True).logits
            self.step += 1


@torch.no_grad()
def run(
    case: Case,
    steps: int,
    rounds: int,
    tell: Callable[[str], None] = lambda _: None,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Decode `steps` tokens a round with each contender in turn; tokens per second, cache bytes and ratios.

    tell: called with a line of text whenever a contender is ready or does not run.
    only: names of the contenders that take part; all unless given. Those of `REQUIRED` always do.

    Raises RuntimeError when logits differ between contenders, or when our cache is not packed while timed.
    """
    torch._dynamo.reset()
    model = _model(case)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(_VOCABULARY, (case.batch, WARMUP + steps * (1 + rounds)), generator=generator)
    skipped: dict[str, str] = {}
    contenders: dict[str, Contender] = {}
    # Contenders share forward's code, which must not count as one function recompiled too often.
    with torch._dynamo.config.patch(recompile_limit=64):
        for name, make in _makers(case, model, tokens.shape[1]).items():
            if only is not None and name not in (*only, *REQUIRED):
                continue
            try:
                contender = make()
            except ImportError as error:
                skipped[name] = " ".join(str(error).split())
                tell(f"{name}: does not run here: {skipped[name]}")
                continue
            contender.decode(tokens, WARMUP)
            contenders[name] = contender
            gc.collect()
            measure.release_free_memory()
            tell(f"{name}: ready, cache {cache_bytes(contender.cache) / 1e6:.1f} MB")
        _check_packed(contenders[OURS].cache)
        errors = _errors(contenders, case)

        graphs = counters["stats"]["unique_graphs"]

        def decode(contender: Contender) -> Callable[[], None]:
            return lambda: contender.decode(tokens, steps)

        turns = {name: decode(each) for name, each in contenders.items()}
        measure.in_turn(turns, 1)  # Not timed: it takes back the memory that was released.
        timed = measure.in_turn(turns, rounds)
        compiled = counters["stats"]["unique_graphs"] - graphs
    _check_packed(contenders[OURS].cache)
    last_errors = _errors(contenders, case)

    seconds = {name: measure.summary([sample / steps for sample in timed[name]]) for name in contenders}
    speed = {name: case.batch / seconds[name]["median"] for name in contenders}
    fastest = max((name for name, each in contenders.items() if each.dense), key=lambda name: speed[name])
    return {
        **asdict(case),
        "dtype": str(case.dtype).removeprefix("torch."),
        "steps": steps,
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "seconds": seconds,
        "tokens_per_second": speed,
        "bytes": {name: cache_bytes(each.cache) for name, each in contenders.items()},
        "error": {name: max(errors[name], last_errors[name]) for name in contenders},
        "skipped": skipped,
        "graphs_compiled_while_timed": compiled,
        "fastest_dense": fastest,
        "speedup": speed[OURS] / speed[fastest],
    }


def _model(case: Case) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.mlp,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        vocab_size=_VOCABULARY,
        max_position_embeddings=1 << 20,
        attn_implementation="sdpa",
        dtype=case.dtype,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(case.dtype).eval()


def _makers(case: Case, model: LlamaForCausalLM, new_tokens: int) -> dict[str, Callable[[], Contender]]:
    """What makes each contender, in the order of their warm-up.

    The static cache comes first: a size that changed under one cache, Dynamo expects to change under all.
    """
    config = model.config

    def twin() -> LlamaForCausalLM:
        """Another module with the same weights, to be compiled on its own."""
        return copy.copy(model)

    def inductor() -> LlamaForCausalLM:
        compiled = twin()
        compiled.compile()
        return compiled

    def static() -> Contender:
        cache = StaticCache(config=config, max_cache_len=case.tokens + new_tokens)
        # Just enough room: attention reads all of it at every step.
        _fill(cache, case)
        return Contender(inductor(), cache, dense=True, exact=True)

    def dynamic(compiled: bool) -> Contender:
        cache = DynamicCache(config=config)
        _fill(cache, case)
        return Contender(inductor() if compiled else twin(), cache, dense=True, exact=True)

    def quantizing(backend: str, compiled: bool) -> Contender:
        cache = QuantizedCache(backend, config)
        _fill(cache, case)
        return Contender(inductor() if compiled else twin(), cache, dense=False, exact=False)

    def ours() -> Contender:
        policy = PackPolicy(text_rank=case.rank, key_space="rotated", strict=True)
        cache = DynamicCache(config=config)
        _fill(cache, case)
        return Contender(attnpack_fx.compile(twin(), policy=policy), cache, dense=False, exact=True)

    return {
        "static, Inductor": static,
        "dense, Inductor": lambda: dynamic(True),
        _EAGER: lambda: dynamic(False),
        OURS: ours,
        "fp8, eager": lambda: quantizing("fp8", False),
        "fp8, Inductor": lambda: quantizing("fp8", True),
        "quanto 4 bit, eager": lambda: quantizing("quanto", False),
        "hqq 4 bit, eager": lambda: quantizing("hqq", False),
    }


def _fill(cache: Cache, case: Case) -> None:
    """Put the same random tokens into a cache, layer by layer: only one layer is held twice at any time."""
    widest = min(case.tokens, case.kv_heads * case.head_dim)
    key_rank, value_rank = (widest, widest) if case.rank == "full" else (case.rank[0] // 2, case.rank[1] // 2)
    for layer in range(case.layers):
        generator = torch.Generator().manual_seed(2 + layer)
        shape = case.batch, case.kv_heads, case.tokens, case.head_dim
        key = measure.low_rank(*shape, key_rank, case.dtype, generator)
        value = measure.low_rank(*shape, value_rank, case.dtype, generator)
        cache.update(key, value, layer)


def _check_packed(cache: Cache) -> None:
    for number, layer in enumerate(cache.layers):
        for held in (layer.keys, layer.values):
            if not isinstance(held, PackedTensor) or not held.segments:
                raise RuntimeError(f"layer {number} of our cache is not packed, it holds a {type(held).__name__}")


def _errors(contenders: dict[str, Contender], case: Case) -> dict[str, float]:
    """Difference of each contender's last logits from the dense model's, as a part of the largest logit."""
    expected = contenders[_EAGER]
    errors = {}
    for name, contender in contenders.items():
        assert contender.step == expected.step and contender.logits is not None and expected.logits is not None
        errors[name] = measure.difference(contender.logits, expected.logits)
        if contender.exact and not errors[name] <= measure.TOLERANCE[case.dtype]:
            raise RuntimeError(f"{name}: logits differ from the dense model's by {errors[name]:.1e} of their scale")
    return errors
