"""What the two workers share: their command line, and the skill that they measure."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from shoulders.encoders.load import load_encoder
from shoulders.lm.load import load_lm
from shoulders.machine import peak_bytes
from shoulders.skills.config import PassConfig, SkillConfig
from shoulders.skills.skill import Skill

INIT = {"source": "text", "text": "Read the instruction and give only the short answer."}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that every worker has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--length", type=int, required=True)
    return parser


def new_skill(options: argparse.Namespace) -> Skill:
    """Return an untrained skill of the kind and length that the options name, seed 0."""
    lm = load_lm(options.lm, dtype=options.dtype)
    spec = {"kind": options.kind, "length": options.length, "init": INIT}
    config = SkillConfig(passes=(PassConfig(prompt=spec),))
    random = torch.Generator().manual_seed(0)
    return Skill.create(lm, config, functools.cache(load_encoder), random)


def report(figures: dict[str, Any]) -> None:
    """Print a run's figures and its peak memory as one JSON line."""
    sys.stdout.write(json.dumps({**figures, "peak_rss_bytes": peak_bytes()}) + "\n")
