"""Tests of the digit questions and of the trained model that answers them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

from attnpack_fx.demo import digits

ASSET = Path(__file__).resolve().parents[2] / "benchmarks" / "assets" / "digits-llava"
TOKENS_PER_IMAGE = 64


@pytest.fixture(scope="module")
def processor():
    """The processor of the committed model."""
    return AutoProcessor.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def model():
    """The committed model in float32."""
    return LlavaForConditionalGeneration.from_pretrained(ASSET, dtype=torch.float32).eval()


def reply(model, processor, question: digits.Question, prompt: str | None = None) -> str:
    """The model's greedy answer to one question."""
    inputs = processor(
        images=[list(question.images)], text=[prompt or question.prompt], return_tensors="pt", padding=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_split_is_disjoint_and_complete():
    """No digit sample is in both splits, and none is lost."""
    indices = digits.split_indices()
    train, held_out = set(indices["train"].tolist()), set(indices["held_out"].tolist())
    assert not train & held_out
    assert train | held_out == set(range(1797))
    assert len(held_out) == pytest.approx(digits.HELD_OUT_SHARE * 1797, abs=5)


def test_splits_share_no_picture():
    """Apart from being other samples, held-out digits also look different from every training digit."""
    train, _ = digits.load_split("train")
    held_out, _ = digits.load_split("held_out")
    seen = {glyph.tobytes() for glyph in train}
    assert not any(glyph.tobytes() in seen for glyph in held_out)


def test_every_class_is_held_out():
    """The split is stratified."""
    _, labels = digits.load_split("held_out")
    assert np.bincount(labels, minlength=10).min() >= 30


def test_split_never_moves():
    """The split the committed model was trained with, pinned by its first samples and their sum."""
    held_out = digits.split_indices()["held_out"]
    assert held_out[:5].tolist() == [1, 3, 5, 12, 14]
    assert int(held_out.sum()) == 319076


def test_drawing_keeps_grid_order():
    """Without distortion, each cell of an image shows its digit's sample."""
    still = digits.Augmentation(0, 0, 0, 0, 0, 0, 0, 0)
    pixels, labels = digits.sample_grids(np.random.default_rng(0), 6, "held_out", still)
    glyphs, classes = digits.load_split("held_out")
    drawn = digits.draw_cells(glyphs, np.random.default_rng(0), still)
    drawn = np.rint(drawn * 255).astype(np.uint8)
    for picture, row in zip(pixels, labels, strict=True):
        for cell, label in enumerate(row):
            top, left = cell // digits.COLUMNS * 32, cell % digits.COLUMNS * 16
            patch = picture[top : top + 32, left : left + 16]
            match = np.flatnonzero((drawn == patch).all(axis=(1, 2)))
            assert label in classes[match]


@pytest.mark.parametrize("images", [1, 4, 16])
@pytest.mark.parametrize("task", digits.TASKS)
def test_question_is_well_formed(task, images):
    """A prompt has one placeholder per image, and all of its words are in the vocabulary."""
    words = {*digits.vocabulary(), digits.IMAGE_TOKEN}
    for question in digits.held_out_questions(task, images, 3, seed=5):
        assert question.task == task
        assert len(question.images) == images
        assert all(image.size == (64, 64) and image.mode == "RGB" for image in question.images)
        assert question.prompt.split().count(digits.IMAGE_TOKEN) == images
        assert set(question.prompt.split()) | set(question.answer.split()) <= words
        assert digits.score(question, question.answer) == 1.0


def test_answers_match_the_labels():
    """Every task's answer follows from the digits and the words of the question."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 10, size=(5, digits.CELLS))
    for _ in range(50):
        target = int(rng.integers(5))
        name, row = digits.image_name(target), labels[target]
        text, answer = digits.ask("read", labels, target, name, rng)
        assert answer.split() == [str(digit) for digit in row] and name in text.split()
        text, answer = digits.ask("cell", labels, target, name, rng)
        place = [word for word in text.split() if word[0] in "rc" and word[1:].isdigit()]
        cell = (int(place[0][1]) - 1) * digits.COLUMNS + int(place[1][1]) - 1
        assert answer == str(row[cell]) and name in text.split()
        text, answer = digits.ask("count", labels, target, name, rng)
        digit = int(text.split()[text.split().index("digit") + 1])
        assert answer.split() == [*(str(each) for each in row), "count", str(int((row == digit).sum()))]
        assert name in text.split()
        text, answer = digits.ask("locate", labels, target, name, rng)
        assert answer.split() == ["image", name, ":", *(str(each) for each in row)]
        assert name not in text.split()


def test_the_image_to_locate_is_marked_and_no_other():
    """A white line below the digits, in the picture that the answer names."""
    for question in digits.held_out_questions("locate", 5, 4, seed=2):
        lines = [bool((np.array(image)[-digits.MARK_HEIGHT :] == 255).all()) for image in question.images]
        assert lines == [digits.image_name(index) == question.answer.split()[1] for index in range(5)]


def test_a_listing_goes_round():
    """All images in order, as often as it takes."""
    labels = np.arange(16).reshape(2, digits.CELLS) % 10
    text, answer = digits.listing(labels, ["#1", "#2"], 30)
    once = ["image", "#1", ":", *"01234567", "image", "#2", ":", *"89012345"]
    assert text == "question : read answer :" and answer.split() == (once + once)[:30]
    assert set(text.split()) | set(answer.split()) <= set(digits.vocabulary())


def test_questions_repeat_under_a_seed():
    """The same seed gives the same questions, another seed others."""
    first = digits.held_out_questions("read", 2, 4, seed=7)
    again = digits.held_out_questions("read", 2, 4, seed=7)
    other = digits.held_out_questions("read", 2, 4, seed=8)
    for one, two in zip(first, again, strict=True):
        assert (one.prompt, one.answer) == (two.prompt, two.answer)
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in two.images]
    assert [question.answer for question in first] != [question.answer for question in other]


def test_train_questions_differ_from_held_out_ones():
    """The split is respected by the questions."""
    train = digits.held_out_questions("read", 1, 3, seed=7, split="train")
    held_out = digits.held_out_questions("read", 1, 3, seed=7)
    pairs = zip(train, held_out, strict=True)
    assert all(one.images[0].tobytes() != two.images[0].tobytes() for one, two in pairs)


def test_conversations_ask_about_two_images():
    """The second question of a pair is about another image of the same prompt."""
    for opening, second in digits.held_out_conversations(3, 5, seed=0):
        assert opening.images == second.images
        assert opening.prompt.split()[-3] != second.prompt.split()[-3]
        prompt = digits.follow_up_prompt(opening, opening.answer, second)
        assert prompt.startswith(opening.prompt) and prompt.endswith(second.prompt)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sum", 1, 1, 0), "task"),
        (("read", 0, 1, 0), "images"),
        (("read", 17, 1, 0), "images"),
        (("read", 1, -1, 0), "count"),
        (("read", 1, 1, 0, "test"), "split"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    """Wrong arguments raise `ValueError` and name what is wrong."""
    with pytest.raises(ValueError, match=message):
        digits.held_out_questions(*arguments)


def test_conversation_needs_two_images():
    """One image is not enough for two."""
    with pytest.raises(ValueError, match="two images"):
        digits.held_out_conversations(1, 1, seed=0)


def test_question_is_immutable():
    """A question cannot be changed by accident."""
    question = digits.held_out_questions("cell", 1, 1, seed=0)[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        question.answer = "0"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 2 3 4 5 6 7 8", 1.0),
        ("1 2 3 4 0 0 0 0", 0.5),
        ("1 2 3 4", 0.5),
        ("1 2 3 4 5 6 7 8 9", 1.0),
        ("", 0.0),
        ("2 3 4 5 6 7 8 1", 0.0),
    ],
)
def test_score_of_read(text, expected):
    """Reading is graded position by position."""
    assert digits.score(digits.Question("read", (), "", "1 2 3 4 5 6 7 8"), text) == expected


def test_score_of_the_other_tasks():
    """The other tasks are right or wrong."""
    assert digits.score(digits.Question("locate", (), "", "image #3 : 1"), " image #3 : 1 ") == 1.0
    assert digits.score(digits.Question("locate", (), "", "image #3 : 1"), "image #13 : 1") == 0.0
    assert digits.score(digits.Question("cell", (), "", "5"), "5 5") == 0.0


def test_tokenizer_round_trip():
    """All words are single tokens, and text comes back as it went in."""
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    assert tokenizer.padding_side == "left"
    question = digits.held_out_questions("locate", 2, 1, seed=0)[0]
    ids = tokenizer(question.prompt)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and len(ids) == len(question.prompt.split()) + 1
    assert tokenizer.unk_token_id not in tokenizer(" ".join(digits.vocabulary()))["input_ids"]
    assert tokenizer.decode(ids[1:]) == question.prompt


def test_image_processor_keeps_the_pixels(processor):
    """A 64x64 image is neither resized nor cropped."""
    image_processor = processor.image_processor
    question = digits.held_out_questions("read", 1, 1, seed=0)[0]
    values = image_processor(list(question.images), return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 64, 64)
    mean = torch.tensor(image_processor.image_mean)[:, None, None]
    std = torch.tensor(image_processor.image_std)[:, None, None]
    back = (values[0] * std + mean) * 255
    expected = torch.from_numpy(np.array(question.images[0])).permute(2, 0, 1).float()
    torch.testing.assert_close(back, expected, atol=0.01, rtol=0)


def test_processor_expands_and_pads(processor):
    """Each image becomes 64 tokens, and shorter prompts are padded on the left."""
    short = digits.held_out_questions("read", 1, 1, seed=0)[0]
    long = digits.held_out_questions("read", 3, 1, seed=0)[0]
    inputs = processor(
        images=[list(short.images), list(long.images)],
        text=[short.prompt, long.prompt],
        return_tensors="pt",
        padding=True,
    )
    counts = (inputs["input_ids"] == processor.image_token_id).sum(dim=1)
    assert counts.tolist() == [TOKENS_PER_IMAGE, 3 * TOKENS_PER_IMAGE]
    assert inputs["pixel_values"].shape == (4, 3, 64, 64)
    assert inputs["attention_mask"][:, 0].tolist() == [0, 1]
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]


def test_chat_template_gives_the_same_prompt(processor):
    """A chat message with images and a question becomes the prompt of the question."""
    question = digits.held_out_questions("read", 2, 1, seed=0)[0]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "read image #2"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    assert text == f"{digits.images_text(['#1', '#2'])} question : read image #2 answer :"
    assert text.split()[:8] == question.prompt.split()[:8]


def test_auto_model_in_bfloat16():
    """The automatic class finds the model, and the stored weights are bfloat16."""
    model = AutoModelForImageTextToText.from_pretrained(ASSET)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.dtype == torch.bfloat16
    text = model.config.text_config
    assert text.num_key_value_heads == text.num_attention_heads
    assert text.max_position_embeddings >= 2048


@pytest.mark.parametrize("images", [1, 4, 16])
def test_model_reads_held_out_images(model, processor, images):
    """Answers have the right form and most digits are right."""
    questions = digits.held_out_questions("read", images, 3, seed=11)
    texts = [reply(model, processor, question) for question in questions]
    assert all(len(text.split()) == digits.CELLS for text in texts)
    scores = [digits.score(question, text) for question, text in zip(questions, texts, strict=True)]
    assert np.mean(scores) >= 0.8


def test_model_answers_a_second_turn(model, processor):
    """A second question after a first answer works too."""
    opening, second = digits.held_out_conversations(4, 1, seed=1)[0]
    prompt = digits.follow_up_prompt(opening, reply(model, processor, opening), second)
    assert digits.score(second, reply(model, processor, second, prompt)) >= 0.75


def test_left_padding_does_not_change_the_answer(model, processor):
    """A prompt gets the same logits alone and padded in a batch."""
    short = digits.held_out_questions("read", 1, 1, seed=2)[0]
    long = digits.held_out_questions("read", 4, 1, seed=2)[0]
    alone = processor(images=[list(short.images)], text=[short.prompt], return_tensors="pt")
    both = processor(
        images=[list(short.images), list(long.images)],
        text=[short.prompt, long.prompt],
        return_tensors="pt",
        padding=True,
    )
    positions = (both["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        want = model(**alone).logits[0, -1]
        got = model(**both, position_ids=positions).logits[0, -1]
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
