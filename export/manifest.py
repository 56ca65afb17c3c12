"""manifest.json: an artefact's files, what its steps take and return, how it was made; written and verified."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from attnpack_fx.export import weights
from attnpack_fx.export.signature import ArtefactError, Range, TensorSpec
from attnpack_fx.policy import PackPolicy

#: The version of the format that this library writes, and the newest that it reads.
FORMAT = 1
NAME = "manifest.json"
TARGETS = ("onnx", "tensorrt", "aoti")
DEVICES = ("any", "cpu", "cuda")
_KIND = "attnpack-fx artefact"


@dataclass(frozen=True)
class StepFiles:
    """One step: its file within the artefact, what it takes and returns, and what sizes dimensions may have."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: dict[str, Range]


@dataclass(frozen=True)
class Manifest:
    """What an artefact is.

    target: one of `TARGETS`. steps: by name. policy: what it packs. model: what the host has to know about the model:
    sizes, dtype, tokens (`artefact.facts`).
    device: of an artefact that runs on one kind alone, `"cpu"` or `"cuda"`, else `"any"`.
    versions: of the libraries that made it.
    """

    target: str
    steps: dict[str, StepFiles]
    policy: PackPolicy
    model: dict[str, Any]
    device: str
    versions: dict[str, str]


def write(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json, with size and SHA-256 of every other file in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    content = {
        "kind": _KIND,
        "format": FORMAT,
        "target": manifest.target,
        "device": manifest.device,
        "policy": manifest.policy.to_dict(),
        "model": manifest.model,
        "versions": manifest.versions,
        "steps": {name: _step_to_json(step) for name, step in manifest.steps.items()},
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
            for path in files
        },
    }
    (folder / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of an artefact whose every file is as it was written.

    Raises `ArtefactError` for a folder that is no artefact, a format that this library does not know, and files that
    are missing, changed or not in the manifest's list but named by a step.
    """
    place = Path(folder)
    try:
        content = json.loads((place / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(f"{place}: no {NAME} there; expected a folder that attnpack_fx.export wrote") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ArtefactError(f"{place / NAME}: cannot be read ({error}); export the model again") from None
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ArtefactError(f"{place / NAME}: got no {_KIND}; expected a folder that attnpack_fx.export wrote")
    found = content.get("format")
    if not _is_count(found) or not 1 <= found <= FORMAT:
        raise ArtefactError(
            f"{place}: got format {found!r}, expected 1 to {FORMAT}; install a newer attnpack-fx, or export again"
        )
    try:
        manifest = Manifest(
            content["target"],
            {name: _step_from_json(step) for name, step in content["steps"].items()},
            PackPolicy.from_dict(content["policy"]),
            dict(content["model"].items()),
            content["device"],
            dict(content["versions"].items()),
        )
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ArtefactError(f"{place / NAME}: not as attnpack_fx.export writes it ({error!r}); export again") from None
    if manifest.target not in TARGETS:
        raise ArtefactError(f"{place}: got target {manifest.target!r}, expected one of {', '.join(TARGETS)}")
    if manifest.device not in DEVICES:
        raise ArtefactError(f"{place}: got device {manifest.device!r}, expected one of {', '.join(DEVICES)}")
    for step in manifest.steps.values():
        if step.file not in files:
            raise ArtefactError(f"{place / NAME}: the step's file {step.file} has no checksum; export again")
    if weights.NAME not in files and (place / weights.NAME).exists():
        raise ArtefactError(f"{place / NAME}: {weights.NAME}, which the steps read, has no checksum; export again")
    for name, (size, digest) in files.items():
        _verify(place, name, size, digest)
    return manifest


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages, ours first."""
    found = {}
    for package in ("attnpack-fx", "torch", "transformers", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _verify(folder: Path, name: str, size: int, digest: str) -> None:
    path, named = folder / name, PurePosixPath(name)
    # By its name: files of a hub's cache are links to where their contents are kept.
    inside = not named.is_absolute() and ".." not in named.parts
    try:
        there = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have, or links in a circle
        raise ArtefactError(
            f"{folder}: the manifest names {name!r}, which is no file ({error}); export again"
        ) from None
    if not inside:
        raise ArtefactError(f"{folder}: the manifest names {name}, which is outside the artefact; do not use it")
    if not there:
        raise ArtefactError(f"{path}: missing; copy the whole folder, or export again")
    if path.stat().st_size != size:
        raise ArtefactError(
            f"{path}: got {path.stat().st_size} bytes, expected {size}: corrupted or replaced; copy it or export again"
        )
    if _digest(path) != digest:
        raise ArtefactError(f"{path}: its SHA-256 is not that of the manifest: corrupted or replaced; export again")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_to_json(step: StepFiles) -> dict[str, Any]:
    return {
        "file": step.file,
        "inputs": [spec.to_json() for spec in step.inputs],
        "outputs": [spec.to_json() for spec in step.outputs],
        "ranges": {name: [allowed.least, allowed.most] for name, allowed in step.ranges.items()},
    }


def _step_from_json(value: Mapping[str, Any]) -> StepFiles:
    if not isinstance(value["file"], str):
        raise TypeError(f"got a file {value['file']!r}, expected its name")
    return StepFiles(
        value["file"],
        tuple(map(TensorSpec.from_json, value["inputs"])),
        tuple(map(TensorSpec.from_json, value["outputs"])),
        {name: _range(name, *bounds) for name, bounds in value["ranges"].items()},
    )


def _range(name: str, least: Any, most: Any) -> Range:
    if not _is_count(least) or not _is_count(most) or least > most:
        raise ValueError(f"got {least!r} to {most!r} as the range of {name}, expected two sizes")
    return Range(least, most)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
