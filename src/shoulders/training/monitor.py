"""What a run shows and logs: a progress bar, `log.jsonl`, TensorBoard where asked for."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from shoulders.files import write_text
from shoulders.training.configs import TrainingConfig
from shoulders.training.processes import Processes

LOG = "log.jsonl"


class Monitor:
    """Shows loss, real tokens per second (no pads, no prompts) and the time left."""

    def __init__(self, out: Path, steps: int, done: int, console: Console, *, tensorboard: bool):
        self._out = out
        self._console = console
        self._keep_log_until(done)
        self._log = (out / LOG).open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=done + 1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=steps, completed=done, loss=0.0, speed=0)
        self._loss: float | None = None
        self._tokens: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._log.close()
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int, loss: float, tokens: int, rate: float, norm: float) -> None:
        """Record one optimizer step; `loss` in nats per answer token, `tokens` are real ones."""
        self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._tokens = [*self._tokens[-20:], (time.monotonic(), tokens)]
        seconds = self._tokens[-1][0] - self._tokens[0][0]
        speed = sum(n for _, n in self._tokens[1:]) / max(seconds, 1e-9)
        self._bar.update(self._task, completed=step, loss=self._loss, speed=speed)
        self._write(
            {"step": step, "loss": loss, "tokens": tokens, "lr_factor": rate, "grad_norm": norm}
        )
        if self._writer is not None:
            self._writer.add_scalar("train/loss", loss, step)
            self._writer.add_scalar("train/tokens_per_second", speed, step)
            self._writer.add_scalar("train/lr_factor", rate, step)

    def validation(self, entry: dict[str, Any], *, best: bool) -> None:
        """Record one validation: `{"step": ..., metric: value, ...}`."""
        shown = ", ".join(f"{k} {v:.3f}" for k, v in entry.items() if isinstance(v, float))
        self._console.print(f"step {entry['step']}: validation {shown}{' (best)' if best else ''}")
        self._write({"validation": entry})
        if self._writer is not None:
            for name, value in entry.items():
                if isinstance(value, float):
                    self._writer.add_scalar(f"validation/{name}", value, entry["step"])

    def _write(self, entry: dict[str, Any]) -> None:
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()

    def _keep_log_until(self, done: int) -> None:
        """Drop what a killed run logged after its last checkpoint: it will be done again."""
        path = self._out / LOG
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # half a line from a kill
            if entry.get("validation", entry).get("step", 0) <= done:
                kept.append(line)
        write_text(path, "".join(line + "\n" for line in kept))


@contextmanager
def monitor_of(
    processes: Processes, out: Path, config: TrainingConfig, done: int, console: Console
) -> Iterator[Monitor]:
    """Open the monitor of a run; of several processes only the leading one is seen or logs."""
    with contextlib.ExitStack() as stack:
        if not processes.leads:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            console = Console(quiet=True)
        tensorboard = config.tensorboard and processes.leads
        monitor = Monitor(out, config.steps, done, console, tensorboard=tensorboard)
        yield stack.enter_context(monitor)
