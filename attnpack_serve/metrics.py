"""What Prometheus reads of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attnpack_serve.engine import Engine
from attnpack_serve.job import Used


class Metrics:
    """Counters of requests and answers, and gauges of an engine.

    Args:
        engine: whose queue and prefixes are read when the metrics are.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "attnpack_requests", "Requests by the status of their response", ["status"], registry=self.registry
        )
        self._tokens = Counter("attnpack_tokens", "Tokens by kind", ["kind"], registry=self.registry)
        self._seconds = Histogram(
            "attnpack_request_seconds", "From a request's arrival to the end of its answer", registry=self.registry
        )
        self._bytes = Gauge(
            "attnpack_answer_cache_bytes",
            "Cache of the last answer: packed, and dense",
            ["kind"],
            registry=self.registry,
        )
        self._ratio = Gauge(
            "attnpack_cache_ratio", "Dense bytes over packed ones, of the last answer", registry=self.registry
        )
        self._speed = Gauge("attnpack_tokens_per_second", "Of the last answer", registry=self.registry)
        for name, told, read in (
            ("attnpack_queue", "Requests that wait", lambda: len(engine.queue)),
            ("attnpack_running", "Requests that are answered now", lambda: engine.running),
            ("attnpack_prefixes", "Prompts that are kept", lambda: len(engine.prefixes)),
            ("attnpack_prefix_cache_bytes", "Bytes of the prompts that are kept", lambda: engine.prefixes.nbytes),
        ):
            Gauge(name, told, registry=self.registry).set_function(read)

    def response(self, status: int) -> None:
        """Count a response."""
        self._requests.labels(str(status)).inc()

    def answer(self, used: Used, seconds: float) -> None:
        """Count an answer."""
        self._tokens.labels("prompt").inc(used.prompt_tokens)
        self._tokens.labels("cached").inc(used.cached_tokens)
        self._tokens.labels("completion").inc(used.completion_tokens)
        self._seconds.observe(seconds)
        if used.cache_bytes:
            self._bytes.labels("packed").set(used.cache_bytes)
            self._bytes.labels("dense").set(used.dense_bytes)
            self._ratio.set(used.dense_bytes / used.cache_bytes)
            self._speed.set(used.tokens_per_second)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class CountStatus:
    """Counts every response by its status.

    Args:
        app: what is served.
        metrics: where it is counted.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.response(message["status"])
            await send(message)

        await self._app(scope, receive, sent)
