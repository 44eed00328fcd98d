"""What `ask` and `eval` share: opening a reader by name, and scoring one on questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from shoulders.cli.common import (
    BASE,
    emit_json,
    one_skill,
    open_skill,
    provenance,
    quiet_libraries,
    stderr,
    stdout,
)
from shoulders.cli.options import LMChoice
from shoulders.errors import ShouldersError

if TYPE_CHECKING:
    from shoulders.evaluation.report_card import ReportCard
    from shoulders.reader.questions import Question
    from shoulders.skills.reader import Reader, ReadingConfig
    from shoulders.skills.reader_artefact import SearchConfig

# What stands before the question where nothing was trained; the LM's chat template around it.
ZERO_SHOT = "Answer the question in a few words, from the passages above.\nQuestion: "


def is_reader(skill: str) -> bool:
    """Tell whether a skill folder holds a reader."""
    from shoulders.skills.reader_artefact import FILE

    return skill != BASE and (Path(skill) / FILE).is_file()


def open_reader(
    name: str,
    index: str | None,
    *,
    retriever: str | None = None,
    k: int | None = None,
    window: int | None = None,
    rerank: bool = True,
    abstain_below: float | None = None,
    choice: LMChoice,
) -> Reader:
    """Open a reader folder, a skill folder that reads untrained for it, or `base`.

    Args:
        name: the folder, or `base` for the LM's own reading.
        index: what to search, see `open_passages`; None where questions bring their passages.
        retriever: instead of the reader's (without one: of the index's best).
        k: passages to retrieve, instead of the reader's number.
        window: most tokens of passages, instead of the reader's.
        rerank: False keeps the retriever's order.
        abstain_below: see `ReadingConfig`.
        choice: the LM, instead of the one that it was trained on.
    """
    from shoulders.reader.contexts import Contexts
    from shoulders.reader.engines.opening import open_passages
    from shoulders.skills.reader import Reader
    from shoulders.skills.reader_artefact import open_reranker, read_reader

    quiet_libraries()
    search, reading = _settings(name)
    if is_reader(name):
        artefact = read_reader(Path(name))
        search, reading = artefact.search, artefact.reading
    given = (("--window", window, reading.pack.tokens), ("--k", k, search.k))
    changed = [option for option, value, own in given if value not in (None, own)]
    if reading.confidence is not None and changed:
        stderr().print(
            f"{' and '.join(changed)}: probabilities of answers were calibrated with what the "
            "reader was trained with; their order holds better than their size"
        )
    if window is not None:
        pack = reading.pack.model_copy(update={"tokens": window})
        reading = reading.model_copy(update={"pack": pack})
    if abstain_below is not None:
        if reading.confidence is None:
            raise ShouldersError(
                f"--abstain-below: '{name}' has no calibrated confidence; use a trained reader"
            )
        reading = reading.model_copy(update={"abstain_below": abstain_below})
    unlike = is_reader(name) and (
        index is None  # passages and scores are another retriever's
        or (retriever is not None and retriever != search.retriever)
        or (not rerank and bool(artefact.files))
    )
    if unlike and reading.confidence is not None:
        if abstain_below is not None:
            raise ShouldersError(
                "--abstain-below: answers' probabilities were calibrated on passages that are "
                f"found by '{search.retriever}' and re-ranked; search as the reader was trained"
            )
        stderr().print("searched otherwise than it was trained: no probability of its answers")
        reading = reading.model_copy(update={"confidence": None, "abstain_below": None})
    opened = open_passages(index) if index is not None else None
    found = None
    if opened is not None:
        # A reader searches as it was trained; without one, the index knows what it does best.
        found = opened.retriever(retriever or (search.retriever if is_reader(name) else None))
    reranker = open_reranker(Path(name)) if rerank and is_reader(name) else None
    opened_skill, _ = open_skill(name, choice)
    skill = one_skill(opened_skill, name)
    return Reader(skill, Contexts(found, opened, reranker, k or search.k), reading)


def questions_to_score(data: Path, limit: int | None, *, searches: bool) -> list[Question]:
    """Read questions, and miss now what would be missed after an LM has been loaded.

    Raises `DataError` for one without answers, or, where nothing `searches`, without passages.
    """
    from shoulders.reader.contexts import given
    from shoulders.reader.questions import check_answered, read_questions

    questions = read_questions(data)[:limit]
    check_answered(questions)
    for question in () if searches else questions:
        given(question)
    return questions


def evaluate_reader(
    reader: Reader,
    name: str,
    index: str | None,
    data: Path,
    questions: Sequence[Question],
    *,
    json: Path | None,
    dump: Path | None,
    contexts: Path | None,
    plot: Path | None,
) -> None:
    """Score a reader on the questions of a file; write and show its report card."""
    from shoulders.evaluation.report_card import dump_answers, plot_report_card, pyplot, report_card
    from shoulders.progress import quiet_progress
    from shoulders.reader.questions import write_questions

    if plot is not None:
        pyplot()  # missing, it should be missed now
    with quiet_progress(stderr(), "reading", 2 * len(questions)) as advance:
        card = report_card(reader, questions, on_search=advance, on_read=advance)
    if dump is not None:
        dump_answers(dump, questions, card.answers)
    if contexts is not None:
        ranked = [answer.ranked for answer in card.answers]
        own = [r.found_scores() for r in ranked]
        write_questions(contexts, questions, [r.passages for r in ranked], own)
    if plot is not None:
        plot_report_card(card.metrics, plot)
    emit_json(
        json,
        {
            **provenance(reader.skill, name, data),
            "index": index,
            **card.as_dict(),
            "reading": reader.config.model_dump(mode="json"),
        },
    )
    stdout().print(card_table(f"{name} on {data.name}", card))


def card_table(title: str, card: ReportCard) -> Table:
    """Return the stages of a reader as a table, each with its 95% interval."""
    table = Table(title=f"{escape(title)}, {card.n} questions", title_justify="left")
    table.add_column("stage")
    for column in ("%", "95%"):
        table.add_column(column, justify="right")
    for name, value in card.metrics.items():
        low, high = card.ci95[name]
        label = "packed passages (number)" if name == "packed_passages" else name.replace("_", " ")
        table.add_row(label, f"{value:.1f}", f"[{low:.1f}, {high:.1f}]")
    return table


def _settings(name: str) -> tuple[SearchConfig, ReadingConfig]:
    """Return how to search and read where nothing says so: a prompt or the bare LM."""
    from shoulders.reader.packer import PackConfig
    from shoulders.skills.reader import ReadingConfig
    from shoulders.skills.reader_artefact import SearchConfig

    question = ZERO_SHOT if name == BASE else PackConfig().question
    return SearchConfig(), ReadingConfig(pack=PackConfig(question=question))
