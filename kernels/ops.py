"""The `attnpack::` operators: schemas, shape functions (fakes) and dispatch by device.

Every operator takes plain tensors, in the terms of `parts.py`; `reference.py` defines what each must compute. The
functions below are what runs on every device. One with Triton kernels branches to them in its body, by device; on a GPU
Inductor may see through it and launch them itself; on a CPU it stays one call (`registering.py`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from attnpack_fx.kernels import aten
from attnpack_fx.kernels.flat import unflatten, unflatten_pair
from attnpack_fx.kernels.linalg import sketch_size
from attnpack_fx.kernels.no_gradient import refuse_gradient
from attnpack_fx.kernels.parts import PackedParts, Rows
from attnpack_fx.kernels.registering import LIBRARY, fake, operator, triton


def _implementation(tensor: Tensor) -> Any:
    return triton if triton is not None and tensor.is_cuda else aten


def _factoring(tensor: Tensor) -> Any:
    """As `_implementation`; kernels factor in fp32 alone."""
    return aten if tensor.dtype == torch.float64 else _implementation(tensor)


@operator()
def plan(
    modality: Tensor | None,
    real: Tensor | None,
    like: Tensor,
    text: bool,
    vision_gain: Sequence[int],
    text_gain: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign every prompt token a slot.

    modality: bool `[B or 1, T]`, True for vision tokens; None means all text.
    real: bool `[B or 1, T]`, False for padding, which gets no slot; None means no padding.
    like: any tensor `[B, H, T, D]`; only its shape and device are read.
    text: whether text tokens are packed (a second segment) or kept as they are.
    *_gain: `[key rank, value rank, key width, value width, turning]`, width = H * D, turning the numbers of cos and sin
        that a packed token takes besides: the segment is packed only if that takes less memory than its dense rows;
        empty means always. Vision tokens that are not worth packing go where text tokens go.

    Returns `(vision, text, dense, slot)`: int64 indices `[B, Nv]`, `[B, Nt]`, `[B, m]` of logical positions, in order,
    with filler -1 at the end of a row, and `slot` `[B, T]`. Sizes depend on the data.
    """
    return aten.plan(modality, real, like, text, vision_gain, text_gain)


@fake("plan")
def _(modality, real, like, text, vision_gain, text_gain):
    context = torch.library.get_ctx()
    batch, tokens = like.shape[0], like.shape[2]
    # Not `context.new_dynamic_size`: that obeys `capture_dynamic_output_shape_ops`, the user's choice for their own
    # code,
    # off by default; this operator is only introduced after capture.
    sizes = [allocate_size(context._shape_env) for _ in range(3)]
    index = [like.new_empty((batch, size), dtype=torch.int64) for size in sizes]
    return *index, like.new_empty((batch, tokens), dtype=torch.int64)


