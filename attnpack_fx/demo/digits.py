"""Questions about grids of real handwritten digits.

The digits are the 1797 samples of scikit-learn's ``load_digits`` (8x8 grey levels).  A fixed, stratified
split puts a fifth of the *samples* aside: a digit drawn in a held-out image is never drawn in a training
image.  Every image is a 64x64 RGB picture of a grid of 2 rows x 4 columns of digits, and a prompt holds up
to 16 images, each introduced by its name (``#1`` ... ``#16``).  Four kinds of question are asked:

``read``
    read one named image out, row by row (the answer is 8 digits);
``cell``
    name the digit in one cell of one named image;
``count``
    read one named image out and say how often a digit occurs in it;
``locate``
    name the one image that is marked, with a line below its digits, and read it out: a needle in a haystack.

A fifth, `listing`, reads all images out, over and over, for answers of any length.

Needs numpy and Pillow; scikit-learn is imported when the digits are first needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "held_out"]

TASKS: tuple[str, ...] = ("read", "cell", "count", "locate")
SPLITS: tuple[Split, ...] = ("train", "held_out")

ROWS = 2
COLUMNS = 4
CELLS = ROWS * COLUMNS
CELL_HEIGHT = 32
CELL_WIDTH = 16
IMAGE_SIZE = 64
MAX_IMAGES = 16
MARK_HEIGHT = 2

IMAGE_TOKEN = "<image>"
END_TOKEN = "<eos>"
HELD_OUT_SHARE = 0.2
_SPLIT_SEED = 20240229
_GLYPH_SIZE = 8
_GLYPH_LEVELS = 16.0
_DRAWN_HEIGHT = 25.0
_DRAWN_WIDTH = 14.5


@dataclass(frozen=True)
class Augmentation:
    """How far a digit may be moved away from its upright, centred drawing.

    Every number is the half-width of a uniform distribution, but for ``noise``, the largest standard
    deviation of the pixel noise, and ``blend``, the largest share of another sample of the same class.

    Attributes:
        shift_y: vertical shift, in pixels of the 64x64 image.
        shift_x: horizontal shift, in pixels.
        rotation: in degrees.
        scale: relative change of height and of width, drawn independently.
        shear: horizontal shift per pixel of height.
        contrast: largest relative loss of brightness.
        noise: in units of full brightness.
        blend: share in [0, 1) mixed in from another sample of the same class and split.
    """

    shift_y: float
    shift_x: float
    rotation: float
    scale: float
    shear: float
    contrast: float
    noise: float
    blend: float


TRAIN_AUGMENTATION = Augmentation(
    shift_y=3.0, shift_x=1.3, rotation=14.0, scale=0.14, shear=0.12, contrast=0.35, noise=0.08, blend=0.35
)
MILD_AUGMENTATION = Augmentation(
    shift_y=1.5, shift_x=0.7, rotation=5.0, scale=0.05, shear=0.0, contrast=0.1, noise=0.02, blend=0.0
)


@dataclass(frozen=True)
class Question:
    """One question about some images.

    Attributes:
        task: one of `TASKS`.
        images: the images in order, each RGB of 64x64 pixels.
        prompt: the text for the processor, with one ``<image>`` placeholder for each image.
        answer: the expected text, tokens separated by single spaces.
    """

    task: str
    images: tuple[Image.Image, ...]
    prompt: str
    answer: str


@lru_cache(maxsize=1)
def split_indices() -> dict[str, NDArray[np.int64]]:
    """Indices into ``load_digits()`` of the samples of each split; disjoint, stratified by class, sorted."""
    from sklearn.datasets import load_digits

    target = load_digits().target
    rng = np.random.default_rng(_SPLIT_SEED)
    held_out: list[NDArray[np.int64]] = []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(target == digit))
        held_out.append(members[: round(HELD_OUT_SHARE * len(members))])
    chosen = np.sort(np.concatenate(held_out)).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(target), dtype=np.int64), chosen)
    return {"train": rest, "held_out": chosen}


@lru_cache(maxsize=2)
def load_split(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Glyphs ``[n, 8, 8]`` in [0, 1] and labels ``[n]`` of one split.

    Raises:
        ValueError: if ``split`` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = split_indices()[split]
    glyphs = (data.images[chosen] / _GLYPH_LEVELS).astype(np.float32)
    return glyphs, data.target[chosen].astype(np.int64)


def draw_cells(
    glyphs: NDArray[np.float32], rng: np.random.Generator, augmentation: Augmentation
) -> NDArray[np.float32]:
    """Draw each glyph into a cell of its own.

    Args:
        glyphs: ``[n, 8, 8]``, brightness in [0, 1].
        rng: source of the distortions.
        augmentation: how strong they may be.

    Returns:
        ``[n, 32, 16]``, brightness in [0, 1], digits bright on dark.
    """
    count = len(glyphs)

    def spread(limit: float) -> NDArray[np.float32]:
        return rng.uniform(-limit, limit, size=(count, 1, 1)).astype(np.float32)

    ys = (np.arange(CELL_HEIGHT, dtype=np.float32) - (CELL_HEIGHT - 1) / 2)[None, :, None]
    xs = (np.arange(CELL_WIDTH, dtype=np.float32) - (CELL_WIDTH - 1) / 2)[None, None, :]
    ys = ys - spread(augmentation.shift_y)
    xs = xs - spread(augmentation.shift_x)
    angle = np.deg2rad(spread(augmentation.rotation))
    cos, sin = np.cos(angle), np.sin(angle)
    ys, xs = cos * ys - sin * xs, sin * ys + cos * xs
    xs = xs + spread(augmentation.shear) * ys
    ys = ys / (1.0 + spread(augmentation.scale)) * (_GLYPH_SIZE / _DRAWN_HEIGHT)
    xs = xs / (1.0 + spread(augmentation.scale)) * (_GLYPH_SIZE / _DRAWN_WIDTH)

    padded = np.zeros((count, _GLYPH_SIZE + 2, _GLYPH_SIZE + 2), dtype=np.float32)
    padded[:, 1:-1, 1:-1] = glyphs
    limit = _GLYPH_SIZE + 1 - 1e-3
    ys = np.clip(ys + (_GLYPH_SIZE + 1) / 2, 0.0, limit)
    xs = np.clip(xs + (_GLYPH_SIZE + 1) / 2, 0.0, limit)
    top, left = ys.astype(np.int32), xs.astype(np.int32)
    down, right = ys - top, xs - left
    width = _GLYPH_SIZE + 2
    start = top * width + left + (np.arange(count, dtype=np.int32) * width * width)[:, None, None]
    flat = padded.reshape(-1)
    upper = flat[start] * (1 - right) + flat[start + 1] * right
    lower = flat[start + width] * (1 - right) + flat[start + width + 1] * right
    cells = upper * (1 - down) + lower * down

    cells = cells * (1.0 - rng.uniform(0, augmentation.contrast, size=(count, 1, 1)).astype(np.float32))
    if augmentation.noise > 0:
        level = rng.uniform(0, augmentation.noise, size=(count, 1, 1)).astype(np.float32)
        cells = cells + level * rng.standard_normal(cells.shape, dtype=np.float32)
    return np.clip(cells, 0.0, 1.0)


def sample_grids(
    rng: np.random.Generator, count: int, split: Split, augmentation: Augmentation | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw ``count`` images with random digits of one split.

    Args:
        rng: source of all randomness.
        count: how many images.
        split: where the digit samples come from.
        augmentation: distortions; by default `TRAIN_AUGMENTATION` for the training split and
            `MILD_AUGMENTATION` for the held-out one.

    Returns:
        Grey images ``[count, 64, 64]`` and their digits ``[count, 8]`` in reading order.

    Raises:
        ValueError: if ``split`` is not one of `SPLITS`.
    """
    glyphs, labels = load_split(split)
    if augmentation is None:
        augmentation = TRAIN_AUGMENTATION if split == "train" else MILD_AUGMENTATION
    digits = rng.integers(0, 10, size=count * CELLS)
    chosen = _pick_samples(rng, split, digits)
    drawn = glyphs[chosen]
    if augmentation.blend > 0:
        other = glyphs[_pick_samples(rng, split, digits)]
        share = rng.uniform(0, augmentation.blend, size=(len(drawn), 1, 1)).astype(np.float32)
        share *= rng.random(size=share.shape) < 0.5
        drawn = (1 - share) * drawn + share * other
    cells = draw_cells(drawn, rng, augmentation)
    grid = cells.reshape(count, ROWS, COLUMNS, CELL_HEIGHT, CELL_WIDTH).transpose(0, 1, 3, 2, 4)
    pixels = np.rint(grid.reshape(count, IMAGE_SIZE, IMAGE_SIZE) * 255.0).astype(np.uint8)
    return pixels, labels[chosen].reshape(count, CELLS)


