"""Textual recursion: proposals, what is shown of them, choosers, and training by cross-fitting."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders.data.rows import Row, read_rows
from shoulders.encoders.load import load_encoder
from shoulders.errors import RecipeError, ShouldersError, TrainingError
from shoulders.files import sha256_of_file
from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.recursion.candidates import (
    Candidate,
    ProposeConfig,
    check_some,
    chosen,
    merged,
    shown,
    stream_of,
    subsets,
)
from shoulders.skills.artefact import FILE, TENSORS, load_skill, read_artefact
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.configs import CrossFitConfig
from shoulders.training.recipe import make_recipe, read_recipe
from shoulders.training.run import data_hashes
from shoulders.training.start import same_recipe, start_hashes
from shoulders.training.textual import _first_recipe, _fold, fold_of, run_textual
from tiny_models import environment, recipe_values, save_tiny_encoder, save_tiny_lm, write_recipe

TEXTS = ["the capital of france", "two", "write the number three as a word please"]
STATIC = {"kind": "static", "length": 3}
PROPOSE = {"n": 4, "temperature": 1.5, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    found: FrozenLM = load_lm(
        str(save_tiny_lm(tmp_path_factory.mktemp("lm") / "lm")), dtype="float32"
    )
    return found


def no_encoder(name: str) -> Any:
    raise AssertionError(name)


def said(*texts: str) -> list[Completion]:
    return [Completion(text, [1, 2], -float(i), "stop") for i, text in enumerate(texts, 1)]


# -- candidates --------------------------------------------------------------------------


def test_equal_answers_are_merged_and_the_frequent_come_first() -> None:
    found = merged(said("paris", "rome\nmore", " paris ", "", "\n rome", "oslo"))
    assert [(c.text, c.count) for c in found] == [("paris", 2), ("rome", 2), ("oslo", 1)]
    assert found[0].logprob == pytest.approx(-(1 + 3) / 2 / 2), "mean over samples and tokens"
    assert found == merged(said("paris", "rome\nmore", " paris ", "", "\n rome", "oslo"))


def test_samples_that_say_nothing_are_no_candidates() -> None:
    assert merged(said("", " \n ")) == []
    check_some([[], merged(said("paris"))])
    with pytest.raises(ShouldersError, match="no sample of the first pass says anything"):
        check_some([[], []])
    assert chosen([], "majority").text == chosen([], "likeliest").text == ""


def test_a_row_without_candidates_is_read_as_it_is(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    skill = skill_of(lm)
    assert skill.proposals is not None
    short = DecodingConfig(max_new_tokens=5)
    wanted = skill.generate(TEXTS[:1], short)
    generate = skill.proposals.skill.generate

    def silent(texts: Any, decoding: DecodingConfig, **settings: Any) -> Any:
        found = generate(texts, decoding, **settings)
        for text, several in zip(texts, found, strict=True):
            for one in several:
                one.text = one.text if text == TEXTS[0] else " "
        return found

    monkeypatch.setattr(skill.proposals.skill, "generate", silent)
    found = skill.generate(TEXTS[:2], short)
    assert found[0][0].text == wanted[0][0].text
    without = skill.last.generate(TEXTS[1:2], short)[0][0].token_ids
    assert found[1][0].token_ids == without
    assert skill.generate(TEXTS[1:2], short)[0][0].token_ids == without, "alone as beside others"


def test_what_is_shown() -> None:
    candidates = merged(said("a", "a", "b", "c"))
    config = ProposeConfig(before=" ? ", between=", ")
    assert shown("q", candidates, config, len, 99).text == "q ? a (2), b (1), c (1)"
    few = ProposeConfig(before=" ? ", between=", ", show=2, counts=False)
    one = shown("q", candidates, few, len, 99)
    assert one.text == "q ? a, b"
    assert [c.text for c in one.left_out] == ["c"]
    ahead = ProposeConfig(before="? ", between=", ", place="ahead", after="; ", show=1)
    assert shown("q", candidates, ahead, len, 99).text == "? a (2); q"
    assert shown("q", candidates, ahead, len, 1).text == "q", "without candidates it stands alone"


def test_candidates_that_do_not_fit_are_dropped_least_likely_first() -> None:
    candidates = merged(said("aa", "aa", "bb", "cc"))
    config = ProposeConfig(before=":", between=",", counts=False)
    for room, text, left in [(10, "q:aa,bb,cc", []), (9, "q:aa,bb", ["cc"]), (4, "q:aa", ["bb"])]:
        found = shown("q", candidates, config, len, room)
        assert found.text == text
        assert [c.text for c in found.left_out][: len(left)] == left
    assert shown("question", candidates, config, len, 1).text == "question", "it is never dropped"


def test_training_shuffles_what_inference_orders() -> None:
    candidates = [Candidate(chr(97 + i), 9 - i, 0.0) for i in range(8)]
    config = ProposeConfig(before=":", between="", counts=False)
    orders = {shown("q", candidates, config, len, 99, stream_of("q", 0, i)).text for i in range(20)}
    assert len(orders) > 15
    assert {"".join(sorted(o[2:])) for o in orders} == {"abcdefgh"}
    assert shown("q", candidates, config, len, 99).text == "q:abcdefgh"


def test_choosers() -> None:
    candidates = [Candidate("often", 3, -2.0), Candidate("sure", 1, -0.1)]
    assert chosen(candidates, "majority").text == "often"
    assert chosen(candidates, "likeliest").text == "sure"


def test_subsets_depend_on_the_text_alone() -> None:
    config = ProposeConfig(n=5, subset=2)
    found = subsets("q", 4, config, 1)
    assert found == subsets("q", 4, config, 1) != subsets("q", 4, config, 2)
    assert all(len(set(one)) == 2 and max(one) < 4 for one in found)
    assert subsets("q", 1, config, 1) == [[0]] * 5


# -- a skill -----------------------------------------------------------------------------


def skill_of(lm: FrozenLM, **propose: Any) -> Skill:
    passes = [{"prompt": STATIC, "propose": {**PROPOSE, **propose}}, {"prompt": STATIC}]
    config = SkillConfig.model_validate({"passes": passes})
    import torch

    return Skill.create(lm, config, no_encoder, torch.Generator().manual_seed(3))


def test_the_second_pass_reads_what_the_first_has_sampled(lm: FrozenLM) -> None:
    skill = skill_of(lm)
    assert skill.proposals is not None
    decoding = DecodingConfig(max_new_tokens=5)
    first, config = skill.proposals.skill, skill.proposals.config
    answers = skill.generate(TEXTS, decoding)
    for text, (answer,) in zip(TEXTS, answers, strict=True):
        (samples,) = first.generate([text], config.decoding())
        read = shown(text, merged(samples), config, skill.count_tokens, 10**6).text
        (alone,) = skill.last.generate([read], decoding)
        assert alone[0].token_ids == answer.token_ids
        streamed = [d.completion for d in skill.stream(text, decoding) if d.completion]
        assert streamed[0].token_ids == answer.token_ids
    scores = skill.score(TEXTS, [["a", "b"]] * 3)
    read = [p.text for p in skill.proposed(TEXTS)]
    assert scores == skill.last.score(read, [["a", "b"]] * 3)


@pytest.mark.parametrize(
    ("shown_as", "marked"),
    [
        ({}, {"prompt_until": "\nCandidates: "}),
        ({"before": "Candidates: ", "place": "ahead"}, {"prompt_from": "\n\n"}),
    ],
)
def test_a_second_prompt_may_be_written_for_the_input_alone(
    lm: FrozenLM, tmp_path: Path, shown_as: dict[str, Any], marked: dict[str, str]
) -> None:
    encoder = load_encoder(str(save_tiny_encoder(tmp_path / "encoder")))
    prompt = {"kind": "idpt", "length": 2, "generator": {"width": 16, "heads": 2, "layers": 1}}
    prompts = []
    for marks in ({}, marked):
        passes = [{"prompt": STATIC, "propose": PROPOSE | shown_as}, {"prompt": prompt, **marks}]
        config = SkillConfig.model_validate({"passes": passes})
        skill = Skill.create(lm, config, lambda _: encoder, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for value in skill.networks()[-1].parameters():
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
        text = "the number two\nin words"
        read = skill.proposed([text])[0].text
        assert "Candidates: " in read
        assert text in read
        prompts.append([skill.prompt([one]).vectors for one in (text, read)])
    assert not torch.equal(*prompts[0])
    assert torch.equal(*prompts[1])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": STATIC, "prompt_until": "Candidates"}, r"propose\.before"),
        ({"prompt_until": "\nCandidates: "}, "no prompt to write"),
        ({"prompt": STATIC, "prompt_from": "\n"}, r"stand behind \(propose\.place\)"),
    ],
)
def test_what_a_producer_cannot_read_until(second: dict[str, Any], message: str) -> None:
    passes = [{"prompt": STATIC, "propose": PROPOSE}, second]
    with pytest.raises(ValueError, match=message):
        SkillConfig.model_validate({"passes": passes})


@pytest.mark.parametrize("settings", [{}, {"rounds": 3, "subset": 2}])
def test_a_row_does_not_depend_on_its_batch(lm: FrozenLM, settings: dict[str, Any]) -> None:
    skill = skill_of(lm, **settings)
    together = skill.proposed(TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        (alone,) = skill.proposed([text])
        assert [c.text for c in alone.candidates] == [c.text for c in found.candidates]
        assert alone.text == found.text


def test_rounds_make_new_candidates(lm: FrozenLM) -> None:
    once = skill_of(lm).proposed(TEXTS)
    thrice = skill_of(lm, rounds=3).proposed(TEXTS)
    assert [p.candidates for p in once] != [p.candidates for p in thrice]
    assert all(sum(c.count for c in p.candidates) <= PROPOSE["n"] for p in thrice)
    for settings in ({"rounds": 2}, {"rounds": 2, "subset": 50}):  # all samples read one text
        (found,) = skill_of(lm, temperature=2.0, **settings).proposed(TEXTS[:1])
        assert len(found.candidates) > 1


@pytest.mark.parametrize("chooser", ["majority", "likeliest"])
def test_choosers_answer_without_a_second_pass(lm: FrozenLM, chooser: Any) -> None:
    skill = skill_of(lm, chooser=chooser)
    answers = skill.generate(TEXTS, DecodingConfig(max_new_tokens=5))
    for found, (answer,) in zip(skill.proposed(TEXTS), answers, strict=True):
        assert answer.text == chosen(found.candidates, chooser).text
    with pytest.raises(ShouldersError, match="n must be 1"):
        skill.generate(TEXTS, DecodingConfig(n=3, temperature=1.0))
    (delta,) = skill.stream(TEXTS[0], DecodingConfig(max_new_tokens=5))
    assert delta.text == answers[0][0].text


def test_candidates_beyond_the_window_are_reported(lm: FrozenLM) -> None:
    skill = skill_of(lm, max_new_tokens=40)
    text = "the capital of france " * 12
    (found,) = skill.proposed([text])
    assert found.left_out
    assert set(found.left_out) < {*found.candidates, None}
    # And it fits, whatever the answer may come to: what is read does not depend on that.
    short, long = (skill.generate([text], DecodingConfig(max_new_tokens=n)) for n in (5, 10_000))
    assert long[0][0].token_ids[:5] == short[0][0].token_ids


# -- training ----------------------------------------------------------------------------


def recipe_of(folder: Path, **second: Any) -> Path:
    """Write a recipe of two passes, and the one of its first pass."""
    folder.mkdir(parents=True, exist_ok=True)
    lm_folder = folder / "lm"
    if not lm_folder.is_dir():
        save_tiny_lm(lm_folder)
    values = recipe_values(lm_folder, folder, STATIC, steps=4)
    first = write_recipe(folder / "first.yaml", values)
    passes = [
        {"prompt": STATIC, "propose": PROPOSE},
        {"prompt": {"kind": "static_kv", "length": 2}},
    ]
    whole = {
        **values,
        "skill": {"passes": passes},
        "start": {"passes.0.prompt": str(first)},
        "data": {**values["data"], "temperature": 3},
        "cross_fit": {"folds": 2, "steps": 3, "rows": 24},
        **second,
    }
    return write_recipe(folder / "textual.yaml", whole)


def shoulders(cache: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoulders", *map(str, arguments)]
    return subprocess.run(
        command, env=environment(cache), capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("textual")
    done = shoulders(folder, "train", recipe_of(folder / "given"), "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return folder


def test_training_leaves_a_skill_of_two_passes(trained: Path) -> None:
    artefact = read_artefact(trained / "out")
    assert [p.propose is not None for p in artefact.skill.passes] == [True, False]
    frozen = load_lm(str(trained / "given" / "lm"), dtype="float32")
    skill, _ = load_skill(trained / "out", frozen, no_encoder)
    first, _ = load_skill(trained / "out" / "parts" / "first", frozen, no_encoder)
    second, _ = load_skill(trained / "out" / "second", frozen, no_encoder)
    assert skill.proposals is not None
    own = skill.proposals.skill.generate(TEXTS, DecodingConfig(max_new_tokens=4))
    assert own == first.generate(TEXTS, DecodingConfig(max_new_tokens=4))
    read = [p.text for p in skill.proposed(TEXTS)]
    assert skill.generate(TEXTS, DecodingConfig(max_new_tokens=4)) == second.generate(
        read, DecodingConfig(max_new_tokens=4)
    )
    assert skill.trained_parameters == first.trained_parameters + second.trained_parameters
    # Its rows were drawn at the recipe's temperature already.
    assert artefact.provenance["recipe"]["data"]["temperature"] == 3
    assert artefact.provenance["second_pass"]["recipe"]["data"]["temperature"] == 1
    # The first pass's own (validation rows) and both folds' (training rows).
    files = [*(trained / "out").glob("**/candidates/*.json")]
    assert len({file.parents[1] for file in files}) == 3
    took = sum(json.loads(file.read_text())["seconds"] for file in files)
    assert artefact.provenance["candidates_seconds"] == pytest.approx(took, abs=6e-4)


def test_a_first_pass_that_began_at_another_could_have_seen_what_is_held_out(
    trained: Path, tmp_path: Path
) -> None:
    recipe = read_recipe(trained / "given" / "textual.yaml")
    first = tmp_path / "first"
    shutil.copytree(trained / "out" / "parts" / "first", first)
    _first_recipe(recipe, first)

    def note(folder: Path, **of_recipe: Any) -> None:
        values = json.loads((folder / FILE).read_text())
        values["provenance"]["recipe"] |= of_recipe
        (folder / FILE).write_text(json.dumps(values))

    begun = tmp_path / "begun"
    shutil.copytree(first, begun)
    note(first, start={"passes.0.prompt": str(begun)})
    with pytest.raises(RecipeError, match="could have seen what is held out"):
        _first_recipe(recipe, first)
    note(begun, data=None, text={"train": ["words.txt"]})  # of running text it knows no rows
    _first_recipe(recipe, first)


def test_a_first_pass_that_was_trained_again_is_noticed(trained: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    shutil.copytree(trained / "out" / "parts" / "first", first)
    begin = f"start={{passes.0.prompt: {first}}}"
    recipe = read_recipe(trained / "given" / "textual.yaml", [begin])
    noted = data_hashes(recipe) | start_hashes(recipe.start)
    same_recipe(recipe, tmp_path / "out" / "textual.json", noted)
    values = json.loads((first / FILE).read_text())
    values["tensors_sha256"] = sha256_of_file(trained / "out" / "second" / TENSORS)
    shutil.copy(trained / "out" / "second" / TENSORS, first / TENSORS)
    (first / FILE).write_text(json.dumps(values))
    with pytest.raises(TrainingError, match=r"begun with start\.passes\.0\.prompt as it was"):
        run_textual(recipe, tmp_path / "out", resume=True)


def test_candidates_come_from_a_pass_that_has_not_seen_the_row(trained: Path) -> None:
    """Recomputed: each training row's candidates are the other fold's model's."""
    frozen = load_lm(str(trained / "given" / "lm"), dtype="float32")
    propose = ProposeConfig.model_validate(PROPOSE)
    rows = read_rows(trained / "out" / "second" / "train.jsonl")
    assert len(rows) == 24
    seen = 0
    for number in range(2):
        folder = trained / "out" / "folds" / f"{number + 1}-of-2"
        skill, _ = load_skill(folder, frozen, no_encoder)
        kept = read_rows(trained / "out" / "folds" / f"without-{number + 1}-of-2.jsonl")
        assert not any(fold_of(row, 2) == number for row in kept)
        own = [r for r in rows if fold_of(Row(r.task, r.input.split("\n")[0], ()), 2) == number]
        texts = [row.input.split(propose.before)[0] for row in own]
        samples = skill.generate(texts, propose.decoding())
        for row, several in zip(own, samples, strict=True):
            listed = row.input.split(propose.before)[1].split(propose.between)
            wanted = [f"{c.text} ({c.count})" for c in merged(several)]
            assert sorted(listed) == sorted(wanted)
            seen += 1
    assert seen == 24


