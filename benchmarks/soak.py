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
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.files import write_json
from shoulders.lm.load import load_lm
from shoulders.skills.artefact import save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.run import machine

ROOT = Path(__file__).parents[1]
KEY = "soak"
QUEUE = 24  # requests that the server takes at once
BURST = 3 * QUEUE
BURST_EVERY = 15.0  # seconds
SAMPLE_EVERY = 2.0
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


class Asked(NamedTuple):
    """A request that has one right answer."""

    skill: str
    text: str
    tokens: int
    chat: bool

    def body(self, name: str, *, stream: bool) -> dict[str, Any]:
        """Return it as JSON, asked of a skill by a name."""
        own: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": self.tokens}
        own |= {"messages": [{"role": "user", "content": self.text}]} if self.chat else {
            "prompt": self.text
        }  # fmt: skip
        return own | ({"stream": True} if stream else {})

    @property
    def path(self) -> str:
        """Where it is asked."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"


class Server:
    """A server process on loopback."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / f"log-{self.port}.txt"
        command = [sys.executable, "-m", "shoulders", "serve", "--port", str(self.port),
                   "--dtype", "int8", "--max-queue", str(QUEUE), "--skill-root",
                   str(folder / "root"), "--api-key-file", str(folder / "key")]  # fmt: skip
        for name in SKILLS:
            command += ["--skills", str(folder / "root" / name)]
        started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        while True:
            try:
                self.ask("GET", "/ready", None, 5)
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > started + 180:
                    raise SystemExit(self.log.read_text()[-3000:]) from None
                time.sleep(0.2)
        self.seconds_to_ready = time.monotonic() - started

    @contextmanager
    def open(
        self, method: str, path: str, body: Any, timeout: float
    ) -> Iterator[tuple[http.client.HTTPConnection, http.client.HTTPResponse]]:
        """Send a request and yield the reply, unread; leaving hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        try:
            connection.request(method, path, body and json.dumps(body), headers)
            yield connection, connection.getresponse()
        finally:
            connection.close()

    def ask(
        self, method: str, path: str, body: Any = None, timeout: float = 180
    ) -> tuple[int, str, str | None]:
        """Return a reply's status, text and `Retry-After`."""
        with self.open(method, path, body, timeout) as (_, reply):
            return reply.status, reply.read().decode(), reply.headers.get("Retry-After")

    def megabytes(self) -> float:
        """Return its resident memory."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise OSError("the server has gone")

    def jobs(self) -> int:
        """Return how many requests the engine still works at."""
        lines = self.ask("GET", "/metrics")[1].splitlines()
        return int(float(next(ln for ln in lines if ln.startswith("shoulders_jobs ")).split()[1]))


class Tally:
    """What was seen, from all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    def saw(self, what: str) -> None:
        """Count something."""
        with self._lock:
            self.counts[what] += 1

    def wrong(self, what: str, told: str) -> None:
        """Note a failure of the server."""
        with self._lock:
            self.counts[what] += 1
            if len(self.problems) < 20:
                self.problems.append(f"{what}: {told}"[:500])


