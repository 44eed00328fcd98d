"""A small server that speaks vLLM's protocol, as plain functions and standard-library HTTP.

It really answers: embeddings, ids and prefixes go through a tiny LM. Its pieces have the fields and
types of those that vLLM 0.32.0 streams.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import load

from shoulders.lm.decode import Completion, DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.serving.embeds import PREFIX


class FakeVllm:
    """The server; `requests` are the bodies that it was sent.

    Attributes:
        prefixes: whether it has our connector.
        embeds: whether it takes embeddings.
        status: of its refusals, 0 for none.
        pause: seconds between two tokens.
        broken: tokens after which it breaks a stream off, or None.
        closed: set when a client has gone before the end.
    """

    def __init__(self, lm: FrozenLM) -> None:
        self.lm = lm
        self.requests: list[dict[str, Any]] = []
        self.prefixes, self.embeds = True, True
        self.status, self.pause, self.window = 0, 0.0, lm.max_positions
        self.broken: int | None = None
        self.key: str | None = None
        self.closed = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path not in ("/health", "/v1/models"):
                    self._say(404, {"detail": "Not Found"})
                    return
                card = {"id": "lm", "root": "/models/lm", "parent": None}
                card |= {"object": "model", "max_model_len": fake.window}
                self._say(200, {"object": "list", "data": [card]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/completions":
                    self._say(404, {"detail": "Not Found"})
                    return
                fake.requests.append(body)
                if fake.key and self.headers.get("Authorization") != f"Bearer {fake.key}":
                    self._say(401, {"error": "Unauthorized"})
                elif fake.status or ("prompt_embeds" in body and not fake.embeds):
                    error = {"message": "secret /models/path", "type": "x", "code": 400}
                    self._say(fake.status or 400, {"error": error})
                else:
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream; charset=utf-8")
                    self.end_headers()
                    try:
                        self._stream(body)
                    except OSError:
                        fake.closed.set()

            def _stream(self, body: dict[str, Any]) -> None:
                for count, piece in enumerate(fake.pieces(body)):
                    if count == fake.broken:
                        return
                    said = json.dumps(piece, ensure_ascii=False)  # as pydantic writes it
                    self.wfile.write(f"data: {said}\n\n".encode())
                    self.wfile.flush()
                    time.sleep(fake.pause)
                self.wfile.write(b"data: [DONE]\n\n")

            def _say(self, status: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def pieces(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        prompt, ids = self.read(body)
        config = DecodingConfig(
            max_new_tokens=body["max_tokens"],
            n=body.get("n", 1),
            temperature=body["temperature"],
            seed=body.get("seed", 0),
            top_logprobs=max(1, body["logprobs"]),
        )
        with torch.no_grad():
            (found,) = generate(self.lm, prompt, [ids], config)
        pieces = []
        for sample, completion in enumerate(found):
            for i in range(len(completion.token_ids)):
                choice = self.choice(sample, completion, i)
                if i == 0:
                    choice["prompt_token_ids"] = ids
                frame = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "lm"}
                pieces.append((i, sample, {**frame, "choices": [choice]}))
        # Samples take turns.
        return [piece for _, _, piece in sorted(pieces, key=lambda one: one[:2])]

    def choice(self, sample: int, completion: Completion, i: int) -> dict[str, Any]:
        token = completion.token_ids[i]
        top = {f"token_id:{token}": completion.logprobs[i]}
        top |= {f"token_id:{k}": v for k, v in completion.top[i]}
        last = i + 1 == len(completion.token_ids)
        return {
            "index": sample,
            "text": "text that nobody reads: \u2028 \x85 é",
            "logprobs": {
                "text_offset": [0],
                "token_logprobs": [completion.logprobs[i]],
                "tokens": [f"token_id:{token}"],
                "top_logprobs": [top],
            },
            "finish_reason": completion.finish if last else None,
            "stop_reason": None,
            "token_ids": [token],
        }

    def read(self, body: dict[str, Any]) -> tuple[Prompt, list[int]]:
        """Return the prompt and ids of a request; the last embedding has to be a token's."""
        if "prompt_embeds" in body:
            data = base64.b64decode(body["prompt_embeds"], validate=True)
            embeddings = torch.load(io.BytesIO(data), weights_only=True)
            assert embeddings.dim() == 2
            table = self.lm.embed(torch.arange(self.lm.vocab_size))
            ids: list[int] = []
            for row in embeddings.flip(0):
                same = (table == row).all(1).nonzero()
                if not len(same):
                    break
                ids.insert(0, int(same[0]))
            return Prompt.of_vectors(embeddings[None, : len(embeddings) - len(ids)]), ids
        given = body["prompt"]
        if isinstance(given, str):
            return Prompt.empty(1), self.lm.tokenize([given])[0]
        params = body.get("kv_transfer_params")
        if params is None or not self.prefixes:
            return Prompt.empty(1), given
        prefix = load(base64.b64decode(params[PREFIX]))["prefix"]
        assert prefix.shape[3] == params["length"]
        assert body["cache_salt"]
        return Prompt.of_keys_values(prefix[None]), given[params["length"] :]
