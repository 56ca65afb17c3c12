"""Decoders of published shapes with random weights, their prompts, and the ways to hold their cache.

Only the language model is built: its cache is what is measured. The vocabulary is small, since the output layer is the
same work for all contenders; vision positions are stated with `attnpack_fx.modality`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache

import attnpack_fx
from attnpack_fx import PackedTensor
from benchmarks import measure
from benchmarks.gpu.layers import Layout
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import Result, WrongResultError
from benchmarks.gpu.timing import spread

DTYPE = torch.bfloat16
RANK = 64
#: Steps before timing: the cache is packed before the first, after three every size that changes was seen, and CUDA
#: graphs are recorded on the second or third.
WARMUP = 5
#: Tokens of one sample, and samples.
SAMPLE_STEPS, SAMPLES = 16, 5
DRY_SAMPLE_STEPS, DRY_SAMPLES = 2, 1
OURS, EAGER, STATIC, INDUCTOR = CONTENDERS = (
    "attnpack",
    "DynamicCache, eager",
    "StaticCache, CUDA graphs",
    "DynamicCache, Inductor",
)
_VOCABULARY = 2048


@dataclass(frozen=True)
class Decoder:
    """The language model of a vision-language model."""

    name: str
    family: str
    hidden: int
    layers: int
    layout: Layout
    mlp: int

    @property
    def token_bytes(self) -> int:
        """Of one token in a dense cache, all layers."""
        return 2 * self.layers * self.layout.width * DTYPE.itemsize


def _decoder(name: str, family: str, hidden: int, layers: int, heads: int, kv_heads: int, mlp: int) -> Decoder:
    return Decoder(name, family, hidden, layers, Layout(name, heads, kv_heads, 128), mlp)


DECODERS = (
    _decoder("LLaVA-1.5-7B", "llama", 4096, 32, 32, 32, 11008),
    _decoder("LLaVA-1.5-13B", "llama", 5120, 40, 40, 40, 13824),
    _decoder("Qwen2.5-VL-7B", "qwen2", 3584, 28, 28, 4, 18944),
    _decoder("Qwen3-VL-8B", "qwen3", 4096, 36, 32, 8, 12288),
)
DRY_DECODERS = (Decoder("tiny", "llama", 64, 1, Layout("tiny", 4, 2, 16), 96),)


@dataclass(frozen=True)
class Prompt:
    """Text, then vision tokens, then text again."""

    name: str
    before: int
    vision: int
    after: int

    @property
    def tokens(self) -> int:
        return self.before + self.vision + self.after

    def mask(self, device: torch.device) -> Tensor:
        """Bool `[1, T]`, True for vision tokens."""
        position = torch.arange(self.tokens, device=device)[None]
        return (position >= self.before) & (position < self.before + self.vision)


#: 50 text tokens, 35 of them before the image, as LLaVA-1.5's template has it.
PROMPTS = (Prompt("1 image", 35, 576, 15), Prompt("16 images", 35, 16 * 256, 15))
DRY_PROMPTS = (Prompt("1 image", 3, 120, 5),)


#: The model built last, and only that: the next needs its memory.
_kept: dict[tuple[Decoder, torch.device], PreTrainedModel] = {}


def build(decoder: Decoder, device: torch.device) -> PreTrainedModel:
    """The model on the device, kept until another is asked for."""
    if (decoder, device) not in _kept:
        _kept.clear()
        _kept[decoder, device] = _built(decoder, device)
    return _kept[decoder, device]


def _built(decoder: Decoder, device: torch.device) -> PreTrainedModel:
    config = AutoConfig.for_model(
        decoder.family,
        hidden_size=decoder.hidden,
        intermediate_size=decoder.mlp,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.layout.heads,
        num_key_value_heads=decoder.layout.kv_heads,
        head_dim=decoder.layout.head_dim,
        vocab_size=_VOCABULARY,
        max_position_embeddings=1 << 17,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()


@dataclass
class Contender:
    """A model, how its prompt is read, and its cache. prefill, decode: perhaps compiled, of the same weights."""

    prefill_model: torch.nn.Module
    decode_model: torch.nn.Module
    new_cache: Callable[[], Cache]
    mask: Tensor | None = None
    graphs: bool = False
    cache: Cache | None = None
    logits: Tensor | None = None

    def prefill(self, ids: Tensor) -> None:
        """Read a prompt `[B, T]` into a new cache; the one before is let go first."""
        self.cache = None
        self.cache = self.new_cache()
        if self.mask is None:
            self._forward(self.prefill_model, ids)
            return
        with attnpack_fx.modality(self.mask):
            self._forward(self.prefill_model, ids)

    def decode(self, ids: Tensor) -> None:
        """Feed the columns of ids `[B, steps]` one at a time."""
        for column in ids.split(1, dim=1):
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            self._forward(self.decode_model, column)

    def _forward(self, model: torch.nn.Module, ids: Tensor) -> None:
        out = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.logits = out.logits


def contenders(
    model: PreTrainedModel, decoder: Decoder, prompt: Prompt, steps: int, dry: bool
) -> Mapping[str, Callable[[], Contender]]:
    """What makes each contender for a prompt and `steps` new tokens.

    dry: peers are captured, and not compiled further, which takes long on a CPU.
    """
    backend = "eager" if dry else "inductor"

    def twin() -> Any:
        """Another module with the same weights, to be compiled on its own."""
        return copy.copy(model)

    def compiled(mode: str | None = None) -> Any:
        other = twin()
        other.compile(backend=backend, mode=mode)
        return other

    def growing() -> Cache:
        return DynamicCache(config=model.config)

    def ours() -> Contender:
        packing = attnpack_fx.compile(twin(), vision_rank=rank(decoder), key_space="rotated", strict=True)
        return Contender(packing, packing, growing, mask=prompt.mask(model.device))

    def static() -> Contender:
        # Just enough room: attention reads all of it at every step.
        def fixed() -> Cache:
            return StaticCache(config=model.config, max_cache_len=prompt.tokens + steps)

        return Contender(twin(), compiled("reduce-overhead"), fixed, graphs=True)

    def inductor() -> Contender:
        both = compiled()
        return Contender(both, both, growing)

    return {
        OURS: ours,
        EAGER: lambda: Contender(twin(), twin(), growing),
        STATIC: static,
        INDUCTOR: inductor,
    }


def rank(decoder: Decoder) -> int:
    """64, or less for the tiny models of a dry run, whose keys have fewer columns."""
    return min(RANK, decoder.layout.width // 4)


@contextmanager
def alone(machine: Machine) -> Iterator[None]:
    """A contender's turn: what those before left behind, compiled code with its CUDA graphs too, goes first."""
    torch._dynamo.reset()
    counters.clear()
    machine.release()
    machine.reset_peak()
    # Contenders share forward's code, which must not count as one function recompiled too often.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    machine.release()


