"""The HTTP server: OpenAI's completions and chat, skills by name, metrics, health."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from shoulders import __version__
from shoulders.errors import ShouldersError
from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.serving import replies
from shoulders.serving.answers import Answering, Disconnected, Piece, new_seed
from shoulders.serving.conversation import conversation
from shoulders.serving.engine import Engine
from shoulders.serving.guards import LOG, bearer, handle_errors, status_of, watch_requests
from shoulders.serving.leaving import Leaving
from shoulders.serving.metrics import Metrics
from shoulders.serving.schema import (
    ChatRequest,
    Common,
    CompletionRequest,
    LoadRequest,
    UnloadRequest,
)
from shoulders.serving.skillset import Served, SkillSet

ANSWERS = ("/v1/completions", "/v1/chat/completions")  # what is counted


@dataclass(frozen=True)
class Server:
    """What the endpoints work with.

    Attributes:
        skills: what is served.
        engine: answers.
        metrics: counts.
        api_key: every request but health's needs it; None needs none.
    """

    skills: SkillSet
    engine: Engine
    metrics: Metrics
    api_key: str | None = None


def create_app(server: Server, origins: Sequence[str] = ()) -> FastAPI:
    """Return the application; nothing is global, several may run in one process.

    Pages of `origins` (`https://chat.example`; `*` for all) may ask from browsers (CORS).
    """
    app = FastAPI(title="shoulders", version=__version__, docs_url="/docs", redoc_url=None)

    def authorised(request: Request) -> None:
        came, wanted = bearer(request.headers.get("authorization", "")), server.api_key
        if wanted is not None and not hmac.compare_digest(came or b"", wanted.encode()):
            raise HTTPException(401, "a valid API key is needed: Authorization: Bearer KEY")

    def ended(request: Request, status: int) -> None:
        if status != 200 and request.url.path in ANSWERS:
            server.metrics.failed(getattr(request.state, "skill", ""), status)

    guarded = [Depends(authorised)]
    handle_errors(app)
    watch_requests(app, authorised, ended)
    if origins:  # around all else: a browser asks first, without the key
        app.add_middleware(CORSMiddleware, allow_origins=[*origins], allow_headers=["*"],
                           allow_methods=["GET", "POST"])  # fmt: skip

    @app.get("/health")
    def health() -> dict[str, str]:
        """Tell that the process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    def ready() -> dict[str, Any]:
        """Tell that skills are loaded and the engine takes requests."""
        if not server.engine.healthy():
            raise HTTPException(503, "the vLLM server is not ready")
        return {"status": "ready", "models": len(server.skills.names())}

    @app.get("/metrics", dependencies=guarded)
    def metrics() -> Response:
        """Return Prometheus metrics."""
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=guarded)
    def models() -> dict[str, Any]:
        """List the LM and its skills."""
        return {"object": "list", "data": [_model(server, one) for one in server.skills.every()]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    def model(name: str) -> dict[str, Any]:
        """Describe one of them."""
        return _model(server, server.skills.get(name))

    @app.post("/v1/completions", dependencies=guarded, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        """Answer prompts: a skill's inputs, or plain text for the LM itself."""
        served = _asked(server, request, body)
        top = body.logprobs or 0
        # OpenAI's 0 asks for the chosen tokens' own: noted beside one alternative.
        decoding = body.decoding(body.max_tokens, max(1, top) if body.logprobs is not None else 0,
                                 new_seed())  # fmt: skip
        inputs: list[tuple[str, list[int] | None]] = [(text, None) for text in body.prompts]
        form = Form("cmpl", replies.completion_reply, body.logprobs)
        return await _answer(server, request, body, served, inputs, decoding, form)

    @app.post("/v1/chat/completions", dependencies=guarded, response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation: through the LM's chat template, or a skill's own format."""
        served = _asked(server, request, body)
        top = max(1, body.top_logprobs or 0) if body.logprobs else 0
        decoding = body.decoding(body.most, top, new_seed())
        # Long ones take their time, in which others are to be answered.
        inputs = [await asyncio.to_thread(conversation, server.skills.lm, served, body)]
        form = Form(
            "chatcmpl", replies.chat_reply, body.top_logprobs or 0 if body.logprobs else None
        )
        return await _answer(server, request, body, served, inputs, decoding, form)

    @app.post("/v1/load_adapter", dependencies=guarded)
    def load_adapter(body: LoadRequest) -> dict[str, Any]:
        """Serve a further skill of the server's skill folder."""
        _managed(server)
        return _model(server, server.skills.load_inside(body.name, body.path))

    @app.post("/v1/unload_adapter", dependencies=guarded)
    def unload_adapter(body: UnloadRequest) -> dict[str, str]:
        """Stop serving a skill."""
        _managed(server)
        server.skills.unload(body.name)
        return {"status": "unloaded", "name": body.name}

    return app


@dataclass(frozen=True, slots=True)
class Form:
    """How an endpoint words its answers; with `top` alternatives of every token, unless None."""

    kind: str
    reply: Callable[..., dict[str, Any]]
    top: int | None


class Streamed(StreamingResponse):
    """Server-sent events; however the connection ends, the work for it ends too.

    A client may leave while an event is being sent: the events' generator then waits for the
    garbage collector, which may be long in coming.
    """

    def __init__(self, events: AsyncIterator[str], answering: Answering) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answering.cancel()


async def _answer(
    server: Server,
    request: Request,
    body: Common,
    served: Served,
    inputs: Sequence[tuple[str, list[int] | None]],
    decoding: DecodingConfig,
    form: Form,
) -> Any:
    seeded = body.seed is not None
    answering = Answering(server.engine, served, inputs, decoding, body.timeout, seeded=seeded)
    frame = replies.frame_of(form.kind, request.state.id, served.name)
    with Leaving(request) as gone:
        if body.stream:
            # What is refused before the first piece is refused with its own status.
            pieces = answering.pieces(gone)
            first = await anext(pieces)
            events = _stream(server, body, served, answering, first, pieces, frame, form)
            return Streamed(events, answering)
        found = await answering.completions(gone)
    count(server, served, answering, found)
    # Long ones take their time, in which others are to be answered.
    reply = await asyncio.to_thread(form.reply, server.skills.lm, frame, found, top=form.top)
    reply["usage"] = replies.usage(answering.prompt_tokens, found)
    if body.details:
        reply["details"] = answering.details
    return JSONResponse(reply)


async def _stream(
    server: Server,
    body: Common,
    served: Served,
    answering: Answering,
    first: Piece,
    pieces: AsyncGenerator[Piece, None],
    frame: dict[str, Any],
    form: Form,
) -> AsyncIterator[str]:
    """Yield server-sent events; an error after the first byte is an event of its own."""
    chat = form.kind == "chatcmpl"
    kind = {"object": "chat.completion.chunk" if chat else "text_completion"}
    found: list[Completion] = []
    begun: set[int] = set()
    try:
        async for piece in _from(first, pieces):
            finish = piece.completion.finish if piece.completion else None
            choice: dict[str, Any] = {"index": piece.index, "finish_reason": finish}
            if chat:
                role = {} if piece.index in begun else {"role": "assistant"}
                begun.add(piece.index)
                choice["delta"] = {**role, "content": piece.text}
            else:
                choice["text"] = piece.text
            if piece.completion is not None:
                found.append(piece.completion)
                if form.top is not None:
                    of = replies.chat_logprobs if chat else replies.completion_logprobs
                    lm, ended = server.skills.lm, piece.completion
                    choice["logprobs"] = await asyncio.to_thread(of, lm, ended, form.top)
            yield replies.event({**frame, **kind, "choices": [choice]})
    except Exception as error:
        status, name = status_of(error)
        server.metrics.failed(served.name, status)
        if isinstance(error, Disconnected):
            return
        if status == 500:
            LOG.exception("internal error")
        message = str(error) if isinstance(error, ShouldersError) else "internal error"
        yield replies.event(replies.error_body(message, name, status))
        return
    count(server, served, answering, found)
    if body.details:
        yield replies.event({**frame, **kind, "choices": [], "details": answering.details})
    if body.stream_options is not None and body.stream_options.include_usage:
        total = replies.usage(answering.prompt_tokens, found)
        yield replies.event({**frame, **kind, "choices": [], "usage": total})
    yield "data: [DONE]\n\n"


async def _from(first: Piece, pieces: AsyncGenerator[Piece, None]) -> AsyncIterator[Piece]:
    yield first
    async for piece in pieces:
        yield piece


def count(
    server: Server, served: Served, answering: Answering, found: Sequence[Completion]
) -> None:
    """Count an answered request in the server's metrics."""
    metrics, now = server.metrics, time.monotonic()
    metrics.prompt_tokens.labels(served.name).inc(answering.prompt_tokens)
    metrics.new_tokens.labels(served.name).inc(sum(len(c.token_ids) for c in found))
    metrics.seconds.labels(served.name).observe(now - answering.started)
    if answering.first is not None:
        metrics.first_token.labels(served.name).observe(answering.first - answering.started)
    metrics.requests.labels(served.name, "200").inc()


def _asked(server: Server, request: Request, body: Common) -> Served:
    """Return the skill that is asked, and note it for the metrics."""
    served = server.skills.get(body.model)
    request.state.skill = served.name
    return served


def _model(server: Server, served: Served) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "shoulders",
        "root": server.skills.names()[0],
        "trained_parameters": served.trained_parameters,
    }


def _managed(server: Server) -> None:
    if server.skills.root is None or server.api_key is None:
        raise HTTPException(
            403, "skill management is off: start with --skill-root DIR and --api-key-file FILE"
        )
