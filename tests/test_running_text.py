"""Running text: chunks, their order, perplexity, pretraining a link, parts that start elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from shoulders.cli.app import app
from shoulders.errors import DataError, RecipeError
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.recursion.first_pass import FirstPass
from shoulders.skills.skill import Skill
from shoulders.training import run
from shoulders.training.recipe import make_recipe
from shoulders.training.run import run_recipe
from shoulders.training.running_text import RunningText, chunks_of, perplexity
from shoulders.training.start import begin_at
from tiny_models import STATIC, recipe_values, save_tiny_lm, write_recipe

LINES = ["the capital of france is paris .\n", "\n", "two and three make a short answer .\n"]
LINK = {"kind": "connector", "layers": 1, "heads": 2, "width": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("".join(LINES * 6), encoding="utf-8")
    (folder / "held.txt").write_text("".join(LINES[::-1] * 2), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lm(folder: Path) -> FrozenLM:
    found: FrozenLM = load_lm(str(save_tiny_lm(folder / "lm")), dtype="float32")
    return found


@pytest.fixture(autouse=True)
def _surroundings(folder: Path, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOULDERS_CACHE", str(folder / "cache"))
    monkeypatch.setattr(run, "load_lm", lambda name, **_: lm if name == lm.name else None)


def values_of(lm: FrozenLM, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe that pretrains a link on running text."""
    values = recipe_values(Path(lm.name), folder, STATIC)
    del values["data"]
    text = {"train": [str(folder / "train.txt")], "validation": [str(folder / "held.txt")]}
    training = {**values["training"], **changes.pop("training", {})}
    skill = {"passes": [{"link": LINK}, {}]}
    return {
        **values,
        "skill": skill,
        "text": {**text, "chunk": 12},
        "training": training,
        **changes,
    }


def test_chunks_hold_the_whole_text_in_order(lm: FrozenLM, folder: Path) -> None:
    chunks = chunks_of(lm, folder / "train.txt", 10)
    assert {len(c) for c in chunks[:-1]} == {10}
    whole = [i for chunk in chunks for i in chunk]
    text = (folder / "train.txt").read_text()
    assert text.startswith(lm.text(whole))
    assert len(text) - len(lm.text(whole)) <= 1, "at most a last token alone is left out"


