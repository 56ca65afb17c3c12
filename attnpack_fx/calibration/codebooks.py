"""KVQuant's codebooks and thresholds for a whole model, from samples: `calibrate_codebooks`."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.calibration.capture import Observed, Observer
from attnpack_fx.checks import PolicyError
from attnpack_fx.kernels.aten.codebook import gathered, k_means
from attnpack_fx.kernels.aten.row_codes import real
from attnpack_fx.kernels.rotary import rotate
from attnpack_fx.passes import codebook_file
from attnpack_fx.passes.codebook_file import Codebooks
from attnpack_fx.passes.find_rotary import Rotation
from attnpack_fx.passes.kvquant import KVQuant, fixed_levels, thresholds, vectors


def calibrate_codebooks(
    model: torch.nn.Module,
    samples: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    bits: int = 4,
    outliers: float = 0.01,
) -> KVQuant:
    """Write what KVQuant finds from samples, and return the method that uses it (arXiv 2401.18079, sections 3.1-3.4).

    model: of transformers; left as it was found. samples: inputs of the model as its processor gives them, `input_ids`
    among them, one prompt or batch each. path: of a `.safetensors` file. bits, outliers: as in `KVQuant`.

    Of every layer, over the tokens of all samples that are no padding: thresholds of each key channel, before rotary
    embedding where it is recognised, are the range of what is left when the `outliers` share of the channel's numbers
    is taken away, half on either side. Keys and values normalised by their thresholds, outliers aside, have one k-means
    each, every number weighing the square of its gradient: the empirical Fisher information, its diagonal. The loss is
    the sum of the cross-entropies of the prompt's own next tokens, text tokens that follow text or vision tokens;
    a number without any gradient (of the last tokens, of vision tokens behind all text) has no weight.

    Keys, values and weights of all samples are held on the CPU meanwhile, in fp32: as much as four dense 16-bit caches.

    Raises `PolicyError` where no layer keeps a cache that can be seen, and for samples without `input_ids`.
    """
    KVQuant(bits, outliers)  # refuses what it does not know before anything is run
    original = getattr(model, "_orig_mod", model)
    hf.check_whole(original, "calibrate_codebooks", "calibrate in one process")
    seen: dict[int, _Layer] = defaultdict(_Layer)
    observer = _Observer()
    count = 0
    with observer.watching(original), torch.enable_grad(), _differentiable(original):
        for sample in samples:
            _add(seen, observer, original, count, sample)
            count += 1
    if not seen:
        raise PolicyError(
            f"calibrate_codebooks: got {count} samples in which no layer's cache was seen, expected at least one; "
            "look at attnpack_fx.explain"
        )
    found = {number: layer.codebooks(bits, outliers) for number, layer in seen.items()}
    codebook_file.save(path, found)
    return KVQuant(bits, outliers, codebooks=os.fspath(path))


@dataclass
class _Layer:
    """Tokens of one layer that are no padding, `[N, H, D]` fp32 on the CPU, and what each number weighs, of samples."""

    keys: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def codebooks(self, bits: int, outliers: float) -> Codebooks:
        key, low, high = _found(self.keys, bits, outliers, channel=True)
        value, _, _ = _found(self.values, bits, outliers, channel=False)
        return Codebooks(key, value, low[0, 0], high[0, 0])


def _found(
    samples: list[tuple[Tensor, Tensor]], bits: int, outliers: float, channel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels, and thresholds as of one batch of all tokens."""
    rows, weights = (torch.cat(each)[None] for each in zip(*samples, strict=True))
    left_out, low, high = thresholds(rows, outliers, channel)
    grouping = vectors(rows, channel)
    middle, half = (grouping.spread(each, rows) for each in (low / 2 + high / 2, high / 2 - low / 2))
    counted = real(rows) & ~left_out & (half > 0)
    normalised = (rows - middle) / half
    levels = k_means(*gathered(normalised[counted], weights[counted]), fixed_levels(rows, bits, outliers, channel))
    return levels.float(), low, high


class _Observer(Observer):
    """Keeps keys and values of a prompt as attention read them, for their gradients."""

    def begin(self) -> None:
        super().begin()
        self.read: dict[int, tuple[Tensor, Tensor]] = {}

    def _reader(
        self, number: int | None, scale: float, rotation: Rotation | None, transposed: bool
    ) -> Callable[..., None]:
        see = super()._reader(number, scale, rotation, transposed)
        assert number is not None

        def keep(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> None:
            self.read[number] = key, value
            see(query, key, value, *others)

        return keep


def _add(
    seen: dict[int, _Layer], observer: _Observer, model: torch.nn.Module, number: int, sample: Mapping[str, Any]
) -> None:
    ids = sample.get("input_ids") if isinstance(sample, Mapping) else None
    if not isinstance(ids, Tensor):
        raise PolicyError(
            f"samples[{number}]: got no input_ids, expected a mapping with them such as the model's processor returns: "
            "the loss is that of their next tokens"
        )
    observer.begin()
    logits = model(**sample, use_cache=True).logits
    if not observer.layers:
        return
    loss = _loss(logits, ids, next(iter(observer.layers.values())))
    read = [each for place in observer.layers for each in observer.read[place]]
    gradients = torch.autograd.grad(loss, read, allow_unused=True, materialize_grads=True)
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        raise PolicyError(
            f"samples[{number}]: got NaN or Inf among gradients, expected finite ones; calibrate in bfloat16 or float32"
        )
    pairs = iter(gradients)
    for place, layer in observer.layers.items():
        key, slope = layer.key, next(pairs).float()
        if layer.angles is not None:
            # The embedding is linear: its transpose takes gradients back.
            cos, sin = layer.angles.cos[:, None].float(), layer.angles.sin[:, None].float()
            key, slope = layer.angles.unrotated(key), rotate(slope, cos, -sin, layer.angles.interleaved)
        seen[place].keys.append((_tokens(key, layer), _tokens(slope, layer).square()))
        seen[place].values.append((_tokens(layer.value, layer), _tokens(next(pairs), layer).square()))


def _loss(logits: Tensor, ids: Tensor, layer: Observed) -> Tensor:
    """Cross-entropy of the next tokens in the prompt, summed; none that is padding, follows it or is a vision token."""
    wanted = _alive(layer, ids)[:, 1:] & _alive(layer, ids)[:, :-1]
    if layer.vision is not None:
        wanted = wanted & ~layer.vision[:, 1:]
    return F.cross_entropy(logits[:, :-1][wanted].float(), ids[:, 1:][wanted], reduction="sum")


def _alive(layer: Observed, ids: Tensor) -> Tensor:
    """Bool `[B, P]`, False for padding."""
    return torch.ones_like(ids, dtype=torch.bool) if layer.real is None else layer.real.expand(ids.shape)


def _tokens(x: Tensor, layer: Observed) -> Tensor:
    """`[B, H, P, D]` as `[N, H, D]`, padding left out."""
    rows = x.detach().transpose(1, 2)
    rows = rows.flatten(0, 1) if layer.real is None else rows[layer.real.expand(rows.shape[:2])]
    return rows.float().cpu()


@contextmanager
def _differentiable(model: Any) -> Iterator[None]:
    """Let gradients reach all layers, of a model with frozen weights too."""
    weight = model.get_input_embeddings().weight
    before = weight.requires_grad
    weight.requires_grad_(True)
    try:
        yield
    finally:
        weight.requires_grad_(before)
