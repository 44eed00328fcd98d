"""The engine: skills of every kind in one batch answer as they do alone."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from starlette.requests import ClientDisconnect
from starlette.types import Message
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.errors import ShouldersError, WindowError
from shoulders.lm.decode import Completion, DecodingConfig, Delta
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.reader.contexts import Contexts
from shoulders.serving import answers as answers_module
from shoulders.serving import worker as worker_module
from shoulders.serving.answers import Answering, Disconnected, TimedOutError
from shoulders.serving.api import Server, Streamed, create_app
from shoulders.serving.conversation import conversation
from shoulders.serving.engine import Engine, EngineConfig, QueueFullError
from shoulders.serving.guards import status_of
from shoulders.serving.job import Event, Job
from shoulders.serving.metrics import Metrics
from shoulders.serving.passes import LAST
from shoulders.serving.pool import Pool
from shoulders.serving.replies import completion_logprobs
from shoulders.serving.rows import Entry
from shoulders.serving.schema import ChatRequest
from shoulders.serving.skillset import Served, SkillSet
from shoulders.serving.tokens import token_bytes, token_name
from shoulders.serving.watch import Watcher
from shoulders.skills.artefact import FILE, save_skill
from shoulders.skills.attended import attended
from shoulders.skills.config import SkillConfig
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.ensemble_artefact import save_ensemble
from shoulders.skills.reader import Reader, ReadingConfig
from shoulders.skills.skill import Skill
from test_reader import PASSAGES, Likes, Listed
from tiny_models import save_tiny_encoder, save_tiny_lm

TEXTS = [
    "the capital of france",
    "two",
    "write the number three as a word please",
    "answer the question with a short answer please and write it as a word or a number " * 3,
]
KEY = "a secret"
OPEN = {"Authorization": f"Bearer {KEY}"}
JSON = {"Content-Type": "application/json"}
LINK = {"heads": 2, "skip": False}
PROPOSE = {"n": 3, "temperature": 1.5, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def lm(folder: Path) -> FrozenLM:
    found: FrozenLM = load_lm(str(save_tiny_lm(folder / "lm")), dtype="float32")
    return found


@pytest.fixture(scope="module")
def skills(folder: Path, lm: FrozenLM) -> Iterator[dict[str, Any]]:
    encoder = str(save_tiny_encoder(folder / "encoder"))
    patch = pytest.MonkeyPatch()
    patch.setenv("SHOULDERS_CACHE", str(folder / "cache"))
    generator = {"encoder": encoder, "width": 16, "heads": 2, "layers": 1}
    idpt = {"kind": "idpt", "length": 3, "generator": generator}
    idpt_kv = {"kind": "idpt_kv", "length": 2, "generator": generator}
    static = {"kind": "static", "length": 4}
    chains: dict[str, list[dict[str, Any]]] = {
        "base": [{}],
        "static": [{"prompt": static}],
        "idpt": [{"prompt": idpt}],
        "idspam": [{"prompt": {"kind": "idspam", "length": 3, "width": 8, "bottleneck": 4}}],
        "static_kv": [{"prompt": {"kind": "static_kv", "length": 3}}],
        "idpt_kv": [{"prompt": idpt_kv}],
        "static_lowrank": [{"prompt": {"kind": "static_lowrank", "length": 3, "rank": 2}}],
        "idpt_lowrank": [{"prompt": {**idpt_kv, "kind": "idpt_lowrank", "rank": 3}}],
        "static_lora": [{"prompt": {"kind": "static_lora", "length": 3, "rank": 2}}],
        "neural": [{"prompt": static, "link": LINK}, {"prompt": idpt_kv}],
        "three passes": [{"link": LINK}, {"link": "same"}, {"prompt": static}],
        "textual": [{"prompt": static, "propose": PROPOSE}, {"prompt": idpt}],
        "rounds": [
            {"prompt": static, "propose": {**PROPOSE, "rounds": 2, "subset": 2}},
            {"prompt": idpt},
        ],
        "majority": [{"propose": {**PROPOSE, "chooser": "majority"}}, {}],
    }
    random = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for name, passes in chains.items():
        config = SkillConfig.model_validate({"passes": passes})
        found[name] = skill = Skill.create(lm, config, load_encoder, random)
        for network in skill.networks():
            network.train(False)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    longer = found["static"].config.format.model_copy(update={"separator": "\nIn one word, then:"})
    spelled = found["static"].config.model_copy(update={"format": longer})
    others = [found["idpt_kv"], Skill(lm, spelled, found["static"].parts)]
    found["ensemble"] = Ensemble([found["static_lowrank"], *others])
    yield found
    patch.undo()


@pytest.fixture
def engine(lm: FrozenLM) -> Iterator[Engine]:
    engine = Engine(lm, EngineConfig(workers=2, max_rows=8))
    yield engine
    engine.close(30)


class Answers:
    """Collects the events of one job."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.wanted = 1

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


def ask(engine: Engine, skill: Skill | Ensemble, text: str, **decoding: Any) -> tuple[Job, Answers]:
    answers = Answers()
    answers.wanted = decoding.get("n", 1)
    job = Job("s", skill, text, DecodingConfig(**decoding), answers)
    engine.submit(job)
    return job, answers


