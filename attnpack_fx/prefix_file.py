"""A cache in a safetensors file: tensors each once, and in its metadata how they are put together, and for which model.

Contents are plain containers whose tensors are numbers of tensors in the file: nothing in it is run when it is read.
"""

import hashlib
import json
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.containers import restored, saved, tensors_in
from attnpack_fx.held import Held
from attnpack_fx.packed_tensor import PackedTensor
from attnpack_fx.tail import exact

_FORMAT = "attnpack_fx prefix 2"
#: Of a configuration, what says nothing about what a model computes.
_ELSEWHERE = ("_name_or_path", "transformers_version", "architectures")
#: Numbers of every parameter that tell one set of weights from another.
_SAMPLED = 8


def save(path: str | os.PathLike[str], model: Any, cache: Any, contents: dict[str, Any]) -> None:
    """Write a cache of keys and values, and `contents` of tensors beside it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    hf.check_whole(model, "Prefix.save", "each process holds a part: keep the prefix in memory")
    written = _Written()
    layers = [_layer(number, layer) for number, layer in enumerate(hf.self_attention_layers(cache))]
    parts = written.plain({"layers": layers, "contents": contents})
    described = {"format": _FORMAT, "parts": json.dumps(parts)} | _origin(model)
    tensors = {str(number): each.contiguous() for number, each in enumerate(written.tensors)}
    try:
        save_file(tensors, path, described)
    except SafetensorError as error:
        raise OSError(f"{os.fspath(path)}: cannot be written: {error}") from error


def load(path: str | os.PathLike[str], model: Any) -> tuple[Any, dict[str, Any]]:
    """The cache and the contents beside it, on the model's device. Raises ValueError where they are not the model's."""
    from safetensors import SafetensorError, safe_open

    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a compiled transformers model behind the file")
    if os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)}: got a folder, expected a file that Prefix.save wrote")
    hf.check_whole(model, "load_prefix", "read the prefix again, with attnpack_fx.prefix")
    device = next(model.parameters()).device
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            described = file.metadata() or {}
            names = file.keys() if "parts" in described else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path}: got no safetensors file ({error}), expected one that Prefix.save wrote") from error
    if described.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: got {described.get('format', 'another kind of file')!r}, expected {_FORMAT!r}: read the prompt "
            "again with attnpack_fx.prefix, and save it"
        )
    for what, expected in _origin(model).items():
        if described[what] != expected:
            raise ValueError(
                f"{path}: got a prefix of another {what} ({_short(described[what])}), expected that of this model "
                f"({_short(expected)}): read the prompt again with attnpack_fx.prefix"
            )
    read = _whole(json.loads(described["parts"]), tensors)
    cache = hf.empty_cache(model)
    known: dict[Any, Any] = {}
    for layer, held in zip(cache.layers, read["layers"], strict=True):
        key, value = (_tensor(held[name], known) for name in ("keys", "values"))
        if key is not None:
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            vars(layer).update(held["numbers"])
    return cache, read["contents"]


def _layer(number: int, layer: Any) -> dict[str, Any]:
    """Keys and values, and the numbers a layer counts in."""
    from transformers.cache_utils import DynamicLayer

    if not isinstance(layer, DynamicLayer):
        raise ValueError(
            f"layer {number} of the cache: got {type(layer).__name__}, expected one that holds keys and values alone; "
            "this prefix can be forked, but not saved"
        )
    numbers = {name: each for name, each in vars(layer).items() if type(each) in (int, bool)}
    return {"keys": _plain(layer.keys), "values": _plain(layer.values), "numbers": numbers}


def _plain(tensor: Any) -> Any:
    if not isinstance(tensor, PackedTensor):
        return tensor
    rows = tensor.lease.buffer.rows[: tensor.lease.length]
    return {"held": saved(tensor.held), "rows": rows, "importance": tensor.importance}


def _tensor(read: Any, known: dict[Any, Any]) -> Any:
    """Keys or values; `known`: placements and angles by their tensors, which layers share as they did."""
    if not isinstance(read, dict):
        return read
    held: Held = restored(read["held"])
    placement = known.setdefault(_identity(held.placement), held.placement)
    angles = held.angles and known.setdefault(_identity(held.angles), held.angles)
    return PackedTensor(replace(held, placement=placement, angles=angles), exact(read["rows"]), read["importance"])


def _identity(container: Any) -> tuple[int, ...]:
    """Of the tensors of a container."""
    return tuple(map(id, tensors_in(container)))


class _Written:
    """Tensors in order, each once however often it is held."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def plain(self, value: Any) -> Any:
        """`value` with tensors by number, as JSON takes it."""
        if isinstance(value, Tensor):
            number = self._numbers.setdefault(id(value), len(self.tensors))
            if number == len(self.tensors):
                self.tensors.append(value)
            return {"tensor": number}
        if isinstance(value, dict):
            return {"dict": {name: self.plain(each) for name, each in value.items()}}
        if isinstance(value, list | tuple):
            return [self.plain(each) for each in value]
        return value


def _whole(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[str(value["tensor"])]
        return {name: _whole(each, tensors) for name, each in value["dict"].items()}
    return tuple(_whole(each, tensors) for each in value) if isinstance(value, list) else value


def _origin(model: Any) -> dict[str, str]:
    """What a cache is of: the model's configuration, its weights, and the policy it was compiled with."""
    config = {name: each for name, each in model.config.to_dict().items() if name not in _ELSEWHERE}
    weights = hashlib.sha256()
    for name, each in model.named_parameters():
        few = each.detach().flatten()[:: max(1, each.numel() // _SAMPLED)].double().cpu()
        weights.update(name.encode() + few.numpy().tobytes())
    policy = getattr(model._compiled_call_impl, "policy", None)
    if policy is None:
        raise ValueError(
            f"model: got a {type(model).__name__} whose policy is not known, expected one that attnpack_fx.compile "
            "compiled: a prefix in a file is of a policy"
        )
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "configuration": hashlib.sha256(text.encode()).hexdigest(),
        "weights": weights.hexdigest(),
        "policy": repr(policy),
    }


def _short(text: str) -> str:
    return text if len(text) < 200 else f"{text[:197]}..."
