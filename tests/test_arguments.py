"""Arguments that commands share."""

import argparse

import pytest

from attnpack_cli.arguments import add_prompt, add_ranks, ranks_of
from attnpack_fx import PackPolicy


def _parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_prompt(parser)
    add_ranks(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("text", "rank"), [("64", 64), ("64,16", (64, 16)), ("full", "full"), ("full, 8", ("full", 8)), ("none", None)]
)
def test_ranks(text, rank):
    arguments = _parsed("--text-rank", text)
    assert ranks_of(arguments) == {"text_rank": rank}
    assert PackPolicy(**ranks_of(arguments)).text_rank == rank


def test_what_is_not_given_is_left_to_the_policy():
    assert ranks_of(_parsed()) == {}
    assert ranks_of(_parsed("--vision-rank", "8", "--text-rank", "none")) == {"vision_rank": 8, "text_rank": None}
    assert _parsed("--image", "a.png", "--image", "b.png").image == ["a.png", "b.png"]
