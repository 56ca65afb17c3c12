"""The `attnpack::` operators: schemas, shape functions (fakes) and dispatch by device.

Every operator takes plain tensors, in the terms of `parts.py`; `reference.py` defines what each must compute. The
functions below are what runs on every device. One with Triton kernels branches to them in its body, by device; on a GPU
Inductor may see through it and launch them itself (`_show_kernels`); on a CPU it stays one call.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size
from torch._library.triton import set_wrap_triton_enabled, triton_ops_to_kernels
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.export._trace import custom_triton_ops_decomposition_disabled
from torch.utils._pytree import tree_leaves

from attnpack_fx.kernels import aten
from attnpack_fx.kernels.aten.svd import sketch_size
from attnpack_fx.kernels.parts import ROWS, first_blocks

if importlib.util.find_spec("triton") is not None:
    from attnpack_fx.kernels import triton
else:  # Triton has no packages for this platform, so torch has no GPU that needs them
    triton = None  # type: ignore[assignment]

# A bare Library rather than `torch.library.custom_op`: the latter wraps every call in Python layers that cost 10 us,
# three times per layer and decode step.
_LIBRARY = torch.library.Library("attnpack", "FRAGMENT")


def _operator(mutates: Sequence[str] = (), visible: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the operator `attnpack::<its name>`, with the schema its annotations say.

    visible: whether Inductor shall see the Triton kernels it launches on a GPU.
    """

    def define(function: Callable[..., Any]) -> Any:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        packet = getattr(torch.ops.attnpack, name)
        packet.__doc__ = function.__doc__
        if visible and triton is not None:
            _show_kernels(packet.default, function)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        _LIBRARY.impl(name, _launched_at_once(function), "CUDA")
        return packet

    return define


def _launched_at_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """What runs on a device: nothing traces it, and kernels go to the device of the tensors, current or not."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with set_wrap_triton_enabled(False), torch.cuda.device(_device(args)):
            return function(*args, **kwargs)

    return run


def _show_kernels(operator: torch._ops.OpOverload, function: Callable[..., Any]) -> None:
    """Let Inductor see the kernels inside an operator and launch them itself: `torch.library.triton_op`, on a GPU only.

    On a CPU the operator stays one call: its products are ATen's, which Inductor's lowering would slow down.
    """

    def decompose(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        opaque = custom_triton_ops_decomposition_disabled() or _device(args).type != "cuda"
        if opaque or (
            _decodes_rows(operator, args) and not _has_kernels(*args, weights="weights" in operator.__name__)
        ):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return function(*args, **(kwargs or {}))

    torch.library.register_torch_dispatch(operator, FunctionalTensorMode, decompose, lib=_LIBRARY)
    # So that keys of AOTAutograd's cache cover the kernels' source.
    triton_ops_to_kernels[operator._name] = list(triton.KERNELS)


def _decodes_rows(operator: torch._ops.OpOverload, arguments: Sequence[Any]) -> bool:
    """Whether a layout among the arguments holds blocks of `Rows`, which ATen reads in loops over their tokens."""
    named = zip(operator._schema.arguments, arguments, strict=False)
    kinds = [kind for argument, value in named if argument.name.endswith("_blocks") for kind in value[1::2]]
    return any(kind & ROWS for kind in kinds)


def _implementation(tensor: Tensor) -> Any:
    return triton if triton is not None and tensor.is_cuda else aten


def _device(arguments: Sequence[Any]) -> torch.device:
    """Of the first tensor among the arguments of an operator."""
    return next(tensor.device for tensor in tree_leaves(arguments) if isinstance(tensor, Tensor))


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"attnpack::{name}", lib=_LIBRARY)


@_operator()
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
    *_gain: `[key rank, value rank, key width, value width]`, width = H * D: the segment is packed only if that takes
    less
        memory than its dense rows; empty means always. Vision tokens that are not worth packing go where text tokens
        go.

    Returns `(vision, text, dense, slot)`: int64 indices `[B, Nv]`, `[B, Nt]`, `[B, m]` of logical positions, in order,
    with
    filler -1 at the end of a row, and `slot` `[B, T]`. Sizes depend on the data.
    """
    return aten.plan(modality, real, like, text, vision_gain, text_gain)


