"""Text appears as tokens come, whole characters only, and once."""

import torch

from attnpack_fx.demo.printed import Printed

#: Two tokens make one character.
TEXTS = {
    (): "",
    (1,): " one",
    (1, 2): " one \ufffd",
    (1, 2, 3): " one \u00e9",
    (1, 2, 3, 4): " one \u00e9",
    (5,): "\ufffd",
}


class Tokenizer:
    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return TEXTS[tuple(tokens)]


def test_each_token_adds_its_text(capsys):
    printed = Printed(Tokenizer())
    seen = []
    for token in (1, 2, 3, 4):
        # Of two samples the first is shown.
        printed(torch.tensor([token, 9]))
        seen.append(capsys.readouterr().out)
    assert seen == [" one", "", " \u00e9", ""]
    assert printed.tokens == [1, 2, 3, 4]


def test_an_answer_that_begins_again_is_not_printed_twice(capsys):
    printed = Printed(Tokenizer())
    printed(torch.tensor([1]))
    printed.begins()
    for token in (1, 2, 3):
        printed(torch.tensor([token]))
    assert capsys.readouterr().out == " one \u00e9" and printed.tokens == [1, 2, 3]
