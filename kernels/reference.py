"""What every operator computes, in float64 and straight from its formula: the specification.

Nothing here is fast or saves memory: keys and values are built densely, tokens are placed one by one. Arguments are
those of `ops.py`, packed tensors as `PackedParts`. Factors are unique only up to signs (and rotations within equal
singular values), so implementations are compared by the matrices they multiply to, by the error of those, and by the
properties `parts.py` promises.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnpack_fx.kernels.linalg import sketch_size
from attnpack_fx.kernels.parts import E4M3, E5M2, Block, PackedParts, Rows, formats, kind, tokens_of


def plan(
    modality: Tensor | None,
    real: Tensor | None,
    like: Tensor,
    text: bool,
    vision_gain: Sequence[int],
    text_gain: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of vision, packed text and dense tokens `[B, ...]`, and the slot of every position `[B, T]`."""
    batch, tokens = like.shape[0], like.shape[2]

    def row(flags: Tensor | None, sample: int, default: bool) -> list[bool]:
        return [default] * tokens if flags is None else flags.expand(batch, tokens)[sample].tolist()

    vision, rest, everything = [], [], []
    for sample in range(batch):
        kept = [t for t, flag in enumerate(row(real, sample, True)) if flag]
        seen = row(modality, sample, False)
        vision.append([t for t in kept if seen[t]])
        rest.append([t for t in kept if not seen[t]])
        everything.append(kept)
    if not worth_packing(vision, vision_gain):
        vision, rest = [[] for _ in vision], everything
    packed = text and worth_packing(rest, text_gain)
    empty: list[list[int]] = [[] for _ in rest]
    lists = (vision, rest if packed else empty, empty if packed else rest)
    indices = [_filled_up(positions) for positions in lists]
    slot = torch.full((batch, tokens), -1)
    index = torch.cat(indices, 1)
    for sample in range(batch):
        for number, position in enumerate(index[sample].tolist()):
            if position >= 0:
                slot[sample, position] = number
    return indices[0], indices[1], indices[2], slot


def worth_packing(positions: list[list[int]], gain: Sequence[int]) -> bool:
    """Whether factors of a key and a value segment, with cos and sin, take less room than its rows."""
    tokens = max(map(len, positions), default=0)
    if tokens == 0 or not gain:
        return tokens > 0
    key_rank, value_rank, key_width, value_width, turning = gain
    key_factors = min(key_rank, tokens, key_width) * (tokens + key_width)
    value_factors = min(value_rank, tokens, value_width) * (tokens + value_width)
    return key_factors + value_factors + tokens * turning < tokens * (key_width + value_width)


def _filled_up(positions: list[list[int]]) -> Tensor:
    longest = max(map(len, positions), default=0)
    rows = [row + [-1] * (longest - len(row)) for row in positions]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(positions), longest)


def take_rows(x: Tensor, index: Tensor, spare: int) -> Tensor:
    """`rows[j, b] = x[b, :, index[b, j]]`, zero for filler and spare rows: `[m + spare, B, H, D]`."""
    batch, heads, _, dim = x.shape
    rows = x.new_zeros((index.shape[1] + spare, batch, heads, dim))
    for sample in range(batch):
        for number, position in enumerate(index[sample].tolist()):
            if position >= 0:
                rows[number, sample] = x[sample, :, position]
    return rows


def append_(tails: Sequence[Tensor], new: Sequence[Tensor], positions: Sequence[int]) -> None:
    """`tail[position + j, b] = new[b, :, j]`."""
    for tail, tokens, position in zip(tails, new, positions, strict=True):
        for number in range(tokens.shape[2]):
            tail[position + number] = tokens[:, :, number]


