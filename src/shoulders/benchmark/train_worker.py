"""One measurement of our training step: `python -m shoulders.benchmark.train_worker`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from shoulders.benchmark.contender import read_rows
from shoulders.benchmark.limits import step_operations
from shoulders.benchmark.worker import arguments, new_skill, report
from shoulders.data.rows import Row
from shoulders.lm.streams import Streams
from shoulders.prompts.build import rates_of
from shoulders.skills.skill import Skill
from shoulders.training.configs import OptimizerConfig, TrainingConfig
from shoulders.training.examples import example_of
from shoulders.training.memory import keep_freed_memory, settled
from shoulders.training.objective import Example
from shoulders.training.optimizer import make_optimizer
from shoulders.training.step import gradients, split


def main() -> None:
    """Train one pass over the rows, after one step of warming up, and print the figures."""
    parser = arguments(__doc__)
    parser.add_argument("--rows-per-step", type=int, required=True)
    options = parser.parse_args()

    keep_freed_memory()
    skill = new_skill(options)
    assert skill.trained is not None
    config = TrainingConfig(
        steps=1,
        rows_per_step=options.rows_per_step,
        optimizer=OptimizerConfig.model_validate(rates_of(options.kind) or {"lr": 1e-2}),
    )
    optimizer = make_optimizer(skill.trained.named_parameters(), config.optimizer)
    rows = read_rows(options.rows)
    examples = [
        example_of(skill, Row("benchmark", row["input"], (row["target"],)), row["input"], 0)
        for row in rows
    ]
    steps = [
        examples[i : i + options.rows_per_step]
        for i in range(0, len(examples), options.rows_per_step)
    ]
    with torch.no_grad():
        for step in steps:
            skill.prompt([e.text for e in step])  # what encoders read is on disk from here on
    with settled(), Streams.of(skill.lm) as passes:
        gradients(skill, steps[0], config, passes)
        started, losses = time.perf_counter(), []
        for step in steps:
            losses.append(gradients(skill, step, config, passes))
            torch.nn.utils.clip_grad_norm_(skill.trained.parameters(), config.clip)
            optimizer.step()
        seconds = time.perf_counter() - started
        work = [work_of(skill, step, config, passes.count) for step in steps]
    report(
        {
            "seconds": seconds,
            "losses": losses,
            "rows": len(rows),
            "real_tokens": sum(e.tokens for e in examples),
            "positions": sum(positions for positions, _ in work),
            "operations": sum(operations for _, operations in work),
            "trained_parameters": skill.trained_parameters,
            **encoding(skill, [e.text for e in examples]),
        }
    )


def encoding(skill: Skill, texts: Sequence[str]) -> dict[str, float]:
    """Return what the encoders take to read the texts at first, each alone, as their cache does.

    The steps above find their outputs on disk, as every epoch but the first does. Empty for skills
    without an encoder.
    """
    encoders = list(skill.encoders())
    started = time.perf_counter()
    with torch.no_grad():
        for encoder in encoders:
            for text in texts:
                encoder.states(encoder.tokenize([text]))
    return {"encoding_seconds": time.perf_counter() - started} if encoders else {}


def work_of(
    skill: Skill, step: Sequence[Example], config: TrainingConfig, count: int
) -> tuple[int, float]:
    """Return the positions that the LM computes in a step, and the operations it must do."""
    prompt = skill.prompt([e.text for e in step[:1]])
    vectors, prefix = prompt.vectors.shape[1], prompt.keys_values.shape[4]
    positions = pairs = 0
    for pack in split(skill, step, config.micro_tokens, count):
        own = 0 if prompt.shared or skill.lm.blocks is None else vectors
        positions += (vectors if prompt.shared else 0) + sum(own + step[i].tokens for i in pack)
        for i in pack:
            length = own + step[i].tokens
            pairs += length * (length + 1) // 2 + length * (prefix + vectors - own)
    answers = sum(len(e.answer_ids) for e in step)
    return positions, step_operations(skill.lm, positions, pairs, answers)


if __name__ == "__main__":
    main()
