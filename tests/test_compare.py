"""`shoulders compare`: plans, splits, search, statistics, verdict, and whole runs on a tiny LM."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer

from conftest import save_lm
from shoulders.cli.app import main
from shoulders.comparison import frozen, stages, tuned
from shoulders.comparison.figures import pareto
from shoulders.comparison.forgetting import examined
from shoulders.comparison.join import joined
from shoulders.comparison.ledger import Ledger
from shoulders.comparison.methods import Method, methods_of, parameters
from shoulders.comparison.own_rows import plan_of_rows, untested
from shoulders.comparison.parts import SearchConfig
from shoulders.comparison.plan import Plan, make_plan, read_plan
from shoulders.comparison.report import write_report
from shoulders.comparison.rows import rows_of
from shoulders.comparison.run import run_comparison
from shoulders.comparison.search import best_factor
from shoulders.comparison.summary import Difference, Line, averaged, lead, lines, rests_on, without
from shoulders.comparison.verdict import verdict
from shoulders.data.mixture import Mixture
from shoulders.data.rows import read_rows
from shoulders.encoders.load import load_encoder
from shoulders.errors import (
    DataError,
    DivergedError,
    InterruptedTraining,
    RecipeError,
    ShouldersError,
    TrainingError,
    WindowError,
)
from shoulders.evaluation.metrics import paired_interval
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.skills.artefact import load_skill, read_artefact
from shoulders.skills.config import SkillConfig
from shoulders.skills.ensemble_artefact import load_ensemble
from shoulders.skills.skill import Skill
from shoulders.skills.spelling import most_tokens
from shoulders.training.configs import TrainingConfig
from shoulders.training.examples import example_at, example_of
from shoulders.training.optimizer import rate_factor
from shoulders.training.run import load_data
from shoulders.training.validation import validate

ON_CPU = {"cpu": True, "bfloat16": False}


def rows_file(folder: Path, tasks: int = 2, each: int = 20) -> Path:
    """Write rows of a few tasks; every third input has a second row."""
    lines = []
    for t in range(tasks):
        for i in range(each):
            for target in ["one", "two"][: 1 + (i % 3 == 0)]:
                row = {"task": f"t{t}", "input": f"number {t} {i}", "targets": [target]}
                lines.append(json.dumps(row))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


# -- plans -----------------------------------------------------------------------------------


def test_own_rows_are_split_by_input_and_the_same_every_time(tmp_path: Path) -> None:
    file = rows_file(tmp_path)
    plan = plan_of_rows(file, tmp_path / "a", budget={"examples": 8})
    plan_of_rows(file, tmp_path / "b", budget={"examples": 8})
    inputs = {}
    total = 0
    for split in ("train", "validation", "test"):
        own = tmp_path / "a/data" / f"{split}.jsonl"
        assert own.read_bytes() == (tmp_path / "b/data" / f"{split}.jsonl").read_bytes()
        rows = read_rows(own)
        inputs[split] = {(r.task, r.input) for r in rows}
        total += len(rows)
        assert {r.task for r in rows} == {"t0", "t1"}
    assert total == len(read_rows(file))
    assert not inputs["train"] & inputs["test"]
    assert not inputs["train"] & inputs["validation"]
    assert not inputs["validation"] & inputs["test"]
    assert (len(inputs["train"]), len(inputs["validation"]), len(inputs["test"])) == (28, 4, 8)
    assert plan.test == [str(tmp_path / "a/data/test.jsonl")]


@pytest.mark.parametrize("each", [3, 4, 5, 6, 7, 20])
def test_every_task_of_three_inputs_is_tested(each: int, tmp_path: Path) -> None:
    plan_of_rows(rows_file(tmp_path, 4, each), tmp_path / "out", budget={"examples": 8})
    for split in ("train", "validation", "test"):
        rows = read_rows(tmp_path / "out/data" / f"{split}.jsonl")
        assert {r.task for r in rows} == {"t0", "t1", "t2", "t3"}, split


def test_rates_are_not_searched_on_test_rows(tmp_path: Path) -> None:
    rows = [{"task": "t", "input": f"number {i}", "targets": ["one"]} for i in range(9)]
    files = {}
    for name, part in {"train": rows[:3], "held": rows[3:7], "test": rows[5:]}.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
    data = {"train": [str(files["train"])], "validation": [str(files["held"])]}
    values = {"data": data, "test": [str(files["test"])], "budget": {"examples": 8}}
    found = rows_of(make_plan(values))
    assert {r.input for r in found.validation} == {"number 3", "number 4"}
    assert [r.input for r in found.test] == [f"number {i}" for i in range(5, 9)]


def test_tasks_too_small_to_be_tested_are_named(tmp_path: Path) -> None:
    rows = [{"task": f"t{i % 2}", "input": f"number {i}", "targets": ["one"]} for i in range(20)]
    rows.append({"task": "tiny", "input": "number 0", "targets": ["one"]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    plan = plan_of_rows(file, tmp_path / "out", budget={"examples": 8})
    assert untested(plan) == ["tiny"]


def test_another_file_does_not_replace_the_rows_of_a_comparison(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = plan_of_rows(rows_file(tmp_path), out, budget={"examples": 8})
    before = Path(plan.test[0]).read_bytes()
    assert plan_of_rows(rows_file(tmp_path), out, budget={"examples": 8}) == plan
    ledger = Ledger(out)
    ledger.begin(plan, resume=False)
    ledger.note()
    with pytest.raises(DataError, match="holds a comparison of other rows"):
        plan_of_rows(rows_file(tmp_path, 3), out, budget={"examples": 8})
    assert Path(plan.test[0]).read_bytes() == before


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: 9 different inputs"):
        plan_of_rows(rows_file(tmp_path, 1, 9), tmp_path / "out", budget={"examples": 8})
    with pytest.raises(DataError, match="too few rows to test on"):
        plan_of_rows(rows_file(tmp_path, 6, 2), tmp_path / "out", budget={"examples": 8})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["idpt_vk"]}, "no method 'idpt_vk'.*idpt_kv"),
        ({"methods": ["static", "static"]}, "each may stand there once"),
        ({"budget": {}}, "either examples or minutes"),
        ({"budget": {"examples": 3, "minutes": 1}}, "either examples or minutes"),
        ({"test": ["train.jsonl"]}, "'train.jsonl' is trained or selected on"),
        ({"data": {"train": ["train.jsonl"]}}, "data.validation: needed"),
        ({"seed": 3}, "unknown key 'seed'"),
        ({"own": {"full": {"passes": [{}], "optimizer": {"lr": 1.0}}}}, "a method that is there"),
        ({"variants": {"full": {"of": "static"}}}, "variants.full: that is the name of a method"),
        ({"variants": {"twice": {"of": "sttaic"}}}, "variants.twice.of: no method 'sttaic'"),
        ({"variants": {"twice": {"of": "textual"}}}, "it has no variants"),
        (
            {"variants": {"twice": {"of": "full", "optimizer": {"lr": 1.0, "lr_for": {"a": 1.0}}}}},
            "variants.twice.optimizer: 'full' is tuned at one rate",
        ),
        ({"variants": {"none": {"of": "static", "share": 0}}}, "variants.none.share"),
    ],
)
def test_bad_plans_say_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    data = {"train": ["train.jsonl"], "validation": ["v.jsonl"]}
    values = {"data": data, "test": ["test.jsonl"], "budget": {"examples": 8}, **changes}
    with pytest.raises(RecipeError, match=said):
        make_plan(values, "plan.yaml")


def test_files_of_a_plan_lie_beside_it(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        rows_file(tmp_path).rename(tmp_path / f"{name}.jsonl")
    file = tmp_path / "plan.yaml"
    file.write_text(
        "data: {train: [train.jsonl], validation: [validation.jsonl]}\ntest: [test.jsonl]\n"
        "budget: {examples: 8}\n",
        encoding="utf-8",
    )
    plan = read_plan(file, ["seeds=[0, 1]"])
    assert plan.test == [str(tmp_path / "test.jsonl")]
    assert plan.data.train == [str(tmp_path / "train.jsonl")]
    assert plan.seeds == (0, 1)


# -- statistics ------------------------------------------------------------------------------


def test_a_paired_interval_equals_a_plain_loop() -> None:
    random = np.random.default_rng(3)
    a = {t: random.integers(0, 2, n).tolist() for t, n in (("x", 30), ("y", 11))}
    b = {t: random.integers(0, 2, len(v)).tolist() for t, v in a.items()}
    value, low, high = paired_interval(a, b, resamples=3000)
    assert value == pytest.approx(100 * np.mean([np.mean(a[t]) - np.mean(b[t]) for t in a]))
    own = np.random.default_rng(99)
    drawn = []
    for _ in range(3000):
        tasks = []
        for t in a:
            picks = own.integers(0, len(a[t]), len(a[t]))
            tasks.append(np.mean([a[t][i] - b[t][i] for i in picks]))
        drawn.append(100 * np.mean(tasks))
    assert (low, high) == pytest.approx(
        np.quantile(drawn, [0.025, 0.975]), abs=2.0
    )  # means come in steps of 1.7
    assert paired_interval(a, a) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same rows"):
        paired_interval(a, {"x": b["x"], "y": b["y"][1:]})


def test_pareto_keeps_what_nothing_cheaper_equals() -> None:
    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (3.0, 6.0), (4.0, 6.0)]
    assert pareto(points) == [(1.0, 2.0), (3.0, 6.0)]


def line(name: str, family: str, right: int, of: int = 400, **facts: Any) -> Line:
    scores = {"a": [1.0] * right + [0.0] * (of - right)}
    defaults: dict[str, Any] = {
        "exact_match": 100 * right / of, "ci95": (0.0, 100.0), "by_seed": [100 * right / of],
        "tasks": {}, "trained_parameters": 1000, "examples": 8, "epochs": 1, "members": 1,
        "training_seconds": 1.0, "latency_ms": 1.0, "perplexity": None, "zero_shot": None,
    }  # fmt: skip
    return Line(name=name, family=family, scores=scores, **(defaults | facts))


def test_a_lead_that_few_tasks_make_is_said_to_rest_on_them() -> None:
    """Ten tasks; the leader has all of one and a little less of each other."""
    letters, plain = [1.0] * 20, [1.0] * 9 + [0.0] * 11
    tasks = [f"t{i}" for i in range(9)]
    half = dict.fromkeys(tasks, [1.0] * 10 + [0.0] * 10)
    reads = replace(line("reads", "frozen", 1), exact_match=50.5,
                    scores={"letters": letters} | dict.fromkeys(tasks, plain))  # fmt: skip
    tuned = replace(line("tuned", "tuned", 1), exact_match=45.0,
                    scores={"letters": [0.0] * 20} | half)  # fmt: skip
    assert rests_on(reads, tuned) == ["letters"]
    assert rests_on(tuned, reads) == []
    said = verdict([reads, tuned], None, digest_equal=True)
    (found,) = [x for x in said if "rests on" in x]
    assert "rests on letters: over the other 9 tasks reads has 45.0, tuned 50.0 (-5.0 [" in found
    told = lead([tuned, reads])
    assert told is not None
    assert told["tasks"] == ["letters"]
    assert told["exact_match_without"] == pytest.approx({"tuned": 50.0, "reads": 45.0})
    assert lead([reads]) is None
    assert lead([reads, replace(reads, family="tuned")]) is None
    even = replace(reads, scores=dict.fromkeys([*tasks, "letters"], letters))
    assert len(rests_on(even, tuned)) == 10
    assert not any("rests on" in x for x in verdict([even, tuned], None, digest_equal=True))
    with pytest.raises(ValueError, match="no task"):
        without(reads, [*tasks, "letters"])


def test_the_verdict_follows_the_numbers() -> None:
    base = line("zero_shot", "bare", 4)
    wins = verdict(
        [base, line("idpt_kv", "frozen", 200), line("full", "tuned", 100)], None, digest_equal=True
    )
    assert wins[0].startswith("Use idpt_kv around the frozen LM: it beats")
    loses = verdict(
        [base, line("idpt_kv", "frozen", 100), line("full", "tuned", 200, perplexity=30.0)],
        20.0,
        digest_equal=True,
    )
    assert loses[0].startswith("Fine-tuning wins here: use full")
    assert any("full forgot" in said and "+50%" in said for said in loses)
    level = verdict(
        [base, line("idpt_kv", "frozen", 200), line("full", "tuned", 200)], None, digest_equal=True
    )
    assert "level with the best fine-tuning" in level[0]
    nothing = verdict([line("few_shot", "bare", 200), line("idpt_kv", "frozen", 200)], None,
                      digest_equal=True)  # fmt: skip
    assert nothing[0].startswith("Train nothing yet: few_shot")
    assert not any(one.startswith("Use ") for one in nothing)
    frozen, tuned = line("idpt_kv", "frozen", 100), line("full", "tuned", 90)
    worse = verdict([line("few_shot", "bare", 200), frozen, tuned], None, digest_equal=True)
    assert "few_shot" in worse[0]
    assert "is better than the best trained method, idpt_kv" in worse[0]
    assert not any(one.startswith(("Use ", "Undecided", "Fine-tuning wins")) for one in worse)
    f1 = (("few_shot", "bare", 12.0), ("idpt_kv", "frozen", 31.5), ("full", "tuned", 9.0))
    nowhere = [replace(line(name, family, 0), f1=value) for name, family, value in f1]
    said = verdict(nowhere, None, digest_equal=True)
    assert "idpt_kv 31.5, few_shot 12.0, full 9.0" in said[0]
    assert not any(one.startswith(("Use ", "Train")) for one in said)
    only = verdict([line("few_shot", "bare", 20), line("zero_shot", "bare", 10)], None,
                   digest_equal=True)  # fmt: skip
    assert only[0].startswith("few_shot answers best")
    assert any("leave two things out" in one and "1 seed" in one for one in wins)
    few = verdict([line("static", "frozen", 20, of=40)], None, digest_equal=False)
    assert any("Only 40 rows" in said for said in few)
    assert not any("Only" in said for said in wins)
    large = line("idpt_kv", "frozen", 201, trained_parameters=9000)
    cheap = verdict(
        [base, large, line("static", "frozen", 200)],
        None,
        digest_equal=True,
    )  # fmt: skip
    assert any("idpt_kv is not surely better than static" in said for said in cheap)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.1, 9.0, "better"), (-9.0, -0.1, "worse"), (-1.9, 1.9, "level"), (-4.8, 0.1, "undecided")],
)
def test_a_wide_interval_is_not_called_level(low: float, high: float, word: str) -> None:
    assert Difference((low + high) / 2, low, high).word == word


def test_the_verdict_tells_the_input_from_the_size() -> None:
    static, written = line("static_lowrank_matched", "frozen", 240), line("idpt_kv", "frozen", 200)
    said = verdict([static, written, line("static_kv", "frozen", 100)], None, digest_equal=True)
    assert any("input helps: idpt_kv against static_kv" in one for one in said)
    assert any("does not read the input: static_lowrank_matched" in s and s.endswith("better.")
               for s in said)  # fmt: skip


def test_the_verdict_says_undecided() -> None:
    near = line("full", "tuned", 205)
    near.scores["a"].reverse()  # as good as the other, on other rows
    said = verdict([line("idpt_kv", "frozen", 200), near], None, digest_equal=True)
    assert said[0].startswith("Undecided between idpt_kv around the frozen LM and")
    assert "undecided" in said[1]


def test_the_verdict_says_who_read_how_much() -> None:
    often = line("static_x3", "frozen", 200, epochs=3, examples=9600)
    said = verdict([often, line("full", "tuned", 100, examples=9600)], None, digest_equal=True)
    assert "9,600 x 3 and 9,600 examples" in said[1]
    said = verdict([often, line("full", "tuned", 100, epochs=3, examples=9600)], None,
                   digest_equal=True)  # fmt: skip
    assert " examples" not in said[1]


def test_seeds_are_averaged_row_by_row() -> None:
    first = [("a", 1.0), ("b", 0.0), ("a", 0.0)]
    second = [("a", 0.0), ("b", 0.0), ("a", 0.0)]
    assert averaged([first, second]) == {"a": [0.5, 0.0], "b": [0.0]}


# -- search ----------------------------------------------------------------------------------


def test_the_search_takes_the_best_factor_and_is_not_repeated(tmp_path: Path) -> None:
    method, calls = Method("m", "frozen"), []

    def attempt(number: int, factor: float) -> float:
        calls.append((number, factor))
        if number == 1:
            raise DivergedError("diverged")
        return abs(np.log(factor) - 0.4)

    config = SearchConfig(trials=5)
    found = best_factor(method, config, Ledger(tmp_path), attempt)
    assert [n for n, _ in calls] == [0, 1, 2, 3, 4]
    assert [f for _, f in calls[:3]] == pytest.approx([1.0, 2.0, 0.5])  # half-way to 4, both ways
    good = [f for n, f in calls if n != 1]
    assert found == min(good, key=lambda f: abs(np.log(f) - 0.4))
    assert all(1 / config.widest <= f <= config.widest for _, f in calls)
    again = best_factor(method, config, Ledger(tmp_path), lambda *_: pytest.fail("repeated"))
    assert again == found
    assert best_factor(method, SearchConfig(), Ledger(tmp_path), attempt) == 1.0


def test_a_search_of_nothing_but_divergence_says_so(tmp_path: Path) -> None:
    def attempt(number: int, factor: float) -> float:
        raise DivergedError("diverged")

    with pytest.raises(ShouldersError, match="m: every trial"):
        best_factor(Method("m", "frozen"), SearchConfig(trials=2), Ledger(tmp_path), attempt)


def test_an_interrupted_trial_is_no_diverged_one(tmp_path: Path) -> None:
    def attempt(number: int, factor: float) -> float:
        raise InterruptedTraining("stopped at step 3")

    with pytest.raises(InterruptedTraining):
        best_factor(Method("m", "frozen"), SearchConfig(trials=2), Ledger(tmp_path), attempt)
    assert Ledger(tmp_path).every(stage="trial") == []


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_answers_may_hold_what_some_call_the_end_of_a_line(mark: str, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    row = {"task": "t", "prediction": f"one{mark}two", "exact_match": 1.0}
    file = ledger.predictions("m", 0)
    file.parent.mkdir(parents=True)
    file.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 2, encoding="utf-8")
    assert ledger.answers("m", 0) == [f"one{mark}two"] * 2
    assert ledger.right("m", 0) == "11"


def test_a_resumed_plan_may_have_moved_but_its_rows_not_changed(tmp_path: Path) -> None:
    values = {"budget": {"examples": 8}, "methods": ["static"], "seeds": [0]}
    out = tmp_path / "out"
    plan = plan_of_rows(rows_file(tmp_path), out, **values)

    def begin(plan: Plan, *, resume: bool = True) -> None:
        ledger = Ledger(out)
        ledger.begin(plan, resume=resume)
        ledger.note()

    begin(plan, resume=False)

    shutil.copytree(out / "data", tmp_path / "elsewhere")
    place = str(tmp_path / "elsewhere")
    data = {"train": [f"{place}/train.jsonl"], "validation": [f"{place}/validation.jsonl"]}
    data = {**plan.data.model_dump(), **data}
    moved = {**plan.model_dump(), "data": data, "test": [f"{place}/test.jsonl"]}
    twice = {"twice": {"of": "static", "epochs": 2}}
    more = {**moved, "variants": twice, "methods": ["static", "twice"]}
    begin(make_plan(moved))
    begin(make_plan(more))
    named = []
    for less in ({**more, "variants": {"twice": {"of": "static", "epochs": 3}}},
                 {**more, "methods": ["static"]}, {**more, "length": 4}):  # fmt: skip
        with pytest.raises(TrainingError, match="another plan or other rows") as refused:
            begin(make_plan(less))
        named.append(str(refused.value).partition("rows (")[2].partition(";")[0])
    assert named == ["variants.twice", "methods without twice", "length"]

    with (tmp_path / "elsewhere/test.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"task": "t0", "input": "new", "targets": ["one"]}) + "\n")
    with pytest.raises(TrainingError, match="another plan or other rows"):
        begin(make_plan(more))
    (tmp_path / "elsewhere/test.jsonl").unlink()
    with pytest.raises(DataError, match=r"test.jsonl: no such file"):
        begin(make_plan(more))


def test_a_damaged_ledger_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text('{"stage": "run"}\n{"stage\n', encoding="utf-8")
    with pytest.raises(ShouldersError, match=r"runs\.jsonl:2"):
        Ledger(tmp_path)


# -- whole runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_folder(tiny_lm: Callable[[str], FrozenLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tiny_lm("llama"), tmp_path_factory.mktemp("lm"))


def plan_for(folder: Path, lm: Path, dtype: str = "float32", **settings: Any) -> Plan:
    values: dict[str, Any] = {
        "lm": {"name": str(lm), "dtype": dtype},
        "budget": {"examples": 16},
        "rows_per_step": 4,
        "length": 3,
        "shots": 2,
        "max_new_tokens": 3,
        "methods": ["zero_shot", "few_shot", "static_kv", "lora_r4"],
        "search": {"trials": 2, "share": 0.75},
        "forgetting": {"chunk": 16, "chunks": 4},
        **settings,
    }
    return plan_of_rows(rows_file(folder), folder / "out", **values)


@pytest.mark.slow
def test_a_whole_comparison_is_resumable_and_reported(tmp_path: Path, lm_folder: Path) -> None:
    plan, out = plan_for(tmp_path, lm_folder), tmp_path / "out"
    result = run_comparison(plan, out)
    assert [r["method"] for r in result["runs"]] == [
        "zero_shot",
        "few_shot",
        "static_kv",
        "lora_r4",
    ]
    by_name = {r["method"]: r for r in result["runs"]}
    assert by_name["static_kv"]["examples"] == by_name["lora_r4"]["examples"] == 16
    assert len(result["trials"]) == 4
    assert {f["method"] for f in result["forgetting"]} == {"frozen", "lora_r4"}
    assert result["interference"][0]["changed"] == 0
    assert result["interference"][0]["asked"] == len(read_rows(out / "data/test.jsonl"))
    assert not list(out.glob("**/weights"))  # copies of the LM do not pile up
    # What is finished is not done again; what is missing is, and comes out the same.
    kept = (out / "runs.jsonl").read_text(encoding="utf-8")
    with pytest.raises(TrainingError, match="add --resume"):
        run_comparison(plan, out)
    again = run_comparison(plan, out, resume=True)
    assert again["runs"] == result["runs"]
    assert (out / "runs.jsonl").read_text(encoding="utf-8") == kept
    others = [ln for ln in kept.splitlines() if '"method": "static_kv", "family"' not in ln]
    assert len(others) == len(kept.splitlines()) - 1
    (out / "runs.jsonl").write_text("\n".join(others) + "\n", encoding="utf-8")
    part = run_comparison(plan, out, finished=True)
    assert [r["method"] for r in part["runs"]] == ["zero_shot", "few_shot", "lora_r4"]
    assert part["unfinished"] == [{"method": "static_kv", "seed": 0}]
    assert part["interference"] == result["interference"]
    said = write_report(part, tmp_path / "part")
    assert said[-1] == "Not finished yet, and not compared: static_kv, seed 0."
    assert joined([out.parent / "part/compare.json"])["unfinished"] == part["unfinished"]
    mended = {r["method"]: r for r in run_comparison(plan, out, resume=True)["runs"]}
    for key in ("exact_match", "validation_loss", "rate_factor", "curve", "tasks"):
        assert mended["static_kv"][key] == by_name["static_kv"][key]
    other = plan.model_copy(update={"shots": 1})
    with pytest.raises(TrainingError, match="another plan"):
        run_comparison(other, out, resume=True)
    # More seeds may be asked of a comparison that is there: what it has stays.
    wider = run_comparison(plan.model_copy(update={"seeds": (0, 1)}), out, resume=True)
    assert [r for r in wider["runs"] if r["seed"] == 0] == list(mended.values())
    assert {r["method"] for r in wider["runs"] if r["seed"] == 1} == {"static_kv", "lora_r4"}
    with pytest.raises(TrainingError, match=r"seeds without 1; methods, .* may be added to"):
        run_comparison(plan, out, resume=True)  # a seed less
    result = wider

    said = write_report(result, out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in by_name)
    assert page.count("<svg") == 5
    assert not re.search(r'(src|href)="http', page.replace("xlink:href", ""))  # needs nothing else
    assert said[0] in (out / "report.md").read_text(encoding="utf-8")
    written = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    again = joined([out / "compare.json"])
    assert [replace(x, scores={}, perplexity_before=None) for x in lines(again)] == [
        replace(x, scores={}) for x in lines(result)
    ]
    assert write_report(again, tmp_path / "again")[:-1] == said
    assert [x["method"] for x in written["lines"]] == list(by_name)
    pairs = {(a, b) for a, others in written["differences"].items() for b in others}
    assert pairs == set(itertools.combinations(by_name, 2))


def result_of(runs: dict[tuple[str, int], str], **more: Any) -> dict[str, Any]:
    """Return what a comparison of two tasks with two rows each says of its runs."""
    names = list(dict.fromkeys(name for name, _ in runs))
    plan = make_plan({
        "data": {"train": ["a.jsonl"], "validation": ["b.jsonl"], "templates": None},
        "test": ["c.jsonl"], "methods": names, "budget": {"examples": 8},
        "seeds": list(dict.fromkeys(seed for _, seed in runs)),
    })  # fmt: skip
    return {
        "benchmark": "compare",
        "plan": plan.model_dump(mode="json"),
        "methods": [{"method": n, "family": "frozen", "begins_at": {}} for n in names],
        "runs": [
            {"method": name, "seed": seed, "family": "frozen", "trained_parameters": 10,
             "exact_match": 25.0 * right.count("1"), "right": right}
            for (name, seed), right in runs.items()
        ],
        "trials": [],
        "forgetting": [{"stage": "forgetting", "method": "frozen", "seed": 0, "perplexity": 9.0}],
        "latency_ms": dict.fromkeys(names, 1.0),
        "interference": [],
        "test_tasks": [["x", 2], ["y", 2]],
        "rows": {"train": 8, "validation": 2, "test": 4},
        "lm": {"fingerprint": "f", "digest_before": "d", "digest_after": "d", "name": "lm",
               "parameters": 100},
        "machine": {"processor": "one", "threads": 1, "torch": "2", "transformers": "5"},
        "date": "2026-11-29",
        **more,
    }  # fmt: skip


def joined_of(folder: Path, *results: dict[str, Any]) -> dict[str, Any]:
    files = [folder / f"{number}.json" for number in range(len(results))]
    for file, result in zip(files, results, strict=True):
        file.write_text(json.dumps(result), encoding="utf-8")
    return joined(files)


def test_a_comparison_of_which_nothing_is_finished_says_so(tmp_path: Path, lm_folder: Path) -> None:
    plan = plan_for(tmp_path, lm_folder)
    with pytest.raises(ShouldersError, match="nothing in it is finished yet"):
        run_comparison(plan, tmp_path / "out", finished=True)


def test_what_was_forgotten_is_told_from_each_parts_own_text(tmp_path: Path) -> None:
    one, other = result_of({("static", 0): "1100"}), result_of({("full", 0): "1000"})
    one["forgetting"][0]["perplexity"] = 50.0
    other["forgetting"][0]["perplexity"] = 60.0
    other["runs"][0]["family"] = other["methods"][0]["family"] = "tuned"
    other["forgetting"].append({"method": "full", "seed": 0, "perplexity": 60.6})
    said = write_report(joined_of(tmp_path, one, other), tmp_path)
    assert any("60.00 -> 60.60 (+1%)" in sentence for sentence in said)


def test_what_one_part_has_not_finished_another_may_have(tmp_path: Path) -> None:
    one = result_of({("static", 0): "1100"})
    one["unfinished"] = [{"method": "idpt", "seed": 0}, {"method": "full", "seed": 0}]
    other = result_of({("idpt", 0): "0000"})
    assert joined_of(tmp_path, one, other)["unfinished"] == [{"method": "full", "seed": 0}]


def test_an_untrained_methods_seed_is_nobodys(tmp_path: Path) -> None:
    one = result_of({("static", 1): "1100"})
    one["runs"].append({**one["runs"][0], "method": "few_shot", "family": "bare", "seed": 0})
    one["methods"].append({"method": "few_shot", "family": "bare", "begins_at": {}})
    one["latency_ms"]["few_shot"] = 1.0
    result = joined_of(tmp_path, one, result_of({("static", 2): "1000"}))
    assert result["plan"]["seeds"] == [1, 2]
    write_report(result, tmp_path)
    assert "| 1, 2 |" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_parts_of_a_comparison_are_joined_row_by_row(tmp_path: Path) -> None:
    one = result_of({("static", 0): "1100", ("idpt", 0): "1111"})
    other = result_of({("idpt", 0): "0000", ("idpt", 1): "1011"})
    other["machine"] = {**one["machine"], "processor": "two"}
    result = joined_of(tmp_path, one, other)
    assert result["plan"]["seeds"] == [0, 1]
    assert result["plan"]["methods"] == ["static", "idpt"]
    assert result["machine"]["processor"] == "one, two"
    static, idpt = lines(result)
    assert (static.by_seed, idpt.by_seed) == ([50.0], [100.0, 75.0])  # the first's own seed 0
    assert static.tasks == {"x": 100.0, "y": 0.0}
    assert idpt.tasks == {"x": 75.0, "y": 100.0}
    assert len(result["forgetting"]) == 1
    assert [part["date"] for part in result["joined"]] == ["2026-11-29"] * 2


def test_the_command_joins_parts_into_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, right in (("static", "1100"), ("idpt", "1111")):
        text = json.dumps(result_of({(name, 0): right}))
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    given = [f"--join={tmp_path / name}.json" for name in ("static", "idpt")]
    monkeypatch.setattr(sys, "argv", ["shoulders", "compare", *given, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "Use idpt: 100.0" in shown
    assert "Put together from 2 comparisons" in shown
    assert "| static | 50.0" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": {"train": 9, "validation": 2, "test": 4}}, "number of its rows"),
        ({"test_tasks": [["y", 2], ["x", 2]]}, "order of its test rows"),
        ({"lm": {"fingerprint": "g", "digest_before": "d", "digest_after": "d"}}, "its LM"),
        ({"plan": {"budget": {"examples": 16}}}, "its plan"),
        ({"benchmark": "train"}, r"1\.json: is no compare\.json"),
        ({"rows_sha256": {"train": "t", "test": "v"}}, "training or test rows are not those"),
    ],
)
def test_comparisons_that_differ_are_not_joined(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    one = result_of({("static", 0): "1100"}, rows_sha256={"train": "t", "test": "u"})
    other = {**one, **change}
    if "plan" in change:
        other["plan"] = {**one["plan"], **change["plan"]}
    with pytest.raises(DataError, match=said):
        joined_of(tmp_path, one, other)


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.pop("latency_ms"),
        lambda r: r.pop("machine"),
        lambda r: r.update(test_tasks=[1]),
        lambda r: r["runs"][0].update(right="1"),
        lambda r: r["runs"][0].update(right="11x0"),
        lambda r: r["plan"].update(budget={}),
    ],
)
def test_a_damaged_part_is_named(tmp_path: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    one, other = result_of({("static", 0): "1100"}), result_of({("idpt", 0): "1111"})
    damage(other)
    with pytest.raises(ShouldersError, match=r"1\.json: "):
        joined_of(tmp_path, one, other)


def test_joining_replaces_no_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "part.json"
    part.write_text(json.dumps(result_of({("static", 0): "1100"})), encoding="utf-8")
    given = ["--join", str(part), "--out", str(tmp_path / "out")]
    for code in (0, 0, 2):  # what was joined before may be joined again
        if code:
            (tmp_path / "out/plan.json").write_text("{}", encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["shoulders", "compare", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == code
    assert "holds a comparison; choose another --out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 3000])
def test_damaged_notes_are_named(tmp_path: Path, text: str) -> None:
    plan = plan_of_rows(rows_file(tmp_path), tmp_path / "out", budget={"examples": 8})
    (tmp_path / "out/plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(ShouldersError, match=r"plan\.json: damaged"):
        Ledger(tmp_path / "out").begin(plan, resume=True)


def test_a_plan_is_checked_before_anything_is_trained(tmp_path: Path) -> None:
    """What only the training of a method would find would be found hours in."""
    own = {"passes": [{"prompt": {"kind": "static"}}], "optimizer": {"lr": 0.1}}
    wrong = {**own, "passes": [{"prompt": {"kind": "static", "lenght": 3}}]}
    settings: dict[str, Any] = {"budget": {"examples": 8}}
    plan_of_rows(rows_file(tmp_path), tmp_path / "out", own={"mine": own}, **settings)
    for changed, why in (
        ({"own": {"mine": wrong}}, "lenght"),
        ({"own": {"mine": {**own, "passes": [{"prompt": {"kind": "nope"}}]}}}, "nope"),
        ({"own": {"mine": {**own, "passes": [{"promt": {}}]}}}, r"'passes.0.promt'.*'prompt'\?\)$"),
        ({"seeds": [-1]}, r"seeds\.0"),
        ({"seeds": [2**63]}, r"seeds\.0"),
        ({"own": {"": own}}, "a method's name is a folder's"),
        ({"search": {"widest": float("inf")}}, "search.widest"),
    ):
        with pytest.raises(RecipeError, match=why):
            plan_of_rows(rows_file(tmp_path), tmp_path / "out", **settings, **changed)


def test_a_key_that_no_plan_has_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(rows_file(tmp_path)), "--set", "seed=1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["shoulders", "compare", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "--set seed: a plan has no such key (did you mean 'seeds'?)" in capsys.readouterr().err


def test_one_name_stands_for_one_method_in_all_that_is_joined(tmp_path: Path) -> None:
    """Also where the first comparison does not know it."""
    parts = [result_of({("static", 0): "1100"}) for _ in range(3)]
    twice = {"of": "static", "epochs": 2}
    for other in (
        {"variants": {"x": {**twice, "epochs": 3}}},
        {"ensembles": {"x": ["idpt", "static"]}},
    ):
        for part, named in zip(parts[1:], ({"variants": {"x": twice}}, other), strict=True):
            part["plan"] = {**parts[0]["plan"], **named}
        with pytest.raises(DataError, match=r"2\.json: \w+\.x is not what it is in .*1\.json"):
            joined_of(tmp_path, *parts)


@pytest.mark.slow
def test_recursion_is_compared_too(tmp_path: Path, lm_folder: Path) -> None:
    """Textual recursion begins at the prefix of the same seed, which stands before it."""
    names = ["idpt_kv", "textual", "neural"]
    settings: dict[str, Any] = {"search": {"trials": 1}, "max_new_tokens": 2, "seeds": [1]}
    plan = plan_for(tmp_path, lm_folder, methods=names, **settings)
    result = run_comparison(plan, tmp_path / "out")
    runs = {r["method"]: r for r in result["runs"]}
    assert list(runs) == names
    assert runs["textual"]["trained_parameters"] == 2 * runs["idpt_kv"]["trained_parameters"]
    start = read_artefact(tmp_path / "out/runs/textual-seed1").provenance["recipe"]["start"]
    assert {Path(folder).name for folder in start.values()} == {"idpt_kv-seed1"}
    found = {line.name: line for line in lines(result)}
    assert found["textual"].examples > found["idpt_kv"].examples  # those of what it begins at too


def test_minutes_become_the_same_examples_for_all(
    tmp_path: Path, lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen.Frozen, "step_seconds", lambda *_: 1.0)
    plan = plan_for(
        tmp_path, lm_folder, budget={"minutes": 1}, methods=["static", "static_kv"],
        search={"trials": 0}, seeds=[0],
    )  # fmt: skip
    result = run_comparison(plan, tmp_path / "out")
    examples = {r["examples"] for r in result["runs"]}
    assert len(examples) == 1
    # A second a step of either: what else takes time is little here.
    steps = examples.pop() // plan.rows_per_step
    assert 10 < steps <= 22


@pytest.mark.slow
def test_rivals_lose_nats_as_frozen_methods_do(tmp_path: Path, lm_folder: Path) -> None:
    """The loss that selects a rival's rates is the one that selects a frozen method's."""
    from transformers import AutoModelForCausalLM

    from shoulders.comparison.tune import Watch

    plan = plan_for(tmp_path, lm_folder)
    lm = load_lm(str(lm_folder), dtype="float32")
    rows, validation, templates = load_data(plan.data)
    skill = Skill.base(lm, SkillConfig())
    examples = [example_of(skill, row, templates.render(row, 0), 0) for row in validation]
    ours = validate(skill, validation, templates, examples, "loss")["loss"]
    checked = [{"task": e.task, "ids": e.input_ids, "answer_ids": e.answer_ids} for e in examples]
    model = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float32)
    watch = Watch(model, checked, 1)
    assert watch.loss() == pytest.approx(ours, abs=1e-5)
    # ... and they learn from the same tokens in the same order.
    mixture = Mixture(rows, templates, plan.data, 0)
    wanted = [example_at(skill, mixture, i, 0) for i in range(8)]
    run_comparison(plan.model_copy(update={"methods": ("lora_r4",)}), tmp_path / "out")
    file = tmp_path / "out/runs/lora_r4-seed0/train.jsonl"
    given = [json.loads(ln) for ln in file.read_text(encoding="utf-8").splitlines()]
    assert len(given) == 16
    assert [g["ids"] + g["answer_ids"] for g in given[:8]] == [
        e.input_ids + e.answer_ids for e in wanted
    ]


@pytest.mark.slow
def test_what_tuning_forgets_is_measured_in_one_precision(tmp_path: Path, lm_folder: Path) -> None:
    """Copies are asked in float32, so the LM before tuning is too; and GPT-2 has no pad token."""
    folder = tmp_path / "lm"
    shutil.copytree(lm_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    out, settings = tmp_path / "out", {"search": {"trials": 0}, "budget": {"examples": 4}}
    alone = plan_for(tmp_path, folder, "int8", methods=["zero_shot", "static_kv"], **settings)
    before = run_comparison(alone, out)
    methods = ["zero_shot", "static_kv", "lora_r4"]
    plan = plan_for(tmp_path, folder, "int8", methods=methods, **settings)
    after = run_comparison(plan, out, resume=True)
    found = after["forgetting"]
    assert [one["runs"] for one in before["interference"]] == [2]
    assert [one["runs"] for one in after["interference"]] == [3]  # asked after LoRA once more
    text = [str(out / "own_text.txt")]
    wanted = examined(load_lm(str(folder), dtype="float32"), plan.forgetting, text, [])
    assert found[0]["method"] == "frozen"
    assert found[0]["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-5)
    other = examined(load_lm(str(folder), dtype="int8"), plan.forgetting, text, [])
    assert other["perplexity"] != pytest.approx(wanted["perplexity"], rel=1e-5)
    (one,) = before["forgetting"]
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)
    assert [f["method"] for f in found] == ["frozen", "lora_r4"]


def test_rivals_are_read_from_what_transformers_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "converted", lambda path: Path("cache") / path.stem)
    assert tuned.folder_of("lms/small.gguf") == "cache/small"
    assert tuned.folder_of("some/hub-id") == "some/hub-id"


def test_rows_of_like_length_together_are_the_same_steps(
    tmp_path: Path, lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shoulders.comparison import tune

    random = np.random.default_rng(0)
    rows = [
        {
            "task": "t",
            "ids": random.integers(5, 20, n).tolist(),
            "answer_ids": [6, 7, 8][: n % 3 + 1],
        }
        for n in random.integers(3, 30, 24)
    ]
    settings = {"rows_per_step": 8, "lr": 1e-2, "warmup_steps": 1, "seed": 0, **ON_CPU}
    tokenizer = AutoTokenizer.from_pretrained(lm_folder)

    def losses() -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float32)
        watch = tune.Watch(model, rows[:4], 1)
        tune.fitted(model, tokenizer, rows, settings, tmp_path / "out", watch)
        return [loss for _, loss in watch.validations]

    split = losses()
    assert len(split) == 3
    monkeypatch.setattr(tune, "rows_together", lambda n: n)
    whole = losses()
    assert abs(whole[-1] - whole[0]) > 0.01
    assert split == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("rank", [None, 2], ids=["full", "lora"])
def test_a_stopped_rival_goes_on_bit_for_bit(
    rank: int | None, tmp_path: Path, lm_folder: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shoulders.comparison import tune, watch

    class Stops(watch.Watch):
        at = 0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            super().on_step_begin()
            if self.step + 1 == self.at:
                self.stop()

    random = np.random.default_rng(0)
    rows = [
        {"task": "t", "ids": random.integers(5, 20, n).tolist(), "answer_ids": [6, 7]}
        for n in random.integers(3, 30, 20)
    ]
    settings = {"rows_per_step": 4, "lr": 1e-2, "warmup_steps": 1, "seed": 0, **ON_CPU}
    tokenizer = AutoTokenizer.from_pretrained(lm_folder)

    def run(folder: Path, at: int, told: str = "this") -> tuple[dict[str, Any], Stops]:
        torch.manual_seed(at)  # what is restored does not rest on how it begins
        model: Any = AutoModelForCausalLM.from_pretrained(
            lm_folder, dtype=torch.float32, attention_dropout=0.1
        )
        if rank is not None:
            torch.manual_seed(0)
            model = tune.with_lora(model, rank)
        found = Stops(model, rows[:4], 2)
        found.at = at
        found.keep(folder, {"told": told})
        tune.fitted(model, tokenizer, rows, settings, folder, found)
        return {n: p.detach().clone() for n, p in model.named_parameters()}, found

    weights, whole = run(tmp_path / "whole", 0)
    assert (whole.step, whole.stopped) == (5, False)
    assert [step for step, _ in whole.validations] == [2, 4, 5]
    for at in (1, 3, 4):
        assert run(tmp_path / "parts", at)[1].stopped
    again, parts = run(tmp_path / "parts", 0)
    assert (parts.step, parts.validations) == (5, whole.validations)
    assert parts.seconds > 0
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    # What is no checkpoint of this run is none: it begins again.
    run(tmp_path / "other", 3)
    assert run(tmp_path / "other", 1, "that")[1].step == 1
    state = next((tmp_path / "other").glob("checkpoints/*/state.safetensors"))
    state.write_bytes(state.read_bytes()[:-1])
    assert run(tmp_path / "other", 0, "that")[1].validations == whole.validations


def test_ctrl_c_lets_a_rival_end_its_step(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    code = f"""
import pathlib, signal, sys, time
def end(*_):
    for step in range(2, 9999):  # more than a pipe holds
        print("step", step, flush=True)
    pathlib.Path({str(kept)!r}).write_text("checkpoint")
    sys.exit()
