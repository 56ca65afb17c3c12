"""The operators in ATen calls: what every device can run, and what runs on CPU."""

from attnpack_fx.kernels.aten.attention import attention
from attnpack_fx.kernels.aten.factorize import compress, fold
from attnpack_fx.kernels.aten.linear import linear
from attnpack_fx.kernels.aten.plan import plan
from attnpack_fx.kernels.aten.rows import append_, decompress, take_rows

__all__ = ["append_", "attention", "compress", "decompress", "fold", "linear", "plan", "take_rows"]
