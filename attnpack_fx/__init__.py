"""attnpack_fx: a torch.compile backend that packs a model's key/value cache: low rank, few bits, fewer tokens."""

from attnpack_fx.backend import attnpack_backend
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.calibration.bases import calibrate_bases
from attnpack_fx.calibration.calibrate import calibrate
from attnpack_fx.calibration.codebooks import calibrate_codebooks
from attnpack_fx.compiling import compile
from attnpack_fx.explain import explain
from attnpack_fx.hf import pack_cache
from attnpack_fx.modality import modality
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.packing import pack
from attnpack_fx.partial import Partial
from attnpack_fx.passes.asap import ASAP
from attnpack_fx.passes.avl import AVL
from attnpack_fx.passes.fastv import FastV
from attnpack_fx.passes.gear import GEAR
from attnpack_fx.passes.h2o import H2O
from attnpack_fx.passes.kivi import KIVI
from attnpack_fx.passes.kvquant import KVQuant
from attnpack_fx.passes.minicache import MiniCache
from attnpack_fx.passes.pool import Pool
from attnpack_fx.passes.quantize import Quantize
from attnpack_fx.passes.random_eviction import RandomEviction
from attnpack_fx.passes.random_prune import RandomPrune
from attnpack_fx.passes.scissorhands import Scissorhands
from attnpack_fx.passes.storage import Columns, LayerPlan, Stored
from attnpack_fx.passes.streaming_llm import StreamingLLM
from attnpack_fx.plan_batch import BatchPlan, plan_batch
from attnpack_fx.policy import PackPolicy, PolicyError
from attnpack_fx.prefix import Prefix, load_prefix, prefix
from attnpack_fx.ranks import Energy, Linear, PerLayer
from attnpack_fx.warning import AttnpackWarning

__all__ = [
    "ASAP",
    "AVL",
    "GEAR",
    "H2O",
    "KIVI",
    "AttnpackWarning",
    "BatchPlan",
    "Columns",
    "Energy",
    "FastV",
    "KVQuant",
    "LayerPlan",
    "Linear",
    "MiniCache",
    "PackPolicy",
    "PackedTensor",
    "Partial",
    "PerLayer",
    "PolicyError",
    "Pool",
    "Prefix",
    "Quantize",
    "RandomEviction",
    "RandomPrune",
    "Scissorhands",
    "Stored",
    "StreamingLLM",
    "attnpack_backend",
    "cache_bytes",
    "calibrate",
    "calibrate_bases",
    "calibrate_codebooks",
    "compile",
    "explain",
    "load_prefix",
    "modality",
    "pack",
    "pack_cache",
    "plan_batch",
    "prefix",
]