def _pick_samples(rng: np.random.Generator, split: Split, digits: NDArray[np.int64]) -> NDArray[np.int64]:
    """A random sample of ``split`` for each entry of ``digits``, as indices into `load_split`."""
    order, first, sizes = _class_table(split)
    offset = (rng.random(len(digits)) * sizes[digits]).astype(np.int64)
    return order[first[digits] + offset]


@lru_cache(maxsize=2)
def _class_table(split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Samples sorted by class ``[n]``, and the start and size of every class in that order ``[10]``."""
    _, labels = load_split(split)
    order = np.argsort(labels, kind="stable").astype(np.int64)
    sizes = np.bincount(labels, minlength=10).astype(np.int64)
    return order, np.cumsum(sizes) - sizes, sizes


def mark(pixels: NDArray[np.uint8]) -> None:
    """Draw a line below the digits of one grey image ``[64, 64]``, in place: the image that ``locate`` asks for."""
    pixels[-MARK_HEIGHT:] = 255


def image_name(index: int) -> str:
    """The name of the image at position ``index`` (from 0) of a prompt: ``#1``, ``#2``, ..."""
    return f"#{index + 1}"


def images_text(names: Sequence[str]) -> str:
    """The part of a prompt that shows the images with the given names, in order."""
    return " ".join(f"image {name} : {IMAGE_TOKEN}" for name in names)


def ask(task: str, labels: NDArray[np.int64], target: int, name: str, rng: np.random.Generator) -> tuple[str, str]:
    """Put one question about one image into words.

    Args:
        task: one of `TASKS`.
        labels: digits of all images ``[images, 8]``.
        target: the image the question is about, an index into ``labels``; for ``locate`` the marked one.
        name: that image's name in the prompt.
        rng: chooses the cell for ``cell`` and the digit for ``count``.

    Returns:
        The text to put after the images (it ends in ``answer :``) and the expected answer.

    Raises:
        ValueError: if ``task`` is not one of `TASKS`.
    """
    digits = labels[target]
    if task == "read":
        return f"question : read image {name} answer :", _spell(digits)
    if task == "cell":
        cell = int(rng.integers(CELLS))
        row, column = divmod(cell, COLUMNS)
        place = f"r{row + 1} c{column + 1}"
        return f"question : cell {place} of image {name} answer :", str(int(digits[cell]))
    if task == "count":
        present = rng.random() < 0.75
        digit = int(digits[rng.integers(CELLS)]) if present else int(rng.integers(10))
        count = int(np.count_nonzero(digits == digit))
        return f"question : count digit {digit} in image {name} answer :", f"{_spell(digits)} count {count}"
    if task == "locate":
        return "question : locate image answer :", f"image {name} : {_spell(digits)}"
    raise ValueError(f"task must be one of {TASKS}, got {task!r}")


def listing(labels: NDArray[np.int64], names: Sequence[str], tokens: int) -> tuple[str, str]:
    """A question for all images and the first ``tokens`` words of its answer, which begins anew after the last image.

    Args:
        labels: digits of all images ``[images, 8]``.
        names: the images' names, as `images_text` takes them.
        tokens: length of the answer in words.
    """
    words = [f"image {name} : {_spell(digits)}" for name, digits in zip(names, labels, strict=True)]
    once = " ".join(words).split()
    return "question : read answer :", " ".join((once * -(-tokens // len(once)))[:tokens])


def _spell(digits: NDArray[np.int64]) -> str:
    return " ".join(str(int(digit)) for digit in digits)


def vocabulary() -> list[str]:
    """Every word a prompt or an answer can hold, special tokens excepted, in a fixed order."""
    words = ["image", ":", "question", "answer", "read", "cell", "of", "count", "digit", "in", "locate"]
    words += [str(digit) for digit in range(10)]
    words += [f"r{row + 1}" for row in range(ROWS)]
    words += [f"c{column + 1}" for column in range(COLUMNS)]
    words += [image_name(index) for index in range(MAX_IMAGES)]
    return words


def to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """An RGB picture of grey pixels ``[64, 64]``."""
    return Image.fromarray(pixels).convert("RGB")


def held_out_questions(task: str, images: int, count: int, seed: int, split: Split = "held_out") -> list[Question]:
    """Make questions, each with images of its own.

    The same arguments always give the same questions.

    Args:
        task: one of `TASKS`.
        images: how many images every prompt holds, 1 to 16.
        count: how many questions.
        seed: any non-negative integer.
        split: which digit samples to draw; ``"held_out"`` ones were never trained on.

    Returns:
        ``count`` questions.

    Raises:
        ValueError: for an unknown task or split, or a number of images or questions out of range.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}")
    _check_counts(images, count)
    rng = np.random.default_rng([seed, TASKS.index(task), images])
    names = [image_name(index) for index in range(images)]
    questions: list[Question] = []
    for _ in range(count):
        pixels, labels = _draw(rng, images, split)
        target = int(rng.integers(images))
        if task == "locate":
            mark(pixels[target])
        pictures = tuple(to_image(picture) for picture in pixels)
        text, answer = ask(task, labels, target, names[target], rng)
        questions.append(Question(task, pictures, f"{images_text(names)} {text}", answer))
    return questions


def held_out_conversations(
    images: int, count: int, seed: int, split: Split = "held_out"
) -> list[tuple[Question, Question]]:
    """Make pairs of ``read`` questions about two different images of the same prompt.

    The prompt of the second question is its text alone: it is to follow the first prompt, the first answer
    and ``<eos>``, all separated by spaces (see `follow_up_prompt`).

    Args:
        images: how many images every prompt holds, 2 to 16.
        count: how many pairs.
        seed: any non-negative integer.
        split: which digit samples to draw.

    Returns:
        ``count`` pairs.

    Raises:
        ValueError: for an unknown split, or a number of images or pairs out of range.
    """
    _check_counts(images, count)
    if images < 2:
        raise ValueError("a conversation is about two images, got 1")
    rng = np.random.default_rng([seed, len(TASKS), images])
    names = [image_name(index) for index in range(images)]
    pairs: list[tuple[Question, Question]] = []
    for _ in range(count):
        pixels, labels = _draw(rng, images, split)
        pictures = tuple(to_image(picture) for picture in pixels)
        first, second = (int(target) for target in rng.permutation(images)[:2])
        text, answer = ask("read", labels, first, names[first], rng)
        opening = Question("read", pictures, f"{images_text(names)} {text}", answer)
        text, answer = ask("read", labels, second, names[second], rng)
        pairs.append((opening, Question("read", pictures, text, answer)))
    return pairs


def follow_up_prompt(opening: Question, reply: str, second: Question) -> str:
    """The prompt of the second turn, given what the model replied in the first."""
    return f"{opening.prompt} {reply} {END_TOKEN} {second.prompt}"


def _check_counts(images: int, count: int) -> None:
    if not 1 <= images <= MAX_IMAGES:
        raise ValueError(f"images must be 1 to {MAX_IMAGES}, got {images}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")


def _draw(rng: np.random.Generator, images: int, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey images ``[images, 64, 64]`` and their digits ``[images, 8]``; no two show the same sequence."""
    while True:
        pixels, labels = sample_grids(rng, images, split)
        if len(np.unique(labels, axis=0)) == images:
            return pixels, labels


def score(question: Question, generated_text: str) -> float:
    """Grade an answer.

    Args:
        question: what was asked.
        generated_text: the text the model produced after the prompt, special tokens removed.

    Returns:
        For ``read`` the share of the 8 positions that hold the right digit (missing digits are wrong and
        surplus ones cost nothing); for the other tasks 1.0 if the words are exactly the answer, else 0.0.
    """
    expected = question.answer.split()
    given = generated_text.split()
    if question.task != "read":
        return float(given == expected)
    right = sum(want == got for want, got in zip(expected, given, strict=False))
    return right / len(expected)
