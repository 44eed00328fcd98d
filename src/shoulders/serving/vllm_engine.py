"""Answers from a vLLM server: the gateway writes prompts and contexts, vLLM runs the frozen LM.

Text is made of token ids here, by the same code as the local engine's: stop strings, held-back
pieces and log-probabilities are the same, whatever the server does with text.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

from shoulders.errors import ShouldersError
from shoulders.lm.decode import Delta, Running, advance
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.sampling import sample_stream
from shoulders.serving.embeds import Encoded, encoded
from shoulders.serving.probe import Findings, probe
from shoulders.serving.rows import Entry
from shoulders.serving.upstream import Chunk, Upstream, UpstreamConfig, UpstreamError

POLL = 0.1  # seconds between two looks whether anybody still waits
FINISHED = ("stop", "length")


class VllmEngine:
    """Takes entries as a `Worker` does, and streams their answers from a vLLM server.

    Args:
        lm: the same LM, for its tokenizer and embedding table.
        config: where the server is.

    Raises:
        ShouldersError: the server cannot be reached, holds another LM, or takes no embeddings.
    """

    def __init__(self, lm: FrozenLM, config: UpstreamConfig) -> None:
        self._lm = lm
        self._upstream = Upstream(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._rows = 0
        self.tokens = 0  # new tokens since the start
        try:
            self.findings: Findings = self._run(probe(lm, self._upstream)).result()
        except BaseException:
            self.close()
            raise

    @property
    def running(self) -> int:
        """Samples that the server has been asked for and has not finished."""
        return self._rows

    def healthy(self) -> bool:
        """Tell whether the server says that it can answer."""
        return bool(self._run(self._upstream.healthy()).result())

    def takes(self, prompt: Prompt) -> bool:
        """Tell whether the server can read a prompt.

        Keys/values need our connector in it; updates between its layers it has no place for.
        """
        if prompt.updates is not None:
            return False
        return prompt.keys_values_mask.shape[1] == 0 or (
            self.findings.prefixes and prompt.vector_mask.shape[1] == 0
        )

    def give(self, entry: Entry) -> None:
        """Answer an entry; it is told from this engine's thread."""
        try:
            row = encoded(self._lm, entry.prompt, entry.ids, self.findings.window)
        except Exception as error:  # whoever waits for the entry must hear of it
            entry.done(error)
            return
        with self._lock:
            self._rows += entry.rows
        self._run(self._answer(entry, row))

    def close(self) -> None:
        """Break off what is running and end the thread."""
        self._run(self._end()).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self, work: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._upstream.close()

    # -- one entry -----------------------------------------------------------------------

    async def _answer(self, entry: Entry, row: Encoded) -> None:
        """Read an answer until it ends, or until nobody waits for it any more."""
        reading = asyncio.ensure_future(self._read(entry, row))
        try:
            while not reading.done():
                await asyncio.wait({reading}, timeout=POLL)
                if entry.job.over and not reading.done():
                    raise ShouldersError("cancelled")
            reading.result()
        except asyncio.CancelledError:
            entry.done(ShouldersError("the server stops"))
            raise
        except Exception as error:
            entry.done(error)
        finally:
            # Cancelled, it closes its connection, whereupon vLLM drops the request.
            reading.cancel()
            with self._lock:
                self._rows -= entry.rows

    async def _read(self, entry: Entry, row: Encoded) -> None:
        config = entry.ask.decoding
        room = self.findings.window - row.positions
        states = [
            # vLLM draws its own random numbers; this one's stream is never read.
            Running(0, k, config, sample_stream(config.seed, entry.ids, k),
                    min(config.max_new_tokens, room))
            for k in range(config.n)
        ]  # fmt: skip
        pieces = self._upstream.stream(request_of(self.findings.model, entry, row, room))
        try:
            async for chunk in pieces:
                if not 0 <= chunk.index < config.n:
                    raise UpstreamError("the vLLM server sent a sample that nobody asked for")
                if chunk.index in entry.completions:
                    continue  # ended by a stop string that vLLM has not seen yet
                for delta in self._deltas(states[chunk.index], chunk):
                    entry.take(delta)
                if len(entry.completions) == entry.rows:
                    return
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]
        raise UpstreamError("the connection to the vLLM server broke off")

    def _deltas(self, state: Running, chunk: Chunk) -> list[Delta]:
        """Return the pieces of text of a chunk's tokens; the last one may end the sample."""
        deltas = []
        for token, logprob, alternatives in chunk.tokens():
            state.ids.append(token)
            state.logprob += logprob
            self.tokens += 1
            if most := state.config.top_logprobs:
                best = sorted(alternatives.items(), key=lambda one: -one[1])
                state.logprobs.append(logprob)
                state.top.append(tuple(best[:most]))
            deltas.append(advance(self._lm, state))
            if deltas[-1].completion is not None:
                return deltas
        if chunk.finish_reason is None:
            return deltas
        if chunk.finish_reason not in FINISHED or not state.ids:
            raise UpstreamError("the vLLM server broke an answer off")
        # It ends where we would go on: at a token of its own choice, or at its window.
        state.room = len(state.ids)
        last = advance(self._lm, state)
        assert last.completion is not None  # there is no more room
        last.completion.finish = chunk.finish_reason
        return [*deltas, last]


def request_of(model: str, entry: Entry, row: Encoded, room: int) -> dict[str, Any]:
    """Return the body of a request to vLLM.

    Everything that changes an answer is said: vLLM otherwise takes it from the LM's own
    generation_config.json. But stop strings that it might find in the answer's prefix are not: all
    are found here, too.
    """
    config = entry.ask.decoding
    return {
        **row.fields,
        "model": model,
        "n": config.n,
        "max_tokens": min(config.max_new_tokens, room),
        "min_tokens": config.min_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": config.seed,
        "stop": [s for s in config.stop if not _begins_in(s, config.answer_prefix)],
        "stop_token_ids": list(entry.ask.skill.lm.end_ids),
        "logprobs": config.top_logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": True,
    }


def _begins_in(stop: str, prefix: str) -> bool:
    """Tell whether a stop string may begin in the prefix of an answer."""
    tails = [prefix[i:] for i in range(len(prefix))]
    return any(tail.startswith(stop) or stop.startswith(tail) for tail in tails)
