"""The operators as Triton kernels, for NVIDIA GPUs from compute capability 8.0; `launch.py` says what launchers decide.

`benchmarks/ahead` shows what they take of a GPU.
"""

from attnpack_fx.kernels.triton.absorb import absorb_kernel
from attnpack_fx.kernels.triton.absorb_coded import absorb_coded_kernel
from attnpack_fx.kernels.triton.append import append_, append_kernel
from attnpack_fx.kernels.triton.attend import attention, takes
from attnpack_fx.kernels.triton.combine import combine_kernel
from attnpack_fx.kernels.triton.combine_coded import combine_coded_kernel
from attnpack_fx.kernels.triton.factorize import align, compress, fold, sketch
from attnpack_fx.kernels.triton.fused import fused_kernel
from attnpack_fx.kernels.triton.gather import gather_kernel
from attnpack_fx.kernels.triton.jacobi import jacobi_kernel
from attnpack_fx.kernels.triton.rebuilt import rebuilt_kernel
from attnpack_fx.kernels.triton.rebuilt_coded import rebuilt_coded_kernel
from attnpack_fx.kernels.triton.split import split_kernel
from attnpack_fx.kernels.triton.tables import tables_kernel
from attnpack_fx.kernels.triton.tokens import tokens_kernel
from attnpack_fx.kernels.triton.tokens_coded import tokens_coded_kernel

#: All of them.
KERNELS = (
    absorb_coded_kernel,
    absorb_kernel,
    append_kernel,
    combine_coded_kernel,
    combine_kernel,
    fused_kernel,
    gather_kernel,
    jacobi_kernel,
    rebuilt_coded_kernel,
    rebuilt_kernel,
    split_kernel,
    tables_kernel,
    tokens_coded_kernel,
    tokens_kernel,
)

__all__ = ["KERNELS", "align", "append_", "attention", "compress", "fold", "sketch", "takes"]