def time_decode(machine: Machine, contender: Contender, ids: Tensor) -> Result:
    """Warm up, then decode the columns of ids `[B, WARMUP + steps]`, one sample after another."""
    steps = DRY_SAMPLE_STEPS if machine.dry else SAMPLE_STEPS
    contender.decode(ids[:, :WARMUP])
    graphs = counters["stats"]["unique_graphs"]
    samples = [
        machine.clock.seconds(partial(contender.decode, part)) / part.shape[1]
        for part in ids[:, WARMUP:].split(steps, 1)
    ]
    seconds = spread(samples)
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": ids.shape[0] / seconds["median"],
        "graphs_compiled_while_timed": counters["stats"]["unique_graphs"] - graphs,
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


def new_tokens(machine: Machine) -> int:
    """Columns `time_decode` takes."""
    return WARMUP + (DRY_SAMPLE_STEPS * DRY_SAMPLES if machine.dry else SAMPLE_STEPS * SAMPLES)


def random_ids(model: PreTrainedModel, batch: int, tokens: int, machine: Machine) -> Tensor:
    """Token ids `[B, T]`; the same for every contender."""
    random = torch.Generator(machine.device).manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, tokens), generator=random, device=machine.device)


def packed_error(model: PreTrainedModel, contender: Contender, ids: Tensor) -> float:
    """Decode the tokens ids `[B, 1]` once more, and on the uncompiled model with the first sample's cache decompressed.

    Returns the difference of the first sample's logits as a part of the largest. Truncation is in both, so what is left
    is rounding, which grows with the root of the depth. Raises WrongResultError when it is more, or when a layer is not
    packed.
    """
    assert contender.cache is not None
    first = torch.zeros(1, dtype=torch.int64, device=ids.device)
    dense = DynamicCache(config=model.config)
    for number, layer in enumerate(contender.cache.layers):
        for held in (layer.keys, layer.values):
            if not isinstance(held, PackedTensor) or not held.segments:
                raise WrongResultError(f"layer {number} of our cache is not packed, it holds a {type(held).__name__}")
        dense.update(layer.keys.samples(first).dense(), layer.values.samples(first).dense(), number)
    contender.decode(ids)
    assert contender.logits is not None
    expected = model(input_ids=ids[:1], past_key_values=dense, use_cache=True, logits_to_keep=1).logits
    error = measure.difference(contender.logits[:1], expected)
    if not error <= measure.TOLERANCE[DTYPE] * len(dense.layers) ** 0.5:
        raise WrongResultError(f"logits differ from those on the decompressed cache by {error:.1e} of their scale")
    return error


def disturbances(results: Mapping[str, Result]) -> list[str]:
    """What makes times of `time_decode` other than they should be, a sentence each."""
    lines = [
        f"Mind: graphs were compiled while timing {name}."
        for name, case in results.items()
        if case["graphs_compiled_while_timed"]
    ]
    return lines + [
        f"Mind: Inductor used no CUDA graph for a part of {name}."
        for name, case in results.items()
        if STATIC in name and case["cudagraph_skips"]
    ]


def weight_bytes(model: torch.nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())
