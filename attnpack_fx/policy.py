"""What to pack, and how much: `PackPolicy`, the one place where options are named, defaulted and checked.

A policy is a value: frozen, hashable, equal to any policy with the same fields. `PackPolicy.from_options`
splits what a user hands to `torch.compile(..., options=...)` into a policy and plain Inductor configuration;
nothing later validates it again. `PackPolicy.layer` says what it comes to in one attention layer.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from attnpack_fx import model_bases
from attnpack_fx.checks import PolicyError, checked_bool, checked_int, checked_keys, is_number
from attnpack_fx.layer_plans import checked_layers, fitted
from attnpack_fx.methods import checked_methods, to_mapping
from attnpack_fx.options import inductor_patches, mode_patches, normalised, unknown
from attnpack_fx.partial import Partial, checked_partial
from attnpack_fx.passes.asks import acting, codes_unrotated
from attnpack_fx.passes.method import Method, Stage
from attnpack_fx.passes.storage import Columns, KeySpace, LayerPlan, Stored
from attnpack_fx.ranks import (
    Energy,
    Linear,
    Modality,
    PerLayer,
    Rank,
    RankSpec,
    checked_rank,
    known_place,
    parts,
    resolve,
    to_json,
)

__all__ = ["PackPolicy", "PolicyError", "Rank", "RankSpec"]

#: The version of the files that `PackPolicy.save` writes.
FILE_VERSION = 1
#: Defaults of earlier releases, which files of calibrated plans hold beside the plan that decides.
_FORMER_DEFAULTS = {"vision_rank": 64}

_KEY_SPACES = ("rotated", "unrotated", "auto")
_BASES = ("sample", "batch")
_BASES_FILE = ".safetensors"


@dataclass(frozen=True)
class PackPolicy:
    """Which cached keys and values are packed, and how.

    The defaults are those of AttentionPack (CVPR 2026, arXiv 2603.23914), vision tokens at rank 64, text tokens dense,
    keys factorised before rotary embedding where that is recognised, but for the rank of these keys: 32 columns keep
    more of them than 64 keep of rotated ones, and are read faster than dense keys.

    vision_rank: columns kept per layer of the `[T, H * D]` matrix of vision tokens: an int, `"full"` (as many as the
        matrix has: lossless), a schedule over the decoder layers (`Linear`, `PerLayer`, `Energy`), a `(key, value)`
        pair of these, `"auto"`, or `None` (dense). The default, `"auto"`, is 32 for keys before rotary embedding and
        64 for all else. It, and exactly 64, are clipped where `H * D` is less.
    text_rank: the same for all other tokens, and for every token of a graph that shows no modality. Default
        `None`. A number is never clipped.
    skip_layers: numbers of decoder layers that stay dense; negative ones count from the last layer.
    key_space: `"rotated"`: keys are stored as they are attended, after rotary embedding, and never rebuilt.
        `"unrotated"`: before it, which takes about a quarter of the rank and a rotation at every step. `"auto"`: as
        `layers` says, else un-rotated; rotated wherever no rotary embedding is recognised. Other than `"auto"` it
        overrides `layers`.
    fold_every: fold the oldest dense tokens into the packed text as soon as so many lie beyond the `recent` newest;
        `None` never does. Needs packed, unquantised text.
    recent: how many of the newest tokens a fold leaves dense.
    max_fold_error: a bound, > 0, on the relative Frobenius error folds may add up to in a layer; `None` sets none.
    partial: read less of the vision tokens that are attended to little; a `Partial`, or a mapping with its fields.
    bases: `"sample"`: one basis per sample, layer and modality. `"batch"`: one for the whole batch. The path of a
        `.safetensors` file that `attnpack_fx.calibrate_bases` wrote: one for the model.
    basis_tolerance: with a basis for a batch or the model, a sample of whose squared Frobenius norm more than this
        share is left out gets a basis of its own. A number >= 0.
    layers: a calibrated plan, one `LayerPlan` (or a mapping with its fields) per decoder layer, instead of
        `vision_rank`, `text_rank` and `skip_layers`, which stay at their defaults.
    passes: methods that compose with all this, such as `(FastV(), H2O(budget=0.5), Quantize(bits=4))`, or mappings such
        as `{"method": "H2O", "budget": 0.5}`. Each acts at its own stage, whatever the order here.
    layer_count: the number of decoder layers, for graphs that do not show it.
    processes: how many tensor-parallel processes share the heads of a layer. Ranks mean the whole layer, and each
        process keeps its share of them. `attnpack_fx.compile` finds the number.
    strict: a rewrite that fails raises; otherwise the untouched graph is compiled and the reason is logged.

    Lists count as tuples and JSON forms as what they stand for. Raises `PolicyError`, a `ValueError`, for any field of
    a wrong type or value and for fields that contradict each other.
    """

    vision_rank: RankSpec = "auto"
    text_rank: RankSpec = None
    skip_layers: tuple[int, ...] = ()
    key_space: Literal["rotated", "unrotated", "auto"] = "auto"
    fold_every: int | None = None
    recent: int = 32
    max_fold_error: float | None = None
    partial: Partial | None = None
    bases: str = "sample"
    basis_tolerance: float = 0.1
    layers: tuple[LayerPlan, ...] | None = None
    passes: tuple[Method, ...] = ()
    layer_count: int | None = None
    processes: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("vision_rank", "text_rank"):
            self._set(name, checked_rank(name, getattr(self, name)))
        self._set("skip_layers", _checked_skips(self.skip_layers))
        _checked_choice("key_space", self.key_space, _KEY_SPACES)
        if self.fold_every is not None:
            checked_int("fold_every", self.fold_every, 1, "use None to never fold")
        checked_int("recent", self.recent, 0, "0 folds all tokens alike")
        if self.max_fold_error is not None:
            if not is_number(self.max_fold_error) or self.max_fold_error <= 0:
                raise PolicyError(
                    f"max_fold_error: got {self.max_fold_error!r}, expected a number > 0; use None for no bound"
                )
            self._set("max_fold_error", float(self.max_fold_error))
        self._set("partial", checked_partial(self.partial))
        if not isinstance(self.bases, str) or not self.bases.endswith(_BASES_FILE):
            _checked_choice("bases", self.bases, (*_BASES, f"a path ending in {_BASES_FILE}"))
        if not is_number(self.basis_tolerance) or self.basis_tolerance < 0:
            raise PolicyError(f"basis_tolerance: got {self.basis_tolerance!r}, expected a number >= 0; e.g. 0.1")
        self._set("basis_tolerance", float(self.basis_tolerance))
        self._set("layers", checked_layers(self.layers))
        self._set("passes", checked_methods(self.passes))
        if self.layer_count is not None:
            checked_int("layer_count", self.layer_count, 1, "use None where the graph shows it")
        checked_int("processes", self.processes, 1, "use 1 without tensor parallelism")
        if self.processes > 1 and self.bases not in _BASES:
            raise PolicyError(
                f"bases: got {self.bases!r} with processes={self.processes}, expected one of {', '.join(_BASES)}: the "
                "model's basis is one of all heads, and no part of it is one of some heads"
            )
        checked_bool("strict", self.strict)
        _check_combinations(self)

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any] | None, mode: str | None = None, dynamic: bool | None = None
    ) -> tuple["PackPolicy", dict[str, Any]]:
        """Split `torch.compile` options into a policy and Inductor configuration patches.

        options: policy fields by name, as themselves or in their JSON form, or a ready policy under `"policy"`;
            besides them any `torch._inductor.config` key, and `"mode"` (`torch.compile` takes mode or options but not
            both, so a mode can ride along here).
        mode, dynamic: as given to `torch.compile`. Explicit options win over those a mode brings.

        A `-` in a key counts as `_`, as in `torch.compile`. Raises `ValueError` for anything unknown or of a
        wrong type.
        """
        given = normalised(options)
        policy = given.pop("policy", None)
        inner_mode = given.pop("mode", None)
        own = {name: given.pop(name) for name in _field_names(cls) if name in given}
        if policy is None:
            policy = cls(**own)
        elif not isinstance(policy, PackPolicy):
            raise PolicyError(
                f"policy: got {type(policy).__name__}, expected a PackPolicy; "
                "give its fields as options of their own, or build it with PackPolicy(...)"
            )
        elif own:
            raise PolicyError(
                f"options: got 'policy' and {', '.join(map(repr, own))}, expected one or the other; "
                "set the fields in the policy, e.g. with dataclasses.replace"
            )
        if mode is not None and inner_mode is not None and mode != inner_mode:
            raise PolicyError(f"mode: got {mode!r} and, in options, {inner_mode!r}, expected one; drop one of them")
        chosen = inner_mode if mode is None else mode
        return policy, {
            **mode_patches(chosen, dynamic),
            **inductor_patches(given, (*_field_names(cls), "policy")),
        }

    def layer(
        self,
        number: int | None,
        count: int | None,
        key_width: int,
        value_width: int,
        *,
        vision: bool = True,
        rotary: bool = True,
    ) -> LayerPlan:
        """What one attention layer packs, every rank a number.

        number, count: of this layer, from 0, and of decoder layers; None where the graph does not show them (then
            `layer_count` counts). Settings that are the same in every layer need neither.
        key_width, value_width: `H * D` of the cached keys and values, of the heads of this process. The number of
            tokens, which limits a rank too, is not known here.
        vision: whether there are vision tokens; without, nothing is asked of their ranks, and the plan has none.
        rotary: whether keys have a rotary embedding that is recognised; without, they are stored as they are attended.

        With `partial`, a block of vision columns ends wherever the columns of a group do (with `Energy`: of a group at
        the largest rank). The plan says `key_space="unrotated"` where the policy leaves it open. Raises `PolicyError`
        if a rank exceeds its width, or if a number is missing or contradicts the policy.
        """
        number, count = self._place(number, count)
        key_space: KeySpace = "unrotated"
        if not rotary:
            key_space = "rotated"
        elif self.key_space != "auto":
            key_space = self.key_space
        elif self.layers is not None:
            key_space = self._planned(number, count).key_space
        widths = key_width * self.processes, value_width * self.processes
        seen = self._stored("vision", number, count, widths, key_space) if vision else None
        text = self._stored("text", number, count, widths, key_space)
        if seen is not None and self.partial is not None:
            seen = Stored(
                _cut(seen.key, self.partial) if self.partial.keys else seen.key, _cut(seen.value, self.partial)
            )
        for method in acting(self.passes, Stage.FACTORS):
            seen, text = (None if stored is None else method.stored(stored) for stored in (seen, text))
        seen, text = (None if stored is None else stored.share(self.processes) for stored in (seen, text))
        return LayerPlan(seen, text, key_space)

    def skips(self, number: int | None, count: int | None) -> bool:
        """Whether a layer stays dense altogether, untouched by `passes` too; arguments as in `layer`."""
        return self._skipped(*self._place(number, count))

    @property
    def varies(self) -> bool:
        """Whether layers differ, so that their number and how many there are must be known."""
        schedules = [each for name in ("vision", "text") for each in parts(self._spec(name))]
        return bool(self.layers or self.skip_layers) or any(isinstance(each, (Linear, PerLayer)) for each in schedules)

    def basis(self, number: int | None, modality: Modality, kind: str) -> Tensor | None:
        """The model's basis `[1, H, R, D]` for `"key"`, `"unrotated key"` or `"value"` tensors of a layer, or None.

        Raises `PolicyError` where the file cannot be read or has no basis for the layer.
        """
        if self.bases in _BASES:
            return None
        return model_bases.load(self.bases, number, modality, kind)

    def lossless(self, modality: Modality) -> bool:
        """Whether keys and values of `modality` are both packed at rank `"full"`; False for a calibrated plan."""
        return self.layers is None and parts(self._spec(modality)) == ("full", "full")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-able values; `from_dict` is the inverse."""
        values = {name: getattr(self, name) for name in _field_names(type(self))}
        values.update(vision_rank=to_json(self.vision_rank), text_rank=to_json(self.text_rank))
        if self.partial is not None:
            values["partial"] = asdict(self.partial)
        if self.layers is not None:
            values["layers"] = [asdict(plan) for plan in self.layers]
        values["passes"] = [to_mapping(method) for method in self.passes]
        return {name: _with_lists(value) for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PackPolicy":
        """The policy with these fields, defaults elsewhere. Raises `ValueError` for an unknown field."""
        if not isinstance(values, Mapping):
            raise PolicyError(f"policy: got {type(values).__name__}, expected a mapping such as {{'vision_rank': 64}}")
        names = _field_names(cls)
        for key in values:
            if key not in names:
                raise PolicyError(unknown(key, names, names))
        if values.get("layers") is not None:
            values = {name: value for name, value in values.items() if (name, value) not in _FORMER_DEFAULTS.items()}
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to a JSON file, which `load` reads, without `processes`: another run has its own.

        Raises OSError if it cannot be written.
        """
        content = {"version": FILE_VERSION, "policy": replace(self, processes=1).to_dict()}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "PackPolicy":
        """The policy in a file that `save` wrote.

        Raises OSError if it cannot be read, and `PolicyError` if it is not JSON, holds no policy, comes from a newer
        version, or has a field that is unknown or wrong.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise PolicyError(
                f"{os.fspath(path)}: not a JSON file ({error}); expected one written by PackPolicy.save"
            ) from None
        try:
            return cls.from_dict(_checked_content(content))
        except PolicyError as error:
            raise PolicyError(f"{os.fspath(path)}: {error}") from None

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _spec(self, modality: str) -> RankSpec:
        if modality not in ("vision", "text"):
            raise PolicyError(f"modality: got {modality!r}, expected 'vision' or 'text'")
        return self.vision_rank if modality == "vision" else self.text_rank

    def _place(self, number: int | None, count: int | None) -> tuple[int | None, int | None]:
        """Layer number and number of layers, as far as they are known, once they are found to agree."""
        if count is None:
            count = self.layer_count
        elif self.layer_count is not None and count != self.layer_count:
            raise PolicyError(
                f"layer_count: got {self.layer_count}, but the model has {count} decoder layers; "
                "leave layer_count out, or give the right one"
            )
        if number is not None and count is not None and not 0 <= number < count:
            raise PolicyError(
                f"layer {number}: expected a number below {count}, the number of decoder layers; "
                "give the right layer_count, or leave it out"
            )
        return number, count

    def _stored(
        self, modality: Modality, number: int | None, count: int | None, widths: tuple[int, int], key_space: KeySpace
    ) -> Stored | None:
        if self.layers is not None:
            stored = self._planned(number, count).of(modality)
            return fitted(f"layers[{number}].{modality}", stored, *widths)
        if self._skipped(number, count):
            return None
        return resolve(modality, self._spec(modality), number, count, *widths, key_space)

    def _planned(self, number: int | None, count: int | None) -> LayerPlan:
        assert self.layers is not None
        number, count = known_place("layers", number, count)
        if len(self.layers) != count:
            raise PolicyError(
                f"layers: got a plan for {len(self.layers)} decoder layers, but this model has {count}; "
                "use a plan made for this model"
            )
        return self.layers[number]

    def _skipped(self, number: int | None, count: int | None) -> bool:
        if not self.skip_layers:
            return False
        if number is not None and count is None and self.skip_layers[0] >= 0:
            return number in self.skip_layers
        number, count = known_place("skip_layers", number, count)
        for skipped in self.skip_layers:
            if not -count <= skipped < count:
                raise PolicyError(
                    f"skip_layers: got {skipped}, but this model has {count} decoder layers; "
                    f"expected numbers from {-count} to {count - 1}"
                )
        return number in self.skip_layers or number - count in self.skip_layers


def _field_names(cls: type[PackPolicy]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


def _checked_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise PolicyError(
            f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}; "
            f"the default is {PackPolicy.__dataclass_fields__[name].default!r}"
        )


def _checked_skips(values: Any) -> tuple[int, ...]:
    """Layer numbers, each once and sorted, so that policies that skip the same layers are equal."""
    if not isinstance(values, (tuple, list)) or not all(
        isinstance(value, int) and not isinstance(value, bool) for value in values
    ):
        raise PolicyError(f"skip_layers: got {values!r}, expected layer numbers; e.g. (0, -1) for the first and last")
    return tuple(sorted(set(values)))


def _check_combinations(policy: PackPolicy) -> None:
    """Raise PolicyError for fields that contradict each other."""
    if policy.layers is not None:
        for name in ("vision_rank", "text_rank", "skip_layers"):
            value, default = getattr(policy, name), PackPolicy.__dataclass_fields__[name].default
            if value != default:
                raise PolicyError(
                    f"{name}: got {value!r} beside layers, expected its default, {default!r}: a calibrated plan says "
                    f"itself what every layer packs; drop {name} or layers"
                )
    _check_counts(policy)
    _check_fold(policy)
    _check_passes(policy)
    if policy.partial is not None and not _packed(policy, "vision"):
        raise PolicyError(
            "partial: got a Partial, expected None where vision tokens stay dense: there are no columns to leave out; "
            "give vision_rank, or layers that pack vision, or drop partial"
        )
    if policy.bases != "sample" and _has_energy(policy):
        raise PolicyError(
            f"bases: got {policy.bases!r} with an energy, expected 'sample': a share of energy gives each sample a "
            "rank of its own, and samples that share a basis share its rank; use fixed ranks or bases='sample'"
        )


def _check_passes(policy: PackPolicy) -> None:
    """Methods beside what else the policy says."""
    stages = {stage: method.name for method in policy.passes for stage in method.stages}
    factors, evicts = stages.get(Stage.FACTORS), stages.get(Stage.EVICT)
    if factors is not None:
        if not _packed(policy, "vision") and not _packed(policy, "text"):
            raise PolicyError(
                f"passes: got {factors} of coefficients or bases, expected another target where nothing is low rank; "
                "give vision_rank or text_rank, or target='tail'"
            )
        quantised = any(
            part.quantised
            for plan in policy.layers or ()
            for stored in (plan.vision, plan.text)
            if stored is not None
            for part in (stored.key, stored.value)
        )
        if quantised:
            raise PolicyError(f"passes: got {factors} beside layers that say in how many bits factors are; drop either")
    for stage in (Stage.FACTORS, Stage.EVICT, Stage.MERGE, Stage.ROWS):
        if policy.fold_every is not None and stage in stages:
            raise PolicyError(
                f"passes: got {stages[stage]} with fold_every, expected one of them: a fold takes the oldest dense "
                "tokens as they came, into text in the model's dtype; drop either"
            )
    if policy.partial is not None and evicts is not None:
        raise PolicyError(
            f"passes: got {evicts} with partial, expected one of them: both keep a number for every token, and sort "
            "tokens by it; drop either"
        )
    if Stage.SELECT in stages and Stage.ROWS in stages and not _packed(policy, "vision"):
        raise PolicyError(
            f"passes: got {stages[Stage.SELECT]} with {stages[Stage.ROWS]}, expected packed vision tokens, as tokens "
            "that are not read have no codes; give vision_rank"
        )
    if codes_unrotated(policy) and policy.key_space == "rotated":
        raise PolicyError(
            f"passes: got {stages[Stage.ROWS]} with key_space='rotated', expected 'auto' or 'unrotated': it codes keys "
            "before rotary embedding"
        )


def _check_counts(policy: PackPolicy) -> None:
    """All that has one entry per decoder layer has as many entries as there are layers."""
    counts = {} if policy.layer_count is None else {"layer_count": policy.layer_count}
    if policy.layers is not None:
        counts["layers"] = len(policy.layers)
    for name in ("vision_rank", "text_rank"):
        for role, spec in zip(("key", "value"), parts(getattr(policy, name)), strict=False):
            if isinstance(spec, PerLayer):
                counts[f"{name}, {role}"] = len(spec.ranks)
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{count} ({name})" for name, count in counts.items())
        raise PolicyError(f"number of decoder layers: got {got}, expected one number; give one entry per decoder layer")


def _check_fold(policy: PackPolicy) -> None:
    if policy.fold_every is None:
        if policy.max_fold_error is not None:
            raise PolicyError(
                f"max_fold_error: got {policy.max_fold_error!r} without fold_every, expected None: nothing is folded; "
                "set fold_every, or drop max_fold_error"
            )
        return
    if not _packed(policy, "text"):
        raise PolicyError(
            f"fold_every: got {policy.fold_every!r}, expected None where text stays dense: there is no packed text "
            "to fold into; give text_rank, or layers that pack text, or drop fold_every"
        )
    for number, plan in enumerate(policy.layers or ()):
        if plan.text is not None and (plan.text.key.quantised or plan.text.value.quantised):
            raise PolicyError(
                f"fold_every: got {policy.fold_every!r} with quantised text in layers[{number}], expected text blocks "
                "of 0 bits (the model's dtype): every fold would quantise what is quantised already; "
                "drop fold_every or plan unquantised text"
            )


def _packed(policy: PackPolicy, modality: Modality) -> bool:
    """Whether any layer packs tokens of `modality`."""
    if policy.layers is not None:
        return any(plan.of(modality) is not None for plan in policy.layers)
    return policy._spec(modality) is not None


def _has_energy(policy: PackPolicy) -> bool:
    specs = (*parts(policy.vision_rank), *parts(policy.text_rank))
    stored = [plan.of(name) for plan in policy.layers or () for name in ("vision", "text")]
    columns = [part for item in stored if item is not None for part in (item.key, item.value)]
    return any(isinstance(spec, Energy) for spec in specs) or any(part.energy is not None for part in columns)


def _checked_content(content: Any) -> Any:
    """The policy in the content of a file."""
    expected = f"{{'version': {FILE_VERSION}, 'policy': {{...}}}}, as PackPolicy.save writes it"
    if not isinstance(content, dict) or "version" not in content or "policy" not in content:
        raise PolicyError(f"not a policy file: expected {expected}")
    version = checked_int("version", content["version"], 1, f"expected {expected}")
    if version > FILE_VERSION:
        raise PolicyError(
            f"version: got {version}, expected at most {FILE_VERSION}: the file was written by a newer release; "
            "upgrade attnpack-fx, or save the policy again with this one"
        )
    return checked_keys("policy file", content, ("version", "policy"))["policy"]


def _cut(columns: Columns, partial: Partial) -> Columns:
    return columns.cut(partial.columns(columns.rank))


def _with_lists(value: Any) -> Any:
    """`value` with lists for tuples, as it would come back from JSON."""
    if isinstance(value, dict):
        return {key: _with_lists(inner) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        return [_with_lists(inner) for inner in value]
    return value
