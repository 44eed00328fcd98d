"""The playground's page: choose a skill, ask, watch the answer come, see what it rests on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple

import gradio as gr
from pydantic import ValidationError

from shoulders.lm.decode import Completion
from shoulders.serving.answers import Answering, new_seed
from shoulders.serving.api import Server, count
from shoulders.serving.conversation import conversation
from shoulders.serving.guards import LOG, status_of
from shoulders.serving.schema import ChatRequest
from shoulders.serving.skillset import Served
from shoulders.serving.views import STYLE, details_html, heat_html
from shoulders.skills.attended import attended
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.reader import Reader

PATIENCE = 300.0  # seconds for an answer; whoever has closed the page waits no longer
LONGEST, MOST = 64, 4096  # tokens of an answer: where the page is not told otherwise, and at most
BUSY = "…"
EXAMPLE = "What is the opposite of hot?"
KINDS = {
    "static": "static prompt",
    "static_kv": "static prefix",
    "idpt": "input-dependent prompt",
    "idspam": "prompt from the input's own embeddings",
    "idpt_kv": "input-dependent prefix",
    "static_lowrank": "static prefix and low-rank updates",
    "idpt_lowrank": "input-dependent prefix, low-rank updates",
    "static_lora": "static prefix and low-rank factors",
}
_QUIET: Any = {"show_progress": "hidden", "api_visibility": "private"}


class Shown(NamedTuple):
    """A state of one column: the answer so far, a line about it, what it rests on as HTML."""

    answer: str
    note: str = ""
    inside: str = ""


class Column(NamedTuple):
    """One skill's half of the page."""

    skill: gr.Dropdown
    about: gr.Markdown
    answer: gr.Textbox
    note: gr.Markdown
    inside: gr.HTML

    @property
    def shown(self) -> list[Any]:
        """Where a `Shown` goes."""
        return [self.answer, self.note, self.inside]


async def answer(
    server: Server,
    wanted: bool,
    name: str,
    question: str,
    max_tokens: float,
    temperature: float,
) -> AsyncGenerator[Shown, None]:
    """Ask a skill through the server's engine, as a chat request would, and yield what to show.

    Whoever closes the generator ends the asking. Nothing is asked of a column that is not `wanted`.
    """
    if not wanted:
        return
    if not question.strip():
        yield Shown("", "Write a question first.")
        return
    try:
        body = ChatRequest(
            model=name,
            messages=[{"role": "user", "content": question}],  # type: ignore[list-item]
            max_tokens=int(max_tokens),
            temperature=temperature,
            timeout=PATIENCE,
        )
        served = server.skills.get(body.model)
        async with aclosing(_streamed(server, served, body, question)) as states:
            async for shown in states:
                yield shown
    except ValidationError as error:
        yield Shown("", f"⚠ {error.errors()[0]['msg']}")
    except Exception as error:
        status, _ = status_of(error)
        server.metrics.failed(name if name in server.skills.names() else "", status)
        if status == 500:
            LOG.exception("internal error", exc_info=error)
        said = "internal error; the server's log says more" if status == 500 else str(error)
        yield Shown("", f"⚠ {said}")


async def _streamed(
    server: Server, served: Served, body: ChatRequest, question: str
) -> AsyncGenerator[Shown, None]:
    templated = served.folder is None and server.skills.lm.tokenizer.chat_template
    given = conversation(server.skills.lm, served, body) if templated else (question, None)
    decoding = body.decoding(body.most, 0, new_seed())
    answering = Answering(server.engine, served, [given], decoding, body.timeout)
    text, ended = "", None
    yield Shown("", BUSY)
    async with aclosing(answering.pieces(_never)) as pieces:
        async for piece in pieces:
            text += piece.text
            ended = piece.completion
            yield Shown(text, BUSY)
    assert ended is not None  # the last piece has it
    count(server, served, answering, [ended])
    note = _note(answering, ended)
    (details,) = answering.details
    inside = details_html(details, text)
    yield Shown(text, note, inside)
    read = details.get("read", [])
    texts = read if isinstance(served.answers, Reader) else [question, *read]
    maps = await asyncio.to_thread(attended, served.skill, texts)
    if maps:
        yield Shown(text, note, inside + heat_html(maps))


async def _never() -> bool:
    """Tell that the page is there: gradio itself ends what a closed page has asked."""
    return False


def _stopped(*notes: str) -> list[str]:
    """Return both columns' notes, where what was being answered has been stopped."""
    return ["stopped" if note == BUSY else note for note in notes]


