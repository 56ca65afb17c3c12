"""Text of an answer, printed as its tokens come."""

from typing import Any

import torch


class Printed:
    """Prints what tokens add to the text of those before.

    Told that an answer `begins` again, it prints the same text no second time.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._text = tokenizer, ""

    def begins(self) -> None:
        self.tokens = []

    def __call__(self, new: torch.Tensor) -> None:
        """new: the next token of every sample, `[B]`; the first sample's is printed."""
        self.tokens.append(int(new[0]))
        text = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
        # A character may take several tokens: until they are there, it decodes to a replacement character.
        if len(text) > len(self._text) and not text.endswith("\ufffd"):
            print(text[len(self._text) :], end="", flush=True)
            self._text = text