signal.signal(signal.SIGTERM, end)
print("step 1", flush=True)
time.sleep(60)
"""

    def advance(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedTraining, match="stopped while lora was tuned; go on with --res"):
        tuned.watched([sys.executable, "-c", code], advance, "lora")
    assert kept.read_text(encoding="utf-8") == "checkpoint"


def test_a_rival_loses_what_its_own_loss_says(lm_folder: Path) -> None:
    """Logits of the answers alone give the loss, and the gradients, of the model's own."""
    from transformers import AutoModelForCausalLM

    from shoulders.comparison.tune import answer_loss, with_answers_kept

    model = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float32)
    ids = torch.randint(5, 20, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 12, [1] * 10 + [0] * 2, [1] * 9 + [0] * 3])
    labels = torch.full((3, 12), -100)
    labels[0, 8:], labels[1, 7:10], labels[2, 8:9] = ids[0, 8:], ids[1, 7:10], ids[2, 8:9]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    results = []
    for kept in (False, True):
        model.zero_grad()
        if kept:
            asked = with_answers_kept(dict(batch))
            wanted = asked.pop("labels")
            outputs = model(**asked)
            assert outputs.logits.shape[1] == 12 - 6
            loss = answer_loss(outputs, wanted, torch.tensor(8))
        else:
            loss = model(**batch).loss
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[1], results[0])


