"""The vLLM server that a gateway speaks to: OpenAI's completions over HTTP, with tokens by id."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shoulders.errors import ShouldersError, install

if TYPE_CHECKING:
    import httpx2

LOG = logging.getLogger("shoulders.serving")
TOKEN = "token_id:"  # how vLLM names tokens where it is asked for ids
SHOWN = 500  # characters of a refusal that go to our own log


class UpstreamDownError(ShouldersError):
    """Nothing answers at the vLLM server's address, or it takes no more requests."""


class UpstreamSlowError(ShouldersError):
    """The vLLM server has been silent for too long."""


class UpstreamError(ShouldersError):
    """The vLLM server refused a request, broke off, or does not speak as vLLM does."""


class UpstreamConfig(BaseModel):
    """Where the vLLM server is.

    Attributes:
        url: a `/v1` at its end, as clients' base URLs have it, is taken off.
        api_key: that it asks for, or None.
        silence: seconds without a token after which a request is given up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(pattern=r"^https?://\S+$")
    api_key: str | None = None
    silence: float = Field(default=300.0, gt=0)

    @field_validator("url")
    @classmethod
    def _root(cls, url: str) -> str:
        return url.rstrip("/").removesuffix("/v1")


class _Logprobs(BaseModel):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class Chunk(BaseModel):
    """New tokens of one sample, as vLLM streams them.

    Attributes:
        index: of the sample.
        token_ids: the new tokens.
        logprobs: of them and of their alternatives, at temperature 1.
        finish_reason: why it has ended; None while it goes on.
        prompt_token_ids: of the input, in the first piece.
    """

    index: int
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None
    prompt_token_ids: list[int] | None = None

    def tokens(self) -> list[tuple[int, float, dict[int, float]]]:
        """Return each new token, its log-probability, and the likeliest ones at its place."""
        ids = self.token_ids or []
        if not ids:
            return []
        if self.logprobs is None or len(self.logprobs.token_logprobs) != len(ids):
            raise UpstreamError("the vLLM server sent tokens without their log-probabilities")
        both = zip(ids, self.logprobs.token_logprobs, self.logprobs.top_logprobs, strict=True)
        return [
            (i, value or 0.0, {int(k.removeprefix(TOKEN)): v for k, v in (top or {}).items()})
            for i, value, top in both
        ]


class Upstream:
    """A client of one vLLM server; to be used in one event loop.

    Args:
        config: where it is.

    Raises:
        ShouldersError: the HTTP client is not installed.
    """

    def __init__(self, config: UpstreamConfig) -> None:
        try:
            import httpx2
        except ImportError as error:
            missing = f"{error.name} is missing: {install('vllm')}"
            raise ShouldersError(missing) from None
        self.config = config
        key = config.api_key  # in bytes: the client takes no other letters than ASCII's
        headers = {b"Authorization": f"Bearer {key}".encode()} if key else {}
        self._client: httpx2.AsyncClient = httpx2.AsyncClient(
            base_url=config.url,
            headers=headers,
            timeout=httpx2.Timeout(config.silence, connect=10.0),
            # As many streams at once as the gateway's queue lets in.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )
        self._http = httpx2

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def healthy(self) -> bool:
        """Tell whether it says that it can answer."""
        try:
            reply = await self._client.get("/health", timeout=5.0)
        except self._http.HTTPError:
            return False
        return bool(reply.status_code == 200)

    async def models(self) -> list[dict[str, Any]]:
        """Return what it serves; raises as `stream` does."""
        try:
            reply = await self._client.get("/v1/models", timeout=30.0)
            if reply.status_code != 200:
                raise self._refusal(reply.status_code, reply.text)
            found: list[dict[str, Any]] = reply.json()["data"]
        except self._http.HTTPError as error:
            raise self._failure(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign() from error
        return found

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[Chunk]:
        """Ask for completions and yield their tokens; closing the iterator ends them there.

        Raises:
            UpstreamDownError: it cannot be reached, or is overloaded.
            UpstreamSlowError: it is silent for too long.
            UpstreamError: it refuses, breaks off, or is no vLLM.
        """
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    text = (await reply.aread()).decode(errors="replace")
                    raise self._refusal(reply.status_code, text)
                async for line in _lines(reply.aiter_bytes()):
                    data = line.removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    for chunk in self._chunks(data):
                        yield chunk
        except self._http.HTTPError as error:
            raise self._failure(error) from error

    def _chunks(self, data: bytes) -> list[Chunk]:
        try:
            value = json.loads(data)
            if "error" in value:
                error = value["error"]
                code = error.get("code") if isinstance(error, dict) else None
                raise self._refusal(code if isinstance(code, int) else 500, str(value))
            return [Chunk.model_validate(choice) for choice in value["choices"]]
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise self._foreign() from error

    # What the server says goes to the gateway's log alone: it may name paths and hosts.

    def _refusal(self, status: int, text: str) -> ShouldersError:
        LOG.warning("vLLM answered %s: %s", status, text[:SHOWN])
        if status in (429, 503):
            return UpstreamDownError("the vLLM server takes no more requests; try again later")
        if status in (401, 403):
            return UpstreamError("the vLLM server refuses the gateway's key: --vllm-api-key-file")
        return UpstreamError("the vLLM server could not answer; the gateway's log says why")

    def _failure(self, error: Exception) -> ShouldersError:
        LOG.warning("vLLM: %s: %s", type(error).__name__, error)
        if isinstance(error, self._http.ReadTimeout):
            return UpstreamSlowError(
                f"the vLLM server has been silent for {self.config.silence:g} s"
            )
        if isinstance(error, (self._http.ConnectError, self._http.TimeoutException)):
            return UpstreamDownError("the vLLM server cannot be reached; try again later")
        return UpstreamError("the connection to the vLLM server broke off")

    def _foreign(self) -> UpstreamError:
        return UpstreamError("the server behind --vllm-url does not answer as vLLM does")


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Split at line feeds alone: other separators (U+2028, U+0085) may stand within a text."""
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest
