"""What holds of every composition of methods, whichever they are; shared by a test of all pairs and a benchmark.

Dynamo captures the calls of a model once and each policy rewrites what it captured, which is what a backend does
anyway; only graphs over caches packed in another form are captured anew. Rewritten graphs run op by op.
"""

import copy
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attnpack_fx import PackPolicy, PolicyError, backend
from attnpack_fx.passes.asap import ASAP
from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.catalogue import METHODS
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.gear import GEAR
from attnpack_fx.passes.h2o import H2O
from attnpack_fx.passes.kivi import KIVI
from attnpack_fx.passes.kvquant import KVQuant
from attnpack_fx.passes.method import Method, Stage
from attnpack_fx.passes.minicache import MiniCache
from attnpack_fx.passes.pool import Pool
from attnpack_fx.passes.quantize import Quantize
from attnpack_fx.passes.random_eviction import RandomEviction
from attnpack_fx.passes.random_prune import RandomPrune
from attnpack_fx.passes.row_coding import Kind, RowCoding
from attnpack_fx.passes.scissorhands import Scissorhands
from attnpack_fx.passes.streaming_llm import StreamingLLM
from benchmarks import accounting
from tests.zoo import ZOO

MODELS = ("llava-mha", "qwen2.5-vl", "llama")
NEW_TOKENS = 12
TOLERANCE = 1e-4
#: The rank that loses nothing.
_FULL: Any = "full"
_LAYERS = 3
_KINDS: tuple[Kind, Kind] = ("key", "value")
#: Bytes that a composition may have on top of its cheapest member: a basis costs the same however few tokens share it,
#: at these sizes as much as the codes of a prompt; merged layers keep the tokens that differ most as they are.
_ALLOWED = ("bases", "text bases", "retained")


@dataclass(frozen=True)
class Member:
    """What a composition is made of, at small sizes.

    method: as used, off: where it changes nothing; None for what policy fields say alone. rank: of all tokens where it
    needs low-rank factors, else None.
    """

    name: str
    method: Method | None
    off: Method | None
    rank: int | None = None


_LOW_RANK = 2
MEMBERS = (
    Member("low rank", None, None, _LOW_RANK),
    Member("Quantize", Quantize(4), Quantize(((None, 0),)), _LOW_RANK),
    Member("Quantize, tail", Quantize(4, group=16, target="tail", recent=2), Quantize(target="tail", recent=1000)),
    Member("KIVI", KIVI(2, group=4, residual=4), KIVI(residual=1024)),
    Member("KVQuant", KVQuant(4, residual=4), KVQuant(8, outliers=1.0, residual=1000)),
    Member("GEAR", GEAR(2, group=4, rank=1, flush_rank=1, residual=4), GEAR(8, outliers=1.0, residual=1000)),
    Member("H2O", H2O(0.5, every=4), H2O(1.0)),
    Member("Scissorhands", Scissorhands(0.5, recent=4), Scissorhands(1.0)),
    Member("StreamingLLM", StreamingLLM(2, recent=10, every=4), StreamingLLM(recent=1000)),
    Member("RandomEviction", RandomEviction(0.5, every=4), RandomEviction(1.0)),
    Member("AVL", AVL(text_rate=0.4, text_least=4), AVL(1.0, 1.0)),
    Member("FastV", FastV(1), FastV(1, ratio=0.0)),
    Member("ASAP", ASAP(1, keep=5, threshold=0.5), ASAP(1, keep=None, threshold=1.0)),
    Member("RandomPrune", RandomPrune(1), RandomPrune(1, ratio=0.0)),
    Member("Pool", Pool(1), Pool(1, window=1)),
    Member("MiniCache", MiniCache(first=1 / 3, residual=4), MiniCache(first=1.0)),
)
assert {type(member.method) for member in MEMBERS if member.method} == set(METHODS), "a method is missing here"

Composition = tuple[Member, ...]


def policy(members: Composition, off: bool = False) -> PackPolicy:
    """All members together; raises PolicyError where they cannot be."""
    ranks = [member.rank for member in members if member.rank is not None]
    rank: Any = None if not ranks else _FULL if off else min(ranks)
    methods = tuple(member.off if off else member.method for member in members)
    passes = tuple(method for method in methods if method is not None)
    return PackPolicy(vision_rank=rank, text_rank=rank, passes=passes, strict=True)


def legal(count: int) -> list[Composition]:
    """Every composition of `count` members that a policy allows."""
    return [each for each in itertools.combinations(MEMBERS, count) if refusal(each) is None]


def refusal(members: Composition) -> str | None:
    """Why a policy does not allow them together."""
    try:
        policy(members)
    except PolicyError as error:
        return str(error)
    return None


def triples(count: int, seed: int = 0) -> list[Composition]:
    """Some of the legal ones."""
    return random.Random(seed).sample(legal(3), count)


