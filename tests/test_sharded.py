"""A frozen LM whose layers two processes share: the numbers, the bytes and the ends of one whole.

Losses may differ by 1e-5 of their size (measured: 5e-7): the layers are then Hugging Face's, and
one process's are our own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import ARCHITECTURES, save_lm
from sharded_worker import BACKWARDS, TOKENS, answer, gradient
from shoulders.encoders.load import load_encoder
from shoulders.errors import LMError, TrainingError
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.shard import decoder_layers
from shoulders.skills.artefact import FILE, TENSORS, load_skill
from shoulders.training.checkpoint import FOLDER
from shoulders.training.recipe import make_recipe
from shoulders.training.run import run_recipe
from tiny_models import (
    environment,
    prompt_spec,
    recipe_values,
    save_tiny_encoder,
    save_tiny_lm,
    write_recipe,
)

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ACCELERATE = [
    *[sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"],
    *["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"],
]


def entries(out: Path, steps: int) -> list[tuple[int, float]]:
    """Return step and loss of training and validation, in the order of the log."""
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    pairs = [(e["step"], e["loss"]) for e in (line.get("validation", line) for line in logged)]
    return [pair for pair in pairs if pair[0] <= steps]


def close(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    """Tell whether two logs are those of one run, to `TOLERANCE`."""
    assert [step for step, _ in found] == [step for step, _ in expected]
    return [v for _, v in found] == pytest.approx([v for _, v in expected], rel=TOLERANCE)


def sharded(values: dict[str, Any], **training: Any) -> dict[str, Any]:
    return values | {"training": values["training"] | {"shard_lm": True} | training}


def finished(command: list[str], surroundings: dict[str, str]) -> None:
    """Run a launcher to its end; one that hangs fails here, and its processes are ended."""
    process = subprocess.Popen(
        command, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # which torchrun hands on
        pytest.fail(f"processes wait for each other: {process.communicate(timeout=60)[0]}")
    assert process.returncode == 0, output


def test_two_processes_share_an_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_lm: Callable[[str], FrozenLM]
) -> None:
    name = str(save_tiny_lm(tmp_path / "lm"))
    lms: dict[str, FrozenLM] = {}
    for arch in ARCHITECTURES:
        folder = save_lm(tiny_lm(arch), tmp_path / f"tiny-{arch}")
        lms[folder.name] = load_lm(str(folder), dtype="float32")
    # Three packs a step for two processes: one always has a pass less.
    uneven = {"rows_per_step": 3, "micro_tokens": 1, "select": "exact_match", "steps": 6}
    values = recipe_values(tmp_path / "lm", tmp_path / "data", **uneven)
    write_recipe(tmp_path / "sharded.yaml", sharded(values))
    worker = [*TORCHRUN, str(Path(__file__).parent / "sharded_worker.py"), str(tmp_path)]
    finished(worker, environment(tmp_path / "cache"))

    assert len(set(TOKENS)) == len(set(BACKWARDS)) == 2
    both = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for rank, of_rank in enumerate(both):
        assert "not the same in processes 0 and 1" in of_rank["disagreement"]
        assert "dtype int8: cannot be sharded" in of_rank["int8"]
        assert "stopped at step" in of_rank["interrupted"]
        for folder, lm in lms.items():
            found = of_rank[folder]
            count = sum(p.numel() for p in decoder_layers(lm.model).parameters())
            assert both[0][folder]["held"] + both[1][folder]["held"] == count
            # Half of every layer, in storage of its own, and again after the passes.
            assert found["held"] == pytest.approx(count / 2, rel=0.02)
            assert found["bytes"] == found["bytes_after"] == 4 * found["held"]
            assert found["beside_last"] < found["held"], "layers are gathered one at a time"
            assert not found["fused"]
            assert (found["fingerprint"], found["digest"]) == (lm.fingerprint, lm.digest())
            assert found["layers"] == lm.prefix_shape.layers
            assert found["tokens"] == answer(lm, TOKENS[rank])
            assert found["gradient"] == pytest.approx(gradient(lm), rel=1e-4, abs=1e-5)
            assert "out of step" in found["out_of_step"]

    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "cache"))
    run_recipe(make_recipe(values), tmp_path / "whole")
    assert close(entries(tmp_path / "straight", 6), entries(tmp_path / "whole", 6))
    whole, straight, stopped = (
        load_file(tmp_path / run / TENSORS) for run in ("whole", "straight", "stopped")
    )
    for tensor, value in whole.items():
        assert float((straight[tensor] - value).norm()) <= 1e-4 * float(value.norm())
        assert bool((straight[tensor] == stopped[tensor]).all()), "resumed: the same bits"
    unsharded = load_lm(name, dtype="float32")
    loaded, _ = load_skill(tmp_path / "straight", unsharded, load_encoder)
    assert loaded.trained_parameters


def workers(launcher: int) -> dict[int, int]:
    """Return the process id of every rank that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        for variable in variables:
            if variable.startswith(b"RANK="):
                ranks[int(variable.removeprefix(b"RANK="))] = int(child)
    return ranks


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_process_that_dies_leaves_none_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, encoder = save_tiny_lm(tmp_path / "lm"), save_tiny_encoder(tmp_path / "encoder")
    kept = {"steps": 8, "decay": "constant"}  # with which a run's length changes none of its steps
    spec = prompt_spec("idpt_kv", encoder)
    values = recipe_values(lm, tmp_path / "data", spec, **kept)
    recipe = write_recipe(tmp_path / "recipe.yaml", sharded(values, steps=100_000))
    shared = tmp_path / "shared"
    process = subprocess.Popen(
        [*ACCELERATE, "-m", "shoulders", "train", str(recipe), "--out", str(shared)],
        env=environment(tmp_path / "cache"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + 240
        while not (shared / "log.jsonl").exists() or len(entries(shared, 10)) < 10:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, "two processes make no progress"
            time.sleep(0.2)
        ranks = workers(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=60)  # far below the time-outs of gloo and NCCL
    finally:
        process.kill()
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), output
    assert not (shared / FILE).exists()

    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "cache"))
    run_recipe(make_recipe(values), tmp_path / "whole")
    assert close(entries(shared, 7), entries(tmp_path / "whole", 7))
    newest = max((shared / FOLDER).glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["recipe"]["processes"] == 2
    alone = make_recipe(values | {"training": values["training"] | {"steps": 100_000}})
    with pytest.raises(TrainingError, match=r"shard_lm was True, is False"):
        run_recipe(alone, shared, resume=True)


def test_one_process_is_told_to_start_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    lm = save_tiny_lm(tmp_path / "lm")
    values = sharded(recipe_values(lm, tmp_path / "data"))
    with pytest.raises(LMError, match=r"several processes: start it with `torchrun"):
        run_recipe(make_recipe(values), tmp_path / "out")
    assert not (tmp_path / "out").exists()
