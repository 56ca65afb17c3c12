"""`calibrate`: ranks, bits and key spaces of every layer from one number of bytes, or one error, and a few prompts.

The dense model answers every prompt; each component of each layer's keys and values is weighed by what dropping it does
to the attention output of the tokens that read the cache (`effects.py`), relative to that output: layers feed a
residual stream whose scale differs from layer to layer, and only relative changes compare. Ranks and bits follow by
reverse water-filling (`allocate.py`); what comes out is tried on the prompts beside uniform plans of as many bytes.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.calibration.capture import UNNUMBERED, Angles, Observed, Observer
from attnpack_fx.calibration.effects import Attended, attended, factors, key_effects, value_effects
from attnpack_fx.calibration.plans import (
    Modality,
    Part,
    Plan,
    Prefer,
    Role,
    chosen_spaces,
    fitted,
    fitted_to_error,
    padded,
    uniform,
)
from attnpack_fx.calibration.report import Calibration, Candidate
from attnpack_fx.calibration.trial import Answer, Prompt, divergence, generated
from attnpack_fx.checks import checked_bool, is_number
from attnpack_fx.passes.storage import KeySpace
from attnpack_fx.policy import PackPolicy

log = logging.getLogger(__name__)


@overload
def calibrate(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    budget: float | None = None,
    max_error: float | None = None,
    text: bool = False,
    new_tokens: int = 16,
    prefer: Prefer = "fidelity",
    report: Literal[False] = False,
) -> PackPolicy: ...


@overload
def calibrate(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    budget: float | None = None,
    max_error: float | None = None,
    text: bool = False,
    new_tokens: int = 16,
    prefer: Prefer = "fidelity",
    report: Literal[True],
) -> tuple[PackPolicy, Calibration]: ...


def calibrate(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    *,
    budget: float | None = None,
    max_error: float | None = None,
    text: bool = False,
    new_tokens: int = 16,
    prefer: Prefer = "fidelity",
    report: bool = False,
) -> PackPolicy | tuple[PackPolicy, Calibration]:
    """A policy with ranks, bits and a key space for every layer, from a few prompts and one number.

    model: a transformers model with `generate`, compiled or not; left as it was found. samples: prompts as the model's
        processor gives them, batches of one or more, with the kinds of questions that will be asked: both the question
        and the answer say what of the cache is read.
    budget: bytes that the packed tokens of one sample may take (factors and scales, all layers together) at the mean
        number of tokens of the samples; below 1, a share of their dense bytes. cos and sin of un-rotated keys, one copy
        for all layers, come on top: see `Calibration.shared_bytes`.
    max_error: instead of a budget, the change of attention outputs that is allowed, relative to their norm (root mean
        square over queries and layers, as expected from the samples); the fewest bytes within it are taken.
    text: whether text tokens are packed too. new_tokens: how many tokens are generated to see queries, at least 2.
    prefer: `"fidelity"`: every layer's keys are factorised before or after rotary embedding, whichever errs less in
        the same bytes. `"speed"`: after it, where its expected error (in norm, of that layer's keys) is at most
        twice that before it: rotated keys are read without being turned at every step.
    report: whether to return `(policy, Calibration)`.

    Within a budget the policy returned is the one of the least measured divergence from the dense model among the
    calibrated and the uniform ones. Raises `ValueError` for anything that gives no policy, and `NotImplementedError`
    for a model whose layers the graphs do not number.
    """
    _check(model, budget, max_error, new_tokens, prefer)
    checked_bool("text", text)
    original = getattr(model, "_orig_mod", model)
    hf.check_whole(original, "calibrate", "calibrate in one process: the policy serves any number of them")
    study = _Study(text, new_tokens)
    with study.observer.watching(original):
        for number, sample in enumerate(samples):
            study.add(original, number, sample)
    parts = study.parts()
    count = study.observer.count
    plans = _plans(parts, count, study.budget(parts, budget), max_error, prefer)
    tried = []
    for plan in plans:
        policy = PackPolicy(layers=plan.layers(parts), layer_count=count)
        tried.append((divergence(original, study.answers, policy), plan, policy))
        log.info("%s: divergence %g, expected error %g", plan.name, tried[-1][0], math.sqrt(plan.error))
    chosen = min(_allowed(tried, max_error, prefer), key=lambda each: each[0])
    return (chosen[2], study.report(parts, tried, chosen[1])) if report else chosen[2]


_Tried = tuple[float, Plan, PackPolicy]


def _plans(
    parts: Sequence[Part], count: int, budget: float | None, max_error: float | None, prefer: Prefer
) -> list[Plan]:
    """What to try, the plan from effects first."""
    turned: list[KeySpace] = ["rotated"] * count
    straight: list[KeySpace] = ["unrotated"] * count
    if budget is None:
        assert max_error is not None
        first = fitted_to_error("calibrated, unrotated", parts, straight, max_error**2)
        spaces = chosen_spaces(parts, count, first, prefer)
        found = [fitted_to_error("calibrated", parts, spaces, max_error**2)]
        return found + uniform(parts, count, found[0].bytes)
    first = fitted("calibrated, unrotated", parts, straight, budget)
    spaces = chosen_spaces(parts, count, first, prefer)
    found = [fitted("calibrated", parts, spaces, budget)]
    if spaces != tuple(straight) and any("unrotated" in part.effects for part in parts):
        found.append(first)
    if spaces != tuple(turned):
        found.append(fitted("calibrated, rotated", parts, turned, budget))
    return found + uniform(parts, count, budget)


def _allowed(tried: Sequence[_Tried], max_error: float | None, prefer: Prefer) -> Sequence[_Tried]:
    """Plans that keep what was asked for besides the budget."""
    first = tried[0][1]
    if max_error is not None:
        return [each for each in tried if each[1] is first or each[1].error <= max_error**2]
    if prefer == "speed":
        return [each for each in tried if each[1].spaces.count("rotated") >= first.spaces.count("rotated")]
    return tried


class _Study:
    """What the samples show: answers of the dense model, effects of all components."""

    def __init__(self, text: bool, new_tokens: int) -> None:
        self.observer = Observer()
        self.answers: list[Answer] = []
        self.notes: set[str] = set()
        self.queries = self.samples = 0
        self._new_tokens = new_tokens
        self._modalities: tuple[Modality, ...] = ("vision", "text") if text else ("vision",)
        self._effects: dict[tuple[int, Modality, Role], dict[KeySpace, list[Tensor]]] = {}
        self._tokens: dict[Modality, list[int]] = defaultdict(list)
        self._shapes: dict[tuple[int, Role], tuple[int, int, int]] = {}
        self._shared: list[int] = []

    def add(self, model: Any, number: int, sample: Mapping[str, Any]) -> None:
        """Answer one batch of prompts and weigh what its cache holds."""
        if not isinstance(sample, Mapping):
            raise ValueError(
                f"samples[{number}]: got {type(sample).__name__}, expected a mapping such as the model's processor "
                "returns; put single tensors under their names, e.g. {'input_ids': ...}"
            )
        observer = self.observer
        observer.begin()
        out = generated(model, sample, self._new_tokens, **hf.cache_argument(hf.empty_cache(model)))
        # A prompt whose layers are not numbered is not seen: the first step, numbered, would pass for it.
        steps = len(out.logits) - 1
        if not observer.layers or any(len(layer.reads) != steps for layer in observer.layers.values()):
            why = "; ".join(sorted(observer.obstacles)) or "no graph shows attention that keeps keys and values"
            kind = NotImplementedError if UNNUMBERED in why else ValueError
            raise kind(
                f"samples[{number}]: the backend packs no layer of this model: {why}; see attnpack_fx.explain(model, "
                "**sample)"
            )
        logits = torch.stack(out.logits, 1)
        tokens = out.sequences[:, -logits.shape[1] :]
        alive = _alive(tokens, model.generation_config.eos_token_id)
        prompts = {layer: Prompt.of(seen) for layer, seen in observer.layers.items()}
        self.answers.append(Answer(sample, prompts, tokens, alive, logits))
        for row in range(tokens.shape[0]):
            self._weigh(row, alive[row, 1:].tolist())
        observer.begin()

    def _weigh(self, row: int, alive: Sequence[bool]) -> None:
        self.samples += 1
        self.queries += sum(alive)
        shared: dict[int, int] = {}
        for number, layer in self.observer.layers.items():
            if layer.out is None:
                self.notes.add(
                    f"layer {number}: the output projection is not recognised; errors are those of attention"
                )
            angles = _row(layer.angles, row)
            indices = {modality: _tokens_of(layer, row, modality) for modality in self._modalities}
            self._weigh_layer(number, layer, row, attended(layer, row, alive), angles, indices)
            if layer is next(iter(self.observer.layers.values())):
                for modality, index in indices.items():
                    self._tokens[modality] += [len(index)] if len(index) else []
            if angles is not None and id(layer.angles) not in shared:
                every = torch.cat(list(indices.values()))[None]
                tensors = angles.packed(every, every.shape[1]).tensors
                shared[id(layer.angles)] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._shared.append(sum(shared.values()))

    def _weigh_layer(
        self,
        number: int,
        layer: Observed,
        row: int,
        seen: Attended,
        angles: Angles | None,
        indices: Mapping[Modality, Tensor],
    ) -> None:
        key, value = layer.key[row, :, : layer.prompt], layer.value[row, :, : layer.prompt]
        bits = key.element_size() * 8
        self._shapes[number, "key"] = (key.shape[0], key.shape[2], bits)
        self._shapes[number, "value"] = (value.shape[0], value.shape[2], bits)
        total = max(seen.total, torch.finfo(torch.float32).tiny)
        for modality, index in indices.items():
            if not len(index):
                continue
            coefficient, basis = factors(value[:, index])
            self._note(number, modality, "value", "rotated", value_effects(seen, index, coefficient, basis) / total)
            for space, keys in _key_spaces(key, angles):
                coefficient, basis = factors(keys[:, index])
                turned = angles if space == "unrotated" else None
                found = key_effects(seen, value, index, coefficient, basis, turned)
                self._note(number, modality, "key", space, found / total)

    def _note(self, layer: int, modality: Modality, role: Role, space: KeySpace, effects: Tensor) -> None:
        own = self._effects.setdefault((layer, modality, role), {})
        own.setdefault(space, []).append(effects.cpu())

    def parts(self) -> list[Part]:
        """Every matrix there is to pack, its effects relative to all layers together."""
        if not self.samples:
            raise ValueError("samples: got none, expected at least one prompt, as the model's processor gives it")
        if not self._effects:
            raise ValueError(
                "samples: got prompts in which no vision token is seen, with text=False, expected something to pack; "
                "give prompts with images, state attnpack_fx.modality(mask), or pass text=True"
            )
        layers = len({layer for layer, *_ in self._effects})
        parts = []
        for (layer, modality, role), effects in sorted(self._effects.items()):
            # Keys of a layer where only some samples show their rotary embedding are not compared.
            most = max(map(len, effects.values()))
            mean: dict[KeySpace, Tensor] = {s: padded(e) / layers for s, e in effects.items() if len(e) == most}
            tokens = sum(self._tokens[modality]) / len(self._tokens[modality])
            parts.append(Part(layer, modality, role, tokens, *self._shapes[layer, role], mean))
        return parts

    def budget(self, parts: Sequence[Part], budget: float | None) -> float | None:
        """In bytes."""
        dense = sum(part.dense_bytes for part in parts)
        return dense * budget if budget is not None and budget < 1 else budget

    def report(self, parts: Sequence[Part], tried: Sequence[_Tried], chosen: Plan) -> Calibration:
        layers = chosen.layers(parts)
        packed = len({part.layer for part in parts})
        errors: list[float | None] = []
        for number in range(len(layers)):
            own = [(p, c) for p, c in zip(parts, chosen.columns, strict=True) if p.layer == number]
            left = sum(part.error(columns, part.space(chosen.spaces)) for part, columns in own)
            errors.append(math.sqrt(left * packed) if own else None)
        ordered = sorted(tried, key=lambda each: each[0])
        unrotated = any(part.space(chosen.spaces) == "unrotated" and part.role == "key" for part in parts)
        return Calibration(
            layers,
            tuple(errors),
            math.sqrt(chosen.error),
            tuple(Candidate(plan.name, kl, math.sqrt(plan.error), round(plan.bytes)) for kl, plan, _ in ordered),
            chosen.name,
            round(chosen.bytes),
            round(sum(part.dense_bytes for part in parts)),
            round(sum(self._shared) / len(self._shared)) if unrotated else 0,
            self.samples,
            self.queries,
            tuple(sorted(self.notes)),
        )


def _check(model: Any, budget: float | None, max_error: float | None, new_tokens: int, prefer: str) -> None:
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise ValueError(
            f"model: got {type(model).__name__}, expected a transformers model with generate and a cache; "
            "for your own model write the plan by hand, as PackPolicy(layers=...)"
        )
    if (budget is None) == (max_error is None):
        raise ValueError(
            f"got budget={budget!r} and max_error={max_error!r}, expected one of them; budget is in bytes or, below 1, "
            "a share of the dense bytes"
        )
    if budget is not None and (not is_number(budget) or budget <= 0 or (budget >= 1 and budget != int(budget))):
        raise ValueError(f"budget: got {budget!r}, expected a share in (0, 1) of the dense bytes, or a number of bytes")
    if max_error is not None and (not is_number(max_error) or max_error < 0):
        raise ValueError(f"max_error: got {max_error!r}, expected a number >= 0, e.g. 0.05")
    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or new_tokens < 2:
        raise ValueError(
            f"new_tokens: got {new_tokens!r}, expected an int >= 2: the first token comes from the prefill, which "
            "reads no packed cache"
        )
    if prefer not in ("fidelity", "speed"):
        raise ValueError(f"prefer: got {prefer!r}, expected 'fidelity' or 'speed'")


def _alive(tokens: Tensor, ends: int | list[int] | None) -> Tensor:
    """Bool `[B, n]`: whether a sample had not ended before a token."""
    ended = torch.isin(tokens, torch.tensor(ends if ends is not None else [], device=tokens.device, dtype=tokens.dtype))
    return (ended.cumsum(1) - ended.long()) == 0


def _row(angles: Angles | None, row: int) -> Angles | None:
    if angles is None:
        return None
    own = slice(row, row + 1) if angles.cos.shape[0] > 1 else slice(0, 1)
    return Angles(angles.cos[own], angles.sin[own], angles.interleaved)


def _tokens_of(layer: Observed, row: int, modality: Modality) -> Tensor:
    """int64 `[N]`: the prompt's tokens of a modality, padding left out."""
    chosen = torch.ones(layer.prompt, dtype=torch.bool, device=layer.key.device)
    if layer.vision is not None:
        vision = layer.vision[row if layer.vision.shape[0] > 1 else 0]
        chosen = vision if modality == "vision" else ~vision
    elif modality == "vision":
        chosen = ~chosen
    if layer.real is not None:
        chosen = chosen & layer.real[row if layer.real.shape[0] > 1 else 0]
    return chosen.nonzero()[:, 0]


def _key_spaces(key: Tensor, angles: Angles | None) -> list[tuple[KeySpace, Tensor]]:
    found: list[tuple[KeySpace, Tensor]] = [("rotated", key)]
    if angles is not None:
        found.append(("unrotated", angles.unrotated(key[None])[0]))
    return found
