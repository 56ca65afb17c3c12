"""Responses that refuse a request, as OpenAI's clients read them, and the bound on a request's size."""

import secrets
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Paths that anybody may ask for.
_OPEN = ("/", "/health")
#: Errors of one request that are told.
_TOLD = 8
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP. message: what was got, what was expected, and the way out; nothing of the request's content.
        code: in OpenAI's words, where there is one. headers: of the response.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Return what an error's response, or an event of a stream, holds."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def add_refusals(app: FastAPI) -> None:
    """Let an app answer errors in OpenAI's form."""

    async def refused(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(body(error.status, error.message, error.code), error.status, error.headers)

    async def other(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(body(error.status_code, str(error.detail)), error.status_code, error.headers)

    async def invalid(_: Request, error: Any) -> JSONResponse:
        # Only where and what: an error's input is the request's content.
        told = [f"{'.'.join(map(str, each['loc'][1:])) or 'body'}: {each['msg']}" for each in error.errors()[:_TOLD]]
        return JSONResponse(body(400, "; ".join(told)), 400)

    async def failed(_: Request, error: Any) -> JSONResponse:
        return JSONResponse(body(500, f"the server raised {type(error).__name__}; its log says where"), 500)

    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(AnyHTTPException, other)
    app.add_exception_handler(RequestValidationError, invalid)


class KeyRequired:
    """Refuses a request without the key before any of its body is read. The page and `/health` need none.

    Args:
        app: what is served.
        key: what clients send; None lets all in.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app, self._key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._key is not None and scope["path"] not in _OPEN:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self._key.encode()):
                told = "got no valid key, expected the header Authorization: Bearer KEY"
                refused = JSONResponse(body(401, told, "invalid_api_key"), 401, {"connection": "close"})
                await refused(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body that is longer than so many bytes, whatever its header says, and reads no more of it.

    Args:
        app: what is served.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._most:
            await self._refuse(scope, receive, send)
            return
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                # FastAPI lets this one through where it reads the body.
                raise HTTPException(413, self._told())
            return message

        await self._app(scope, counted, send)

    def _told(self) -> str:
        return f"got a request of more than {self._most:,} bytes; send fewer or smaller images"

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {"connection": "close"}
        await JSONResponse(body(413, self._told()), 413, headers)(scope, receive, send)
