"""From a reader's recipe to a saved reader: index, re-ranker, contexts, prompt, confidence.

Every stage leaves its result in the output folder, so that a stopped run goes on with the stage it
was in. The prompt is trained on contexts that were retrieved, re-ranked and packed exactly as at
inference; training questions are re-ranked by models that did not see them.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.data.mixture import MixtureConfig
from shoulders.encoders.load import load_encoder
from shoulders.errors import TrainingError
from shoulders.files import atomic_path, only_writer, read_noted, remove_partial, write_json
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.reader.answers import has_answer
from shoulders.reader.contexts import Contexts, Ranked
from shoulders.reader.index.build import Choices, build
from shoulders.reader.index.index import Index
from shoulders.reader.index.manifest import FILE as INDEX_FILE
from shoulders.reader.index.plan import DenseChoice
from shoulders.reader.questions import Question, check_answered, read_questions
from shoulders.reader.watch import Watch
from shoulders.skills.artefact import FILE as SKILL_FILE
from shoulders.skills.reader import Reader
from shoulders.skills.reader_artefact import FILE, save_reader
from shoulders.skills.skill import Skill
from shoulders.training.confidence import fitted_confidence
from shoulders.training.processes import Processes
from shoulders.training.reader_recipe import ReaderRecipe
from shoulders.training.recipe import Recipe
from shoulders.training.rerank import trained_reranker
from shoulders.training.run import hashes_of, run_recipe
from shoulders.training.start import same_recipe
from shoulders.training.textual import run_textual
from shoulders.training.validation import check_selectable

INDEX = "index"
CONTEXTS = "contexts"
RECIPE, COLLECTION = "recipe.json", "collection.json"
TASK = "reading"


def run_reader_recipe(
    recipe: ReaderRecipe, out: Path, watch: Watch, *, resume: bool = False, console: Console
) -> Reader:
    """Train what a reader's recipe describes and save it in `out`.

    Raises:
        TrainingError: `out` holds a finished reader, or an unfinished one without `resume`.
        DataError, LMError, RecipeError, ShouldersError: what cannot be read or written, or is
            written by another process.
    """
    if (out / FILE).exists():
        raise TrainingError(f"{out}: already holds a finished reader; choose another --out")
    if out.exists() and any(out.iterdir()) and not resume:
        raise TrainingError(f"{out}: holds an unfinished run; add --resume or choose another --out")
    if Processes.started().count > 1:
        raise TrainingError("a reader is trained in stages, one after another: start one process")
    with only_writer(out / CONTEXTS):  # the prompt's own training locks `out` itself
        return _run(recipe, out, watch, console)


def _run(recipe: ReaderRecipe, out: Path, watch: Watch, console: Console) -> Reader:
    started = time.monotonic()
    same_recipe(recipe, out / RECIPE, hashes_of([*recipe.reader.train, *recipe.reader.validation]))
    train, validation = questions_of(recipe)
    search = recipe.reader.search
    with opened_index(recipe, out / INDEX, watch) as index:
        collection = index.manifest.content
        same_collection(out / COLLECTION, collection)
        retriever = index.retriever(search.retriever)
        reranking = trained_reranker(
            recipe.reader.reranker, train, retriever, index, search.k, out, watch
        )
        contexts = Contexts(retriever, index, reranking.reranker, search.k)
        with watch.stage("ordering validation passages", len(validation)) as advance:
            found = contexts.ranked(validation, advance)
    rows = {"train": (train, reranking.ranked), "validation": (validation, found)}
    skill = trained_prompt(recipe, rows, out, watch, console)
    reader = Reader(skill, contexts, recipe.reader.reading)
    confidence = None
    if validation:
        with watch.stage("calibrating on validation answers", len(validation)) as advance:
            answers = reader.answer(validation, found, on_rows=advance)
        confidence = fitted_confidence(validation, answers)
        if confidence is None:
            never = "" if recipe.reader.reading.abstain_below is None else ", and it never abstains"
            watch.note(
                f"too few right or wrong validation answers: confidence is not calibrated{never}"
            )
    reading = recipe.reader.reading.model_copy(update={"confidence": confidence})
    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "collection": collection,
        "reranker": reranking.facts,
        "recipe": recipe.model_dump(mode="json"),
        "machine": machine(),
    }
    similarity = recipe.reader.reranker.similarity if recipe.reader.reranker else None
    save_reader(out, search, reading, similarity, provenance)
    # The index was closed while the prompt was trained: the reader has one of its own.
    index = opened_index(recipe, out / INDEX, watch)
    contexts = Contexts(index.retriever(search.retriever), index, reranking.reranker, search.k)
    return Reader(skill, contexts, reading)


def same_collection(file: Path, content: str) -> None:
    """Note the hash of an index's passages; raises `TrainingError` where it was another before.

    What was ranked and packed then would stand beside what is searched now.
    """
    if not file.is_file():
        write_json(file, {"content": content})
    elif (noted := read_noted(file).get("content")) != content:
        raise TrainingError(
            f"{file.parent}: was begun with other passages in the index (content {noted}, now "
            f"{content}); choose another --out"
        )


def questions_of(recipe: ReaderRecipe) -> tuple[list[Question], list[Question]]:
    """Return the questions to train on, and those of validation that are not among them.

    Raises `DataError` for what cannot be read, and for a question without answers.
    """
    train = [q for name in recipe.reader.train for q in _answered(Path(name))]
    seen = {_plain(q.question) for q in train}
    validation = [q for name in recipe.reader.validation for q in _answered(Path(name))]
    # Promise 2: what was trained on selects and calibrates nothing.
    unseen = [q for q in validation if _plain(q.question) not in seen]
    check_selectable(recipe.training.select, unseen)
    return train, unseen


def _answered(file: Path) -> list[Question]:
    questions = read_questions(file)
    check_answered(questions)
    return questions


def opened_index(recipe: ReaderRecipe, folder: Path, watch: Watch) -> Index:
    """Open the recipe's index, or build one of its collection in `folder`."""
    collection = Path(recipe.reader.collection)
    if (collection / INDEX_FILE).is_file():
        return Index(collection)
    if not (folder / INDEX_FILE).is_file():
        kind = recipe.reader.search.retriever
        dense = None if kind == "sparse" else DenseChoice()
        build(collection, folder, watch, Choices(dense, kind == "approximate"), resume=True)
    return Index(folder)


