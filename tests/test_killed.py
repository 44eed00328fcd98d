"""Promise 5 the hard way: SIGKILL at twenty random moments, resumed each time, the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from shoulders.skills.artefact import FILE, TENSORS
from shoulders.training.checkpoint import FOLDER
from tiny_models import (
    environment,
    prompt_spec,
    recipe_values,
    save_tiny_encoder,
    save_tiny_lm,
    write_recipe,
)

KILLS = 20
STEPS = 400


def newest(out: Path) -> int:
    """Return the step of the newest complete checkpoint, 0 without any."""
    names = [p.name for p in (out / FOLDER).glob("step-*")] if (out / FOLDER).is_dir() else []
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_twenty_kills_and_the_same_bits(dtype: str, tmp_path: Path) -> None:
    lm, encoder = save_tiny_lm(tmp_path / "lm"), save_tiny_encoder(tmp_path / "encoder")
    values = recipe_values(
        lm,
        tmp_path / "data",
        prompt_spec("idpt_kv", encoder),
        steps=STEPS,
        save_every=5,
        validate_every=50,
        streams=2,
    )
    values["lm"]["dtype"] = dtype
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    surroundings = environment(tmp_path / "cache")
    train = [sys.executable, "-m", "shoulders", "train", str(recipe), "--resume", "--out"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run([*train, str(straight)], env=surroundings, check=True, capture_output=True)

    source, steps_at_death = random.Random(0), []
    for kill in range(KILLS):
        before = newest(killed)
        process = subprocess.Popen(
            [*train, str(killed)],
            env=surroundings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Some die while they load, the others soon after they have got on.
        loading = kill % 5 == 4
        until = time.monotonic() + (source.uniform(0.5, 4) if loading else 300)
        while newest(killed) == before and process.poll() is None:
            if time.monotonic() > until:
                break
            time.sleep(0.005)
        if not loading:
            time.sleep(source.uniform(0, 0.1))
        assert process.poll() is None, "the run ended before it could be killed: raise STEPS"
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps_at_death.append(newest(killed))
        assert not (killed / FILE).exists()
    assert steps_at_death == sorted(steps_at_death), "progress is never lost"
    assert len(set(steps_at_death)) > KILLS // 2
    subprocess.run([*train, str(killed)], env=surroundings, check=True, capture_output=True)

    expected, found = load_file(straight / TENSORS), load_file(killed / TENSORS)
    assert expected.keys() == found.keys()
    assert all(expected[n].equal(found[n]) for n in expected)
    logs = [(out / "log.jsonl").read_text(encoding="utf-8") for out in (straight, killed)]
    assert logs[0] == logs[1]
