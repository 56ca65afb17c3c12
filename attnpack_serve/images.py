"""The images of a chat request: from `image_url` values, as strangers send them, to RGB images.

Nothing is decoded before its size is known: bytes by the length of the text or while they come, pixels by the header.
What an error says never has the image in it.
"""

import asyncio
import base64
import binascii
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from attnpack_serve.fetching import FetchError, Host, Network, fetch, shown

_DATA = re.compile(r"data:image/[a-z0-9.+*-]{1,40};base64,", re.IGNORECASE)
_EXPECTED = "a PNG, JPEG, WebP, GIF or BMP image"
#: Formats by how a file of each begins. They are opened by their own classes, not `Image.open`, which would try others
#: and has limits of its own, the same for the whole process.
_FORMATS: tuple[tuple[bytes, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (rb"RIFF....WEBPVP8[ LX]", WebPImagePlugin.WebPImageFile),
    (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    (rb"BM", BmpImagePlugin.BmpImageFile),
)
#: Scans of a JPEG, each of which is decoded over all pixels: cameras and browsers write ten.
_SCANS = 32
#: The longer side over the shorter: processors that scale the shorter to a fixed length make a wall of anything beyond.
_ASPECT = 100
_RUN_LENGTHS = (1, 2)  # RLE8, RLE4
_ORIENTATION = 0x0112
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
    """Why an image is refused, and what would be taken instead; made for whoever sent it."""


@dataclass(frozen=True)
class ImageLimits:
    """What a request may bring.

    images: of one request. bytes: of one image's file. pixels: of one image, width times height. hosts: from which
    images may be fetched, as `attnpack_serve.fetching.Host.parse` reads them; none, and only data: URLs are taken.
    seconds: for fetching one image; those of a request are fetched at the same time.
    """

    images: int = 16
    bytes: int = 20 * 2**20
    pixels: int = 16 * 2**20
    hosts: tuple[str, ...] = ()
    seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, least in (("images", 0), ("bytes", 1), ("pixels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {least} or more")
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds: got {self.seconds}, expected a number above 0, e.g. 10")
        for host in self.hosts:
            Host.parse(host)


async def load_images(urls: Sequence[str], limits: ImageLimits, network: Network | None = None) -> list[Image.Image]:
    """Decode the images of one request, without holding up the event loop.

    Args:
        urls: values of `image_url`: `data:image/...;base64,...`, and `http://` or `https://` at one of `limits.hosts`.
        limits: what is taken.
        network: another way to resolve and connect, for tests.

    Returns:
        RGB images in the order of `urls`: the first frame of several, upright as EXIF tells, on white where they are
        transparent, 16-bit grey scaled to 8 bits.

    Raises:
        BadImageError: for the first that is found to be wrong; the others are given up.
    """
    if len(urls) > limits.images:
        raise BadImageError(f"got {len(urls)} images, expected at most {limits.images}; send fewer in one request")
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_load(number, url, limits, network)) for number, url in enumerate(urls, 1)]
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]


async def _load(number: int, url: str, limits: ImageLimits, network: Network | None) -> Image.Image:
    try:
        if url[:8].lower().startswith(("http://", "https://")):
            found = await fetch(url, limits.hosts, limits.bytes, limits.seconds, network)
            return await asyncio.to_thread(_decode, found, limits)
        return await asyncio.to_thread(lambda: _decode(_unpack(url, limits), limits))
    except (BadImageError, FetchError) as error:
        # From None: what the error came of may hold the image.
        raise BadImageError(f"image {number}: {error}") from None


def _unpack(url: str, limits: ImageLimits) -> bytes:
    """The bytes of a data: URL."""
    head = _DATA.match(url)
    if head is None:
        raise BadImageError(
            f"got {shown(url)}, expected data:image/png;base64,... (or jpeg, webp, gif, bmp), or the address of an "
            "image (http) at a host that this server allows; send the file's content as a data: URL"
        )
    coded = len(url) - head.end()
    size = coded // 4 * 3 - url[-2:].count("=")
    if size > limits.bytes:
        raise BadImageError(f"got {size:,} bytes, expected at most {limits.bytes:,}; send a smaller image")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise BadImageError(
            f"got {coded:,} characters that are not base64, expected letters, digits, + and /, padded with = to a "
            "multiple of four; encode the file's bytes, without line breaks"
        ) from None


def _decode(data: bytes, limits: ImageLimits) -> Image.Image:
    try:
        image = _open(data, limits)
        image.load()
        return _rgb(_upright(image))
    except BadImageError:
        raise
    # Of a file made to break them, Pillow's readers raise whatever their code stumbles over.
    except Exception as error:
        raise BadImageError(
            f"got a file that cannot be decoded ({type(error).__name__}), expected {_EXPECTED}; it may be cut short: "
            "send it again, or save it anew"
        ) from None


def _open(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    """The image with its header read, and nothing beyond it."""
    opener = next((opener for start, opener in _FORMATS if re.match(start, data, re.DOTALL)), None)
    if opener is None:
        raise BadImageError(f"got {len(data):,} bytes of another kind, expected {_EXPECTED}; convert it")
    if opener is WebPImagePlugin.WebPImageFile:
        _check_pixels(_webp_canvas(data), limits)
    try:
        image = opener(io.BytesIO(data))
    except Image.DecompressionBombError:
        # A GIF's first frame may lie outside the screen that its header tells.
        raise BadImageError(f"got too many pixels, expected at most {limits.pixels:,}; send a smaller image") from None
    _check_pixels(image.size, limits)
    if opener is JpegImagePlugin.JpegImageFile and data.count(b"\xff\xda") > _SCANS:
        raise BadImageError(f"got a JPEG of more than {_SCANS} scans, expected fewer; save it anew")
    if opener is BmpImagePlugin.BmpImageFile and image.info.get("compression") in _RUN_LENGTHS:
        # Pillow's reader of these is Python, slow, and before version 13 took memory for rows that are not there.
        raise BadImageError("got a BMP with run-length coding, expected one without; save it as PNG")
    return image


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height by the header; Pillow's reader has memory for all pixels before it tells them."""
    if len(data) < 30:
        raise EOFError
    match data[12:16]:
        case b"VP8X":
            return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case _:
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_pixels(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if not 0 < width * height <= limits.pixels:
        raise BadImageError(
            f"got {width:,} x {height:,} pixels, expected from one to {limits.pixels:,} in all; send a smaller image"
        )
    if max(size) > _ASPECT * min(size):
        raise BadImageError(
            f"got {width:,} x {height:,} pixels, expected a longer side of at most {_ASPECT} times the shorter; cut it"
        )


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose, which also writes EXIF anew, and fails on much that cameras write.
    try:
        turn = _TURNED.get(image.getexif().get(_ORIENTATION, 1))
    # EXIF that cannot be read turns nothing, as in a browser; it raises as much as a broken file does.
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits: converted to RGB directly, all above 255 would be white.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")