def trained_prompt(
    recipe: ReaderRecipe,
    rows: Mapping[str, tuple[Sequence[Question], Sequence[Ranked]]],
    out: Path,
    watch: Watch,
    console: Console,
) -> Skill:
    """Pack contexts, train the prompt on them, and return the skill (trained before: loaded)."""
    from shoulders.skills.artefact import load_skill

    if (out / SKILL_FILE).is_file():
        lm = load_lm(**recipe.lm.model_dump())
        return load_skill(out, lm, functools.cache(load_encoder))[0]
    files = {split: out / CONTEXTS / f"{split}.jsonl" for split in rows}
    if not all(file.is_file() for file in files.values()):
        if (out / CONTEXTS).is_dir():
            remove_partial(out / CONTEXTS)
        lm = load_lm(**recipe.lm.model_dump())
        skill = Skill.create(lm, recipe.skill, functools.cache(load_encoder))
        for split, (questions, ranked) in rows.items():
            with watch.stage(f"packing {split} contexts", len(questions)) as advance:
                write_contexts(
                    files[split], skill, recipe, questions, ranked, taught=split == "train"
                )
                advance(len(questions))
        del lm, skill  # the next stage loads its own
    data = MixtureConfig(
        train=[str(files["train"])],
        validation=[str(files["validation"])] if rows["validation"][0] else [],
    )
    prompt = Recipe(
        lm=recipe.lm,
        skill=recipe.skill,
        data=data,
        start=recipe.start,
        cross_fit=recipe.cross_fit,
        training=recipe.training,
    )
    train = run_recipe if recipe.cross_fit is None else run_textual
    return train(prompt, out, resume=True, console=console)


def write_contexts(
    file: Path,
    skill: Skill,
    recipe: ReaderRecipe,
    questions: Sequence[Question],
    ranked: Sequence[Ranked],
    *,
    taught: bool,
) -> None:
    """Write what the LM will read of every question, with its answers, as rows.

    Rows that are `taught` leave out questions as the recipe says, and of several right answers
    those that do not stand in the context, where any does. Rows to select on keep all.
    """
    reader = Reader(skill, Contexts(None, None, None, 1), recipe.reader.reading)
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for question, packed in zip(questions, reader.packed(questions, ranked), strict=True):
            inside = [a for a in question.answers if has_answer(packed.context, [a])]
            dropped = taught and not inside and recipe.reader.unanswerable == "drop"
            if not question.answers or dropped:
                continue
            row: dict[str, Any] = {
                "task": TASK,
                "input": packed.text,
                "targets": (inside if taught else []) or list(question.answers),
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
