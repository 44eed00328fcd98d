"""The training loop: one function, read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from shoulders.data.mixture import Mixture
from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.errors import InterruptedTraining, TrainingError
from shoulders.files import remove_partial, writing_to
from shoulders.fingerprint import digest
from shoulders.lm.streams import Streams
from shoulders.skills.skill import Skill
from shoulders.training.checkpoint import FOLDER, Progress, load_checkpoint, save_checkpoint
from shoulders.training.configs import TrainingConfig
from shoulders.training.divergence import Movement, check_finite, check_step, check_validation
from shoulders.training.examples import check_window, example_at, example_of
from shoulders.training.interrupt import deferred_interrupt
from shoulders.training.memory import keep_freed_memory, settled
from shoulders.training.monitor import monitor_of
from shoulders.training.optimizer import make_optimizer, rate_factor, set_rates
from shoulders.training.processes import Processes
from shoulders.training.recipe import Recipe
from shoulders.training.running_text import RunningText
from shoulders.training.step import gradients
from shoulders.training.validation import SELECTING, validate


def fit(
    skill: Skill,
    mixture: Mixture | RunningText,
    validation: Sequence[Row] | RunningText,
    templates: Templates,
    recipe: Recipe,
    out: Path,
    *,
    bound: dict[str, Any] | None = None,
    resume: bool = False,
    console: Console | None = None,
    processes: Processes | None = None,
) -> Progress:
    """Train a skill's networks; on return they hold the weights that `training.select` says.

    Args:
        skill: with initialised networks; those of its passes after the last text are trained.
        mixture: the order of training examples, a function of (seed, position).
        validation: rows to select on, or text; without any, the last weights are kept.
        templates: for the validation rows.
        recipe: how to train; stored with every checkpoint.
        out: folder for `checkpoints/` and `log.jsonl`.
        bound: further facts (hashes of LM and data) that a resumed run must agree on.
        resume: go on from the newest checkpoint in `out`, if there is one.
        console: where progress goes; None is silent.
        processes: where several train together; only the leading one writes files.

    Returns:
        Step counts, time and validations of the whole run.

    Raises:
        TrainingError: no producer; a non-finite loss, or a trained tensor that does not move
            (`DivergedError`); Ctrl-C (`InterruptedTraining`, after a checkpoint); another recipe
            on resume.
    """
    config, producer = recipe.training, _trainable(skill, recipe.training)
    console = console or Console(quiet=True)
    processes = processes or Processes()
    stored = {"recipe": recipe.model_dump(mode="json"), **(bound or {})}
    stored["processes"] = processes.count
    if processes.leads:
        with writing_to(out):
            out.mkdir(parents=True, exist_ok=True)
        for folder in (out, out / FOLDER):
            remove_partial(folder)
    processes.wait()
    optimizer = make_optimizer(producer.named_parameters(), config.optimizer)
    progress, best, movement = Progress(), copied(producer), Movement(producer)
    if resume and (found := load_checkpoint(out, optimizer, stored)):
        progress, weights, best = found
        producer.load_state_dict(weights)
        movement.resumed(progress.step)
    processes.agree(
        f"where {out} goes on (have all processes the same folder?)",
        (progress.step, digest(producer.named_parameters())),
    )
    rows: Sequence[Row] = []
    if isinstance(validation, RunningText):
        checked = validation.examples(config.validation_rows or SELECTING)
    else:
        rows = validation
        checked = [example_of(skill, row, templates.render(row, 0), 0) for row in rows]
    trained = list(producer.parameters())
    if isinstance(mixture, Mixture):
        drawn = range(progress.step * config.rows_per_step, config.steps * config.rows_per_step)
        check_window(skill, mixture, drawn, config.seed)
    producer.train()
    processes.wait()  # all have read what the leading one will write

    def save() -> None:
        progress.seconds += time.monotonic() - clock[0]
        if processes.leads:
            save_checkpoint(out, progress, copied(producer), best, optimizer, stored)
        clock[0] = time.monotonic()

    clock = [time.monotonic()]  # of steps alone: neither validations nor checkpoints are training
    keep_freed_memory()
    with (
        settled(),
        monitor_of(processes, out, config, progress.step, console) as monitor,
        Streams.of(skill.lm, config.streams) as passes,
        deferred_interrupt() as interrupted,
    ):
        processes.agree(
            "training.streams (by default of a process's threads), or how the LM is computed",
            (passes.count, skill.lm.blocks is not None, skill.lm.precision),
        )
        while progress.step < config.steps:
            step = progress.step
            window = range(step * config.rows_per_step, (step + 1) * config.rows_per_step)
            examples = [example_at(skill, mixture, i, config.seed) for i in window]
            loss = gradients(skill, examples, config, passes, processes)
            loss, stopping = processes.summed(trained, loss, interrupted())
            norm = float(torch.nn.utils.clip_grad_norm_(producer.parameters(), config.clip))
            check_step(step + 1, loss, norm, out / FOLDER)
            factor = rate_factor(step, config)
            set_rates(optimizer, factor)
            movement.feel()
            optimizer.step()
            progress.step += 1
            monitor.step(progress.step, loss, sum(e.tokens for e in examples), factor, norm)
            movement.check()

            if checked and (
                progress.step % config.validate_every == 0 or progress.step == config.steps
            ):
                paused = time.monotonic()
                producer.train(False)
                entry = validate(skill, rows, templates, checked, config.select)
                producer.train()
                clock[0] += time.monotonic() - paused
                check_validation(progress.step, entry["loss"])
                value = _ranked(config.select, progress.step, entry)
                improved = value < progress.best or progress.best_step == 0
                if improved:
                    progress.best, progress.best_step, best = value, progress.step, copied(producer)
                progress.validations.append({"step": progress.step, **entry})
                marked = improved and config.select != "last"
                monitor.validation({"step": progress.step, **entry}, best=marked)

            if progress.step == config.steps:
                check_finite(producer)
            if progress.step % config.save_every == 0 or progress.step == config.steps:
                save()
            if (stopping or (processes.count == 1 and interrupted())) and (
                progress.step < config.steps
            ):
                save()
                raise InterruptedTraining(f"stopped at step {progress.step}; go on with --resume")
    if progress.best_step:
        producer.load_state_dict(best)
        lower = rows and config.select == "loss" and progress.best_step < progress.step
        if lower and processes.leads:
            console.print(
                f"keeping step {progress.best_step}, of the lowest loss; later weights may answer "
                "better all the same: training.select can be exact_match or last"
            )
    producer.train(False)
    return progress


def _trainable(skill: Skill, config: TrainingConfig) -> nn.Module:
    """Return what is trained; raises `TrainingError` for what cannot be trained so."""
    if skill.trained is None or not any(True for _ in skill.trained.parameters()):
        raise TrainingError("the recipe trains nothing: give a pass a prompt or a link to train")
    if config.recompute and skill.lm.blocks is None:
        raise TrainingError(f"recompute: the layers of {skill.lm.name} are not fused; leave it out")
    if skill.lm.shards is not None and (config.streams or 1) > 1:
        raise TrainingError("streams: passes through a sharded LM run one by one; leave it out")
    return skill.trained


def _ranked(select: str, step: int, entry: dict[str, Any]) -> float:
    """Return what weights are selected by: the lower, the better."""
    if select == "last":
        return -float(step)
    return float(entry["loss"] if select == "loss" else -entry["exact_match"])


def copied(producer: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the producer's tensors."""
    return {name: value.detach().clone() for name, value in producer.state_dict().items()}