def test_every_kind_under_load_answers_as_alone(
    engine: Engine, skills: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, token for token; inputs are read in pieces, rows join and leave at all times."""
    monkeypatch.setattr(worker_module, "PIECE", 16)
    given = []
    for i, text in enumerate(TEXTS * 2):
        for name, skill in skills.items():
            length = 3 + (5 * i + len(name)) % 9
            given.append((name, text, length, ask(engine, skill, text, max_new_tokens=length)))
    for name, text, length, (job, answers) in given:
        assert answers.over.wait(60), name
        assert answers.error is None, (name, answers.error)
        decoding = DecodingConfig(max_new_tokens=length)
        (alone,) = skills[name].generate([text], decoding)[0]
        assert answers.completions[0].text == alone.text, name
        assert answers.completions[0].token_ids == alone.token_ids, name
        assert answers.text() == alone.text, "its pieces are the whole"
        assert job.prompt_tokens > 0 or name == "majority"
    assert engine.jobs == 0
    assert engine.running == 0
    assert engine.tokens > engine.steps, "no two rows ever shared a step"


def test_layers_with_a_sliding_window_are_served_within_it(
    tiny_lm: Callable[[str], FrozenLM],
) -> None:
    """The engine's layers see all that came before, which beyond the window the LM's do not."""
    lm = tiny_lm("mistral")
    window, skill = lm.sliding_window, Skill.base(lm, SkillConfig())
    assert window is not None
    assert lm.blocks is not None
    engine = Engine(lm, EngineConfig(workers=1))
    try:
        text = "a b c"
        length = len(skill.input_ids([text])[0])
        assert length < window
        _, answers = ask(engine, skill, text, max_new_tokens=2 * window, min_new_tokens=2 * window)
        assert answers.over.wait(30)
        (served,) = answers.completions
        assert len(served.token_ids) == window + 1 - length
        decoding = DecodingConfig(max_new_tokens=2 * window, min_new_tokens=2 * window)
        (alone,) = skill.generate([text], decoding)[0]
        assert served.token_ids == alone.token_ids[: len(served.token_ids)]
        _, answers = ask(engine, skill, text * 6, max_new_tokens=1)
        assert answers.over.wait(30)
        assert isinstance(answers.error, WindowError)
        assert f"serves the {window} that this LM's sliding layers see" in str(answers.error)
    finally:
        engine.close(30)


@pytest.mark.parametrize(
    "name", ["static", "idpt_kv", "neural", "three passes", "textual", "ensemble"]
)
def test_samples_share_what_was_read(engine: Engine, skills: dict[str, Any], name: str) -> None:
    decoding = {"n": 3, "temperature": 1.3, "seed": 5, "max_new_tokens": 8}
    others = [ask(engine, skills["idpt"], text, max_new_tokens=9) for text in TEXTS]
    _, answers = ask(engine, skills[name], TEXTS[0], **decoding)
    assert answers.over.wait(30)
    assert answers.error is None
    (alone,) = skills[name].generate([TEXTS[0]], DecodingConfig(**decoding))
    assert [c.token_ids for c in answers.completions] == [c.token_ids for c in alone]
    for sample, completion in enumerate(alone):
        assert answers.text(sample) == completion.text
    assert all(other.over.wait(30) for _, other in others)


def test_an_ensemble_leaves_nothing_behind(
    lm: FrozenLM, skills: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled, failed, or too large for the memory: its members' rows go with it."""
    engine = Engine(lm, EngineConfig(workers=1, max_rows=4))
    (worker,) = engine._workers
    both = skills["ensemble"]
    job, answers = ask(engine, both, TEXTS[0], max_new_tokens=90, min_new_tokens=90, n=2)
    _, other = ask(engine, skills["idpt"], TEXTS[1], max_new_tokens=6)
    job.cancelled.set()
    assert answers.over.wait(30)
    assert other.over.wait(30)
    assert "cancelled" in str(answers.error)
    with monkeypatch.context() as patch:
        entered = worker.passes.enter

        def third_fails(entry: Entry) -> list[int]:
            if not entry.hops and worker.passes.pools and worker.passes.pools[-1].used == 2:
                raise ShouldersError("no slot for the third")
            return entered(entry)

        patch.setattr(worker.passes, "enter", third_fails)
        _, answers = ask(engine, both, TEXTS[0], max_new_tokens=4)
        assert answers.over.wait(30)
        assert "no slot for the third" in str(answers.error)
    assert worker.passes.pools[-1].used == 0
    decoding = {"max_new_tokens": 4, "n": 2, "temperature": 1.0}
    _, answers = ask(engine, both, TEXTS[0], **decoding)
    answers.wanted = 2
    assert answers.over.wait(30)
    (alone,) = both.generate([TEXTS[0]], DecodingConfig(**decoding))
    assert [c.token_ids for c in answers.completions] == [c.token_ids for c in alone]
    assert engine.close(30)
    assert worker.running == worker.passes.pools[-1].used == 0


def test_an_ensemble_is_served_by_its_folder(
    lm: FrozenLM, skills: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    for name in ("static", "static_kv"):
        save_skill(skills[name], root / "both" / name, Templates(), {})
    save_ensemble(root / "both", ["static", "static_kv"], {"created": "2026-11-29T00:00:00"})
    served = SkillSet(lm, root=root)
    watcher = Watcher(served)
    watcher.look()
    found = served.get("both")
    assert found.trained_parameters == sum(
        skills[name].trained_parameters for name in ("static", "static_kv")
    )
    assert found.created > 0
    decoding = DecodingConfig(max_new_tokens=6)
    wanted = Ensemble([skills["static"], skills["static_kv"]]).generate(TEXTS, decoding)
    assert isinstance(found.answers, Ensemble)
    assert found.answers.generate(TEXTS, decoding) == wanted
    served.unload("both")
    assert served.load_inside("again", "both").folder == (root / "both").resolve()


def test_alternatives_to_every_token(engine: Engine, skills: dict[str, Any]) -> None:
    _, answers = ask(engine, skills["static"], TEXTS[0], max_new_tokens=4, top_logprobs=2)
    assert answers.over.wait(30)
    (found,) = answers.completions
    assert len(found.top) == len(found.logprobs) == len(found.token_ids)
    assert sum(found.logprobs) == pytest.approx(found.logprob)
    for token, logprob, top in zip(found.token_ids, found.logprobs, found.top, strict=True):
        assert top[0] == (token, pytest.approx(logprob)), "greedy takes the likeliest"
        assert top[0][1] >= top[1][1]


def test_details_say_what_was_proposed_shown_and_read(
    engine: Engine, skills: dict[str, Any]
) -> None:
    job, answers = ask(engine, skills["textual"], TEXTS[0], max_new_tokens=5)
    assert answers.over.wait(30)
    (proposed,) = skills["textual"].proposed([TEXTS[0]])
    assert job.details["read"] == [proposed.text]
    assert [c["text"] for c in job.details["candidates"]] == [c.text for c in proposed.candidates]
    assert all(c["shown"] for c in job.details["candidates"])
    assert job.details["chooser"] == "second_pass"
    (vote, _) = ask(engine, skills["majority"], TEXTS[0], max_new_tokens=5)
    (plain, last) = ask(engine, skills["idpt"], TEXTS[0], max_new_tokens=5)
    assert last.over.wait(30)
    assert engine.close(30)
    assert vote.details["chooser"] == "majority"
    assert "read" not in vote.details
    assert plain.details == {}


def test_details_show_candidates_without_room(engine: Engine, skills: dict[str, Any]) -> None:
    long = "write it as a word or a number " * 8
    job, answers = ask(engine, skills["textual"], long, max_new_tokens=5)
    assert answers.over.wait(30)
    (proposed,) = skills["textual"].proposed([long])
    shown = [c["text"] for c in job.details["candidates"] if c["shown"]]
    left = {c.text for c in proposed.left_out}
    assert shown == [c.text for c in proposed.candidates if c.text not in left]


def test_details_follow_passages_from_index_to_window(
    engine: Engine, skills: dict[str, Any]
) -> None:
    listed = Listed("cab")
    pack = {"tokens": 20}
    reader = Reader(
        skills["static"],
        Contexts(listed, listed, Likes("Paris"), 3),
        ReadingConfig.model_validate({"pack": pack, "max_new_tokens": 5}),
    )
    answers = Answers()
    job = Job("r", reader, "the capital?", DecodingConfig(max_new_tokens=5), answers)
    engine.submit(job)
    assert answers.over.wait(30)
    assert answers.error is None
    found = job.details["found"]
    assert [(p["id"], p["retrieved"], p["retrieved_score"]) for p in found] == [
        ("b", 3, -2.0), ("c", 1, 0.0), ("a", 2, -1.0),
    ]  # fmt: skip
    assert [(p["ranked"], p["score"]) for p in found] == [(1, 1.0), (2, 0.0), (3, 0.0)]
    read = [p["id"] for p in found if p["read"]]
    assert read == [p["id"] for p in job.details["passages"]] != [p["id"] for p in found]
    assert job.details["read"][0].endswith("Question: the capital?")
    assert all(PASSAGES[i].text.split()[0] in job.details["read"][0] for i in read)


def test_what_prompts_attended_to_is_found_pass_by_pass(
    lm: FrozenLM, folder: Path, skills: dict[str, Any]
) -> None:
    texts = [TEXTS[0], TEXTS[0] + " and candidates"]
    assert attended(skills["static"], texts[:1]) == []
    (one,) = attended(skills["idpt_kv"], texts[:1])
    assert (one.number, one.weights.shape) == (1, (2, len(one.tokens)))
    (second,) = attended(skills["textual"], texts)
    assert second.number == 2
    assert "candidates" in "".join(second.tokens)
    assert [own.number for own in attended(skills["neural"], texts[:1])] == [2]
    assert attended(skills["majority"], texts[:1]) == []
    # A pass whose answer a vote takes reads nothing: what was read is the next one's.
    spec = skills["idpt"].config.passes[0].prompt
    passes = [
        {"prompt": spec, "propose": {**PROPOSE, "chooser": "majority"}},
        {"prompt": spec, "propose": PROPOSE},
        {"prompt": spec},
    ]
    config = SkillConfig.model_validate({"passes": passes})
    voted = Skill.create(lm, config, load_encoder, torch.Generator().manual_seed(0))
    assert [own.number for own in attended(voted, texts)] == [1, 3]


def test_stop_strings_and_lengths_differ_by_row(engine: Engine, skills: dict[str, Any]) -> None:
    skill = skills["static"]
    (whole,) = skill.generate([TEXTS[0]], DecodingConfig(max_new_tokens=12))[0]
    stop = whole.text[3:5]
    both = [
        ask(engine, skill, TEXTS[0], max_new_tokens=12, stop=(stop,)),
        ask(engine, skill, TEXTS[0], max_new_tokens=12),
        ask(engine, skill, TEXTS[0], max_new_tokens=12, min_new_tokens=12),
    ]
    assert all(answers.over.wait(30) for _, answers in both)
    texts = [answers.completions[0].text for _, answers in both]
    assert texts[0] == whole.text[: whole.text.find(stop)]
    assert texts[1] == whole.text
    assert len(both[2][1].completions[0].token_ids) == 12


def test_a_cancelled_job_leaves_the_others_alone(engine: Engine, skills: dict[str, Any]) -> None:
    job, answers = ask(engine, skills["static"], TEXTS[0], max_new_tokens=90, min_new_tokens=90)
    _, other = ask(engine, skills["static"], TEXTS[1], max_new_tokens=20, min_new_tokens=20)
    job.cancelled.set()
    assert answers.over.wait(30)
    assert isinstance(answers.error, ShouldersError)
    assert other.over.wait(30)
    (alone,) = skills["static"].generate(
        [TEXTS[1]], DecodingConfig(max_new_tokens=20, min_new_tokens=20)
    )[0]
    assert other.completions[0].token_ids == alone.token_ids


def test_whoever_cannot_be_told_harms_nobody(lm: FrozenLM, skills: dict[str, Any]) -> None:
    """As where a client's event loop is closed: its own answer ends, others go on."""
    engine = Engine(lm, EngineConfig(workers=1, max_rows=8))
    told: list[Event] = []

    def gone(event: Event) -> None:
        told.append(event)
        raise RuntimeError("Event loop is closed")

    decoding = DecodingConfig(max_new_tokens=40, min_new_tokens=40, n=2)
    for name in ("static", "ensemble"):
        told.clear()
        _, other = ask(engine, skills["idpt"], TEXTS[1], max_new_tokens=40, min_new_tokens=40)
        engine.submit(Job(name, skills[name], TEXTS[0], decoding, gone))
        assert other.over.wait(30)
        wanted = DecodingConfig(max_new_tokens=40, min_new_tokens=40)
        (alone,) = skills["idpt"].generate([TEXTS[1]], wanted)[0]
        assert other.completions[0].token_ids == alone.token_ids
        deadline = time.monotonic() + 30
        while engine.jobs and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engine.jobs == 0
        assert isinstance(told[-1], RuntimeError)
    _, other = ask(engine, skills["static"], TEXTS[1], max_new_tokens=4)
    assert other.over.wait(30)
    assert other.error is None
    assert engine.close(30)


def test_the_inbox_is_read_by_one_thread_at_a_time(lm: FrozenLM, skills: dict[str, Any]) -> None:
    """How much a worker has to do is asked by a thread that is not its own."""

    class Guarded(deque[Entry]):
        def __iter__(self) -> Iterator[Entry]:
            assert engine._workers[0]._wake._is_owned()  # type: ignore[attr-defined]
            return super().__iter__()

        def popleft(self) -> Entry:
            assert engine._workers[0]._wake._is_owned()  # type: ignore[attr-defined]
            return super().popleft()

    engine = Engine(lm, EngineConfig(workers=1))
    engine._workers[0]._inbox = Guarded()
    _, answers = ask(engine, skills["static"], TEXTS[0], max_new_tokens=4)
    assert answers.over.wait(30)
    assert answers.error is None
    assert engine.close(30)
    engine._workers[0].join(30)
    assert engine._workers[0].load == 0


def test_what_a_closed_engine_had_no_time_for_is_told(lm: FrozenLM, skills: dict[str, Any]) -> None:
    engine = Engine(lm, EngineConfig(workers=1))
    asks = [ask(engine, skills["textual"], text, max_new_tokens=60) for text in TEXTS[:2]]
    deadline = time.monotonic() + 30
    while not engine.running and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not engine.close(0)
    while engine.jobs and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.jobs == 0, "a job that is not answered ends all the same"
    for _, answers in asks:
        assert answers.over.wait(30)
        assert answers.error is None or "stopped before all" in str(answers.error)


def test_what_a_closed_engine_has_not_begun_is_told(lm: FrozenLM, skills: dict[str, Any]) -> None:
    engine = Engine(lm, EngineConfig(workers=1))
    held = threading.Event()
    engine._preparing.submit(held.wait)
    _, answers = ask(engine, skills["base"], TEXTS[0])
    assert not engine.close(0)
    held.set()
    assert answers.over.wait(30)
    assert "stopped before all" in str(answers.error)
    assert engine.jobs == 0
    _, answers = ask(engine, skills["base"], TEXTS[0])
    assert "stopped before all" in str(answers.error)
    assert engine.jobs == 0


def test_more_alternatives_than_there_are_tokens(engine: Engine, skills: dict[str, Any]) -> None:
    _, answers = ask(engine, skills["static"], TEXTS[0], max_new_tokens=2, top_logprobs=10**6)
    assert answers.over.wait(30)
    (completion,) = answers.completions
    assert len(completion.top[0]) == engine.lm.vocab_size


def test_a_deadline_ends_a_job(engine: Engine, skills: dict[str, Any]) -> None:
    answers = Answers()
    job = Job("s", skills["base"], TEXTS[0], DecodingConfig(), answers, time.monotonic() - 1)
    engine.submit(job)
    assert answers.over.wait(30)
    assert "cancelled" in str(answers.error)
    assert engine.close(10)


def test_a_full_queue_refuses(lm: FrozenLM, skills: dict[str, Any]) -> None:
    engine = Engine(lm, EngineConfig(workers=1, max_queue=2))
    held = threading.Event()
    engine._preparing.submit(held.wait)
    first = [ask(engine, skills["base"], text, max_new_tokens=30) for text in TEXTS[:2]]
    with pytest.raises(QueueFullError, match="2 requests"):
        ask(engine, skills["base"], TEXTS[0])
    held.set()
    assert all(answers.over.wait(30) for _, answers in first)
    deadline = time.monotonic() + 10
    while engine.jobs and time.monotonic() < deadline:
        time.sleep(0.01)
    _, again = ask(engine, skills["base"], TEXTS[0], max_new_tokens=2)
    assert again.over.wait(30)
    assert engine.close(10)


def test_what_cannot_be_read_is_said_and_harms_nobody(
    engine: Engine, skills: dict[str, Any]
) -> None:
    _, good = ask(engine, skills["static"], TEXTS[0], max_new_tokens=5)
    _, bad = ask(engine, skills["static"], "word " * 500, max_new_tokens=5)
    assert good.over.wait(30)
    assert bad.over.wait(30)
    assert good.error is None
    assert "tokens" in str(bad.error)


@pytest.mark.parametrize("wanted", [12, 150])
def test_inputs_that_are_cut_leave_room_for_the_answer(
    wanted: int, engine: Engine, skills: dict[str, Any]
) -> None:
    """All of it, or half of what the window holds for both; whoever answers cuts alike."""
    skill = skills["static"].keeping("end")
    given = min(wanted, skill.input_room(0) // 2)
    text = "word " * 500
    exact = {"max_new_tokens": wanted, "min_new_tokens": wanted}
    _, served = ask(engine, skill, text, **exact)
    ((alone,),) = skill.generate([text], DecodingConfig(**exact))
    *_, last = skill.stream(text, DecodingConfig(**exact))
    assert served.over.wait(30)
    assert served.error is None
    assert last.completion is not None
    for found in (alone, last.completion, served.completions[0]):
        # One token more than there is room for is written, but never read.
        assert len(found.token_ids) in (given, given + 1)
        assert found.token_ids == alone.token_ids
    # What fits is cut neither for a longer answer, nor without leave.
    assert skill.asking_ids(["two"], DecodingConfig())[0] == skill.input_ids(["two"])[0]
    with pytest.raises(ShouldersError, match="tokens"):
        skills["static"].generate([text], DecodingConfig(**exact))


def test_memory_is_bounded(lm: FrozenLM, skills: dict[str, Any]) -> None:
    """With room for two rows or so, the others wait; one that never fits is refused."""
    engine = Engine(lm, EngineConfig(workers=1, cache_bytes=1 << 20))
    (worker,) = engine._workers
    position = worker.passes._pool(LAST).position_bytes
    worker.passes._most = 64 * position * 2
    several = [ask(engine, skills["base"], text, max_new_tokens=12) for text in TEXTS[:3] * 3]
    most = 0
    until = time.monotonic() + 60
    while not all(answers.over.is_set() for _, answers in several) and time.monotonic() < until:
        most = max(most, worker.running)
        time.sleep(0.001)
    assert all(answers.error is None for _, answers in several)
    assert most <= 2
    _, never = ask(engine, skills["base"], TEXTS[0], max_new_tokens=120)
    assert never.over.wait(30)
    assert "memory" in str(never.error)
    assert worker.passes.pools[-1].room == 0, "memory is let go when nobody is there"
    assert engine.close(10)


@pytest.mark.parametrize(("place", "name"), [(worker_module, "choose"), (Pool, "enter")])
def test_a_defect_is_told_to_whoever_waits(
    engine: Engine, skills: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: Any, name: str
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(place, name, broken)
        _, answers = ask(engine, skills["static"], TEXTS[0], max_new_tokens=5)
        assert answers.over.wait(30)
        assert "out of luck" in str(answers.error)
    _, after = ask(engine, skills["static"], TEXTS[0], max_new_tokens=5)
    assert after.over.wait(30)
    assert after.error is None


def test_a_skill_that_makes_nan_harms_nobody(lm: FrozenLM, skills: dict[str, Any]) -> None:
    config = SkillConfig.model_validate({"passes": [{"prompt": {"kind": "static", "length": 2}}]})
    bad = Skill.create(lm, config, load_encoder, torch.Generator().manual_seed(0))
    for network in bad.networks():
        for parameter in network.parameters():
            parameter.data.fill_(torch.nan)
    engine = Engine(lm, EngineConfig(workers=1))
    sampled = {"temperature": 1.2, "seed": 3, "max_new_tokens": 30, "min_new_tokens": 30}
    _, good = ask(engine, skills["static"], TEXTS[0], **sampled)
    _, broken = ask(engine, bad, TEXTS[0], **{**sampled, "min_new_tokens": 20})
    assert good.over.wait(30)
    assert broken.over.wait(30)
    assert good.error is None
    (alone,) = skills["static"].generate([TEXTS[0]], DecodingConfig(**sampled))[0]
    assert good.completions[0].token_ids == alone.token_ids
    assert engine.close(10)


def test_what_links_remember_is_let_go(engine: Engine, skills: dict[str, Any]) -> None:
    """A neural skill that is no longer served must not stay in memory."""
    _, answers = ask(engine, skills["neural"], TEXTS[0], max_new_tokens=5)
    assert answers.over.wait(30)
    assert answers.error is None
    deadline = time.monotonic() + 10
    while any(w.passes.memories for w in engine._workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_other_lms_are_refused(folder: Path, lm: FrozenLM) -> None:
    other = load_lm(lm.name, dtype="float32")
    other.blocks = None
    with pytest.raises(ShouldersError, match="LMs with Llama's layers"):
        Engine(other)


def test_a_skill_that_is_gone_leaves_nothing(
    engine: Engine, lm: FrozenLM, skills: dict[str, Any]
) -> None:
    """Its prefixes, and what its links have seen, go with its last job."""
    chain = [{"propose": PROPOSE, "prompt": {"kind": "static", "length": 2}}, {"link": LINK}]
    config = SkillConfig.model_validate(
        {"passes": [*chain, {"prompt": {"kind": "static_kv", "length": 2}}]}
    )
    skill = Skill.create(lm, config, load_encoder, torch.Generator().manual_seed(0))
    jobs = [ask(engine, skill, text, max_new_tokens=6)[1] for text in TEXTS]
    _, other = ask(engine, skills["neural"], TEXTS[0], max_new_tokens=6)
    assert all(job.over.wait(60) and job.error is None for job in [*jobs, other])
    parts = [weakref.ref(own) for one in skill.networks() for own in one.parameters()]
    assert len(parts) > 10
    del skill
    until = time.monotonic() + 10
    while any(part() is not None for part in parts) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    assert [part for part in parts if part() is not None] == []
    assert all(not worker.passes.memories for worker in engine._workers)


def test_an_entry_that_finds_no_place_is_told(
    lm: FrozenLM, skills: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out for one request is that request's alone."""
    engine = Engine(lm, EngineConfig(workers=1))
    enter, calls = Pool.enter, []

    def failing(self: Pool, *args: Any) -> int:
        calls.append(self)
        if len(calls) == 2:  # the second pass of the first request
            raise MemoryError("no place")
        return enter(self, *args)

    monkeypatch.setattr(Pool, "enter", failing)
    _, refused = ask(engine, skills["neural"], TEXTS[0], max_new_tokens=4)
    assert refused.over.wait(30), "nobody may wait for an answer that never comes"
    assert isinstance(refused.error, MemoryError)
    _, answers = ask(engine, skills["neural"], TEXTS[0], max_new_tokens=4)
    assert answers.over.wait(30)
    decoding = DecodingConfig(max_new_tokens=4)
    assert answers.text() == skills["neural"].generate([TEXTS[0]], decoding)[0][0].text
    assert engine.close(10), "no job is left"
    assert all(pool.used == 0 for pool in engine._workers[0].passes.pools.values())


def test_a_client_that_goes_while_its_answer_is_written_is_noticed(
    skills: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that come faster than anybody looks."""
    monkeypatch.setattr(answers_module, "POLL", 0.3)

    async def gone() -> bool:
        return True

    class Writing:
        most = 8

        def submit(self, job: Job) -> None:
            threading.Thread(target=self._write, args=(job,)).start()

        def _write(self, job: Job) -> None:
            for _ in range(100):
                job.on_event(Delta(0, 0, "a", None))
                if job.cancelled.wait(0.02):
                    return
            job.on_event(Delta(0, 0, "", Completion("a", [1], 0.0, "stop")))

    async def answered() -> None:
        served = Served("s", skills["static"], None, 0)
        answering = Answering(Writing(), served, [("two", None)], DecodingConfig(), None)  # type: ignore[arg-type]
        with pytest.raises(Disconnected):
            await answering.completions(gone)
        assert answering.jobs[0].cancelled.is_set()

    asyncio.run(answered())


def test_several_answers_of_a_skill_that_has_one_are_refused(
    engine: Engine, skills: dict[str, Any]
) -> None:
    """Its one answer would be followed by none, and whoever asks would wait for ever."""

    async def gone() -> bool:
        return False

    async def answered(name: str, answers: Skill | Reader, n: int) -> int:
        decoding = DecodingConfig(max_new_tokens=4, n=n)
        served = Served(name, answers, None, 0)
        answering = Answering(engine, served, [("two", None)], decoding, None)
        return len(await asyncio.wait_for(answering.completions(gone), 30))

    listed = Listed("cab")
    contexts = Contexts(listed, listed, Likes("Paris"), 3)
    config = ReadingConfig.model_validate({"pack": {"tokens": 20}, "max_new_tokens": 4})
    reader = Reader(skills["majority"], contexts, config)
    for name, one in (("majority", skills["majority"]), ("reader", reader)):
        with pytest.raises(ShouldersError, match=f"{name} chooses .* leave out n") as caught:
            asyncio.run(answered(name, one, 2))
        assert status_of(caught.value)[0] == 400
    assert asyncio.run(answered("majority", skills["majority"], 1)) == 1
    assert asyncio.run(answered("textual", skills["textual"], 2)) == 2


def test_a_watcher_leaves_what_others_load_and_unload(
    lm: FrozenLM, skills: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        save_skill(skills["static"], tmp_path / "root" / name, Templates(), {})
    root = tmp_path / "root"
    watched = SkillSet(lm, root=root)
    watched.load("alias", root / "one")
    watched.load("two", root / "two")
    watcher = Watcher(watched)

    def after_a_look() -> list[str]:
        watcher.look()
        return sorted(watched.names()[1:])

    assert after_a_look() == ["alias", "one", "two"]
    # Unloaded by request: whoever has loaded it, it stays so.
    for name in ("one", "two"):
        watched.unload(name)
    assert after_a_look() == after_a_look() == ["alias"]
    # It comes again with another file, or when its folder was gone.
    (root / "one" / FILE).write_bytes((root / "two" / FILE).read_bytes())
    assert after_a_look() == ["alias", "one"]
    (root / "two").rename(tmp_path / "two")
    assert after_a_look() == ["alias", "one"]
    (tmp_path / "two").rename(root / "two")
    assert after_a_look() == ["alias", "one", "two"]
    # Gone is what it has loaded itself.
    watched.unload("two")
    watched.load("two", root / "two")
    (root / "one").rename(tmp_path / "one")
    (root / "two").rename(tmp_path / "two")
    assert after_a_look() == ["alias", "two"]


def test_a_watcher_serves_a_skill_as_it_now_is(
    lm: FrozenLM, skills: dict[str, Any], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    save_skill(skills["static"], root / "one", Templates(), {})
    watched = SkillSet(lm, root=root)
    watcher = Watcher(watched)
    watcher.look()
    before = watched.get("one")
    save_skill(skills["static_lowrank"], tmp_path / "other", Templates(), {})
    (root / "one").rename(tmp_path / "gone")
    (tmp_path / "other").rename(root / "one")
    watcher.look()
    after = watched.get("one")
    assert after.trained_parameters == skills["static_lowrank"].trained_parameters
    assert after is not before
    # What cannot be read leaves what is served as it is.
    (root / "one" / FILE).write_text("{")
    watcher.look()
    assert watched.get("one") is after


def test_a_watcher_tries_a_damaged_skill_once(
    lm: FrozenLM, skills: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_skill(skills["static"], tmp_path / "root" / "bad", Templates(), {})
    file = tmp_path / "root" / "bad" / FILE
    whole = file.read_bytes()
    file.write_text("{")
    watched = SkillSet(lm, root=tmp_path / "root")
    watcher = Watcher(watched)
    for _ in range(3):
        watcher.look()
    assert sum("refused" in record.message for record in caplog.records) == 1
    file.write_bytes(whole)
    watcher.look()
    assert watched.names()[1:] == ["bad"]


def test_a_watcher_takes_a_copy_in_any_order(
    lm: FrozenLM, skills: dict[str, Any], tmp_path: Path
) -> None:
    """What is copied file by file is refused while it is not whole, and served when it is."""
    from_, to = tmp_path / "from", tmp_path / "root/both"
    for name in ("static", "static_kv"):
        save_skill(skills[name], from_ / name, Templates(), {})
    save_ensemble(from_, ["static", "static_kv"], {})
    files = sorted((f for f in from_.rglob("*") if f.is_file()), key=lambda f: len(f.parts))
    watched = SkillSet(lm, root=tmp_path / "root")
    watcher = Watcher(watched)
    for file in files:  # ensemble.json is among the first
        assert watched.names()[1:] == []
        copy = to / file.relative_to(from_)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
        watcher.look()
    assert watched.names()[1:] == ["both"]


@pytest.fixture
def served(lm: FrozenLM, engine: Engine) -> Server:
    return Server(SkillSet(lm), engine, Metrics(engine), KEY)


def test_a_stranger_is_refused_before_the_body_is_parsed(served: Server) -> None:
    client = TestClient(create_app(served), headers=JSON)
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/load_adapter"):
        found = client.post(path, content=b"{")
        assert found.status_code == 401, path
        assert "API key" in found.json()["error"]["message"]
        assert found.headers["x-request-id"]
        found = client.post(path, content=b"{", headers={**JSON, **OPEN})
        assert found.status_code == 400
        assert "no JSON" in found.json()["error"]["message"]
    assert client.get("/v1/models/lm").status_code == client.get("/metrics").status_code == 401
    assert client.get("/v1/models/lm", headers=OPEN).json()["id"] == "lm"
    # As before, what needs no key: health, and what there is not.
    paths = {"/health": 200, "/ready": 200, "/openapi.json": 200, "/v1/completions": 405,
             "/v1/nothing": 404, "/": 404}  # fmt: skip
    assert {path: client.get(path).status_code for path in paths} == paths
    assert client.get("/v1/nothing").json()["error"]["message"] == "Not Found"


def test_a_key_may_hold_letters_of_any_language(served: Server) -> None:
    client = TestClient(create_app(replace(served, api_key="schlüssel €")))

    def code(key: str) -> int:
        given = {b"Authorization": f"Bearer {key}".encode()}
        return client.get("/v1/models", headers=given).status_code

    assert code("schlüssel €") == 200
    assert code("schlussel €") == code("") == code("ä") == 401
    key = "schlüssel €".encode()
    assert client.get("/v1/models", headers={b"Authorization": b"bearer " + key}).status_code == 200
    assert client.get("/v1/models", headers={b"Authorization": key}).status_code == 401


def test_a_body_in_chunks_is_refused_whatever_length_it_claims(served: Server) -> None:
    client = TestClient(create_app(served))
    chunked = {**OPEN, "Transfer-Encoding": "chunked"}
    for headers in (chunked, {**chunked, "Content-Length": "2"}):
        found = client.post("/v1/completions", content=b" " * (2 << 20), headers=headers)
        assert found.status_code == 411


def test_refused_and_failed_requests_are_counted_and_defects_logged(
    served: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = TestClient(create_app(served), headers=OPEN, raise_server_exceptions=False)

    def counted(status: int, skill: str = "lm") -> float:
        return served.metrics.requests.labels(skill, str(status))._value.get()

    def code(change: dict[str, Any], path: str = "/v1/completions") -> int:
        body = {"model": "lm", "prompt": "two", "max_tokens": 2, **change}
        return client.post(path, json=body).status_code

    assert code({}) == 200
    assert code({"prompt": "word " * 400}) == 400
    assert code({"prompt": "word " * 400, "stream": True}) == 400
    assert code({"timeout": 1e-9}) == 504
    assert code({"model": "nobody"}) == 404
    assert code({"n": 0}) == 400
    assert code({"messages": [{"role": "user", "content": "x"}]}, "/v1/chat/completions") == 400
    assert client.post("/v1/completions", headers={"Authorization": ""}).status_code == 401
    assert client.get("/v1/models/nobody").status_code == 404
    assert [counted(status) for status in (200, 400, 504, 500)] == [1, 3, 1, 0]
    assert [counted(status, "") for status in (404, 400, 401)] == [1, 1, 1]
    assert b'shoulders_requests_total{skill="lm",status="400"} 3.0' in served.metrics.text()

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(worker_module, "choose", broken)
    for stream in (True, False):
        caplog.clear()
        assert code({"stream": stream}) == 500
        assert "out of luck" in caplog.text
        assert "Traceback" in caplog.text
    assert counted(500) == 2


def test_an_error_in_the_midst_of_a_stream_is_an_event(
    served: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = TestClient(create_app(served), headers=OPEN)
    chosen = worker_module.choose

    def breaks(lm: FrozenLM, logits: torch.Tensor, running: Any) -> torch.Tensor:
        if len(running[0].ids) == 6:
            raise RuntimeError("out of luck")
        return chosen(lm, logits, running)

    monkeypatch.setattr(worker_module, "choose", breaks)
    body = {"model": "lm", "prompt": "two", "max_tokens": 60, "stream": True, "temperature": 0}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 200
    assert '"code": 500' in found.text
    assert "[DONE]" not in found.text
    assert served.metrics.requests.labels("lm", "500")._value.get() == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"guided_regex": "a+"}, "guided_regex"),
        ({"min_tokens": 4}, "min_tokens"),
        ({"prompt": 5}, "prompt:"),
        ({"max_tokens": 40_000}, "32768"),
    ],
)
def test_what_is_not_had_is_refused_where_it_is_asked_for(
    served: Server, change: dict[str, Any], said: str
) -> None:
    client = TestClient(create_app(served), headers=OPEN)
    body = {"model": "lm", "prompt": "two", "max_tokens": 2, **change}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 400
    assert said in found.json()["error"]["message"]
    nothing = {"model": "lm", "prompt": "two", **dict.fromkeys(change)}
    if "prompt" not in change:
        assert client.post("/v1/completions", json=nothing).status_code == 200


def test_null_is_nothing(served: Server) -> None:
    client = TestClient(create_app(served), headers=OPEN)
    fields = ("temperature", "top_p", "n", "stream", "stop", "seed", "max_tokens", "logprobs")
    body = {"model": "lm", "prompt": "two", **dict.fromkeys(fields)}
    assert client.post("/v1/completions", json=body).status_code == 200
    found = client.post("/v1/completions", content=b"x=1", headers={"Content-Type": "text/plain"})
    assert "Content-Type: application/json" in found.json()["error"]["message"]


def test_equal_prompts_differ_unless_a_seed_is_given(served: Server) -> None:
    client = TestClient(create_app(served), headers=OPEN)
    body: dict[str, Any] = {"model": "lm", "prompt": ["two"] * 4, "temperature": 2.0}
    texts = [c["text"] for c in client.post("/v1/completions", json=body).json()["choices"]]
    assert len(set(texts)) > 1
    body["seed"] = 3
    texts = [c["text"] for c in client.post("/v1/completions", json=body).json()["choices"]]
    assert len(set(texts)) == 1


def test_log_probabilities_name_every_token_apart(served: Server) -> None:
    client = TestClient(create_app(served), headers=OPEN)
    body = {"model": "lm", "prompt": "two", "max_tokens": 12, "temperature": 1.5, "logprobs": 5}
    for seed in range(4):
        reply = client.post("/v1/completions", json={**body, "seed": seed}).json()
        found = reply["choices"][0]["logprobs"]
        for token, own, top in zip(
            found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
        ):
            assert top[token] == own
            assert len(top) >= 5
    none = client.post("/v1/completions", json={**body, "logprobs": 0}).json()
    assert all(len(top) == 1 for top in none["choices"][0]["logprobs"]["top_logprobs"])


def test_alternatives_come_where_they_are_asked_for(
    served: Server, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{{ messages[0].content }}")
    client = TestClient(create_app(served), headers=OPEN)
    message = {"role": "user", "content": "two"}
    body = {"model": "lm", "messages": [message], "max_tokens": 2, "logprobs": True}
    for asked, wanted in ((None, 0), (0, 0), (3, 3)):
        reply = client.post("/v1/chat/completions", json={**body, "top_logprobs": asked}).json()
        for token in reply["choices"][0]["logprobs"]["content"]:
            assert len(token["top_logprobs"]) == wanted


class Bytes:
    """An LM whose tokens are bytes; 256 says nothing."""

    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=lambda i: bytes_to_unicode().get(i, "</s>"), all_special_ids=[256]
    )

    def text(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != 256).decode(errors="replace")


class Words:
    """An LM whose tokens bring their space, which the first of a text loses."""

    pieces = ("▁The", "▁cap", "ital", "▁", "</s>")
    tokenizer = SimpleNamespace(convert_ids_to_tokens=pieces.__getitem__, all_special_ids=[4])

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids if i != 4).replace("▁", " ").removeprefix(" ")


@pytest.mark.parametrize(
    ("lm", "ids", "text", "offsets"),
    [
        (Bytes(), [*"🦥 s".encode(), 256], "🦥 s", [0, 0, 0, 0, 1, 2, 3]),
        (Bytes(), [*"A: é你".encode()], "é你", [0, 0, 0, 0, 0, 1, 1, 1]),
        (Bytes(), [0xE2, *b"ab"], "�ab", [0, 0, 2]),  # half a character, seen at the next
        (Words(), [0, 1, 2, 3, 0, 4], "The capital  The", [0, 3, 7, 11, 12, 16]),
    ],
)
def test_offsets_are_those_in_the_text(
    lm: Any, ids: list[int], text: str, offsets: list[int]
) -> None:
    top = tuple(((i, -1.0),) for i in ids)
    found = completion_logprobs(lm, Completion(text, ids, 0.0, "stop", (-1.0,) * len(ids), top), 0)
    begins = found["text_offset"]
    assert begins == offsets
    if isinstance(lm, Words):
        assert found["tokens"] == [" The", " cap", "ital", " ", " The", "</s>"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": ["a"] * 33}, "prompt: List should have at most 32 items"),
        ({"prompt": [1, 2]}, "prompt.0: Input should be a valid string"),
        ({"prompt": ["a", ""]}, "prompt.1: String should have at least 1 character"),
        ({"stop": ["a"] * 9}, "stop: List should have at most 8 items"),
        ({"prompt": 5}, "prompt: Input should be a valid string"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ],
)
def test_a_refusal_is_of_what_was_sent(served: Server, change: dict[str, Any], said: str) -> None:
    client = TestClient(create_app(served), headers=OPEN)
    body = {"model": "lm", "prompt": "two", "max_tokens": 2, **change}
    found = client.post("/v1/completions", json=body)
    assert found.status_code == 400
    assert said in found.json()["error"]["message"]


def test_what_asks_for_nothing_is_taken(served: Server) -> None:
    client = TestClient(create_app(served), headers=OPEN)
    nothing = {"seed": -1, "suffix": "", "stream_options": {"include_usage": None}, "bad_words": []}
    body = {"model": "lm", "prompt": "two", "max_tokens": 2, **nothing}
    assert client.post("/v1/completions", json=body).status_code == 200


@pytest.mark.slow
def test_a_token_is_named_by_what_it_stands_for(embedded_lm: FrozenLM) -> None:
    embedded = embedded_lm
    text = "party 🎉🎉 é"
    ids = embedded.tokenize([text])[0]
    parts = [token_bytes(embedded, i) for i in ids]
    assert any("�" in embedded.text([i]) for i in ids), "some are parts of a character"
    assert b"".join(part or b"" for part in parts) == text.encode()
    end = embedded.end_ids[0]
    assert token_bytes(embedded, end) is None
    assert token_name(embedded, end) == embedded.tokenizer.convert_ids_to_tokens(end)
    names = [token_name(embedded, i) for i in range(300)]
    assert len(set(names)) == len(names)


TEMPLATES = {
    "drops": (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }};{% endfor %}",
        "user: BB;",
    ),
    "moves": ("{{ messages[1].content }} | {{ messages[0].content }}", "BB | AA"),
    "repeats": ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "AAAABBBB"),
    "refuses": ("{{ raise_exception('system role not supported') }}", None),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_chat_template_may_do_as_it_likes_with_messages(
    served: Server, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, wanted = TEMPLATES[kind]
    lm = served.skills.lm
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    turns = [("system", "AA"), ("user", "BB")]
    body = {"model": "lm", "messages": [{"role": r, "content": c} for r, c in turns]}
    if wanted is not None:
        _, ids = conversation(lm, served.skills.get("lm"), ChatRequest.model_validate(body))
        assert ids is not None
        assert lm.text(ids) == lm.text(lm.tokenize([wanted])[0])
        # As the tokenizer reads it, unless users write what only templates may.
        assert ids == lm.tokenize([wanted], markup=True)[0]
        special = lm.tokenizer.all_special_tokens[0]
        body["messages"] = [{"role": r, "content": c + special} for r, c in turns]
        _, ids = conversation(lm, served.skills.get("lm"), ChatRequest.model_validate(body))
        assert ids is not None
        assert not set(ids) & set(lm.tokenizer.all_special_ids)
        return
    client = TestClient(create_app(served), headers=OPEN)
    found = client.post("/v1/chat/completions", json=body)
    assert found.status_code == 400
    assert "system role not supported" in found.json()["error"]["message"]


def test_a_conversation_too_long_does_not_name_the_folder(
    served: Server, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm.tokenizer, "chat_template", "{{ messages[0].content }}")
    client = TestClient(create_app(served), headers=OPEN)
    messages = [{"role": "user", "content": "word " * 400}, {"role": "assistant", "content": None}]
    found = client.post("/v1/chat/completions", json={"model": "lm", "messages": messages})
    assert found.status_code == 400
    said = found.json()["error"]["message"]
    assert f"{lm.max_positions} fit" in said
    assert lm.name not in said


def test_more_prompts_than_the_queue_takes_are_refused_for_good(lm: FrozenLM) -> None:
    engine = Engine(lm, EngineConfig(workers=1, max_queue=3))
    client = TestClient(create_app(Server(SkillSet(lm), engine, Metrics(engine))))
    found = client.post("/v1/completions", json={"model": "lm", "prompt": ["two"] * 4})
    assert found.status_code == 400
    assert "takes 3 at once" in found.json()["error"]["message"]
    engine.close(30)


def test_a_deadline_is_kept_wherever_one_waits(lm: FrozenLM, skills: dict[str, Any]) -> None:
    engine = Engine(lm, EngineConfig(workers=1, max_rows=1))
    (worker,) = engine._workers
    held = threading.Event()
    step = worker._step

    def slow() -> None:
        step()
        held.wait(0.05)

    worker._step = slow  # type: ignore[method-assign]
    first, _ = ask(engine, skills["base"], "two", max_new_tokens=100, min_new_tokens=100)
    second, _ = ask(engine, skills["base"], "two", max_new_tokens=100, min_new_tokens=100)

    async def third() -> float:
        served = Served("base", skills["base"], None, 0)
        answering = Answering(engine, served, [("two", None)], DecodingConfig(), 0.4)
        began = time.monotonic()
        with pytest.raises(TimedOutError):
            await answering.completions(never_gone)
        return time.monotonic() - began

    assert asyncio.run(third()) < 2
    until = time.monotonic() + 2
    while worker.load > 2:  # the third waits no more, behind the second that does
        assert time.monotonic() < until
        time.sleep(0.01)
    first.cancelled.set()
    second.cancelled.set()
    held.set()
    engine.close(30)


async def never_gone() -> bool:
    return False


def test_a_long_row_does_not_take_memory_for_others(lm: FrozenLM, skills: dict[str, Any]) -> None:
    """Its room is every slot's: the pool stays within its bytes, and gives the room back."""
    engine = Engine(lm, EngineConfig(workers=1, max_rows=64))
    (worker,) = engine._workers
    limit = worker.passes._most = worker.passes._pool(LAST).position_bytes * 64 * 16
    seen: list[tuple[int, int, int]] = []
    read = worker.passes.read

    def watched(rows: Any, pieces: Any) -> Any:
        pool = worker.passes.pools[LAST]
        seen.append((sum(p.bytes for p in worker.passes.pools.values()), pool.room, len(rows)))
        return read(rows, pieces)

    worker.passes.read = watched  # type: ignore[method-assign]
    short = {"max_new_tokens": 20, "min_new_tokens": 20}
    jobs = [ask(engine, skills["base"], f"two {i}", **short) for i in range(30)]
    jobs.append(ask(engine, skills["base"], "long", max_new_tokens=220, min_new_tokens=220))
    jobs += [ask(engine, skills["base"], f"two {i}", **short) for i in range(60)]
    for _, answers in jobs:
        assert answers.over.wait(60)
        assert answers.error is None
    assert max(taken for taken, _, _ in seen) <= limit
    last_long = max(i for i, (_, room, _) in enumerate(seen) if room > 64)
    assert max(rows for _, _, rows in seen[last_long:]) > 8
    engine.close(30)


def test_what_the_playground_refuses_is_counted(served: Server) -> None:
    pytest.importorskip("gradio")
    from shoulders.serving.playground import answer

    async def said(name: str, question: str) -> str:
        return [shown.note async for shown in answer(served, True, name, question, 4, 0.0)][-1]

    assert "not served" in asyncio.run(said("nobody", "two"))
    assert "tokens" in asyncio.run(said("lm", "word " * 400))
    for skill, status in (("", "404"), ("lm", "400")):
        assert served.metrics.requests.labels(skill, status)._value.get() == 1


def test_work_for_a_stream_ends_with_its_connection(skills: dict[str, Any]) -> None:
    """Also where the client goes while an event is being sent, and its generator lives on."""

    class Idle:
        most = 8

        def submit(self, job: Job) -> None:
            pass

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message.get("body"):
            raise OSError("the client has gone")

    async def streamed() -> None:
        served = Served("s", skills["static"], None, 0)
        answering = Answering(Idle(), served, [("two", None)], DecodingConfig(), None)  # type: ignore[arg-type]
        events = endless()
        with pytest.raises((ClientDisconnect, OSError)):
            await Streamed(events, answering)({"type": "http"}, receive, send)
        assert answering.jobs[0].cancelled.is_set()
        await events.aclose()

    async def endless() -> AsyncGenerator[str, None]:
        while True:
            yield "data: {}\n\n"

    asyncio.run(streamed())


def test_pages_of_named_origins_may_ask(served: Server) -> None:
    page = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    closed = TestClient(create_app(served))
    assert closed.options("/v1/completions", headers=page).status_code == 405
    client = TestClient(create_app(served, ["https://chat.example"]))
    found = client.options("/v1/completions", headers=page)
    assert found.status_code == 200
    assert found.headers["access-control-allow-origin"] == "https://chat.example"
    other = {**page, "Origin": "https://other.example"}
    assert "access-control-allow-origin" not in client.options("/v1/models", headers=other).headers
    answer = client.get("/v1/models", headers={**OPEN, "Origin": "https://chat.example"})
    assert answer.headers["access-control-allow-origin"] == "https://chat.example"
    assert client.get("/v1/models", headers={"Origin": "https://chat.example"}).status_code == 401