def test_folds_are_trained_on_whole_rows(tmp_path: Path) -> None:
    """Options too: templates may show them, and the first pass proposes with them."""
    rows = [Row("t", f"question {i}", ("a",), ("a", "b")) for i in range(8)]
    taught = make_recipe(recipe_values(tmp_path / "lm", tmp_path / "given"))
    _fold(CrossFitConfig(), 0, taught, rows, tmp_path / "out", lambda *_: None)
    kept = read_rows(tmp_path / "out/folds/without-1-of-2.jsonl")
    assert kept == [row for row in rows if fold_of(row, 2) != 0]


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    recipe, file = make_recipe(recipe_values(tmp_path / "lm", tmp_path / "given")), tmp_path / "r"
    same_recipe(recipe, file, data_hashes(recipe))
    same_recipe(recipe, file, data_hashes(recipe))
    held = tmp_path / "given/held.jsonl"
    held.write_text(held.read_text(encoding="utf-8").replace("question", "riddle"))
    with pytest.raises(TrainingError, match=r"begun with held\.jsonl as it was before"):
        same_recipe(recipe, file, data_hashes(recipe))
    longer = recipe.model_copy(update={"start": {"passes.0.prompt": "other"}})
    with pytest.raises(TrainingError, match="begun with another recipe"):
        same_recipe(longer, file, json.loads(file.read_text())["data_sha256"])


