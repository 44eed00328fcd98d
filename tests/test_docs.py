"""The docs: links lead somewhere, commands exist, the tutorial runs as it stands."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

from shoulders.cli.app import app
from shoulders.skills.artefact import load_skill
from shoulders.training.recipe import make_recipe
from shoulders.training.run import run_recipe
from tiny_models import recipe_values, save_tiny_lm

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


# -- links -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]
    missing = [
        link
        for link in links
        if (target := link.partition("#")[0]) and not (page.parent / target).exists()
    ]
    assert not missing, f"{page.name}: {missing}"


def test_every_page_stands_in_the_navigation() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = set(re.findall(r"[\w/]+\.md", site))
    assert nav == {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}


# -- commands --------------------------------------------------------------------------------


def test_the_page_of_commands_is_what_the_command_line_has() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", DOCS / "cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    there = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert there == module.page(), "docs/cli.md is old: run .venv/bin/python docs/cli_reference.py"


def test_every_published_result_names_its_command() -> None:
    page = (DOCS / "reproduce.md").read_text(encoding="utf-8")
    published = {p.name for p in (ROOT / "benchmarks/results").iterdir()}
    named = set(re.findall(r"benchmarks/results/(\w+\.(?:json|png))", page))
    assert published <= named, "docs/reproduce.md: one row for every file of benchmarks/results"


def test_results_were_made_on_the_machine_that_is_described() -> None:
    page = " ".join((DOCS / "reproduce.md").read_text(encoding="utf-8").split())
    for file in sorted((ROOT / "benchmarks/results").glob("*.json")):
        machines = list(machines_of(json.loads(file.read_text(encoding="utf-8"))))
        assert machines, f"{file.name} does not say where it was made"
        for one in machines:
            for name in (one["processor"], f"torch {one['torch']}", f"Python {one['python']}"):
                assert name in page, f"{file.name}: {name}: say so in docs/reproduce.md"
        row = re.search(rf"`{re.escape(file.name)}`\]\([^|]*\|[^|]*\| (\d+) \|", page)
        if row is not None:  # in the table of what is published; skills may be from elsewhere
            assert row[1] in {str(one["threads"]) for one in machines}, file.name


def machines_of(value: Any) -> Iterator[dict[str, Any]]:
    """Yield what a result's JSON says of machines, wherever it says so."""
    if isinstance(value, dict):
        if "processor" in value and "torch" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from machines_of(inner)


def test_what_reproduce_and_readme_run_exists() -> None:
    for name in ("docs/reproduce.md", "README.md"):
        page = (ROOT / name).read_text(encoding="utf-8")
        paths = set(re.findall(r"\b(?:benchmarks|comparisons|recipes)/[\w/]+\.(?:py|yaml)\b", page))
        assert paths
        assert [p for p in sorted(paths) if not (ROOT / p).is_file()] == []


