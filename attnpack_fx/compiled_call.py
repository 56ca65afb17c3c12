"""What a compiled model's calls go through: one `Call` for all graphs of each, and a look at the cache it leaves."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.call import opened
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.patterns import layer_number
from attnpack_fx.passes.state import SiteReport
from attnpack_fx.policy import PackPolicy
from attnpack_fx.warning import warn


class OneCall:
    """Stands where `torch.nn.Module.compile` leaves what a module calls in place of its `forward`."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self._compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled(*args, **kwargs)  # part of a larger model, which is one call
        with opened() as call:
            output = self._compiled(*args, **kwargs)
        self._look_at(hf.cache_of(output), call.reports)
        return output

    def _look_at(self, cache: Any, reports: Iterable[SiteReport]) -> None:
        """For those who want to see what a call has left."""


class WatchedCall(OneCall):
    """Says once which layers are dense of which no graph has said so: what Dynamo skips, no backend ever sees.

    policy: what the model was compiled with.
    """

    def __init__(self, compiled: Callable[..., Any], policy: PackPolicy) -> None:
        super().__init__(compiled)
        self.policy = policy
        self._told: set[int] = set()

    def _look_at(self, cache: Any, reports: Iterable[SiteReport]) -> None:
        dense = set(_dense_layers(cache)) - self._told
        if not dense:
            return
        numbers = {layer_number(report.layer) for report in reports if report.action == "dense"}
        silent = set() if None in numbers else dense - numbers
        self._told |= dense
        if silent:
            listed = ", ".join(map(str, sorted(silent)))
            limit = torch._dynamo.config.recompile_limit
            warn(
                f"layers {listed} of the cache are dense, and no compiled graph has their attention: PyTorch runs a "
                f"function uncompiled once it has been compiled {limit} times (raise "
                "torch._dynamo.config.recompile_limit), where Dynamo is disabled, and behind a graph break in a loop"
            )


def _dense_layers(cache: Any) -> Iterable[int]:
    """Numbers of the layers that hold dense keys of any tokens."""
    if not hasattr(getattr(cache, "self_attention_cache", cache), "layers"):
        return
    for number, layer in enumerate(hf.self_attention_layers(cache)):
        key = getattr(layer, "keys", None)
        if isinstance(key, Tensor) and not isinstance(key, PackedTensor) and key.dim() == 4 and key.shape[2]:
            yield number