@_fake("plan")
def _(modality, real, like, text, vision_gain, text_gain):
    context = torch.library.get_ctx()
    batch, tokens = like.shape[0], like.shape[2]
    # Not `context.new_dynamic_size`: that obeys `capture_dynamic_output_shape_ops`, the user's choice for their own
    # code,
    # off by default; this operator is only introduced after capture.
    sizes = [allocate_size(context._shape_env) for _ in range(3)]
    index = [like.new_empty((batch, size), dtype=torch.int64) for size in sizes]
    return *index, like.new_empty((batch, tokens), dtype=torch.int64)


@_operator()
def compress(x: Tensor, index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of selected tokens, heads concatenated (AttentionPack, section 3.2).

    x: `[B, H, T, D]`; index: int64 `[B, N]`, -1 for filler; rank: at least 1.
    Returns coefficient `[B, N, R]` and basis `[B, H, R, D]` in x's dtype, `R = min(rank, N, H * D)`, factored in fp32.
    Raises ValueError when a selected token holds NaN or Inf (on a GPU: a device-side assertion, so as not to wait for
    it).
    """
    return _implementation(x).compress(x, index, rank)


@_fake("compress")
def _(x, index, rank):
    batch, heads, _, dim = x.shape
    rank = torch.sym_min(torch.sym_min(rank, heads * dim), index.shape[1])
    return x.new_empty((batch, index.shape[1], rank)), x.new_empty((batch, heads, rank, dim))


@_operator()
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


@_fake("compress_shared")
def _(x, index, rank, tolerance, given):
    batch, heads, _, dim = x.shape
    if given is not None:
        rank = torch.sym_min(rank, given.shape[2])
    rank = torch.sym_min(torch.sym_min(rank, heads * dim), batch * index.shape[1])
    bases = allocate_size(torch.library.get_ctx()._shape_env)
    coefficient = x.new_empty((batch, index.shape[1], rank))
    return coefficient, x.new_empty((bases, heads, rank, dim)), x.new_empty((batch,), dtype=torch.int64)


@_operator()
def sketch(x: Sequence[Tensor], index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What `compress` does before its eigenproblem, for tensors of one shape: `align` makes factors of it.

    x: s tensors `[B, H, T, D]`; index: int64 `[B, N]`, -1 for filler; rank: the highest that `align` will be asked for.
    Returns `C` fp32 `[s, B, N, k]` and `Q` `[s, B, H, D, k]` in x's dtype, k a little over the rank (`sketch_size`) and
    at most `min(N, H * D)`: tokens are about `C (Q^T Q)^-1 Q^T`, with `C = A Q`, columns of Q nearly orthonormal.
    Raises as `compress` does.
    """
    return _implementation(x[0]).sketch(x, index, rank)


@_fake("sketch")
def _(x, index, rank):
    batch, heads, _, dim = x[0].shape
    size = torch.sym_min(torch.sym_min(sketch_size(rank), heads * dim), index.shape[1])
    coefficient = x[0].new_empty((len(x), batch, index.shape[1], size), dtype=torch.float32)
    return coefficient, x[0].new_empty((len(x), batch, heads, dim, size))


@_operator()
def align(coefficient: Sequence[Tensor], basis: Sequence[Tensor], rank: Sequence[int]) -> list[Tensor]:
    """Factors from sketches, all in one eigenproblem: what `compress` returns, sorted and cut to the rank.

    coefficient, basis: of sketches, whatever their sizes; rank: one for every tensor of every sketch, in order.
    Returns coefficient `[B, N, R]`, basis `[B, H, R, D]` of each in turn, `R = min(rank, k)`, in the basis's dtype.
    """
    return _implementation(basis[0]).align(coefficient, basis, rank)


@_fake("align")
def _(coefficient, basis, rank):
    ranks, factors = iter(rank), []
    for c, b in zip(coefficient, basis, strict=True):
        tensors, batch, heads, dim, size = b.shape
        for _ in range(tensors):
            kept = torch.sym_min(next(ranks), size)
            factors += [b.new_empty((batch, c.shape[2], kept)), b.new_empty((batch, heads, kept, dim))]
    return factors


@_operator()
def take_rows(x: Tensor, index: Tensor, spare: int) -> Tensor:
    """Copy selected tokens, token-major, with room behind them.

    x: `[B, H, T, D]`; index: int64 `[B, m]`, -1 for filler (zero rows). Returns `[m + spare, B, H, D]`, spare rows
    zero.
    """
    return aten.take_rows(x, index, spare)


@_fake("take_rows")
def _(x, index, spare):
    batch, heads, _, dim = x.shape
    return x.new_empty((index.shape[1] + spare, batch, heads, dim))


@_operator(mutates=("tails",), visible=True)
def append_(tails: Sequence[Tensor], new: Sequence[Tensor], positions: Sequence[int]) -> None:
    """Write new tokens into the spare rows of one tail or more, in place.

    tails: `[rows, B, H, D]` each, none twice; new: `[B, H, k, D]` each. Of every tail, rows `position .. position + k -
    1` are overwritten, and must exist.
    """
    _implementation(tails[0]).append_(tails, new, positions)


@_fake("append_")
def _(tails, new, positions):
    return None


@_operator()
def decompress(
    coefficients: Sequence[Tensor],
    bases: Sequence[Tensor],
    tail: Tensor,
    length: int,
    index: Tensor,
    slot: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    axes: Tensor | None,
    blocks: Sequence[int],
    scales: Sequence[Tensor],
    owners: Sequence[Tensor],
) -> Tensor:
    """The dense meaning: `[B, H, P + length - m, D]`, tokens in logical order, padding zero.

    coefficients, bases: of every block, in order, of `Rows` codes and scale; tail, length, index, slot as in
        `parts.py`.
    cos, sin, interleaved, axes: None, or the `Angles` of packed rows that are keys before rotary embedding, which are
        then rotated (first E dims). Tail rows never are.
    blocks: segment number and kind of every block (`parts.layout`); empty: a segment each, as they are. scales: of
        low-rank blocks with codes their scale, of `Rows` their extras (`parts.row_extras`); owners: of blocks that are
        `OWNED`.
    """
    rotary = cos, sin, interleaved, axes
    return aten.decompress(coefficients, bases, tail, length, index, slot, *rotary, blocks, scales, owners)


@_fake("decompress")
def _(coefficients, bases, tail, length, index, slot, cos, sin, interleaved, axes, blocks, scales, owners):
    kept = index.shape[1] - _packed(coefficients, blocks)
    _, batch, heads, dim = tail.shape
    return tail.new_empty((batch, heads, slot.shape[1] + length - kept, dim))


@_operator(visible=True)
def attention(
    query: Tensor,
    key_coefficients: Sequence[Tensor],
    key_bases: Sequence[Tensor],
    value_coefficients: Sequence[Tensor],
    value_bases: Sequence[Tensor],
    key_tail: Tensor,
    value_tail: Tensor,
    length: int,
    index: Tensor,
    mask: Tensor | None,
    scale: float,
    ragged: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    axes: Tensor | None,
    key_blocks: Sequence[int],
    value_blocks: Sequence[int],
    key_scales: Sequence[Tensor],
    value_scales: Sequence[Tensor],
    key_owners: Sequence[Tensor],
    value_owners: Sequence[Tensor],
) -> Tensor:
    """`softmax(scale * q K^T + mask) V` over packed segments and tail in one softmax, never decompressed.

    query: `[B, Hq, Tq, D]`, Hq a multiple of the KV heads H; blocks and tails as in `parts.py`, keys and values may
        differ in segments, blocks, rank and head dim, and hold the same tokens in the same slots; of the key tail the
        first `length` rows count, of the value tail as many as give the same number of slots.
    mask: None, or bool (True attends) or additive, broadcastable to `[B, Hq, Tq, T]`, tokens in logical order.
    ragged: whether `index` holds filler, which is then left out.
    cos, sin, interleaved, axes: as in `decompress`, for the keys; blocks, scales and owners too, of keys and values.

    Returns `[B, Hq, Tq, Dv]` in query's dtype; rows whose every token is masked are zero, as in
    scaled_dot_product_attention.
    Has no gradient: backward raises.
    """
    arguments = (query, key_coefficients, key_bases, value_coefficients, value_bases, key_tail, value_tail, length)
    rotary, blocks = (cos, sin, interleaved, axes), (key_blocks, value_blocks)
    more = key_scales, value_scales, key_owners, value_owners
    return _attention(*arguments, index, mask, scale, ragged, *rotary, *blocks, *more, weights=False)[0]


@_operator(visible=True)
def attention_weights(
    query: Tensor,
    key_coefficients: Sequence[Tensor],
    key_bases: Sequence[Tensor],
    value_coefficients: Sequence[Tensor],
    value_bases: Sequence[Tensor],
    key_tail: Tensor,
    value_tail: Tensor,
    length: int,
    index: Tensor,
    mask: Tensor | None,
    scale: float,
    ragged: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    axes: Tensor | None,
    key_blocks: Sequence[int],
    value_blocks: Sequence[int],
    key_scales: Sequence[Tensor],
    value_scales: Sequence[Tensor],
    key_owners: Sequence[Tensor],
    value_owners: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """`attention`, and how much it attends to every slot: its weights, averaged over queries and query heads.

    Arguments and first result as in `attention`; weights fp32 `[B, slots]` with slots in storage order (packed tokens,
    then tail rows). Slots that are filler or masked have none; a sample's weights sum to 1 where any head saw a token.
    """
    arguments = (query, key_coefficients, key_bases, value_coefficients, value_bases, key_tail, value_tail, length)
    rotary, blocks = (cos, sin, interleaved, axes), (key_blocks, value_blocks)
    more = key_scales, value_scales, key_owners, value_owners
    return _attention(*arguments, index, mask, scale, ragged, *rotary, *blocks, *more, weights=True)


def _attention(query: Tensor, *arguments: Any, weights: bool) -> tuple[Tensor, Tensor]:
    implementation = triton if _has_kernels(query, *arguments, weights=weights) else aten
    return implementation.attention(query, *arguments, weights)


def _has_kernels(query: Tensor, *arguments: Any, weights: bool) -> bool:
    """Whether kernels take these arguments of `attention`. They keep the weights of one query."""
    fits = _implementation(query) is triton and not (weights and query.shape[2] > 1)
    return fits and triton.takes(query, *arguments)


@_fake("attention")
def _(query, key_coefficients, key_bases, value_coefficients, value_bases, key_tail, value_tail, *_):
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, heads, queries, value_tail.shape[-1]))


