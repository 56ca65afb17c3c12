"""Prompts with images that are kept packed, so that a further question about them continues a fork."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import attnpack_fx
from attnpack_fx import Prefix, cache_bytes, hf


@dataclass(frozen=True)
class Split:
    """A prompt cut behind its last image. key: a hash of what is before; front: inputs of that; ids: what is behind."""

    key: bytes
    front: dict[str, Tensor]
    ids: Tensor


class Prefixes:
    """The prefixes that were used last, in no more than so many bytes.

    A prefix is kept from the second prompt on that begins with it: what is asked about once takes nothing.

    Args:
        model: a compiled transformers model.
        most: bytes.

    Attributes:
        most: bytes.
        nbytes: of all that are kept; what they share counts once.
    """

    def __init__(self, model: Any, most: int) -> None:
        self._model, self.most = model, most
        self._kept: OrderedDict[bytes, Prefix] = OrderedDict()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, inputs: dict[str, Tensor]) -> tuple[Prefix, Tensor] | None:
        """Return a prefix of a prompt and the tokens behind it; None for a prompt without images, or a new one."""
        split = self._split(inputs) if self.most else None
        if split is None:
            return None
        if split.key not in self._kept:
            if split.key not in self._seen:
                self._note(split.key)
                return None
            kept = attnpack_fx.prefix(self._model, **split.front)
            if kept.nbytes > self.most:
                return None
            self._kept[split.key] = kept
            while self._count() > self.most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(split.key)
        return self._kept[split.key], split.ids

    def clear(self) -> None:
        """Keep none of them any longer."""
        self._kept.clear()
        self._seen.clear()
        self.nbytes = 0

    def _count(self) -> int:
        self.nbytes = cache_bytes([each.cache for each in self._kept.values()])
        return self.nbytes

    def _note(self, key: bytes) -> None:
        self._seen[key] = None
        if len(self._seen) > 4096:
            self._seen.popitem(last=False)

    def _split(self, inputs: dict[str, Tensor]) -> Split | None:
        ids = inputs["input_ids"]
        places = hf.image_positions(self._model, ids)[0].nonzero()
        if not len(places) or int(places[-1]) + 1 == ids.shape[1]:
            return None
        end = int(places[-1]) + 1
        front = {name: each[:, :end] if each.shape == ids.shape else each for name, each in inputs.items()}
        made = hashlib.blake2b()
        for name, each in sorted(front.items()):
            made.update(f"{name} {each.dtype} {tuple(each.shape)} ".encode())
            made.update(each.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return Split(made.digest(), front, ids[:, end:])