def _note(answering: Answering, ended: Completion) -> str:
    tokens, seconds = len(ended.token_ids), time.monotonic() - answering.started
    first = (answering.first or time.monotonic()) - answering.started
    why = {"stop": "complete", "length": "cut at the longest answer"}.get(ended.finish, "")
    return f"{tokens} tokens in {seconds:.2f} s, the first after {first:.2f} s · {why}"


def about(server: Server, name: str) -> str:
    """Return a line about a skill."""
    served = next((one for one in server.skills.every() if one.name == name), None)
    if served is None:
        return "not served any more: reload the page"
    if served.folder is None:
        return "the frozen LM itself, no skill"
    passes = served.skill.config.passes
    named = [one.prompt["kind"] if one.prompt else "no prompt" for one in passes]
    kinds = [KINDS.get(kind, kind) for kind in named]
    what = ["reader"] if isinstance(served.answers, Reader) else []
    if isinstance(served.answers, Ensemble):
        what.append(f"ensemble of {len(served.answers.members)}")
    if len(passes) > 1:
        textual = any(one.propose is not None for one in passes)
        what.append(f"{'textual' if textual else 'neural'} recursion, {len(passes)} passes")
    trained = f"{served.trained_parameters:,} trained parameters"
    return " · ".join([*what, " → ".join(kinds), trained])


def build(server: Server) -> gr.Blocks:
    """Return the page."""
    lm = server.skills.names()[0]
    with gr.Blocks(title="shoulders", analytics_enabled=False) as page:
        gr.Markdown(f"# shoulders\nOne frozen LM, **{lm}**, and the skills around it.")
        question = gr.Textbox(
            label="Question, or the skill's input", placeholder=EXAMPLE, lines=2, max_lines=12,
            elem_id="question",
        )  # fmt: skip
        with gr.Row(equal_height=True):
            ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=160)
            stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=100)
            two = gr.Checkbox(label="Two skills side by side", elem_id="two", container=False)
        with gr.Accordion("How to answer", open=False):
            longest = gr.Slider(
                1, MOST, LONGEST, step=1, label="Longest answer, in tokens", elem_id="longest"
            )
            warmth = gr.Slider(
                0, 2, 0, step=0.1, label="Temperature (0: the likeliest token)", elem_id="warmth"
            )
        with gr.Row():
            with gr.Column(min_width=400):
                left = _column(server, 0)
            with gr.Column(min_width=400, visible=False) as second:
                right = _column(server, 1)

        given = [question, longest, warmth]
        often: Any = {**_QUIET, "concurrency_limit": None}  # the engine has its own queue
        asks = [ask.click, question.submit]
        runs = [
            gr.on(asks, partial(answer, server, True), [left.skill, *given], left.shown, **often),
            gr.on(asks, partial(answer, server), [two, right.skill, *given], right.shown, **often),
        ]
        notes = [left.note, right.note]
        stop.click(None, cancels=runs).then(_stopped, notes, notes, **_QUIET)
        two.change(lambda on: gr.Column(visible=on), two, second, **_QUIET)
        for column in (left, right):
            column.skill.change(partial(about, server), column.skill, column.about, **_QUIET)
        page.load(partial(offered, server), None, [left.skill, right.skill], **_QUIET)
    return page


def offered(server: Server) -> list[gr.Dropdown]:
    """Return both choices of a skill, as they are on a fresh page: skills come and go."""
    return [gr.Dropdown(**_choices(server, place)) for place in (0, 1)]


def _choices(server: Server, place: int) -> dict[str, Any]:
    names = server.skills.names()
    own = [*names[1:], names[0]]  # the LM itself is nobody's first choice
    return {"choices": names, "value": own[place % len(own)]}


def _column(server: Server, place: int) -> Column:
    side, choices = ("left", "right")[place], _choices(server, place)
    return Column(
        gr.Dropdown(**choices, label="Skill", elem_id=f"{side}-skill"),
        gr.Markdown(about(server, choices["value"]), elem_classes="sh-note"),
        gr.Textbox(
            label="Answer", lines=3, max_lines=20, interactive=False, elem_id=f"{side}-answer"
        ),
        gr.Markdown(elem_id=f"{side}-note", elem_classes="sh-note"),
        gr.HTML(elem_id=f"{side}-inside", js_on_load=None, apply_default_css=False),
    )


def look() -> dict[str, Any]:
    """Return how the page looks: fonts of the user's own machine, nothing is fetched."""
    fonts, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return {
        "theme": gr.themes.Default(primary_hue="indigo", font=fonts, font_mono=mono),
        "css": STYLE,
    }
