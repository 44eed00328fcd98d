"""Optimizer and learning-rate schedule, both free of hidden state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from shoulders.errors import RecipeError
from shoulders.training.configs import OptimizerConfig, TrainingConfig
from shoulders.training.muon import Muon, is_matrix


def make_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """Return the optimizer, one group per parameter, each with its `peak_lr`.

    Raises `RecipeError` for a key of `lr_for` that no parameter's name starts with.
    """
    named = list(named)
    for prefix in config.lr_for:
        if not any(name.startswith(prefix) for name, _ in named):
            parts = ", ".join(sorted({name.split(".")[0] for name, _ in named}))
            raise RecipeError(f"lr_for.{prefix}: no trained part is called that; there are {parts}")
    groups: list[dict[str, Any]] = []
    for name, parameter in named:
        prefixes = [p for p in config.lr_for if name.startswith(p)]
        peak = config.lr_for[max(prefixes, key=len)] if prefixes else config.lr
        groups.append({"params": [parameter], "lr": peak, "peak_lr": peak})
    if config.kind == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr, weight_decay=config.weight_decay)
    if config.kind == "muon":
        for group, (name, parameter) in zip(groups, named, strict=True):
            group["matrix"] = is_matrix(name, parameter)
        return Muon(groups, config.betas, config.weight_decay)
    # One pass over each tensor where torch has it: for a small LM the optimizer is seen in a step.
    fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in named)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=fused
    )


def rate_factor(step: int, config: TrainingConfig) -> float:
    """Return the share of the peak learning rate at `step` (0-based), in (0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return 1.0
    left = (config.steps - step) / max(1, config.steps - config.warmup_steps)
    return left if config.decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
