"""`explain`: what the backend does to a model, measured on one prompt."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from attnpack_fx import hf
from attnpack_fx.backend import attnpack_backend
from attnpack_fx.cache_bytes import cache_bytes
from attnpack_fx.compiling import called_through, policy_for
from attnpack_fx.notebook import ShownAsText
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.passes.state import TEXT, SiteReport
from attnpack_fx.policy import PackPolicy
from attnpack_fx.step_cost import Layer, Step, step_costs
from attnpack_fx.taking_back import settle

_DECODE_STEPS = 2


class Report(ShownAsText, dict[str, Any]):
    """What `explain` found, as a dict that prints as a table.

    graphs: for every graph compiled, in order, the list of its attention sites: `layer`, `kind`, `action`, `reason`,
    ranks.
    layers: for every layer of the cache: where its tokens are, ranks, whether keys are stored before or after rotary
        embedding, bytes, the relative Frobenius error of keys and values against the dense prefill (None where dense),
        and the bound on the relative error of folded text (None where nothing is folded).
        dense_step, packed_step: milliseconds that attention of one decode step takes with either, `predicted` and
        `measured` (None where the layer is dense, and no packed keys are there to compare).
    fastest: settings that lose no more of the keys than the policy does: it itself, dense keys and values (policy None)
        and rotated keys at a rank that is enough, with `milliseconds` of all packed layers, the fastest first; empty
        where none is packed.
    bytes_before, bytes_after: what the dense and the packed cache hold after the same tokens, in this process.
    processes: how many tensor-parallel processes share the heads of each layer.
    bytes_before_in_all, bytes_after_in_all: what the caches hold in all of them.
    policy: the policy, as a dict.
    """

    def __str__(self) -> str:
        lines = ["attention sites (one line per site; what each graph that has it does)"]
        for layer, actions in _by_layer(self["graphs"]).items():
            lines.append(f"  {layer:<48} {', '.join(actions)}")
        lines.append("")
        lines.append(
            f"  {'layer':>5}  {'tokens':<34} {'rank k/v':<22} {'keys':<10} "
            f"{'error k':>9} {'error v':>9} {'fold':>9} {'bytes':>11} {'dense':>11} {'step, ms':>17} {'dense':>17}"
        )
        for layer in self["layers"]:
            tokens = ", ".join(f"{name} {count}" for name, count in layer["tokens"].items())
            ranks = (
                ", ".join(f"{name} {key}/{layer['value_rank'][name]}" for name, key in layer["key_rank"].items()) or "-"
            )
            names = ("key_error", "value_error", "fold_error")
            errors = [f"{layer[name]:.4f}" if layer[name] is not None else "-" for name in names]
            lines.append(
                f"  {layer['layer']:>5}  {tokens:<34} {ranks:<22} {layer['key_space']:<10} "
                f"{errors[0]:>9} {errors[1]:>9} {errors[2]:>9} "
                f"{layer['bytes']:>11,} {layer['dense_bytes']:>11,} "
                f"{_milliseconds(layer['packed_step']):>17} {_milliseconds(layer['dense_step']):>17}"
            )
        lines.append(f"  cache: {_compared(self['bytes_before'], self['bytes_after'])}")
        if self["processes"] > 1:
            both = _compared(self["bytes_before_in_all"], self["bytes_after_in_all"])
            lines.append(f"  cache, in all {self['processes']} processes: {both}")
        if self["fastest"]:
            lines += ["", "attention of a decode step in all packed layers, as measured, with no more error of keys"]
            lines += self.settings
        return "\n".join(lines)

    @property
    def settings(self) -> list[str]:
        """A line for each of the `fastest`."""
        return [f"  {each['milliseconds']:9.3f} ms  {self._named(each['policy'])}" for each in self["fastest"]]

    def _named(self, policy: dict[str, Any] | None) -> str:
        if policy is None:
            return "dense keys and values"
        if policy == self["policy"]:
            return "this policy"
        return ", ".join(f"{name}={_shown(value)}" for name, value in policy.items() if value != self["policy"][name])


def explain(model: torch.nn.Module, *, policy: PackPolicy | None = None, **inputs: Any) -> Report:
    """Run one prefill and two decode steps, dense and packed, and report every attention site and cache layer.

    Then measure the attention of a decode step in every packed layer, on random queries, and look for a faster setting.

    model: left as it was found, compiled or not. A model with `generate` (transformers) is run through it; any other
        module is called once with `inputs`, and the packed tensors among its results are reported.
    policy: default `PackPolicy()`. inputs: what the model or its processor would be given.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"explain: model: got {type(model).__name__}, expected a torch.nn.Module")
    policy = policy_for(model, policy or PackPolicy())
    graphs: list[list[SiteReport]] = []
    with torch.no_grad():
        with called_through(model, None):
            dense = _run(model, inputs)
        backend = partial(attnpack_backend, options={"policy": policy}, observer=graphs.append)
        with called_through(model, backend):
            packed = _run(model, inputs)
        pairs = list(zip(dense, packed, strict=True))
        layers = [_layer(number, before, after, _steps(model)) for number, (before, after) in enumerate(pairs)]
        timed = {
            number: layer for number, (before, after) in enumerate(pairs) if (layer := _timed(model, before, after))
        }
        steps, settings = step_costs(policy, list(timed.values()))
        for number, (of_dense, of_packed) in zip(timed, steps, strict=True):
            layers[number] |= {"dense_step": _step(of_dense), "packed_step": _step(of_packed)}
    group = torch.distributed.group.WORLD if policy.processes > 1 else None
    return Report(
        policy=policy.to_dict(),
        graphs=[[asdict(site) for site in sites] for sites in graphs],
        layers=layers,
        fastest=[
            {"policy": each.policy and each.policy.to_dict(), "milliseconds": 1e3 * each.seconds} for each in settings
        ],
        bytes_before=cache_bytes(dense),
        bytes_after=cache_bytes(packed),
        processes=policy.processes,
        bytes_before_in_all=cache_bytes(dense, group=group),
        bytes_after_in_all=cache_bytes(packed, group=group),
    )


