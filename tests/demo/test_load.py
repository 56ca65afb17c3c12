"""Prompts become inputs the model takes, with one image token group for each image."""

from types import SimpleNamespace

import pytest
from PIL import Image

from attnpack_cli.errors import UserError
from attnpack_fx import hf
from attnpack_fx.demo.load import Loaded, _templated, load, model_inputs, open_images
from tests.demo.models import loaded_trained, save_text_model


@pytest.fixture(scope="module")
def digits() -> Loaded:
    return loaded_trained()


def test_the_chat_template_places_every_image(digits):
    inputs = model_inputs(digits, "read image #2", [Image.new("RGB", (64, 64))] * 2)
    assert inputs["pixel_values"].shape == (2, 3, 64, 64)
    assert int(hf.image_positions(digits.model, inputs["input_ids"]).sum()) == 2 * 64
    text = digits.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True)
    assert text.endswith("question : read image #2 answer :")


def test_a_prompt_without_images(digits):
    inputs = model_inputs(digits, "read image #1", [])
    assert "pixel_values" not in inputs
    assert not hf.image_positions(digits.model, inputs["input_ids"]).any()


@pytest.mark.parametrize(
    ("prompt", "images", "text"),
    [
        ("what?", 0, "what?"),
        ("what?", 2, "<image>\n<image>\nwhat?"),
        ("<image> what?", 1, "<image> what?"),
        ("<image> what?", 2, "<image>\n<image> what?"),
    ],
)
def test_without_a_template_missing_image_tokens_are_put_first(prompt, images, text):
    processor = SimpleNamespace(image_token="<image>", chat_template=None)
    assert _templated(Loaded("plain", None, processor, True), prompt, images) == text


def test_a_processor_that_refuses_is_the_users_affair(digits):
    with pytest.raises(UserError, match="the processor of"):
        model_inputs(digits, "<image> <image> what?", [Image.new("RGB", (64, 64))])


def test_a_text_model_is_loaded_with_its_tokenizer(tmp_path):
    loaded = load(save_text_model(tmp_path), "bfloat16")
    assert not loaded.vision and str(loaded.model.dtype) == "torch.bfloat16"
    assert model_inputs(loaded, "a b c", [])["input_ids"].tolist() == [[3, 4, 5]]


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=r"notes\.txt: not a picture"):
        open_images([str(tmp_path / "notes.txt")])
    with pytest.raises(UserError, match="Is a directory"):
        open_images([str(tmp_path)])
