"""The gateway to vLLM: what it sends, what it makes of the answers, what it refuses.

They speak to a small server of the same protocol that answers with the same tiny LM;
tests/test_vllm_real.py starts the real one.
"""

from __future__ import annotations

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from fake_vllm import FakeVllm
from shoulders.cli.app import app
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.errors import ShouldersError, WindowError
from shoulders.lm.decode import Completion, DecodingConfig, Delta
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.serving.api import Server, create_app
from shoulders.serving.embeds import encoded
from shoulders.serving.engine import Engine, EngineConfig
from shoulders.serving.job import Event, Job
from shoulders.serving.metrics import Metrics
from shoulders.serving.rows import Entry
from shoulders.serving.skillset import Served, SkillSet
from shoulders.serving.upstream import (
    UpstreamConfig,
    UpstreamDownError,
    UpstreamError,
    UpstreamSlowError,
)
from shoulders.serving.vllm_engine import VllmEngine
from shoulders.skills.artefact import save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.reader import first_line
from shoulders.skills.skill import Skill
from tiny_models import environment, save_tiny_encoder, save_tiny_lm

TEXTS = [
    "the capital of france",
    "two",
    "write the number three as a word please",
    "answer the question with a short answer please and write it as a word or a number " * 2,
]
PROPOSE = {"n": 3, "temperature": 1.5, "max_new_tokens": 5}
AWAY = ("base", "static", "idpt", "idspam", "textual", "static_kv", "idpt_kv")
"""Skills that vLLM answers, with our connector in it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def lm(folder: Path) -> FrozenLM:
    found: FrozenLM = load_lm(str(save_tiny_lm(folder / "lm")), dtype="float32")
    return found


@pytest.fixture(scope="module")
def skills(folder: Path, lm: FrozenLM) -> Iterator[dict[str, Skill]]:
    encoder = str(save_tiny_encoder(folder / "encoder"))
    patch = pytest.MonkeyPatch()
    patch.setenv("SHOULDERS_CACHE", str(folder / "cache"))
    generator = {"encoder": encoder, "width": 16, "heads": 2, "layers": 1}
    static = {"kind": "static", "length": 4}
    idpt = {"kind": "idpt", "length": 3, "generator": generator}
    chains: dict[str, list[dict[str, Any]]] = {
        "base": [{}],
        "static": [{"prompt": static}],
        "idpt": [{"prompt": idpt}],
        "idspam": [{"prompt": {"kind": "idspam", "length": 3, "width": 8, "bottleneck": 4}}],
        "static_kv": [{"prompt": {"kind": "static_kv", "length": 3}}],
        "idpt_kv": [{"prompt": {"kind": "idpt_kv", "length": 2, "generator": generator}}],
        "lowrank": [{"prompt": {"kind": "static_lowrank", "length": 3, "rank": 2}}],
        "lora": [{"prompt": {"kind": "static_lora", "length": 3, "rank": 2}}],
        "neural": [{"link": {"heads": 2, "skip": False}}, {"prompt": static}],
        "textual": [{"prompt": static, "propose": PROPOSE}, {"prompt": idpt}],
    }
    random = torch.Generator().manual_seed(0)
    found = {}
    for name, passes in chains.items():
        config = SkillConfig.model_validate({"passes": passes})
        found[name] = skill = Skill.create(lm, config, load_encoder, random)
        for network in skill.networks():
            network.train(False)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    yield found
    patch.undo()


@pytest.fixture
def fake(lm: FrozenLM) -> Iterator[FakeVllm]:
    fake = FakeVllm(lm)
    yield fake
    fake.close()


def connected(lm: FrozenLM, fake: FakeVllm, **config: Any) -> Engine:
    """Connect an engine; the requests of the start's checks are forgotten."""
    remote = VllmEngine(lm, UpstreamConfig(url=fake.url, **config))
    fake.requests.clear()
    return Engine(lm, EngineConfig(workers=1), remote)


@pytest.fixture
def engine(lm: FrozenLM, fake: FakeVllm) -> Iterator[Engine]:
    engine = connected(lm, fake)
    yield engine
    engine.close(10)


class Answers:
    """Collects the events of one job."""

    def __init__(self, wanted: int) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.wanted = wanted

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Exception) or len(self.completions) == self.wanted:
            self.over.set()

    @property
    def completions(self) -> list[Completion]:
        ended = [e for e in self.events if isinstance(e, Delta) and e.completion]
        return [e.completion for e in sorted(ended, key=lambda e: e.sample) if e.completion]

    @property
    def error(self) -> Exception | None:
        return next((e for e in self.events if isinstance(e, Exception)), None)

    def text(self, sample: int = 0) -> str:
        mine = [e for e in self.events if isinstance(e, Delta) and e.sample == sample]
        return "".join(e.text for e in mine)


