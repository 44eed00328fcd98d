"""From a reader's recipe to answers: every stage on tiny models, through the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shoulders.errors import (
    ArtefactError,
    DataError,
    RecipeError,
    ShouldersError,
    TrainingError,
)
from shoulders.files import only_writer
from shoulders.reader.watch import Silent
from shoulders.skills.reader_artefact import read_reader
from shoulders.training.read import questions_of, run_reader_recipe, same_collection
from shoulders.training.reader_recipe import is_reader, make_reader_recipe, read_reader_recipe
from shoulders.training.recipe import read_recipe
from tiny_models import environment, save_tiny_encoder, save_tiny_lm, write_jsonl, write_recipe

PLACES = ("oslo", "rome", "lima", "cairo", "paris", "delhi", "quito", "tunis", "accra", "seoul")
RIVERS = ("aker", "tiber", "rimac", "nile", "seine", "yamuna", "machan", "medj", "odaw", "han")


def write_data(folder: Path) -> tuple[Path, Path, Path]:
    """Write a collection of twenty passages, and questions for training and validation."""
    folder.mkdir(parents=True)
    passages = folder / "passages.tsv"
    lines = ["id\ttext\ttitle"]
    for i, (place, river) in enumerate(zip(PLACES, RIVERS, strict=True)):
        lines.append(f"{i}\tThe city of {place} lies on the {river}.\t{place}")
        lines.append(f"{100 + i}\tThe people of {place} like the sea. They swim.\t{place} people")
    passages.write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = [
        {"question": f"on which river does {p} lie?", "answers": [r], "gold_passage_id": str(i)}
        for i, (p, r) in enumerate(zip(PLACES, RIVERS, strict=True))
    ]
    again = {**rows[0], "question": "On which  river does Oslo lie?"}  # also in training
    return (
        passages,
        write_jsonl(folder / "train.jsonl", rows[:7]),
        write_jsonl(folder / "validation.jsonl", [*rows[7:], again]),
    )


def test_questions_without_answers_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    values = recipe_of(tmp_path)
    file = Path(values["reader"]["validation"][0])
    with file.open("a", encoding="utf-8") as rows:
        rows.write('{"question": "who swims?"}\n')
    recipe = make_reader_recipe(values, "mine")
    with pytest.raises(DataError, match=r"validation\.jsonl:5: question 'who swims\?' has no"):
        questions_of(recipe)


def recipe_of(folder: Path, **reader: Any) -> dict[str, Any]:
    passages, train, validation = write_data(folder / "data")
    encoder = str(save_tiny_encoder(folder / "encoder"))
    section: dict[str, Any] = {
        "collection": str(passages),
        "train": [str(train)],
        "validation": [str(validation)],
        "search": {"k": 4},
        "reranker": {
            "similarity": encoder,
            "cross_encoder": {
                "encoder": encoder,
                "epochs": 1,
                "folds": 2,
                "max_length": 48,
                "mining": {"depth": 4, "negatives": 2},
            },
        },
        "reading": {"pack": {"tokens": 40}, "max_new_tokens": 6},
    }
    return {
        "lm": {"name": str(save_tiny_lm(folder / "lm"))},
        "reader": section | reader,
        "skill": {"passes": [{"prompt": {"kind": "static_kv", "length": 3}}]},
        "training": {
            "steps": 4,
            "rows_per_step": 4,
            "warmup_steps": 1,
            "validate_every": 2,
            "optimizer": {"kind": "adamw", "lr": 0.01},
        },
    }


def shoulders(cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoulders", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(cache), capture_output=True, text=True, check=False
    )


def test_one_process_trains_a_reader(tmp_path: Path) -> None:
    recipe = make_reader_recipe(recipe_of(tmp_path))
    out, console = tmp_path / "out", Console(quiet=True)
    with (
        only_writer(out / "contexts"),
        pytest.raises(ShouldersError, match="contexts: another process writes there"),
    ):
        run_reader_recipe(recipe, out, Silent(), resume=True, console=console)


def test_other_passages_than_a_reader_was_begun_with_are_noticed(tmp_path: Path) -> None:
    same_collection(tmp_path / "collection.json", "a")
    same_collection(tmp_path / "collection.json", "a")
    with pytest.raises(TrainingError, match="other passages in the index"):
        same_collection(tmp_path / "collection.json", "b")


@pytest.mark.slow
def test_a_reader_is_trained_saved_asked_and_scored(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_of(tmp_path))
    cache, out, index = tmp_path / "cache", tmp_path / "out", tmp_path / "index"
    done = shoulders(cache, "train", recipe, "--out", out)
    assert done.returncode == 0, done.stderr
    contexts = [json.loads(line) for line in (out / "contexts/train.jsonl").open(encoding="utf-8")]
    assert len(contexts) == 7
    assert all("Question: on which river" in row["input"] for row in contexts)
    validation = (out / "contexts/validation.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(validation) == 3, "the question that was trained on calibrates nothing"
    assert {p.name for p in (out / "reranker-folds").iterdir() if p.suffix == ".json"}
    again = shoulders(cache, "train", recipe, "--out", out)
    assert again.returncode == 2
    assert "already holds a finished reader" in again.stderr

    passages = tmp_path / "data/passages.tsv"
    assert shoulders(cache, "index", passages, "--out", index).returncode == 0
    scores, dump, found = tmp_path / "s.json", tmp_path / "d.jsonl", tmp_path / "c.json"
    data = tmp_path / "data/validation.jsonl"
    files = ["--json", scores, "--dump", dump, "--contexts", found, "--plot", tmp_path / "p.png"]
    done = shoulders(cache, "eval", out, "--index", index, "--data", data, *files)
    assert done.returncode == 0, done.stderr
    result = json.loads(scores.read_text(encoding="utf-8"))
    assert result["n"] == 4
    wanted = {"exact_match", "f1", "packed_answer_hit"}
    wanted |= {f"{s}_answer_hit_at_{k}" for s in ("retrieved", "reranked") for k in (1, 4, 20)}
    assert wanted <= set(result["metrics"])
    assert result["metrics"]["retrieved_answer_hit_at_4"] == 100

    # What was found goes through again without an index, and gives the same answers.
    other = tmp_path / "d2.jsonl"
    done = shoulders(cache, "eval", out, "--data", found, "--dump", other, "--no-rerank")
    assert done.returncode == 0, done.stderr
    first, second = (
        [json.loads(line)["proposed"] for line in path.open(encoding="utf-8")]
        for path in (dump, other)
    )
    assert first == second

    # Its probabilities are of passages that are found and ranked as it was trained.
    noted = json.loads((out / "reader.json").read_text())  # too few answers to calibrate them
    noted["reading"]["confidence"] = {"bias": 0.0, "answer": 1.0, "passage": 1.0}
    (out / "reader.json").write_text(json.dumps(noted))
    question = "on which river does rome lie?"
    for other in (["--no-rerank"], ["--retriever", "dense"]):
        command = ["eval", out, "--index", index, "--data", data, *other]
        refused = shoulders(cache, *command, "--abstain-below", "0.5")
        assert refused.returncode == 2
        assert "--abstain-below: answers' probabilities were calibrated" in refused.stderr
    refused = shoulders(cache, "eval", out, "--data", found, "--abstain-below", "0.5")
    assert refused.returncode == 2, "of another retriever's passages and scores"

    done = shoulders(cache, "eval", out, "--index", index, "--data", data, "--k", "3")
    assert "--k: probabilities of answers were calibrated with" in done.stderr

    asked = tmp_path / "a.json"
    question = "on which river does rome lie?"
    done = shoulders(
        cache, "ask", question, "--index", index, "--skill", out, "--json", asked, "--show-context"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(asked.read_text(encoding="utf-8"))
    assert answer["confidence"] is not None
    assert answer["read"]
    assert set(answer["read"]) <= {c["id"] for c in answer["ctxs"]}
    assert answer["answer"] in done.stdout
    assert "rome" in done.stderr, "--show-context shows the passages"

    assert shoulders(cache, "info", out, "--json", asked).returncode == 0
    facts = json.loads(asked.read_text(encoding="utf-8"))["reader"]
    assert (facts["search"]["k"], facts["calibrated"]) == (4, True)
    assert facts["reranker"] == str(tmp_path / "encoder")

    (out / "fusion.json").write_text("{}", encoding="utf-8")
    for command in (["ask", question, "--index", index, "--skill", out], ["info", out]):
        done = shoulders(cache, *command)
        assert done.returncode == 2
        assert "fusion.json: damaged" in done.stderr


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_another_recipe_is_refused(tmp_path: Path) -> None:
    values = recipe_of(tmp_path, reranker=None)
    recipe, out = write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "out"
    values["training"]["steps"] = 5
    other = write_recipe(tmp_path / "other.yaml", values)
    cache = tmp_path / "cache"
    out.mkdir()
    (out / "checkpoints").write_text("in the way: the prompt's stage fails", encoding="utf-8")
    done = shoulders(cache, "train", recipe, "--out", out, "--resume")
    assert done.returncode == 2
    before = (out / "contexts/train.jsonl").stat()
    with pytest.raises(ArtefactError, match="not a \\(finished\\) reader"):
        read_reader(out)
    (out / "checkpoints").unlink()
    assert "--resume" in shoulders(cache, "train", recipe, "--out", out).stderr
    refused = shoulders(cache, "train", other, "--out", out, "--resume")
    assert refused.returncode == 2
    assert "another recipe" in refused.stderr
    done = shoulders(cache, "train", recipe, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert read_reader(out).search.k == 4
    after = (out / "contexts/train.jsonl").stat()
    assert after.st_mtime_ns == before.st_mtime_ns, "what was done is not done again"


def test_a_readers_recipe_is_checked(tmp_path: Path) -> None:
    values = recipe_of(tmp_path)
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    assert is_reader(recipe)
    with pytest.raises(RecipeError, match=r"a reader's recipe.*run_reader_recipe"):
        read_recipe(recipe)
    assert Path(read_reader_recipe(recipe).reader.collection).is_absolute()
    values["reader"]["reading"]["pack"]["token"] = 3
    with pytest.raises(RecipeError, match=r"unknown key 'reader.reading.pack.token'.*tokens"):
        make_reader_recipe(values)
