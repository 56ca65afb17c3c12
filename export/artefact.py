"""What all targets write alike: a new folder, the host's facts about the model, its processor, the manifest."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnpack_fx.export import manifest
from attnpack_fx.export.manifest import Manifest, StepFiles
from attnpack_fx.export.program import Programs
from attnpack_fx.export.steps import VisionStep

#: Where the processor or tokenizer lies in an artefact, for hosts that have transformers.
PROCESSOR = "processor"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `path` when all is written, and vanishes when something fails.

    Raises FileExistsError where `path` is something else than an empty folder or an artefact, which is replaced.
    """
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / manifest.NAME).is_file())):
        raise FileExistsError(f"{path}: is there already, and no artefact; choose another place, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        scratch.chmod(0o755)
        yield scratch
        if path.exists():
            shutil.rmtree(path)
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def finish(
    folder: Path,
    target: str,
    programs: Programs,
    files: dict[str, str],
    device: str,
    processor: Any,
    *packages: str,
    more: Mapping[str, str] | None = None,
) -> None:
    """Write the processor, and the manifest of all that is in the folder; files: of every step, by its name.

    packages, more: whose versions the manifest gets, and versions of what no package is.
    """
    if processor is not None:
        processor.save_pretrained(folder / PROCESSOR)
    steps = {
        each.step.name: StepFiles(files[each.step.name], tuple(each.step.inputs), tuple(each.step.outputs), each.ranges)
        for each in programs.steps
    }
    made = {**manifest.versions(*packages), **(more or {})}
    manifest.write(folder, Manifest(target, steps, programs.policy, facts(programs), device, made))


def facts(programs: Programs) -> dict[str, Any]:
    """What a host has to know about the model."""
    parts = programs.parts
    config: Any = parts.model.config
    text, generation = config.get_text_config(decoder=True), getattr(parts.model, "generation_config", None)

    def token(name: str) -> Any:
        for source in (generation, text, config):
            found = getattr(source, name, None)
            if found is not None:
                return found
        return None

    ends = token("eos_token_id")
    vision = next((each.step for each in programs.steps if isinstance(each.step, VisionStep)), None)
    return {
        "type": config.model_type,
        "decoder": text.model_type,
        "layers": parts.layers,
        "heads": parts.heads,
        "kv_heads": parts.kv_heads,
        "head_dim": parts.head_dim,
        "hidden": parts.hidden,
        "axes": parts.axes,
        "deepstack": parts.deepstack,
        "merge": getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1),
        "image_tokens": list(parts.image_tokens),
        "images": {} if vision is None else {name: given.tolist() for name, given in vision.fixed.items()},
        "dtype": str(parts.dtype).removeprefix("torch."),
        "vocabulary": parts.vocabulary,
        "context": getattr(text, "max_position_embeddings", None),
        "bos": token("bos_token_id"),
        "eos": [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends],
        "pad": token("pad_token_id"),
    }
