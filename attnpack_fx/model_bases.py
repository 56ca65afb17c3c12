"""Bases calibrated once for a model: a file of one `[1, H, R, D]` tensor per layer, modality and kind.

Samples then hold coefficients alone, and packing is a projection instead of a singular value decomposition.
"""

import functools
import os

from torch import Tensor

from attnpack_fx.checks import PolicyError

KINDS = ("key", "unrotated key", "value")


def save(path: str | os.PathLike[str], bases: dict[tuple[int, str, str], Tensor]) -> None:
    """Write bases by layer number, modality and kind."""
    from safetensors.torch import save_file

    save_file({_name(*place): basis.contiguous() for place, basis in bases.items()}, path)


def load(path: str, number: int | None, modality: str, kind: str) -> Tensor:
    """The basis of one layer, as it is in the file; read once while the file stays the same."""
    if number is None:
        raise PolicyError(
            f"bases: {path} has a basis for each layer, but the number of this layer is not known from the graph; "
            "use bases='batch' or bases='sample'"
        )
    try:
        bases = _read(path, os.stat(path).st_mtime_ns)
    except (OSError, ValueError) as error:
        raise PolicyError(f"bases: cannot read {path}: {error}; write it with attnpack_fx.calibrate_bases") from error
    name = _name(number, modality, kind)
    if name not in bases:
        raise PolicyError(
            f"bases: got {path}, which has no basis for {name!r}, only {', '.join(sorted(bases)[:6])}, ...; "
            "calibrate it for this model, these modalities and this key_space"
        )
    return bases[name]


@functools.lru_cache(maxsize=8)
def _read(path: str, modified: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _name(number: int, modality: str, kind: str) -> str:
    return f"{number}.{modality}.{kind}"
