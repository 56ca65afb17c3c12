"""The arguments of packed attention as the kernels take them: once, and with the block sizes that follow from them."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnpack_fx.kernels.triton.launch import block, cdiv, per_program, strides


@dataclass(frozen=True)
class Segment:
    """The factors of one segment's keys and values, contiguous."""

    key: Tensor
    key_basis: Tensor
    value: Tensor
    value_basis: Tensor


@dataclass(frozen=True)
class Problem:
    """The arguments of `ops.attention` as kernels take them."""

    query: Tensor
    segments: list[Segment]
    key_tail: Tensor
    value_tail: Tensor
    length: int
    index: Tensor
    mask: Tensor | None
    scale: float
    ragged: bool
    cap: float
    sinks: Tensor | None

    @property
    def heads(self) -> int:
        return self.key_tail.shape[2]

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.heads

    @property
    def tokens(self) -> list[int]:
        """Of each segment."""
        return [segment.key.shape[1] for segment in self.segments]

    @property
    def packed(self) -> int:
        return sum(self.tokens)

    @property
    def rows(self) -> int:
        return self.query.shape[1] * self.query.shape[2]

    @property
    def block_g(self) -> int:
        """Query rows of one KV head that a program takes."""
        if self.query.shape[2] == 1:
            return min(block(self.group), 64)
        return 64 if max(self.block_d, self.block_dv) <= 128 else 32

    @property
    def block_r(self) -> int:
        return max((block(segment.key.shape[2]) for segment in self.segments), default=16)

    @property
    def block_v(self) -> int:
        return max((block(segment.value.shape[2]) for segment in self.segments), default=16)

    @property
    def block_d(self) -> int:
        return block(self.query.shape[3])

    @property
    def block_dv(self) -> int:
        return block(self.value_tail.shape[3])

    @property
    def tail_tile(self) -> int:
        """Dense rows that a program takes at a time."""
        return 32 if self.query.dtype != torch.float32 and max(self.block_d, self.block_dv) <= 128 else 16

    def tail_splits(self, blocks: Any) -> tuple[Any, Any]:
        """Tail rows of one split, and the number of splits; `blocks` programs share a KV head's query rows."""
        programs = self.query.shape[0] * self.heads * blocks
        rows = per_program(self.length, programs, self.tail_tile, self.query.device)
        return rows, cdiv(self.length, rows)

    def partials(self, splits: Any, width: int) -> tuple[Tensor, Tensor]:
        """Room for partial results and their log-sum-exps, fp32."""
        shape = (splits, self.query.shape[0], self.rows)
        new = self.query.new_empty
        return new((*shape, width), dtype=torch.float32), new(shape, dtype=torch.float32)

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """One factor of the first and the last segment; without segments, a tensor of their dtype that is not read."""
        if not self.segments:
            return self.key_tail, self.key_tail
        return getattr(self.segments[0], name), getattr(self.segments[-1], name)

    def mask_arguments(self) -> dict[str, Any]:
        mask = self.mask
        if mask is None:
            steps, tokens, kind = (0, 0, 0, 0), 0, 0
        else:
            # A mask that is broadcast over tokens has no columns to count from.
            tokens = mask.shape[3] if mask.shape[3] > 1 else self.length
            steps, kind = strides(mask), 1 if mask.dtype == torch.bool else 2
        names = ("mask_sample", "mask_head", "mask_query", "mask_token")
        # Where an argument is not read, an input of the graph stands in: anything computed would be copied for it.
        given = {"mask": self.index if mask is None else mask, "MASK": kind, "CAP": self.cap, "mask_tokens": tokens}
        return given | dict(zip(names, steps, strict=True))

    def sink_arguments(self) -> dict[str, Any]:
        """What kernels take that write results."""
        sinks = self.sinks
        if sinks is None:
            return {"sinks": self.index, "sink_sample": 0, "SINKS": False}
        return {"sinks": sinks, "sink_sample": sinks.stride(0) if sinks.shape[0] > 1 else 0, "SINKS": True}

    def shared_arguments(self) -> dict[str, Any]:
        """What every kernel that reads queries and tail rows takes."""
        sample, head, token, _ = self.query.stride()
        return self.mask_arguments() | {
            "query": self.query,
            "key_tail": self.key_tail,
            "value_tail": self.value_tail,
            "index": self.index,
            "heads": self.heads,
            "group": self.group,
            "queries": self.query.shape[2],
            "dim": self.query.shape[3],
            "value_dim": self.value_tail.shape[3],
            "query_sample": sample,
            "query_head": head,
            "query_token": token,
            "length": self.length,
            "packed": self.packed,
            "slots": self.index.shape[1],
            "scale": self.scale,
            "SEGMENTS": len(self.segments),
            "RAGGED": self.ragged,
            "BLOCK_G": self.block_g,
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
        }

    def segment_arguments(self) -> dict[str, Any]:
        """Sizes of the segments."""
        keys, values = self.pair("key"), self.pair("value")
        if not self.segments:
            return {"tokens0": 0, "tokens1": 0, "key_rank0": 0, "key_rank1": 0, "value_rank0": 0, "value_rank1": 0}
        return {
            "tokens0": keys[0].shape[1],
            "tokens1": keys[1].shape[1],
            "key_rank0": keys[0].shape[2],
            "key_rank1": keys[1].shape[2],
            "value_rank0": values[0].shape[2],
            "value_rank1": values[1].shape[2],
        }