def compress(x: Tensor, index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`A = U S W^T` with `A[j] = concat_h x[h, index[j]]`; coefficient `U_R S_R`, basis `W_R^T`."""
    _, heads, _, dim = x.shape
    a = take_rows(x.double(), index, 0).transpose(0, 1).flatten(2)
    left, singular, right = torch.linalg.svd(a, full_matrices=False)
    size = min(rank, *a.shape[1:])
    basis = right[:, :size].unflatten(-1, (heads, dim)).transpose(1, 2)
    return left[..., :size] * singular[:, None, :size], basis


def compress_shared(
    x: Tensor, index: Tensor, rank: int, tolerance: float, given: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of many samples' tokens as one matrix, or the projection on a given basis; alone where that is too far.

    Of the samples that leave out more than `tolerance`, the worse half leaves the common matrix, until none does.
    """
    batch, heads, _, dim = x.shape
    a = take_rows(x.double(), index, 0).transpose(0, 1).flatten(2)
    columns = min(rank, batch * a.shape[1], heads * dim) if given is None else min(rank, given.shape[2])

    def left_out(sample: int, basis: Tensor) -> float:
        total = a[sample].square().sum()
        return float(1 - (a[sample] @ basis.T).square().sum() / total) if total else 0.0

    if given is not None:
        common = given[0, :, :columns].double().transpose(0, 1).flatten(1)
    else:
        fitted = list(range(batch))
        while True:
            common = torch.linalg.svd(a[fitted].flatten(0, 1), full_matrices=False).Vh[:columns]
            bad = [sample for sample in fitted if left_out(sample, common) > tolerance]
            if not bad or len(fitted) == 1:
                break
            fitted.sort(key=lambda sample: left_out(sample, common))
            fitted = fitted[: len(fitted) - (len(bad) + 1) // 2]
        common = torch.nn.functional.pad(common, (0, 0, 0, columns - common.shape[0]))
    coefficient = a @ common.T
    alone, owners = [], []
    for sample in range(batch):
        owners.append(0)
        if left_out(sample, common) > tolerance:
            own, basis = compress(x[sample : sample + 1], index[sample : sample + 1], columns)
            coefficient[sample] = torch.nn.functional.pad(own[0], (0, columns - own.shape[2]))
            alone.append(torch.nn.functional.pad(basis, (0, 0, 0, columns - basis.shape[2])))
            owners[-1] = len(alone)
    first = common.unflatten(1, (heads, dim)).transpose(0, 1)[None]
    kept = given is None and len(alone) < batch
    skipped = 0 if kept or given is not None else 1
    bases = torch.cat([first if kept else first[:0], *alone])
    return coefficient, bases, torch.tensor(owners, dtype=torch.int64) - skipped


def sketch(x: Sequence[Tensor], index: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`Q` the leading right singular vectors of A, as many as `sketch_size(rank)`; `C = A Q`. `align` may lose nothing.

    Any Q that spans nearly as much of A serves as well.
    """
    coefficients, bases = [], []
    for item in x:
        coefficient, basis = compress(item, index, sketch_size(rank))
        coefficients.append(coefficient)
        bases.append(basis.permute(0, 1, 3, 2))
    return torch.stack(coefficients), torch.stack(bases)


def align(coefficient: Sequence[Tensor], basis: Sequence[Tensor], rank: Sequence[int]) -> list[Tensor]:
    """The truncated SVD of each `C (Q^T Q)^-1 Q^T`, as factors."""
    pairs = [pair for stacks in zip(coefficient, basis, strict=True) for pair in zip(*stacks, strict=True)]
    factors: list[Tensor] = []
    for (c, q), wanted in zip(pairs, rank, strict=True):
        columns = q.double().flatten(1, 2)
        a = c.double() @ torch.linalg.pinv(columns)
        everything = torch.arange(a.shape[1]).expand(a.shape[0], -1)
        rows = a.unflatten(2, q.shape[1:3]).transpose(1, 2)
        factors += compress(rows, everything, min(wanted, q.shape[3]))
    return factors


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
    """Sum, last row, or count of `A >= 1 / t` over the newest `window` queries that count: `[B, H, T]`."""
    weights, sight = observed(query, key, mask, scale, is_causal, real, cap, sinks)
    if statistic == "pivotal together":
        weights, sight = (
            each.expand(-1, key.shape[1], *each.shape[2:])
            for each in (weights.mean(1, keepdim=True), sight.amax(1, keepdim=True))
        )
    seen = torch.zeros_like(weights[:, :, 0])
    for sample in range(weights.shape[0]):
        counting = [row for row in range(weights.shape[2]) if sight[sample, 0, row] > 0]
        for row in counting[-(1 if statistic == "last" else window) :]:
            for head in range(weights.shape[1]):
                a, t = weights[sample, head, row], float(sight[sample, head, row])
                seen[sample, head] += (a * t >= 1).double() if statistic.startswith("pivotal") else a
    return seen


def observed(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    real: Tensor | None,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention weights averaged over the query heads of a KV head `[B, H, Tq, T]`, and tokens in sight `[B, H, Tq]`.

    Queries of padding, and queries that no head shows a token, have 0 in sight.
    """
    heads, queries = query.shape[1:3]
    kv_heads, tokens = key.shape[1:3]
    group = heads // kv_heads
    scores = capped(scale * query.double() @ key.double().repeat_interleave(group, 1).transpose(-1, -2), cap)
    sees = torch.ones_like(scores, dtype=torch.bool)
    if is_causal:
        sees = sees.tril()
    if mask is not None and mask.dtype == torch.bool:
        sees = mask.expand_as(sees)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask.double()
        sees = (mask > torch.finfo(mask.dtype).min / 2).expand_as(sees)
    else:
        scores = scores.masked_fill(~sees, -torch.inf)
    weights = attended(scores, sinks).unflatten(1, (kv_heads, group)).mean(2)
    sight = sees.unflatten(1, (kv_heads, group)).any(2).sum(-1)
    counts = sees.any(-1).any(1)
    if real is not None:
        counts = counts & real[:, tokens - queries :]
    # A head that alone is shown nothing has no weights; its query counts all the same.
    return weights, torch.where(counts[:, None], sight.clamp(min=1), 0)


def fold(coefficient: Tensor, basis: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The truncated SVD of `[coefficient basis; rows]`, and the Frobenius norm of what it drops."""
    batch, heads, old, dim = basis.shape
    held = coefficient.double() @ basis.double().transpose(1, 2).flatten(2)
    stacked = torch.cat([held, rows.double().transpose(0, 1).flatten(2)], 1)
    size = min(rank, old + rows.shape[0], heads * dim)
    left, singular, right = torch.linalg.svd(stacked, full_matrices=True)
    scaled = stacked.new_zeros((batch, stacked.shape[1], size))
    kept = min(size, singular.shape[1])
    scaled[..., :kept] = left[..., :kept] * singular[:, None, :kept]
    dropped = singular[:, size:].square().sum(-1).sqrt()
    return scaled, right[:, :size].unflatten(-1, (heads, dim)).transpose(1, 2), dropped.float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn pairs of dims of x `[B, H, N, D]` by the angles of their token; cos and sin `[B or 1, N, E / 2]`.

    The pairs are `(i, i + E / 2)`, or `(2 i, 2 i + 1)` when interleaved; dims from E on stay.
    """
    out, pairs = x.clone(), cos.shape[-1]
    for pair in range(pairs):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        out[..., a] = x[..., a] * cos[:, None, :, pair] - x[..., b] * sin[:, None, :, pair]
        out[..., b] = x[..., b] * cos[:, None, :, pair] + x[..., a] * sin[:, None, :, pair]
    return out


def stored(parts: PackedParts[Tensor]) -> Tensor:
    """The dense rows in slot order, `[B, H, sum of N_s + length, D]`: of each segment the sum of its blocks, or
    its coded rows."""
    _, batch, heads, dim = parts.tail.shape
    rows = parts.tail[: parts.length].double().permute(1, 2, 0, 3)
    packed: list[Tensor] = []
    for segment in parts.segments:
        total = rows.new_zeros((batch, heads, tokens_of(segment.blocks[0]), dim))
        for block in segment.blocks:
            if isinstance(block, Rows):
                total += coded(block, dim).transpose(1, 2)
            else:
                c, b = factors(block, dim)
                total[:, :, : c.shape[1]] += c[:, None] @ b
        packed.append(total)
    together = torch.cat([rows[:, :, :0], *packed], 2)
    if parts.angles is not None:
        cos, sin, axes = parts.angles.cos.double(), parts.angles.sin.double(), parts.angles.axes
        if axes is not None:
            cos, sin = _summed(cos, axes), _summed(sin, axes)
        turned = rotate(together[:, :, : cos.shape[1]], cos, sin, parts.angles.interleaved)
        together = torch.cat([turned, together[:, :, cos.shape[1] :]], 2)
    return torch.cat([together, rows], 2)


def factors(block: Block[Tensor], dim: int) -> tuple[Tensor, Tensor]:
    """Coefficient `[B, n, r]` and basis `[B or 1, H, r, D]` of a block, as numbers."""
    c, b = block.coefficient, block.basis
    if block.owner is not None:
        b = torch.stack([b[owner] for owner in block.owner.tolist()])
    if block.scale is not None:
        bits, basis_bits = formats(kind(block))
        scale, signed = block.scale.double(), not block.asymmetric
        zero = torch.zeros_like(scale) if signed else scale[:, 2:]
        if bits:
            c = decoded(c, scale.shape[2], bits, signed) * scale[:, 0, None] + zero[:, 0, None]
        if basis_bits:
            b = decoded(b, dim, basis_bits, signed) * scale[:, 1, None, :, None] + zero[:, 1, None, :, None]
    return c.double(), b.double()


def decoded(codes: Tensor, size: int, bits: int, signed: bool = True) -> Tensor:
    """The levels behind codes of this format, `size` in the last dim, low bits of a byte first.

    Signed fields are in two's complement; those of two bits stand half a level higher, so that they have no zero.
    Floats have a sign, 4 or 5 bits of exponent with bias 7 or 15, and 3 or 2 of mantissa; exponent 0 is subnormal.
    """
    if bits in (E4M3, E5M2):
        mantissa_bits, bias = (3, 7) if bits == E4M3 else (2, 15)
        whole = codes[..., :size].double()
        magnitude = whole % 128
        exponent = magnitude.div(2**mantissa_bits, rounding_mode="floor")
        mantissa = magnitude % 2**mantissa_bits / 2**mantissa_bits
        normal = (1 + mantissa) * 2 ** (exponent - bias)
        return torch.where(exponent == 0, mantissa * 2 ** (1 - bias), normal) * torch.where(whole < 128, 1.0, -1.0)
    fields = torch.stack([(codes.int() >> shift) % 2**bits for shift in range(0, 8, bits)], -1).flatten(-2)[..., :size]
    if not signed:
        return fields.double()
    return torch.where(fields < 2 ** (bits - 1), fields, fields - 2**bits).double() + (0.5 if bits == 2 else 0.0)


def coded(rows: Rows[Tensor], dim: int) -> Tensor:
    """`x[t, h] = norm[t, h] (level(codes[t, h]) scale + zero)`, outliers put in, `+ left[t, h] right[part_of[t], h]`.

    The dense tokens `[B, n, H, D]`.
    """
    form, (batch, tokens, heads) = rows.form, rows.codes.shape[:3]
    level = decoded(rows.codes, dim, form.bits, signed=False) if form.bits else rows.codes.double()
    if rows.codebook is not None:
        books = rows.codebook.double().reshape(-1, 2**form.bits).expand(heads, -1)
        level = torch.stack([books[h][level[:, :, h].long()] for h in range(heads)], 2)
    x = level.contiguous().clone()
    for b in range(batch):
        for t in range(tokens):
            if rows.group_of is not None:
                group = int(rows.group_of[b, t])
                scale, zero = rows.scale[b, group], None if rows.zero is None else rows.zero[b, group]
            elif form.group:
                of_channel = [channel // form.group for channel in range(dim)]
                scale = rows.scale[b, t][:, of_channel]
                zero = None if rows.zero is None else rows.zero[b, t][:, of_channel]
            else:
                scale, zero = torch.ones(()), None
            x[b, t] = x[b, t] * scale.double() + (0 if zero is None else zero.double())
            if rows.norm is not None:
                x[b, t] *= rows.norm[b, t, :, None].double()
        if rows.places is not None and rows.outliers is not None:
            for place, outlier in zip(rows.places[b].tolist(), rows.outliers[b].tolist(), strict=True):
                if place >= 0:
                    x[b].view(-1)[place] = outlier
        if rows.left is not None and rows.right is not None and rows.part_of is not None:
            for t in range(tokens):
                right = rows.right[b, int(rows.part_of[b, t])].double()
                x[b, t] += (rows.left[b, t].double().unsqueeze(1) @ right).squeeze(1)
    return x


def _summed(table: Tensor, axes: Tensor) -> Tensor:
    """`out[b, n] = sum over a of table[b, axes[b, a, n]]`."""
    batch = max(table.shape[0], axes.shape[0])
    table, axes = table.expand(batch, -1, -1), axes.expand(batch, -1, -1)
    return torch.stack([table[b][axes[b]].sum(0) for b in range(batch)])


def decompress(parts: PackedParts[Tensor]) -> Tensor:
    """Rows in logical order: placed position t holds slot `slot[t]` (zero without one), then the appended rows."""
    rows, slot, placed = stored(parts), parts.slot, parts.index.shape[1]
    assert slot is not None
    batch, heads, slots, dim = rows.shape
    prompt = slot.shape[1]
    out = rows.new_zeros((batch, heads, prompt + slots - placed, dim))
    for sample in range(batch):
        for position, number in enumerate(slot[sample].tolist()):
            if number >= 0:
                out[sample, :, position] = rows[sample, :, number]
    out[:, :, prompt:] = rows[:, :, placed:]
    return out


def attention(
    query: Tensor,
    keys: PackedParts[Tensor],
    values: PackedParts[Tensor],
    mask: Tensor | None,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """`softmax(scale q K^T + mask) V` over the slots, K and V dense, KV heads repeated for their query heads."""
    return attention_weights(query, keys, values, mask, scale, cap, sinks)[0]


def attention_weights(
    query: Tensor,
    keys: PackedParts[Tensor],
    values: PackedParts[Tensor],
    mask: Tensor | None,
    scale: float,
    cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and its softmax weights, averaged over heads and queries: `[B, slots]`."""
    group, index = query.shape[1] // keys.tail.shape[2], keys.index
    k, v = (stored(parts).repeat_interleave(group, 1) for parts in (keys, values))
    scores = capped(scale * query.double() @ k.transpose(-1, -2), cap)
    slots, prompt_slots = scores.shape[-1], index.shape[1]
    if mask is not None:
        # Slots of the prompt read the column of their position, appended ones the last columns in order.
        last = mask.shape[-1] - (slots - prompt_slots)
        full = mask.expand(*scores.shape[:3], mask.shape[-1])
        for sample in range(query.shape[0]):
            for number in range(slots):
                position = int(index[sample, number]) if number < prompt_slots else last + number - prompt_slots
                if mask.shape[-1] == 1:
                    position = 0
                column = full[sample, :, :, max(position, 0)]
                bias = torch.where(column, 0.0, -torch.inf) if mask.dtype == torch.bool else column.double()
                scores[sample, :, :, number] += bias
    if keys.ragged:
        scores[..., :prompt_slots].masked_fill_((index < 0)[:, None, None], -torch.inf)
    weights = attended(scores, sinks)
    return weights @ v, weights.mean((1, 2))


def capped(scores: Tensor, cap: float) -> Tensor:
    """`cap tanh(scores / cap)`; without a cap as they are."""
    return cap * torch.tanh(scores / cap) if cap else scores


def attended(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of `[B, Hq, Tq, T]` beside one more score per head, `[B or 1, Hq]`, whose share is left out."""
    if sinks is not None:
        more = sinks.double()[:, :, None, None].expand(*scores.shape[:3], 1)
        return torch.softmax(torch.cat([scores, more], -1), -1)[..., :-1]
    # Rows whose every token is masked have no weights.
    return torch.softmax(scores, -1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias`."""
    product = x.double() @ weight.double().T
    return product if bias is None else product + bias.double()
