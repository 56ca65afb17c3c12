"""Checks of files and folders that are read or written, before anything is loaded."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attnpack_cli.errors import UserError, require

#: A policy file, a manifest or a configuration is small: more is no such file, and is not read.
_MOST_JSON = 64 << 20


def check_pictures(files: Sequence[str]) -> None:
    """Raise `UserError` for a file that is missing or no picture; reads no more than its header."""
    if not files:
        return
    require("PIL")
    from PIL import Image, UnidentifiedImageError

    for file in files:
        try:
            with Image.open(file):
                pass
        except FileNotFoundError:
            raise UserError(f"--image {file}: no such file; expected the path of a picture") from None
        except UnidentifiedImageError:
            raise UserError(
                f"--image {file}: not a picture that Pillow can read; expected one such as .png or .jpg"
            ) from None
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            shown = getattr(error, "strerror", None) or error
            raise UserError(f"--image {file}: {shown}; expected the path of a picture") from None


def check_new_file(flag: str, path: Path, endings: Sequence[str]) -> None:
    """Raise `UserError` unless a file can be written to `path`, whose name ends in one of `endings`; one may be there.

    endings: the first of them is taken for the example.
    """
    expected = ", ".join(endings[:-1]) + f" or {endings[-1]}"
    if path.is_dir():
        raise UserError(
            f"{flag} {path}: is a folder; expected the name of a file in it, e.g. {path / 'name'}{endings[0]}"
        )
    if path.suffix.lower() not in endings:
        raise UserError(f"{flag} {path}: expected a name that ends in {expected}, e.g. {path.stem}{endings[0]}")
    if not path.parent.is_dir():
        raise UserError(f"{flag} {path}: there is no folder {path.parent}; make it, or choose another place")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: may not be written; choose another place")


def check_new_folder(flag: str, path: Path, marker: str) -> None:
    """Raise `UserError` unless a folder can be made at `path`: nothing there, an empty one, or one with a `marker`."""
    if path.exists() and not (path.is_dir() and (not any(path.iterdir()) or (path / marker).is_file())):
        raise UserError(f"{flag} {path}: is there already, and no artefact; choose another place, or remove it")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    refused = f"{flag} {path}: nothing can be written to {above}; choose another place"
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(refused)
    try:  # whoever may do everything may still not write everywhere
        TemporaryDirectory(dir=above).cleanup()
    except OSError as error:
        raise UserError(f"{refused} ({error.strerror or error})") from None


def read_json(flag: str, path: Path, expected: str) -> Any:
    """The content of a JSON file. Raises `UserError` where there is none; expected: what the file should be."""
    try:
        if path.stat().st_size > _MOST_JSON:
            raise UserError(f"{flag} {path}: got {path.stat().st_size:,} bytes, expected {expected}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{flag} {path}: no such file; expected {expected}") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}; expected {expected}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} {path}: cannot be read as JSON ({error}); expected {expected}") from None
