"""The contexts a decoder is trained on, and the curriculum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attnpack_fx.demo import digits
from benchmarks.training.families import TOKENS_PER_IMAGE, Family

NAME_TOKENS = 3
TASK_SHARES = {"read": 0.36, "cell": 0.30, "count": 0.22, "locate": 0.12}
TASK_WEIGHTS = {"read": 1.0, "cell": 3.0, "count": 1.0, "locate": 1.0, "list": 1.0}
#: The tokens that a long answer hangs on, by their place in it: the image's name, and the number.
KEY_WEIGHTS = {"locate": (1, 10.0), "count": (digits.CELLS + 1, 5.0)}
NEEDLE_SHARE = 0.35


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Attributes:
        images: numbers of images in a prompt and the share of batches that use each.
        until: the share of the decoder phase at which the stage ends at the latest.
        advance_at: the running share of right answer tokens that ends the stage early.
    """

    images: dict[int, float]
    until: float
    advance_at: float


CURRICULUM = (
    Stage({1: 1.0}, until=0.12, advance_at=0.85),
    Stage({1: 0.2, 2: 0.8}, until=0.22, advance_at=0.85),
    Stage({1: 0.1, 2: 0.2, 4: 0.7}, until=0.36, advance_at=0.85),
    Stage({1: 0.1, 2: 0.1, 4: 0.2, 8: 0.6}, until=0.50, advance_at=0.88),
    Stage({1: 0.1, 2: 0.25, 4: 0.35, 8: 0.18, 16: 0.12}, until=1.0, advance_at=2.0),
)
SEQUENCES = {1: 28, 2: 18, 4: 10, 8: 6, 16: 4}
QUESTIONS = {1: 8, 2: 10, 4: 14, 8: 20, 16: 24}
TURNS = {1: 3, 2: 4, 4: 8, 8: 12, 16: 20}
LISTED = {1: 48, 2: 48, 4: 96, 8: 264, 16: 528}
SPREAD_SHARE = 0.5
TURNS_SHARE = 0.25
LIST_SHARE = 0.1


@dataclass
class Batch:
    """Contexts of equal length, each several images followed by several questions with their answers.

    Attributes:
        input_ids: ``[batch, length]``, images expanded to their placeholder tokens.
        positions: ``[axes, batch, length]`` position of every token.
        grey: ``[batch * images, 64, 64]``.
        mask: ``[length, length]``, true where a token (row) sees another (column); None if it sees all of its
            predecessors.
        asked: ``[answers]`` indices of the tokens followed by a token of an answer; the same in each row.
        weights: ``[answers]`` loss weights.
        tasks: the task of each of ``asked``.
    """

    input_ids: Tensor
    positions: Tensor
    grey: NDArray[np.uint8]
    mask: Tensor | None
    asked: Tensor
    weights: Tensor
    tasks: list[str]


