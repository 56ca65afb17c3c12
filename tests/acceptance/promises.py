"""How many bytes a setting promises to hold at most, computed from shapes alone.

The closed form follows a layer through the stages of its methods: which tokens are stored, in which form, in how many
bits. It is an upper bound, but for rounding a close one: what counts beside the numbers themselves (scales, places,
spare rows of a tail that grows) stands here with its own size, nothing is multiplied by a margin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

NUMBER = 4  # bytes; all models here are fp32
_BITS = 8 * NUMBER
#: A scale and a zero point of a group, in the model's dtype.
SCALES = 2 * _BITS
#: A number that is kept as it is, and its place.
OUTLIER = 2 * _BITS
#: The position of a token, 8 bytes, and its observed attention, 4; of every head, where heads keep tokens of their own.
PLACE = 12
#: Which groups a coded row is in: of keys, of values, of residuals.
_GROUP = 12


@dataclass(frozen=True)
class Shape:
    """Of one sample's cache: decoder layers that are packed, heads, channels, tokens of the prompt and later ones.

    pruned: whether tokens can be left out of prefill here; merged: whether layers can share what they hold.
    """

    layers: Sequence[int]
    heads: int
    dim: int
    vision: int
    text: int
    new: int
    pruned: bool = True
    merged: bool = True

    @property
    def width(self) -> int:
        return self.heads * self.dim

    @property
    def tokens(self) -> int:
        return self.vision + self.text + self.new


@dataclass(frozen=True)
class Held:
    """What one layer holds of one sample, keys and values alike.

    vision, text, new: tokens that are stored. vision_rank, text_rank: of the prompt's, None as rows.
    factor_bits: of coefficients and bases. code_bits: of a number of a coded row, scales and all, None uncoded.
    waiting: rows of the prompt that are not coded, keys and values averaged; later ones are not coded so soon.
    merged: with another layer's, which codes keys and values together.
    folded: of the later tokens, at least so many are folded.
    apart: whether heads keep tokens of their own. cosines: whether keys of the prompt are un-rotated.
    turned: of how many tokens cos and sin are held where that is not those stored: layers that keep tokens of their own
    read from one table of all.
    rebuilt: later tokens in a tail that eviction made anew, which then has its room beside them.
    """

    vision: int
    text: int
    new: int
    vision_rank: int | None = None
    text_rank: int | None = None
    factor_bits: float = _BITS
    code_bits: float | None = None
    waiting: float = 0
    merged: bool = False
    folded: int = 0
    apart: bool = False
    cosines: bool = True
    turned: int = 0
    rebuilt: int = 0


#: What a method makes of what a layer holds; also shown the layer's number and the shape.
Step = Callable[[Held, int, Shape], Held]


def promised(shape: Shape, start: Callable[[Shape], Held], steps: Sequence[Step]) -> float:
    """Bytes of all layers of one sample, once every step has acted, in the order of stages."""
    total = 0.0
    turned: set[int] = set()
    for layer in shape.layers:
        held = start(shape)
        for step in steps:
            held = step(held, layer, shape)
        total += _bytes(held, shape)
        if held.cosines:
            turned.add(held.turned or held.vision + held.text + held.new)
    # One copy for all layers that saw the same tokens: cos and sin, one entry a pair of dims, of every token whose key
    # is un-rotated.
    return total + shape.dim * sum(turned) * NUMBER


def dense(shape: Shape) -> float:
    """Bytes of the same layers in a dense cache."""
    return 2 * len(shape.layers) * shape.tokens * shape.width * NUMBER


def _bytes(held: Held, shape: Shape) -> float:
    rows, total = 0.0, 0.0
    for tokens, rank in ((held.vision, held.vision_rank), (held.text + held.folded, held.text_rank)):
        if rank is None:
            rows += tokens
            continue
        bits = held.factor_bits
        total += 2 * rank * (tokens + shape.width) * bits / 8
        total += 0 if bits == _BITS else 2 * rank * 4 * NUMBER  # scales and zero points of both factors
    if held.code_bits is not None:
        coded = max(rows - held.waiting, 0)
        total += 2 * coded * shape.width * held.code_bits / 8 + _GROUP * coded
        rows -= coded
    rows = _with_room(rows + held.rebuilt + 1) if held.new - held.folded else rows
    total += 2 * rows * shape.width * NUMBER
    return total + PLACE * (held.vision + held.text + held.new) * (shape.heads if held.apart else 1)


def _with_room(rows: float) -> float:
    """What a tail grows to at the first decode step: a quarter more, at least 16, and the rows an append may overrun.

    Later tokens, which are fewer than 16 here, fit into that.
    """
    return rows + max(16, rows / 4) + 2


# ---- where layers start ------------------------------------------------------------------------------------


def ranks(vision: int | None, text: int | None = None, cosines: bool = True) -> Callable[[Shape], Held]:
    """Low rank, or rows where None. No matrix has a rank above its sides."""

    def start(shape: Shape) -> Held:
        def clipped(rank: int | None, tokens: int) -> int | None:
            return None if rank is None or not tokens else min(rank, shape.width, tokens)

        first, second = clipped(vision, shape.vision), clipped(text, shape.text)
        turned = cosines and (first is not None or second is not None)
        return Held(shape.vision, shape.text, shape.new, first, second, cosines=turned)

    return start


# ---- what methods do ---------------------------------------------------------------------------------------


def nothing(held: Held, layer: int, shape: Shape) -> Held:
    return held


def prune(kept: Callable[[int], int], first: int) -> Step:
    """Vision tokens left from layer `first` on."""

    def step(held: Held, layer: int, shape: Shape) -> Held:
        return held if layer < first else replace(held, vision=min(held.vision, kept(shape.vision)))

    return step


def budget(tokens: Callable[[int], int]) -> Step:
    """At most so many tokens, of those seen; text, which costs most, before vision."""

    def step(held: Held, layer: int, shape: Shape) -> Held:
        left = tokens(shape.tokens)
        text = min(held.text, left)
        apart = held.vision_rank is None and held.text_rank is None
        seen = held.vision + held.text + held.new
        # Later tokens are among those left, in the tail as text that is not of low rank; one more comes before the
        # next eviction.
        rebuilt = held.new if held.text_rank is not None else min(held.new, left - text)
        left_over = replace(held, text=text, vision=min(held.vision, left - text), new=1, apart=apart)
        return replace(left_over, turned=seen, rebuilt=rebuilt)

    return step


def factors(bits: float) -> Step:
    def step(held: Held, layer: int, shape: Shape) -> Held:
        return replace(held, factor_bits=bits)

    return step


def codes(bits: Callable[[Shape], float], waiting: Callable[[int], tuple[int, int]], cosines: bool = False) -> Step:
    """bits: of a coded number, with what is needed to read it. waiting: of so many rows, how many keys and how many
    values stay dense."""

    def step(held: Held, layer: int, shape: Shape) -> Held:
        rows = (held.vision if held.vision_rank is None else 0) + (held.text if held.text_rank is None else 0)
        wait = max(waiting(rows)) + held.waiting if held.merged else sum(waiting(rows)) / 2
        return replace(held, code_bits=bits(shape), waiting=wait, cosines=held.cosines or cosines)

    return step


def merge(first: int, retained: float) -> Step:
    """Layers from `first` on share directions in pairs; each keeps lengths of its own, and a share of the tokens."""

    def step(held: Held, layer: int, shape: Shape) -> Held:
        partner = first + ((layer - first) ^ 1)
        if layer < first or partner not in shape.layers:
            return held
        bits = _BITS * (0.5 + 1 / shape.dim)
        return replace(held, code_bits=bits, waiting=retained * (held.text + held.vision), merged=True)

    return step


def fold(every: int, recent: int) -> Step:
    def step(held: Held, layer: int, shape: Shape) -> Held:
        return replace(held, folded=max(held.new - recent - every + 1, 0))

    return step
