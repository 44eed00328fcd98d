"""Training and asking the rivals: copies of the LM tuned with LoRA (PEFT) or wholly.

They learn from the same tokens in the same order as the frozen methods, in a process of their
own (`shoulders.comparison.tune`), in bfloat16 where the processor multiplies it faster, and are
then asked through the same decoder in float32.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.comparison.frozen import WARMUP, Trained
from shoulders.comparison.methods import Method
from shoulders.comparison.plan import Plan
from shoulders.comparison.rows import Rows
from shoulders.data.mixture import Mixture
from shoulders.errors import DivergedError, InterruptedTraining, ShouldersError
from shoulders.files import remove_partial, write_json, write_text
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.gguf import converted, embedded_lm
from shoulders.lm.load import EMBEDDED, load_lm
from shoulders.lm.processor import fast_bfloat16
from shoulders.progress import quiet_progress
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.examples import example_at, example_of
from shoulders.training.objective import Example

WEIGHTS, RESULT = "weights", "tuned.json"
PROBE = 2  # steps


class Tuned:
    """The rivals, as copies of one LM.

    Args:
        lm: what they are copies of; only its tokens are used.
        plan: what is compared.
        rows: on which rows.
        console: for progress.
    """

    def __init__(self, lm: FrozenLM, plan: Plan, rows: Rows, console: Console) -> None:
        self._tokens_of = lm
        self._plan, self._rows, self._console = plan, rows, console
        self._lm = folder_of(plan.lm.name)
        # Where the frozen LM lies: int8 is the CPU's, whatever else is there.
        self._device = "cpu" if lm.device.type == "cpu" else None

    def train(
        self, method: Method, folder: Path, *, steps: int, seed: int, factor: float, keep: bool
    ) -> Trained:
        """Tune a copy into `folder`; `keep` also writes its weights, merged.

        Raises:
            ShouldersError: the process failed, with the last line of what it said.
            DivergedError: its loss is not finite.
        """
        result = folder / RESULT
        kept = (folder / WEIGHTS).is_dir() or not keep
        if not result.is_file() or not (kept or _diverged(result)):
            self._run(method, folder, steps, seed, factor, keep=keep)
        found = json.loads(result.read_text(encoding="utf-8"))
        if _diverged(result):
            raise DivergedError(
                f"{method.name}, seed {seed}: its loss is no number any more; lower its rate, or "
                "report what is finished with --finished"
            )
        curve = [(int(step), float(loss)) for step, loss in found["validations"]]
        # Its last weights are what is kept, as a frozen method's: the Trainer's own way.
        return Trained(found["seconds"], curve[-1][1], curve)

    @contextmanager
    def skill(self, method: Method, folder: Path) -> Iterator[Skill]:
        """Yield the tuned LM as a skill without a prompt; its weights leave the disk afterwards."""
        lm = load_lm(str(folder / WEIGHTS), dtype="float32", device=self._device)
        yield plain(lm, method)
        del lm
        shutil.rmtree(folder / WEIGHTS)

    def original(self, lm: FrozenLM) -> FrozenLM:
        """Return `lm` in the precision in which its copies are asked, before any is tuned."""
        if lm.precision == "float32" and lm.quantize is None:
            return lm
        found: FrozenLM = load_lm(
            self._lm, dtype="float32", revision=self._plan.lm.revision, device=self._device
        )
        return found

    def step_seconds(self, method: Method) -> tuple[float, float]:
        """Return what one step takes here, and what a run takes besides its steps."""
        with tempfile.TemporaryDirectory() as folder:
            self._run(method, Path(folder), PROBE, 0, 1.0, keep=False)
            found = json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))
        return found["seconds"] / PROBE, found["besides_seconds"]

    def trained_parameters(self, folder: Path) -> int:
        """Return how many parameters a finished run has tuned."""
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return int(found["trained_parameters"])

    def _run(
        self, method: Method, folder: Path, steps: int, seed: int, factor: float, *, keep: bool
    ) -> None:
        data = method.data(self._plan, steps)
        mixture = Mixture(self._rows.train, self._rows.templates, data, seed)
        if folder.is_dir():  # of a run that was killed while it saved its weights
            remove_partial(folder)
        shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
        count, skill = steps * self._plan.rows_per_step, plain(self._tokens_of, method)
        examples = [example_at(skill, mixture, i, seed) for i in range(count)]
        checked = [
            example_of(skill, row, self._rows.templates.render(row, 0), 0)
            for row in self._rows.validation
        ]
        write_text(folder / "train.jsonl", _lines(examples))
        write_text(folder / "validation.jsonl", _lines(checked))
        settings = {
            "lm": self._lm,
            "revision": self._plan.lm.revision,
            "rank": method.rank,
            "cpu": self._device == "cpu",
            "bfloat16": fast_bfloat16(self._device),
            "lr": method.optimizer["lr"] * factor,
            "rows_per_step": self._plan.rows_per_step,
            "warmup_steps": max(1, round(WARMUP * steps)),
            "validate_every": max(1, -(-steps // 4)),
            "seed": seed,
            "weights": WEIGHTS if keep else None,
        }
        write_json(folder / "settings.json", settings)
        command = [sys.executable, "-m", "shoulders.comparison.tune", str(folder)]
        with quiet_progress(self._console, f"{method.name}, seed {seed}", steps) as advance:
            watched(command, advance, method.name)


def folder_of(name: str) -> str:
    """Return what transformers itself reads an LM from: a folder, or a Hub id."""
    if name == EMBEDDED:
        return str(embedded_lm())
    return str(converted(Path(name))) if name.endswith(".gguf") else name


def plain(lm: FrozenLM, method: Method) -> Skill:
    """Return an LM in a method's text format, without a prompt."""
    return Skill.base(lm, SkillConfig(format=method.format))


def watched(command: Sequence[str], advance: Any, name: str) -> None:
    """Run a process that prints a line for every step; raises with its last words if it fails."""
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("step "):
                    advance(1)
        except KeyboardInterrupt:
            process.terminate()
            process.stdout.read()  # it ends its step, which it tells of, and saves a checkpoint
            raise InterruptedTraining(
                f"stopped while {name} was tuned; go on with --resume"
            ) from None
        except BaseException:
            process.terminate()
            raise
        if process.wait():
            said.seek(0)
            words = said.read().strip() or "nothing"
            raise ShouldersError(f"{name} failed: {words.splitlines()[-1]}")


def _diverged(result: Path) -> bool:
    """Tell whether a run came to a loss that is no number: no weights are kept."""
    found = json.loads(result.read_text(encoding="utf-8"))
    return any(loss is None for _, loss in found["validations"])


def _lines(examples: Sequence[Example]) -> str:
    rows = [{"task": e.task, "ids": e.input_ids, "answer_ids": e.answer_ids} for e in examples]
    return "".join(json.dumps(row) + "\n" for row in rows)
