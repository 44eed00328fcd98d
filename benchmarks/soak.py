"""Ten minutes of what servers meet: many clients, some of whom hang up, skills that come and go.

    .venv/bin/python benchmarks/soak.py

Starts `shoulders serve` (int8, eight skills of six kinds, untrained: their answers are as good as
any) and asks it from many threads on loopback: whole answers, streams, streams and requests that
are dropped midway, inputs beyond the window, skills that are being loaded and unloaded, and bursts
beyond the queue. Every finished greedy answer is compared with the answer to the same request
alone, beforehand. The server's memory is sampled; at the end it is killed (-9) and started again.
Ends with exit code 1 if an answer was lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.files import write_json
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.skills.artefact import save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from soak_clients import KEY, QUEUE, Asked, Server, Soak

ROOT = Path(__file__).parents[1]
TEXTS = (
    "Name the capital of France.",
    "What is the opposite of hot?",
    "Write the number twenty-one in digits.",
    "Translate to German: good morning. " * 8,
    "Is this review positive or negative? It was a wonderful film, and I would see it again.",
    "List three animals that live in the sea, from small to large. " * 3,
)
STATIC: dict[str, Any] = {"kind": "static", "length": 8}
SKILLS: dict[str, list[dict[str, Any]]] = {
    "static": [{"prompt": STATIC}],
    "static-2": [{"prompt": {**STATIC, "length": 20}}],
    "idpt": [{"prompt": {"kind": "idpt", "length": 8}}],
    "static_kv": [{"prompt": {"kind": "static_kv", "length": 8}}],
    "idpt_kv": [{"prompt": {"kind": "idpt_kv", "length": 8}}],
    "neural": [{"link": {"width": 128, "heads": 2, "skip": True}}, {"prompt": STATIC}],
    "textual": [{"prompt": STATIC, "propose": {"n": 2, "max_new_tokens": 6}}, {"prompt": STATIC}],
    "neural-2": [{"link": {"width": 128, "heads": 2, "skip": True}}, {"prompt": None}],
}
GUESTS = ("neural-2", "idpt_kv", "textual", "static")  # also loaded and unloaded under other names


def main() -> None:
    """Soak a server, kill it, start it again; write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm", default="embedded")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/soak.json")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_skills(folder / "root", options.lm)
        (folder / "key").write_text(KEY)
        server = Server(folder, list(SKILLS))
        try:
            answers = alone(server)
            soak = Soak(server, answers, GUESTS, 60 * options.minutes, options.seed)
            soak.run(options.clients)
            jobs = drained(server)
            internal = server.log.read_text().count("Traceback")
        finally:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        again = Server(folder, list(SKILLS))
        try:
            same = all(
                completed(again, asked) == answers[asked] for asked in list(answers)[:: len(TEXTS)]
            )
        finally:
            again.process.kill()
            again.process.wait()
    tally, times = soak.tally, np.array(soak.memory)
    half = times[times[:, 0] >= times[-1, 0] / 2]
    result: dict[str, Any] = {
        "benchmark": "soak",
        "minutes": options.minutes,
        "clients": options.clients,
        "max_queue": QUEUE,
        "lm": options.lm,
        "skills": list(SKILLS),
        "counts": dict(sorted(tally.counts.items())),
        "problems": tally.problems,
        "jobs_left": jobs,
        "tracebacks": internal,
        "memory": {
            "first_mb": times[0, 1],
            "last_mb": times[-1, 1],
            "most_mb": times[:, 1].max(),
            "slope_mb_per_minute": 60 * float(np.polyfit(half[:, 0], half[:, 1], 1)[0]),
            "seconds_and_mb": times.round(1).tolist(),
        },
        "killed_and_started": {"seconds_to_ready": again.seconds_to_ready, "same_answers": same},
        "machine": machine(),
        "seed": options.seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(options.out, result)
    memory = {k: v for k, v in result["memory"].items() if k != "seconds_and_mb"}
    print(json.dumps({**result, "memory": memory}, indent=1))
    seen = tally.counts["429"] and tally.counts["answers compared"]
    sys.exit(bool(tally.problems or jobs or internal or not same or not seen))


def make_skills(root: Path, name: str) -> None:
    """Write the skills, on an LM."""
    lm = load_lm(name, dtype="int8")
    for seed, (own, passes) in enumerate(SKILLS.items()):
        config = SkillConfig.model_validate({"passes": passes})
        numbers = torch.Generator().manual_seed(seed)
        save_skill(Skill.create(lm, config, load_encoder, numbers), root / own, Templates(), {})


def alone(server: Server) -> dict[Asked, str]:
    """Return the answer to every request, each asked with nothing beside it."""
    base = json.loads(server.ask("GET", "/v1/models")[1])["data"][0]["id"]
    asked = [
        Asked(skill, text, 8 + 8 * (i % 3), chat=i % 3 == 1)
        for skill in (base, *SKILLS)
        for i, text in enumerate(TEXTS)
    ]
    return {one: completed(server, one) for one in asked}


def completed(server: Server, asked: Asked) -> str:
    """Return one answer; ends the program where there is none."""
    status, text, _ = server.ask("POST", asked.path, asked.body(asked.skill, stream=False))
    if status != 200:
        raise SystemExit(f"{asked}: {status} {text}")
    choice = json.loads(text)["choices"][0]
    answer: str = choice["message"]["content"] if asked.chat else choice["text"]
    return answer


def drained(server: Server) -> int:
    """Return how many jobs are left half a minute after the last request."""
    until = time.monotonic() + 30
    while (left := server.jobs()) and time.monotonic() < until:
        time.sleep(0.5)
    return left


if __name__ == "__main__":
    main()
