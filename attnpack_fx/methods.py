"""The methods of a policy as plain data, and whether they may stand together."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from attnpack_fx.checks import PolicyError, checked_keys, hint
from attnpack_fx.passes.catalogue import METHODS
from attnpack_fx.passes.method import Method, conflicts

_NAMES = {method.__name__: method for method in METHODS}


def checked_methods(values: Any) -> tuple[Method, ...]:
    """`values` as methods, each one itself or a mapping with its name under `"method"`; raises PolicyError."""
    if isinstance(values, Method):
        values = (values,)
    if not isinstance(values, (tuple, list)):
        raise PolicyError(
            f"passes: got {values!r}, expected methods in a tuple; e.g. (H2O(budget=0.5), Quantize(bits=4))"
        )
    methods = tuple(_method(value, number) for number, value in enumerate(values))
    reason = conflicts(methods)
    if reason is not None:
        raise PolicyError(f"passes: {reason}")
    return methods


def to_mapping(method: Method) -> dict[str, Any]:
    """A method as `checked_methods` reads it."""
    return {"method": method.name} | {field.name: getattr(method, field.name) for field in fields(method)}


def _method(value: Any, number: int) -> Method:
    if isinstance(value, Method):
        return value
    if isinstance(value, type) and issubclass(value, Method):
        raise PolicyError(f"passes[{number}]: got the class {value.__name__}, expected one of it: {value.__name__}()")
    known = ", ".join(_NAMES)
    if not isinstance(value, Mapping) or "method" not in value:
        raise PolicyError(
            f"passes[{number}]: got {value!r}, expected a method or a mapping with its name and fields, such as "
            f"{{'method': 'H2O', 'budget': 0.5}}; there are {known}"
        )
    got = value["method"]
    kind = _NAMES.get(got)
    if kind is None:
        raise PolicyError(
            f"passes[{number}]: got the method {got!r}, expected one of {known}{hint(got, tuple(_NAMES))}"
        )
    names = tuple(field.name for field in fields(kind))
    given = checked_keys(f"passes[{number}]", {key: item for key, item in value.items() if key != "method"}, names)
    try:
        return kind(**given)
    except ValueError as error:
        raise PolicyError(f"passes[{number}]: {error}") from None
