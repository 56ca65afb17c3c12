"""Images of a request: what is refused, with what words and at what cost, and what good ones become."""

import asyncio
import base64
import io
import struct
import threading
import zlib

import pytest

pytest.importorskip("h11", reason="the extra serve is not installed")

from PIL import Image, ImageFile

from attnpack_serve.images import BadImageError, ImageLimits, load_images

LIMITS = ImageLimits()


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def corners(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    """Red to the right, green downwards: what is turned shows."""
    image = Image.new("RGB", size)
    image.putdata(
        [(x * 255 // (size[0] - 1), y * 255 // (size[1] - 1), 40) for y in range(size[1]) for x in range(size[0])]
    )
    return image.convert(mode)


def loaded(*urls: str, limits: ImageLimits = LIMITS) -> list[Image.Image]:
    return asyncio.run(load_images(urls, limits))


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png(width: int, height: int) -> bytes:
    """A PNG of black pixels, of which a few rows are there."""
    rows = zlib.compress(bytes(1 + width) * 16)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def huge_webp(width: int, height: int) -> bytes:
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    inside = saved(corners(), "WEBP")[12:]
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas + inside
    return b"RIFF" + struct.pack("<I", len(body)) + body


def far_gif() -> bytes:
    """A GIF whose screen is small, with a frame of 40,000 x 40,000 pixels."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, 40_000, 40_000, 0) + b"\x02\x02D\x01\x00;"


def run_length_bmp() -> bytes:
    """A BMP whose runs skip over 255 rows."""
    header = struct.pack("<IiiHHIIiiII", 40, 1 << 12, 1 << 12, 1, 8, 1, 4, 1, 1, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1082, 0, 0, 1078) + header + bytes(1024) + b"\x00\x02\x00\xff"


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan stands there so many times."""
    made = io.BytesIO()
    corners().save(made, "JPEG", progressive=True)
    data = made.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


PNG = saved(corners())
#: URLs, and what is said of them: what was got, what is expected, the way out.
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "characters that are none": (data_url(PNG)[:-9] + "*" + data_url(PNG)[-8:], ("not base64", "padded", "encode")),
    "a line break": (data_url(PNG)[:-8] + "\n" + data_url(PNG)[-8:], ("not base64", "without line breaks")),
    "no padding": ("data:image/png;base64,iVBORw0KGg", ("10 characters that are not base64", "multiple of four")),
    "more after the padding": ("data:image/png;base64,aQ==aQ==", ("not base64",)),
    "the alphabet of URLs": ("data:image/png;base64,_-8_", ("not base64", "+ and /")),
    "nothing": ("data:image/png;base64,", ("0 bytes of another kind", "a PNG, JPEG, WebP, GIF or BMP image")),
    "text": (data_url(b"no image at all"), ("15 bytes of another kind", "expected a PNG", "convert it")),
    "SVG": (data_url(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "svg+xml"), ("another kind", "expected a PNG")),
    "TIFF": (data_url(saved(corners(), "TIFF"), "tiff"), ("another kind", "convert it")),
    "a truncated PNG": (data_url(PNG[:-40]), ("cannot be decoded", "expected a PNG", "cut short")),
    "a PNG's first bytes": (data_url(PNG[:12]), ("cannot be decoded", "cut short")),
    "a truncated JPEG": (data_url(saved(corners(), "JPEG")[:-30]), ("cannot be decoded", "cut short")),
    "a truncated WebP": (data_url(saved(corners(), "WEBP")[:-20]), ("cannot be decoded", "cut short")),
    "a WebP's first bytes": (data_url(saved(corners(), "WEBP")[:20]), ("cannot be decoded", "cut short")),
    "a truncated GIF": (data_url(saved(corners(), "GIF")[:-30]), ("cannot be decoded", "cut short")),
    "a truncated BMP": (data_url(saved(corners(), "BMP")[:-30]), ("cannot be decoded", "cut short")),
    "a BMP in runs": (data_url(run_length_bmp()), ("run-length coding", "save it as PNG")),
    "a JPEG of many scans": (data_url(scans(40)), ("a JPEG of more than 32 scans", "save it anew")),
    "a line": (data_url(saved(Image.new("RGB", (1, 101)))), ("1 x 101 pixels", "at most 100 times", "cut it")),
    "a huge WebP": (
        data_url(huge_webp(1 << 24, 200)),
        ("16,777,216 x 200 pixels", "16,777,216 in all", "smaller image"),
    ),
    "a huge frame of a GIF": (data_url(far_gif()), ("pixels, expected", "16,777,216", "send a smaller image")),
    "no base64": ("data:image/png,abc", ("got 'data:image/png,abc'", "data:image/png;base64,...")),
    "no image": ("data:text/html;base64,aGk=", ("got 'data:text/html", "expected data:image/png;base64")),
    "a file": ("file:///etc/passwd", ("got 'file:///etc/passwd'", "expected data:image/png;base64", "content")),
    "a path": ("/etc/passwd", ("got '/etc/passwd'", "expected data:image/png;base64")),
    "FTP": ("ftp://images.example.com/a.png", ("got 'ftp://images.example.com/a.png'", "expected data:image/png")),
    "nothing at all": ("", ("got ''", "expected data:image/png;base64")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_ones_are_refused(name):
    url, parts = REFUSED[name]
    with pytest.raises(BadImageError) as caught:
        loaded(data_url(PNG), url)
    said = str(caught.value)
    assert said.startswith("image 2: got ")
    for part in parts:
        assert part in said
    # Neither the image, nor more than the first 40 characters of the URL; nor by way of the error before it.
    assert not any(url[start : start + 41] in said for start in range(len(url) - 40))
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize("size", [(30_000, 30_000), (4097, 4096)])
def test_too_many_pixels_are_refused_by_the_header(size, monkeypatch):
    decompressed = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decompressed.append)
    with pytest.raises(BadImageError, match=rf"got {size[0]:,} x {size[1]:,} pixels, expected .* 16,777,216 in all"):
        loaded(data_url(huge_png(*size)))
    assert decompressed == []


def test_pixels_beyond_what_pillow_takes_for_a_bomb_are_the_limits_alone(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert loaded(data_url(PNG))[0].size == (24, 16)
    assert not recwarn.list and Image.MAX_IMAGE_PIXELS == 10


def test_the_limit_of_pixels_is_the_last_that_passes():
    with pytest.raises(BadImageError, match="got 24 x 16 pixels, expected from one to 383 in all"):
        loaded(data_url(PNG), limits=ImageLimits(pixels=24 * 16 - 1))
    assert loaded(data_url(PNG), limits=ImageLimits(pixels=24 * 16))[0].size == (24, 16)


@pytest.mark.parametrize("padding", range(3))
def test_the_limit_of_bytes_is_the_last_that_passes(padding):
    # What is behind the end of a PNG is ignored, and makes the file longer.
    data = PNG + bytes((padding - len(PNG)) % 3)
    with pytest.raises(
        BadImageError, match=rf"got {len(data)} bytes, expected at most {len(data) - 1}; send a smaller"
    ):
        loaded(data_url(data), limits=ImageLimits(bytes=len(data) - 1))
    assert loaded(data_url(data), limits=ImageLimits(bytes=len(data)))[0].size == (24, 16)


def test_too_many_images_are_refused_before_any_is_read():
    with pytest.raises(BadImageError, match="got 17 images, expected at most 16; send fewer"):
        loaded(*["no image"] * 17)
    assert loaded() == [] and len(loaded(*[data_url(PNG)] * 16)) == 16


@pytest.mark.parametrize(("form", "off"), [("PNG", 0), ("BMP", 0), ("GIF", 40), ("WEBP", 40), ("JPEG", 40)])
def test_every_format_is_decoded(form, off):
    # Said to be another: what counts is the content.
    (image,) = loaded(data_url(saved(corners(), form), "png"))
    assert (image.mode, image.size) == ("RGB", (24, 16))
    differences = zip(image.tobytes(), corners().tobytes(), strict=True)
    assert max(abs(one - other) for one, other in differences) <= off


def test_images_keep_their_order():
    sizes = [(size, 8) for size in (400, 3, 200, 5)]
    assert [image.size for image in loaded(*(data_url(saved(corners(size=size))) for size in sizes))] == sizes


def test_the_first_frame_of_several_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        url = data_url(saved(frames[0], form, save_all=True, append_images=frames[1:], **options))
        assert loaded(url)[0].getpixel((4, 4)) == (255, 0, 0), form


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_exif_turns_the_image(form, orientation):
    ways = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    # Stored as a camera that is held so would, each way undone by the orientation.
    stored = corners().transpose(ways[orientation]) if orientation > 1 else corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    (image,) = loaded(data_url(saved(stored, form, exif=exif, **options)))
    assert image.size == (24, 16) and image.tobytes() == corners().tobytes()


def test_exif_that_is_broken_turns_nothing():
    url = data_url(saved(corners(), exif=b"Exif\x00\x00no TIFF at all"))
    assert loaded(url)[0].tobytes() == corners().tobytes()


def test_what_is_transparent_is_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 1), (0, 0, 255, 255))
    for image in (clear, clear.convert("PA").convert("RGBA"), clear.convert("LA")):
        (seen,) = loaded(data_url(saved(image)))
        assert seen.mode == "RGB" and seen.getpixel((0, 0)) == (255, 255, 255)
        assert seen.getpixel((1, 1)) != (255, 255, 255)
    palette = Image.new("RGB", (4, 4), "red").convert("P")
    assert loaded(data_url(saved(palette, transparency=palette.getpixel((0, 0)))))[0].getpixel((0, 0)) == (
        255,
        255,
        255,
    )


def test_grey_of_16_bits_is_scaled():
    grey = Image.new("I;16", (2, 1))
    grey.putpixel((0, 0), 0x8000)
    grey.putpixel((1, 0), 0xFFFF)
    (image,) = loaded(data_url(saved(grey)))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(128,) * 3, (255,) * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    image = Image.new(mode, (4, 4))
    (seen,) = loaded(data_url(saved(image, "JPEG" if mode == "CMYK" else "PNG")))
    assert seen.mode == "RGB" and seen.getpixel((0, 0)) == image.convert("RGB").getpixel((0, 0))


def test_the_event_loop_goes_on_while_images_are_decoded(monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    load = Image.Image.load

    def slow(image):
        started.set()
        assert go_on.wait(20)
        return load(image)

    monkeypatch.setattr(Image.Image, "load", slow)

    async def both():
        loading = asyncio.create_task(load_images([data_url(PNG)], LIMITS))
        while not started.is_set():
            await asyncio.sleep(0.001)
        # The loop runs, and the image is not through.
        assert not loading.done()
        go_on.set()
        return await loading

    assert asyncio.run(both())[0].size == (24, 16)


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"images": -1}, "images: got -1, expected 0 or more"),
        ({"bytes": 0}, "bytes: got 0, expected 1 or more"),
        ({"pixels": 0}, "pixels: got 0, expected 1 or more"),
        ({"seconds": 0}, "seconds: got 0, expected a number above 0"),
        ({"seconds": float("nan")}, "seconds: got nan"),
        ({"hosts": ("https://example.com/",)}, "got 'https://example.com/', expected a host's name"),
    ],
)
def test_limits_are_checked(wrong, part):
    with pytest.raises(ValueError, match=part.replace("(", r"\(")):
        ImageLimits(**wrong)
