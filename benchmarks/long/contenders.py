"""What holds the cache of a long generation: policies of ours, and caches of transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnpack_fx import H2O, KIVI, PackPolicy, Quantize, hf


@dataclass(frozen=True)
class Contender:
    """policy: the model is compiled with it; None runs it as it is. quantised: arguments of a `QuantizedCache`."""

    policy: PackPolicy | None = None
    quantised: Mapping[str, Any] | None = None

    def cache(self, model: Any) -> Any:
        """An empty cache. Raises ImportError where the package of a quantised one is missing."""
        if self.quantised is None:
            return hf.empty_cache(model)
        from transformers import QuantizedCache

        return QuantizedCache(config=model.config.get_text_config(), **self.quantised)

    def to_dict(self) -> dict[str, Any] | None:
        if self.quantised is not None:
            return {"cache": "QuantizedCache", **self.quantised}
        return None if self.policy is None else self.policy.to_dict()


def _unrotated(**fields: Any) -> Contender:
    return Contender(PackPolicy(vision_rank=16, key_space="unrotated", strict=True, **fields))


def _method(method: Any) -> Contender:
    return Contender(PackPolicy(vision_rank=None, strict=True, passes=(method,)))


DENSE = "dense"
CONTENDERS: dict[str, Contender] = {
    DENSE: Contender(),
    "rank 16, text dense": _unrotated(),
    "rank 16, text folded": _unrotated(text_rank=16, fold_every=64, recent=32),
    "rank 16, factors in 4 bit": _unrotated(passes=(Quantize(bits=4),)),
    "H2O, half of the tokens": _method(H2O(budget=0.5)),
    "KIVI, 2 bit": _method(KIVI(bits=2)),
    "quanto, 4 bit": Contender(quantised={"backend": "quanto", "nbits": 4}),
    "quanto, 2 bit": Contender(quantised={"backend": "quanto", "nbits": 2}),
    "hqq, 4 bit": Contender(quantised={"backend": "hqq", "nbits": 4, "axis_key": 1, "axis_value": 1}),
}
#: For a quick run.
FEW = (DENSE, "rank 16, text folded")
