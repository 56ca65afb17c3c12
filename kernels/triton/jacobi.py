"""Singular value decomposition of many small matrices at once, by one-sided Jacobi rotations (Hestenes 1958).

    X J = U S        J a product of rotations of two columns each, until all columns of X J are orthogonal

X: fp32 `[n, k, k]`, best a Cholesky factor: the left singular vectors of L are the eigenvectors of `L L^T`, found
without squaring its condition again (Veselic & Hari 1989), and a shift that makes `L L^T` definite makes every column
of L one that can be normalised. k is a run-time argument.

One program per matrix, and one launch for all of them: the sweeps, the test for convergence and the sorting run on the
device. The k / 2 pairs of a step have no column in common, so a step is one vectorised rotation; `k - 1` steps in
round-robin order (pair i of step s: columns `s + i` and `s - i` modulo `k - 1`, and `s` with the last one) make a sweep
that meets every pair once. The matrix stands in global memory, transposed, and stays in L1 or L2. A column of zeros is
never rotated and comes out as zeros, last: matrices of different size are padded by it.

Launcher: a tile holds `PAIRS` columns of `WIDTH` numbers, 16 numbers a thread, which keeps both columns of every pair
and their pointers in registers. Up to 128 columns one tile holds all pairs: a step is then one read, one write.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from attnpack_fx.kernels.triton.launch import block

#: Cosine of two columns up to which they count as orthogonal: below it a rotation changes nothing in fp32.
ORTHOGONAL = 1e-7
#: Largest cosine of a sweep after which no further one follows: convergence is quadratic.
CONVERGED = 1e-5
#: Most sweeps. Fourteen were enough for 272 columns over eight decades of singular values.
MAX_SWEEPS = 20
#: Keeps zero out of divisions.
TINY = 1e-28
#: Numbers of a tile, and how many of them one thread holds.
TILE = 8192
NUMBERS_PER_THREAD = 16


def left_singular_vectors(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Singular values `[n, k]`, in descending order, and the first `count` left singular vectors `[n, count, k]`.

    x: fp32 `[n, k, k]` of moderate scale (squares of its numbers must be in range). Vectors of singular value zero are
    zero.
    """
    matrices, size = x.shape[:2]
    singular, vectors = x.new_empty((matrices, size)), x.new_empty((matrices, count, size))
    if matrices == 0 or size == 0:
        return singular, vectors
    players = size + size % 2
    stride = (size + 15) // 16 * 16  # rows of whole 64 bytes, filled up by zeros, move 16 bytes at a time
    columns = x.new_empty((matrices, players, stride))
    norms = x.new_empty((matrices, players))
    pairs, width, warps = tile(players)
    wrap_triton(jacobi_kernel)[(matrices,)](
        x.contiguous(),
        columns,
        norms,
        singular,
        vectors,
        players,
        size,
        stride,
        count,
        PAIRS=pairs,
        WIDTH=width,
        MAX_SWEEPS=MAX_SWEEPS,
        ORTHOGONAL=ORTHOGONAL,
        CONVERGED=CONVERGED,
        TINY=TINY,
        num_warps=warps,
        num_stages=1,  # nothing may be read ahead of the stores before it
    )
    return singular, vectors


