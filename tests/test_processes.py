"""Two processes train what one does; a run goes on only with as many as it began with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shoulders.skills.artefact import FILE, TENSORS
from shoulders.training.checkpoint import FOLDER
from shoulders.training.processes import Processes
from tiny_models import (
    environment,
    prompt_spec,
    recipe_values,
    save_tiny_encoder,
    save_tiny_lm,
    write_recipe,
)

pytestmark = pytest.mark.slow
ALONE = [sys.executable, "-m", "shoulders"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "shoulders"]


def losses(out: Path) -> list[float]:
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]


def test_two_processes_follow_the_curve_of_one(tmp_path: Path) -> None:
    lm, encoder = save_tiny_lm(tmp_path / "lm"), save_tiny_encoder(tmp_path / "encoder")
    values = recipe_values(lm, tmp_path / "data", prompt_spec("idpt_kv", encoder), steps=12)
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    surroundings = environment(tmp_path / "cache")

    def train(command: list[str], out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        arguments = [*command, "train", str(recipe), "--out", str(out), *more]
        return subprocess.run(
            arguments, env=surroundings, capture_output=True, text=True, check=False
        )

    one, two, half = tmp_path / "one", tmp_path / "two", tmp_path / "half"
    assert train(ALONE, one).returncode == 0
    done = train(TWO, two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1, "one of the two speaks"
    assert len(losses(two)) == len(losses(one)) == 12
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    expected, found = load_file(one / TENSORS), load_file(two / TENSORS)
    for name, value in expected.items():
        if name.endswith("in_proj_bias"):
            continue  # a key's bias changes no attention: its gradient is rounding, and Adam's food
        assert float((found[name] - value).norm()) <= 0.01 * float(value.norm())

    # A run of two that was stopped half-way is not silently continued by one.
    half.mkdir()
    (half / FOLDER).symlink_to(two / FOLDER)
    refused = train(ALONE, half, "--resume")
    assert refused.returncode == 2
    assert "processes was 2, is 1" in " ".join(refused.stderr.split())
    assert not (half / FILE).exists()


# What a rank runs, after `{before}`: each may have its own threads, or its own disk.
RANK = """
import os, runpy, sys, torch
rank = os.environ["RANK"]
{before}
runpy.run_module("shoulders", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("torch.set_num_threads(1 + int(rank))", "training.streams"),
        ("sys.argv[sys.argv.index('--out') + 1] += rank * int(rank)", "goes on"),
    ],
    ids=["threads", "disk"],
)
def test_processes_that_would_compute_other_things_are_refused(
    before: str, said: str, tmp_path: Path
) -> None:
    lm = save_tiny_lm(tmp_path / "lm")
    values = recipe_values(lm, tmp_path / "data", prompt_spec("static_kv", None), steps=6)
    recipe, surroundings = write_recipe(tmp_path / "recipe.yaml", values), environment(tmp_path)
    script, out, begun = tmp_path / "rank.py", tmp_path / "out", tmp_path / "begun"
    script.write_text(RANK.format(before=before), encoding="utf-8")
    told = ["train", str(recipe), "--out"]
    quiet: dict[str, Any] = {"env": surroundings, "capture_output": True, "text": True}
    subprocess.run([*TWO, *told, str(begun)], **quiet, check=True)
    out.mkdir()
    if said == "goes on":
        (out / FOLDER).symlink_to(begun / FOLDER)
    done = subprocess.run(
        [*TWO[:-2], str(script), *told, str(out), "--resume"], **quiet, check=False
    )
    assert done.returncode != 0
    assert said in " ".join(done.stderr.split())
    assert "not the same in processes 0 and 1" in " ".join(done.stderr.split())
    assert not (out / FILE).exists()


def test_one_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = Processes.started()
    assert (alone.rank, alone.count, alone.leads) == (0, 1, True)
    assert list(alone.share([1, 2, 3])) == [1, 2, 3]
    assert alone.summed([], 2.5, False) == (2.5, False)
    assert list(Processes(1, 2).share([1, 2, 3])) == [2]