def test_long_rows_keep_no_pairs_of_positions() -> None:
    from shoulders.comparison.tune import SHORT, attention_for

    short = {"ids": [1] * (SHORT - 1), "answer_ids": [1]}
    assert attention_for([short], cpu=True) == "eager"
    assert attention_for([short], cpu=False) == "sdpa"
    assert attention_for([short, {"ids": [1] * SHORT, "answer_ids": [1]}], cpu=True) == "sdpa"


def test_every_step_keeps_its_rows() -> None:
    from shoulders.comparison.tune import by_length

    rows = [{"ids": [0] * n, "answer_ids": [1]} for n in (5, 1, 9, 3, 2, 8)]
    assert [len(row["ids"]) for row in by_length(rows, 3)] == [1, 5, 9, 2, 3, 8]


def test_variants_read_their_share_as_often_as_they_should(tmp_path: Path, lm_folder: Path) -> None:
    variants = {"static_half_x3": {"of": "static", "share": 0.5, "epochs": 3}}
    plan = plan_for(tmp_path, lm_folder, variants=variants, search={"trials": 0},
                    methods=["static", *variants])  # fmt: skip
    out = tmp_path / "out"
    result = run_comparison(plan, out)
    once, again = result["runs"]
    assert (once["examples"], once["epochs"], once["curve"][-1][0]) == (16, 1, 4)
    assert (again["examples"], again["epochs"], again["curve"][-1][0]) == (8, 3, 6)
    recipe = read_artefact(out / "runs/static_half_x3-seed0").provenance["recipe"]
    assert recipe["data"]["examples"] == 8
    assert [line.examples_read for line in lines(result)] == ["16", "8 x 3"]


