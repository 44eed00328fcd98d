"""Around every request: errors in OpenAI's words, an id, a cap on its size, a line in the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from shoulders.errors import ArtefactError, ShouldersError
from shoulders.serving import replies
from shoulders.serving.answers import Disconnected, TimedOutError
from shoulders.serving.engine import QueueFullError
from shoulders.serving.skillset import UnknownSkillError
from shoulders.serving.upstream import UpstreamDownError, UpstreamError, UpstreamSlowError

Guard = Callable[[Request], None]
"""Raises an `HTTPException` for a request that may not enter."""

LOG = logging.getLogger("shoulders.serving")
MAX_BODY = 1 << 20  # bytes of a request
MAX_DRAINED = 16 << 20  # bytes of a refused request that are read, and dropped
DRAIN_SECONDS = 5.0  # for all of them
RETRY_AFTER = "2"  # seconds, where the queue is full or vLLM is away
STATUS: list[tuple[type[Exception], int, str]] = [
    (QueueFullError, 429, "rate_limit_exceeded"),
    (UnknownSkillError, 404, "model_not_found"),
    (TimedOutError, 504, "timeout"),
    (Disconnected, 499, "client_closed_request"),
    (UpstreamSlowError, 504, "timeout"),
    (UpstreamDownError, 503, "service_unavailable"),
    (UpstreamError, 502, "bad_gateway"),
    (ShouldersError, 400, "invalid_request_error"),
]


def status_of(error: Exception) -> tuple[int, str]:
    """Return the HTTP status of an error, and its name in replies."""
    return next(
        ((code, name) for kind, code, name in STATUS if isinstance(error, kind)),
        (500, "internal_error"),
    )


def handle_errors(app: FastAPI) -> None:
    """Word every error as OpenAI's clients read it, without paths or traces."""

    def reply(code: int, name: str, message: str) -> JSONResponse:
        headers = {"Retry-After": RETRY_AFTER} if code in (429, 503) else None
        return JSONResponse(replies.error_body(message, name, code), code, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = _of_the_branch_meant(error.errors())
        if first["type"] == "json_invalid":
            said = f"the body is no JSON: {first['ctx']['error']}, at character {first['loc'][-1]}"
        elif first["type"] == "model_attributes_type":
            said = "the body is no JSON object; send one, with Content-Type: application/json"
        else:
            # Of a union each branch has its own name in the place, which is not the client's.
            where = ".".join(str(part) for part in first["loc"][1:] if not _is_branch(part))
            said = f"{where or 'body'}: {first['msg']}"
        return reply(400, "invalid_request_error", said)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return reply(error.status_code, "invalid_request_error", str(error.detail))

    @app.exception_handler(ArtefactError)
    async def damaged(_: Request, error: ArtefactError) -> JSONResponse:
        LOG.warning("skill refused: %s", error)
        return reply(400, "invalid_request_error", "the skill cannot be served: it is damaged, "
                     "missing, or bound to another LM; the server's log says which")  # fmt: skip

    @app.exception_handler(ShouldersError)
    async def known(_: Request, error: ShouldersError) -> JSONResponse:
        code, name = status_of(error)
        return reply(code, name, str(error))

    @app.exception_handler(ValidationError)
    async def unfit(_: Request, error: ValidationError) -> JSONResponse:
        return reply(400, "invalid_request_error", error.errors()[0]["msg"])

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        LOG.exception("internal error", exc_info=error)
        return reply(500, "internal_error", "internal error; the server's log says more")


def _of_the_branch_meant(errors: Sequence[Any]) -> Any:
    """Return the first field's error; of a union, of the branch that came furthest.

    Another branch says no more than that what was sent is of another type.
    """
    field = errors[0]["loc"][:2]
    own = [error for error in errors if error["loc"][:2] == field]
    return max(own, key=lambda e: (len(e["loc"]), not e["type"].endswith("_type")))


def _is_branch(part: str | int) -> bool:
    """Tell whether a part of an error's place names a branch of a union, such as `list[...]`."""
    return isinstance(part, str) and (part == "str" or "[" in part or "-" in part)


def bearer(header: str) -> bytes | None:
    """Return the key of an `Authorization: Bearer` header as it came; None for another one."""
    scheme, _, value = header.partition(" ")
    # What came is bytes, which were read as Latin-1; the key is UTF-8.
    return value.strip().encode("latin-1") if scheme.lower() == "bearer" else None


async def _drain(request: Request) -> None:
    """Read on and drop what a client is still sending, within bounds.

    A socket that is closed with bytes unread is reset, and most clients send all before
    they read: they would see a broken pipe in place of the reason.
    """
    drained = 0
    with contextlib.suppress(TimeoutError, ClientDisconnect):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for part in request.stream():
                drained += len(part)
                if drained > MAX_DRAINED:
                    return


def _needs(app: FastAPI, request: Request, guard: Guard) -> bool:
    """Tell whether the route of a request depends on the guard."""
    return any(
        any(own.dependency is guard for own in route.dependencies)
        for route in app.routes
        if isinstance(route, APIRoute) and route.matches(request.scope)[0] is Match.FULL
    )


def watch_requests(app: FastAPI, guard: Guard, ended: Callable[[Request, int], None]) -> None:
    """Give every request an id, cap its size, ask for its key, and log it as one line of JSON.

    Args:
        app: whose routes depend on `guard` where they need a key.
        guard: raises an `HTTPException` for a request without the key. A route's own dependencies
            come after its body: strangers' bodies would be kept, and parsed.
        ended: told of every request and its status.
    """

    async def refused(request: Request) -> Response | None:
        # Also beside a length, which does not count then: a body in chunks has no end.
        if "transfer-encoding" in request.headers:
            body = replies.error_body("send a Content-Length", "length_required", 411)
            return JSONResponse(body, 411)
        length = request.headers.get("content-length")
        if length is not None and (not length.isdigit() or int(length) > MAX_BODY):
            body = replies.error_body(f"a request may be {MAX_BODY} bytes", "too_large", 413)
            await _drain(request)
            return JSONResponse(body, 413)
        try:
            if _needs(app, request, guard):
                guard(request)
        except HTTPException as error:
            code, said = error.status_code, str(error.detail)
            await _drain(request)
            return JSONResponse(replies.error_body(said, "invalid_request_error", code), code)
        return None

    @app.middleware("http")
    async def watch(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        request.state.id = uuid.uuid4().hex
        started = time.monotonic()
        try:
            response = await refused(request) or await call_next(request)
        except Exception:
            ended(request, 500)
            raise
        ended(request, response.status_code)
        response.headers["X-Request-Id"] = request.state.id
        LOG.info(
            json.dumps(
                {
                    "request": request.state.id,
                    "method": request.method,
                    "path": request.url.path,
                    "status": response.status_code,
                    "seconds": round(time.monotonic() - started, 4),
                }
            )
        )
        return response
