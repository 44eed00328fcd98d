"""The playground in a real browser: headless Chromium, a server process, skills of every view."""

from __future__ import annotations

import base64
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders.cli.app import app
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.lm.load import load_lm
from shoulders.reader.rerankers.fused import Feature, Fusion
from shoulders.skills.artefact import save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.reader import ReadingConfig
from shoulders.skills.reader_artefact import FUSION, SearchConfig, save_reader
from shoulders.skills.skill import Skill
from test_serve import KEY, Started
from tiny_models import save_tiny_encoder, save_tiny_lm

pytestmark = pytest.mark.slow

QUESTION = "When was the old harbour station opened?"
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
DOCUMENTS = {
    "harbour": "The old harbour station was opened in 1911. It is made of red brick. ",
    "opened": "The new museum was opened to the public in 1987. It shows ships. ",
    "hill": "The station on the hill was opened late. Few trains stop there. ",
}
# Turns the retriever's order round, so that both orders can be told apart on the page.
BACKWARDS = Fusion(
    features=(Feature(member="retriever", relative=False, mean=0, scale=1, weight=-1),), bias=0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("playground")
    patch = pytest.MonkeyPatch()
    patch.setenv("SHOULDERS_CACHE", str(folder / "cache"))
    # Deep, so that its longest answer takes much longer than to see that nobody reads it any more.
    tiny = save_tiny_lm(folder / "lm", window=4400, endless=True, layers=48)
    lm = load_lm(str(tiny), dtype="float32")
    encoder = str(save_tiny_encoder(folder / "encoder"))
    generator = {"encoder": encoder, "width": 16, "heads": 2, "layers": 1}
    static = {"kind": "static", "length": 4}
    propose = {"n": 3, "max_new_tokens": 4, "temperature": 1.0}
    chains: dict[str, list[dict[str, Any]]] = {
        "static": [{"prompt": static}],
        "idpt": [{"prompt": {"kind": "idpt_kv", "length": 3, "generator": generator}}],
        "textual": [{"prompt": static, "propose": propose}, {}],
        "reader": [{"prompt": static}],
    }
    random = torch.Generator().manual_seed(0)
    for name, passes in chains.items():
        config = SkillConfig.model_validate({"passes": passes})
        save_skill(Skill.create(lm, config, load_encoder, random), folder / name, Templates(), {})
    reading = ReadingConfig.model_validate({"pack": {"tokens": 100}, "max_new_tokens": 8})
    (folder / "reader" / FUSION).write_text(BACKWARDS.model_dump_json())
    save_reader(folder / "reader", SearchConfig(k=3), reading, None, {})
    (folder / "documents").mkdir()
    for name, text in DOCUMENTS.items():
        (folder / "documents" / f"{name}.txt").write_text(text)
    (folder / "key").write_text(KEY)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Started]:
    index = folder / "index"
    app(["index", str(folder / "documents"), "--out", str(index)], standalone_mode=False)
    names = ("static", "idpt", "textual", "reader")
    options = [part for name in names for part in ("--skills", str(folder / name))]
    options += ["--index", str(index), "--api-key-file", f"{folder}/key"]
    started = Started(folder, *options)
    yield started
    started.process.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Started) -> Iterator[Any]:
    """Return the open page; whatever it asks of any other host fails the test."""
    context = browser.new_context(http_credentials={"username": "me", "password": KEY})
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    opened(page, server)
    yield page
    context.close()
    assert asked
    assert [url for url in asked if not url.startswith((server.url, "data:", "blob:"))] == []


def opened(page: Any, server: Started) -> None:
    page.goto(server.url)
    page.get_by_text("How to answer").click()
    page.locator("#longest").wait_for()


def choose(page: Any, side: str, name: str) -> None:
    page.locator(f"#{side}-skill input").click()
    page.get_by_role("option", name=name, exact=True).click()
    page.get_by_role("option").first.wait_for(state="detached")


def number(page: Any, name: str, value: int) -> None:
    field = page.locator(f"#{name} input[type=number]")
    field.fill(str(value))
    field.press("Tab")


def ask(page: Any, *, sides: tuple[str, ...] = ("left",), tokens: int = 24) -> list[str]:
    """Ask, and return the answers when all of them are complete."""
    page.locator("#question textarea").fill(QUESTION)
    page.evaluate(
        """() => { window.seen = []; setInterval(() => window.seen.push(
        document.querySelector('#left-answer textarea').value), 5) }"""
    )
    number(page, "longest", tokens)
    page.locator("#ask").click()
    for side in sides:
        page.locator(f"#{side}-note", has_text=re.compile("tokens in")).wait_for()
    return [page.locator(f"#{side}-answer textarea").input_value() for side in sides]


def wanted(server: Started, name: str, tokens: int = 24) -> tuple[str, dict[str, Any]]:
    body = {"model": name, "prompt": QUESTION, "temperature": 0, "max_tokens": tokens,
            "details": True}  # fmt: skip
    reply = server.get("/v1/completions", body=body)
    text = reply["choices"][0]["text"]
    assert text.strip(), "an empty answer would prove nothing"
    # As a text field shows line ends.
    return text.replace("\r\n", "\n").replace("\r", "\n"), reply["details"][0]


