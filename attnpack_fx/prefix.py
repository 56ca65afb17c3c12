"""A prompt that is read once and continued many times: `attnpack_fx.prefix`."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf, prefix_file
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.warning import warn

#: Arguments of `generate` that are given here, or that have no place in reading.
_SET = frozenset(
    (
        *("max_new_tokens", "min_new_tokens", "max_length", "do_sample", "num_beams", "num_return_sequences"),
        *("return_dict_in_generate", "use_cache", "streamer", "stopping_criteria"),
    )
)
#: What Qwen-VL models remember of the last prompt beside its cache: how far text positions are behind.
_BESIDE = "rope_deltas"


class Prefix:
    """What is left of a prompt that a model has read: its cache, and the inputs that continuing it takes.

    tokens: of the prompt. cache: the model's own, which nothing is appended to; `fork` gives others to continue.
    """

    def __init__(self, model: Any, cache: Any, by_token: dict[str, Tensor], beside: dict[str, Tensor | None]) -> None:
        self._model = model
        self._by_token, self._beside = by_token, beside
        self.cache = cache

    @property
    def tokens(self) -> int:
        return self._by_token["input_ids"].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, as `attnpack_fx.cache_bytes` counts them; that of several forks is
        `cache_bytes([prefix.cache, *forks])`, which counts once what they share.
        """
        return cache_bytes(self.cache)

    def fork(self) -> Any:
        """A cache that starts with the prefix and can be continued alone.

        Packed parts are shared by all forks, as are dense keys and values until one appends to them; the dense rows at
        the end of a packed tensor are copied once a second fork appends.
        """
        memo: dict[int, Any] = {}
        for tensor in _kept(self.cache):
            memo[id(tensor)] = tensor.handle() if isinstance(tensor, PackedTensor) else tensor
        return copy.deepcopy(self.cache, memo)

    def inputs(self, input_ids: Tensor, attention_mask: Tensor | None = None, *, copies: int = 1) -> dict[str, Any]:
        """Arguments of `model.generate` that continue a fork with more tokens.

        Args:
            input_ids: int64 `[B, T]`, the tokens behind the prefix, without special tokens of a new sequence; images
                belong in the prefix.
            attention_mask: `[B, T]`, 0 where a token is padding; none is unless given.
            copies: how many continuations `generate` makes of each sample: its `num_beams` or `num_return_sequences`.

        Returns:
            The tokens of prefix and continuation with their mask, and a fork of the cache, for one call. Where the
            model remembers something of the prompt beside the cache, as Qwen-VL models do, the model is made to
            remember it again: use one such call before another.

        Raises:
            ValueError: for another batch size, no tokens, image tokens, a mask of another shape, or no copies.
        """
        self._check(input_ids, attention_mask)
        if not isinstance(copies, int) or isinstance(copies, bool) or copies < 1:
            raise ValueError(f"copies: got {copies!r}, expected a whole number from 1 on, such as num_beams")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        behind = {"input_ids": input_ids, "attention_mask": mask}
        given = {
            name: torch.cat([known, behind.get(name, torch.zeros_like(input_ids)).to(known)], 1)
            for name, known in self._by_token.items()
        }
        for name, value in self._beside.items():
            setattr(self._model.get_submodule(name), _BESIDE, value)
        cache = self.fork()
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        return given | hf.cache_argument(cache)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prefix as a safetensors file; `attnpack_fx.load_prefix` reads it.

        Raises:
            ValueError: where a layer of the cache holds anything but keys and values.
        """
        tensors = {"by token": self._by_token, "beside": self._beside}
        prefix_file.save(path, self._model, self.cache, tensors)

    def _check(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        known = self._by_token["input_ids"]
        if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
            got = getattr(input_ids, "dtype", type(input_ids).__name__)
            raise ValueError(f"input_ids: got {got}, expected token ids [B, T]: tokenizer(...).input_ids")
        if input_ids.dim() != 2 or input_ids.shape[0] != known.shape[0] or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)}, expected [{known.shape[0]}, T] with at least one "
                "token behind the prefix, for as many samples as the prefix has"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}, expected that of input_ids, "
                f"{tuple(input_ids.shape)}: the prefix has its own"
            )
        if hf.image_positions(self._model, input_ids).any():
            raise ValueError(
                "input_ids: got image tokens behind the prefix, expected text; images belong in the prefix: read "
                "another with attnpack_fx.prefix"
            )

    def __repr__(self) -> str:
        batch = self._by_token["input_ids"].shape[0]
        return f"Prefix({batch} x {self.tokens} tokens, {self.nbytes} bytes)"


def prefix(model: Any, **inputs: Any) -> Prefix:
    """Read a prompt, such as a system prompt with its images, and keep its packed cache to continue it many times.

    Args:
        model: a compiled transformers model, as for `generate`.
        inputs: arguments of `model.generate`: `input_ids` int64 `[B, T]`, and what else its processor gives.

    Returns:
        The prefix. It is packed as a prompt of its own: at truncated ranks, answers are those of a second turn, not of
        one prompt with everything in it.

    Raises:
        ValueError: without `input_ids`, for a model that does not generate, or one that is an encoder and a decoder.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = "none" if ids is None else f"{type(ids).__name__}"
        raise ValueError(f"input_ids: got {got}, expected an int64 tensor [B, T], as the processor gives it")
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "model: got what torch.compile returned, whose generate runs uncompiled; expected a model compiled in "
            "place, by attnpack_fx.compile(model)"
        )
    if taken := sorted(_SET.intersection(inputs)):
        raise ValueError(f"{', '.join(taken)}: not of a prompt; give it to the generate that continues the prefix")
    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model: got {type(model).__name__}, expected a decoder with generate; the prompt of an encoder-decoder "
            "is the encoder's, which has no cache to continue"
        )
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=1, num_beams=1, do_sample=False, return_dict_in_generate=True, use_cache=True
        )
    by_token = {"attention_mask": torch.ones_like(ids)} | {
        name: each
        for name, each in inputs.items()
        if isinstance(each, Tensor) and each.shape == ids.shape and not each.is_floating_point()
    }
    beside = {name: getattr(module, _BESIDE) for name, module in model.named_modules() if hasattr(module, _BESIDE)}
    cache = hf.cache_of(output)
    for layer in hf.self_attention_layers(cache):
        for name in ("keys", "values"):
            packed = getattr(layer, name, None)
            if isinstance(packed, PackedTensor):
                packed = packed.handle()
                packed.taken_back = None  # nothing of a prefix is taken back, as of tokens guessed
                setattr(layer, name, packed)
    if not any(isinstance(tensor, PackedTensor) for tensor in _kept(cache)):
        warn("the cache of this prefix is dense: compile the model with attnpack_fx.compile, and look at explain")
    return Prefix(model, cache, by_token, beside)


def load_prefix(path: str | os.PathLike[str], model: Any) -> Prefix:
    """Read a prefix that `Prefix.save` wrote.

    Args:
        path: of the file. model: the model that read the prefix, compiled with the same policy; the prefix goes to its
            device.

    Raises:
        ValueError: for a file that is no prefix, or one of another model, of other weights or of another policy.
    """
    cache, tensors = prefix_file.load(path, model)
    return Prefix(model, cache, tensors["by token"], tensors["beside"])


def _kept(cache: Any) -> Iterator[Tensor]:
    """Keys and values that appending to leaves as they are: packed, or of layers that grow by concatenation."""
    from transformers.cache_utils import DynamicLayer

    for layer in hf.self_attention_layers(cache):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, PackedTensor) or (isinstance(tensor, Tensor) and isinstance(layer, DynamicLayer)):
                yield tensor
