"""Held-out prompts of many images, each with a first question and several that can follow its answer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnpack_fx import hf
from attnpack_fx.demo import digits
from attnpack_fx.demo.load import Loaded, batch_inputs

#: The first question is part of the prompt; each of the others follows the first answer, in a cache that was packed.
FIRST = "read"
LATER = ("dialogue", "cell", "count", "needle")
LONG = "long"
TASKS = (FIRST, *LATER, LONG)
#: Tokens of the long reference.
LONG_TOKENS = 512


@dataclass(frozen=True)
class Turn:
    """question: int64 `[B, n]`, from the end of the answer before; empty for the first, which the prompt holds.

    answer: int64 `[B, A]`, the right tokens.
    """

    question: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Contexts:
    """A batch.

    inputs: of the prompt, with images already turned into embeddings, which no policy changes. vision: bool `[B, T]`,
    which tokens those are. turns: by task. after: position of what follows the prompt, less its length; None where the
    model counts it itself.
    """

    inputs: dict[str, Any]
    vision: Tensor
    turns: dict[str, Turn]
    after: int | None

    @property
    def size(self) -> int:
        return self.turns[FIRST].answer.shape[0]


def contexts(
    loaded: Loaded, images: int, count: int, size: int, seed: int, split: digits.Split = "held_out"
) -> list[Contexts]:
    """`count` contexts of `images` images, `size` in a batch; context number n is the same whatever `count` is.

    Raises ValueError where `size` does not divide `count`, or there is no second image to ask about.
    """
    if images < 2:
        raise ValueError(f"images: got {images}, expected at least 2; a dialogue asks about two of them")
    if count % size:
        raise ValueError(f"contexts: got {count}, expected a multiple of the batch of {size}")
    drawn = [_drawn(images, [seed, number], split) for number in range(count)]
    return [_batch(loaded, drawn[start : start + size]) for start in range(0, count, size)]


def prompts(loaded: Loaded, images: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of training images, each alone, to calibrate with: the kinds of questions that are asked, in turn."""
    drawn = [_drawn(images, [seed, number], "train") for number in range(count)]
    kinds = (FIRST, "cell", "count", "needle")
    texts = [f"{each.shown} {each.asked[kinds[number % len(kinds)]][0]}" for number, each in enumerate(drawn)]
    return [batch_inputs(loaded, [text], [each.images]) for text, each in zip(texts, drawn, strict=True)]


@dataclass(frozen=True)
class _Drawn:
    shown: str
    images: list[Any]
    asked: dict[str, tuple[str, str]]


def _drawn(images: int, seed: list[int], split: digits.Split) -> _Drawn:
    rng = np.random.default_rng(seed)
    pixels, labels = digits.sample_grids(rng, images, split)
    marked = int(rng.integers(images))
    digits.mark(pixels[marked])
    names = [digits.image_name(index) for index in range(images)]
    first, second, third, fourth = (int(each) for each in rng.permutation(np.arange(max(images, 4)) % images)[:4])
    if second == first:
        second = (first + 1) % images
    asked = {
        FIRST: digits.ask("read", labels, first, names[first], rng),
        "dialogue": digits.ask("read", labels, second, names[second], rng),
        "cell": digits.ask("cell", labels, third, names[third], rng),
        "count": digits.ask("count", labels, fourth, names[fourth], rng),
        "needle": digits.ask("locate", labels, marked, names[marked], rng),
        LONG: digits.listing(labels, names, LONG_TOKENS),
    }
    return _Drawn(digits.images_text(names), [digits.to_image(each) for each in pixels], asked)


def _batch(loaded: Loaded, drawn: list[_Drawn]) -> Contexts:
    prompts = [f"{each.shown} {each.asked[FIRST][0]}" for each in drawn]
    inputs = batch_inputs(loaded, prompts, [each.images for each in drawn])
    # No prompt is padded: all are equally long.
    inputs.pop("attention_mask", None)
    turns = {}
    for task in TASKS:
        questions, answers = zip(*(each.asked[task] for each in drawn), strict=True)
        if task == FIRST:
            questions = ("",) * len(drawn)
        else:
            questions = tuple(f"{digits.END_TOKEN} {each}" for each in questions)
        turns[task] = Turn(_ids(loaded, questions), _ids(loaded, answers))
    embedded, vision = _embedded(loaded.model, inputs)
    given, after = {"inputs_embeds": embedded}, None
    if "image_grid_thw" in inputs:
        # As `generate` does it; in `forward` it would break the graph.
        given["position_ids"], behind = loaded.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        after = int(behind[0])
    return Contexts(given, vision, turns, after)


@torch.no_grad()
def _embedded(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the decoder reads `[B, T, C]`, and which tokens are of images, bool `[B, T]`."""
    ids = inputs["input_ids"]
    pixels = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    words = model.get_input_embeddings()(ids)
    features = torch.cat(list(model.model.get_image_features(**pixels, return_dict=True).pooler_output))
    vision = hf.image_positions(model, ids)
    return words.masked_scatter(vision[:, :, None].expand_as(words), features.to(words.dtype)), vision


def _ids(loaded: Loaded, texts: tuple[str, ...]) -> Tensor:
    words = [loaded.tokenizer.convert_tokens_to_ids(text.split()) for text in texts]
    return torch.tensor(words, dtype=torch.int64, device=loaded.model.device).view(len(texts), -1)
