"""The operators in ATen calls: what every device can run, and what runs on CPU."""

from attnpack_fx.kernels.aten.attention import attention
from attnpack_fx.kernels.aten.decompress import decompress
from attnpack_fx.kernels.aten.factorize import align, compress, fold, sketch
from attnpack_fx.kernels.aten.linear import linear
from attnpack_fx.kernels.aten.observe import observe
from attnpack_fx.kernels.aten.plan import plan
from attnpack_fx.kernels.aten.rows import append_, take_rows
from attnpack_fx.kernels.aten.shared_basis import compress_shared

__all__ = [
    "align",
    "append_",
    "attention",
    "compress",
    "compress_shared",
    "decompress",
    "fold",
    "linear",
    "observe",
    "plan",
    "sketch",
    "take_rows",
]
