"""One measurement of our generation: `python -m shoulders.benchmark.generate_worker`."""

from __future__ import annotations

import argparse
import functools
import json
import resource
import sys
import time
from pathlib import Path

import torch

from shoulders.benchmark.contender import read_rows
from shoulders.benchmark.limits import generation_operations
from shoulders.benchmark.train_worker import INIT
from shoulders.encoders.load import load_encoder
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.load import load_lm
from shoulders.skills.config import PassConfig, SkillConfig
from shoulders.skills.skill import Skill


def main() -> None:
    """Generate for all rows, after a few to warm up, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    options = parser.parse_args()

    lm = load_lm(options.lm, dtype=options.dtype)
    spec = {"kind": options.kind, "length": options.length, "init": INIT}
    config = SkillConfig(passes=(PassConfig(prompt=spec),))
    random = torch.Generator().manual_seed(0)
    skill = Skill.create(lm, config, functools.cache(load_encoder), random)
    texts = [row["input"] for row in read_rows(options.rows)]
    new = options.new_tokens
    decoding = DecodingConfig(max_new_tokens=new, min_new_tokens=new)
    skill.generate(texts[:8], decoding)
    started = time.perf_counter()
    answers = skill.generate(texts, decoding)
    seconds = time.perf_counter() - started
    read = sum(len(ids) for ids in skill.input_ids(texts))
    written = sum(len(several[0].token_ids) for several in answers)
    result = {
        "seconds": seconds,
        "rows": len(texts),
        "new_tokens": written,
        "operations": generation_operations(lm, read, written),
        "token_ids": [several[0].token_ids for several in answers],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
