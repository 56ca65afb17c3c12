"""Ranks: one number, or a schedule over the decoder layers, and what they come to in one layer.

Schedules follow AttentionPack (CVPR 2026, arXiv 2603.23914), which compares uniform ranks with ranks linear in the
layer and with ranks chosen by a share of the variance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from attnpack_fx.checks import PolicyError, checked_int, checked_keys, is_number
from attnpack_fx.passes.storage import Columns, KeySpace, Stored

#: A number of columns, or `"full"` for as many as the matrix has.
Rank = int | Literal["full"]
Modality = Literal["vision", "text"]

#: AttentionPack's rank. Of vision tokens it is clipped where `H * D` is less.
PUBLISHED = 64
#: Of keys before rotary embedding: so many columns keep more of them than `PUBLISHED` keep of rotated ones, on all
#: trained models (`benchmarks/default.py`); 16 do so with multi-head attention alone.
UNROTATED = 32

_EXPECTED = (
    "an int >= 1, 'full' (lossless), Linear, PerLayer or Energy, a (key, value) pair of such ranks, "
    "or None (leave dense)"
)


@dataclass(frozen=True)
class Linear:
    """A rank linear in the layer number: `first` in the first decoder layer, `last` in the last.

    In between it is rounded to the nearest int, halves up; a model of one layer has `first`. Both are ints >= 1. In
    JSON: `{"linear": [16, 128]}`. AttentionPack reports 16 to 128.
    """

    first: int
    last: int

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            checked_int(f"Linear.{name}", getattr(self, name), 1, "e.g. Linear(16, 128)")

    def at(self, number: int, count: int) -> int:
        """The rank of layer `number` of `count`."""
        if count == 1:
            return self.first
        steps = count - 1
        return (2 * (self.first * steps + (self.last - self.first) * number) + steps) // (2 * steps)


@dataclass(frozen=True)
class PerLayer:
    """One rank for each decoder layer, first to last: ints >= 1 or `"full"`. In JSON: `{"per_layer": [64, "full"]}`."""

    ranks: tuple[Rank, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, (tuple, list)) or not self.ranks:
            raise PolicyError(f"PerLayer: got {self.ranks!r}, expected one rank per layer; e.g. PerLayer((64, 32))")
        for number, rank in enumerate(self.ranks):
            if not (isinstance(rank, str) and rank == "full"):
                way_out = "or 'full'; to leave a layer dense name it in skip_layers"
                checked_int(f"PerLayer, layer {number}", rank, 1, way_out)
        object.__setattr__(self, "ranks", tuple(self.ranks))

    def at(self, number: int, count: int) -> Rank:
        """The rank of layer `number` of `count`. Raises PolicyError if there are not `count` ranks."""
        if len(self.ranks) != count:
            raise PolicyError(
                f"PerLayer: got {len(self.ranks)} ranks, expected {count}, one per decoder layer of this model; "
                "give as many as there are layers"
            )
        return self.ranks[number]


@dataclass(frozen=True)
class Energy:
    """The smallest rank that keeps a share of the squared Frobenius norm, found from the data at prefill.

    threshold: that share, in (0, 1]. at_most: the largest rank taken, an int >= 1; clipped to the width of the matrix.
    In JSON: `{"energy": 0.99, "at_most": 128}`. AttentionPack tried such a rule and found it about 0.3 points worse
    than uniform ranks of the same size.
    """

    threshold: float
    at_most: int = 128

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or not 0 < self.threshold <= 1:
            raise PolicyError(
                f"Energy.threshold: got {self.threshold!r}, expected a share in (0, 1]; e.g. Energy(0.99)"
            )
        object.__setattr__(self, "threshold", float(self.threshold))
        checked_int("Energy.at_most", self.at_most, 1, "e.g. Energy(0.99, at_most=128)")


#: The rank of keys, or of values: the same in every layer, or a schedule.
Spec = Rank | Linear | PerLayer | Energy
#: A spec for keys and values alike, a `(key, value)` pair of specs, `"auto"`, or `None` for "leave dense".
RankSpec = Spec | tuple[Spec, Spec] | Literal["auto"] | None


def checked_rank(name: str, spec: Any) -> RankSpec:
    """`spec` with a pair as a tuple and JSON forms as schedules; a list is a pair too: JSON makes one of a tuple."""
    if spec is None:
        return None
    if name == "vision_rank" and isinstance(spec, str) and spec == "auto":
        return "auto"
    if isinstance(spec, (tuple, list)):
        if len(spec) != 2:
            raise PolicyError(
                f"{name}: got {spec!r}, expected {_EXPECTED}; a pair is (key rank, value rank), "
                "and ranks of single layers are PerLayer((...))"
            )
        if any(rank is None for rank in spec):
            raise PolicyError(
                f"{name}: got {spec!r}, expected {_EXPECTED}; keys and values of one token are packed "
                f"together or not at all, so use {name}=None to leave both dense, or 'full' for the exact one"
            )
        return _checked_single(name, spec[0], spec), _checked_single(name, spec[1], spec)
    return _checked_single(name, spec, spec)


def _checked_single(name: str, rank: Any, spec: Any) -> Spec:
    if isinstance(rank, (Linear, PerLayer, Energy)):
        return rank
    if isinstance(rank, Mapping) and rank:
        return _from_mapping(name, rank)
    # bool is an int to Python, but vision_rank=True never means rank 1.
    if isinstance(rank, int) and not isinstance(rank, bool):
        if rank >= 1:
            return rank
        raise PolicyError(f"{name}: got {spec!r}, expected {_EXPECTED}; use None to leave these tokens dense")
    if isinstance(rank, str) and rank == "full":
        return "full"
    raise PolicyError(f"{name}: got {spec!r} ({type(rank).__name__}), expected {_EXPECTED}; e.g. {name}=64")


def _from_mapping(name: str, form: Mapping[Any, Any]) -> Spec:
    try:
        if "linear" in form:
            ends = checked_keys("a linear rank", form, ("linear",))["linear"]
            if not isinstance(ends, (tuple, list)) or len(ends) != 2:
                raise PolicyError(f"linear: got {ends!r}, expected [first, last]; e.g. {{'linear': [16, 128]}}")
            return Linear(*ends)
        if "per_layer" in form:
            return PerLayer(checked_keys("a rank per layer", form, ("per_layer",))["per_layer"])
        values = checked_keys("a rank", form, ("energy", "at_most", "linear", "per_layer"), required=("energy",))
        return Energy(values.pop("energy"), **values)
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}") from None


def to_json(spec: RankSpec) -> Any:
    """`spec` as JSON has it: pairs as lists, schedules as mappings. `checked_rank` reads it back."""
    match spec:
        case (key, value):
            return [to_json(key), to_json(value)]
        case Linear(first, last):
            return {"linear": [first, last]}
        case PerLayer(ranks):
            return {"per_layer": list(ranks)}
        case Energy(threshold, at_most):
            return {"energy": threshold, "at_most": at_most}
    return spec


def parts(spec: RankSpec, key_space: KeySpace = "unrotated") -> tuple[Spec, ...]:
    """The key's spec and the value's, or none of them for tokens left dense. key_space: where `"auto"` is packed."""
    if spec is None:
        return ()
    if spec == "auto":
        return (UNROTATED if key_space == "unrotated" else PUBLISHED), PUBLISHED
    return spec if isinstance(spec, tuple) else (spec, spec)


def known_place(name: str, number: int | None, count: int | None) -> tuple[int, int]:
    """Layer number and number of layers, for an option that needs both. Raises PolicyError where one is unknown."""
    if number is None:
        raise PolicyError(
            f"{name} depends on the layer, but this graph does not show which layers it has: behind a graph break, or "
            "where layers are compiled one by one; use a setting that is the same in every layer"
        )
    if count is None:
        raise PolicyError(
            f"{name} needs the number of decoder layers, which this graph does not show: "
            "a graph break may hide the other layers; use attnpack_fx.compile, which knows the model, "
            "or pass layer_count"
        )
    return number, count


def resolve(
    modality: Modality,
    spec: RankSpec,
    number: int | None,
    count: int | None,
    key_width: int,
    value_width: int,
    key_space: KeySpace = "unrotated",
) -> Stored | None:
    """How `spec` stores tokens of `modality` in layer `number` of `count`, or None if they stay dense.

    key_width, value_width: `H * D` of the cached keys and values. Raises PolicyError if a rank exceeds its width
    (`"auto"`, and a vision rank of `PUBLISHED`, are clipped), or if a schedule needs a number that is None.
    """
    if spec is None:
        return None
    key, value = parts(spec, key_space)
    name, clip = f"{modality}_rank", modality == "vision" and spec in ("auto", PUBLISHED)
    return Stored(
        _columns(name, "key", key, number, count, key_width, clip),
        _columns(name, "value", value, number, count, value_width, clip),
    )


def _columns(
    name: str, role: str, spec: Spec, number: int | None, count: int | None, width: int, clip: bool
) -> Columns:
    if isinstance(spec, Energy):
        return Columns(((min(spec.at_most, width), 0),), energy=spec.threshold)
    if isinstance(spec, (Linear, PerLayer)):
        place = known_place(f"{name}={type(spec).__name__}(...)", number, count)
        try:
            rank = spec.at(*place)
        except PolicyError as error:
            raise PolicyError(f"{name}: {error}") from None
    else:
        rank = spec
    if rank == "full" or (clip and rank > width):
        rank = width
    if rank > width:
        owner = "this model" if number is None else f"layer {number}"
        raise PolicyError(
            f"{name}={rank} exceeds H * D = {width}, the largest rank a {role} of {owner} has; "
            f"use a rank <= {width} or 'full'"
        )
    return Columns(((rank, 0),))
