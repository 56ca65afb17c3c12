"""What is read of a request, and what is refused."""

import pytest
from pydantic import ValidationError

from attnpack_serve.chat import ChatRequest
from attnpack_serve.job import Sampling

USER = {"role": "user", "content": "What is this?"}


def asked(**given) -> ChatRequest:
    return ChatRequest(**{"model": "digits", "messages": [USER], **given})


def test_images_and_texts_go_to_the_template_in_their_order():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}}
    short = {"type": "image_url", "image_url": "data:image/png;base64,BB"}
    content = [image, {"type": "text", "text": "this"}, short]
    request = asked(messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}])
    assert request.image_urls() == ["data:image/png;base64,AA", "data:image/png;base64,BB"]
    assert request.for_template() == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "this"}, {"type": "image"}]},
    ]


def test_how_tokens_are_chosen():
    assert asked(seed=3).sampling() == Sampling()  # greedy: nothing is drawn
    assert asked(temperature=0.7, top_p=0.9, seed=3).sampling() == Sampling(0.7, 0.9, 3)
    assert asked().new_tokens(64) == 64 and asked(max_tokens=8).new_tokens(64) == 8
    assert asked(max_tokens=8, max_completion_tokens=4).new_tokens(64) == 4
    assert asked(max_tokens=1000).new_tokens(64) == 64
    assert asked(stop="a").stops() == ("a",) and asked(stop=["a", "b"]).stops() == ("a", "b") and asked().stops() == ()


def test_what_would_change_the_answer_is_named_and_other_fields_are_let_through():
    assert asked(n=2, logprobs=True, tools=[{}], user="me", store=False).unsupported() == ["n", "logprobs", "tools"]
    assert asked(n=1, logprobs=False, tools=[], presence_penalty=0, response_format=None).unsupported() == []


@pytest.mark.parametrize(
    "given",
    [
        {"messages": []},
        {"messages": [{"role": "robot", "content": ""}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "image_url": "data:,"}]}]},
        {"max_tokens": 0},
        {"temperature": 3},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": [""]},
        {"stream": "perhaps"},
        {"seed": 2**64},
    ],
)
def test_what_is_refused(given):
    with pytest.raises(ValidationError):
        asked(**given)
