"""The steps that are exported, each a module of tensors in, tensors out, nothing written in place.

    vision     pixel values -> features of image tokens
    angles     positions -> cos, sin
    prefill    ids, features, which tokens go where -> logits, packed state
    decode     ids, packed state, past -> logits, present

Which tokens go where is a matter of data-dependent sizes, so that a host plans it (`runtime/planning.py`) and gives
indices, with -1 for filler.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attnpack_fx.export.coding import coded, stored
from attnpack_fx.export.constant_folding import ConstantFolding
from attnpack_fx.export.factorize import starting_basis, truncated_svd
from attnpack_fx.export.layout import KINDS, BlockSpec, Layout, Modality
from attnpack_fx.export.model import Parts, added_to_layers, image_features
from attnpack_fx.export.portable import turned_back
from attnpack_fx.export.signature import TensorSpec
from attnpack_fx.kernels import ops
from attnpack_fx.kernels.balance import balanced
from attnpack_fx.kernels.flat import flatten
from attnpack_fx.kernels.parts import Angles, Block, PackedParts, RowForm, Rows, Segment
from attnpack_fx.kernels.rotary import pairs

#: How many matrices are factorised together, at most: copies in fp32 live as long.
_TOGETHER = 16


class Step(nn.Module, ABC):
    """A module called with the tensors of `inputs`, in order; returns those of `outputs`."""

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        given = {spec.name: tensor for spec, tensor in zip(self.inputs, tensors, strict=True)}
        made = self.run(given)
        return [made[spec.name] for spec in self.outputs]

    @abstractmethod
    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""


class VisionStep(Step):
    """Features of images; unless `dynamic`, how many there are, their grids and sizes are those of the example."""

    name = "vision"

    def __init__(self, parts: Parts, example: Mapping[str, Tensor], dynamic: bool) -> None:
        super().__init__()
        self.parts, self.model = parts, parts.model
        self.fixed = {name: tensor for name, tensor in example.items() if name != "pixel_values" and not dynamic}
        sizes = tuple(example["pixel_values"].shape)
        images: tuple[int | str, ...] = ("image_count", *sizes[1:]) if dynamic else sizes
        self.inputs = [TensorSpec("pixel_values", parts.dtype, images)]
        self.outputs = [TensorSpec(name, parts.dtype, ("feature_length", parts.hidden)) for name in parts.features]

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with ConstantFolding():
            features = image_features(self.model, {**given, **self.fixed})
        return {spec.name: made for spec, made in zip(self.outputs, features, strict=True)}


class PrefillStep(Step):
    """A whole prompt, dense; its keys and values leave packed."""

    name = "prefill"

    def __init__(self, parts: Parts, layout: Layout) -> None:
        super().__init__()
        self.parts, self.model, self.layout = parts, parts.model, layout
        rows = ("batch_size", "sequence_length")
        self.inputs = [
            TensorSpec("input_ids", torch.int64, rows),
            TensorSpec("attention_mask", torch.int64, rows),
            TensorSpec("position_ids", torch.int64, layout.positions("sequence_length")),
        ]
        if parts.image_tokens:
            shape = ("feature_length", parts.hidden)
            self.inputs += [TensorSpec(name, parts.dtype, shape) for name in parts.features]
        self.inputs += [
            TensorSpec(f"{name}_index", torch.int64, ("batch_size", f"{name}_length"))
            for name in (*layout.modalities, "prompt")
        ]
        self.outputs = [TensorSpec("logits", parts.dtype, ("batch_size", 1, parts.vocabulary)), *layout.packed()]
        for name, rank in layout.ranks().items():
            start = starting_basis(layout.heads * layout.key_dim, rank).to(parts.device)
            self.register_buffer(f"start_{name}", start, persistent=False)

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts, ids = self.parts, given["input_ids"]
        embedded, deeper = self._embedded(given)
        length = ids.shape[1]
        place = torch.arange(length, device=ids.device)
        sees = (place[None] <= place[:, None])[None] & (given["attention_mask"] > 0)[:, None]
        prompt = _Prompt()
        with added_to_layers(parts.decoder.layers, deeper):  # type: ignore[arg-type]
            hidden = parts.decode(embedded, _bias(sees, embedded.dtype), given["position_ids"], prompt)
        angles = parts.angles(embedded, given["position_ids"])
        return {"logits": parts.head(hidden[:, -1:]), **self._packed(given, prompt.dense, angles)}

    def _embedded(self, given: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Embeddings of tokens with features in the places of images, and what deeper layers get besides."""
        ids = given["input_ids"]
        if not self.parts.image_tokens:
            return self.parts.embedding(ids), []
        seen = torch.zeros_like(ids, dtype=torch.bool)
        for token in self.parts.image_tokens:
            seen = seen | (ids == token)
        # The n-th image token, of all samples in turn, has the n-th row of features; others have a row of zeros.
        number = seen.flatten().long().cumsum(0).reshape(ids.shape) - 1
        rows = []
        for name in self.parts.features:
            features = nn.functional.pad(given[name], (0, 0, 0, 1))
            rows.append(features[torch.where(seen, number, features.shape[0] - 1)])
        # An image's id need not be in the vocabulary of the embedding.
        embedded = self.parts.embedding(ids.masked_fill(seen, 0))
        return torch.where(seen[..., None], rows[0], embedded), rows[1:]

    def _packed(
        self, given: Mapping[str, Tensor], cache: Mapping[tuple[int, str], Tensor], angles: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        layout, made = self.layout, {}
        wanted: dict[Modality, list[tuple[tuple[BlockSpec, ...], Tensor]]] = {}
        for layer in range(len(layout.plans)):
            for kind in KINDS:
                dense = cache[layer, kind]
                made[f"prompt.{layer}.{kind}"] = _selected(dense, given["prompt_index"])
                before = turned_back(dense, *angles) if kind == "key" and layout.turned(layer) else dense
                for segment in layout.segments(layer, kind):
                    stored = kind == "key" and segment.modality in layout.turned(layer)
                    tokens = _selected(before if stored else dense, given[f"{segment.modality}_index"])
                    if segment.rows is not None:
                        made[segment.rows] = tokens
                        continue
                    wanted.setdefault(segment.modality, []).append((segment.blocks, tokens))
        for modality, every in wanted.items():
            filler = (given[f"{modality}_index"] < 0)[:, :, None]
            for start in range(0, len(every), _TOGETHER):
                together = every[start : start + _TOGETHER]
                made |= _factors(together, filler, getattr(self, f"start_{modality}"))
        return made


class DecodeStep(Step):
    """New tokens, over a packed cache that stays as it is and past ones that grow."""

    name = "decode"

    def __init__(self, parts: Parts, layout: Layout) -> None:
        super().__init__()
        self.parts, self.model, self.layout = parts, parts.model, layout
        rows = ("batch_size", "sequence_length")
        self.inputs = [
            TensorSpec("input_ids", torch.int64, rows),
            TensorSpec("attention_mask", torch.int64, ("batch_size", "past_sequence_length + sequence_length")),
            TensorSpec("position_ids", torch.int64, rows),
            *layout.window("past_key_values", "past_sequence_length"),
            TensorSpec("position_offset", torch.int64, ("batch_size", 1)),
            *layout.places(),
            *layout.packed(),
        ]
        self.outputs = [
            TensorSpec("logits", parts.dtype, (*rows, parts.vocabulary)),
            *layout.window("present", "past_sequence_length + sequence_length"),
        ]

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts, layout, ids = self.parts, self.layout, given["input_ids"]
        masks = [given[f"{name}_mask"] for name in (*layout.modalities, "prompt")]
        held = torch.cat([*masks, given["attention_mask"]], 1) > 0
        place = torch.arange(held.shape[1], device=ids.device)
        newest = place[held.shape[1] - ids.shape[1] :]
        sees = (place[None] <= newest[:, None])[None] & held[:, None]
        embedded = parts.embedding(ids)
        angles = {name: parts.angles(embedded, given[f"{name}_position_ids"]) for name in layout.turns}
        halves = {name: (pairs(cos, False)[0], pairs(sin, False)[0]) for name, (cos, sin) in angles.items()}
        cache = _Cache(layout, given, halves)
        positions = given["position_ids"] + given["position_offset"]
        if layout.axes > 1:
            positions = positions[None].expand(layout.axes, -1, -1)
        hidden = parts.decode(embedded, _bias(sees, embedded.dtype), positions, cache)
        return {"logits": parts.head(hidden), **cache.present}


class AnglesStep(Step):
    """Rotary embedding at given positions: for hosts that fold keys which are packed before it."""

    name = "angles"

    def __init__(self, parts: Parts, layout: Layout) -> None:
        super().__init__()
        self.parts, self.model = parts, parts.model
        size = parts.rotated
        self.inputs = [TensorSpec("position_ids", torch.int64, layout.positions("sequence_length"))]
        self.outputs = [
            TensorSpec(name, parts.dtype, ("batch_size", "sequence_length", size)) for name in ("cos", "sin")
        ]

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        like: Any = self.parts.embedding.weight
        cos, sin = self.parts.angles(like, given["position_ids"])
        return {"cos": cos, "sin": sin}


class _Prompt:
    """Attention among the tokens of a prompt, whose keys and values it keeps."""

    def __init__(self) -> None:
        self.dense: dict[tuple[int, str], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        self.dense[layer, "key"], self.dense[layer, "value"] = key, value
        grouped = query.shape[1] != key.shape[1]
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
        )


class _Cache:
    """Attention of new tokens to a packed cache and to one another; keeps what has grown.

    angles: cos and sin of the tokens of a modality, one entry per pair of dims.
    """

    def __init__(
        self, layout: Layout, given: Mapping[str, Tensor], angles: Mapping[Modality, tuple[Tensor, Tensor]]
    ) -> None:
        self.layout, self.given, self.angles = layout, given, angles
        self.present: dict[str, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        layout, described = self.layout, []
        for kind, new in (("key", key), ("value", value)):
            grown = torch.cat([self.given[f"past_key_values.{layer}.{kind}"], new], 2)
            self.present[f"present.{layer}.{kind}"] = grown
            described.append(self._parts(layer, kind, grown))
        keys, values = described
        if turned := layout.turned(layer):
            every = zip(*(self.angles[name] for name in turned), strict=True)
            cos, sin = (torch.cat(each, 1) if len(each) > 1 else each[0] for each in every)
            keys = replace(keys, angles=Angles(cos, sin, None, False))
        tensors, layouts = flatten(keys, values)
        return ops.attention(query, tensors, *layouts, keys.length, mask, scale)

    def _parts(self, layer: int, kind: str, grown: Tensor) -> PackedParts[Tensor]:
        """Slots stand in logical order, so that none is placed."""
        given = self.given
        segments: list[Segment[Tensor]] = []
        for segment in self.layout.segments(layer, kind):
            if segment.rows is not None:
                segments.append(Segment((_rows(given[segment.rows]),)))
                continue
            blocks = tuple(
                Block(
                    given[block.coefficient],
                    given[block.basis],
                    None if block.scale is None else given[block.scale],
                    block.bits,
                    None,
                    block.basis_bits,
                    block.asymmetric,
                )
                for block in segment.blocks
            )
            segments.append(Segment(blocks))
        segments.append(Segment((_rows(given[f"prompt.{layer}.{kind}"]),)))
        none = given["input_ids"][:, :0]
        return PackedParts(tuple(segments), grown.permute(2, 0, 1, 3), grown.shape[2], none)


def _bias(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores `[B, 1, Tq, T]`; no row is all -inf, whose softmax would be NaN.

    Half the least number: with a score below zero, that itself would be -inf in fp16.
    """
    least = torch.full((), torch.finfo(dtype).min / 2, dtype=dtype, device=sees.device)
    return torch.where(sees, torch.zeros((), dtype=dtype, device=sees.device), least)[:, None]


def _selected(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, H, N, D]` of x by index `[B, N]`, zero for filler."""
    wide = index.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, wide).masked_fill((index < 0)[:, None, :, None], 0)


def _factors(every: Sequence[tuple[tuple[BlockSpec, ...], Tensor]], filler: Tensor, start: Tensor) -> dict[str, Tensor]:
    """The tensors of low-rank segments of the same tokens, factorised together at the highest of their ranks."""
    rank = max(sum(block.rank for block in blocks) for blocks, _ in every)
    batch, heads, _, _ = every[0][1].shape
    matrices = torch.cat([tokens.transpose(1, 2).flatten(2).float() for _, tokens in every])
    coefficients, bases = truncated_svd(matrices, rank, start)
    made: dict[str, Tensor] = {}
    for number, (blocks, tokens) in enumerate(every):
        own = slice(number * batch, (number + 1) * batch)
        coefficient = coefficients[own].masked_fill(filler, 0)
        coefficient, basis = balanced(coefficient, bases[own], tokens.dtype)
        basis = basis.unflatten(2, (heads, -1)).transpose(1, 2)
        first = 0
        for block in blocks:
            end = first + block.rank
            made |= _block(block, coefficient[:, :, first:end], basis[:, :, first:end], filler)
            first = end
    return made


def _block(block: BlockSpec, coefficient: Tensor, basis: Tensor, filler: Tensor) -> dict[str, Tensor]:
    if block.scale is None:
        return {block.coefficient: coefficient, block.basis: basis}
    # A row more, so that there is a largest number where there is no token.
    rows, nothing = nn.functional.pad(coefficient, (0, 0, 0, 1)), nn.functional.pad(filler, (0, 0, 0, 1), value=True)
    unfilled = nothing if block.asymmetric or block.bits == 2 else None
    codes, *of_columns = coded(rows, (1,), block.bits, block.asymmetric, unfilled)
    basis_codes, *of_rows = coded(basis, (1, 3), block.basis_bits, block.asymmetric, None)
    pairs = [(c.flatten(1), r.flatten(1)) for c, r in zip(of_columns, of_rows, strict=True)]
    scale = torch.stack([each for pair in pairs[: 1 + block.asymmetric] for each in pair], 1)
    return {
        block.coefficient: stored(codes[:, :-1], block.bits, block.asymmetric),
        block.basis: stored(basis_codes, block.basis_bits, block.asymmetric),
        block.scale: scale,
    }


def _rows(rows: Tensor) -> Rows[Tensor]:
    codes = rows.transpose(1, 2)
    return Rows(RowForm(0), codes, codes[..., :0])
