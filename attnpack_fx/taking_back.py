"""Taking back drafts: assisted generation lets a model check several tokens in one call, and crops those it rejects.

Methods have acted on that call by then: rejected queries have added to what is known about every token, and tokens may
have left on their account. So a call of several tokens, as is a prompt with drafts behind it, is kept as it was before
methods acted, until the next call begins. Where its newest tokens are cropped before that, methods act anew on what is
left, and the cache is as if the others had never been there. What was packed with them has seen them all the same:
factors of low rank are of all tokens of a prompt. And a call attends to what there is when it begins: nothing leaves
between its tokens, as it may between calls of one token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnpack_fx.cached_layer import CachedLayer
from attnpack_fx.maintenance import maintain
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.asks import observation
from attnpack_fx.passes.method import Observation, Stage
from attnpack_fx.policy import PackPolicy


@dataclass(eq=False)
class Called:
    """One layer after a call, before methods acted on it."""

    layer: CachedLayer
    policy: PackPolicy
    _made: dict[int, tuple[PackedTensor, PackedTensor] | None] = field(default_factory=dict, repr=False)

    @property
    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Every tensor that takes memory, of keys and of values; many of them are those after methods acted, too."""
        told = [each for each in (self.layer.observed, self.layer.newest) if each is not None]
        return [*self.layer.key.tensors, *told], self.layer.value.tensors

    def cropped(self, tokens: int) -> tuple[PackedTensor, PackedTensor] | None:
        """Keys and values as after the same call without its tokens from `tokens` on.

        None where that is not known: where none of its tokens would be left, or more go than queries are known apart.
        """
        if tokens not in self._made:
            self._made = {tokens: self._cropped(tokens)}
        return self._made[tokens]

    def _cropped(self, tokens: int) -> tuple[PackedTensor, PackedTensor] | None:
        layer = _without(self.layer, tokens, observation(self.policy))
        if layer is None:
            return None
        called = Called(replace(layer), self.policy)
        maintain([layer], self.policy)
        remember([called], [layer])
        return layer.key, layer.value


def provisional(layers: Sequence[CachedLayer], policy: PackPolicy) -> list[Called | None]:
    """The layers of a call, where its tokens may be taken back and that would change what methods do."""
    matters = policy.partial is not None or observation(policy) is not None
    for method in policy.passes:
        matters = matters or bool(method.stages & {Stage.EVICT, Stage.SELECT})
    return [Called(replace(layer), policy) if matters and layer.added > 1 else None for layer in layers]


def remember(called: Sequence[Called | None], layers: Sequence[CachedLayer]) -> None:
    """Let keys and values know what to go back to when they are cropped."""
    for before, layer in zip(called, layers, strict=True):
        if before is not None:
            layer.key, layer.value = layer.key.handle(), layer.value.handle()
            layer.key.taken_back, layer.value.taken_back = (before, 0), (before, 1)


def settle(tensors: Iterable[Tensor]) -> None:
    """Let tensors of a cache drop what a crop would go back to, as the next call does: for who counts bytes now."""
    for tensor in tensors:
        if isinstance(tensor, PackedTensor):
            tensor.taken_back = None


def _without(layer: CachedLayer, tokens: int, asked: Observation | None) -> CachedLayer | None:
    """The layer before methods acted, as if the call had had no tokens from `tokens` on."""
    removed = layer.key.shape[2] - tokens
    if not 0 < removed < layer.added:
        return None
    key, value = layer.key.crop(tokens), layer.value.crop(tokens)
    observed, newest = layer.observed, layer.newest
    if observed is not None and not layer.prefill:
        if observed.dim() == 2 or observed.shape[1] - 1 <= removed:
            return None
        observed = observed[:, : observed.shape[1] - removed, : key.slots]
    elif observed is not None:
        if newest is None or newest.shape[1] <= removed:
            return None
        newest, gone = newest[:, : newest.shape[1] - removed], newest[:, newest.shape[1] - removed :].sum(1)
        assert asked is not None
        kinds = [kind for kind in (asked.kind, asked.text) if kind is not None]
        made = [newest[:, -1] if kind == "last" else each - gone for kind, each in zip(kinds, observed, strict=True)]
        observed = torch.stack(made)[..., :tokens]
        newest = newest[..., :tokens]
    return replace(layer, key=key, value=value, added=layer.added - removed, observed=observed, newest=newest)