def test_finished_methods_may_answer_together(tmp_path: Path, lm_folder: Path) -> None:
    variants = {"static_of2": {"of": "static", "members": 2, "epochs": 2}}
    ensembles = {"all_three": ["static_kv", "static_of2"]}
    settings: dict[str, Any] = {"variants": variants, "ensembles": ensembles, "seeds": [0, 1]}
    names = ["static_kv", "static_of2", "all_three"]
    plan = plan_for(tmp_path, lm_folder, methods=names, search={"trials": 1}, **settings)
    out = tmp_path / "out"
    result = run_comparison(plan, out)
    assert len(result["trials"]) == 2, "nothing is searched for what is not trained"
    for seed in (0, 1):
        runs = {r["method"]: r for r in result["runs"] if r["seed"] == seed}
        one, two, all_three = (runs[name] for name in names)
        assert all_three["training_seconds"] == pytest.approx(
            one["training_seconds"] + two["training_seconds"]
        )
        lm = load_lm(str(lm_folder), dtype="float32")
        joined_skill, _ = load_ensemble(out / f"runs/all_three-seed{seed}", lm)
        assert len(joined_skill.members) == all_three["members"] == 3
        assert joined_skill.trained_parameters == all_three["trained_parameters"]
        alone, _ = load_skill(out / f"runs/static_kv-seed{seed}", lm)
        short = DecodingConfig(max_new_tokens=3)
        text = ["question 1 of task 0"]
        assert joined_skill.members[0].generate(text, short) == alone.generate(text, short)
    assert [line.examples_read for line in lines(result)] == [
        "16", "16 x 2, by 2 members", "16 x 2, by 3 members",
    ]  # fmt: skip
    write_report(result, out)
    early = plan.model_copy(update={"methods": ("static_kv", "all_three", "static_of2")})
    with pytest.raises(ShouldersError, match="all_three takes up static_of2: list static_of2 bef"):
        run_comparison(early, tmp_path / "other")
    assert not (tmp_path / "other/plan.json").exists(), "a plan put right runs in the same folder"
    assert not (tmp_path / "other/runs").exists(), "it is said before anything is trained"
    for ensembles, why in (
        ({"x": ["static_kv"]}, "ensembles.x"),
        ({"x": ["static_kv", "static_kv"]}, "each method may stand there once"),
        ({"x": ["static_kv", "lora_r4"]}, "'lora_r4' is none"),
        ({"x": ["static_kv", "neural"]}, "'neural' is none"),
        ({"x": ["static_kv", "statik"]}, "no method 'statik'"),
        ({"static": ["static_kv", "idpt"]}, "ensembles.static: that is the name of a method"),
        ({"x": ["static_kv", "plain"]}, "members begin answers alike"),
        ({"a/b": ["static_kv", "static"]}, "a method's name is a folder's"),
        ({"..": ["static_kv", "static"]}, "a method's name is a folder's"),
    ):
        with pytest.raises(RecipeError, match=why):
            plan_for(
                tmp_path,
                lm_folder,
                ensembles=ensembles,
                variants={"plain": {"of": "static", "format": {"answer_prefix": ""}}},
            )