def begun(
    engine: Engine, skill: Skill, text: str, deadline: float | None = None, **decoding: Any
) -> tuple[Job, Answers]:
    answers = Answers(decoding.get("n", 1))
    job = Job("s", skill, text, DecodingConfig(**decoding), answers, deadline)
    engine.submit(job)
    return job, answers


def ask(engine: Engine, skill: Skill, text: str, **decoding: Any) -> Answers:
    _, answers = begun(engine, skill, text, **decoding)
    assert answers.over.wait(30)
    return answers


# -- answers -----------------------------------------------------------------------------


def test_answers_are_the_local_engines(
    engine: Engine, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    """Every kind, mixed; token for token, with the same log-probabilities and pieces of text."""
    given = []
    for text in TEXTS:
        for name, skill in skills.items():
            given.append((name, text, begun(engine, skill, text, max_new_tokens=7)))
    for name, text, (job, answers) in given:
        assert answers.over.wait(60), name
        assert answers.error is None, (name, answers.error)
        (alone,) = skills[name].generate([text], DecodingConfig(max_new_tokens=7))[0]
        (found,) = answers.completions
        assert (found.text, found.token_ids) == (alone.text, alone.token_ids), name
        assert found.finish == alone.finish
        assert found.logprob == pytest.approx(alone.logprob, abs=1e-4)
        assert answers.text() == alone.text, "its pieces are the whole"
        assert job.prompt_tokens > 0
    per_text = len(AWAY) + 1  # the textual one asks twice, neural and low-rank ones stay here
    assert len(fake.requests) == per_text * len(TEXTS)
    assert engine.jobs == engine.running == 0


def test_without_the_connector_prefixes_stay_here(
    lm: FrozenLM, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    fake.prefixes = False
    engine = connected(lm, fake)
    for name in ("static_kv", "idpt_kv", "neural"):
        answers = ask(engine, skills[name], TEXTS[0], max_new_tokens=6)
        (alone,) = skills[name].generate([TEXTS[0]], DecodingConfig(max_new_tokens=6))[0]
        assert answers.completions[0].token_ids == alone.token_ids
    assert fake.requests == []
    assert ask(engine, skills["static"], TEXTS[0]).error is None
    assert len(fake.requests) == 1
    assert engine.close(10)


def test_an_lm_without_fused_layers_answers_through_vllm_alone(
    folder: Path, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    other = load_lm(str(folder / "lm"), dtype="float32")
    other.blocks = None
    engine = connected(other, fake)
    assert ask(engine, skills["static"], TEXTS[0], max_new_tokens=3).error is None
    assert "cannot answer skills of this kind" in str(ask(engine, skills["neural"], "two").error)
    assert engine.close(10)


def test_everything_that_changes_an_answer_is_sent(
    engine: Engine, fake: FakeVllm, skills: dict[str, Skill], lm: FrozenLM
) -> None:
    # But a stop string that vLLM might find in what stands before an answer is found here alone.
    decoding = {"n": 2, "temperature": 0.7, "top_p": 0.9, "seed": 5, "stop": ("zz", " ", " z")}
    answers = ask(engine, skills["static"], "two", max_new_tokens=6, top_logprobs=3, **decoding)
    assert len(answers.completions) == 2
    assert all(len(top) == 3 for c in answers.completions for top in c.top)
    (body,) = fake.requests
    for name, value in {**decoding, "stop": ["zz"], "max_tokens": 6, "logprobs": 3}.items():
        assert body[name] == value
    assert body["stop_token_ids"] == list(lm.end_ids)
    # What vLLM would otherwise take from the LM's generation_config.json.
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (0, 0, 1)
    data = base64.b64decode(body["prompt_embeds"])
    embeddings = torch.load(io.BytesIO(data), weights_only=True)
    ids = skills["static"].input_ids(["two"])[0]
    assert embeddings.shape == (4 + len(ids), 32)
    assert embeddings.dtype == torch.float32
    assert torch.equal(embeddings[4:], lm.embed(torch.tensor(ids)))


def test_stop_strings_end_the_text(engine: Engine, skills: dict[str, Skill]) -> None:
    """The server here knows no stop strings: those that it has not seen yet end the text too."""
    skill = skills["static"]
    (whole,) = skill.generate([TEXTS[0]], DecodingConfig(max_new_tokens=12))[0]
    stop = whole.text[3:5]
    answers = ask(engine, skill, TEXTS[0], max_new_tokens=12, stop=(stop,))
    assert answers.text() == answers.completions[0].text == whole.text[: whole.text.find(stop)]
    assert answers.completions[0].finish == "stop"
    # Of several samples one may go on at vLLM when it has ended here.
    several = {"n": 3, "temperature": 1.0, "seed": 3, "max_new_tokens": 12, "stop": (stop, "a")}
    answers = ask(engine, skill, TEXTS[0], **several)
    (wanted,) = skill.generate([TEXTS[0]], DecodingConfig(**several))
    assert [c.text for c in answers.completions] == [c.text for c in wanted]
    assert len({len(c.token_ids) for c in wanted}) > 1


def test_an_answer_ends_at_the_servers_window(
    lm: FrozenLM, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    fake.window = 60
    engine = connected(lm, fake)
    taken = 4 + len(skills["static"].input_ids([TEXTS[2]])[0])
    (found,) = ask(engine, skills["static"], TEXTS[2], max_new_tokens=100).completions
    assert len(found.token_ids) == 60 - taken
    assert found.finish == "length"
    error = ask(engine, skills["static"], TEXTS[3], max_new_tokens=5).error
    assert isinstance(error, WindowError)
    assert "window has 60" in str(error)
    assert engine.close(10)


# -- what is sent ------------------------------------------------------------------------


def test_what_cannot_be_read_is_not_sent(lm: FrozenLM) -> None:
    vectors = torch.zeros(1, 2, 32)
    with pytest.raises(ShouldersError, match="not finite"):
        encoded(lm, Prompt.of_vectors(vectors + float("nan")), [1], 50)
    shape = lm.prefix_shape
    keys_values = torch.zeros(1, shape.layers, 2, shape.kv_heads, 3, shape.head_dim)
    with pytest.raises(ShouldersError, match="not finite"):
        encoded(lm, Prompt.of_keys_values(keys_values + float("inf")), [1], 50)
    with pytest.raises(ShouldersError, match="16 dimensions"):
        encoded(lm, Prompt.of_vectors(vectors[..., :16]), [1], 50)
    with pytest.raises(WindowError, match="no tokens"):
        encoded(lm, Prompt.of_vectors(vectors), [], 50)
    with pytest.raises(WindowError, match="takes 5 positions"):
        encoded(lm, Prompt.of_vectors(vectors), [1, 2, 3], 5)
    assert encoded(lm, Prompt.of_vectors(vectors), [1, 2, 3], 6).positions == 5


def test_prefixes_do_not_share_a_cache(lm: FrozenLM) -> None:
    shape = lm.prefix_shape
    size = (1, shape.layers, 2, shape.kv_heads, 3, shape.head_dim)
    one, other = (Prompt.of_keys_values(torch.full(size, value)) for value in (0.0, 1.0))
    salts = [encoded(lm, p, [1], 50).fields["cache_salt"] for p in (one, one, other)]
    assert salts[0] == salts[1] != salts[2]


# -- what goes wrong ---------------------------------------------------------------------


def test_cancelling_closes_the_stream(
    engine: Engine, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    fake.pause = 0.05
    job, answers = begun(engine, skills["static"], TEXTS[0], max_new_tokens=100, min_new_tokens=100)
    while not answers.events:
        time.sleep(0.01)
    job.cancelled.set()
    assert answers.over.wait(5)
    assert fake.closed.wait(5), "vLLM goes on for nobody"
    assert engine.running == 0


def test_what_has_ended_is_not_ended_again(
    lm: FrozenLM, fake: FakeVllm, skills: dict[str, Skill], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that is gone as soon as it has its answer: the stream's end may come later."""
    entries: list[Entry] = []
    give = VllmEngine.give
    monkeypatch.setattr(
        VllmEngine, "give", lambda self, entry: (entries.append(entry), give(self, entry))[1]
    )
    engine = connected(lm, fake)
    answers = ask(engine, skills["static"], TEXTS[0], max_new_tokens=4)
    entries[0].done(ShouldersError("cancelled"))
    assert engine.close(5), "it counts jobs that are none"
    assert answers.error is None


def test_a_deadline_closes_the_stream(
    engine: Engine, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    fake.pause = 0.05
    deadline = time.monotonic() + 0.5
    _, answers = begun(engine, skills["static"], TEXTS[0], deadline, max_new_tokens=100)
    assert answers.over.wait(5)
    assert "cancelled" in str(answers.error)
    assert fake.closed.wait(5)


def test_whoever_waits_when_the_server_stops_is_told(
    lm: FrozenLM, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    engine = connected(lm, fake)
    fake.pause = 0.2
    _, answers = begun(engine, skills["static"], TEXTS[0], max_new_tokens=100)
    while not answers.events:
        time.sleep(0.01)
    assert not engine.close(0.1)
    assert answers.over.wait(5)
    assert "the server stops" in str(answers.error)


@pytest.mark.parametrize(
    ("status", "kind"), [(400, UpstreamError), (500, UpstreamError), (503, UpstreamDownError)]
)
def test_refusals_do_not_leak(
    engine: Engine, fake: FakeVllm, skills: dict[str, Skill], status: int, kind: type[Exception]
) -> None:
    fake.status = status
    error = ask(engine, skills["static"], "two").error
    assert type(error) is kind
    assert "secret" not in str(error)


def test_a_broken_stream_is_an_error(
    engine: Engine, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    fake.broken = 2
    error = ask(engine, skills["static"], TEXTS[0], max_new_tokens=20).error
    assert isinstance(error, UpstreamError)
    assert "broke off" in str(error)


def test_silence_is_an_error(lm: FrozenLM, fake: FakeVllm, skills: dict[str, Skill]) -> None:
    engine = connected(lm, fake, silence=1.0)
    fake.pause = 2
    error = ask(engine, skills["static"], TEXTS[0], max_new_tokens=20).error
    assert isinstance(error, UpstreamSlowError)
    assert engine.close(10)


def test_a_server_that_goes_away(lm: FrozenLM, fake: FakeVllm, skills: dict[str, Skill]) -> None:
    """Through the API: 503 and the reason, also for those who ask whether it is ready."""
    engine = connected(lm, fake)
    served = SkillSet(lm)
    served._served["static"] = Served("static", skills["static"], Path("x"), 0)
    client = TestClient(create_app(Server(served, engine, Metrics(engine))))
    body = {"model": "static", "prompt": "two", "temperature": 0, "max_tokens": 4}
    reply = client.post("/v1/completions", json=body)
    (alone,) = skills["static"].generate(["two"], DecodingConfig(max_new_tokens=4))[0]
    assert reply.json()["choices"][0]["text"] == alone.text
    assert "shoulders_decoded_tokens 4" in client.get("/metrics").text.replace(".0", "")
    fake.status = 500
    refused = client.post("/v1/completions", json=body)
    assert (refused.status_code, "secret" in refused.text) == (502, False)
    fake.close()
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 503
    assert reply.headers["Retry-After"]
    assert "cannot be reached" in reply.json()["error"]["message"]
    stream = client.post("/v1/completions", json={**body, "stream": True}).text
    assert json.loads(stream.removeprefix("data: "))["error"]["code"] == 503
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200
    assert engine.close(10)


# -- at the start ------------------------------------------------------------------------


def test_another_lm_is_refused(folder: Path, lm: FrozenLM) -> None:
    other = FakeVllm(load_lm(str(save_tiny_lm(folder / "other", seed=1)), dtype="float32"))
    with pytest.raises(ShouldersError, match=r"another LM than .*log-probabilities differ"):
        connected(lm, other)
    other.close()


def test_another_tokenizer_is_refused(folder: Path, lm: FrozenLM) -> None:
    path = save_tiny_lm(folder / "tokens", tokenizer_extra="water boils at one hundred " * 9)
    other = FakeVllm(load_lm(str(path), dtype="float32"))
    with pytest.raises(ShouldersError, match="its tokens are others"):
        connected(lm, other)
    other.close()


def test_a_server_without_embeddings_is_refused(lm: FrozenLM, fake: FakeVllm) -> None:
    fake.embeds = False
    with pytest.raises(ShouldersError, match="--enable-prompt-embeds"):
        connected(lm, fake)


def test_no_server_is_an_error(lm: FrozenLM, fake: FakeVllm) -> None:
    fake.close()
    with pytest.raises(UpstreamDownError, match="cannot be reached"):
        connected(lm, fake)


def test_its_key_is_brought(lm: FrozenLM, fake: FakeVllm) -> None:
    fake.key = "a key"
    with pytest.raises(UpstreamError, match="--vllm-api-key-file"):
        connected(lm, fake)
    assert connected(lm, fake, api_key="a key").close(10)
    fake.key = "schlüssel".encode().decode("latin-1")  # as headers are read
    assert connected(lm, fake, api_key="schlüssel").close(10)


# -- the command -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vllm"], "need each other"),
        (["--vllm-url", "http://127.0.0.1:1"], "need each other"),
        (["--engine", "vllm", "--vllm-url", "http://x", "--dtype", "int8"], "no int8"),
    ],
)
def test_options_that_do_not_fit(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", *options])
    assert isinstance(result.exception, ShouldersError)
    assert message in str(result.exception)


@pytest.fixture
def saved(folder: Path, skills: dict[str, Skill]) -> Path:
    if not (folder / "idpt").is_dir():
        save_skill(skills["idpt"], folder / "idpt", Templates(), {})
    return folder / "idpt"


def test_rows_are_answered_and_scored_through_vllm(
    folder: Path, fake: FakeVllm, skills: dict[str, Skill], saved: Path, tmp_path: Path
) -> None:
    """`generate` and `eval` ask the engine that `serve` asks."""
    texts = [text.strip() for text in TEXTS]
    rows = [{"task": "t", "input": text, "targets": ["x"]} for text in texts]
    data, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    decoding = DecodingConfig(max_new_tokens=7)
    expected = [several[0].text for several in skills["idpt"].generate(texts, decoding)]
    common = ["--lm", str(folder / "lm"), "--vllm-url", fake.url, "--max-new-tokens", "7"]
    given = ["generate", "--skill", str(saved), "--input", str(data), "--output", str(output)]
    result = CliRunner().invoke(app, [*given, *common])
    assert result.exit_code == 0, result.output
    found = [json.loads(line)["outputs"][0]["text"] for line in output.read_text().splitlines()]
    assert found == expected
    assert len(fake.requests) >= len(TEXTS), "vLLM was asked"
    dump = tmp_path / "dump.jsonl"
    given = ["eval", str(saved), "--data", str(data), "--dump", str(dump)]
    result = CliRunner().invoke(app, [*given, *common])
    assert result.exit_code == 0, result.output
    said = [json.loads(line)["prediction"] for line in dump.read_text().splitlines()]
    assert said == [first_line(text) for text in expected]


def test_what_goes_to_no_vllm_is_refused(saved: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"task": "t", "input": "a", "targets": ["x"]}\n')
    for options, message in (
        (["eval", str(saved), "--data", str(data), "--recurse-below", "0.5"], "are asked here"),
        (["generate", "--text", "a", "--recurse-below", "0.5"], "leave out one"),
        (["eval", str(saved), "--data", str(data), "--dtype", "int8"], "serves no int8"),
    ):
        result = CliRunner().invoke(app, [*options, "--vllm-url", "http://127.0.0.1:9"])
        assert message in str(result.exception), options


def test_a_clients_base_url_will_do(lm: FrozenLM, fake: FakeVllm) -> None:
    assert UpstreamConfig(url=f"{fake.url}/v1/").url == fake.url
    engine = VllmEngine(lm, UpstreamConfig(url=f"{fake.url}/v1"))
    assert engine.healthy()
    engine.close()


def test_an_address_that_is_none(folder: Path, lm: FrozenLM) -> None:
    asked = ["serve", "--lm", str(folder / "lm"), "--engine", "vllm", "--vllm-url", "host:80"]
    result = CliRunner().invoke(app, asked)
    assert "use http://HOST:PORT" in str(result.exception)


@pytest.mark.slow  # starts a server
def test_the_command_serves_through_vllm(
    folder: Path, fake: FakeVllm, skills: dict[str, Skill]
) -> None:
    save_skill(skills["idpt"], folder / "saved", Templates(), {})
    (folder / "key").write_text("a key")
    fake.key = "a key"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "shoulders", "serve", "--port", str(port), "--engine", "vllm"]
    command += ["--skills", f"one={folder / 'saved'}", "--vllm-url", fake.url]
    command += ["--vllm-api-key-file", str(folder / "key")]
    process = subprocess.Popen(
        command, env=environment(folder / "cache"), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = ""
        while "serving" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "keys/values too" in said
        body = {"model": "one", "prompt": TEXTS[0], "temperature": 0, "max_tokens": 6}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        for _ in range(100):
            try:
                with urllib.request.urlopen(request, timeout=30) as reply:
                    text = json.loads(reply.read())["choices"][0]["text"]
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        (alone,) = skills["idpt"].generate([TEXTS[0]], DecodingConfig(max_new_tokens=6))[0]
        assert text == alone.text
        assert "prompt_embeds" in fake.requests[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