class Soak:
    """Clients of a server, until a time is over.

    Args:
        server: what is asked.
        answers: what is right.
        seconds: how long.
        seed: of what is asked when.
    """

    def __init__(
        self, server: Server, answers: dict[Asked, str], seconds: float, seed: int
    ) -> None:
        self.server, self.answers, self.tally = server, answers, Tally()
        self._asked = list(answers)
        self._seed, self._until = seed, time.monotonic() + seconds
        self.memory: list[tuple[float, float]] = []

    def run(self, clients: int) -> None:
        """Let all of them run to the end."""
        roles = [(self._client, random.Random(self._seed * 1000 + i)) for i in range(clients)]
        roles += [(self._bursts, random.Random(self._seed * 1000 + 900))]
        roles += [(self._guests, random.Random(self._seed * 1000 + 901))]
        threads = [threading.Thread(target=role, args=(own,)) for role, own in roles]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while any(thread.is_alive() for thread in threads):
            if self.server.process.poll() is not None:
                raise SystemExit("the server has died: " + self.server.log.read_text()[-3000:])
            self.memory.append((time.monotonic() - began, self.server.megabytes()))
            time.sleep(SAMPLE_EVERY)

    @property
    def _over(self) -> bool:
        return time.monotonic() > self._until

    def _client(self, own: random.Random) -> None:
        ways: list[tuple[Callable[[random.Random], None], int]] = [
            (lambda r: self._whole(r.choice(self._asked)), 40),
            (lambda r: self._stream(r.choice(self._asked), None), 25),
            (lambda r: self._stream(r.choice(self._asked), r.randrange(6)), 18),
            (self._hangs_up, 10),
            (self._too_long, 7),
        ]
        while not self._over:
            (way,) = own.choices([w for w, _ in ways], [n for _, n in ways])
            self._guarded(way, own)

    def _guarded(self, way: Callable[[random.Random], None], own: random.Random) -> None:
        try:
            way(own)
        except OSError as error:  # no answer: the connection broke, or nothing came in time
            self.tally.wrong("lost", f"{type(error).__name__}: {error}")

    def _whole(self, asked: Asked, name: str | None = None) -> None:
        """Ask for a whole answer, which must be right; a guest may have gone."""
        body = asked.body(name or asked.skill, stream=False)
        status, text, retry = self.server.ask("POST", asked.path, body)
        if self._answered(status, text, retry, gone=name is not None):
            choice = json.loads(text)["choices"][0]
            self._check(asked, choice["message"]["content"] if asked.chat else choice["text"])

    def _stream(self, asked: Asked, most: int | None) -> None:
        """Read a stream; hang up after `most` events, or read all of it."""
        body = asked.body(asked.skill, stream=True)
        with self.server.open("POST", asked.path, body, 180) as (_, reply):
            if reply.status != 200:
                text = reply.read().decode()
                self._answered(reply.status, text, reply.headers.get("Retry-After"))
                return
            said, events = "", 0
            for line in reply:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    self.tally.saw("200 stream")
                    self._check(asked, said)
                    return
                event = json.loads(line[6:])
                if "error" in event:
                    self.tally.wrong("error in a stream", str(event))
                    return
                for choice in event["choices"]:
                    said += choice["delta"].get("content", "") if asked.chat else choice["text"]
                events += 1
                if most is not None and events > most:
                    self.tally.saw("hung up in a stream")
                    return
            self.tally.wrong("lost", f"a stream of {asked.skill} ended without [DONE]")

    def _hangs_up(self, own: random.Random) -> None:
        """Ask for a whole answer and be gone before it can be there."""
        asked = own.choice(self._asked)
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=60)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        body = json.dumps(asked.body(asked.skill, stream=own.random() < 0.5))
        connection.request("POST", asked.path, body, headers)
        time.sleep(own.random() * 0.3)
        connection.close()
        self.tally.saw("hung up before an answer")

    def _too_long(self, own: random.Random) -> None:
        """Ask what no window holds: refused, in words."""
        asked = own.choice(self._asked)._replace(text="word " * 12_000)
        body = asked.body(asked.skill, stream=False)
        status, text, retry = self.server.ask("POST", asked.path, body)
        if status == 400 and "window" in text:
            self.tally.saw("400 too long")
        elif status == 429:
            self._answered(status, text, retry)
        else:
            self.tally.wrong("too long", f"{status} {text}")

    def _bursts(self, own: random.Random) -> None:
        """Ask far more at one moment than the queue holds."""
        while not self._over:
            several = [
                threading.Thread(
                    target=self._guarded,
                    args=(lambda _, one=asked: self._whole(one), own),
                )
                for asked in own.choices(self._asked, k=BURST)
            ]
            for thread in several:
                thread.start()
            for thread in several:
                thread.join()
            self.tally.saw("bursts")
            time.sleep(max(0.0, min(BURST_EVERY, self._until - time.monotonic())))

    def _guests(self, own: random.Random) -> None:
        """Have guests, one after the other."""
        while not self._over:
            self._guarded(self._guest, own)

    def _guest(self, own: random.Random) -> None:
        """Load a skill, ask it, and unload it while it is being asked."""
        skill, name = own.choice(GUESTS), f"guest-{own.randrange(3)}"
        self._managed("load", {"name": name, "path": skill})
        asked = [one for one in self._asked if one.skill == skill]
        several = [
            threading.Thread(
                target=self._guarded,
                args=(lambda _, one=one, name=name: self._whole(one, name), own),
            )
            for one in own.choices(asked, k=3)
        ]
        for thread in several:
            thread.start()
        time.sleep(own.random())
        self._managed("unload", {"name": name})
        for thread in several:
            thread.join()

    def _managed(self, verb: str, body: dict[str, Any]) -> None:
        status, text, _ = self.server.ask("POST", f"/v1/{verb}_adapter", body)
        self.tally.saw(f"{status} {verb}")
        if status != 200:
            self.tally.wrong(verb, f"{status} {text}")

    def _answered(self, status: int, text: str, retry: str | None, *, gone: bool = False) -> bool:
        """Count a reply; tell whether it is an answer."""
        self.tally.saw(str(status))
        if status == 429:
            if not retry:
                self.tally.wrong("no Retry-After", text)
            time.sleep(0.2)  # politer than told, so that the queue stays full
        elif status != 200 and not (gone and status == 404):
            self.tally.wrong("refused", f"{status} {text}")
        return status == 200

    def _check(self, asked: Asked, said: str) -> None:
        self.tally.saw("answers compared")
        if said != self.answers[asked]:
            owner = next((a.skill for a, text in self.answers.items() if text == said), "nobody")
            told = f"{asked}: {said!r}, alone {self.answers[asked]!r}; that of {owner}"
            self.tally.wrong("crossed or wrong", told)


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
        server = Server(folder)
        try:
            answers = alone(server)
            soak = Soak(server, answers, 60 * options.minutes, options.seed)
            soak.run(options.clients)
            jobs = drained(server)
            internal = server.log.read_text().count("Traceback")
        finally:
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
        again = Server(folder)
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
