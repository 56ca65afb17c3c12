"""What the operators that leave out tokens compute, in float64 and token by token: part of the specification."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Least weight of a later vision token in ASAP's soft mask.
SMALLEST = 1e-6


def bias_of(mask: Tensor | None, batch: int, heads: int, tokens: int) -> Tensor:
    """A mask as what is added to the scores: `[B, Hq, T, T]`, -inf where nothing is attended to; None is causal."""
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    full = mask.expand(batch, heads, tokens, tokens)
    if full.dtype == torch.bool:
        return torch.zeros(full.shape, dtype=torch.float64).masked_fill(~full, -torch.inf)
    return full.double().masked_fill(full <= torch.finfo(full.dtype).min / 2, -torch.inf)


def real_of(mask: Tensor | None, batch: int, tokens: int) -> list[list[bool]]:
    """Which tokens some query may attend to; others are padding."""
    if mask is None:
        return [[True] * tokens for _ in range(batch)]
    heads = mask.shape[1] if mask.dim() == 4 else 1
    bias = bias_of(mask, batch, heads, tokens)
    return [[not bool(bias[sample, :, :, t].isneginf().all()) for t in range(tokens)] for sample in range(batch)]


def prunable(vision: Tensor, mask: Tensor | None, sample: int, batch: int) -> list[int]:
    """The vision tokens of a sample that may go: no padding, and not its last token."""
    tokens = vision.shape[1]
    real = real_of(mask, batch, tokens)[sample]
    last = max(t for t in range(tokens) if real[t])
    return [t for t in range(last) if real[t] and bool(vision.expand(batch, tokens)[sample, t])]


def last_row_scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`mean over heads of softmax(scale q K^T + mask)`, the row of the last token that is no padding: `[B, T]`."""
    batch, heads, tokens, _ = query.shape
    keys = key.repeat_interleave(heads // key.shape[1], 1).double()
    bias, real = bias_of(mask, batch, heads, tokens), real_of(mask, batch, tokens)
    out = torch.zeros(batch, tokens, dtype=torch.float64)
    for sample in range(batch):
        last = max(t for t in range(tokens) if real[sample][t])
        for head in range(heads):
            scores = scale * keys[sample, head] @ query[sample, head, last].double() + bias[sample, head, last]
            out[sample] += torch.softmax(scores, 0) / heads
    return out


def kept(scores: Sequence[float], candidates: Sequence[int], count: int) -> set[int]:
    """The `count` candidates of highest score, earlier ones first among equals."""
    return set(sorted(candidates, key=lambda t: (-scores[t], t))[:count])


def kept_rows(scores: Tensor, vision: Tensor, mask: Tensor | None, share: float) -> list[list[int]]:
    """Positions that stay, ascending: all real text, and `round(share N)` of a sample's N real vision tokens."""
    batch, tokens = scores.shape
    real, rows = real_of(mask, batch, tokens), []
    for sample, row in enumerate(scores.tolist()):
        seen = prunable(vision, mask, sample, batch)
        stay = kept(row, seen, round(share * len(seen)))
        rows.append([t for t in range(tokens) if real[sample][t] and (t not in seen or t in stay)])
    return rows


def pooled_groups(vision: Tensor, mask: Tensor | None, window: int) -> list[list[list[int]]]:
    """Tokens that are averaged, of every sample, in order; a real text token is alone."""
    batch, tokens = vision.shape
    real, out = real_of(mask, batch, tokens), []
    for sample in range(batch):
        groups: list[list[int]] = []
        open_group, seen = False, prunable(vision, mask, sample, batch)
        for t in range(tokens):
            if t not in seen:
                open_group = False
                if real[sample][t]:
                    groups.append([t])
            elif open_group and len(groups[-1]) < window:
                groups[-1].append(t)
            else:
                groups.append([t])
                open_group = True
        out.append(groups)
    return out


def merge_tokens(hidden: Tensor, rows: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """`sum_t w_t h_t / sum_t w_t` over the tokens of a row's group; the row itself where that is alone or weighs 0.

    Filler rows are copies of the sample's last.
    """
    out = hidden.new_zeros((*rows.shape, hidden.shape[2]), dtype=torch.float64)
    for sample in range(rows.shape[0]):
        last = max([int(row) for row in rows[sample]], default=0)
        for number, row in enumerate(rows[sample].tolist()):
            row = last if row < 0 else row
            members = [t for t in range(hidden.shape[1]) if int(group[sample, t]) == row]
            weights = [float(weight[sample, t]) for t in members]
            out[sample, number] = hidden[sample, row].double()
            if len(members) > 1 and sum(weights) > 0:
                terms = [w * hidden[sample, t].double() for w, t in zip(weights, members, strict=True)]
                out[sample, number] = torch.stack(terms).sum(0) / sum(weights)
    return out


def bidirectional_scores(
    query: Tensor, key: Tensor, vision: Tensor, mask: Tensor | None, scale: float, strongest: float
) -> tuple[Tensor, Tensor]:
    """ASAP eq. 2-5: attention every token gets from the real queries, and `s_j`, averaged over heads: `[B, T]` each.

    s_j = sum over vision i of W_ij,  lambda_j = strongest (s_j - s_min) / (s_max - s_min + 1e-6)
    M_ij = mask_ij, but ln(max(lambda_j, 1e-6)) where i < j are vision tokens and mask_ij = -inf
    """
    batch, heads, tokens, _ = query.shape
    scores = scale * query.double() @ key.repeat_interleave(heads // key.shape[1], 1).double().transpose(2, 3)
    bias, real = bias_of(mask, batch, heads, tokens).clone(), real_of(mask, batch, tokens)
    attention, raw = torch.zeros(batch, tokens).double(), torch.zeros(batch, tokens).double()
    for sample in range(batch):
        seen = prunable(vision, mask, sample, batch)
        raw[sample] = scores[sample][:, seen].sum(1).mean(0)
        strengths = normalised(raw[sample].tolist(), seen)
        for j in seen:
            soft = math.log(max(strongest * strengths[j], SMALLEST))
            for i in seen:
                if i < j:
                    row = bias[sample, :, i, j]
                    bias[sample, :, i, j] = torch.where(row.isneginf(), soft, row)
        for i in range(tokens):
            if real[sample][i]:
                attention[sample] += torch.softmax(scores[sample, :, i] + bias[sample, :, i], -1).mean(0)
    return attention, raw


def normalised(raw: Sequence[float], seen: Sequence[int]) -> dict[int, float]:
    """`(s - s_min) / (s_max - s_min + 1e-6)` of the vision tokens."""
    values = [raw[t] for t in seen] or [0.0]
    return {t: (raw[t] - min(values)) / (max(values) - min(values) + 1e-6) for t in seen}


def merged_rows(
    hidden: Tensor, attention: Tensor, raw: Tensor, vision: Tensor, mask: Tensor | None, most: int, threshold: float
) -> list[tuple[list[int], dict[int, int]]]:
    """ASAP: rows that stay, and which row each token is merged into, of every sample.

    Of the `most` vision tokens of highest attention, each in descending order of `s` takes those behind it whose hidden
    states have a cosine above the threshold and that nobody took; who is taken takes nobody. As many of the others as
    were taken stay in their place, those of highest `s`.
    """
    batch, tokens, _ = hidden.shape
    real, out = real_of(mask, batch, tokens), []
    for sample in range(batch):
        seen = prunable(vision, mask, sample, batch)
        chosen = kept(attention[sample].tolist(), seen, min(most, len(seen)))
        strengths = normalised(raw[sample].tolist(), seen)
        order = sorted(chosen, key=lambda t: (-strengths[t], t))
        unit = torch.nn.functional.normalize(hidden[sample].double(), dim=-1)
        owner: dict[int, int] = {}
        for place, i in enumerate(order):
            if i in owner:
                continue
            for j in order[place + 1 :]:
                if j not in owner and min(float(unit[i] @ unit[j]), 1.0) > threshold:
                    owner[j] = i
        others = [t for t in seen if t not in chosen]
        salvaged = kept(raw[sample].tolist(), others, len(owner))
        text = [t for t in range(tokens) if real[sample][t] and t not in seen]
        rows = sorted([*text, *(chosen - owner.keys()), *salvaged])
        out.append((rows, {**{t: t for t in rows}, **owner}))
    return out
