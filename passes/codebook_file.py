"""KVQuant's calibration in a file: of every layer a codebook for keys and values, thresholds of every key channel."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

_FIX = "write it for this model with attnpack_fx.calibration.codebooks.calibrate_codebooks"


@dataclass(frozen=True)
class Codebooks:
    """Of one layer, all fp32.

    key, value: levels `[2^bits]` on [-1, 1], ascending. low, high: `[H, D]`, what of each key channel these ends stand
        for, keys being those before rotary embedding where it is recognised.
    """

    key: Tensor
    value: Tensor
    low: Tensor
    high: Tensor


def save(path: str | os.PathLike[str], layers: Mapping[int, Codebooks]) -> None:
    """Write the codebooks of layers by number, as safetensors."""
    from safetensors.torch import save_file

    tensors = {f"{number}.{name}": tensor for number, own in layers.items() for name, tensor in vars(own).items()}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)


def load(path: str, number: int | None) -> Codebooks:
    """The codebooks of one layer, on the CPU; the file is read once while it stays the same. Raises `ValueError`."""
    layers = read(path)
    if number is None:
        raise ValueError(
            f"codebooks: {path} has codebooks for each layer, but the number of this layer is not known from the "
            "graph; use codebooks=None"
        )
    if number not in layers:
        raise ValueError(f"codebooks: got {path}, which has layers {sorted(layers)} and not {number}; {_FIX}")
    return layers[number]


def read(path: str) -> dict[int, Codebooks]:
    """The codebooks of all layers. Raises `ValueError` for what is no such file."""
    try:
        return _read(path, os.stat(path).st_mtime_ns)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"codebooks: cannot read {path}: {error}; {_FIX}") from error


@functools.lru_cache(maxsize=8)
def _read(path: str, modified: int) -> dict[int, Codebooks]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    numbers = sorted({int(name.split(".")[0]) for name in tensors})
    names = Codebooks.__dataclass_fields__
    return {number: Codebooks(**{name: tensors[f"{number}.{name}"] for name in names}) for number in numbers}
