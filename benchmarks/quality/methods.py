"""Every method that is compared, and with which settings it comes to a given part of the dense cache's bytes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import attnpack_fx
from attnpack_fx import (
    ASAP,
    AVL,
    GEAR,
    H2O,
    KIVI,
    FastV,
    KVQuant,
    Linear,
    MiniCache,
    PackPolicy,
    Partial,
    Pool,
    Quantize,
    RandomEviction,
    RandomPrune,
    Scissorhands,
    StreamingLLM,
)
from attnpack_fx.passes.method import Method
from attnpack_fx.passes.storage import KeySpace

#: Dense bytes over counted bytes at which methods are compared, where they get there; the middle first.
TARGETS = (16, 8, 32, 4, 2)
#: What calibrated policies are asked for besides.
CALIBRATED = (16, 48, 32, 8, 64)
_BITS = 16  # of a number of the dense cache
#: Of the bytes that are asked for: what a plan comes to rounds up a little from prompt to prompt.
_WITHIN = 0.998
_RECENT = 32
_TAIL = ("coefficients", "bases", "tail")


class UnreachableError(Exception):
    """Why a method does not come to so few bytes."""


@dataclass
class Shape:
    """The prompt's cache. width: `H * D`. vision, text: tokens."""

    layers: int
    width: int
    vision: int
    text: int

    @property
    def tokens(self) -> int:
        return self.vision + self.text

    def rank(self, target: float, bits: int = _BITS, text_bits: float = _BITS, beside: float = 0) -> int:
        """The rank of keys and values of vision tokens at which everything comes to 1 / target of the dense bytes.

        beside: the share of the dense bytes that is taken by what is neither.
        """
        left = self.tokens * self.width * _BITS * (1 / target - beside) - self.text * self.width * text_bits
        rank = int(left / ((self.vision + self.width) * bits))
        if rank < 1:
            raise UnreachableError(
                f"the text tokens alone, {self.text} of {self.tokens}, at {text_bits:g} bits of {_BITS}, leave no room "
                f"at 1/{target:g}"
            )
        return min(rank, self.width)

    def share(self, target: float, bits: float = _BITS) -> float:
        """The share of all tokens, at so many bits a number, that comes to 1 / target."""
        return min(1.0, _BITS / bits / target)


@dataclass
class Study:
    """A model's cache, and calibration of its policies, which is kept.

    samples: prompts to calibrate with. beside: bytes of one prompt that a budget does not count, as a share of its
    dense bytes: places of tokens, and of keys that are stored un-rotated cos and sin.
    """

    model: Any
    shape: Shape
    samples: Callable[[], list[dict[str, Any]]]
    beside: Callable[[KeySpace], float]
    found: dict[tuple[float, str], PackPolicy] = field(default_factory=dict)

    def calibrated(self, target: float, prefer: Any = "fidelity") -> PackPolicy:
        if (target, prefer) not in self.found:
            found = self._fitted(target, prefer, "unrotated")
            if not _turns(found):
                # It holds no cos and sin, so that there is room for more.
                more = self._fitted(target, prefer, "rotated")
                found = found if _turns(more) else more
            self.found[target, prefer] = found
        return self.found[target, prefer]

    def _fitted(self, target: float, prefer: Any, space: KeySpace) -> PackPolicy:
        budget = _WITHIN / target - self.beside(space)
        return attnpack_fx.calibrate(self.model, self.samples(), budget=budget, text=True, prefer=prefer)


def _turns(policy: PackPolicy) -> bool:
    """Whether any layer's keys are stored before rotary embedding."""
    return any(layer.key_space == "unrotated" for layer in policy.layers or ())


@dataclass(frozen=True)
class Candidate:
    """target: what its bytes are to come to, None for settings of its own. make: raises UnreachableError."""

    group: str
    name: str
    target: int | None
    make: Callable[[Study], PackPolicy]
    #: Whether a quick run has it too.
    quick: bool = False
    #: How many times as many contexts it gets, for a narrower interval.
    weight: int = 1


def candidates() -> Iterator[Candidate]:
    """All: those first that the claims rest on, then one of each kind in turn, so that a run cut short has of all."""
    yield from _calibrated()
    kinds = (_composed, _released, _quantization, _eviction, _control, _published, _pruning, _pairs)
    for row in itertools.zip_longest(*(kind() for kind in kinds)):
        yield from filter(None, row)


