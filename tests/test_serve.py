"""The server through OpenAI's own client and plain HTTP: one process, skills of several kinds."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI

from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.skills.artefact import save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from tiny_models import environment, save_tiny_encoder, save_tiny_lm

pytestmark = pytest.mark.slow  # starts several servers

KEY = "a secret"
TEXT = "write the number three as a word"
LINK = {"heads": 2, "skip": False}
TEMPLATE = (
    "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|end|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    save_tiny_lm(folder / "lm")
    (folder / "lm" / "chat_template.jinja").write_text(TEMPLATE)
    save_tiny_encoder(folder / "encoder")
    (folder / "key").write_text(KEY + "\n")
    return folder


@pytest.fixture(scope="module")
def lm(folder: Path) -> FrozenLM:
    found: FrozenLM = load_lm(str(folder / "lm"), dtype="float32")
    return found


@pytest.fixture(scope="module")
def skills(folder: Path, lm: FrozenLM) -> Iterator[dict[str, Skill]]:
    patch = pytest.MonkeyPatch()
    patch.setenv("SHOULDERS_CACHE", str(folder / "cache"))
    generator = {"encoder": str(folder / "encoder"), "width": 16, "heads": 2, "layers": 1}
    static = {"kind": "static", "length": 4}
    chains: dict[str, list[dict[str, Any]]] = {
        "static": [{"prompt": static}],
        "idpt_kv": [{"prompt": {"kind": "idpt_kv", "length": 2, "generator": generator}}],
        "neural": [{"link": LINK}, {"prompt": static}],
        "textual": [
            {"prompt": static, "propose": {"n": 2, "max_new_tokens": 4}},
            {"prompt": static},
        ],
    }
    random = torch.Generator().manual_seed(0)
    found = {}
    for name, passes in chains.items():
        config = SkillConfig.model_validate({"passes": passes})
        found[name] = Skill.create(lm, config, load_encoder, random)
        save_skill(found[name], folder / "skills" / name, Templates(), {})
    save_skill(found["static"], folder / "root" / "later", Templates(), {})
    yield found
    patch.undo()


class Started:
    """A server process, and where it listens."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "shoulders", "serve", "--port", "0", *options]
        self.log = tempfile.NamedTemporaryFile("w+", dir=folder, suffix=".txt")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, env=environment(folder / "cache"), stdout=self.log, stderr=self.log
        )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"on\s+(http://127\.0\.0\.1:(\d+))/v1", self.text()):
                self.url, self.port = found[1], int(found[2])
                self.get("/ready")
                return
            time.sleep(0.1)
        raise AssertionError(self.text())

    def text(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def get(self, path: str, key: str | None = KEY, body: Any = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as reply:
            content = reply.read().decode()
        return json.loads(content) if content.startswith(("{", "[")) else content

    def refused(self, path: str, key: str | None = KEY, body: Any = None) -> tuple[int, str]:
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.get(path, key, body)
        return caught.value.code, json.loads(caught.value.read())["error"]["message"]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@pytest.fixture(scope="module")
def server(folder: Path, skills: dict[str, Skill]) -> Iterator[Started]:
    options = [part for name in skills for part in ("--skills", str(folder / "skills" / name))]
    started = Started(
        folder, *options, "--api-key-file", str(folder / "key"),
        "--skill-root", str(folder / "root"), "--max-queue", "40",
    )  # fmt: skip
    yield started
    started.process.kill()


@pytest.fixture(scope="module")
def client(server: Started) -> OpenAI:
    return OpenAI(base_url=server.url + "/v1", api_key=KEY, max_retries=0)


def alone(skill: Skill, text: str = TEXT, **decoding: Any) -> str:
    answer: str = skill.generate([text], DecodingConfig(**decoding))[0][0].text
    return answer


# -- what the client sees ----------------------------------------------------------------


def test_models(client: OpenAI, skills: dict[str, Skill]) -> None:
    assert [m.id for m in client.models.list()] == ["lm", *skills]
    assert client.models.retrieve("neural").id == "neural"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


@pytest.mark.parametrize("name", ["static", "idpt_kv", "neural", "textual"])
def test_completions_are_the_skills_own(
    client: OpenAI, skills: dict[str, Skill], name: str
) -> None:
    found = client.completions.create(model=name, prompt=TEXT, max_tokens=9, temperature=0)
    assert found.choices[0].text == alone(skills[name], max_new_tokens=9)
    assert found.usage is not None
    assert found.usage.completion_tokens == 9 or found.choices[0].finish_reason == "stop"
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    pieces = list(
        client.completions.create(
            model=name, prompt=TEXT, max_tokens=9, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert "".join(p.choices[0].text for p in pieces if p.choices) == found.choices[0].text
    assert pieces[-1].usage == found.usage


def test_several_prompts_and_samples(client: OpenAI, skills: dict[str, Skill]) -> None:
    found = client.completions.create(
        model="static", prompt=[TEXT, "two"], n=2, seed=7, temperature=1.2, max_tokens=6
    )
    decoding = {"n": 2, "seed": 7, "temperature": 1.2, "max_new_tokens": 6}
    wanted = skills["static"].generate([TEXT, "two"], DecodingConfig(**decoding))
    assert [c.text for c in found.choices] == [c.text for own in wanted for c in own]
    assert [c.index for c in found.choices] == [0, 1, 2, 3]


def test_stop_and_logprobs(client: OpenAI, skills: dict[str, Skill]) -> None:
    whole = alone(skills["static"], max_new_tokens=12)
    stop = whole[4:6]
    found = client.completions.create(
        model="static", prompt=TEXT, max_tokens=12, temperature=0, stop=stop, logprobs=2
    ).choices[0]
    assert found.text == whole[: whole.find(stop)]
    assert found.finish_reason == "stop"
    assert found.logprobs is not None
    assert found.logprobs.token_logprobs is not None
    assert all(value <= 0 for value in found.logprobs.token_logprobs if value is not None)


def test_a_stop_string_is_not_found_in_what_stands_before_an_answer(
    client: OpenAI, skills: dict[str, Skill]
) -> None:
    whole = alone(skills["static"], max_new_tokens=12)
    asked: dict[str, Any] = {"model": "static", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
    wanted = whole.partition(" ")[0]
    assert wanted
    assert client.completions.create(**asked, stop=" ").choices[0].text == wanted
    pieces = client.completions.create(**asked, stop=" ", stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == wanted
    assert alone(skills["static"], max_new_tokens=12, stop=(" ",)) == wanted


def test_chat_reads_the_lms_template_once(client: OpenAI, lm: FrozenLM) -> None:
    messages: Any = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "the capital <|end|> of france"},
    ]
    found = client.chat.completions.create(
        model="lm", messages=messages, temperature=0, max_tokens=8, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    ids = [0, *lm.tokenize(["system: be short\n"])[0], 0, *lm.tokenize(["user: "])[0]]
    ids += [*lm.tokenize([messages[1]["content"]])[0], *lm.tokenize(["\n"])[0], 0]
    ids += lm.tokenize(["assistant: "])[0]
    from shoulders.lm.decode import generate
    from shoulders.lm.prompt import Prompt

    (wanted,) = generate(lm, Prompt.empty(1), [ids], DecodingConfig(max_new_tokens=8))[0]
    assert found.choices[0].message.content == wanted.text
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(ids)
    assert found.choices[0].logprobs is not None
    assert found.choices[0].logprobs.content is not None
    assert len(found.choices[0].logprobs.content) == found.usage.completion_tokens


def test_chat_with_a_skill_is_its_input(client: OpenAI, skills: dict[str, Skill]) -> None:
    messages: Any = [{"role": "user", "content": TEXT}]
    found = client.chat.completions.create(
        model="idpt_kv", messages=messages, temperature=0, max_tokens=8
    )
    assert found.choices[0].message.content == alone(skills["idpt_kv"], max_new_tokens=8)
    stream = client.chat.completions.create(
        model="idpt_kv", messages=messages, temperature=0, max_tokens=8, stream=True
    )
    pieces = [p.choices[0].delta.content or "" for p in stream]
    assert "".join(pieces) == found.choices[0].message.content


def test_what_was_proposed_can_be_looked_at(server: Started) -> None:
    body = {"model": "textual", "prompt": TEXT, "temperature": 0, "details": True}
    (details,) = server.get("/v1/completions", body=body)["details"]
    assert sum(c["count"] for c in details["candidates"]) == 2


def test_greedy_answers_do_not_depend_on_the_load(
    server: Started, client: OpenAI, skills: dict[str, Skill]
) -> None:
    wanted = {n: alone(s, f"{TEXT} {n}", max_new_tokens=12) for n, s in skills.items()}
    found: list[tuple[str, str]] = []

    def ask(name: str) -> None:
        reply = client.completions.create(
            model=name, prompt=f"{TEXT} {name}", max_tokens=12, temperature=0
        )
        found.append((name, reply.choices[0].text))

    threads = [threading.Thread(target=ask, args=(name,)) for name in list(skills) * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert all(text == wanted[name] for name, text in found)
    text = server.get("/metrics")
    assert 'shoulders_requests_total{skill="neural",status="200"}' in text
    fill = next(ln for ln in text.splitlines() if ln.startswith("shoulders_batch_fill "))
    assert float(fill.split()[1]) > 1


# -- who may, and what may not be --------------------------------------------------------


def test_a_key_is_needed(server: Started) -> None:
    assert server.get("/health", key=None) == {"status": "ok"}
    for key in (None, "a secre", "a secret2", "ä"):
        code, message = server.refused("/v1/models", key=key and key.encode().decode("latin-1"))
        assert code == 401
        assert KEY not in message


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "nobody"}, 404, "not served"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"max_tokens": 50_000}, 400, "32768"),
    ({"n": 0}, 400, "greater than or equal to 1"),
    ({"n": 1000}, 400, "32"),
    ({"temperature": -1}, 400, "temperature"),
    ({"echo": True}, 400, "echo"),
    ({"prompt": "word " * 400}, 400, "tokens"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
]


@pytest.mark.parametrize(("change", "code", "message"), BAD)
def test_bad_requests_are_told_why(
    server: Started, folder: Path, change: dict[str, Any], code: int, message: str
) -> None:
    body = {"model": "static", "prompt": TEXT, **change}
    found, said = server.refused("/v1/completions", body=body)
    assert found == code
    assert message in said
    assert str(folder) not in said
    assert server.refused("/v1/completions", body={**body, "stream": True})[0] == code


def test_malformed_bodies(server: Started) -> None:
    assert server.refused("/v1/completions", body=b"{")[0] == 400
    assert server.refused("/v1/completions", body=b"\xff\xfe")[0] == 400


@pytest.mark.parametrize("megabytes", [2, 12])
def test_a_body_too_large_is_refused_with_its_reason(server: Started, megabytes: int) -> None:
    # read to its end: a client that is still sending would see a broken pipe otherwise
    for _ in range(5):
        code, message = server.refused("/v1/completions", body=b" " * (megabytes << 20))
        assert (code, "1048576 bytes" in message) == (413, True)


def test_a_body_that_never_comes_is_answered_all_the_same(server: Started) -> None:
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {8 << 20}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(100)


def test_a_body_of_unknown_length_is_refused(server: Started) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head.encode())
        assert b" 411 " in connection.recv(100)


def test_a_stream_is_refused_with_its_own_status(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model="static", prompt="word " * 400, stream=True)


def test_a_deadline(server: Started) -> None:
    body = {"model": "static", "prompt": TEXT, "max_tokens": 100, "timeout": 0.000001}
    code, message = server.refused("/v1/completions", body=body)
    assert (code, "not answered within" in message) == (504, True)


def test_skills_come_and_go(server: Started, skills: dict[str, Skill], folder: Path) -> None:
    load = {"name": "new", "path": "later"}
    outside = ("../skills/static", "/etc", "", "nothing", "later/../../skills/neural")
    for path in (*outside, "a\0b", "a" * 400, "\ud800"):
        code, message = server.refused("/v1/load_adapter", body={"name": "x", "path": path})
        assert code == 400
        assert str(folder) not in message
    assert server.get("/v1/load_adapter", body=load)["id"] == "new"
    assert server.refused("/v1/load_adapter", body=load)[0] == 400
    body = {"model": "new", "prompt": TEXT, "max_tokens": 5, "temperature": 0}
    text = server.get("/v1/completions", body=body)["choices"][0]["text"]
    assert text == alone(skills["static"], max_new_tokens=5)
    assert server.get("/v1/unload_adapter", body={"name": "new"})["status"] == "unloaded"
    assert server.refused("/v1/completions", body=body)[0] == 404
    assert server.refused("/v1/unload_adapter", body={"name": "new"})[0] == 404


def test_a_full_queue_asks_to_come_again(server: Started) -> None:
    codes: list[int] = []
    waits: list[str | None] = []

    def ask() -> None:
        body = {"model": "static", "prompt": [TEXT] * 4, "max_tokens": 100, "temperature": 0}
        try:
            server.get("/v1/completions", body=body)
            codes.append(200)
        except urllib.error.HTTPError as error:
            codes.append(error.code)
            waits.append(error.headers["Retry-After"])

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) == {200, 429}
    assert all(wait is not None for wait in waits)
    assert server.get("/v1/models")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(server: Started, stream: bool) -> None:
    body = json.dumps({"model": "static", "prompt": TEXT, "max_tokens": 140, "n": 30,
                       "stream": stream, "temperature": 1.9}).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        if stream:
            connection.recv(100)
        else:
            running = time.monotonic() + 10
            while "shoulders_running_rows 0.0" in server.get("/metrics"):
                assert time.monotonic() < running
    deadline = time.monotonic() + 10
    while "shoulders_running_rows 0.0" not in (found := server.get("/metrics")):
        state = [line for line in found.splitlines() if line.startswith("shoulders_")]
        assert time.monotonic() < deadline, "\n".join([*state, server.text()[-4000:]])
        time.sleep(0.1)


# -- starting and stopping ---------------------------------------------------------------


def test_a_watched_folder_and_a_graceful_end(folder: Path, skills: dict[str, Skill]) -> None:
    root = folder / "watched"
    root.mkdir()
    started = Started(folder, "--skill-root", str(root), "--watch", "--lm", str(folder / "lm"),
                      "--dtype", "float32")  # fmt: skip
    try:
        (root / "bad").mkdir()
        (root / "bad" / "skill.json").write_text("{")
        (folder / "skills" / "idpt_kv").rename(root / "idpt_kv")
        body = {"model": "idpt_kv", "prompt": TEXT, "max_tokens": 6, "temperature": 0}
        deadline = time.monotonic() + 20
        while "idpt_kv" not in str(started.get("/v1/models")) and time.monotonic() < deadline:
            time.sleep(0.1)
        text = started.get("/v1/completions", body=body)["choices"][0]["text"]
        assert text == alone(skills["idpt_kv"], max_new_tokens=6)
        (root / "idpt_kv").rename(folder / "skills" / "idpt_kv")
        while "idpt_kv" in str(started.get("/v1/models")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "idpt_kv" not in str(started.get("/v1/models"))
        # What is running when it is told to stop is finished.
        answers: list[Any] = []
        long = {"model": "lm", "prompt": TEXT, "max_tokens": 140, "n": 30}
        thread = threading.Thread(
            target=lambda: answers.append(started.get("/v1/completions", body=long))
        )
        thread.start()
        while "\nshoulders_running_rows 0.0" in started.get("/metrics") and thread.is_alive():
            time.sleep(0.001)
        assert thread.is_alive()
        assert started.stop() == 0, started.text()
        thread.join()
        assert len(answers[0]["choices"]) == 30
        assert '"refused"' in started.text()
    finally:
        started.process.kill()


def test_a_killed_server_leaves_nothing_behind(folder: Path, skills: dict[str, Skill]) -> None:
    options = ["--skills", f"mine={folder / 'skills' / 'static'}"]
    first = Started(folder, *options)
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    second = Started(folder, *options)
    body = {"model": "mine", "prompt": TEXT, "max_tokens": 4, "temperature": 0}
    reply = second.get("/v1/completions", body=body)
    assert reply["choices"][0]["text"] == alone(skills["static"], max_new_tokens=4)
    assert second.refused("/v1/load_adapter", body={"name": "x", "path": "y"})[0] == 403
    second.process.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--skills", "no/such/folder"], "no such skill folder"),
        (["--api-key-file", "no/such/file"], "holds no key"),
        (["--watch"], "needs --skill-root"),
        (["--skill-root", "no/such/folder"], "no such folder"),
        (["--port", "0", "--quantize", "int3"], "--quantize int3: use one of int8, nf4, none"),
        (["--port", "0", "--device-map", "cpu"], "--device-map cpu: use auto"),
        (
            ["--engine", "vllm", "--vllm-url", "http://127.0.0.1:1", "--dtype", "int8"],
            "vLLM serves no int8",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "shoulders", "serve", *options]
    done = subprocess.run(
        command, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_two_thousand_generated_requests(server: Started) -> None:
    """Whatever the description allows, and what it does not: no 5xx, no hang, and it still answers.

    504 is an answer: generated requests ask for deadlines of microseconds.
    """
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json",
        "--header", f"Authorization: Bearer {KEY}", "--phases", "fuzzing",
        "--max-examples", "600", "--checks", "not_a_server_error", "--request-timeout", "60",
        "--seed", "1", "--no-color", "--suppress-health-check", "all",
    ]  # fmt: skip
    before = server.text().count('"request"')
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    lines = [json.loads(ln) for ln in server.text().splitlines() if ln.startswith('{"request"')]
    codes = {line["status"] for line in lines[before:]}
    assert not {c for c in codes if c >= 500} - {504}, done.stdout[-3000:]
    assert len(lines) - before >= 2000
    assert done.returncode == 0 or 504 in codes, done.stdout[-3000:]
    assert "Network Error" not in done.stdout, done.stdout[-3000:]
    assert server.get("/ready")["status"] == "ready"
