"""Evaluation: exact numbers, averages over tasks, ranking, dumps, spread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from shoulders.cli.rows import spread
from shoulders.data.rows import Row, read_rows
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.errors import DataError, WindowError
from shoulders.evaluation.evaluate import (
    EVALUATION_DECODING,
    Evaluation,
    Prediction,
    dump_predictions,
    evaluate,
    summarise,
)
from shoulders.evaluation.metrics import bootstrap_interval
from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.score import Score
from shoulders.skills.config import PassConfig, SkillConfig
from shoulders.skills.skill import Skill
from tiny_models import WINDOW, save_tiny_lm, write_jsonl


class FakeSkill:
    """Answers from a table and likes the longest option best; notes what it was given."""

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers
        self.texts: list[str] = []
        self.scored: list[str] = []
        self.decoding: DecodingConfig | None = None

    def generate(
        self, texts: Sequence[str], decoding: DecodingConfig, *, on_rows: Any = None
    ) -> list[list[Completion]]:
        self.texts, self.decoding = list(texts), decoding
        if on_rows is not None:
            on_rows(len(texts))
        return [[Completion(self.answers[t], [1], -0.5, "stop")] for t in texts]

    def score(self, texts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[Score]]:
        self.scored = list(texts)
        return [[Score(float(len(o)), 1) for o in several] for several in options]


ROWS = [
    Row("north", "a", ("Paris",)),
    Row("south", "b", ("the red car",)),
    Row("north", "c", ("two", "2")),
    Row("north", "d", ("yes",), options=("yes", "definitely")),
    Row("north", "e", ("definitely",), options=("yes", "definitely")),
    Row("south", "f", ("no",)),
]
ANSWERS = {"a": " paris.", "b": "the red bus", "c": "2", "d": "yes", "e": "no", "f": "maybe"}


def _evaluate(rows: Sequence[Row] = ROWS, **settings: Any) -> tuple[Evaluation, FakeSkill]:
    fake = FakeSkill(ANSWERS)
    return evaluate(cast(Skill, fake), rows, Templates(), **settings), fake


def test_exact_numbers() -> None:
    result, fake = _evaluate()
    # north: a, c, d right, e wrong; south: both wrong. b shares "red" of "red car", "red bus".
    assert result.tasks == {
        "north": {"n": 4, "exact_match": 75.0, "f1": 75.0, "rank_accuracy": 50.0},
        "south": {"n": 2, "exact_match": 0.0, "f1": 25.0},
    }
    assert result.metrics == {"exact_match": 37.5, "f1": 50.0, "rank_accuracy": 50.0}
    assert result.n == 6
    assert fake.decoding == EVALUATION_DECODING
    assert fake.decoding.temperature == 0
    assert fake.scored == ["d", "e"]  # rows without options are not ranked


def test_predictions_stand_in_the_order_of_the_rows() -> None:
    result, _ = _evaluate()
    assert [p.input for p in result.predictions] == [r.input for r in ROWS]
    assert result.predictions[0] == Prediction("north", "a", "paris.", ("Paris",), 1, 1, None, -0.5)
    assert [p.rank_accuracy for p in result.predictions] == [None, None, None, 0.0, 1.0, None]


def test_tasks_weigh_the_same_however_many_rows_they_have() -> None:
    rows = [ROWS[0]] * 9 + [ROWS[5]]
    result, _ = _evaluate(rows)
    assert result.metrics["exact_match"] == 50.0
    assert result.tasks["north"]["n"] == 9


def test_intervals_are_the_stratified_bootstrap() -> None:
    result, _ = _evaluate()
    expected = bootstrap_interval({"north": [1, 1, 1, 0], "south": [0, 0]})
    assert result.ci95["exact_match"] == expected
    low, high = expected
    assert 0 <= low < 37.5 < high <= 100
    assert result.ci95.keys() == result.metrics.keys()


def test_options_are_ranked_where_that_is_asked() -> None:
    result, fake = _evaluate(rank=False)
    assert set(result.metrics) == {"exact_match", "f1"}
    assert fake.scored == []


def test_no_options_no_rank_accuracy() -> None:
    result, fake = _evaluate([ROWS[0], ROWS[1]])
    assert set(result.metrics) == {"exact_match", "f1"}
    assert fake.scored == []


def test_the_squad_normalizer_changes_exact_match_only() -> None:
    rows = [Row("t", "b", ("red bus",))]
    general, _ = _evaluate(rows)
    squad, _ = _evaluate(rows, normalizer="squad")
    assert general.metrics == {"exact_match": 0.0, "f1": 100.0}
    assert squad.metrics == {"exact_match": 100.0, "f1": 100.0}


def test_the_first_template_is_used() -> None:
    fake = FakeSkill({"N a": "paris", "b!": "x"})
    templates = Templates({"north": ["N {{ input }}", "{{ input }}"], "*": ["{{ input }}!"]})
    seen: list[int] = []
    result = evaluate(cast(Skill, fake), ROWS[:2], templates, on_rows=seen.append)
    assert fake.texts == ["N a", "b!"]
    assert result.predictions[1].input == "b!"
    assert sum(seen) == 2


def test_nothing_to_evaluate() -> None:
    empty = summarise([], 0.0)
    assert (empty.n, empty.metrics, empty.tasks) == (0, {}, {})
    with pytest.raises(DataError):
        bootstrap_interval({})
    with pytest.raises(DataError, match="no rows"):
        evaluate(cast(Skill, FakeSkill({})), [], Templates())


def test_as_dict_is_json_and_a_dump_reads_back(tmp_path: Path) -> None:
    result, _ = _evaluate()
    values = json.loads(json.dumps(result.as_dict()))
    assert set(values) == {"n", "seconds", "metrics", "ci95", "tasks"}
    assert values["ci95"]["f1"] == list(result.ci95["f1"])
    dump_predictions(tmp_path / "dump.jsonl", result.predictions)
    lines = [json.loads(x) for x in (tmp_path / "dump.jsonl").read_text().splitlines()]
    read = [Prediction(**{**line, "targets": tuple(line["targets"])}) for line in lines]
    assert read == result.predictions
    assert summarise(read, result.seconds) == result


def test_a_dump_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "dump.jsonl"
    path.write_text("old")
    result, _ = _evaluate()
    with pytest.raises(TypeError):
        dump_predictions(path, [result.predictions[0], cast(Prediction, "no prediction")])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- with a real LM ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    folder = save_tiny_lm(tmp_path_factory.mktemp("evaluate") / "lm")
    found: FrozenLM = load_lm(str(folder), dtype="float32")
    return found


OPTIONS = ("paris", "madrid and so on", "no", "two words", "the end")


@torch.no_grad()
def _log_likelihood(skill: Skill, text: str, answer: str) -> float:
    """One text, one answer, one plain forward pass, no cache."""
    ids, continuation = skill.input_ids([text])[0], skill.answer_ids([answer])[0]
    embedded = skill.lm.embed(torch.tensor(ids + continuation))
    embedded = torch.cat([skill.prompt([text]).vectors[0], embedded])
    logits = skill.lm.model(inputs_embeds=embedded[None]).logits[0].float()
    at = logits[-len(continuation) - 1 : -1].log_softmax(-1)
    return float(at[range(len(continuation)), continuation].sum())


def test_rank_accuracy_is_the_argmax_of_plain_log_likelihoods(lm: FrozenLM) -> None:
    config = SkillConfig(passes=(PassConfig(prompt={"kind": "static", "length": 3}),))
    skill = Skill.create(lm, config, load_encoder, torch.Generator().manual_seed(0))
    texts = [f"question {i} " + "and so on " * (i % 3) for i in range(12)]
    rows = [Row("t", text.strip(), (OPTIONS[i % 5],), OPTIONS) for i, text in enumerate(texts)]
    expected = []
    for row, scores in zip(
        rows, skill.score([r.input for r in rows], [list(OPTIONS)] * 12), strict=True
    ):
        plain = [_log_likelihood(skill, row.input, option) for option in OPTIONS]
        assert [s.logprob for s in scores] == pytest.approx(plain, abs=1e-4)
        expected.append(float(OPTIONS[max(range(5), key=plain.__getitem__)] in row.targets))
    result = evaluate(skill, rows, Templates())
    assert [p.rank_accuracy for p in result.predictions] == expected
    assert result.metrics["rank_accuracy"] == pytest.approx(100 * sum(expected) / 12)


def test_answers_are_those_of_the_row_alone(lm: FrozenLM) -> None:
    skill = Skill.base(lm)
    rows = [Row("t", f"question {i} " + "and so on " * (i % 4) + "x", ("a",)) for i in range(8)]
    together = evaluate(skill, rows, Templates()).predictions
    alone = [evaluate(skill, [row], Templates()).predictions[0] for row in rows]
    assert [p.prediction for p in together] == [p.prediction for p in alone]
    assert [p.logprob for p in together] == pytest.approx([p.logprob for p in alone], abs=1e-3)
    for p in together:
        assert "\n" not in p.prediction


# -- spread ------------------------------------------------------------------------------


def _rows(tasks: str) -> list[Row]:
    return [Row(task, str(place), ("x",)) for place, task in enumerate(tasks)]


@pytest.mark.parametrize(
    ("tasks", "limit", "places"),
    [
        ("aaaabbcc", None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("aaaabbcc", 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("aaaabbcc", 99, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("aaaabbcc", 3, [0, 4, 6]),
        ("aaaabbcc", 4, [0, 1, 4, 6]),
        ("aaaabbcc", 7, [0, 1, 2, 4, 5, 6, 7]),
        ("cabcab", 3, [0, 1, 2]),
        ("aaaabbcc", 1, [0]),
    ],
)
def test_spread_is_balanced_and_in_file_order(
    tasks: str, limit: int | None, places: list[int]
) -> None:
    assert [int(r.input) for r in spread(_rows(tasks), limit)] == places


def test_a_row_that_does_not_fit_is_named_by_file_and_line(tmp_path: Path) -> None:
    """Through rank classification too, which reads some of the rows; not by the row's number."""
    lines = [{"task": "t", "input": f"x{i}", "targets": ["y"]} for i in range(3)]
    write_jsonl(tmp_path / "a.jsonl", lines[:2])
    write_jsonl(tmp_path / "b.jsonl", lines[2:])
    (tmp_path / "b.jsonl").write_text("\n" + (tmp_path / "b.jsonl").read_text())
    rows = [row for name in ("a", "b") for row in read_rows(tmp_path / f"{name}.jsonl")]
    base = Skill.base(load_lm(str(save_tiny_lm(tmp_path / "lm")), dtype="float32"))
    answer = DecodingConfig(max_new_tokens=1)
    late = replace(rows[2], input="z " * WINDOW)
    with pytest.raises(WindowError, match=r"/b\.jsonl:2: \('z z .*tokens, \d+ fit"):
        evaluate(base, [*rows[:2], late], Templates(), decoding=answer)
    # Short enough to be answered, too long beside one of its options.
    long = replace(rows[2], input="z" * (WINDOW - 40), options=("y", "n" * 60))
    with pytest.raises(WindowError, match=r"/b\.jsonl:2: \('zzz"):
        evaluate(base, [*rows[:2], long], Templates(), decoding=answer)
    with pytest.raises(WindowError, match=r"^row 2: \('zzz"):
        evaluate(base, [rows[0], replace(long, where=None)], Templates(), decoding=answer)