def _calibrated() -> Iterator[Candidate]:
    for target in CALIBRATED:
        make = lambda study, target=target: study.calibrated(target)  # noqa: E731
        # Losses of a tenth of a point take many contexts to be seen.
        weight = 24 if target == 16 else 6
        yield Candidate("ours, calibrated", f"1/{target}", target, make, target == 16, weight)
    yield Candidate("ours, calibrated", "1/16, for speed", 16, lambda study: study.calibrated(16, "speed"))


def _low_rank(target: int, bits: int, text_bits: float, *methods: Method, **fields: Any) -> Callable[..., PackPolicy]:
    def make(study: Study) -> PackPolicy:
        rank = study.shape.rank(target, bits, text_bits, study.beside(fields["key_space"]))
        return PackPolicy(vision_rank=rank, passes=methods, **fields)

    return make


def _composed() -> Iterator[Candidate]:
    four = Quantize(4, target=_TAIL, recent=0)
    for target in TARGETS:
        yield Candidate(
            "ours, composed",
            "low rank, all in 4 bits",
            target,
            # A scale of 32 bits for 32 numbers of a row.
            _low_rank(target, 4, 5, four, key_space="unrotated"),
            quick=target == 16,
        )
    for target in (16, 8, 32):
        yield Candidate(
            "ours, composed",
            "low rank, half evicted, all in 4 bits",
            target,
            _low_rank(target, 4, 5, four, H2O(0.5, target="vision"), key_space="unrotated"),
        )


def _published() -> Iterator[Candidate]:
    group, half = "AttentionPack, as published", H2O(0.5, target="vision")
    for rank in (16, 32, 64, 128):
        plain = {"vision_rank": rank, "key_space": "rotated"}
        yield _fixed(group, f"rank {rank}", PackPolicy(**plain))
        if rank in (16, 64):
            yield _fixed(group, f"rank {rank}, partial", PackPolicy(**plain, partial=Partial()))
            yield _fixed(group, f"rank {rank} (E)", PackPolicy(**plain, passes=(half,)))
            yield _fixed(group, f"rank {rank}, 4 bit", PackPolicy(**plain, passes=(Quantize(4),)))
            yield _fixed(group, f"rank {rank}, 4 bit (E)", PackPolicy(**plain, passes=(Quantize(4), half)))
    yield _fixed(group, "ranks 16 to 128", PackPolicy(vision_rank=Linear(16, 128), key_space="rotated"))
    for target in TARGETS:
        yield Candidate(group, "rank by bytes", target, _low_rank(target, _BITS, _BITS, key_space="rotated"))


def _released() -> Iterator[Candidate]:
    group = "AttentionPack, as released"
    # Groups are made once, at prefill.
    partial = Partial(momentum=0.5, regroup_every=10**6)
    for rank in (16, 32, 64):
        yield _fixed(group, f"rank {rank}", PackPolicy(vision_rank=rank, key_space="unrotated"), quick=rank == 16)
    yield _fixed(group, "rank 64, partial", PackPolicy(vision_rank=64, key_space="unrotated", partial=partial))
    for target in TARGETS:
        yield Candidate(group, "rank by bytes", target, _low_rank(target, _BITS, _BITS, key_space="unrotated"))


def _quantization() -> Iterator[Candidate]:
    methods: dict[str, Method] = {}
    for bits in (8, 4, 2):
        methods[f"Quantize, {bits} bit"] = Quantize(bits, target="tail", recent=_RECENT)
    for bits in (4, 2):
        methods[f"KIVI, {bits} bit"] = KIVI(bits, residual=_RECENT)
    for bits in (4, 2):
        methods[f"KVQuant, {bits} bit"] = KVQuant(bits, residual=_RECENT)
    for bits in (4, 2):
        methods[f"GEAR, {bits} bit"] = GEAR(bits, residual=_RECENT)
    for name, method in methods.items():
        yield _fixed("quantization", name, _dense(method))
    yield _fixed("merging", "MiniCache", _dense(MiniCache(residual=_RECENT)))


