"""Is the LM that a vLLM server holds the one that the skills were trained on? Asked at the start.

vLLM shows no hash of its weights. What can be seen: how it tokenises a text, and the
log-probabilities that it gives to next tokens after fixed inputs, which are compared with the local
LM's. That tells another LM, another fine-tuning or another scale of embeddings from the right one;
it is no proof that every byte is equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shoulders.errors import ShouldersError, WindowError
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.initial import InitConfig, initial_keys_values
from shoulders.serving.embeds import encoded
from shoulders.serving.upstream import Chunk, Upstream, UpstreamError

TEXTS = (
    "The capital of France is",
    "Water boils at one hundred degrees, and ice melts at",
    "def add(a, b):\n    return a +",
)
ALTERNATIVES = 5  # of the local LM, looked for among those of vLLM
ASKED = 20  # most that vLLM gives unless told otherwise
# Mean difference of log-probabilities that is still the same LM: with vLLM in bfloat16 it was 0.02,
# with both in float32 0.00001 (docs/vllm.md).
TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Findings:
    """What a vLLM server was found to be.

    Attributes:
        model: the name under which it serves the LM.
        root: where it says that it has it from.
        window: positions of its window.
        difference: mean absolute difference of log-probabilities from the local LM.
        prefixes: whether it loads keys/values (our connector runs in it).
    """

    model: str
    root: str
    window: int
    difference: float
    prefixes: bool


async def probe(lm: FrozenLM, upstream: Upstream) -> Findings:
    """Look at a vLLM server.

    Raises:
        ShouldersError: it cannot be reached, serves another LM, or takes no embeddings; the
            message names the fix.
    """
    url = upstream.config.url
    card = _card(await upstream.models(), url)
    model, root = str(card["id"]), str(card.get("root") or card["id"])
    window = int(card.get("max_model_len") or lm.max_positions)
    known = Findings(model, root, min(window, lm.max_positions), 0.0, False)
    ids = lm.tokenize(TEXTS)
    plain = Prompt.empty(1)
    differences = [await _difference(lm, upstream, known, plain, row) for row in ids]
    # One text, so that its tokens tell how vLLM tokenises.
    by_text = {"prompt": "\n".join(TEXTS), "add_special_tokens": False}
    chunk = await _first(upstream, {**_body(known), **by_text})
    same_tokens = chunk.prompt_token_ids == lm.tokenize(["\n".join(TEXTS)])[0]
    difference = sum(differences) / len(differences)
    if difference > TOLERANCE or not same_tokens:
        raise ShouldersError(
            f"{url} serves '{model}' (from {root}), which is another LM than '{lm.name}': "
            f"{'' if same_tokens else 'its tokens are others, and '}log-probabilities differ by "
            f"{difference:.2g} on average (at most {TOLERANCE} is rounding). Start it with the LM "
            "that the skills were trained on (vllm serve LM --enable-prompt-embeds), or name the "
            "LM that it serves with --lm"
        )
    await _check_embeddings(lm, upstream, known)
    prefixes = await _loads_prefixes(lm, upstream, known)
    return Findings(model, root, known.window, difference, prefixes)


async def _check_embeddings(lm: FrozenLM, upstream: Upstream, known: Findings) -> None:
    """Refuse a server that takes no embeddings, or changes them."""
    ids = lm.tokenize(TEXTS[:2])
    # Between the embeddings of tokens, as trained prompts are.
    between = (lm.embed_rows([ids[0][:3]]) + lm.embed_rows([ids[1][:3]])) / 2
    prompt = Prompt.of_vectors(between[None])
    try:
        difference = await _difference(lm, upstream, known, prompt, ids[0])
    except UpstreamError as error:
        raise ShouldersError(
            f"{upstream.config.url} takes no embeddings: start it with --enable-prompt-embeds "
            f"({error})"
        ) from error
    if difference > TOLERANCE:
        raise ShouldersError(
            f"{upstream.config.url} reads embeddings in its own way (log-probabilities differ by "
            f"{difference:.2g}): skills of '{lm.name}' cannot be served through it; use "
            f"--engine local"
        )


async def _loads_prefixes(lm: FrozenLM, upstream: Upstream, known: Findings) -> bool:
    """Tell whether keys/values that are sent are read.

    All but the last token of a text are sent as the keys/values that the LM itself computes of
    them, so that rounding moves the answer no further than it moves others.
    """
    text = TEXTS[0]
    ids = lm.tokenize([text])[0]
    start = InitConfig(source="text", text=text)
    values = initial_keys_values(start, lm, len(ids) - 1, torch.Generator())
    prompt = Prompt.of_keys_values(values.to(lm.device, lm.dtype)[None])
    try:
        found = await _difference(lm, upstream, known, prompt, ids[-1:])
    except UpstreamError:
        return False
    return found <= TOLERANCE


async def _difference(
    lm: FrozenLM, upstream: Upstream, known: Findings, prompt: Prompt, ids: list[int]
) -> float:
    """Return how far log-probabilities of likely next tokens are from the local LM's, on average.

    A likely token that is not even among the server's counts as far away.
    """
    try:
        fields = encoded(lm, prompt, ids, known.window).fields
    except WindowError as error:
        raise ShouldersError(f"{upstream.config.url}: {error}") from error
    chunk = await _first(upstream, {**_body(known), **fields})
    config = DecodingConfig(max_new_tokens=1, top_logprobs=ALTERNATIVES)
    with torch.no_grad():
        ((ours,),) = generate(lm, prompt, [ids], config)
    _, _, theirs = chunk.tokens()[0]
    missing = min(theirs.values(), default=0.0) - 1.0
    values = [abs(theirs.get(token, missing) - value) for token, value in ours.top[0]]
    return sum(values) / len(values)


def _body(known: Findings) -> dict[str, Any]:
    return {
        "model": known.model,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": ASKED,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "stream": True,
    }


async def _first(upstream: Upstream, body: dict[str, Any]) -> Chunk:
    """Return the first piece of an answer that has tokens."""
    found = [chunk async for chunk in upstream.stream(body) if chunk.token_ids]
    if not found:
        raise UpstreamError("the vLLM server answered without a token")
    return found[0]


def _card(cards: list[dict[str, Any]], url: str) -> dict[str, Any]:
    """Return the LM's own entry; adapters name it as their parent."""
    try:
        return next(card for card in cards if card["id"] and not card.get("parent"))
    except (StopIteration, KeyError, TypeError):
        raise ShouldersError(f"{url} serves no LM") from None
