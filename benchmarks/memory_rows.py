"""The caches that `benchmarks/memory.py` counts, what is published of them, and the bytes that follow from it."""

from collections.abc import Callable
from dataclasses import dataclass

from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.fields import share_of
from attnpack_fx.passes.gear import GEAR
from attnpack_fx.passes.h2o import H2O
from attnpack_fx.passes.kivi import KIVI
from attnpack_fx.passes.kvquant import KVQuant
from attnpack_fx.passes.method import Method
from attnpack_fx.passes.minicache import MiniCache
from attnpack_fx.passes.quantize import Quantize
from attnpack_fx.passes.streaming_llm import StreamingLLM

BYTES = 2  # of a number of the cache, in fp16 as in bf16


@dataclass(frozen=True)
class Model:
    """The shape of a decoder's cache."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @property
    def width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Row:
    """One cache: what is in it, how it is packed, and what the paper says of it.

    vision, text: tokens. ranks: of keys and values of vision tokens; None: all dense. bits: of the packed vision
    tokens; text_bits: of the text, packed at its full rank, 0 leaves it dense. grid: of an image under multimodal
    rotary embedding, height and width; None: one position per token. paper: ratio of the full cache to this, or
    megabytes (1e6 bytes) where `unit` says "MB". methods: of the policy, in which case they say the bits.
    text_packed: whether text is packed, at its full rank, without `text_bits`. budget: where methods act, a function
    of the row: bytes of numbers of keys and values that methods are published to keep, no scales, indices, or the like.
    """

    name: str
    model: Model
    vision: int
    text: int
    ranks: tuple[int, int] | None
    bits: int = 0
    text_bits: int = 0
    unrotated: bool = False
    grid: tuple[int, int] | None = None
    paper: float | None = None
    unit: str = "x"
    methods: tuple[Method, ...] = ()
    text_packed: bool = False
    budget: Callable[["Row"], float] | None = None

    @property
    def tokens(self) -> int:
        return self.vision + self.text

    @property
    def text_rank(self) -> int:
        """Of packed text; 0 where it is dense."""
        return self.text if self.text_bits or self.text_packed else 0


LLAVA = Model("LLaVA-1.5-7B", 32, 32, 32)
LLAVA_13B = Model("LLaVA-1.5-13B", 40, 40, 40)
QWEN_VL = Model("QwenVL-Chat", 32, 32, 32)
VIDEO_LLAVA = Model("Video-LLaVA", 32, 32, 32)
QWEN3_VL = Model("Qwen3-VL-8B", 36, 32, 8)
_GRIDS = {256: (16, 16), 1024: (32, 32), 2048: (32, 64)}


def _dense(row: Row, key: float, value: float, bits: float = 16) -> float:
    """So many tokens of keys and of values, in so many bits a number."""
    return row.model.layers * (key + value) * row.model.width * bits / 8


def _factors(row: Row, vision: float, bits: float) -> float:
    """Factors of so many vision tokens, and all of the text, in so many bits."""
    assert row.ranks is not None
    packed = sum(row.ranks) * (vision + row.model.width)
    return row.model.layers * bits / 8 * (packed + 2 * row.text * row.model.width)


def _kivi(row: Row) -> float:
    """Whole blocks of keys, and values but the newest, in the method's bits; all others dense."""
    (method,) = row.methods
    assert isinstance(method, KIVI)
    key, value = row.tokens // method.residual * method.residual, max(0, row.tokens - method.residual)
    return _dense(row, key, value, method.bits) + _dense(row, row.tokens - key, row.tokens - value)


def _merged(row: Row, bits: float = 16) -> float:
    """Half of the layers as they are, of the others every two as one."""
    return 0.75 * _dense(row, row.tokens, row.tokens, bits)


def _kept(row: Row, tokens: int) -> float:
    return _dense(row, tokens, tokens)