def tile(players: int) -> tuple[int, int, int]:
    """`PAIRS`, `WIDTH` and the number of warps for this many columns."""
    width = block(players)
    pairs = min(width // 2, max(1, TILE // width))
    return pairs, width, max(1, pairs * width // (32 * NUMBERS_PER_THREAD))


@triton.jit(do_not_specialize=["players", "size", "count"])
def jacobi_kernel(
    x,  # [n, size, size] fp32
    columns,  # [n, players, stride] fp32, scratch: X^T, which becomes (U S)^T
    norms,  # [n, players] fp32, scratch
    singular,  # [n, size] fp32
    vectors,  # [n, count, size] fp32
    players,  # columns made even in number
    size,
    stride,
    count,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    MAX_SWEEPS: tl.constexpr,
    ORTHOGONAL: tl.constexpr,
    CONVERGED: tl.constexpr,
    TINY: tl.constexpr,
):
    matrix = tl.program_id(0).to(tl.int64)
    x += matrix * size * size
    columns += matrix * players * stride
    norms += matrix * players
    singular += matrix * size
    vectors += matrix * count * size
    lane = tl.arange(0, WIDTH)
    circle = players - 1

    for start in range(0, players, PAIRS):
        number = start + tl.arange(0, PAIRS)
        inside = (number < size)[:, None] & (lane < size)[None, :]
        column = tl.load(x + lane[None, :] * size + number[:, None], mask=inside, other=0.0)
        inside = (number < players)[:, None] & (lane < stride)[None, :]
        tl.store(columns + number[:, None] * stride + lane[None, :], column, mask=inside)
    tl.debug_barrier()  # from here on, threads read what others wrote

    sweep = 0
    cosine = tl.full((), 1.0, tl.float32)
    while (sweep < MAX_SWEEPS) & (cosine > CONVERGED):
        largest = tl.zeros((PAIRS,), tl.float32)
        for step in range(0, circle):
            for start in range(0, players // 2, PAIRS):
                pair = start + tl.arange(0, PAIRS)
                left = step + pair
                left = tl.where(left >= circle, left - circle, left)
                left = tl.where(pair == 0, circle, left)
                right = step - pair
                right = tl.where(right < 0, right + circle, right)
                inside = (pair < players // 2)[:, None] & (lane < stride)[None, :]
                left_at = columns + left[:, None] * stride + lane[None, :]
                right_at = columns + right[:, None] * stride + lane[None, :]
                a = tl.load(left_at, mask=inside, other=0.0)
                b = tl.load(right_at, mask=inside, other=0.0)
                aa, bb, ab = tl.sum(a * a, 1), tl.sum(b * b, 1), tl.sum(a * b, 1)
                # In units of both lengths, so that nothing below leaves fp32's range.
                unit = tl.rsqrt(tl.maximum(aa, TINY)) * tl.rsqrt(tl.maximum(bb, TINY))
                away = tl.abs(ab * unit)
                largest = tl.maximum(largest, away)
                # The smaller of the two rotations that make the pair orthogonal; one Newton step makes up for the
                # hardware's rsqrt, whose error would add up over all rotations of a column.
                difference, twice = (bb - aa) * unit, 2 * ab * unit
                twice = tl.where(difference >= 0, twice, -twice)
                length = tl.sqrt(difference * difference + twice * twice)
                tangent = tl.where(away > ORTHOGONAL, twice / (tl.abs(difference) + length + TINY), 0.0)
                square = 1 + tangent * tangent
                cos = tl.rsqrt(square)
                cos = cos * (1.5 - 0.5 * square * cos * cos)
                sin = cos * tangent
                # Where the tile is smaller than the program, threads share numbers: all have read before one writes.
                tl.debug_barrier()
                tl.store(left_at, cos[:, None] * a - sin[:, None] * b, mask=inside)
                tl.store(right_at, sin[:, None] * a + cos[:, None] * b, mask=inside)
            # The next step pairs columns that other threads wrote.
            tl.debug_barrier()
        cosine = tl.max(largest, 0)
        sweep += 1

    for start in range(0, players, PAIRS):
        number = start + tl.arange(0, PAIRS)
        inside = (number < players)[:, None] & (lane < stride)[None, :]
        column = tl.load(columns + number[:, None] * stride + lane[None, :], mask=inside, other=0.0)
        tl.store(norms + number, tl.sqrt(tl.sum(column * column, 1)), mask=number < players)
    tl.debug_barrier()  # every thread reads all norms
    others = tl.load(norms + lane, mask=lane < players, other=-1.0)[None, :]
    for start in range(0, players, PAIRS):
        number = start + tl.arange(0, PAIRS)
        norm = tl.load(norms + number, mask=number < players, other=0.0)
        # Among equals the first comes first, so that places are a permutation and padding is last.
        before = (others > norm[:, None]) | ((others == norm[:, None]) & (lane[None, :] < number[:, None]))
        place = tl.sum(before.to(tl.int32), 1)
        valid = number < players
        tl.store(singular + place, norm, mask=valid & (place < size))
        inside = (valid & (place < count))[:, None] & (lane < size)[None, :]
        column = tl.load(columns + number[:, None] * stride + lane[None, :], mask=inside, other=0.0)
        column = column / tl.where(norm > 0, norm, 1.0)[:, None]
        tl.store(vectors + place[:, None] * size + lane[None, :], column, mask=inside)
