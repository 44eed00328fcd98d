"""The gateway and a real vLLM: `make test-vllm`, which makes the environment that it needs."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI

from shoulders.benchmark.contender import peer_lm
from shoulders.benchmark.vllm_server import arguments, vllm_server
from shoulders.data.templates import Templates
from shoulders.demo.tasks import demo_rows
from shoulders.encoders.load import load_encoder
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.reader.contexts import Contexts
from shoulders.reader.engines.opening import open_passages
from shoulders.reader.questions import Question
from shoulders.skills.artefact import save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.reader import Reader, ReadingConfig
from shoulders.skills.reader_artefact import SearchConfig, save_reader
from shoulders.skills.skill import Skill

pytestmark = pytest.mark.vllm

PROMPTS, NEW_TOKENS, WINDOW = 50, 16, 1024
TIE = 1e-3  # log-probabilities nearer than this may change places by rounding in float32
INIT = {"source": "text", "text": "Give only the short answer."}
READ, STAYED = ("static", "idpt", "reader", "static_kv", "idpt_kv"), "neural"


@pytest.fixture(scope="module")
def python() -> Path:
    """Return the Python that has vLLM, or skip."""
    given = os.environ.get("SHOULDERS_VLLM_PYTHON")
    found = Path(given) if given else Path(__file__).parents[1] / ".venv-vllm/bin/python"
    if not found.is_file():
        pytest.skip(f"no vLLM at {found}: `make test-vllm`, or set SHOULDERS_VLLM_PYTHON")
    return found


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rows = demo_rows(0)[1]
    return [row.input for row in rows[:: max(1, len(rows) // PROMPTS)]][:PROMPTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an index of what the questions ask for."""
    folder = tmp_path_factory.mktemp("real")
    for i, row in enumerate(demo_rows(0)[1]):
        path = folder / "documents" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{row.input}\n\nThe answer to this is {row.targets[0]}.\n")
    command = [sys.executable, "-m", "shoulders", "index", str(folder / "documents")]
    subprocess.run([*command, "--out", str(folder / "index")], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def skills(embedded_lm: FrozenLM, folder: Path) -> dict[str, Skill | Reader]:
    """Save skills of every kind: prompts of sensible size that nothing has trained."""
    generator = {"width": 64, "heads": 2, "layers": 1}
    static = {"kind": "static", "length": 10, "init": INIT}
    idpt = {"kind": "idpt", "length": 10, "init": INIT, "generator": generator}
    idpt_kv = {"kind": "idpt_kv", "length": 10, "init": INIT, "generator": generator}
    chains: dict[str, list[dict[str, Any]]] = {
        "static": [{"prompt": static}],
        "idpt": [{"prompt": idpt}],
        "static_kv": [{"prompt": {"kind": "static_kv", "length": 10, "init": INIT}}],
        "idpt_kv": [{"prompt": idpt_kv}],
        "reader": [{"prompt": static}],
        "neural": [{"link": {"skip": False}}, {"prompt": static}],
    }
    found: dict[str, Skill | Reader] = {}
    random = torch.Generator().manual_seed(0)
    for name, passes in chains.items():
        config = SkillConfig.model_validate({"passes": passes})
        skill = Skill.create(embedded_lm, config, load_encoder, random)
        for network in skill.networks():
            network.train(False)
            with torch.no_grad():
                for parameter in network.parameters():
                    # What starts at zero would ignore its input.
                    noise = torch.randn(parameter.shape, generator=random)
                    parameter += 0.02 * max(float(parameter.std()), 0.1) * noise
        save_skill(skill, folder / name, Templates(), {})
        found[name] = skill
    search, reading = SearchConfig(retriever="sparse", k=5), ReadingConfig()
    save_reader(folder / "reader", search, reading, None, {})
    passages = open_passages(str(folder / "index"))
    contexts = Contexts(passages.retriever("sparse"), passages, None, 5)
    reader = found["reader"]
    assert isinstance(reader, Skill)
    found["reader"] = Reader(reader, contexts, reading)
    return found


@pytest.fixture(scope="module")
def upstream(python: Path, folder: Path) -> Iterator[str]:
    given = arguments(peer_lm("embedded"), "float32", WINDOW, connector=True)
    with vllm_server(python, given, folder / "vllm.txt") as url:
        yield url


@pytest.fixture(scope="module")
def gateway(upstream: str, folder: Path, skills: dict[str, Skill | Reader]) -> Iterator[OpenAI]:
    """Start `shoulders serve --engine vllm` as users do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "shoulders", "serve", "--port", str(port)]
    command += ["--engine", "vllm", "--vllm-url", upstream, "--dtype", "float32"]
    command += ["--index", str(folder / "index")]
    command += [part for name in skills for part in ("--skills", str(folder / name))]
    with (folder / "gateway.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        else:
            raise AssertionError((folder / "gateway.txt").read_text())
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.parametrize("name", [*READ, STAYED])
def test_greedy_answers_are_the_local_ones(
    gateway: OpenAI,
    upstream: str,
    skills: dict[str, Skill | Reader],
    texts: list[str],
    name: str,
) -> None:
    """In float32, for 50 prompts; where two tokens are as good as equal either may stand."""
    inputs, skill = texts, skills[name]
    if isinstance(skill, Reader):
        questions = [Question(text, ()) for text in texts]
        packed = skill.packed(questions, skill.contexts.ranked(questions))
        inputs, skill = [one.text for one in packed], skill.skill
    decoding = DecodingConfig(max_new_tokens=NEW_TOKENS, top_logprobs=2)
    wanted = [several[0] for several in skill.generate(inputs, decoding)]

    def ask(text: str) -> Any:
        return gateway.completions.create(
            model=name, prompt=text, max_tokens=NEW_TOKENS, temperature=0, logprobs=1
        ).choices[0]

    before = generated(upstream)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, texts))
    assert (generated(upstream) > before) == (name != STAYED), "who has answered?"
    apart = []
    for text, ours, theirs in zip(texts, wanted, found, strict=True):
        if theirs.text == ours.text:
            continue
        tokens = [skill.lm.text([i]) for i in ours.token_ids]
        at = next(i for i, t in enumerate(tokens) if theirs.logprobs.tokens[i : i + 1] != [t])
        gap = ours.top[at][0][1] - ours.top[at][1][1]
        apart.append((text, at, gap, ours.text, theirs.text))
    print(f"{name}: {len(texts) - len(apart)} of {len(texts)} equal; apart: {apart}")
    assert all(gap < TIE for _, _, gap, _, _ in apart), apart
    assert len(apart) <= 2


def test_streams_samples_and_stops(
    gateway: OpenAI, skills: dict[str, Skill | Reader], texts: list[str]
) -> None:
    skill = skills["static"]
    assert isinstance(skill, Skill)
    decoding = DecodingConfig(max_new_tokens=NEW_TOKENS)
    answers = [several[0] for several in skill.generate(texts, decoding)]
    text, whole = max(zip(texts, answers, strict=True), key=lambda one: len(one[1].text))
    assert len(whole.text) > 4, "too short to cut"
    asked: dict[str, Any] = {"model": "static", "prompt": text, "max_tokens": NEW_TOKENS}
    stream = gateway.completions.create(**asked, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in stream if piece.choices) == whole.text
    sampled = [
        gateway.completions.create(**asked, n=3, temperature=1.2, top_p=0.9, seed=7)
        for _ in range(2)
    ]
    both = [[choice.text for choice in one.choices] for one in sampled]
    assert both[0] == both[1], "the same seed"
    assert len(set(both[0])) > 1
    stop = whole.text[2:4]
    cut = gateway.completions.create(**asked, temperature=0, stop=stop).choices[0]
    assert cut.text == whole.text[: whole.text.find(stop)]


def test_generate_asks_it(
    upstream: str, folder: Path, skills: dict[str, Skill | Reader], texts: list[str]
) -> None:
    """`shoulders generate --vllm-url` in float32 writes what the gateway would answer."""
    skill, rows, output = skills["idpt"], folder / "rows.jsonl", folder / "answers.jsonl"
    assert isinstance(skill, Skill)
    rows.write_text("".join(json.dumps({"input": text}) + "\n" for text in texts))
    decoding = DecodingConfig(max_new_tokens=NEW_TOKENS)
    wanted = [several[0].text for several in skill.generate(texts, decoding)]
    command = [sys.executable, "-m", "shoulders", "generate", "--skill", str(folder / "idpt")]
    command += ["--input", str(rows), "--output", str(output), "--dtype", "float32"]
    command += ["--vllm-url", upstream, "--max-new-tokens", str(NEW_TOKENS)]
    before = generated(upstream)
    subprocess.run(command, check=True, capture_output=True)
    assert generated(upstream) >= before + len(texts), "vLLM was asked"
    found = [json.loads(line)["outputs"][0]["text"] for line in output.read_text().splitlines()]
    assert sum(a != b for a, b in zip(wanted, found, strict=True)) <= 2


def test_other_skills_prefixes_are_never_taken(
    gateway: OpenAI, skills: dict[str, Skill | Reader], texts: list[str]
) -> None:
    """The same long input behind two prefixes, again and again: vLLM's cache tells them apart."""
    text = " ".join(texts[:12])
    for _ in range(2):
        for name in ("static_kv", "idpt_kv", "static"):
            skill = skills[name]
            assert isinstance(skill, Skill)
            (ours,) = skill.generate([text], DecodingConfig(max_new_tokens=4))[0]
            theirs = gateway.completions.create(
                model=name, prompt=text, max_tokens=4, temperature=0
            )
            assert theirs.choices[0].text == ours.text, name


def generated(upstream: str) -> float:
    """Return how many tokens vLLM has generated."""
    with urllib.request.urlopen(f"{upstream}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    found = re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))
