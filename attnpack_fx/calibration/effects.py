"""What a component of packed keys or values does to the attention output, for the queries that were seen.

    o_h = sum_t p_ht v_t                                       output of head h, p = softmax(scores)
    values ~ C B:  dropping i changes o_h by sum_t p_ht C[t, i] B[i, h]                                   (exact)
    keys ~ C B:    dropping i changes scores by ds_ht = scale q_h . R_t B[i, h] C[t, i], and o_h by
                   sum_t p_ht ds_ht (v_t - o_h)                                                      (first order)

each then times the rows of the output projection that belong to head h. `R_t` is the rotary embedding of token t, for
keys factorised before it (then `q . R_t b = R_t^T q . b`: the query is turned), and the identity otherwise. An effect
is the squared norm of that change, summed over queries.

Memory: the factors, and per query `N R` numbers for each query head of one KV head; nothing takes `N R D`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnpack_fx.calibration.capture import Angles, Observed
from attnpack_fx.kernels.rotary import rotate

#: Numbers in the largest temporary of changed outputs, `[components, Hq * D]`.
_MOST_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Attended:
    """All queries seen of one sample, in fp32.

    query: `[Q, Hq, D]`; weights: `[Q, Hq, P]`, p of the prompt's tokens; output: `[Q, Hq, D]`, over all tokens.
    out: `[Hq * D, C]` or None; scale: of the scores.
    """

    query: Tensor
    weights: Tensor
    output: Tensor
    out: Tensor | None
    scale: float

    @property
    def total(self) -> float:
        """Squared norm of the projected output, summed over queries."""
        return float(self.projected(self.output.flatten(1)).sum())

    def projected(self, change: Tensor) -> Tensor:
        """Squared norms `[n]` of changed outputs `[n, Hq * D]` behind the output projection."""
        return (change if self.out is None else change @ self.out).square().sum(1)


def attended(layer: Observed, sample: int, alive: Sequence[bool]) -> Attended:
    """The queries of one sample of the batch: its question, and the decode steps that count, `alive`."""
    queries, weights, outputs = [], [], []
    key, value = layer.key[sample].float(), layer.value[sample].float()
    group = layer.reads[0].query.shape[1] // key.shape[0]
    counted = [read for read, counts in zip(layer.reads, alive, strict=True) if counts]
    for read in counted if layer.question is None else [layer.question, *counted]:
        query = read.query[sample].float()
        keys, values = (each[:, : read.tokens].repeat_interleave(group, 0) for each in (key, value))
        scores = layer.scale * query @ keys.mT
        if read.mask is not None:
            mask = read.mask[sample if read.mask.shape[0] > 1 else 0]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        p = scores.softmax(-1)
        outputs.append((p @ values).transpose(0, 1))
        weights.append(p[..., : layer.prompt].transpose(0, 1))
        queries.append(query.transpose(0, 1))
    out = None if layer.out is None else layer.out.float()
    return Attended(torch.cat(queries), torch.cat(weights), torch.cat(outputs), out, layer.scale)


def factors(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients `[N, R]` and basis `[H, R, D]` of tokens `[H, N, D]`, heads concatenated, `R = min(N, H D)`."""
    heads, _, dim = tokens.shape
    u, s, v = torch.linalg.svd(tokens.transpose(0, 1).flatten(1).float(), full_matrices=False)
    return u * s, v.unflatten(1, (heads, dim)).transpose(0, 1)


def value_effects(seen: Attended, index: Tensor, coefficient: Tensor, basis: Tensor) -> Tensor:
    """`[R]`: what each component of the values of tokens `index` `[N]` does; factors as from `factors`."""
    shares = seen.weights[:, :, index] @ coefficient  # [Q, Hq, R]
    basis = basis.repeat_interleave(shares.shape[1] // basis.shape[0], 0)
    effect = coefficient.new_zeros(coefficient.shape[1])
    for part in _parts(shares.shape[0], effect.shape[0], basis.shape[0] * basis.shape[2]):
        change = shares[:, :, part, None] * basis[:, part]  # [Q, Hq, r, D]
        squares = seen.projected(change.transpose(1, 2).flatten(2).flatten(0, 1))
        effect[part] = squares.unflatten(0, (shares.shape[0], -1)).sum(0)
    return effect


def key_effects(
    seen: Attended, value: Tensor, index: Tensor, coefficient: Tensor, basis: Tensor, angles: Angles | None
) -> Tensor:
    """`[R]`: what each component of the keys of tokens `index` `[N]` does, to first order; factors as from `factors`.

    value: `[H, P, D]`; angles: of the prompt, of one sample, where the factors are those of keys before it.
    """
    value = value[:, index].float()
    heads, group = basis.shape[0], seen.query.shape[1] // basis.shape[0]
    effect = coefficient.new_zeros(coefficient.shape[1])
    for number in range(seen.query.shape[0]):
        changes = []
        for head in range(heads):
            of_head = slice(head * group, (head + 1) * group)
            query, p = seen.query[number, of_head], seen.weights[number, of_head][:, index, None]
            pull = p * (value[head] - seen.output[number, of_head, None])  # [group, N, D]
            if angles is None:
                scores = (query @ basis[head].mT)[..., None]
                changes.append(seen.scale * scores * (coefficient.mT @ pull))
            else:
                scores = _turned_back(query, angles, index) @ basis[head].mT  # [group, N, R]
                changes.append(seen.scale * (scores * coefficient).mT @ pull)
        change = torch.cat(changes)  # [Hq, R, D]
        for part in _parts(1, effect.shape[0], change.shape[0] * change.shape[2]):
            effect[part] += seen.projected(change[:, part].transpose(0, 1).flatten(1))
    return effect


def _turned_back(query: Tensor, angles: Angles, index: Tensor) -> Tensor:
    """`R_t^T q` of queries `[n, D]` for every token, `[n, N, D]`."""
    cos, sin = angles.cos[0, index].float(), angles.sin[0, index].float()
    each = query[:, None].expand(-1, index.shape[0], -1)
    return rotate(each, cos, -sin, angles.interleaved)


def _parts(rows: int, components: int, width: int) -> Iterator[slice]:
    size = max(1, _MOST_NUMBERS // (rows * width))
    for start in range(0, components, size):
        yield slice(start, min(start + size, components))
