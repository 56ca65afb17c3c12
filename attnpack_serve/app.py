"""The routes of `attnpack serve`."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, StreamingResponse

from attnpack_serve.answers import Answer, abandon_when
from attnpack_serve.chat import ChatRequest
from attnpack_serve.engine import Engine
from attnpack_serve.images import BadImageError, ImageLimits, load_images
from attnpack_serve.job import Job, Used
from attnpack_serve.limits import Limits
from attnpack_serve.metrics import CountStatus, Metrics
from attnpack_serve.page import page
from attnpack_serve.prompts import BadPromptError, Prompts
from attnpack_serve.queue import FullError, TooLargeError
from attnpack_serve.refusals import BodyLimit, KeyRequired, RefusedError, add_refusals

#: Seconds that a client is asked to wait before it tries again.
_RETRY = "2"
#: Requests whose images are decoded at once: each may have several hundred megabytes of them.
_PREPARED = 2


def create_app(
    name: str,
    prompts: Prompts,
    engine: Engine,
    limits: Limits,
    images: ImageLimits,
    *,
    api_key: str | None = None,
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """Return the server of one model, which starts the engine, and stops it when it is shut down.

    Args:
        name: of the model, as clients ask for it.
        prompts: what makes inputs of messages.
        engine: what answers them.
        limits: of requests.
        images: of the images in a request.
        api_key: what clients must send; None lets all in.
        hosts: names under which it may be asked; others are those of pages that would have a browser ask for them.
    """
    metrics = Metrics(engine)
    preparing = asyncio.Semaphore(_PREPARED)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="attnpack serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    add_refusals(app)
    app.add_middleware(BodyLimit, most=limits.body)
    app.add_middleware(KeyRequired, key=api_key)
    app.add_middleware(CountStatus, metrics=metrics)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    @app.get("/")
    async def index() -> Response:
        content, headers = page()
        return Response(content, media_type="text/html", headers=headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        state = {"status": "ok" if engine.alive else "stopped", "waiting": len(engine.queue), "running": engine.running}
        return JSONResponse(state, 200 if engine.alive else 503)

    @app.get("/metrics")
    async def read() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    model = {"id": name, "object": "model", "created": 0, "owned_by": "attnpack"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        _check_name(asked, name)
        return model

    @app.post("/v1/chat/completions")
    async def complete(asked: ChatRequest, http: Request) -> Response:
        arrived = time.monotonic()
        _check(asked, name)
        answer = Answer(name)
        job = await _job(asked, answer, arrived, http)

        def ended(used: Used) -> None:
            metrics.answer(used, time.monotonic() - arrived)

        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_streamed(answer, job, usage, ended), media_type="text/event-stream")
        watching = asyncio.create_task(abandon_when(http.is_disconnected, job))
        try:
            response, used = await answer.whole()
        finally:
            watching.cancel()
            job.cancelled = True
        ended(used)
        return JSONResponse(response)

    async def _job(asked: ChatRequest, answer: Answer, arrived: float, http: Request) -> Job:
        try:
            with engine.queue.coming():
                async with asyncio.timeout(arrived + limits.seconds - time.monotonic()), preparing:
                    if await http.is_disconnected():
                        raise RefusedError(499, "the client went away before its images were read")
                    pictures = await load_images(asked.image_urls(), images)
                    inputs = await asyncio.to_thread(prompts.prepare, asked.for_template(), pictures)
                    del pictures
            job = Job(
                inputs=inputs,
                sampling=asked.sampling(),
                new_tokens=asked.new_tokens(limits.new_tokens),
                stop=asked.stops(),
                deadline=arrived + limits.seconds,
                tell=answer.tell,
                arrived=arrived,
            )
            engine.queue.put(job)
        except TimeoutError as error:
            raise RefusedError(504, f"the images were not read in {limits.seconds:g} seconds") from error
        except (BadImageError, BadPromptError) as error:
            raise RefusedError(400, str(error)) from error
        except TooLargeError as error:
            raise RefusedError(400, str(error), "context_length_exceeded") from error
        except FullError as error:
            raise RefusedError(429, str(error), "queue_full", {"retry-after": _RETRY}) from error
        return job

    return app


def _check_name(asked: str, name: str) -> None:
    if asked != name:
        raise RefusedError(404, f"model: there is no such model here; expected {name!r}", "model_not_found")


def _check(asked: ChatRequest, name: str) -> None:
    _check_name(asked.model, name)
    if found := asked.unsupported():
        raise RefusedError(400, f"{', '.join(found)}: not offered by this server; leave out", "unsupported_parameter")
    if not any(message.role == "user" for message in asked.messages):
        raise RefusedError(400, "messages: got none of the user, expected at least one")


async def _streamed(answer: Answer, job: Job, usage: bool, ended: Any) -> AsyncIterator[str]:
    """The events; a client that goes away ends this, and with it the job."""
    try:
        async for event, used in answer.events(usage):
            if used is not None:
                ended(used)
            yield event
    finally:
        job.cancelled = True
