"""Models, processors and prompts from transformers: the only place of the command line that loads any."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnpack_cli.errors import UserError, require
from attnpack_cli.models import check_ranks

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate.

    name: as the user gave it. model: in eval mode. processor: a transformers processor, or a tokenizer when
    the model has no vision. vision: whether it takes images.
    """

    name: str
    model: Any
    processor: Any
    vision: bool

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def load(name: str, dtype: str = "float32", ranks: Mapping[str, Any] | None = None) -> Loaded:
    """Load a vision-language model with its processor, or a text-only model with its tokenizer.

    name: a folder or a model id of the Hugging Face hub. dtype: torch's name of one. ranks: of a policy, checked when
    the configuration is there, before the weights.

    Raises `UserError` when there is no such model, it cannot have these ranks, or transformers is missing.
    """
    require("transformers", "PIL")
    from safetensors import SafetensorError
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
        AutoTokenizer,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        check_ranks(config.to_dict(), ranks or {})
        vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        models = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model = models.from_pretrained(name, dtype=getattr(torch, dtype)).eval()
        processor = (AutoProcessor if vision else AutoTokenizer).from_pretrained(name)
    # RuntimeError: weights that do not fit the configuration.
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load the model {name!r}: {error}") from error
    return Loaded(name, model, processor, vision)


def open_images(files: Sequence[str]) -> list["Image"]:
    """The pictures in `files` as RGB. Raises `UserError` for a file that is missing or no picture."""
    require("PIL")
    from PIL import Image, UnidentifiedImageError

    images = []
    for file in files:
        try:
            images.append(Image.open(file).convert("RGB"))
        except FileNotFoundError:
            raise UserError(f"--image {file}: no such file") from None
        except UnidentifiedImageError:
            raise UserError(f"--image {file}: not a picture that Pillow can read") from None
        except OSError as error:
            raise UserError(f"--image {file}: {error.strerror or error}") from None
    return images


def model_inputs(loaded: Loaded, prompt: str, images: Sequence["Image"]) -> dict[str, Any]:
    """What to call the model with, for one prompt, put into the chat template if there is one.

    Without a template, the image tokens that `prompt` lacks are put before it. Raises `UserError` for images
    and a model without vision, and for what the processor refuses.
    """
    if images and not loaded.vision:
        raise UserError(f"{loaded.name} takes text only: leave --image out")
    text = _templated(loaded, prompt, len(images))
    if not loaded.vision:
        return dict(loaded.processor(text, return_tensors="pt"))
    return batch_inputs(loaded, [text], [images])


def batch_inputs(
    loaded: Loaded, texts: Sequence[str], images: Sequence[Sequence["Image"]], device: Any = None
) -> dict[str, Any]:
    """Processed prompts of equal length, one sequence of images for each; `texts` hold the image tokens.

    device: where they go, the model's unless given.
    """
    pictures: dict[str, Any] = {"images": [list(group) for group in images]} if any(images) else {}
    try:
        inputs = loaded.processor(text=list(texts), return_tensors="pt", **pictures)
    # StopIteration: more image tokens than images, where the processor does not count them.
    except (ValueError, TypeError, ImportError, StopIteration) as error:
        raise UserError(f"the processor of {loaded.name} refuses this prompt: {error}") from error
    return dict(inputs.to(dtype=loaded.model.dtype, device=device or loaded.model.device))


def _templated(loaded: Loaded, prompt: str, images: int) -> str:
    if getattr(loaded.processor, "chat_template", None) is None:
        token = getattr(loaded.processor, "image_token", None) if images else None
        missing = images - prompt.count(token) if token else 0
        return "".join([f"{token}\n" * missing, prompt])
    content: Any = prompt
    if loaded.vision:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    return loaded.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
