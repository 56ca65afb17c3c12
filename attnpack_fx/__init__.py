"""attnpack_fx: a torch.compile backend that keeps a model's key/value cache packed as low-rank factors."""

from attnpack_fx.backend import AttnpackWarning, attnpack_backend
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.calibration.bases import calibrate_bases
from attnpack_fx.calibration.calibrate import calibrate
from attnpack_fx.compiling import compile
from attnpack_fx.explain import explain
from attnpack_fx.hf import pack_cache
from attnpack_fx.modality import modality
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.packing import pack
from attnpack_fx.partial import Partial
from attnpack_fx.passes.storage import Columns, LayerPlan, Stored
from attnpack_fx.policy import PackPolicy, PolicyError
from attnpack_fx.ranks import Energy, Linear, PerLayer

__all__ = [
    "AttnpackWarning",
    "Columns",
    "Energy",
    "LayerPlan",
    "Linear",
    "PackPolicy",
    "PackedTensor",
    "Partial",
    "PerLayer",
    "PolicyError",
    "Stored",
    "attnpack_backend",
    "cache_bytes",
    "calibrate",
    "calibrate_bases",
    "compile",
    "explain",
    "modality",
    "pack",
    "pack_cache",
]
