"""The clients of a soaked server: patient ones, ones that hang up, bursts, managers of skills."""

from __future__ import annotations

import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

KEY = "soak"
QUEUE = 24  # requests that the server takes at once
BURST = 3 * QUEUE
BURST_EVERY = 15.0  # seconds
SAMPLE_EVERY = 2.0


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
    """A server process on loopback, with skills of `folder/root`."""

    def __init__(self, folder: Path, skills: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / f"log-{self.port}.txt"
        command = [sys.executable, "-m", "shoulders", "serve", "--port", str(self.port),
                   "--dtype", "int8", "--max-queue", str(QUEUE), "--skill-root",
                   str(folder / "root"), "--api-key-file", str(folder / "key")]  # fmt: skip
        for name in skills:
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
        guests: skills that are also loaded and unloaded under other names.
        seconds: how long.
        seed: of what is asked when.
    """

    def __init__(
        self,
        server: Server,
        answers: dict[Asked, str],
        guests: Sequence[str],
        seconds: float,
        seed: int,
    ) -> None:
        self.server, self.answers, self.tally = server, answers, Tally()
        self._asked, self._skills = list(answers), guests
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
        skill, name = own.choice(self._skills), f"guest-{own.randrange(3)}"
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
