"""What an exported decode step takes and returns: every tensor's name, dtype and shape, from a policy and a model.

Slots of a layer, in the order in which attention reads them:

    vision | text | prompt | past | new        `vision_mask`, `text_mask`, `prompt_mask`, `attention_mask`

Vision and text are there where a layer packs tokens of that modality; `prompt` holds the prompt's other tokens as they
are, `past` those generated since. Their numbers are the same in all layers: one that leaves a modality dense has it
as rows, where others have factors. For layer N and `key` or `value`:

    past_key_values.N.key    [B, H, past, D]     as onnxruntime-genai and optimum name them
    present.N.key            [B, H, past + new, D]
    prompt.N.key             [B, H, prompt, D]
    packed.N.key             coefficients [B, vision, R]; or, as it is, [B, H, vision, D] (below)
    basis.N.key              [B, H, R, D]
    scale.N.key              fp32 [B, 2 or 4, R], of codes

A second modality's are `packed_text.N.key` and so on; further blocks of columns end in `.1`, `.2`. Codes and scales
are those of `kernels/parts.py`; codes of 8 bits are int8 where they are signed.

Vision and text have the same slots in every layer. A layer that packs only one of them, or one of them at full rank
(which takes less room as it is), has the other as rows. Where the policy says so, packed keys are those before rotary
embedding, and so are rows in front of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from attnpack_fx.export.signature import TensorSpec
from attnpack_fx.kernels.parts import code_bytes
from attnpack_fx.passes.storage import Columns, LayerPlan, both

Modality = Literal["vision", "text"]
KINDS = ("key", "value")


@dataclass(frozen=True)
class BlockSpec:
    """One block of columns of one segment of a layer's keys or values.

    coefficient, basis, scale: the names of its tensors, scale None where nothing is coded.
    rank, bits, basis_bits, asymmetric: as in `kernels.parts.Block`.
    """

    coefficient: str
    basis: str
    scale: str | None
    rank: int
    bits: int
    basis_bits: int
    asymmetric: bool


@dataclass(frozen=True)
class SegmentSpec:
    """Tokens of one modality of a layer's keys or values: low-rank blocks, or the name of the rows."""

    modality: Modality
    blocks: tuple[BlockSpec, ...]
    rows: str | None