@pytest.mark.slow
def test_killed_at_any_stage_it_ends_the_same(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = trained / "given" / "textual.yaml"
    command = [sys.executable, "-m", "shoulders", "train", str(recipe), "--out", str(out)]
    stages = iter(("parts/first/skill.json", "folds/*/skill.json", "second/train.jsonl"))
    kills = 0
    while not (out / "skill.json").is_file():
        process = subprocess.Popen(
            [*command, "--resume"],
            env=environment(trained),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        if (reached := next(stages, None)) is not None:
            while not [*out.glob(reached)] and process.poll() is None:
                time.sleep(0.002)
            if process.poll() is None:
                kills += 1
                os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors.decode()
    assert kills == 3
    for name in ("skill.safetensors", "second/train.jsonl", "second/skill.safetensors"):
        assert (out / name).read_bytes() == (trained / "out" / name).read_bytes(), name


def test_other_runs_and_passes_are_refused(trained: Path, tmp_path: Path) -> None:
    given = trained / "given" / "textual.yaml"
    again = shoulders(trained, "train", given, "--out", trained / "out")
    assert again.returncode != 0
    assert "already holds a finished skill" in again.stderr
    other = tmp_path / "out"
    (other / "second").mkdir(parents=True)
    unfinished = shoulders(trained, "train", given, "--out", other)
    assert "add --resume" in unfinished.stderr
    wrong = shoulders(
        trained, "train", given, "--out", tmp_path / "new",
        "--set", "skill.passes.0.prompt.length=5",
        "--set", f"start={{passes.0.prompt: {trained / 'out' / 'parts' / 'first'}}}",
    )  # fmt: skip
    assert wrong.returncode != 0
    assert "another first pass" in wrong.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cross_fit": None}, "needs cross_fit"),
        ({"start": {}}, "the recipe, or the folder, of the first pass"),
        ({"skill": {"passes": [{"prompt": STATIC}]}}, "for skills with a pass that proposes"),
        ({"data": None, "text": {"train": ["a.txt"]}}, "is trained on data"),
        ({"data": None}, "give either data"),
        ({"cross_fit": {"folds": 1}}, "greater than or equal to 2"),
    ],
)
def test_recipes_that_cannot_be_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    import yaml

    values = yaml.safe_load(recipe_of(tmp_path).read_text())
    with pytest.raises(RecipeError, match=message):
        make_recipe({**values, **change})