@_fake("attention_weights")
def _(query, key_coefficients, key_bases, value_coefficients, value_bases, key_tail, value_tail, length, *rest):
    batch, heads, queries, _ = query.shape
    slots = _packed(key_coefficients, rest[8]) + length
    out = query.new_empty((batch, heads, queries, value_tail.shape[-1]))
    return out, query.new_empty((batch, slots), dtype=torch.float32)


def _packed(coefficients: Sequence[Tensor], blocks: Sequence[int]) -> int:
    """How many slots the segments have."""
    return sum(coefficients[number].shape[1] for number in first_blocks(len(coefficients), blocks))


@_operator()
def observe(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    statistic: str,
    window: int,
    real: Tensor | None,
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

    Returns fp32 `[B, H, T]`, zero where no query counts. Raises ValueError for any other statistic, more queries than
    keys, or is_causal where it says nothing about which tokens the queries are.
    """
    return aten.observe(query, key, mask, scale, is_causal, statistic, window, real)


@_fake("observe")
def _(query, key, mask, scale, is_causal, statistic, window, real):
    return query.new_empty(key.shape[:3], dtype=torch.float32)


def _no_part_in_training(ctx, inputs, output):
    ctx.mark_non_differentiable(output)


# It stands in prefills that may be trained through; what it observes is no function of the loss.
torch.library.register_autograd(
    "attnpack::observe", lambda ctx, grad: (None,) * 8, setup_context=_no_part_in_training, lib=_LIBRARY
)


@_operator()
def fold(coefficient: Tensor, basis: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Append dense rows to a low-rank segment by the small SVD of `[coefficient basis; rows]`; cost independent of T.

    coefficient: `[B, N, R]`, N may be 0; basis: `[B, H, R, D]`; rows: `[n, B, H, D]`.
    Returns coefficient `[B, N + n, S]`, basis `[B, H, S, D]` with `S = min(rank, R + n, H * D)`, and `dropped` fp32
    `[B]`: the
    Frobenius norm of what this truncation dropped. Raises ValueError when a row holds NaN or Inf, as `compress` does.
    """
    return _implementation(basis).fold(coefficient, basis, rows, rank)


@_fake("fold")
def _(coefficient, basis, rows, rank):
    batch, heads, old, dim = basis.shape
    rank = torch.sym_min(torch.sym_min(rank, heads * dim), old + rows.shape[0])
    return (
        coefficient.new_empty((batch, coefficient.shape[1] + rows.shape[0], rank)),
        basis.new_empty((batch, heads, rank, dim)),
        coefficient.new_empty((batch,), dtype=torch.float32),
    )


@_operator()
def no_gradient(grad: Tensor, shape: Sequence[int]) -> Tensor:
    """What a backward pass through `attention` runs into.

    An operator, because AOTAutograd traces the backward of every graph, also of those that never run it.
    """
    raise RuntimeError("the packed cache is not differentiable; run under torch.no_grad() or keep the cache dense")


@_fake("no_gradient")
def _(grad, shape):
    return grad.new_empty(shape)


def _remember_shapes(ctx, inputs, output):
    ctx.shapes = [
        [tensor.shape for tensor in argument]
        if isinstance(argument, list | tuple)
        else getattr(argument, "shape", None)
        for argument in inputs
    ]


def _refuse_gradient(ctx, grad):
    def refuse(shape, needed):
        if isinstance(needed, list):
            return [refuse(*pair) for pair in zip(shape, needed, strict=True)]
        return no_gradient(grad, shape) if needed else None

    return tuple(refuse(*pair) for pair in zip(ctx.shapes, ctx.needs_input_grad, strict=True))


def _refuse_gradients(ctx, grad, grad_weights):
    return _refuse_gradient(ctx, grad)


torch.library.register_autograd("attnpack::attention", _refuse_gradient, setup_context=_remember_shapes, lib=_LIBRARY)
torch.library.register_autograd(
    "attnpack::attention_weights", _refuse_gradients, setup_context=_remember_shapes, lib=_LIBRARY
)


@_operator()
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` for few rows: on a CPU in fp32 by oneDNN, which streams the weight as it is.

    x: `[..., K]`; weight: `[N, K]`; bias: `[N]` or None. Returns `[..., N]`.
    """
    return aten.linear(x, weight, bias)


@_fake("linear")
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# ---- fewer tokens from a decoder layer on: see `aten/prune.py` for `rows`
# ---------------------------------------------------------------------------


def _new_rows(like: Tensor) -> Tensor:
    size = allocate_size(torch.library.get_ctx()._shape_env)
    return like.new_empty((like.shape[0], size), dtype=torch.int64)


@_operator()
def gather_tokens(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """The rows of x that stay.

    x: `[B or 1, ..., T, ...]` with its tokens in dimension `dim`, not the first. rows: int64 `[B, T']`, logical
    positions, ascending, filled up with -1; a filler row is a copy of its sample's last.
    Returns `[B, ..., T', ...]`, of x's dtype.
    """
    return aten.gather_tokens(x, rows, dim)


@_fake("gather_tokens")
def _(x, rows, dim):
    return x.new_empty((rows.shape[0], *x.shape[1:dim], rows.shape[1], *x.shape[dim + 1 :]))


@_operator()
def gather_mask(mask: Tensor, rows: Tensor) -> Tensor:
    """Rows and columns of an attention mask that stay; columns of filler are masked.

    mask: `[T, T]` or `[B or 1, H or 1, T or 1, T]`, bool (True: attend) or added to the scores. rows: as in
    `gather_tokens`. Returns `[B, H or 1, T' or 1, T']`.
    """
    return aten.gather_mask(mask, rows)


@_fake("gather_mask")
def _(mask, rows):
    batch, kept = rows.shape
    heads, queries = (1, kept) if mask.dim() == 2 else (mask.shape[1], 1 if mask.shape[2] == 1 else kept)
    return mask.new_empty((batch, heads, queries, kept))


@_operator()
def scatter_tokens(full: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    """`full` `[B, T, C]` with `part` `[B, T', C]` at `rows` `[B, T']`; filler writes nowhere. A new tensor."""
    return aten.scatter_tokens(full, rows, part)


@_fake("scatter_tokens")
def _(full, rows, part):
    return full.new_empty(full.shape)


@_operator()
def last_row_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """How much the last real prompt token attends to every token, averaged over query heads.

    query: `[B, Hq, T, D]`; key: `[B, H, T, D]`, `Hq` a multiple of H, both as attention reads them.
    mask: `[T, T]` or `[B or 1, Hq or 1, T, T]`, bool or added to the scores, None: causal. A token that no query may
    attend to is padding.
    Returns fp32 `[B, T]`, rows adding up to 1.
    """
    return aten.last_row_scores(query, key, mask, scale)


@_fake("last_row_scores")
def _(query, key, mask, scale):
    return query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)


@_operator()
def kept_rows(scores: Tensor, vision: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """Which rows stay when of every sample's N vision tokens the `round(share N)` of highest score do.

    scores: fp32 `[B, T]`, among equals earlier tokens win; vision: bool `[B or 1, T]`; mask: as in `last_row_scores`.
    All other tokens stay, so does the last one whatever it is; padding goes. Returns rows, int64 `[B, T']`; T' depends
    on the data.
    """
    return aten.kept_rows(scores, vision, mask, share)


@_fake("kept_rows")
def _(scores, vision, mask, share):
    return _new_rows(scores)


@_operator()
def random_scores(like: Tensor, seed: int) -> Tensor:
    """Uniform numbers of a generator seeded with `seed`, the same at every call: fp32, of the shape of `like`."""
    return aten.random_scores(like, seed)


@_fake("random_scores")
def _(like, seed):
    return like.new_empty(like.shape, dtype=torch.float32)


@_operator()
def pooled_rows(vision: Tensor, mask: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    """Runs of consecutive vision tokens in groups of `window`, the last of a run smaller; the first of each stays.

    vision: bool `[B, T]`; mask: as in `last_row_scores`.
    Returns rows, int64 `[B, T']`, and group, int64 `[B, T]`: the position whose row a token is merged into, for other
    tokens their own, -1 for padding. T' depends on the data.
    """
    return aten.pooled_rows(vision, mask, window)


@_fake("pooled_rows")
def _(vision, mask, window):
    return _new_rows(vision), vision.new_empty(vision.shape, dtype=torch.int64)


@_operator()
def merge_tokens(hidden: Tensor, rows: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """Weighted means of groups of tokens: `sum_t w_t h_t / sum_t w_t` over the tokens whose group is the row.

    hidden: `[B, T, C]`; rows: int64 `[B, T']`; group: int64 `[B, T]`, a position that is among rows, or -1.
    weight: `[B, T]`, not negative; a group of weight 0 keeps its row as it is, so does a group of one.
    Returns `[B, T', C]` in hidden's dtype, means taken in fp32.
    """
    return aten.merge_tokens(hidden, rows, group, weight)


@_fake("merge_tokens")
def _(hidden, rows, group, weight):
    return hidden.new_empty((hidden.shape[0], rows.shape[1], hidden.shape[2]))


@_operator()
def bidirectional_scores(
    query: Tensor, key: Tensor, vision: Tensor, mask: Tensor | None, scale: float, strongest: float
) -> tuple[Tensor, Tensor]:
    """Attention received under ASAP's soft mask, where vision tokens also see later ones (eq. 2-5).

    query, key, mask, scale: as in `last_row_scores`; vision: bool `[B or 1, T]`; strongest: lambda_max, in (0, 1].
    With W the scores: `s_j = sum over vision queries i of W_ij`, `lambda_j = lambda_max s^_j` with s^ scaled to [0, 1]
    over the vision tokens; vision queries see later vision tokens j with `ln(max(lambda_j, 1e-6))` added.
    Returns fp32 `[B, T]`: attention summed over the real queries, and s, both averaged over query heads.
    """
    return aten.bidirectional_scores(query, key, vision, mask, scale, strongest)


@_fake("bidirectional_scores")
def _(query, key, vision, mask, scale, strongest):
    made = query.new_empty((query.shape[0], query.shape[2]), dtype=torch.float32)
    return made, torch.empty_like(made)


@_operator()
def merged_rows(
    hidden: Tensor,
    attention: Tensor,
    raw: Tensor,
    vision: Tensor,
    mask: Tensor | None,
    most: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ASAP's choice of tokens: best by attention, similar ones merged (eq. 6), as many others salvaged.

    hidden: `[B, T, C]`; attention, raw: as `bidirectional_scores` returns them; vision, mask: as in `kept_rows`;
    most: how many vision tokens stay; threshold: the cosine above which one absorbs another of no larger weight.
    Returns rows int64 `[B, T']`, group int64 `[B, T]` and weight fp32 `[B, T]`, as `merge_tokens` takes them. T'
    depends on the data.
    """
    return aten.merged_rows(hidden, attention, raw, vision, mask, most, threshold)


@_fake("merged_rows")
def _(hidden, attention, raw, vision, mask, most, threshold):
    return _new_rows(raw), raw.new_empty(raw.shape, dtype=torch.int64), torch.empty_like(raw)


for _name in ("gather_tokens", "scatter_tokens", "merge_tokens"):
    torch.library.register_autograd(
        f"attnpack::{_name}", _refuse_gradient, setup_context=_remember_shapes, lib=_LIBRARY
    )
