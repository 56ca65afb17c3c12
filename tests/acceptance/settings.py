"""What the acceptance grid runs on every family: a new method of the catalogue is in it by itself.

`METHODS` is the one table of what has to be known of a method; where it changes nothing, tests/compositions.py says.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnpack_fx import PackPolicy, Partial
from attnpack_fx.passes.asap import ASAP
from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.catalogue import METHODS as CATALOGUE
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
from attnpack_fx.passes.scissorhands import Scissorhands
from attnpack_fx.passes.streaming_llm import StreamingLLM
from attnpack_fx.ranks import PUBLISHED, UNROTATED
from tests.acceptance import promises
from tests.acceptance.families import FAMILIES, LAYERS, Family
from tests.acceptance.promises import OUTLIER, SCALES, Shape, Step
from tests.compositions import MEMBERS

#: Tokens that a cell generates.
NEW_TOKENS = 10
#: Of layers whose tokens a policy leaves as they are: in decode steps, and at prefill, which knows its vision tokens.
PREFILL = "the policy leaves this layer dense"
NOTHING = "no vision tokens are known here and text_rank is None"
#: Of layers with a sliding window, beside methods.
SLIDING = "sliding window"
#: Of vision tokens at default options, the mean of what keys and values have: no family here is narrower than either.
DEFAULT = (UNROTATED + PUBLISHED) // 2
#: A calibrated policy's share of the dense bytes of the prompt.
CALIBRATED = 1 / 8
#: Families whose decoder is another's: what is packed is seen there, and here that tokens are found and left out.
_SAME_DECODER = ("qwen2-vl", "internvl")
OWN_DECODER = tuple(name for name in FAMILIES if name not in _SAME_DECODER)
#: Grouped attention with padding, M-RoPE, sliding windows: where settings run of which the other families would repeat
#: what their other cells show, and in turn methods that change nothing.
KINDS = ("llava-gqa-padded", "qwen2.5-vl", "gemma3")
#: Where methods that prune tokens change nothing: what they give the later layers is then all there was.
OFF_PRUNED = ("llava-gqa-padded", "qwen2-vl", "qwen2.5-vl")
#: Where several methods act at once: there, where graphs are a layer each, and in the fast cells.
COMPOSED = ("llava-mha", "qwen3-vl", *KINDS)
#: Where plans are made: multi-head attention, sliding windows, text alone, and where they cannot be.
CALIBRATED_FAMILIES = ("llava-mha", "qwen3-vl", "gemma3", "llama")


@dataclass(frozen=True)
class Knowledge:
    """Of one method. used: its default, or where that does nothing to a cache this small, the nearest that does.

    promise: what it makes of a layer's bytes. rank: of the tokens beside it, where it acts on low-rank factors.
    """

    used: Method
    promise: Step
    rank: int | None = None


def _gear_bits(shape: Shape) -> float:
    # Integers with scales of groups of 64 at most, a value's of one head, a key's of tokens, the last short;
    # outliers, rounded to pairs of a vector; residual factors of rank 4, and room for those of a second block.
    tokens = shape.vision + shape.text
    scales = (1 / min(64, shape.dim) + math.ceil(tokens / 64) / tokens) / 2 * SCALES
    outliers = sum(2 * round(0.02 * size / 2 + 0.5) / size for size in (tokens, shape.width)) / 2 * OUTLIER
    residual = 4 * (tokens + 2 * shape.dim) / (tokens * shape.dim) * 32
    return 2 + scales + outliers + residual


def _kivi_waits(rows: int) -> tuple[int, int]:
    # Keys for a whole block of 128; of values the newest 128, and the rest of 32.
    return rows % 128, min(rows, 128 + 31)


def _none_waits(rows: int) -> tuple[int, int]:
    return 0, 0


def _kvquant_bits(shape: Shape) -> float:
    return 4 + SCALES / shape.dim + 0.01 * OUTLIER


_METHODS = (
    Knowledge(Quantize(), promises.factors(4), rank=64),
    Knowledge(KIVI(), promises.codes(lambda shape: 2 + SCALES / 32, _kivi_waits)),
    Knowledge(KVQuant(), promises.codes(_kvquant_bits, _none_waits, cosines=True)),
    Knowledge(GEAR(), promises.codes(_gear_bits, _none_waits)),
    Knowledge(H2O(), promises.budget(lambda tokens: math.ceil(0.2 * tokens))),
    Knowledge(Scissorhands(), promises.budget(lambda tokens: math.ceil(0.5 * tokens))),
    # 512 recent tokens, the default, are more than these prompts have.
    Knowledge(StreamingLLM(recent=64), promises.budget(lambda tokens: 4 + 64)),
    Knowledge(RandomEviction(0.5), promises.budget(lambda tokens: math.ceil(0.5 * tokens))),
    Knowledge(AVL(), promises.prune(lambda vision: math.ceil(0.5 * vision), 0)),
    # Of three layers the default, the third on, would leave one; 128 tokens are the other of ASAP's published budgets.
    # Beside the published rank.
    Knowledge(FastV(1), promises.prune(lambda vision: round(0.5 * vision), 1), rank=64),
    Knowledge(ASAP(1, keep=128), promises.prune(lambda vision: 128, 1), rank=64),
    Knowledge(RandomPrune(1), promises.prune(lambda vision: round(0.5 * vision), 1), rank=64),
    Knowledge(Pool(1), promises.prune(lambda vision: math.ceil(vision / 2), 1), rank=64),
    # Of three layers the default, half of them rounded up, leaves only one.
    Knowledge(MiniCache(first=1 / 3), promises.merge(1, retained=0.05)),
)
METHODS: dict[type[Method], Knowledge] = {type(known.used): known for known in _METHODS}
#: Where a method changes nothing, by its type.
OFF: dict[type[Method], Method] = {type(each.method): each.off for each in MEMBERS if each.method and each.off}


@dataclass(frozen=True)
class Setting:
    """One column of the grid.

    policy: of a family; None for one that is calibrated on the model.
    promise: of a shape, the most bytes that its layers may hold for a sample; None where nothing is promised.
    exact: whether tokens and logits are those of the dense model. families: on which it runs. methods: in use.
    refused: families -> a word of the NotImplementedError that says why they cannot have it.
    """

    name: str
    policy: Callable[[Family], PackPolicy] | None
    promise: Callable[[Shape], float] | None
    exact: bool = False
    families: tuple[str, ...] = OWN_DECODER
    methods: tuple[type[Method], ...] = field(default=())
    refused: Mapping[str, str] = field(default_factory=dict)

    def acts(self, stage: Stage) -> bool:
        return any(stage in METHODS[method].used.stages for method in self.methods)

    def unpruned(self, family: Family) -> str | None:
        """A word of the reason why token pruning is left out in a family, which must then be reported; else None."""
        return family.unpruned if self.acts(Stage.TOKENS) else None

    def unmerged(self, family: Family) -> str | None:
        """The same of merging."""
        return family.unmerged if self.acts(Stage.MERGE) else None

    def dense(self, family: Family) -> dict[int, str]:
        """Layers that stay dense in a family -> a word of the reason, which must be reported."""
        if self.policy is None:
            return dict.fromkeys(family.windows, PREFILL)  # plans know no windows
        policy = self.policy(family)
        apart = bool(policy.passes) or policy.partial is not None
        dense = dict.fromkeys(family.windows, SLIDING) if apart else {}
        if any(not method.stages <= {Stage.TOKENS} for method in policy.passes):
            return dense
        if policy.text_rank is not None or (family.vision and policy.vision_rank is not None):
            return dense
        # Nothing packs a token; layers that some tokens do not reach say which they have.
        pruned = [method.layer for method in policy.passes if not self.unpruned(family)]
        return dict.fromkeys(range(min(pruned, default=LAYERS)), NOTHING) | dense


def _ranked(rank: Any, **options: Any) -> Callable[[Family], PackPolicy]:
    """The rank is the vision tokens', and in a family without any, the text's."""

    def policy(family: Family) -> PackPolicy:
        ranks = {"vision_rank": rank} if family.vision else {"vision_rank": None, "text_rank": rank}
        return PackPolicy(**(ranks | options), strict=True)

    return policy


def _low_rank(rank: int | None, *methods: Method, unrotated: bool = True) -> Callable[[Shape], float]:
    """Promise of a rank with methods, in the order of their stages."""
    ordered = sorted(methods, key=lambda method: min(method.stages))

    def promise(shape: Shape) -> float:
        start = promises.ranks(rank, None if shape.vision else rank, unrotated)
        left_out = {Stage.TOKENS: not shape.pruned, Stage.MERGE: not shape.merged}
        acting = [each for each in ordered if not any(left_out.get(stage) for stage in each.stages)]
        return promises.promised(shape, start, [METHODS[type(each)].promise for each in acting])

    return promise


def _alone(known: Knowledge) -> Iterator[Setting]:
    method = known.used
    kind, name, prunes = type(method), method.name, method.stages == {Stage.TOKENS}
    yield Setting(
        name,
        _ranked(known.rank, passes=(method,)),
        _low_rank(known.rank, method),
        families=tuple(FAMILIES) if prunes else OWN_DECODER,
        methods=(kind,),
    )
    off: Any = "full" if known.rank else None
    turn = KINDS[_METHODS.index(known) % len(KINDS)]
    yield Setting(
        f"{name}, off",
        lambda family: PackPolicy(vision_rank=off, text_rank=off, passes=(OFF[kind],), strict=True),
        None,
        exact=True,
        families=OFF_PRUNED if prunes else (turn,),
        methods=(kind,),
    )


def _together(rank: int | None, *methods: Method) -> Setting:
    kinds = tuple(type(method) for method in methods)
    name = " + ".join(([f"rank {rank}"] if rank else []) + [method.name for method in methods])
    return Setting(name, _ranked(rank, passes=methods), _low_rank(rank, *methods), families=COMPOSED, methods=kinds)


def _general() -> Iterator[Setting]:
    def default(shape: Shape) -> float:
        return promises.promised(shape, promises.ranks(DEFAULT), [])

    def full(shape: Shape) -> float:
        return promises.promised(shape, promises.ranks(shape.width, shape.width), [])

    def folding(shape: Shape) -> float:
        return promises.promised(shape, promises.ranks(DEFAULT, 16), [promises.fold(4, 2)])

    def calibrated(shape: Shape) -> float:
        packed = promises.dense(shape) * (shape.vision + shape.text) / shape.tokens * CALIBRATED
        # Beside the factors: cosines and sines, places, and the later tokens with room.
        rest = Shape(shape.layers, shape.heads, shape.dim, 0, 0, shape.new)
        beside = (2 * shape.dim * promises.NUMBER + promises.PLACE) * (shape.vision + shape.text)
        return packed + promises.promised(rest, promises.ranks(None), []) + beside

    everywhere = tuple(FAMILIES)
    yield Setting("default options", lambda family: PackPolicy(strict=True), default, families=everywhere)
    lossless = PackPolicy(vision_rank="full", text_rank="full", strict=True)
    yield Setting("full rank", lambda family: lossless, full, exact=True, families=everywhere)
    yield Setting("rank 8, rotated", _ranked(8, key_space="rotated"), _low_rank(8, unrotated=False), families=KINDS)
    yield Setting("rank 8, un-rotated", _ranked(8, key_space="unrotated"), _low_rank(8))
    yield Setting("folds", lambda family: PackPolicy(text_rank=16, fold_every=4, recent=2, strict=True), folding)
    partial = _ranked(64, partial=Partial(regroup_every=4))
    yield Setting("Partial", partial, _low_rank(64), families=KINDS)
    # Plans are by layer, and Qwen3-VL's prefill is a graph a layer, without a number.
    yield Setting("calibrated", None, calibrated, families=CALIBRATED_FAMILIES, refused={"qwen3-vl": "number"})


def _settings() -> Iterator[Setting]:
    yield from _general()
    for method in CATALOGUE:
        if method in METHODS:
            yield from _alone(METHODS[method])
    yield _together(64, FastV(1), H2O(), Quantize())
    yield _together(None, KIVI(), StreamingLLM(recent=64))
    yield _together(64, AVL(), Quantize())
    yield _together(None, MiniCache(first=1 / 3), KIVI())
    yield _together(None, ASAP(1, keep=128), KVQuant())
    yield _together(8, H2O(), Quantize(4, target=("coefficients", "bases", "tail"), recent=16))


SETTINGS: Mapping[str, Setting] = {setting.name: setting for setting in _settings()}
#: Every cell of the grid, family by family, so that what one family shares is made once.
GRID = tuple((family, name) for family in FAMILIES for name, each in SETTINGS.items() if family in each.families)


def tested() -> tuple[tuple[str, str], ...]:
    """The cells that run in the tests: what acts alone on three of its families in turn, what acts together on the
    first and two more in turn, pruning that changes nothing on one; all else on all. `python -m tests.acceptance` has
    the others."""
    alone = [name for name, each in SETTINGS.items() if len(each.methods) == 1 and not each.exact]
    together = [name for name, each in SETTINGS.items() if len(each.methods) > 1]
    first, *others = COMPOSED
    pairs = list(itertools.combinations(others, 2))
    chosen = {name: each.families for name, each in SETTINGS.items()}
    chosen |= {name: chosen[name][turn % 2 :: 2][:3] for turn, name in enumerate(alone)}
    chosen |= {name: (first, *pairs[turn % len(pairs)]) for turn, name in enumerate(together)}
    pruning = [name for name, each in SETTINGS.items() if each.exact and each.families == OFF_PRUNED]
    chosen |= {name: (OFF_PRUNED[turn % len(OFF_PRUNED)],) for turn, name in enumerate(pruning)}
    return tuple((family, name) for family, name in GRID if family in chosen[name])


def fast() -> tuple[tuple[str, str], ...]:
    """A few cells of one family that shows all: default options, and several methods at once, of every stage."""
    family = next(name for name, each in FAMILIES.items() if each.vision and each.unpruned is None)
    names, seen = ["default options"], set[Stage]()
    for setting in SETTINGS.values():
        stages = {stage for method in setting.methods for stage in METHODS[method].used.stages}
        if len(setting.methods) > 1 and not stages <= seen:
            seen |= stages
            names.append(setting.name)
    return tuple((family, name) for name in names)
