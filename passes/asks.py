"""What a policy's methods ask of the graph, all together."""

from collections.abc import Iterable
from typing import Any

from attnpack_fx.passes.eviction import Eviction
from attnpack_fx.passes.method import Method, Observation, Stage
from attnpack_fx.passes.row_coding import RowCoding
from attnpack_fx.passes.state import Policy

#: Stages that act on what a layer holds, packed or not.
_ON_CACHE = {Stage.EVICT, Stage.SELECT, Stage.MERGE, Stage.ROWS}


def acting(methods: Iterable[Method], stage: Stage) -> list[Any]:
    """The methods that act at a stage."""
    return [method for method in methods if stage in method.stages]


def observation(policy: Policy) -> Observation | None:
    """What attention is to remember about stored tokens; methods that ask for different things are refused before."""
    return next((method.observes for method in policy.passes if method.observes), None)


def acts_on_cache(policy: Policy) -> bool:
    """Whether caches that hold no factors are of interest too."""
    return any(method.stages & _ON_CACHE for method in policy.passes)


def asks_for_modality(policy: Policy) -> bool:
    """Whether which tokens are vision tokens matters after prefill."""
    return any(method.stages & {Stage.EVICT, Stage.SELECT} for method in policy.passes)


def moves_tokens(policy: Policy) -> bool:
    """Whether stored tokens may leave, or change places, once they are stored."""
    return any(method.stages & {Stage.EVICT, Stage.SELECT, Stage.MERGE} for method in policy.passes)


def codes_unrotated(policy: Policy) -> bool:
    """Whether dense keys are coded as they were before rotary embedding."""
    return any(isinstance(method, RowCoding) and method.unrotated for method in policy.passes)


def keeps_angles(policy: Policy) -> bool:
    """Whether keys of the dense tail are packed later as they were before rotary embedding."""
    return policy.fold_every is not None or codes_unrotated(policy)


def heads_apart(policy: Policy, factors: bool) -> bool:
    """Whether every KV head keeps tokens of its own; factors: whether the layer holds low-rank ones.

    Raises NotImplementedError where that is asked for and cannot be.
    """
    for method in policy.passes:
        if not isinstance(method, Eviction) or method.heads == "together":
            continue
        if not factors:
            return True
        if method.heads == "apart":
            raise NotImplementedError(
                f"{method.name}: got heads='apart' for a layer with low-rank factors, whose heads are concatenated and "
                "keep the same tokens; use heads='together', or leave the layer dense (no rank at all)"
            )
    return False
