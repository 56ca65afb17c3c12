"""From messages and images to what a model's `generate` takes."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnpack_fx.demo.load import Loaded, batch_inputs

if TYPE_CHECKING:
    from PIL.Image import Image


class BadPromptError(ValueError):
    """Messages that the model's template or processor refuses."""


#: Characters of a token, at most on average: text beyond is too long whatever the tokenizer makes of it.
_CHARACTERS = 64


class Prompts:
    """The chat template and the processor of a model, for one caller at a time: tokenizers are not for several.

    Args:
        loaded: the model and its processor.

    Raises:
        BadPromptError: for a model without a chat template.
    """

    def __init__(self, loaded: Loaded) -> None:
        if getattr(loaded.processor, "chat_template", None) is None:
            raise BadPromptError(f"{loaded.name} has no chat template; serve a model that was tuned to chat")
        self._loaded = loaded
        context = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self._most = None if context is None else _CHARACTERS * context
        self._alone = threading.Lock()

    def prepare(self, messages: Sequence[dict[str, Any]], images: Sequence["Image"]) -> dict[str, Tensor]:
        """Return the inputs of one prompt, tensors with a batch of one on the CPU, where they wait.

        Args:
            messages: as chat templates take them.
            images: those that the messages speak of, in their order.

        Raises:
            BadPromptError: for what the template or the processor refuses, and images for a model that takes none.
        """
        if images and not self._loaded.vision:
            raise BadPromptError("the model takes text only; leave the images out")
        length = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        if self._most is not None and length > self._most:
            raise BadPromptError(f"got {length:,} characters, expected at most {self._most:,}: send a shorter prompt")
        from jinja2.exceptions import TemplateError

        from attnpack_cli.errors import UserError

        with self._alone:
            try:
                text = self._loaded.processor.apply_chat_template(
                    self._of_template(messages), tokenize=False, add_generation_prompt=True
                )
                if self._loaded.vision:
                    return batch_inputs(self._loaded, [text], [images], device="cpu")
                return dict(self._loaded.processor(text, return_tensors="pt", add_special_tokens=False))
            except (UserError, TemplateError) as error:
                raise BadPromptError(str(error)) from error

    def _of_template(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Templates of models without vision know texts alone."""
        if self._loaded.vision:
            return list(messages)
        return [each | {"content": "".join(part["text"] for part in each["content"])} for each in messages]
