"""Texts into tokens: what stands before and after an input, and how an answer begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shoulders.errors import LMError, ShouldersError, WindowError
from shoulders.lm.decode import Completion, Delta
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.config import TextFormat
from shoulders.skills.spelling import most_tokens, spelled

# A skill reads the same every day: templates that write the date are told this one (functions
# cannot be given to them).
_DAY = {"%d": "26", "%-d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024", "%y": "24",
        "%A": "Friday", "%a": "Fri", "%H": "00", "%M": "00", "%S": "00"}  # fmt: skip


class Framing:
    """A text format on one LM.

    Args:
        lm: whose tokens are written.
        form: the format.
        prompt_length: window positions that a skill's prompt takes.
    """

    def __init__(self, lm: FrozenLM, form: TextFormat, prompt_length: int) -> None:
        self._lm, self._form, self._prompt_length = lm, form, prompt_length

    def input_ids(
        self, texts: Sequence[str], answer_room: int | Sequence[int] = 1
    ) -> list[list[int]]:
        """Return each text's token ids with the separator, as they stand before the answer.

        Raises `WindowError`, naming the row, for a text that with the prompt and `answer_room`
        positions (of all rows, or one by one) does not fit, unless the format says what to keep.
        """
        head, tail = self._frame()
        rooms = [answer_room] * len(texts) if isinstance(answer_room, int) else answer_room
        window = self._window_room()
        rows = []
        ahead = self._ahead(texts)
        for i, ids in enumerate(self._lm.tokenize(texts)):
            which, answer_room = (i + 1, texts[i]), rooms[i]
            limit = self._room_in(window, answer_room)
            if limit < 1:
                letters = f", letters {most_tokens(n)}" if (n := self._form.spelling) else ""
                raise WindowError(
                    f"('{texts[i][:40]}...'): no room for any input in the window of "
                    f"{self._lm.max_positions}: prompt {self._prompt_length}, answer {answer_room}"
                    f"{letters}; make the largest of them smaller",
                    *which,
                )
            if len(ids) > limit and self._form.keep is None:
                raise WindowError(
                    f"('{texts[i][:40]}...'): {len(ids)} tokens, {limit} fit "
                    f"(window {self._lm.max_positions}, prompt {self._prompt_length}, "
                    f"answer {answer_room}); "
                    "shorten it, or allow truncation with keep: start or keep: end",
                    *which,
                )
            cut = ids[:limit] if self._form.keep == "start" else ids[-limit:]
            if not cut + tail:
                raise WindowError("has an input without tokens", *which)
            rows.append(head + ahead[i] + cut + tail)
        return rows

    def input_room(self, answer_room: int = 1) -> int:
        """Return how many tokens of input fit beside prompt, separator and so long an answer."""
        return self._room_in(self._window_room(), answer_room)

    def _room_in(self, window: int, answer_room: int) -> int:
        room = window - answer_room
        return min(room, self._form.max_input_tokens or room)

    def answer_room(self, wanted: int) -> int:
        """Return the room that inputs leave for an answer of at most `wanted` tokens.

        Inputs that are cut leave all of it, but keep half of what the window holds for both: cut to
        the whole window they would leave no answer. Others leave 1: an input that fits is not
        refused for a length that few answers have; a long answer may end early.
        """
        if self._form.keep is None:
            return 1
        return max(1, min(wanted, self._window_room() // 2))

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Return each answer's token ids, with the LM's end token."""
        if not self._lm.end_ids:
            raise LMError(f"{self._lm.name}: has no end token that answers could end with")
        ids = self._lm.tokenize([self._form.answer_prefix + a for a in answers])
        return [[*row, self._lm.end_ids[0]] for row in ids]

    def _window_room(self) -> int:
        """Return how many tokens of the window are left for an input and its answer."""
        head, tail = self._frame()
        taken = self._prompt_length + len(head) + len(tail)
        if self._form.spelling:
            taken += most_tokens(self._form.spelling)
        return self._lm.max_positions - taken

    def _ahead(self, texts: Sequence[str]) -> list[list[int]]:
        """Return what stands before each text: its rarest words, spelled out."""
        if not self._form.spelling:
            return [[] for _ in texts]
        return self._lm.tokenize([spelled(self._lm, t, self._form.spelling) for t in texts])

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens before and after every input."""
        lm, form = self._lm, self._form
        if not form.chat:
            tail = lm.tokenize([form.separator], markup=True)[0] if form.separator else []
            return list(lm.start_ids), tail
        if not lm.tokenizer.chat_template:
            raise LMError(f"{lm.name} has no chat template; set format.chat to false")
        mark = "\x00"  # stands where the input goes; no template contains it
        turn = [{"role": "user", "content": mark}]
        framed = lm.tokenizer.apply_chat_template(
            turn,
            chat_template=_dated(lm.tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=True,
        )
        head, _, tail = framed.partition(mark)
        before, after = lm.tokenize([head, tail], markup=True)
        return before, after


def _dated(template: str) -> str:
    """Return a chat template in which it is always the same day."""
    if "strftime_now" not in template:
        return template
    written = "".join(f".replace('{form}', '{value}')" for form, value in _DAY.items())
    return f"{{% macro strftime_now(form) %}}{{{{ form{written} }}}}{{% endmacro %}}{template}"


class Unprefixed:
    """Takes the answer prefix, which is not part of an answer, off streamed pieces of text."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._held: dict[tuple[int, int], str] = {}
        self._begun: set[tuple[int, int]] = set()

    def __call__(self, delta: Delta) -> Delta | None:
        """Return a piece without the prefix; None while it may still become one."""
        key, text = (delta.row, delta.sample), delta.text
        if key not in self._begun:
            text = self._held.pop(key, "") + text
            short = delta.completion is None and len(text) < len(self._prefix)
            if short and self._prefix.startswith(text):
                self._held[key] = text
                return None
            self._begun.add(key)
            text = text.removeprefix(self._prefix)
        if delta.completion is not None:
            stripped(delta.completion, self._prefix)
        return replace(delta, text=text)


def any_texts(texts: Sequence[str]) -> bool:
    """Return whether there are any; a text by itself would be taken letter by letter."""
    if isinstance(texts, str):
        raise ShouldersError(f"give a list of texts: ['{texts[:40]}']")
    return len(texts) > 0


def stripped(completion: Completion, prefix: str) -> Completion:
    """Take the answer prefix, which is not part of the answer, off a completion's text."""
    completion.text = completion.text.removeprefix(prefix)
    return completion
