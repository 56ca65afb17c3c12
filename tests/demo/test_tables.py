"""What is printed holds the numbers it was made from."""

from dataclasses import replace

import pytest
import torch

from attnpack_fx.demo.generation import DENSE, INDUCTOR, PACKED, Run
from attnpack_fx.demo.tables import (
    Example,
    Score,
    Speed,
    ahead,
    example_text,
    found_text,
    layers_table,
    rate,
    ratio,
    scores_table,
    scores_text,
    section,
    size,
    speed_table,
    speed_text,
    table,
)
from attnpack_fx.explain import Report

SCORE = Score("read", 4, 8, dense=0.875, packed=0.75, dense_bytes=3_000_000, packed_bytes=500_000)
FOUND = Report(
    {
        "policy": {"vision_rank": [32, 16], "text_rank": None},
        "layers": [
            {
                "layer": 0,
                "tokens": {"vision": 256, "dense": 20},
                "key_rank": {"vision": 32},
                "value_rank": {"vision": 16},
                "key_error": 0.1234,
                "value_error": 0.01,
                "bytes": 1000,
                "dense_bytes": 4000,
            },
            {
                "layer": 1,
                "tokens": {"dense": 20},
                "key_rank": {},
                "value_rank": {},
                "key_error": None,
                "value_error": None,
                "bytes": 4000,
                "dense_bytes": 4000,
            },
        ],
        "fastest": [
            {"policy": {"vision_rank": [40, 16], "text_rank": None}, "milliseconds": 1.5},
            {"policy": {"vision_rank": [32, 16], "text_rank": None}, "milliseconds": 2.0},
            {"policy": None, "milliseconds": 2.5},
        ],
    }
)


def speed() -> Speed:
    def run(seconds: float, held: int) -> Run:
        return Run(torch.zeros(2, 3, dtype=torch.long), 1.5, [seconds, seconds], [held, held, held])

    runs = {DENSE: run(0.5, 6000), INDUCTOR: run(0.25, 6000), PACKED: run(0.1, 1500)}
    return Speed.of(runs, 4, {"input_ids": torch.zeros(2, 276)})


def cells(text: str) -> list[list[str]]:
    """The rows below the rule, cut where two or more blanks stand."""
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()[2:]]


def test_columns_stand_below_their_headers():
    text = table(["name", "n"], [["a", "1000"], ["longer name", "2"]])
    assert text.splitlines() == [
        "  name            n",
        "  -----------  ----",
        "  a            1000",
        "  longer name     2",
    ]


def test_speeds():
    assert speed().new_tokens == 3 and speed().prompt_tokens == 276 and speed().batch == 2
    dense, inductor, packed = cells(speed_table([speed()]))
    assert dense == [DENSE, "4", "2", "276", "3", "1.50 s", "4.0", "6 kB", "1.00x"]
    assert inductor[6] == "8.0"
    assert packed == [PACKED, "4", "2", "276", "3", "1.50 s", "20", "1.5 kB", "4.00x"]


def test_what_is_ahead_is_said_for_every_number_of_images():
    slower = replace(speed(), images=1, tokens_per_second={DENSE: 4.0, INDUCTOR: 8.0, PACKED: 7.9})
    assert ahead([slower, speed(), replace(speed(), images=16)]) == (
        f"  Ahead, by images in a prompt: {INDUCTOR}, at 1; {PACKED}, at 4, 16."
    )


def test_scores_stand_beside_the_speed_at_their_number_of_images():
    (row,) = cells(scores_table([SCORE], [speed()]))
    assert row == ["read", "4", "8", "87.5%", "75.0%", "3 MB", "500 kB", "6.00x", "4.0", "20"]
    (row,) = cells(scores_table([SCORE], []))
    assert row[-2:] == ["-", "-"]


def test_layers():
    packed, dense = cells(layers_table(FOUND))
    assert packed == ["0", "256 vision, 20 dense", "vision 32/16", "12.34%", "1.00%", "4 kB", "1 kB", "4.00x"]
    assert dense == ["1", "20 dense", "-", "-", "-", "4 kB", "4 kB", "1.00x"]


def test_an_example_without_a_known_answer_shows_none():
    lines = example_text(Example("what?", "dense answer", "packed answer")).splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [
        ["question", "what?"],
        ["dense", "dense answer"],
        ["packed", "packed answer"],
    ]
    assert "packed" not in example_text(Example("what?", "7", None, "7"))
    assert "right     7" in example_text(Example("what?", "7", "7", "7"))


def test_sections_have_titles():
    assert section("Answers", "none") == "Answers\n\nnone"
    assert scores_text([SCORE], []).startswith("Accuracy and memory") and "87.5%" in scores_text([SCORE], [])
    assert speed_text([speed()]).startswith("Speed (tokens/s") and "Ahead" in speed_text([speed()])
    text = found_text(FOUND)
    assert "vision rank 32 for keys and 16 for values" in text and "12.34%" in text
    assert "1.500 ms  vision_rank=(40, 16)" in text and "2.000 ms  this policy" in text
    assert "2.500 ms  dense keys and values" in text
    assert "Attention alone" not in found_text(Report({**FOUND, "fastest": []}))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (142_080_000, "142 MB"), (3.5e9, "3.5 GB")],
)
def test_sizes(count, text):
    assert size(count) == text


def test_ratio_and_rate():
    assert ratio(10, 4) == "2.50x" and ratio(10, 0) == "-"
    assert rate(1234.5) == "1,234" and rate(2.34) == "2.3" and rate(0.0) == rate(None) == "-"
