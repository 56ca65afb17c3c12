"""What a step takes and returns, tensor by tensor, and whether given tensors are that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Names of dtypes in a manifest.
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int8": torch.int8,
    "uint8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ArtefactError(ValueError):
    """An artefact that cannot be trusted or is not understood, or tensors that do not fit it. Nothing was run."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name, dtype, and sizes, each a number or the name of a dimension; `a + b` is a sum of two."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    @property
    def dims(self) -> set[str]:
        """The names of its dimensions."""
        return {name for size in self.shape if isinstance(size, str) for name in terms(size)}

    def resolved(self, sizes: Mapping[str, int]) -> list[int]:
        """Its shape, by the sizes of dimensions."""
        return [size if isinstance(size, int) else sum(sizes[name] for name in terms(size)) for size in self.shape]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": _NAMES[self.dtype], "shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: Any) -> "TensorSpec":
        """Raises `ArtefactError` for anything that `to_json` does not write."""
        try:
            name, dtype, shape = value["name"], DTYPES[value["dtype"]], value["shape"]
        except (TypeError, KeyError) as error:
            raise ArtefactError(f"manifest: got {value!r}, expected a tensor's name, dtype and shape") from error
        if not isinstance(name, str) or not isinstance(shape, list) or not all(_is_size(size) for size in shape):
            raise ArtefactError(
                f"manifest: got {value!r}, expected a name, and sizes that are numbers or names of dimensions"
            )
        return cls(name, dtype, tuple(shape))


@dataclass(frozen=True)
class Range:
    """The sizes that a dimension may have."""

    least: int
    most: int


def terms(size: str) -> list[str]:
    """The names of the dimensions whose sum a size is."""
    return [name.strip() for name in size.split("+")]


def check(
    step: str,
    specs: Sequence[TensorSpec],
    given: Mapping[str, Tensor],
    dims: Mapping[str, Range],
    known: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The sizes of the dimensions, once every tensor is found to have the name, dtype and shape that `specs` say.

    dims: what sizes are allowed; known: those of other tensors of the step. Raises `ArtefactError` that names the
    tensor, what it is and what was expected.
    """
    expected = {spec.name for spec in specs}
    missing, unknown = expected - given.keys(), given.keys() - expected
    if missing or unknown:
        both = (missing, "missing"), (unknown, "unknown")
        told = [f"{len(names)} {word} ({_some(names)})" for names, word in both if names]
        raise ArtefactError(f"{step}: got {' and '.join(told)} tensors, expected exactly those of the manifest")
    sizes = dict(known or {})
    for spec in specs:
        tensor = given[spec.name]
        if not isinstance(tensor, Tensor):
            raise ArtefactError(f"{step}: {spec.name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype != spec.dtype or tensor.dim() != len(spec.shape):
            raise ArtefactError(
                f"{step}: {spec.name}: got {_told(tensor)}, expected {_NAMES[spec.dtype]} {_shape(spec.shape)}"
            )
        for expected_size, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(expected_size, str) and "+" in expected_size:
                continue
            wanted = expected_size if isinstance(expected_size, int) else sizes.setdefault(expected_size, size)
            if size != wanted:
                raise _unlike(step, spec, tensor, f"{expected_size} = {wanted}, as in the tensors before it")
    for spec in specs:
        tensor = given[spec.name]
        for expected_size, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(expected_size, str) and "+" in expected_size:
                if unknown := set(terms(expected_size)) - sizes.keys():
                    raise ArtefactError(
                        f"{step}: {spec.name}: got a size for {expected_size} without tensors that have "
                        f"{_some(unknown)}; give them together"
                    )
                wanted = sum(sizes[name] for name in terms(expected_size))
                if size != wanted:
                    raise _unlike(step, spec, tensor, f"{expected_size} = {wanted}")
    for name, size in sizes.items():
        allowed = dims.get(name)
        if allowed is not None and not allowed.least <= size <= allowed.most:
            raise ArtefactError(
                f"{step}: {name}: got {size}, expected {allowed.least} to {allowed.most}; "
                "export again with another range (the option `dims`) for more"
            )
    return sizes


def _unlike(step: str, spec: TensorSpec, tensor: Tensor, more: str) -> ArtefactError:
    return ArtefactError(
        f"{step}: {spec.name}: got {_told(tensor)}, expected {_NAMES[spec.dtype]} {_shape(spec.shape)} with {more}"
    )


def _is_size(size: Any) -> bool:
    if isinstance(size, str):
        return all(name.isidentifier() for name in terms(size))
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0


def _told(tensor: Tensor) -> str:
    return f"{_NAMES.get(tensor.dtype, str(tensor.dtype))} {_shape(tensor.shape)}"


def _shape(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")