def test_an_answer_is_streamed_and_is_the_apis(page: Any, server: Started) -> None:
    pieces = 0
    for tokens in (40, 80, 160, 320, 1280, 4000):  # a busy browser may draw a short answer at once
        opened(page, server)
        choose(page, "left", "static")
        (answer,) = ask(page, tokens=tokens)
        assert answer == wanted(server, "static", tokens)[0]
        seen = {text for text in page.evaluate("window.seen.slice()") if text}
        assert all(answer.startswith(text) for text in seen)
        pieces = max(pieces, len(seen))
        if pieces > 2:
            break
    assert pieces > 2, "it came in one piece"
    assert page.locator("#left-inside").inner_text().strip() == ""
    assert not page.locator("#right-answer").is_visible()
    assert 'shoulders_requests_total{skill="static",status="200"}' in server.get("/metrics")


def test_two_skills_side_by_side_and_a_heat_map(page: Any, server: Started, folder: Path) -> None:
    page.locator("#two input").check()
    choose(page, "left", "idpt")
    choose(page, "right", "textual")
    answers = ask(page, sides=("left", "right"))
    _, details = wanted(server, "textual")
    assert answers == [wanted(server, name)[0] for name in ("idpt", "textual")]
    cells = page.locator("#left-inside .sh-heat td")
    cells.first.wait_for()
    heads = page.locator("#left-inside .sh-heat th span").all_text_contents()
    assert len(heads) == len(load_encoder(str(folder / "encoder")).tokenize([QUESTION])[0])
    assert "".join(heads) == QUESTION.replace(" ", "·")
    assert cells.count() == 3 * len(heads)
    shown = page.locator("#right-inside").inner_text()
    assert "Candidates of the first pass" in shown
    counts = page.locator("#right-inside .sh-table td:nth-child(3)").all_inner_texts()
    assert [int(count) for count in counts] == [c["count"] for c in details["candidates"]]
    assert page.locator("#right-inside .sh-heat").count() == 0


def test_a_readers_passages_are_shown_with_both_orders(page: Any, server: Started) -> None:
    choose(page, "left", "reader")
    (answer,) = ask(page, tokens=8)
    text, details = wanted(server, "reader", 8)
    assert answer == text
    rows = page.locator("#left-inside .sh-table tr").all_inner_texts()[1:]
    cells = [[cell.strip() for cell in row.split("\t")] for row in rows]
    assert [(int(row[1]), int(row[3])) for row in cells] == [(1, 3), (2, 2), (3, 1)]
    found = details["found"]
    assert [row[2] for row in cells] == [f"{one['score']:.3f}" for one in found]
    assert [row[0] != "" for row in cells] == [one["read"] is not None for one in found]
    assert 0 < len(details["passages"]) < 3


def decoded(server: Started) -> float:
    """Return the tokens that were decoded since the server's start."""
    lines = server.get("/metrics").splitlines()
    return float(next(ln for ln in lines if ln.startswith("shoulders_decoded_tokens ")).split()[1])


@pytest.mark.parametrize("way", ["stop", "leave"])
def test_stopping_and_leaving_free_their_rows(page: Any, server: Started, way: str) -> None:
    page.locator("#question textarea").fill(QUESTION)
    number(page, "longest", 4000)
    before = decoded(server)
    page.locator("#ask").click()
    page.wait_for_function("document.querySelector('#left-answer textarea').value != ''")
    assert "shoulders_jobs 1.0" in server.get("/metrics")
    if way == "stop":
        page.locator("#stop").click()
        page.locator("#left-note", has_text="stopped").wait_for()
    else:
        page.goto("about:blank")
    deadline = time.monotonic() + 20
    while "shoulders_jobs 0.0" not in server.get("/metrics"):
        assert time.monotonic() < deadline, "its row is still being decoded"
        time.sleep(0.1)
    assert 0 < decoded(server) - before < 4000, "it was written to its end"


def test_only_who_has_the_key_enters(browser: Any, server: Started) -> None:
    context = browser.new_context(http_credentials={"username": "me", "password": "another"})
    page = context.new_page()
    assert page.goto(server.url).status == 401
    context.close()
    for path in ("/playground/", "/playground/config", "/playground/gradio_api/info"):
        for key in (None, "another"):
            given = urllib.request.Request(server.url + path)
            if key is not None:
                given.add_header("Authorization", "Basic " + _encoded(f"me:{key}"))
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(given, timeout=30)
            assert caught.value.code == 401


def test_an_open_page_does_not_hold_up_the_servers_end(page: Any, server: Started) -> None:
    """The last of these tests: it ends the server."""
    started = time.monotonic()
    assert server.stop() == 0, server.text()[-2000:]
    assert time.monotonic() - started < 25  # an idle end takes 3 s; one that waits for pages, 60


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
