"""The playground's door: who may enter, and a page that is built when somebody first does.

Importing gradio takes seconds and memory; a server that only answers its API never pays for it.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import importlib.util
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
from starlette.routing import Mount

from shoulders.errors import install
from shoulders.serving.api import Server
from shoulders.serving.guards import bearer

PATH = "/playground"
MISSING = f"The playground needs gradio: {install('playground')}, then start again.\n"
LOOK = 0.2  # seconds between two looks whether the server is told to stop

# The browser itself holds the page to this server: no font, script or figure goes to another host.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'"
)
_HEADERS = [(b"content-security-policy", _POLICY.encode()), (b"referrer-policy", b"same-origin")]
_OTHERS = ("cross-site", "same-site")  # `Sec-Fetch-Site` of other sites' pages
_LOGIN = {"www-authenticate": 'Basic realm="shoulders: any name, and the API key as password"'}


def add_playground(app: FastAPI, server: Server, stopping: Callable[[], bool]) -> None:
    """Put the playground at `/` of an API; where gradio is missing, `/` says how to get it.

    Args:
        app: as `create_app` returns it; its OpenAPI description stays as it is.
        server: what the playground asks, and whose API key it asks for.
        stopping: tells whether the process is about to end, so that open pages are let go.
    """
    if importlib.util.find_spec("gradio") is None:

        @app.get("/", include_in_schema=False)
        def missing() -> Response:
            return PlainTextResponse(MISSING)

        return

    @app.get("/", include_in_schema=False)
    def home() -> Response:
        return RedirectResponse(f".{PATH}/")

    app.mount(PATH, Door(server, stopping))


class Door:
    """An ASGI app: lets in who has the key, and builds the page for the first of them."""

    def __init__(self, server: Server, stopping: Callable[[], bool]) -> None:
        self._server, self._stopping = server, stopping
        self._lock = asyncio.Lock()
        self._page: FastAPI | None = None
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        refused = refusal(Request(scope), self._server.api_key)
        if refused is not None:
            await refused(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *_HEADERS]}
            await send(message)

        # The page's own app knows it by its whole path.
        whole = {**scope, "root_path": scope.get("app_root_path", "")}
        await (await self._built())(whole, receive, sending)

    async def _built(self) -> FastAPI:
        async with self._lock:
            if self._page is None:
                page = await asyncio.to_thread(_page, self._server)
                started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._running = asyncio.create_task(self._run(page, started))
                await started
                self._page = page
        return self._page

    async def _run(self, page: FastAPI, started: asyncio.Future[None]) -> None:
        """Run the page's own background tasks until the server is told to stop.

        Then let go of open pages: each holds a connection, and the server would wait for it.
        """
        try:
            async with page.router.lifespan_context(page):
                started.set_result(None)
                while not self._stopping():
                    await asyncio.sleep(LOOK)
                page.state.gradio.stop_event.set()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)


def refusal(request: Request, key: str | None) -> Response | None:
    """Return why a request may not enter, or None where it may.

    A browser asks its user once and brings name and password with every request; other clients
    bring the key as they bring it to the API. Since browsers bring it unasked, another site's page
    must not be able to make them ask something.
    """
    if key is not None and not hmac.compare_digest(_given(request), key.encode()):
        return PlainTextResponse("a valid API key is needed\n", 401, _LOGIN)
    if request.method not in ("GET", "HEAD") and request.headers.get("sec-fetch-site") in _OTHERS:
        return PlainTextResponse("not from another site's page\n", 403)
    if "/upload" in request.url.path:
        return PlainTextResponse("nothing here takes files\n", 404)
    return None


def _given(request: Request) -> bytes:
    """Return the key that a request brings, or nothing."""
    header = request.headers.get("authorization", "")
    if (key := bearer(header)) is not None:
        return key
    kind, _, value = header.partition(" ")
    try:
        named = base64.b64decode(value, validate=True) if kind.lower() == "basic" else b""
    except ValueError:
        return b""
    return named.partition(b":")[2]


def _page(server: Server) -> FastAPI:
    """Import gradio and build the page, in an app of its own: its routes are not the API's."""
    import gradio

    from shoulders.serving.playground import build, look

    page = FastAPI(openapi_url=None)
    gradio.mount_gradio_app(
        page,
        build(server),
        PATH,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        **look(),
    )
    (mounted,) = (route.app for route in page.routes if isinstance(route, Mount))
    page.state.gradio = mounted
    return page
