"""Artefacts that several tests read, each written once, whatever the number of processes that test."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from attnpack_fx.export import manifest


def written(factory: pytest.TempPathFactory, name: str, write: Callable[[Path], object]) -> Path:
    """The folder of that name, which `write` has written."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "artefacts" / name
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / manifest.NAME).is_file():
            write(folder)
    return folder
