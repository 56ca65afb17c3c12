"""What a server grants: one place for every bound."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server.

    Attributes:
        batch: the most prompts that are generated for at once; fewer where their bytes do not fit.
        memory: bytes for the model, its activations and all caches.
        prefixes: bytes of that for packed prompts that are kept to be continued, 0 to keep none.
        queue: requests that may wait; one more is refused with status 429.
        waiting: bytes of prepared images that may wait.
        new_tokens: the longest answer; an answer is as long as the request says, and no longer than this.
        seconds: from a request's arrival to the end of its answer.
        body: bytes of a request.
    """

    batch: int
    memory: int
    prefixes: int
    queue: int = 64
    waiting: int = 2**30
    new_tokens: int = 512
    seconds: float = 300.0
    body: int = 64 * 2**20