def test_every_chunk_is_met_once_before_any_twice(lm: FrozenLM, folder: Path) -> None:
    text = RunningText(lm, [str(folder / "train.txt")], 10, seed=3)
    count = len(text.chunks)
    epochs = [[text.example(e * count + i).read_ids for i in range(count)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1], "each epoch has an order of its own"
    other = RunningText(lm, [str(folder / "train.txt")], 10, seed=4)
    assert [other.example(i).read_ids for i in range(count)] != epochs[0]


def test_perplexity_equals_the_lms_own(lm: FrozenLM, folder: Path) -> None:
    text = RunningText(lm, [str(folder / "held.txt")], 9)
    found = perplexity(Skill.base(lm), text.examples())
    total, tokens = 0.0, 0
    for chunk in text.chunks:
        ids = torch.tensor([chunk.tolist()])
        with torch.no_grad():
            out = lm.model(input_ids=ids, labels=ids)
        total, tokens = total + float(out.loss) * (len(chunk) - 1), tokens + len(chunk) - 1
    assert found.tokens == tokens
    assert found.value == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_pretraining_a_link_lowers_the_loss(lm: FrozenLM, folder: Path, tmp_path: Path) -> None:
    rate = {"optimizer": {"kind": "adamw", "lr": 0.02}}
    values = values_of(lm, folder, training={"steps": 40, "validate_every": 40, **rate})
    before = lm.digest()
    skill = run_recipe(make_recipe(values), tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    text = RunningText(lm, [str(folder / "train.txt")], 12)
    plain, trained = (perplexity(s, text.examples()).value for s in (Skill.base(lm), skill))
    assert trained < 0.9 * plain
    assert sum(losses[-5:]) < sum(losses[:5])
    assert lm.digest() == before


def test_remembering_the_first_pass_changes_nothing(
    lm: FrozenLM, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[FirstPass] = []

    def opened(*arguments: Any) -> FirstPass:
        stores.append(FirstPass(*arguments, tmp_path / "store"))
        return stores[-1]

    monkeypatch.setattr(run, "FirstPass", opened)
    chunks = len(RunningText(lm, [str(folder / "train.txt")], 12).chunks)
    steps = 2 * chunks // 4  # of four rows: twice through the text
    # One stream: two may read the same row at once, each for itself, and chunks repeat here.
    training = {"steps": steps, "streams": 1}
    plain = values_of(lm, folder, training=training)
    kept = values_of(lm, folder, training={**training, "remember_first_pass": True})
    for name, values in (("plain", plain), ("kept", kept), ("again", kept)):
        run_recipe(make_recipe(values), tmp_path / name)
    first, again = stores
    texts = [RunningText(lm, [str(folder / f"{name}.txt")], 12) for name in ("train", "held")]
    different = {tuple(e.read_ids) for text in texts for e in text.examples()}
    assert first.read == len(different), "every row is read once"
    assert again.read == 0
    tensors = [load_file(tmp_path / n / "skill.safetensors") for n in ("plain", "kept", "again")]
    for name, value in tensors[1].items():
        assert torch.equal(value, tensors[2][name]), "kept states are the fresh ones"
        torch.testing.assert_close(value, tensors[0][name], atol=1e-3, rtol=0)


def test_parts_start_from_other_skills(lm: FrozenLM, folder: Path, tmp_path: Path) -> None:
    connector = write_recipe(tmp_path / "connector.yaml", values_of(lm, folder))
    prompt = recipe_values(Path(lm.name), tmp_path, STATIC)
    run_recipe(make_recipe(prompt), tmp_path / "prompt")
    start = {"passes.0.link": str(connector), "passes.1.prompt": str(tmp_path / "prompt")}
    whole = {
        **prompt,
        "skill": {"passes": [{"link": LINK}, {"prompt": STATIC}]},
        "start": start,
        "training": {**prompt["training"], "steps": 1},
    }
    skill = run_recipe(make_recipe(whole), tmp_path / "out")
    link = load_file(tmp_path / "out" / "parts" / "connector" / "skill.safetensors")
    base = load_file(tmp_path / "prompt" / "skill.safetensors")["base"]
    assert skill.trained is not None
    for name, value in skill.trained.named_parameters():
        wanted = base if name == "passes.1.prompt.base" else link[name]
        # One small step of Adam away.
        torch.testing.assert_close(value.detach(), wanted, atol=0.011, rtol=0)
    again = run_recipe(make_recipe({**whole, "training": prompt["training"]}), tmp_path / "again")
    assert again.trained_parameters == skill.trained_parameters


def test_parts_that_do_not_fit_are_refused(lm: FrozenLM, tmp_path: Path) -> None:
    prompt = recipe_values(Path(lm.name), tmp_path, STATIC)
    run_recipe(make_recipe(prompt), tmp_path / "prompt")
    skill = run_recipe(make_recipe(prompt), tmp_path / "other")
    for part, message in [
        ("passes.1.prompt", "has no such part"),
        ("passes.0.link", "0 parts of the kind 'link'"),
    ]:
        with pytest.raises(RecipeError, match=message):
            begin_at(skill, {part: tmp_path / "prompt"}, lm)
    longer = {**prompt, "skill": {"passes": [{"prompt": {"kind": "static", "length": 9}}]}}
    with pytest.raises(RecipeError, match=r"'base' is \(4, 32\), here it is \(9, 32\)"):
        run_recipe(
            make_recipe({**longer, "start": {"passes.0.prompt": str(tmp_path / "prompt")}}),
            tmp_path / "longer",
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"a", "has 1 tokens"),
        (b"", "has 0 tokens"),
        (b"\xff\xfea", "UTF-8 at byte 1"),
    ],
)
def test_text_that_cannot_be_read_is_refused(
    lm: FrozenLM, tmp_path: Path, content: bytes | None, message: str
) -> None:
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        RunningText(lm, [str(file)], 8)


def test_training_text_does_not_select(lm: FrozenLM, folder: Path) -> None:
    same = str(folder / "train.txt")
    values = values_of(lm, folder, text={"train": [same], "validation": [same]})
    with pytest.raises(RecipeError, match="both train and validation"):
        make_recipe(values)


def test_a_prompted_first_pass_cannot_be_remembered(lm: FrozenLM, folder: Path) -> None:
    values = values_of(lm, folder, training={"remember_first_pass": True})
    values["skill"] = {"passes": [{"prompt": STATIC, "link": LINK}, {}]}
    with pytest.raises(RecipeError, match="the first of which has no prompt"):
        make_recipe(values)


def test_eval_of_text_prints_perplexity(lm: FrozenLM, folder: Path, tmp_path: Path) -> None:
    arguments = ["eval", "base", "--data", str(folder / "held.txt"), "--lm", lm.name,
                 "--chunk", "9", "--dtype", "float32",
                 "--json", str(tmp_path / "found.json")]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    text = RunningText(lm, [str(folder / "held.txt")], 9)
    wanted = perplexity(Skill.base(lm), text.examples())
    assert found["metrics"]["perplexity"] == pytest.approx(wanted.value, rel=1e-5)
    assert found["tokens"] == wanted.tokens