def test_an_ensemble_has_read_what_its_longest_member_has(tmp_path: Path, lm_folder: Path) -> None:
    variants = {"half_x4": {"of": "static_kv", "share": 0.5, "epochs": 4}}
    plan = plan_for(tmp_path, lm_folder, variants=variants, methods=["static_kv", "half_x4", "e"],
                    ensembles={"e": ["static_kv", "half_x4"]})  # fmt: skip
    lm = load_lm(str(lm_folder), dtype="float32")
    *_, joined_method = methods_of(plan, lm)
    assert (joined_method.share, joined_method.epochs, joined_method.members) == (0.5, 4, 2)
    # A plan's own examples and seed hold for members too.
    data = plan.data.model_copy(update={"examples": 8, "seed": 7})
    member = replace(methods_of(plan, lm)[0], drawn=2)
    assert member.data(plan, 4).examples == 16
    assert member.data(plan, 4).seed == 2
    own = member.data(plan.model_copy(update={"data": data}), 4)
    assert (own.examples, own.seed) == (8, 7)


def test_a_variant_may_be_an_ensemble(tmp_path: Path, lm_folder: Path) -> None:
    variants = {"static_of2": {"of": "static", "members": 2}}
    settings: dict[str, Any] = {"variants": variants, "search": {"trials": 0}, "seeds": [0]}
    plan = plan_for(tmp_path, lm_folder, methods=["static", *variants], **settings)
    out = tmp_path / "out"
    result = run_comparison(plan, out)
    alone, both = result["runs"]
    assert both["trained_parameters"] == 2 * alone["trained_parameters"]
    assert (alone["members"], both["members"]) == (1, 2)
    members = out / "runs/static_of2-seed0"
    first, second = (read_artefact(members / f"member-{n}") for n in range(2))
    # Its first member is trained as the method alone is, the other with the next seed.
    alone_hash = read_artefact(out / "runs/static-seed0").tensors_sha256
    assert first.tensors_sha256 == alone_hash != second.tensors_sha256
    seconds = [m.provenance["training_seconds"] for m in (first, second)]
    assert both["training_seconds"] == pytest.approx(sum(seconds))
    assert [line.examples_read for line in lines(result)] == ["16", "16, by 2 members"]
    write_report(result, out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "same order (the members of one method each in another one)" in page
    recipes = [m.provenance["recipe"] for m in (first, second)]
    assert [r["data"]["seed"] for r in recipes] == [0, 0], "both read what the method alone reads"
    # Stopped before the second member had ended: the first is left as it is.
    ledger = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    kept = [row for row in ledger if row["method"] != "static_of2"]
    (out / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    shutil.rmtree(members / "member-1")
    (members / "ensemble.json").unlink()
    facts = json.loads((members / "member-0/skill.json").read_text())
    facts["provenance"]["training_seconds"] = 5.0
    (members / "member-0/skill.json").write_text(json.dumps(facts))
    written = (members / "member-0/skill.json").stat().st_mtime_ns
    again = run_comparison(plan, out, resume=True)
    assert (members / "member-0/skill.json").stat().st_mtime_ns == written
    assert again["runs"][-1]["right"] == both["right"]
    assert again["runs"][-1]["training_seconds"] >= 5
    with pytest.raises(RecipeError, match="an ensemble is of a frozen method of one pass"):
        plan_for(tmp_path, lm_folder, variants={"x": {"of": "lora_r4", "members": 2}})
    with pytest.raises(RecipeError, match="which 'neural' is not"):
        plan_for(tmp_path, lm_folder, variants={"x": {"of": "neural", "members": 2}})


@pytest.mark.slow
def test_variants_in_another_format_read_other_tokens(tmp_path: Path, lm_folder: Path) -> None:
    """Frozen and tuned alike; what is asked afterwards is asked in the same format."""
    spelled = {"format": {"spelling": 6}}
    variants = {"kv_spelled": {"of": "static_kv", **spelled}}
    variants |= {"lora_spelled": {"of": "lora_r4", **spelled}}
    plan = plan_for(tmp_path, lm_folder, variants=variants, search={"trials": 0},
                    methods=["lora_r4", *variants])  # fmt: skip
    out = tmp_path / "out"
    result = run_comparison(plan, out)
    assert [run["method"] for run in result["runs"]] == ["lora_r4", *variants]
    assert read_artefact(out / "runs/kv_spelled-seed0").skill.format.spelling == 6
    lines_of = {}
    for name in ("lora_r4", "lora_spelled"):
        text = (out / f"runs/{name}-seed0/train.jsonl").read_text().splitlines()
        lines_of[name] = [json.loads(line) for line in text]
    for row, other in zip(*lines_of.values(), strict=True):
        assert other["ids"][-len(row["ids"]) :] == row["ids"]
        assert other["answer_ids"] == row["answer_ids"]
    longer = [len(b["ids"]) - len(a["ids"]) for a, b in zip(*lines_of.values(), strict=True)]
    assert all(5 < more <= most_tokens(6) for more in longer)


def test_a_rival_may_read_its_examples_several_times_too(tmp_path: Path, lm_folder: Path) -> None:
    variants = {
        "lora_half_x3": {"of": "lora_r4", "share": 0.5, "epochs": 3, "optimizer": {"lr": 1e-4}}
    }
    plan = plan_for(tmp_path, lm_folder, variants=variants, methods=["lora_half_x3"])
    (method,) = methods_of(plan, load_lm(str(lm_folder), dtype="float32"))
    assert (method.rank, method.steps(plan), method.optimizer["lr"]) == (4, 6, 1e-4)
    assert method.data(plan, 6).examples == 8


def test_matched_rivals_have_the_size_of_the_network(tmp_path: Path, lm_folder: Path) -> None:
    import functools

    names = ["idpt_kv", "static_kv_matched", "static_lowrank_matched", "lora_matched"]
    plan = plan_for(tmp_path, lm_folder, methods=names)
    lm = load_lm(str(lm_folder), dtype="float32")
    written, *matched, lora = methods_of(plan, lm)
    encoder = functools.cache(load_encoder)
    wanted = parameters(written.passes, lm, encoder)
    for method in matched:
        assert parameters(method.passes, lm, encoder) == pytest.approx(wanted, rel=0.05)
    from peft import LoraConfig, get_peft_model

    assert lora.rank is not None
    config = LoraConfig(r=lora.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(load_lm(str(lm_folder), dtype="float32").model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "either a plan"),
        (["plan.yaml", "--data", "rows.jsonl"], "either a plan"),
        (["plan.yaml", "--minutes", "3"], "goes with --data"),
        (["missing.yaml"], "no such recipe file"),
        (["--data", "missing.jsonl"], "no such file"),
        (["--join", "missing.json"], "missing.json: no such file"),
        (["plan.yaml", "--join", "a.json"], "either a plan"),
        (["--join", "a.json", "--resume"], "it takes --out and --json only"),
        (["--data", "rows.jsonl", "--dry-run"], "--dry-run checks a plan"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shoulders", "compare", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_shipped_plan_is_valid_and_trains_on_no_test_row() -> None:
    plan = read_plan(Path(__file__).parents[1] / "recipes/compare/multitask.yaml")
    assert "multitask/test.jsonl" in plan.test[0]
    assert not any("test" in Path(f).name for f in (*plan.data.train, *plan.data.validation))
    assert plan.data.templates is not None
    assert Path(plan.data.templates).is_file()
    assert len(plan.seeds) == 3


def test_a_plan_can_be_checked_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan = Path(__file__).parents[1] / "recipes/compare/multitask.yaml"
    out = tmp_path / "out"
    command = ["shoulders", "compare", str(plan), "--dry-run", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*command, "--methods", "static_kv,lora_r16"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "valid; LM embedded, 2 methods (static_kv, lora_r16), 3 seeds, 600 steps" in said
    assert not out.exists()


@pytest.mark.slow  # starts two trainings in processes of their own
def test_a_rival_that_diverges_is_a_failed_trial(tmp_path: Path, lm_folder: Path) -> None:
    """Its own process says so; the comparison goes on, and can be resumed."""
    plan = plan_for(tmp_path, lm_folder)
    lm = load_lm(str(lm_folder), dtype="float32")
    rivals = tuned.Tuned(lm, plan, rows_of(plan), Console(quiet=True))
    wild = Method("wild", "tuned", optimizer={"lr": 1e30}, rank=4)
    for _ in range(2):  # resumed: known from now on
        with pytest.raises(DivergedError, match="wild, seed 0: its loss is no number"):
            rivals.train(wild, tmp_path / "wild", steps=2, seed=0, factor=1.0, keep=True)
    assert not (tmp_path / "wild/weights").exists()
    # A run that was killed while its weights were written is made again.
    mild = replace(wild, optimizer={"lr": 1e-3})
    (tmp_path / "mild/weights").mkdir(parents=True)
    (tmp_path / "mild/weights/half").write_text("")
    rivals.train(mild, tmp_path / "mild", steps=1, seed=0, factor=1.0, keep=True)
    assert not (tmp_path / "mild/weights/half").exists()


def test_rivals_and_frozen_methods_have_one_schedule(
    tmp_path: Path, lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from shoulders.comparison import tune

    seen: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    rows = [{"task": "t", "ids": [5, 6, 7], "answer_ids": [8]}] * 20
    settings = {"rows_per_step": 2, "lr": 0.5, "warmup_steps": 3, "seed": 0, **ON_CPU}
    tokenizer = AutoTokenizer.from_pretrained(lm_folder)
    model = AutoModelForCausalLM.from_pretrained(lm_folder, dtype=torch.float32)
    watch = tune.Watch(model, rows[:1], 10)
    tune.fitted(model, tokenizer, rows, settings, tmp_path / "out", watch)
    schedule = TrainingConfig(steps=10, warmup_steps=3, optimizer={"lr": 0.5})  # type: ignore[arg-type]
    assert seen == pytest.approx([0.5 * rate_factor(i, schedule) for i in range(10)])


def test_a_users_own_files_are_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    own = rows_file(tmp_path).rename(tmp_path / "data/train.jsonl")
    before = own.read_bytes()
    monkeypatch.chdir(tmp_path)
    given = ["shoulders", "compare", "--data", "data/train.jsonl", "--out", "."]
    for more, said in ((["--set", "length=x"], "length"), ([], "choose another --out")):
        monkeypatch.setattr(sys, "argv", [*given, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
        assert own.read_bytes() == before
        assert [file.name for file in (tmp_path / "data").iterdir()] == ["train.jsonl"]


def test_inputs_that_differ_in_spaces_and_capitals_stay_together(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    texts = [f"Number {i}{end}" for i in range(40) for end in ("", " ", "  ?".strip("?"))]
    texts += [text.upper() for text in texts]
    lines = [json.dumps({"task": "t", "input": t, "targets": ["x"]}) for t in texts]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plan = plan_of_rows(file, tmp_path / "out", budget={"examples": 8})
    parts = [{" ".join(r.input.lower().split()) for r in read_rows(Path(f))}
             for f in (*plan.data.train, *plan.data.validation, *plan.test)]  # fmt: skip
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40


def test_matched_methods_may_be_given_a_size(tmp_path: Path, lm_folder: Path) -> None:
    names = ["static_kv_matched", "static_lowrank_matched", "lora_matched"]
    plan = plan_for(tmp_path, lm_folder, methods=names, budget={"examples": 8, "parameters": 9000})
    lm = load_lm(str(lm_folder), dtype="float32")
    kv, lowrank, lora = methods_of(plan, lm)
    for method in (kv, lowrank):
        found = parameters(method.passes, lm, load_encoder)
        assert abs(found - 9000) < 900, method.name
    assert lora.rank == 6  # 1,536 numbers of each rank


def test_a_row_too_long_is_named_before_anything_is_trained(
    tmp_path: Path, lm_folder: Path
) -> None:
    plan = plan_for(tmp_path, lm_folder, methods=["static_kv"])
    test = Path(plan.test[0])
    long = {"task": "t0", "input": "word " * 900, "targets": ["one"]}
    test.write_text(test.read_text() + json.dumps(long) + "\n")
    with pytest.raises(WindowError, match=r"test.jsonl:\d+: "):
        run_comparison(plan, tmp_path / "fresh")
    assert not (tmp_path / "fresh/runs").exists()


def test_a_row_that_fits_without_its_prompt_only_is_named_too(
    tmp_path: Path, lm_folder: Path
) -> None:
    lm = load_lm(str(lm_folder), dtype="float32")
    room = Skill.base(lm, SkillConfig()).input_room()
    plan = plan_for(tmp_path, lm_folder, methods=["static_kv"], length=40)
    test = Path(plan.test[0])
    words = "word " * room
    while len(lm.tokenize([words])[0]) > room - 20:
        words = words[:-5]
    long = {"task": "t0", "input": words, "targets": ["one"]}
    test.write_text(test.read_text() + json.dumps(long) + "\n")
    with pytest.raises(WindowError, match=r"test.jsonl:\d+: .*prompt 40"):
        run_comparison(plan, tmp_path / "fresh")


def test_encoders_keep_nothing_of_what_is_timed(
    tmp_path: Path, lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(tmp_path, lm_folder, methods=["static_kv", "idpt_kv"])
    monkeypatch.setattr(frozen, "load_encoder", lambda _name, on_disk=True: on_disk)
    monkeypatch.setattr(frozen, "load", lambda _folder, _lm, encoder: (encoder("any"), None))
    lm = load_lm(str(lm_folder), dtype="float32")
    own = frozen.Frozen(lm, plan, rows_of(plan), Console(quiet=True))
    assert own.skill(tmp_path)
    ledger = Ledger(tmp_path / "out")
    for method in plan.methods:
        ledger.add({"stage": "run", "method": method, "seed": 0})
    timed: list[object] = []

    def latencies(asked: list[tuple[object, object]], _console: object) -> list[float]:
        timed.extend(skill for skill, _ in asked)
        return [1.0 for _ in asked]

    monkeypatch.setattr(stages, "latencies", latencies)
    methods = [Method(name, "frozen", ()) for name in plan.methods]
    setting = SimpleNamespace(
        ledger=ledger, methods=methods, frozen=own, plan=plan, texts=["a"], console=None
    )
    stages.time_answers(setting)  # type: ignore[arg-type]
    assert timed == [False, False]