_HALF = H2O(0.5, target="vision")
_ALL = ("coefficients", "bases", "tail")
#: AttentionPack's factors with methods, and other methods on the same prompt. "(E)": half of the vision tokens evicted.
METHOD_ROWS = (
    Row(
        "AttentionPack (E)",
        *(LLAVA, 576, 50, (64, 64)),
        methods=(_HALF,),
        paper=62.1,
        unit="MB",
        budget=lambda row: _factors(row, 288, 16),
    ),
    Row(
        "AttentionPack 4 bit (E)",
        *(LLAVA, 576, 50, (64, 64)),
        methods=(_HALF, Quantize(4)),
        text_packed=True,
        paper=15.5,
        unit="MB",
        budget=lambda row: _factors(row, 288, 4),
    ),
    Row(
        "4 bit, text as rows",
        *(LLAVA, 576, 50, (64, 64)),
        methods=(Quantize(4, target=_ALL, recent=0),),
        paper=16.1,
        unit="MB",
        budget=lambda row: _factors(row, 576, 4),
    ),
    Row(
        "4 bit (E), text as rows",
        *(LLAVA, 576, 50, (64, 64)),
        methods=(_HALF, Quantize(4, target=_ALL, recent=0)),
        paper=15.5,
        unit="MB",
        budget=lambda row: _factors(row, 288, 4),
    ),
    Row(
        "KVQuant-4bit",
        *(LLAVA, 576, 50, None),
        methods=(KVQuant(4),),
        unrotated=True,
        paper=82.1,
        unit="MB",
        budget=lambda row: _dense(row, row.tokens, row.tokens, 4),
    ),
    Row("KIVI 2 bit", LLAVA, 576, 50, None, methods=(KIVI(2),), budget=_kivi),
    Row("KIVI 4 bit", LLAVA, 576, 50, None, methods=(KIVI(4),), budget=_kivi),
    Row(
        "GEAR 2 bit",
        *(LLAVA, 576, 50, None),
        methods=(GEAR(2),),
        budget=lambda row: _dense(row, row.tokens, row.tokens, 2),
    ),
    Row("MiniCache", LLAVA, 576, 50, None, methods=(MiniCache(),), paper=1.53, budget=_merged),
    Row(
        "MiniCache, 4 bit",
        *(LLAVA, 576, 50, None),
        methods=(MiniCache(), Quantize(4, target="tail", recent=0)),
        paper=5.02,
        budget=lambda row: _merged(row, 4),
    ),
    Row(
        "H2O 20 %",
        LLAVA,
        576,
        50,
        None,
        methods=(H2O(),),
        paper=5.0,
        budget=lambda row: _kept(row, share_of(0.2, row.tokens)),
    ),
    Row(
        "H2O 20 %, heads together",
        *(LLAVA, 576, 50, None),
        methods=(H2O(heads="together"),),
        paper=5.0,
        budget=lambda row: _kept(row, share_of(0.2, row.tokens)),
    ),
    Row("StreamingLLM 4 + 512", LLAVA, 576, 50, None, methods=(StreamingLLM(),), budget=lambda row: _kept(row, 516)),
    Row("A-VL", LLAVA, 576, 50, None, methods=(AVL(),), paper=2.0, budget=lambda row: _kept(row, 288 + 50)),
)

ROWS = (
    Row("full", LLAVA, 576, 50, None, paper=328.2, unit="MB"),
    Row("64/128", LLAVA, 576, 50, (64, 128), paper=3.92),
    Row("64/64", LLAVA, 576, 50, (64, 64), paper=5.09),
    Row("32/64", LLAVA, 576, 50, (32, 64), paper=5.98),
    Row("32/32", LLAVA, 576, 50, (32, 32), paper=7.24),
    Row("16/16", LLAVA, 576, 50, (16, 16), paper=9.18),
    Row("AttentionPack 64/64", LLAVA, 576, 50, (64, 64), paper=64.5, unit="MB"),
    Row("64/64, vision 4 bit", LLAVA, 576, 50, (64, 64), bits=4),
    Row("64/64, all 4 bit", LLAVA, 576, 50, (64, 64), bits=4, text_bits=4, paper=16.1, unit="MB"),
    Row("64/64, un-rotated keys", LLAVA, 576, 50, (64, 64), unrotated=True),
    Row("64/64", LLAVA_13B, 576, 50, (64, 64), paper=5.17),
    Row("64/64", QWEN_VL, 256, 38, (64, 64), paper=2.77),
    Row("128/128", VIDEO_LLAVA, 2056, 70, (128, 128), paper=8.11),
    *(
        Row(f"{rank}/{rank}, vision alone", QWEN3_VL, vision, 0, (rank, rank), grid=grid)
        for vision, grid in _GRIDS.items()
        for rank in (64, 32)
    ),
    Row("64/64, un-rotated keys", QWEN3_VL, 1024, 0, (64, 64), unrotated=True, grid=(32, 32)),
    *METHOD_ROWS,
)


def closed_form(row: Row) -> float:
    """Bytes that the paper's figures follow: `2 L [Tv Rk + Rk HD + Tv Rv + Rv HD] + 2 L 2 Tt HD`, or dense.

    With bits, a part takes bits / 16 of that: codes alone, no scales. Text is counted as `Tt HD` numbers, packed or
    not.
    """
    if row.budget is not None:
        return row.budget(row)
    model = row.model
    text = 2 * row.text * model.width * (row.text_bits or 16) / 16
    if row.ranks is None:
        return BYTES * model.layers * 2 * (row.vision + row.text) * model.width
    vision = sum(row.ranks) * (row.vision + model.width) * (row.bits or 16) / 16
    return BYTES * model.layers * (vision + text)