class BatchMaker:
    """Draws training or evaluation batches.

    Args:
        family: of the model, for positions.
        tokenizer: the tokenizer of the model.
        split: where the digit samples come from.
        seed: of the random generator.
    """

    def __init__(
        self, family: Family, tokenizer: PreTrainedTokenizerFast, split: digits.Split, seed: list[int]
    ) -> None:
        self.family = family
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self.bos = self.ids["<bos>"]
        self.eos = self.ids["<eos>"]
        self.split = split
        self.rng = np.random.default_rng(seed)

    def draw(self, images: int, sequences: int, tasks: list[str], spread: bool, turns: bool) -> Batch:
        """Draw a batch.

        Args:
            images: images in each context.
            sequences: contexts in the batch.
            tasks: the questions of every context, in order.
            spread: give the images names and positions picked from a prompt of 16 images.
            turns: the questions follow each other as turns of a conversation; otherwise each sees the images only, as
                if it stood alone.

        Returns:
            The batch, on the CPU.
        """
        rows = []
        everything: list[NDArray[np.uint8]] = []
        for _ in range(sequences):
            pixels, labels = digits.sample_grids(self.rng, images, self.split)
            marked = int(self.rng.integers(images))
            if "locate" in tasks:
                digits.mark(pixels[marked])
            everything.append(pixels)
            rows.append(self._row(labels, marked, tasks, spread, turns))
        mask = None
        if not turns:
            part = torch.tensor(rows[0].segments)
            mask = ((part == 0)[None, :] | (part[None, :] == part[:, None])).tril()
        return Batch(
            input_ids=torch.tensor([row.tokens for row in rows]),
            positions=torch.from_numpy(np.stack([np.concatenate(row.positions, axis=1) for row in rows], axis=1)),
            grey=np.concatenate(everything),
            mask=mask,
            asked=torch.tensor(rows[0].asked),
            weights=torch.tensor(rows[0].weights),
            tasks=rows[0].kinds,
        )

    def _row(self, labels: NDArray[np.int64], marked: int, tasks: list[str], spread: bool, turns: bool) -> _Row:
        images = len(labels)
        block = NAME_TOKENS + self.family.span
        places = np.arange(images)
        if spread:
            places = np.sort(self.rng.choice(digits.MAX_IMAGES, size=images, replace=False))
        names = [digits.image_name(int(place)) for place in places]
        row = _Row(len(self.family.places))
        row.add([self.bos], 0)
        for name, place in zip(names, places, strict=True):
            start = int(1 + place * block)
            row.add(self._encode(f"image {name} :"), start)
            row.add_image(self.ids[digits.IMAGE_TOKEN], self.family.places + start + NAME_TOKENS)
        end = 1 + (digits.MAX_IMAGES if spread else images) * block
        order = self.rng.permutation(images)
        for number, task in enumerate(tasks):
            # Turns go through the images before they come back to one.
            target = int(order[number % images]) if turns else int(self.rng.integers(images))
            if task == "locate":
                target = marked
            if task == "list":
                text, answer = digits.listing(labels, names, LISTED[images])
            else:
                text, answer = digits.ask(task, labels, target, names[target], self.rng)
            query, reply = self._encode(text), self._encode(answer)
            if task != "list":  # A listing is cut off.
                reply.append(self.eos)
            row.add(query, end, number + 1)
            row.asked += range(len(row.tokens) - 1, len(row.tokens) - 1 + len(reply))
            weights = [TASK_WEIGHTS[task]] * len(reply)
            if task in KEY_WEIGHTS:
                place, weight = KEY_WEIGHTS[task]
                weights[place] = weight
            row.weights += weights
            row.kinds += [task] * len(reply)
            row.add(reply, end + len(query), number + 1)
            if turns:
                end += len(query) + len(reply)
        return row

    def _encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def draw_stage(self, stage: Stage) -> tuple[int, Batch]:
        """Draw a training batch of a curriculum stage; also returns its number of images."""
        choices = list(stage.images)
        images = int(self.rng.choice(choices, p=[stage.images[choice] for choice in choices]))
        spread = images < digits.MAX_IMAGES and bool(self.rng.random() < SPREAD_SHARE)
        kind = self.rng.random()
        if kind < LIST_SHARE:
            return images, self.draw(images, SEQUENCES[images], ["list"], spread, turns=True)
        if kind < LIST_SHARE + NEEDLE_SHARE and images > 1:
            # Among others as one of several turns, and not always the first of them.
            tasks = [str(task) for task in self.rng.permutation(["locate", "read", "cell", "read"])]
            turns = bool(self.rng.random() < 0.5)
            return images, self.draw(images, SEQUENCES[images] * 3 // 2, tasks, spread, turns)
        turns = bool(self.rng.random() < TURNS_SHARE)
        count = (TURNS if turns else QUESTIONS)[images]
        shares = dict(TASK_SHARES)
        if self.rng.random() < 0.3:  # Images without a mark.
            shares["read"] += shares.pop("locate")
        tasks = [str(task) for task in self.rng.choice(list(shares), size=count, p=list(shares.values()))]
        return images, self.draw(images, SEQUENCES[images], tasks, spread, turns)


class _Row:
    """One context as it grows; positions are parts of ``[axes, n]``."""

    def __init__(self, axes: int) -> None:
        self.axes = axes
        self.tokens: list[int] = []
        self.positions: list[NDArray[np.int64]] = []
        self.segments: list[int] = []
        self.asked: list[int] = []
        self.kinds: list[str] = []
        self.weights: list[float] = []

    def add(self, tokens: list[int], start: int, segment: int = 0) -> None:
        self.tokens += tokens
        self.positions.append(np.tile(np.arange(start, start + len(tokens)), (self.axes, 1)))
        self.segments += [segment] * len(tokens)

    def add_image(self, token: int, positions: NDArray[np.int64]) -> None:
        self.tokens += [token] * TOKENS_PER_IMAGE
        self.positions.append(positions)
        self.segments += [0] * TOKENS_PER_IMAGE
