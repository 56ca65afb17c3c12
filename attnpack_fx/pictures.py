"""Pictures in any form that rows of a data set have them in."""

import io
import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_EXPECTED = "a path, the bytes of a picture, a PIL image, or an array [H, W] or [H, W, 3] of uint8"


def pictures(column: Any) -> list["Image"]:
    """Open the pictures of one prompt, as RGB.

    Args:
        column: a list of pictures, or one alone; each is a path, bytes, a PIL image or an array `[H, W]` or `[H, W, C]`
            of uint8. None is no picture.

    Returns:
        The pictures in their order.

    Raises:
        ValueError: for one that cannot be read, by its number from 1 on.
    """
    # An array of one picture has no list around it where every prompt of a batch has one of the same size.
    alone = isinstance(column, np.ndarray) and column.dtype == np.uint8 and column.ndim < 4
    if column is None:
        return []
    if alone or isinstance(column, (str, bytes, os.PathLike)) or hasattr(column, "convert"):
        column = [column]
    return [_picture(number, each) for number, each in enumerate(column, 1)]


def _picture(number: int, given: Any) -> "Image":
    from PIL import Image, UnidentifiedImageError

    shown = os.fspath(given) if isinstance(given, (str, os.PathLike)) else type(given).__name__
    try:
        if isinstance(given, (str, os.PathLike)):
            opened: Image.Image = Image.open(given)
        elif isinstance(given, bytes):
            opened = Image.open(io.BytesIO(given))
        elif isinstance(given, np.ndarray) and given.dtype == np.uint8:
            opened = Image.fromarray(given)
        elif isinstance(given, Image.Image):
            opened = given
        else:
            raise ValueError(f"image {number}: got {shown}, expected {_EXPECTED}")
        return opened.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"image {number}: {shown}: not a picture that Pillow can read") from None
    except (OSError, SyntaxError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {number}: {shown}: {getattr(error, 'strerror', None) or error}") from None
