"""`attnpack_fx.compile`: the one call that works whatever form the model comes in."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from attnpack_fx import hf
from attnpack_fx.backend import attnpack_backend
from attnpack_fx.compiled_call import OneCall, WatchedCall
from attnpack_fx.policy import PackPolicy, PolicyError

#: What `torch.compile` takes and this does not -> what to do instead.
_OF_TORCH_COMPILE = {
    "options": "give its fields as arguments, e.g. attnpack_fx.compile(model, vision_rank=64)",
    "backend": "leave it out: the backend is attnpack's",
}


def compile(
    model: torch.nn.Module,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> torch.nn.Module:
    """Compile `model` in place with the attnpack backend, and return it.

    model: a module, or what `torch.compile(module)` returned: its `generate` runs the original module uncompiled, so
    the original is what gets compiled and returned. Where a transformers model's `generate` calls another one inside
    it, as BLIP-2's does, that one is compiled as well.
    mode, dynamic, fullgraph: as in `torch.compile`. options: fields of `PackPolicy`, or one as `policy=...`, and
    Inductor's options.

    Beside what `model.compile(backend="attnpack")` does, layers share what they have in common however many graphs the
    model breaks into, and layers of the cache whose attention no graph ever had are warned of.

    Raises ValueError at once for a bad option.
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model: got {type(model).__name__}, expected a torch.nn.Module; "
            "compile a function with torch.compile(function, backend=attnpack_backend)"
        )
    for name, value in (("dynamic", dynamic), ("fullgraph", fullgraph)):
        if not isinstance(value, bool) and not (name == "dynamic" and value is None):
            raise PolicyError(f"{name}: got {value!r}, expected True or False, as in torch.compile")
    for name, instead in _OF_TORCH_COMPILE.items():
        if name in options:
            raise PolicyError(f"{name}: got {options[name]!r}, which attnpack_fx.compile does not take; {instead}")
    policy, _ = PackPolicy.from_options(options, mode, dynamic)
    original = getattr(model, "_orig_mod", model)
    known = _known(original, policy)
    policy = replace(policy, **known)
    options |= {"policy": policy} if "policy" in options else known
    # torch.compile takes either a mode or options: the mode rides along among the options.
    given = options if mode is None else {**options, "mode": mode}
    for module in (original, *hf.called_by_generate(original)):
        module.compile(
            backend=attnpack_backend, dynamic=dynamic, fullgraph=fullgraph, options=given, **_recompiles(module)
        )
        assert module._compiled_call_impl is not None
        module._compiled_call_impl = WatchedCall(module._compiled_call_impl, policy)
    return original


def policy_for(model: Any, policy: PackPolicy) -> PackPolicy:
    """Return the policy with what the model says of itself: how many layers it has, how many processes share them."""
    return replace(policy, **_known(model, policy))


def _known(model: Any, policy: PackPolicy) -> dict[str, Any]:
    known: dict[str, Any] = {}
    if policy.varies and policy.layer_count is None:
        # A graph break would hide from each graph how many layers there are.
        known["layer_count"] = hf.layer_count(model)
    processes = hf.processes(model)
    if processes > 1:
        known["processes"] = processes
    return known


def _recompiles(module: torch.nn.Module) -> dict[str, Any]:
    """How often Dynamo may compile for a model, as arguments of `torch.compile`, which has them from torch 2.13 on.

    Past the limit a model runs eagerly, its cache dense. So each has its own, and as much for each of its layers as
    Dynamo grants a function: what stands behind a graph break in the loop over them is compiled once a layer.
    """
    known, config = inspect.signature(torch.compile).parameters, torch._dynamo.config
    limit = config.recompile_limit * (hf.layer_count(module) or 1)
    given = {"isolate_recompiles": True, "recompile_limit": min(limit, config.accumulated_recompile_limit)}
    return {name: value for name, value in given.items() if name in known}


@contextmanager
def called_through(model: torch.nn.Module, backend: Callable[..., Any] | None) -> Iterator[None]:
    """Let calls of `model` go through `backend`, or run eagerly (None), and undo it after.

    A backend that is a new object to Dynamo sees every graph: nothing compiled earlier is reused.
    """
    before = model._compiled_call_impl
    model._compiled_call_impl = None
    if backend is not None:
        model.compile(backend=backend, **_recompiles(model))
        assert model._compiled_call_impl is not None
        model._compiled_call_impl = OneCall(model._compiled_call_impl)
    try:
        yield
    finally:
        model._compiled_call_impl = before
