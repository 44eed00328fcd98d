"""What a rival's training is watched by: its steps, its losses, and checkpoints to go on from."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from shoulders.errors import ArtefactError
from shoulders.training.checkpoint import FOLDER, Progress, Stored, read_checkpoint, save_checkpoint

SAVED_EVERY = 600  # seconds: whole tuning writes three times its weights
RANDOM = "random"  # in a checkpoint's weights: the state of torch's random numbers


class Watch(TrainerCallback):
    """Times the steps, tells of each, measures the loss on validation rows, and keeps checkpoints.

    Args:
        model: what is trained; parameters that need no gradient are not kept.
        rows: tokens of validation rows (`ids`, `answer_ids`, `task`).
        every: steps from one validation to the next.

    Attributes:
        step: optimizer steps done, before this process too.
        seconds: what they took.
        validations: steps and losses.
        stopped: whether training ended because it was asked to.
    """

    def __init__(self, model: Any, rows: list[dict[str, Any]], every: int) -> None:
        self.step, self.seconds, self.stopped = 0, 0.0, False
        self.validations: list[tuple[int, float]] = []
        self._model, self._rows, self._every = model, rows, every
        self._began = 0.0
        self._folder: Path | None = None
        self._told: dict[str, Any] = {}
        self._stored: Stored | None = None
        self._saved, self._asked = time.monotonic(), False

    def keep(self, folder: Path, told: dict[str, Any]) -> None:
        """Keep checkpoints in `folder`, and take up what is there of the same run (`told`).

        What is damaged, or of another run, is removed; saving raises `ShouldersError` where the
        disk is full.
        """
        self._folder, self._told = folder, told
        try:
            stored = read_checkpoint(folder)
        except ArtefactError:  # damaged: it begins again
            stored = None
        if stored is None or stored.recipe != told:
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
            return
        self._stored, progress = stored, stored.progress
        self.step, self.seconds = progress.step, progress.seconds
        self.validations = [(one["step"], one["loss"]) for one in progress.validations]
        for step in range(self.step):
            self._tell(step + 1)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back what was trained, and the optimizer's state."""
        if self._stored is None:
            return
        weights = self._stored.weights
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(weights[name])
        self._stored.restore(optimizer)

    def stop(self) -> None:
        """Let training end with the step it is in."""
        self._asked = True

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Note when a step begins."""
        if self._stored is not None:  # what opening the rows has drawn was drawn before, too
            torch.set_rng_state(self._stored.weights[RANDOM])
            self._stored = None
        self._began = time.perf_counter()

    def on_step_end(
        self, _arguments: Any, state: Any, control: Any, *, optimizer: Any = None, **__: Any
    ) -> None:
        """Note when it has ended, its optimizer's too."""
        self.seconds += time.perf_counter() - self._began
        self.step += 1
        self._tell(self.step)
        last = state.global_step == state.max_steps
        if self.step % self._every == 0 or last:
            self.validations.append((self.step, self.loss()))
        if last or self._folder is None:
            return
        if self._asked or time.monotonic() - self._saved > SAVED_EVERY:
            self._save(self._folder, optimizer)
        if self._asked:
            self.stopped = control.should_training_stop = True

    @torch.no_grad()
    def loss(self) -> float:
        """Return nats per answer token, averaged over rows by task: as frozen methods select."""
        self._model.eval()
        device = next(self._model.parameters()).device
        tasks: dict[str, list[float]] = {}
        for row in self._rows:
            ids = torch.tensor([row["ids"] + row["answer_ids"]], device=device)
            labels = ids.clone()
            labels[:, : len(row["ids"])] = -100
            value = float(self._model(input_ids=ids, labels=labels).loss)
            tasks.setdefault(row["task"], []).append(value)
        self._model.train()
        return sum(sum(v) / len(v) for v in tasks.values()) / len(tasks)

    def _save(self, folder: Path, optimizer: Any) -> None:
        losses = [{"step": step, "loss": loss} for step, loss in self.validations]
        progress = Progress(step=self.step, validations=losses, seconds=self.seconds)
        weights = {name: p.detach() for name, p in self._trained()}
        weights[RANDOM] = torch.get_rng_state()
        save_checkpoint(folder, progress, weights, {}, optimizer, self._told)
        self._saved = time.monotonic()

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]

    def _tell(self, step: int) -> None:
        print(f"step {step}", flush=True)  # noqa: T201