def _run(model: torch.nn.Module, inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer after the run."""
    generate: Any = getattr(model, "generate", None)
    if callable(generate):
        out = generate(
            **inputs,
            max_new_tokens=1 + _DECODE_STEPS,
            min_new_tokens=1 + _DECODE_STEPS,
            do_sample=False,
            num_beams=1,
            return_dict_in_generate=True,
        )
        return hf.keys_and_values(out.past_key_values)
    leaves = [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, Tensor) and leaf.dim() == 4]
    settle(leaves)
    return list(zip(leaves[0::2], leaves[1::2], strict=True))


def _timed(model: torch.nn.Module, dense: tuple[Tensor, Tensor], packed: tuple[Tensor, Tensor]) -> Layer | None:
    """What is measured of a layer; None where it is dense."""
    key, value = packed
    if not (isinstance(key, PackedTensor) and isinstance(value, PackedTensor)):
        return None
    return Layer(dense, (key, value), hf.query_heads(model) or key.shape[1])


def _step(step: Step) -> dict[str, float]:
    return {name: 1e3 * seconds for name, seconds in asdict(step).items()}


def _compared(dense: int, packed: int) -> str:
    ratio = "no cache"
    if packed:
        ratio = f"{dense / packed:.2f}x smaller" if packed <= dense else f"{packed / dense:.2f}x larger"
    return f"{dense:,} bytes dense, {packed:,} bytes packed, {ratio}"


def _milliseconds(step: dict[str, float] | None) -> str:
    """Measured, and in brackets predicted."""
    return "-" if step is None else f"{step['measured']:.3f} ({step['predicted']:.3f})"


def _shown(value: Any) -> str:
    return repr(tuple(value) if isinstance(value, list) else value)


def _steps(model: torch.nn.Module) -> int:
    """Decode steps of a run."""
    return _DECODE_STEPS if callable(getattr(model, "generate", None)) else 0


def _layer(number: int, dense: tuple[Tensor, Tensor], packed: tuple[Tensor, Tensor], steps: int) -> dict[str, Any]:
    key, value = packed
    report: dict[str, Any] = {
        "layer": number,
        "tokens": {"dense": key.shape[2]},
        "key_rank": {},
        "value_rank": {},
        "key_error": None,
        "value_error": None,
        "key_space": "-",
        "fold_error": None,
        "dense_step": None,
        "packed_step": None,
        "bytes": cache_bytes([packed]),
        "dense_bytes": cache_bytes([dense]),
    }
    if isinstance(key, PackedTensor) and isinstance(value, PackedTensor):
        report |= {
            "tokens": key.tokens | _left(key),
            "key_rank": key.ranks,
            "value_rank": value.ranks,
            "key_error": _relative_error(key, dense[0], steps),
            "value_error": _relative_error(value, dense[1], steps),
            "key_space": "rotated" if key.held.angles is None else "unrotated",
            "fold_error": _fold_error(key, value),
        }
    return report


def _left(key: PackedTensor) -> dict[str, int]:
    """How many tokens, of the sample with most, are not read, and how many are gone."""
    counts, absent = {}, key.placement.absent
    if key.held.resting is not None and key.held.resting.index.shape[1]:
        counts["resting"] = key.held.resting.index.shape[1]
    if absent is not None:
        stored = (key.positions >= 0).sum(1) + counts.get("resting", 0)
        counts["evicted"] = int((key.shape[2] - absent - stored).max())
    return counts


def _fold_error(key: PackedTensor, value: PackedTensor) -> float | None:
    """The larger bound of keys and values."""
    bounds = [loss.relative for packed in (key, value) for name, loss in packed.held.losses if name == TEXT]
    return max(bounds, default=None)


def _relative_error(packed: PackedTensor, dense: Tensor, steps: int) -> float:
    """Frobenius error over the stored prompt tokens: later tokens may differ because the text does."""
    prompt = dense.shape[2] - steps
    stored = packed.stored[:, :, :prompt, None]
    reference = dense[:, :, :prompt].float() * stored
    difference = packed.dense()[:, :, :prompt].float() - reference
    return float(difference.norm() / reference.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _by_layer(graphs: list[list[dict[str, Any]]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for sites in graphs:
        for site in sites:
            text = site["action"] + (f" ({site['reason']})" if site["reason"] else "")
            # Frames entered below the top name the same module by a shorter path.
            layer = next(
                (name for name in found if name.endswith(site["layer"]) or site["layer"].endswith(name)),
                site["layer"],
            )
            actions = found.setdefault(layer, [])
            if text not in actions:
                actions.append(text)
    return found
