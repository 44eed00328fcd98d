"""Conversations as inputs: through the LM's chat template, or as a skill reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jinja2

from shoulders.errors import ShouldersError
from shoulders.lm.frozen import FrozenLM
from shoulders.serving.schema import ChatRequest
from shoulders.serving.skillset import Served


def conversation(lm: FrozenLM, served: Served, body: ChatRequest) -> tuple[str, list[int] | None]:
    """Return a conversation as an input; the LM itself reads it in its own template, once.

    A skill reads one input: the messages' texts, in order. With one message, exactly that.

    Raises:
        ShouldersError: the LM has no chat template, or it refuses these messages.
    """
    text = "\n".join(message.text for message in body.messages)
    if served.folder is not None:
        return text, None
    if not lm.tokenizer.chat_template:
        raise ShouldersError(f"{served.name} has no chat template; use /v1/completions")
    turns = [{"role": m.role, "content": m.text} for m in body.messages]

    def framed_with(contents: Sequence[str]) -> str:
        said = [{**turn, "content": own} for turn, own in zip(turns, contents, strict=True)]
        try:
            framed: str = lm.tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ShouldersError(f"{served.name}'s chat template: {error}") from None
        return framed

    special = {*lm.tokenizer.all_special_tokens, *lm.tokenizer.get_added_vocab()}
    if not any(token in message.text for message in body.messages for token in special):
        whole = framed_with([message.text for message in body.messages])
        return text, lm.tokenize([whole], markup=True)[0]
    framed = framed_with([f"\x00{i}\x00" for i in range(len(turns))])
    # The frame's special tokens are special; what users write never is. Templates may move
    # messages, leave some out, or repeat one.
    ids: list[int] = []
    for place, piece in enumerate(re.split("\x00([0-9]+)\x00", framed)):
        written = place % 2 == 1
        said = turns[int(piece)]["content"] if written else piece
        ids += lm.tokenize([said], markup=not written)[0] if said else []
    return text, ids