@operator()
def compress(x: Tensor, index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of selected tokens, heads concatenated (AttentionPack, section 3.2).

    x: `[B, H, T, D]`; index: int64 `[B, N]`, -1 for filler; rank: at least 1.
    Returns coefficient `[B, N, R]` and basis `[B, H, R, D]` in x's dtype, `R = min(rank, N, H * D)`, factored in fp32,
    or in float64 where x is, by ATen then on every device. In half precision a power of two may stand in the basis
    (`balance.py`).
    Raises ValueError when a selected token holds NaN or Inf (on a GPU: a device-side assertion, so as not to wait for
    it).
    """
    return _factoring(x).compress(x, index, rank)


@fake("compress")
def _(x, index, rank):
    batch, heads, _, dim = x.shape
    rank = torch.sym_min(torch.sym_min(rank, heads * dim), index.shape[1])
    return x.new_empty((batch, index.shape[1], rank)), x.new_empty((batch, heads, rank, dim))


@operator()
def compress_shared(
    x: Tensor, index: Tensor, rank: int, tolerance: float, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`compress` with one basis for the samples of a batch, and one of its own for each sample that this fits badly.

    x, index, rank: as in `compress`; tolerance: the largest share of a sample's squared Frobenius norm that the common
    basis may leave out; given: the common basis `[1, H, R, D]` where it is known, else that of all samples' tokens.
    Returns coefficient `[B, N, R]`, bases `[G, H, R, D]`, the common one first unless it was given or no sample is
    left to it, and owner int64 `[B]`: a sample's number among the given basis and these.
    """
    return aten.compress_shared(x, index, rank, tolerance, given)


@fake("compress_shared")
def _(x, index, rank, tolerance, given):
    batch, heads, _, dim = x.shape
    if given is not None:
        rank = torch.sym_min(rank, given.shape[2])
    rank = torch.sym_min(torch.sym_min(rank, heads * dim), batch * index.shape[1])
    bases = allocate_size(torch.library.get_ctx()._shape_env)
    coefficient = x.new_empty((batch, index.shape[1], rank))
    return coefficient, x.new_empty((bases, heads, rank, dim)), x.new_empty((batch,), dtype=torch.int64)


@operator()
def sketch(x: Sequence[Tensor], index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What `compress` does before its eigenproblem, for tensors of one shape: `align` makes factors of it.

    x: s tensors `[B, H, T, D]`; index: int64 `[B, N]`, -1 for filler; rank: the highest that `align` will be asked for.
    Returns `C` fp32 `[s, B, N, k]` and `Q` `[s, B, H, D, k]` in x's dtype, k a little over the rank (`sketch_size`) and
    at most `min(N, H * D)`: tokens are about `C (Q^T Q)^-1 Q^T`, with `C = A Q`, columns of Q nearly orthonormal.
    Raises as `compress` does.
    """
    return _implementation(x[0]).sketch(x, index, rank)


@fake("sketch")
def _(x, index, rank):
    batch, heads, _, dim = x[0].shape
    size = torch.sym_min(torch.sym_min(sketch_size(rank), heads * dim), index.shape[1])
    coefficient = x[0].new_empty((len(x), batch, index.shape[1], size), dtype=torch.float32)
    return coefficient, x[0].new_empty((len(x), batch, heads, dim, size))


@operator()
def align(coefficient: Sequence[Tensor], basis: Sequence[Tensor], rank: Sequence[int]) -> list[Tensor]:
    """Factors from sketches, all in one eigenproblem: what `compress` returns, sorted and cut to the rank.

    coefficient, basis: of sketches, whatever their sizes; rank: one for every tensor of every sketch, in order.
    Returns coefficient `[B, N, R]`, basis `[B, H, R, D]` of each in turn, `R = min(rank, k)`, in the basis's dtype.
    """
    return _implementation(basis[0]).align(coefficient, basis, rank)


@fake("align")
def _(coefficient, basis, rank):
    ranks, factors = iter(rank), []
    for c, b in zip(coefficient, basis, strict=True):
        tensors, batch, heads, dim, size = b.shape
        for _ in range(tensors):
            kept = torch.sym_min(next(ranks), size)
            factors += [b.new_empty((batch, c.shape[2], kept)), b.new_empty((batch, heads, kept, dim))]
    return factors


@operator()
def take_rows(x: Tensor, index: Tensor, spare: int) -> Tensor:
    """Copy selected tokens, token-major, with room behind them.

    x: `[B, H, T, D]`; index: int64 `[B, m]`, -1 for filler (zero rows). Returns `[m + spare, B, H, D]`, spare rows
    zero.
    """
    return aten.take_rows(x, index, spare)


@fake("take_rows")
def _(x, index, spare):
    batch, heads, _, dim = x.shape
    return x.new_empty((index.shape[1] + spare, batch, heads, dim))


@operator(mutates=("tails",), visible=lambda *_: True)
def append_(tails: Sequence[Tensor], new: Sequence[Tensor], positions: Sequence[int]) -> None:
    """Write new tokens into the spare rows of one tail or more, in place.

    tails: `[rows, B, H, D]` each, none twice; new: `[B, H, k, D]` each. Of every tail, rows `position .. position + k -
    1` are overwritten, and must exist.
    """
    _implementation(tails[0]).append_(tails, new, positions)


@fake("append_")
def _(tails, new, positions):
    return None


@operator()
def decompress(packed: Sequence[Tensor], layout: Sequence[int], length: int) -> Tensor:
    """The dense meaning: `[B, H, P + length - m, D]`, tokens in logical order, padding zero.

    packed, layout: of one packed tensor, with its `slot` (`flat.py`); length: of its tail.
    Packed rows that are keys before rotary embedding are rotated (first E dims). Tail rows never are.
    """
    return aten.decompress(unflatten(packed, layout, length))


@fake("decompress")
def _(packed, layout, length):
    parts = unflatten(packed, layout, length)
    _, batch, heads, dim = parts.tail.shape
    assert parts.slot is not None
    return parts.tail.new_empty(
        (batch, heads, parts.slot.shape[1] + length - (parts.index.shape[1] - parts.packed), dim)
    )


def _shown(
    query: Tensor,
    packed: Sequence[Tensor],
    key: Sequence[int],
    value: Sequence[int],
    length: int,
    *_: Any,
    weights: bool = False,
) -> bool:
    """Blocks of `Rows` that kernels do not take ATen reads in loops over their tokens, which stay one call."""
    keys, values = unflatten_pair(packed, key, value, length)
    rows = any(isinstance(block, Rows) for block in (*keys.blocks, *values.blocks))
    return not rows or _has_kernels(query, keys, values, weights)


@operator(visible=_shown)
def attention(
    query: Tensor,
    packed: Sequence[Tensor],
    key: Sequence[int],
    value: Sequence[int],
    length: int,
    mask: Tensor | None,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`softmax(scale * q K^T + mask) V` over packed segments and tail in one softmax, never decompressed.

    With a soft cap the scores are `cap * tanh(scale * q K^T / cap) + mask`, with sinks the softmax has one term more.

    query: `[B, Hq, Tq, D]`, Hq a multiple of the KV heads H.
    packed, key, value: keys and values and their layouts (`flat.py`); they may differ in segments, blocks, rank and
        head dim, and hold the same tokens in the same slots. length: of the key tail, of which so many rows count, and
        of the value tail as many as give the same number of slots.
    mask: None, or bool (True attends) or additive, broadcastable to `[B, Hq, Tq, T]`, tokens in logical order.
    cap: 0 for none. sinks: None, or `[B or 1, Hq]`, for every query head the score of a token that has no value.

    Returns `[B, Hq, Tq, Dv]` in query's dtype; rows whose every token is masked are zero, as in
    scaled_dot_product_attention.
    Has no gradient: backward raises.
    """
    parts = unflatten_pair(packed, key, value, length)
    return _attention(query, *parts, mask, scale, cap, sinks, weights=False)[0]


@operator(visible=partial(_shown, weights=True))
def attention_weights(
    query: Tensor,
    packed: Sequence[Tensor],
    key: Sequence[int],
    value: Sequence[int],
    length: int,
    mask: Tensor | None,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and how much it attends to every slot: its weights, averaged over queries and query heads.

    Arguments and first result as in `attention`; weights fp32 `[B, slots]` with slots in storage order (packed tokens,
    then tail rows). Slots that are filler or masked have none; a sample's weights sum to 1 where any head saw a token,
    and to less by what sinks have.
    """
    parts = unflatten_pair(packed, key, value, length)
    return _attention(query, *parts, mask, scale, cap, sinks, weights=True)


def _attention(
    query: Tensor, keys: PackedParts[Tensor], values: PackedParts[Tensor], *others: Any, weights: bool
) -> tuple[Tensor, Tensor]:
    implementation = triton if _has_kernels(query, keys, values, weights) else aten
    return implementation.attention(query, keys, values, *others, weights)


def _has_kernels(query: Tensor, keys: PackedParts[Tensor], values: PackedParts[Tensor], weights: bool) -> bool:
    """Whether kernels take these arguments of `attention`. They keep the weights of one query."""
    fits = _implementation(query) is triton and not (weights and query.shape[2] > 1)
    return fits and triton.takes(query, keys, values)


@fake("attention")
def _(query, packed, key, value, *_):
    return query.new_empty((*query.shape[:3], unflatten(packed, value, 0).tail.shape[-1]))


@fake("attention_weights")
def _(query, packed, key, value, length, *_):
    keys, values = unflatten_pair(packed, key, value, length)
    out = query.new_empty((*query.shape[:3], values.tail.shape[-1]))
    return out, query.new_empty((query.shape[0], keys.packed + length), dtype=torch.float32)


@operator()
def observe(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    statistic: str,
    window: int,
    real: Tensor | None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """How much the queries of a prompt attend to every token, with `A = softmax(scale * q K^T + mask)`.

    query: `[B, Hq, Tq, D]`, of the last Tq of the keys' tokens; key: `[B, H, T, D]`, Hq a multiple of H.
    mask: as in `attention`; is_causal: as in scaled_dot_product_attention, without a mask and for Tq = T alone.
    statistic: with A averaged over the query heads of a KV head,
        "sum"      its sum over queries (what H2O accumulates)
        "last"     the row of the newest query
        "pivotal"  how many queries gave a token A >= 1 / t, t the tokens in their sight (Scissorhands)
        "pivotal together"  so, with A averaged over all query heads: the same for every KV head
    window: the newest so many queries count, 0: all.
    real: bool `[B or 1, T]`, False for padding, whose queries do not count; nor do those that the mask shows no token.
        An additive mask hides what it lowers by half its dtype's lowest number or more.
    cap, sinks: as in `attention`.

    Returns fp32 `[B, H, T]`, zero where no query counts. Raises ValueError for any other statistic, more queries than
    keys, or is_causal where it says nothing about which tokens the queries are.
    """
    return aten.observe(query, key, mask, scale, is_causal, statistic, window, real, cap, sinks)


@fake("observe")
def _(query, key, *_):
    return query.new_empty(key.shape[:3], dtype=torch.float32)


def no_part_in_training(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


def no_gradients(ctx, grad):
    return (None,) * len(ctx.needs_input_grad)


# It stands in prefills that may be trained through; what it observes is no function of the loss.
torch.library.register_autograd("attnpack::observe", no_gradients, setup_context=no_part_in_training, lib=LIBRARY)


@operator()
def fold(coefficient: Tensor, basis: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Append dense rows to a low-rank segment by the small SVD of `[coefficient basis; rows]`; cost independent of T.

    coefficient: `[B, N, R]`, N may be 0; basis: `[B, H, R, D]`; rows: `[n, B, H, D]`.
    Returns coefficient `[B, N + n, S]`, basis `[B, H, S, D]` with `S = min(rank, R + n, H * D)`, and `dropped` fp32
    `[B]`: the
    Frobenius norm of what this truncation dropped. Raises ValueError when a row holds NaN or Inf, as `compress` does.
    """
    return _factoring(basis).fold(coefficient, basis, rows, rank)


@fake("fold")
def _(coefficient, basis, rows, rank):
    batch, heads, old, dim = basis.shape
    rank = torch.sym_min(torch.sym_min(rank, heads * dim), old + rows.shape[0])
    return (
        coefficient.new_empty((batch, coefficient.shape[1] + rows.shape[0], rank)),
        basis.new_empty((batch, heads, rank, dim)),
        coefficient.new_empty((batch,), dtype=torch.float32),
    )


refuse_gradient("attention")
refuse_gradient("attention_weights")


@operator()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` for few rows: on a CPU in fp32 by oneDNN, which streams the weight as it is.

    x: `[..., K]`; weight: `[N, K]`; bias: `[N]` or None. Returns `[..., N]`.
    """
    return aten.linear(x, weight, bias)


@fake("linear")
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
