"""Calibrated plans: the storage of every decoder layer, as data that can be written, read and fitted to a model."""

from dataclasses import fields
from typing import Any

from attnpack_fx.checks import PolicyError, checked_keys
from attnpack_fx.passes.storage import Columns, LayerPlan, Stored

#: The parts that are mappings in their turn, and what each of them is.
_INNER: dict[type, dict[str, type]] = {
    LayerPlan: {"vision": Stored, "text": Stored},
    Stored: {"key": Columns, "value": Columns},
}

#: The parts that may be left out.
_OPTIONAL = ("energy", "asymmetric")


def checked_layers(values: Any) -> tuple[LayerPlan, ...] | None:
    """`values` as one `LayerPlan` for each layer: those, mappings with their fields (as JSON has them), or None."""
    if values is None:
        return None
    if not isinstance(values, (tuple, list)) or not values:
        raise PolicyError(f"layers: got {values!r}, expected one LayerPlan per decoder layer, or None for no plan")
    return tuple(_built(f"layers[{number}]", LayerPlan, value) for number, value in enumerate(values))


def fitted(name: str, stored: Stored | None, key_width: int, value_width: int) -> Stored | None:
    """`stored` with `"full"` as a number. Raises PolicyError if a rank exceeds the width it belongs to."""
    if stored is None:
        return None
    return Stored(
        _within(f"{name}.key", stored.key, key_width),
        _within(f"{name}.value", stored.value, value_width),
    )


def _within(name: str, columns: Columns, width: int) -> Columns:
    try:
        return columns.within(width)
    except ValueError as error:
        raise PolicyError(f"{name}: {error}; was this plan made for another model?") from None


def _built(name: str, kind: type, value: Any) -> Any:
    """`value` as a `kind`, whose parts may be mappings in their turn; names in errors are paths such as
    `layers[3].vision.key`."""
    if isinstance(value, kind):
        return value
    names = tuple(field.name for field in fields(kind))
    values = checked_keys(name, value, names, required=tuple(part for part in names if part not in _OPTIONAL))
    for part, inner in _INNER.get(kind, {}).items():
        if values[part] is not None:
            values[part] = _built(f"{name}.{part}", inner, values[part])
    try:
        return kind(**values)
    except ValueError as error:
        raise PolicyError(f"{name}: {error}") from None
