"""The axes of multimodal rotary embedding, found in the cos and sin of the tokens.

In the Qwen-VL models every rotary frequency turns with one coordinate of a token: its time, its row or its column. So
`[cos | sin]` of a token is a sum of one row per axis, out of tables that are as long as the axes: 64 rows rather than
1024 for an image of 32 x 32 tokens. Which frequency belongs to which axis differs from model to model (sections, or one
after the other in turn), and what it turns with differs from image to image; the values themselves show both.

Two frequencies are of one axis when tables of both together are shorter than a table each: columns then take the same
values at the same tokens, or one takes fewer. Rounding to bf16 makes neighbours on an axis equal at slow frequencies,
and some far ones at fast frequencies, which is why one frequency alone does not show all positions of its axis.
"""

import torch
from torch import Tensor

#: Pairs of labels above which they are sorted rather than counted in a table.
_TABLE = 1 << 20
#: Tokens that most columns are told apart by; the others are compared at every token.
_PROBES = 512
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def tabulate(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Tables of cos and sin per axis `[B or 1, P, E / 2]`, and the row of every slot per axis, int64 `[B or 1, A, N]`.

    cos, sin: `[B or 1, N, E / 2]`, one entry per pair of dims and slot.

    `sum over a of table[axes[a, n]]` is the given row n, bit for bit: see `aten.rotary.Rotary`. Samples may differ in
    their grids; shorter tables are padded. None where the tables would be longer than half of N: 1-D rotary embedding,
    or text. The search is on the host, where its many decisions wait for nothing: a GPU is waited for once.
    """
    batch, tokens, pairs = cos.shape
    if tokens == 0 or pairs == 0:
        return None
    if cos.dtype not in _BITS or sin.dtype != cos.dtype:
        raise ValueError(f"cos and sin: got {cos.dtype} and {sin.dtype}, expected one dtype of 16 or 32 bits")
    device, both = cos.device, torch.stack([cos, sin]).cpu()
    found = _axes(_columns(both), batch)
    if found is None:
        return None
    labels, owner = found
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    axes = torch.empty((batch, len(labels), tokens), dtype=torch.int64)
    for axis, label in enumerate(labels):
        first_token = _representatives(label)
        # -0.0 is what adds nothing to anything, +0.0 included.
        table = both.flatten(1, 2)[:, first_token].masked_fill(owner != axis, -0.0)
        counts = torch.bincount(first_token // tokens, minlength=batch)
        starts = counts.cumsum(0) - counts
        axes[:, axis] = label.view(batch, tokens) - starts[:, None]
        for sample, part in enumerate(table.split(counts.tolist(), 1)):
            axes[sample, axis] += sum(each.shape[1] for each in rows[sample])
            rows[sample].append(part)
    lengths = [sum(each.shape[1] for each in parts) for parts in rows]
    longest = max(lengths)
    if 2 * longest > tokens:
        return None
    tables = both.new_zeros((2, batch, longest, pairs))
    for sample, parts in enumerate(rows):
        tables[:, sample, : lengths[sample]] = torch.cat(parts, 1)
    return tables[0].to(device), tables[1].to(device), axes.to(device)


def _columns(both: Tensor) -> Tensor:
    """The bits of every pair's `(cos, sin)` at every token: int64 `[E / 2, B * N]`."""
    high, low = (x.view(_BITS[both.dtype]).flatten(0, 1).T.long() for x in both)
    return high * 2**32 + low


def _axes(columns: Tensor, batch: int) -> tuple[list[Tensor], Tensor] | None:
    """Labels `[B * N]` of the tokens along each axis, and the axis of every pair. None: too many positions."""
    pairs, slots = columns.shape
    sample = torch.arange(batch).repeat_interleave(slots // batch)
    labels: list[Tensor] = []
    owner = torch.full((pairs,), -1)
    for pair in range(pairs):
        if owner[pair] >= 0:
            continue
        label = sample
        if not _follows(columns[pair : pair + 1], label)[0]:
            label = _joined(label, torch.unique(columns[pair], return_inverse=True)[1])
        best, axis = None, len(labels)
        for number, other in enumerate(labels):
            both = _joined(label, other)
            saved = _count(label) + _count(other) - _count(both)
            if saved > 0 and (best is None or _count(both) < _count(best)):
                best, axis = both, number
        if best is not None:
            label = labels[axis] = best
        else:
            labels.append(label)
        # Axes only ever grow in length and number.
        if 2 * sum(map(_count, labels)) > slots:
            return None
        free = (owner < 0).nonzero()[:, 0]
        owner[free[_follows(columns[free], label)]] = axis
    return labels, owner


def _count(label: Tensor) -> int:
    return int(label.max()) + 1


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """Labels that tell two tokens apart where a or b does: 0, 1, ... without gaps, in the order of a, then b."""
    width = _count(b)
    cells = a * width + b
    size = _count(a) * width
    if size > _TABLE:
        return torch.unique(cells, return_inverse=True)[1]
    used = torch.zeros(size, dtype=torch.bool)
    used[cells] = True
    return (used.cumsum(0) - 1)[cells]


def _representatives(label: Tensor) -> Tensor:
    """The first token of every label."""
    tokens = torch.arange(label.shape[0])
    return torch.full_like(tokens[: _count(label)], label.shape[0]).scatter_reduce_(0, label, tokens, "amin")


def _follows(columns: Tensor, label: Tensor) -> Tensor:
    """Whether tokens of one label have one value, bool for each of `columns [c, B * N]`."""
    first = _representatives(label)[label]
    few = torch.arange(0, label.shape[0], 1 + label.shape[0] // _PROBES)
    likely = (columns[:, first[few]] == columns[:, few]).all(1)
    for number in likely.nonzero()[:, 0].tolist():
        likely[number] = torch.equal(columns[number][first], columns[number])
    return likely
