"""Every composable method there is: a new one is a file of its own, its test, and an entry here."""

from attnpack_fx.passes.asap import ASAP
from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.gear import GEAR
from attnpack_fx.passes.h2o import H2O
from attnpack_fx.passes.kivi import KIVI
from attnpack_fx.passes.kvquant import KVQuant
from attnpack_fx.passes.method import Method
from attnpack_fx.passes.minicache import MiniCache
from attnpack_fx.passes.pool import Pool
from attnpack_fx.passes.quantize import Quantize
from attnpack_fx.passes.random_eviction import RandomEviction
from attnpack_fx.passes.random_prune import RandomPrune
from attnpack_fx.passes.scissorhands import Scissorhands
from attnpack_fx.passes.streaming_llm import StreamingLLM

METHODS: tuple[type[Method], ...] = (
    Quantize,
    KIVI,
    KVQuant,
    GEAR,
    H2O,
    Scissorhands,
    StreamingLLM,
    RandomEviction,
    AVL,
    FastV,
    ASAP,
    RandomPrune,
    Pool,
    MiniCache,
)