def _eviction() -> Iterator[Candidate]:
    # What a head notes of every token it keeps, a place and a score, is no more than so much.
    rules: dict[str, Callable[[float], Method]] = {
        "H2O": lambda share: H2O(share * 0.96),
        "Scissorhands": lambda share: Scissorhands(share * 0.96),
        "StreamingLLM": lambda share: StreamingLLM(recent=share * 0.96),
    }
    for target in TARGETS:
        for name, rule in rules.items():
            yield Candidate(
                "eviction",
                name,
                target,
                lambda study, target=target, rule=rule: _dense(rule(study.shape.share(target))),
                quick=name == "H2O" and target == 16,
            )
        yield Candidate("eviction", "A-VL", target, lambda study, target=target: _dense(_avl(study.shape, target)))


def _control() -> Iterator[Candidate]:
    for target in TARGETS:
        yield Candidate(
            "control",
            "random eviction",
            target,
            lambda study, target=target: _dense(RandomEviction(study.shape.share(target) * 0.97)),
        )


def _avl(shape: Shape, target: float) -> AVL:
    kept = (shape.tokens / target - shape.text) / shape.vision
    if kept <= 0:
        raise UnreachableError(f"the text tokens alone are {shape.text} of {shape.tokens}, more than 1/{target:g}")
    return AVL(kept=kept, core=0.8 * kept)


def _pruning() -> Iterator[Candidate]:
    def pruned(make: Callable[[float, Shape], Method], target: int) -> Callable[[Study], PackPolicy]:
        def policy(study: Study) -> PackPolicy:
            shape = study.shape
            # Layers from the second on hold so many of the vision tokens.
            left = (shape.tokens * (shape.layers / target - 1) / (shape.layers - 1) - shape.text) / shape.vision
            if left <= 0:
                raise UnreachableError(
                    f"the first of {shape.layers} layers keeps all tokens: 1/{target} is out of reach"
                )
            return _dense(make(left, shape))

        return policy

    rules: dict[str, tuple[str, Callable[[float, Shape], Method]]] = {
        "FastV": ("token pruning", lambda left, shape: FastV(layer=1, ratio=1 - left)),
        "ASAP": ("token pruning", lambda left, shape: ASAP(layer=1, keep=round(left * shape.vision))),
        "random pruning": ("control", lambda left, shape: RandomPrune(layer=1, ratio=1 - left)),
        "pooling": ("control", lambda left, shape: Pool(layer=1, window=max(2, round(1 / left)))),
    }
    for name, (group, make) in rules.items():
        for target in (2, 4):
            yield Candidate(group, name, target, pruned(make, target))


def _pairs() -> Iterator[Candidate]:
    group = "pairs"
    tail = Quantize(4, target="tail", recent=_RECENT)
    for target in (16, 8, 32, 4):
        for name, bits, method in (
            ("H2O, 4 bit", 5, tail),
            ("H2O, KIVI 2 bit", 3.5, KIVI(2, residual=_RECENT)),
        ):
            yield Candidate(
                group,
                name,
                target,
                lambda study, target=target, bits=bits, method=method: _dense(
                    H2O(study.shape.share(target, bits) * 0.9), method
                ),
            )
        yield Candidate(
            group,
            "low rank, H2O",
            target,
            _low_rank(target, _BITS, _BITS, H2O(0.5, target="vision"), key_space="unrotated"),
        )
    for target in (16, 8, 4):
        yield Candidate(
            group, "FastV, low rank", target, _low_rank(target, _BITS, _BITS, FastV(layer=2), key_space="unrotated")
        )
        yield Candidate(
            group,
            "A-VL, low rank",
            target,
            _low_rank(target, _BITS, _BITS, AVL(), key_space="unrotated"),
        )
    yield _fixed(group, "FastV, 4 bit", _dense(FastV(layer=1), tail))
    yield _fixed(group, "MiniCache, 4 bit", _dense(MiniCache(residual=_RECENT), tail))


def _dense(*methods: Method) -> PackPolicy:
    """The methods without low rank."""
    return PackPolicy(vision_rank=None, passes=methods)


def _fixed(group: str, name: str, policy: PackPolicy, quick: bool = False) -> Candidate:
    return Candidate(group, name, None, lambda study: policy, quick)