@dataclass(frozen=True)
class Result:
    """sequences int64 `[1, T]`, logits `[steps, 1, V]`, and the bytes of the cache: `accounting.by_kind` of it."""

    sequences: Tensor
    logits: Tensor
    held: dict[str, int]

    @property
    def numbers(self) -> int:
        """Bytes that stand for numbers of keys and values."""
        return sum(size for kind, size in self.held.items() if kind in accounting.NUMBERS)


class Subject:
    """One model, on which compositions are run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._model = _with_layers(ZOO[name].build("sdpa"))
        self._inputs = ZOO[name].inputs(1, 0)
        self._policy = PackPolicy()
        self._results: dict[PackPolicy, Result] = {}
        self.dense = self._generated()
        self._model.compile(backend=self._backend)

    def run(self, chosen: PackPolicy) -> Result:
        """Generate `NEW_TOKENS` with a policy."""
        self._policy = chosen
        with (
            mock.patch.dict(os.environ, TRANSFORMERS_DISABLE_TORCH_CHECK="1"),
            mock.patch.object(backend, "_inductor", lambda module, examples, patches: module),
            torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6),
        ):
            self._results[chosen] = self._generated()
        return self._results[chosen]

    def result(self, chosen: PackPolicy) -> Result:
        """Of an earlier run with this policy, or a first one."""
        if chosen not in self._results:
            self.run(chosen)
        return self._results[chosen]

    def waiting(self, members: Composition) -> int:
        """Bytes that dense rows take, at most, which wait until there are enough of them to be coded."""
        config = self._model.config.get_text_config()
        row = config.num_key_value_heads * config.hidden_size // config.num_attention_heads * 4
        codings = [member.method for member in members if isinstance(member.method, RowCoding)]
        rows = sum(
            next(count for count in itertools.count() if method.due(kind, count, False)) - 1
            for method in codings
            if Stage.ROWS in method.stages
            for kind in _KINDS
        )
        return _LAYERS * rows * row

    def _backend(self, module: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        made: dict[PackPolicy, Callable[..., Any]] = {}
        context = torch._guards.TracingContext.get()

        def call(*arguments: Any) -> Any:
            if self._policy not in made:
                with torch._guards.tracing(context):
                    made[self._policy] = backend.attnpack_backend(module, examples, options={"policy": self._policy})
            return made[self._policy](*arguments)

        return call

    def _generated(self) -> Result:
        out = self._model.generate(
            **self._inputs,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            max_new_tokens=NEW_TOKENS,
        )
        tensors = [each for layer in out.past_key_values.layers for each in (layer.keys, layer.values)]
        return Result(out.sequences, torch.stack(out.logits), accounting.by_kind(tensors))


def _with_layers(model: Any) -> Any:
    """With a third decoder layer, so that there are layers to merge behind the first that sees fewer tokens."""
    config = model.config.get_text_config()
    layers = model.get_decoder().layers
    while len(layers) < _LAYERS:
        layer = copy.deepcopy(layers[0])
        layer.self_attn.layer_idx = len(layers)
        for parameter in layer.parameters():
            parameter.data = parameter.data.flip(0)  # other weights, just as likely
        layers.append(layer)
    config.num_hidden_layers = _LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[0]] * _LAYERS
    return model


def failures(subject: Subject, members: Composition, off: bool = True) -> list[str]:
    """What does not hold of a composition on a model, in words; empty where all does.

    off: whether to look at the members where they change nothing, too.
    """
    try:
        return [*_wrong(subject, members), *(_not_off(subject, members) if off else ())]
    except Exception as error:  # whatever it is, it is what a user would get
        return [f"raises {error!r}"]


def _wrong(subject: Subject, members: Composition) -> Iterator[str]:
    first, second = (subject.run(policy(members)) for _ in range(2))
    if not first.logits.isfinite().all():
        yield "logits are not finite"
    if not torch.equal(first.sequences, second.sequences) or not torch.equal(first.logits, second.logits):
        yield "two runs differ"
    if first.held != second.held:
        yield f"two runs hold {first.held} and {second.held} bytes"
    alone = {member.name: subject.result(policy((member,))).numbers for member in members}
    cheapest = min(alone, key=lambda name: alone[name])
    left_out = sum(first.held.get(kind, 0) for kind in _ALLOWED)
    allowed = subject.waiting(members)
    if first.numbers - left_out > alone[cheapest] + allowed:
        yield (
            f"holds numbers in {first.numbers - left_out} bytes, {cheapest} alone in {alone[cheapest]}, and at most "
            f"{allowed} wait to be coded"
        )


def _not_off(subject: Subject, members: Composition) -> Iterator[str]:
    result, dense = subject.run(policy(members, off=True)), subject.dense
    scale = dense.logits.abs().max()
    error = float((result.logits - dense.logits).abs().max() / scale)
    if not error <= TOLERANCE or not torch.equal(result.sequences, dense.sequences):
        yield f"with every member off, logits differ from dense ones by {error:.1e} of their scale"


def names(members: Sequence[Member]) -> str:
    return " + ".join(member.name for member in members)