def test_options_of_reproduced_scripts_exist() -> None:
    """An option that a page gives to a script stands in that script."""
    page = (DOCS / "reproduce.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"python (benchmarks/\w+\.py)([^\n`]*)", page)
    assert commands
    for script, arguments in commands:
        source = (ROOT / script).read_text(encoding="utf-8")
        options = re.findall(r"(?<!\S)--[a-z-]+", arguments)
        assert [o for o in options if f'"{o}"' not in source] == [], script


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_on_pages_exist_with_their_options(page: Path) -> None:
    root: Any = get_command(app)
    blocks = BLOCK.findall(page.read_text(encoding="utf-8").replace("\\\n", " "))
    lines = [line for _, code in blocks for line in code.splitlines()]
    for line in lines:
        words = line.partition(" #")[0].split()
        if not words or Path(words[0]).name != "shoulders" or len(words) == 1:
            continue
        command, rest = root, words[1:]
        while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            assert rest[0] in command.commands, line
            command, rest = command.commands[rest[0]], rest[1:]
        if command.context_settings.get("ignore_unknown_options"):  # another tool's options
            continue
        there = {"--help", *(name for one in command.params for name in one.opts)}
        given = {word.partition("=")[0] for word in rest if re.match(r"--\w", word)}
        assert given <= there, line


def test_anchors_of_the_readmes_links_are_headings() -> None:
    """Within the docs the site's build looks."""
    linked = [link.partition("#") for link in LINK.findall(prose(ROOT / "README.md"))]
    wanted = [(page, anchor) for page, _, anchor in linked if anchor and ":" not in page]
    assert wanted
    for page, anchor in wanted:
        heads = re.findall(r"^#+ (.*)$", prose(ROOT / page), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
        assert anchor in slugs, page


# -- what a newcomer runs --------------------------------------------------------------------


@pytest.mark.slow
def test_the_readmes_first_example_runs(tmp_path: Path) -> None:
    """The block that makes its own rows, and the one from Python behind it."""
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (first,) = (code for kind, code in blocks if code.startswith("cat > rows.jsonl"))
    (python,) = (code for kind, code in blocks if kind == "python")
    answer = run_block("bash", first, tmp_path, command_line())
    assert json.loads((tmp_path / "scores.json").read_text())["metrics"]["exact_match"] == 100
    assert "trained parameters" in " ".join(answer.split())
    assert run_block("python", python, tmp_path, command_line()).strip()


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Every bash and python block, in order, in one folder; nothing is changed but the port."""
    if shutil.which("curl") is None:
        pytest.skip("the tutorial asks its server with curl, which is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    blocks = [(kind, code) for kind, code in BLOCK.findall(page) if kind in ("bash", "python")]
    assert len(blocks) >= 8
    environment = command_line()
    said = "".join(
        run_block(kind, code.replace("8000", port), tmp_path, environment) for kind, code in blocks
    )
    # What the page says comes true.
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["n"] == 8
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    reply = next(line for line in said.splitlines() if '"choices"' in line)
    assert json.loads(reply)["model"] == "team"
    assert "rests on: returns.txt" in said
    report = json.loads((tmp_path / "runs/compare/compare.json").read_text(encoding="utf-8"))
    assert [m["method"] for m in report["lines"]] == ["zero_shot", "static_kv", "lora_r16"]
    assert (tmp_path / "runs/compare/report.html").is_file()


def command_line() -> dict[str, str]:
    """Return an environment in which `shoulders` is found."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TERM": "dumb"}


def run_block(kind: str, code: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a block of a page and return what it prints; nothing that it starts outlives it."""
    command = [sys.executable, "-c"] if kind == "python" else ["bash", "-euo", "pipefail", "-c"]
    printed, complained = folder / "printed.txt", folder / "complained.txt"
    with printed.open("w") as out, complained.open("w") as err:
        process = subprocess.Popen(
            [*command, code],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            ended = process.wait(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = printed.read_text(encoding="utf-8")
    assert ended == 0, f"{code}\n{said}\n{complained.read_text(encoding='utf-8')}"
    return said


# -- a producer of one's own -----------------------------------------------------------------


def test_the_example_of_a_producer_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user's package: a module, and an entry point that its wheel has written down."""
    blocks = BLOCK.findall((DOCS / "producer.md").read_text(encoding="utf-8"))
    code = dict(blocks)
    package, facts = tmp_path / "my_producers", tmp_path / "my_producers-1.0.dist-info"
    package.mkdir()
    facts.mkdir()
    (package / "__init__.py").touch()
    (package / "mixture.py").write_text(code["python"], encoding="utf-8")
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my_producers\nVersion: 1.0\n")
    points = tomllib.loads(code["toml"])["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in own.items())
             for group, own in points.items()]  # fmt: skip
    (facts / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "cache"))
    (spec,) = yaml.safe_load(code["yaml"])["skill"]["passes"]
    values = recipe_values(save_tiny_lm(tmp_path / "lm"), tmp_path / "data", spec["prompt"])
    del values["training"]["optimizer"]  # its own rates
    skill = run_recipe(make_recipe(values), tmp_path / "out")
    again, _ = load_skill(tmp_path / "out", skill.lm)
    texts = ["north question 1", "two", ""]
    with torch.no_grad():
        together = again.prompt(texts).vectors
        assert torch.equal(together, skill.prompt(texts).vectors)
        for i, text in enumerate(texts):
            torch.testing.assert_close(again.prompt([text]).vectors[0], together[i])
        assert not torch.allclose(together[0], together[1]), "it reads the input"