@dataclass(frozen=True)
class Layout:
    """The tensors of a packed cache.

    plans: of every decoder layer, as the policy has them. heads, key_dim, value_dim: of the KV cache.
    modalities: those that any layer packs, in slot order. axes: of positions, 1, or 3 under M-RoPE.
    dtype: of the model.
    """

    plans: tuple[LayerPlan, ...]
    heads: int
    key_dim: int
    value_dim: int
    modalities: tuple[Modality, ...]
    axes: int
    dtype: torch.dtype

    def dim(self, kind: str) -> int:
        return self.key_dim if kind == "key" else self.value_dim

    def columns(self, layer: int, modality: Modality, kind: str) -> Columns | None:
        """The columns of a low-rank segment; None for rows."""
        stored = self.plans[layer].of(modality)
        if stored is None:
            return None
        columns: Columns = getattr(stored, kind)
        exact = not columns.quantised and columns.energy is None
        lossless = exact and columns.rank >= self.heads * self.dim(kind)
        return None if lossless else columns

    def ranks(self) -> dict[Modality, int]:
        """The highest rank of each modality's factors, of those that have any."""
        found: dict[Modality, int] = {}
        for layer in range(len(self.plans)):
            for modality in self.modalities:
                for kind in KINDS:
                    columns = self.columns(layer, modality, kind)
                    if columns is not None:
                        found[modality] = max(found.get(modality, 0), columns.rank)
        return found

    def turned(self, layer: int) -> tuple[Modality, ...]:
        """The first modalities of a layer, those whose keys are stored before rotary embedding."""
        if self.plans[layer].key_space != "unrotated":
            return ()
        low_rank = [self.columns(layer, name, "key") is not None for name in self.modalities]
        return self.modalities[: len(low_rank) - low_rank[::-1].index(True)] if any(low_rank) else ()

    @property
    def turns(self) -> tuple[Modality, ...]:
        """The modalities whose keys any layer rotates as it reads them."""
        return max((self.turned(layer) for layer in range(len(self.plans))), key=len)

    def segments(self, layer: int, kind: str) -> list[SegmentSpec]:
        """Of one layer's keys or values, in slot order."""
        found = []
        for modality in self.modalities:
            ending = "" if modality == self.modalities[0] else f"_{modality}"
            place, columns = f"{layer}.{kind}", self.columns(layer, modality, kind)
            if columns is None:
                found.append(SegmentSpec(modality, (), f"packed{ending}.{place}"))
                continue
            blocks = []
            for number, (count, formats) in enumerate(columns.blocks):
                assert count != "full", "resolved by PackPolicy.layer"
                bits, basis_bits = both(formats)
                last = f".{number}" if number else ""
                packed, basis, scale = (f"{part}{ending}.{place}{last}" for part in ("packed", "basis", "scale"))
                named = scale if bits or basis_bits else None
                blocks.append(BlockSpec(packed, basis, named, count, bits, basis_bits, columns.asymmetric))
            found.append(SegmentSpec(modality, tuple(blocks), None))
        return found

    def packed(self) -> Iterator[TensorSpec]:
        """What a prefill makes and no decode step changes, besides `prompt_mask` and the like."""
        for layer in range(len(self.plans)):
            for kind in KINDS:
                for segment in self.segments(layer, kind):
                    yield from self._segment(segment, kind)
        for layer in range(len(self.plans)):
            for kind in KINDS:
                yield self._rows(f"prompt.{layer}.{kind}", "prompt_length", kind)

    def places(self) -> Iterator[TensorSpec]:
        """Which slots hold tokens, and where those stand that are rotated as they are read."""
        for name in (*self.modalities, "prompt"):
            yield TensorSpec(f"{name}_mask", torch.int64, ("batch_size", f"{name}_length"))
        for name in self.turns:
            yield TensorSpec(f"{name}_position_ids", torch.int64, self.positions(f"{name}_length"))

    def window(self, name: str, length: str) -> Iterator[TensorSpec]:
        """`past_key_values` or `present`."""
        for layer in range(len(self.plans)):
            for kind in KINDS:
                yield self._rows(f"{name}.{layer}.{kind}", length, kind)

    def positions(self, length: str) -> tuple[int | str, ...]:
        """The shape of positions of so many tokens."""
        return ("batch_size", length) if self.axes == 1 else (self.axes, "batch_size", length)

    def _segment(self, segment: SegmentSpec, kind: str) -> Iterator[TensorSpec]:
        length, dim = f"{segment.modality}_length", self.dim(kind)
        if segment.rows is not None:
            yield self._rows(segment.rows, length, kind)
        for block in segment.blocks:
            signed = not block.asymmetric
            width = code_bytes(block.rank, block.bits) if block.bits else block.rank
            yield TensorSpec(block.coefficient, self._coded(block.bits, signed), ("batch_size", length, width))
            width = code_bytes(dim, block.basis_bits) if block.basis_bits else dim
            shape = ("batch_size", self.heads, block.rank, width)
            yield TensorSpec(block.basis, self._coded(block.basis_bits, signed), shape)
            if block.scale is not None:
                yield TensorSpec(block.scale, torch.float32, ("batch_size", 2 if signed else 4, block.rank))

    def _rows(self, name: str, length: str, kind: str) -> TensorSpec:
        return TensorSpec(name, self.dtype, ("batch_size", self.heads, length, self.dim(kind)))

    def _coded(self, bits: int, signed: bool) -> torch.dtype:
        if not bits:
            return self.dtype
        return torch.int8 if bits == 8 and signed else torch.uint8
