"""Checks of a model's folder by its files alone, and what config.json tells of its cache."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from attnpack_cli.errors import UserError
from attnpack_cli.files import read_json

#: Where the trained model lies in a checkout of the repository.
TRAINED = Path("benchmarks", "assets", "digits-llava")

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
#: Of which a tokenizer has at least one.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
#: An id of the Hugging Face hub: a name, or owner/name.
_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
#: Words in keys of config.json that stand for something else than text.
_SEES = ("vision", "visual", "image", "patch", "vq_")
#: Whose presence means that keys and values are not as wide as the heads say, or not in all layers.
_OTHER_WIDTHS = ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "global_head_dim", "num_global_key_value_heads")
_CLIPPED = 64


def trained_model() -> Path:
    """The folder of the trained model, in the checkout this package runs from or in the working directory.

    Raises `UserError` when it is in neither.
    """
    places = [root / TRAINED for root in (Path(__file__).resolve().parents[1], Path.cwd())]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise UserError(
        "the trained model of the demo is not installed with the package; looked in "
        f"{' and in '.join(map(str, places))}. Run from a clone of the repository, or use a model of yours: "
        "attnpack demo --model ID_OR_PATH --image FILE --prompt TEXT"
    )


def check_model(name: str, images: Sequence[str], ranks: Mapping[str, Any], way_out: str = "leave --image out") -> None:
    """Raise `UserError` for what is no model, for images it cannot see and ranks it cannot have, as far as files tell.

    images: files; ranks: as `arguments.ranks_of` gives them; way_out: for images that it cannot see. A
    model of the hub is looked for only where the hub is not to be asked.
    """
    place = Path(name).expanduser()
    if place.is_dir():
        config = _config(place, bool(images))
        if images and _reads_only(config):
            raise UserError(f"{name} takes text only: {way_out}")
        check_ranks(config, ranks)
    elif place.exists():
        raise UserError(f"{name}: is a file; expected the folder of a model, or an id of the hub")
    elif not _ID.fullmatch(name) or len(name) > 96:
        raise UserError(
            f"{name}: no such folder; expected the folder of a model, or an id of the hub such as owner/name"
        )
    elif _offline() and not (_hub() / f"models--{name.replace('/', '--')}").is_dir():
        raise UserError(
            f"{name}: neither a folder nor in the cache of the hub, {_hub()}, and HF_HUB_OFFLINE is set; "
            "expected the folder of a model, or unset HF_HUB_OFFLINE to download it"
        )


def check_ranks(config: Mapping[str, Any], ranks: Mapping[str, Any]) -> None:
    """Raise `UserError` for a rank above the width of keys and values that a configuration states, if it does."""
    width = cache_width(config)
    if width is None:
        return
    for name, spec in ranks.items():
        flag = f"--{name.replace('_', '-')}"
        for rank in spec if isinstance(spec, tuple) else (spec,):
            # The default rank is clipped where it is given for keys and values of vision tokens alike.
            clipped = name == "vision_rank" and spec == _CLIPPED
            if isinstance(rank, int) and rank > width and not clipped:
                raise UserError(
                    f"{flag} {_shown(spec)}: {name}={rank} exceeds H * D = {width}, the width of this model's keys and "
                    f"values; expected a rank from 1 to {width}, or 'full'"
                )


def cache_width(config: Mapping[str, Any]) -> int | None:
    """KV heads times head size by config.json, or more; None where it does not say.

    It says nothing of what its class has by default, but for values that stand beside `model_type` at the top.
    """
    inner = config.get("text_config")
    stated = inner if isinstance(inner, Mapping) else config
    heads, size = stated.get("num_attention_heads"), stated.get("head_dim")
    if size is None and stated is config and _count(hidden := config.get("hidden_size")) and _count(heads):
        size = hidden // heads
    # Heads of queries, of which there are no fewer, where those of keys and values are not stated.
    heads = stated.get("num_key_value_heads") or heads
    if any(name in stated for name in _OTHER_WIDTHS) or not _count(heads) or not _count(size):
        return None
    return heads * size


def _config(place: Path, pictures: bool) -> dict[str, Any]:
    """What is in config.json. Raises `UserError` that names all files which are missing."""
    missing = [] if (place / "config.json").is_file() else ["config.json"]
    missing += _missing_weights(place)
    for what, names in (("a tokenizer", _TOKENIZER), *([("a processor", _PROCESSOR)] if pictures else [])):
        if not any((place / name).is_file() for name in names):
            missing.append(f"{what} ({' or '.join(names[:2])})")
    if missing:
        raise UserError(
            f"cannot load the model {str(place)!r}: missing {', '.join(missing)}; expected a folder that "
            "save_pretrained of the model and of its processor or tokenizer wrote"
        )
    config = read_json("the model's", place / "config.json", "a model's configuration, as save_pretrained writes it")
    if not isinstance(config, dict):
        raise UserError(
            f"{place / 'config.json'}: got {type(config).__name__}, expected a mapping; save the model again"
        )
    return config


def _missing_weights(place: Path) -> list[str]:
    """Names of files of weights that are not there, or hold no more than where Git LFS has them."""
    found = next((place / name for name in _WEIGHTS if (place / name).is_file()), None)
    if found is None:
        return [f"weights ({' or '.join(_WEIGHTS[:2])})"]
    files = [found]
    if found.suffix == ".json":
        index = read_json("the model's", found, "an index of files of weights, as save_pretrained writes it")
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict):
            raise UserError(f"{found}: has no weight_map; expected an index as save_pretrained writes it, save again")
        files = [place / name for name in sorted(set(map(str, shards.values())))]
    return list(_not_there(files))


def _not_there(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        if not file.is_file():
            yield file.name
        elif file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            yield f"{file.name} (a pointer of Git LFS is in its place: git lfs pull)"


def _reads_only(config: Mapping[str, Any]) -> bool:
    """Whether nothing in the configuration hints at images."""
    return not any(word in key for key in config for word in _SEES)


def _offline() -> bool:
    asked = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value in ("1", "ON", "YES", "TRUE") for value in asked)


def _hub() -> Path:
    """Where models of the hub are kept, as huggingface_hub finds it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{caches}/huggingface").expanduser() / "hub"


def _count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shown(spec: Any) -> str:
    return ",".join(map(str, spec)) if isinstance(spec, tuple) else str(spec)
