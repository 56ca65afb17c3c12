"""Requests of OpenAI's chat completions, as far as one model can answer them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, field_validator, model_validator

from attnpack_serve.job import Sampling

#: Messages of a request, and parts of a message: more of either is nobody's conversation.
_MESSAGES, _PARTS = 1024, 256
#: Below it the likeliest token is certain, and dividing by it overflows.
_COLDEST = 1e-3
#: Fields that change the answer, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "audio": (None,),
    "prediction": (None,),
    "response_format": (None, {"type": "text"}),
}


class ImageURL(BaseModel):
    url: str
    detail: str | None = None


class Part(BaseModel):
    """A piece of a message: text or an image."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageURL | None = None

    @field_validator("image_url", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _whole(self) -> "Part":
        if (self.type == "image_url") != (self.image_url is not None):
            raise ValueError("expected image_url in parts of the type image_url, and there alone")
        return self


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=_PARTS)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """What is read of a request; `unsupported` names what else would change the answer."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _few(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and (len(value) > 4 or not all(value)):
            raise ValueError("expected at most 4 texts, none of them empty")
        return value or None

    def unsupported(self) -> list[str]:
        """Return the names of fields that would change the answer, and are not offered."""
        given = self.model_extra or {}
        return [name for name, neutral in _NEUTRAL.items() if given.get(name) not in neutral]

    def new_tokens(self, most: int) -> int:
        """Return how long the answer may be."""
        return min(self.max_completion_tokens or self.max_tokens or most, most)

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self) -> Sampling:
        """Return how tokens are chosen."""
        temperature = self.temperature or 0.0
        if temperature < _COLDEST:
            return Sampling()
        return Sampling(temperature, self.top_p or 1.0, self.seed)

    def image_urls(self) -> list[str]:
        """Return the images of all messages in their order."""
        return [
            part.image_url.url
            for message in self.messages
            if isinstance(message.content, list)
            for part in message.content
            if part.type == "image_url" and part.image_url is not None
        ]

    def for_template(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates of transformers take them."""
        return [{"role": each.role, "content": _content(each.content)} for each in self.messages]


def _content(content: str | list[Part]) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": "image"} if part.image_url else {"type": "text", "text": part.text} for part in content]
