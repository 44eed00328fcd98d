"""The command line: what it prints, writes and refuses; bad input is one line, no traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import shoulders
from shoulders.cli.app import main
from shoulders.cli.common import emit_json
from shoulders.cli.remote import key_of
from shoulders.cli.serve import _named
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.errors import ShouldersError
from shoulders.files import write_json
from shoulders.lm.load import load_lm
from shoulders.serving import listening
from shoulders.skills import artefact
from shoulders.skills.artefact import FILE, TENSORS, load_skill, save_skill
from shoulders.skills.reader_artefact import FILE as READER
from shoulders.skills.skill import Skill
from shoulders.training import checkpoint, fit
from shoulders.training.recipe import read_recipe
from shoulders.training.run import run_recipe
from tiny_models import (
    WINDOW,
    environment,
    recipe_values,
    rows,
    save_tiny_lm,
    write_jsonl,
    write_recipe,
)

SCRIPT = Path(sys.executable).parent / "shoulders"
KEYS = {"skill", "data", "n", "seconds", "metrics", "ci95", "tasks"}
MORE_KEYS = {"normalizer", "trained_parameters", "lm", "dtype", "date", "machine"}
MORE_KEYS |= {"max_new_tokens", "keep", "limit", "templates"}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def lm(folder: Path) -> Path:
    return save_tiny_lm(folder / "lm")


@pytest.fixture(scope="module")
def skill(folder: Path, lm: Path) -> Path:
    """A trained skill, not to be changed."""
    values = recipe_values(lm, folder / "data", steps=3)
    run_recipe(read_recipe(write_recipe(folder / "recipe.yaml", values)), folder / "skill")
    shutil.rmtree(folder / "skill" / "checkpoints")
    return folder / "skill"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    values = [*rows("north", 4), *rows("south", 2)]
    values[0]["options"] = ["paris", "madrid"]
    return write_jsonl(tmp_path / "rows.jsonl", values)


@pytest.fixture
def run(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Command:
    """Run the command line in this process, in an empty folder."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("SHOULDERS_CACHE", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["shoulders", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        return Result(int(stopped.value.code or 0), out, err)

    return command


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute on one thread, as the other process does: sums depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _process(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        env=environment(folder / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )


def _refused(result: Result, *parts: object, code: int = 2) -> None:
    """Check for one error line that holds `parts`, and nothing on standard output."""
    assert result.code == code, result
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.err
    # Nothing comes after it, and nothing before it but the LM library's own progress bars.
    assert result.err.rstrip().endswith(lines[0])
    assert "Traceback" not in result.err
    for part in parts:
        assert str(part) in lines[0]


# -- starting ----------------------------------------------------------------------------


def test_version_and_help(run: Command) -> None:
    assert run("--version").out == f"shoulders {shoulders.__version__}\n"
    helped = run("--help")
    assert helped.code == 0
    for verb in ("train", "eval", "generate", "info", "demo"):
        assert verb in helped.out
        assert run(verb, "--help").code == 0


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys; import shoulders; assert 'torch' not in sys.modules\n"
        "from shoulders.cli.app import main\n"
        "sys.argv = ['shoulders', sys.argv[1]]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    for argument in ("--help", "--version"):
        subprocess.run([sys.executable, "-c", code, argument], check=True, capture_output=True)


def test_the_console_script_reports_errors_in_one_line(folder: Path) -> None:
    done = _process(folder, "train", "nothing.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: nothing.yaml: no such recipe file\n"


@pytest.mark.parametrize("arguments", [["--bogus"], ["evaluate"], ["eval", "base"], ["train"]])
def test_wrong_usage_exits_2_without_a_traceback(arguments: list[str], run: Command) -> None:
    _refused(run(*arguments))


def test_without_arguments_the_help_is_shown(run: Command) -> None:
    result = run()
    assert "Usage: " in result.out + result.err
    assert "generate" in result.out + result.err
    assert "Traceback" not in result.err


# -- train -------------------------------------------------------------------------------


@pytest.fixture
def recipe(lm: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", recipe_values(lm, tmp_path / "data", steps=3))


def test_train_saves_a_skill_that_loads(run: Command, recipe: Path, lm: Path) -> None:
    result = run("train", recipe)
    assert result.code == 0, result.err
    assert "runs/recipe" in result.out  # the default folder
    loaded, _ = load_skill(Path("runs/recipe"), load_lm(str(lm), dtype="float32"), load_encoder)
    assert f"{loaded.trained_parameters:,} trained parameters" in result.out


def test_set_overrides_the_lm_and_the_steps(run: Command, recipe: Path, tmp_path: Path) -> None:
    other = save_tiny_lm(tmp_path / "other-lm", seed=7)
    result = run(
        "train", recipe, "--out", "out", "--set", f"lm.name={other}", "--set", "training.steps=4"
    )
    assert result.code == 0, result.err
    stored = json.loads(Path("out", FILE).read_text())
    assert stored["lm"]["name"] == str(other)
    assert stored["provenance"]["steps"] == 4


def test_train_refuses_an_unknown_key(run: Command, recipe: Path) -> None:
    result = run("train", recipe, "--out", "out", "--set", "training.stepz=3")
    _refused(result, recipe, "training.stepz", "did you mean 'steps'?")
    assert not Path("out").exists()


def test_train_refuses_missing_data(run: Command, recipe: Path) -> None:
    result = run("train", recipe, "--out", "out", "--set", "data.train=[nothing.jsonl]")
    _refused(result, "nothing.jsonl: no such file")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"input": "a", "targets"', "not valid JSON"),
        ('["a"]', "must be a JSON object"),
        ('{"input": "a"}', "no field 'targets'"),
        ('{"inptu": "a", "target": "b"}', "did you mean 'input'?"),
        ('{"input": "a", "target": "b", "task": " "}', "'task' is empty"),
        ('{"input": "a", "targets": []}', "empty list"),
        ('{"input": "", "target": "b"}', "'input' is empty"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_malformed_row_is_named_with_file_and_line(
    verb: str, line: str, reason: str, run: Command, recipe: Path, skill: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "x", "target": "y"}\n' + line + "\n")
    if verb == "train":
        result = run("train", recipe, "--out", "out", "--set", f"data.train=[{bad}]")
    else:
        result = run("eval", skill, "--data", bad, "--json", "out")
    _refused(result, f"{bad}:2: ", reason)
    assert not Path("out").exists()


def test_train_refuses_a_task_without_rows(run: Command, recipe: Path) -> None:
    result = run("train", recipe, "--out", "out", "--set", "data.tasks=[north, nroth]")
    _refused(result, "unknown task 'nroth'", "did you mean 'north'?")
    assert not Path("out").exists()


def test_train_refuses_an_unknown_lm(run: Command, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "no-model").mkdir()
    result = run("train", recipe, "--out", "out", "--set", f"lm.name={tmp_path / 'no-model'}")
    _refused(result, "no-model: not a model folder")
    assert not Path("out").exists()


def test_train_names_the_row_that_is_too_long(run: Command, recipe: Path, tmp_path: Path) -> None:
    long = {"task": "north", "input": "too long " * WINDOW, "target": "x"}
    bad = write_jsonl(tmp_path / "long.jsonl", [long])
    result = run("train", recipe, "--out", "out", "--set", f"data.train=[{bad}]")
    _refused(result, "task 'north'", "too long too long", f"window {WINDOW}", "keep: start")
    assert not Path("out", FILE).exists()
    result = run(
        "train", recipe, "--out", "cut", "--set", f"data.train=[{bad}]",
        "--set", "skill.format.keep=end",
    )  # fmt: skip
    assert result.code == 0, result.err


def test_train_into_a_place_that_cannot_be_written(run: Command, recipe: Path) -> None:
    Path("file").write_text("in the way")
    result = run("train", recipe, "--out", "file/out")
    _refused(result, "file/out: cannot write: Not a directory")
    assert Path("file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_train_into_a_read_only_folder(run: Command, recipe: Path) -> None:
    Path("closed").mkdir(mode=0o555)
    _refused(run("train", recipe, "--out", "closed/out"), "closed/out: cannot write: Permission")


@pytest.mark.parametrize("place", ["checkpoint", "skill"])
def test_a_full_disk_in_training(
    place: str, run: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint if place == "checkpoint" else artefact, "save_file", full)
    result = run("train", recipe, "--out", "out")
    assert "Traceback" not in result.err
    assert result.code == 2
    error = result.err.splitlines()[-1]
    assert error.startswith("error: out/")
    assert "cannot write: No space left on device" in error
    left = {p.name for p in Path("out").rglob("*") if p.is_file()}
    assert left <= {"log.jsonl", "state.json", "state.safetensors"}
    monkeypatch.undo()


def test_the_disk_really_fills_up_in_a_process(folder: Path, recipe: Path, tmp_path: Path) -> None:
    """A limit on the size of files is what a full disk is, down to the library that writes."""
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
    run_main = "sys.argv = sys.argv[1:]; from shoulders.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", limit + run_main, "shoulders", "train", recipe,
         "--out", tmp_path / "out", "--set", "training.steps=1"],
        env=environment(folder / "cache"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path}/out/checkpoints/step-0000001: cannot write")
    assert {p.name for p in (tmp_path / "out").rglob("*")} <= {"log.jsonl", "checkpoints"}


def test_ctrl_c_elsewhere_says_so(run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(_path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shoulders.cli.common.check_writable", pressed)
    result = run("info", "somewhere", "--json", "x.json")
    assert (result.code, result.out) == (130, "")
    assert result.err.splitlines()[-1] == "error: stopped; nothing was left half-written"


def test_what_is_read_is_not_written_over(run: Command, skill: Path, data: Path) -> None:
    before = data.read_bytes()
    for command in (
        ("eval", skill, "--data", data, "--json", data),
        ("eval", skill, "--data", data, "--json", "a.json", "--dump", "./a.json"),
        ("generate", "--skill", skill, "--input", data, "--output", data),
        ("compare", "--data", data, "--json", data),
    ):
        _refused(run(*command), "would be overwritten; write to another file")
    assert data.read_bytes() == before
    result = run("eval", skill, "--data", data, "--json", "/dev/null", "--dump", "/dev/null")
    assert result.code == 0


def test_ctrl_c_in_training_saves_and_resumes(
    run: Command, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, steps = fit.rate_factor, []

    def press(step: int, config: Any) -> float:
        steps.append(step)
        if steps == [0, 1]:
            os.kill(os.getpid(), signal.SIGINT)
        return original(step, config)

    monkeypatch.setattr(fit, "rate_factor", press)
    result = run("train", recipe, "--out", "out")
    assert result.code == 130
    assert result.err.splitlines()[-1] == "error: stopped at step 2; go on with --resume"
    assert not Path("out", FILE).exists()
    _refused(run("train", recipe, "--out", "out"), "add --resume")
    changed = run("train", recipe, "--out", "out", "--resume", "--set", "training.seed=9")
    assert changed.code == 2
    assert "training.seed was 0, is 9" in changed.err.splitlines()[-1]
    assert run("train", recipe, "--out", "out", "--resume").code == 0
    assert steps == [0, 1, 2]
    run("train", recipe, "--out", "whole")
    assert Path("out", TENSORS).read_bytes() == Path("whole", TENSORS).read_bytes()
    _refused(run("train", recipe, "--out", "out"), "already holds a finished skill")


def test_dry_run_writes_nothing(run: Command, recipe: Path) -> None:
    result = run("train", recipe, "--dry-run", "--set", "data.train=[nothing.jsonl]")
    assert result.code == 0
    assert "valid" in result.out
    assert list(Path.cwd().iterdir()) == []


# -- eval --------------------------------------------------------------------------------


def test_eval_json_has_the_documented_keys(run: Command, skill: Path, data: Path) -> None:
    result = run("eval", skill, "--data", data, "--json", "r.json", "--dump", "d.jsonl")
    assert result.code == 0, result.err
    found = json.loads(Path("r.json").read_text())
    assert set(found) == KEYS | MORE_KEYS
    assert found["skill"] == str(skill)
    assert found["data"] == str(data)
    assert found["n"] == 6
    assert set(found["tasks"]) == {"north", "south"}
    assert set(found["metrics"]) == {"exact_match", "f1", "rank_accuracy"}
    for low, high in found["ci95"].values():
        assert low <= high
    dumped = [json.loads(line) for line in Path("d.jsonl").read_text().splitlines()]
    assert [d["input"] for d in dumped] == [
        json.loads(x)["input"].strip() for x in data.read_text().splitlines()
    ]
    for text in ("north", "south", "exact match", "macro average"):
        assert text in result.out


@pytest.mark.slow
def test_two_processes_evaluate_to_the_last_digit(
    folder: Path, skill: Path, data: Path, run: Command, one_thread: None
) -> None:
    found = []
    for name in ("here", "there"):
        arguments = ("eval", skill, "--data", data, "--json", f"{name}.json", "--dump", f"{name}.d")
        if name == "here":
            assert run(*arguments).code == 0
        else:
            assert _process(folder, *arguments).returncode == 0
        values = json.loads(Path(f"{name}.json").read_text())
        del values["seconds"], values["date"]
        found.append(values)
    assert found[0] == found[1]
    assert Path("here.d").read_bytes() == Path("there.d").read_bytes()


def test_eval_of_the_base_lm(run: Command, lm: Path, data: Path) -> None:
    result = run("eval", "base", "--lm", lm, "--data", data, "--limit", 2, "--json", "r.json")
    assert result.code == 0, result.err
    found = json.loads(Path("r.json").read_text())
    assert found["trained_parameters"] == 0
    assert {t: s["n"] for t, s in found["tasks"].items()} == {"north": 1, "south": 1}


def test_eval_refuses_missing_data(run: Command, skill: Path) -> None:
    _refused(run("eval", skill, "--data", "no.jsonl", "--json", "r.json"), "no.jsonl: no such file")
    assert list(Path.cwd().iterdir()) == []


def test_eval_refuses_an_empty_file(run: Command, skill: Path) -> None:
    Path("empty.jsonl").write_text("\n")
    _refused(run("eval", skill, "--data", "empty.jsonl"), "empty.jsonl: holds no rows")


def test_eval_names_the_row_that_is_too_long(run: Command, skill: Path, tmp_path: Path) -> None:
    values = rows("north", 2)
    values[1]["input"] = "too long " * WINDOW
    long = write_jsonl(tmp_path / "long.jsonl", values)
    arguments = ("eval", skill, "--data", long, "--json", "r.json", "--dump", "d.jsonl")
    result = run(*arguments)
    _refused(result, "long.jsonl:2: ('too long too long", f"window {WINDOW}", "truncation")
    assert list(Path.cwd().iterdir()) == []
    for keep in ("start", "end"):
        assert run(*arguments, "--keep", keep).code == 0
    _refused(run(*arguments, "--keep", "middle"), "keep 'middle': use start or end")


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--normalizer", "loose", "use general or squad"),
        ("--dtype", "int4", "use one of auto, float32, bfloat16, int8"),
        ("--json", "missing/../file/r.json", "cannot write"),
        ("--dump", ".", "is a folder"),
    ],
)
def test_eval_refuses_bad_options(
    option: str, value: str, reason: str, run: Command, skill: Path, data: Path
) -> None:
    Path("file").touch()
    value = value.replace("missing/../", "")
    result = run("eval", skill, "--data", data, option, value)
    _refused(result, value if value != "." else "", reason)
    assert [p.name for p in Path.cwd().iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("data", "options", "said"),
    [
        ("rows.jsonl", ["--k", 3], "--k does nothing"),
        ("rows.jsonl", ["--plot", "p", "--contexts", "c"], "--contexts, --plot does nothing"),
        ("text.txt", ["--dump", "d"], "--dump does nothing"),
        ("rows.jsonl", ["--no-rerank"], "--no-rerank does nothing"),
        ("rows.jsonl", ["--chunk", 9], "--chunk does nothing"),
        ("rows.jsonl", ["--vllm-api-key-file", "k"], "--vllm-api-key-file does nothing"),
        (
            "text.txt",
            ["--templates", "t.yaml", "--keep", "end"],
            "--templates, --keep does",
        ),
        ("text.txt", ["--recurse-below", 0.5], "--recurse-below does nothing"),
        ("rows.jsonl", ["--index", "i", "--max-new-tokens", 3], "--max-new-tokens does nothing"),
        ("rows.jsonl", ["--index", "i", "--normalizer", "squad"], "--normalizer does nothing"),
    ],
)
def test_eval_says_which_options_do_nothing(
    data: str, options: list[object], said: str, run: Command, skill: Path
) -> None:
    """Its files are missing, so that it goes no further; the note comes first."""
    assert said in " ".join(run("eval", skill, "--data", data, *options).err.split())


def test_a_reader_without_an_index_searches_nothing(run: Command, tmp_path: Path) -> None:
    (tmp_path / READER).write_text("{}")
    arguments = ("eval", tmp_path, "--data", "q.jsonl", "--retriever", "dense")
    assert "--retriever does nothing" in run(*arguments).err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "who?", "answers": ["I"]}, "q.jsonl:2: question 'who?' brings no passages"),
        ({"question": "who?", "ctxs": []}, "q.jsonl:2: question 'who?' has no answers"),
    ],
)
def test_a_readers_questions_are_looked_at_before_an_lm_is_loaded(
    row: dict[str, object], said: str, run: Command, tmp_path: Path
) -> None:
    (tmp_path / READER).write_text("{}")  # opening it would fail, and come later
    good = {"question": "what?", "answers": ["it"], "ctxs": []}
    data = write_jsonl(tmp_path / "q.jsonl", [good, row])
    _refused(run("eval", tmp_path, "--data", data), said)


def test_json_on_standard_output_is_utf8_whatever_the_locale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "__stdout__", io.TextIOWrapper(raw, encoding="latin-1"))
    emit_json(Path("-"), {"text": "café 中文 🙂"})
    assert json.loads(raw.getvalue().decode("utf-8")) == {"text": "café 中文 🙂"}


def test_names_of_files_that_are_no_text_are_noted(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "o.json", {"data": name, "é": 1})
    assert json.loads((tmp_path / "o.json").read_bytes()) == {"data": name, "é": 1}


@pytest.mark.parametrize("what", ["train", "generate"])
def test_bench_does_not_overwrite_its_rows(what: str, run: Command, data: Path) -> None:
    before = data.read_bytes()
    _refused(run("bench", what, "--data", data, "--json", data), "would be overwritten")
    assert data.read_bytes() == before


def test_info_of_a_skill_says_that_its_lm_is_its_own(run: Command, skill: Path) -> None:
    result = run("info", skill, "--lm", "nonexistent")
    assert result.code == 0
    assert "--lm does nothing here" in result.err


def test_a_dry_run_writes_no_json(run: Command, tmp_path: Path) -> None:
    result = run("compare", tmp_path / "plan.yaml", "--dry-run", "--json", "o.json")
    _refused(result, "--dry-run only says whether")


def test_a_link_is_served_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run-7").mkdir()
    (tmp_path / "prod").symlink_to("run-7")
    assert list(_named([str(tmp_path / "prod")])) == ["prod"]
    monkeypatch.chdir(tmp_path / "run-7")
    assert list(_named(["."])) == ["run-7"]


def test_eval_on_a_full_disk_leaves_no_file(
    run: Command, skill: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shoulders.files._fsync", full)
    result = run("eval", skill, "--data", data, "--dump", "d.jsonl")
    _refused(result, "d.jsonl: cannot write: No space left on device")
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "work"),
    [
        (["demo"], "shoulders.demo.run.run_demo"),
        (["compare", "--data", "rows.jsonl"], "shoulders.comparison.run.run_comparison"),
        (["info"], "shoulders.lm.load.load_lm"),
        (["bench", "train", "--no-peers"], "shoulders.benchmark.train.bench_train"),
        (["bench", "generate", "--no-peers"], "shoulders.benchmark.generate.bench_generate"),
    ],
)
def test_json_that_cannot_be_written_is_refused_before_the_work(
    arguments: list[str], work: str, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: object, **__: object) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr(work, worked)
    Path("file").touch()
    write_jsonl(Path("rows.jsonl"), rows("north", 40))
    _refused(run(*arguments, "--json", "file/r.json"), "file/r.json: cannot write")
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["file", "rows.jsonl"]


def test_links_and_pipes_are_written_through(
    run: Command, skill: Path, data: Path, tmp_path: Path
) -> None:
    """A link's file gets the new content, and a pipe (or a device) stays what it is."""
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(target.name)
    os.mkfifo(pipe)
    # Open at both ends, so that nobody waits; what is written is far less than a pipe holds.
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        result = run("eval", skill, "--data", data, "--json", link, "--dump", pipe)
        dumped = os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    assert result.code == 0, result.err
    assert link.is_symlink()
    assert json.loads(target.read_text())["n"] == 6
    assert pipe.is_fifo()
    assert len(dumped.splitlines()) == 6
    assert not list(tmp_path.glob(".*"))


def test_standard_output_is_for_json_alone(run: Command, skill: Path, data: Path) -> None:
    _refused(run("eval", skill, "--data", data, "--dump", "-"), "-: standard output takes --json")
    given = write_jsonl(Path("in.jsonl"), [{"input": "a"}])
    _refused(run("generate", "--skill", skill, "--input", given, "--output", "-"), "give a file")
    assert [p.name for p in Path.cwd().iterdir()] == ["in.jsonl"]


# -- texts of users' are shown as they are ---------------------------------------------------


def test_passages_are_no_markup(run: Command, lm: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    text = "Use ls [options] file 2> [/dev/null] :warning: please."
    (docs / "ls[1].txt").write_text(text)
    assert run("index", docs, "--out", "index").code == 0
    asked = run("ask", "ls options?", "--index", "index", "--lm", lm, "--show-context")
    assert asked.code == 0, asked.err
    assert text in asked.err
    assert "ls[1].txt" in asked.err
    assert "rests on: ls[1].txt" in asked.out


def test_a_question_that_is_no_text_is_refused(run: Command, lm: Path) -> None:
    _refused(run("ask", "caf\udce9?", "--index", "no", "--lm", lm), "question is not valid UTF-8")


def test_tables_show_names_with_brackets(
    run: Command, skill: Path, lm: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(skill, "a[b]"))
    both = [*rows("glue[mnli]", 1), *rows("glue[/qnli]", 1)]
    data = write_jsonl(tmp_path / "rows[x].jsonl", both)
    shown = run("eval", copy, "--data", data)
    assert shown.code == 0, shown.err
    for name in ("glue[mnli]", "glue[/qnli]", "a[b] on rows[x].jsonl"):
        assert name in shown.out
    assert "a[b]" in run("info", copy).out
    (tmp_path / "text[y].txt").write_text("the capital of france is paris " * 9)
    running = ("eval", "base", "--lm", lm, "--data", tmp_path / "text[y].txt", "--chunk")
    _refused(run(*running, 100_000), "--chunk 100000: with its prompt the LM reads")
    text = run(*running, 9)
    assert "base on text[y].txt: perplexity" in text.out


def test_train_shows_paths_with_brackets(run: Command, recipe: Path) -> None:
    named = Path(shutil.copy(recipe, recipe.with_name("recipe[z].yaml")))
    assert "recipe[z].yaml: valid" in run("train", named, "--dry-run").out
    done = run("train", named, "--out", "out[/z]")
    assert done.code == 0, done.err
    assert "saved out[/z]: " in done.out


# -- skills that must not load -----------------------------------------------------------


@pytest.fixture
def verbs(data: Path) -> list[list[object]]:
    return [
        ["eval", "SKILL", "--data", data, "--json", "out.json"],
        ["generate", "--skill", "SKILL", "--text", "x", "--json", "out.json"],
    ]


def _all_refuse(run: Command, verbs: list[list[object]], skill: Path, *parts: object) -> None:
    for verb in verbs:
        _refused(run(*(skill if part == "SKILL" else part for part in verb)), *parts)
    assert list(Path.cwd().iterdir()) == []


def test_a_skill_for_another_lm_is_refused(
    run: Command, verbs: list[list[object]], skill: Path, tmp_path: Path
) -> None:
    other = save_tiny_lm(tmp_path / "other", seed=1)
    bound = json.loads((skill / FILE).read_text())["lm"]["fingerprint"]
    fingerprint = load_lm(str(other), dtype="float32").fingerprint
    _all_refuse(run, [[*v, "--lm", other] for v in verbs], skill, bound, fingerprint)


@pytest.mark.parametrize("how", ["truncated", "edited", "missing", "json"])
def test_a_damaged_skill_is_refused(
    how: str, run: Command, verbs: list[list[object]], skill: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(skill, tmp_path / "damaged"))
    tensors = copy / TENSORS
    content = tensors.read_bytes()
    if how == "truncated":
        tensors.write_bytes(content[:-7])
    elif how == "edited":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "missing":
        tensors.unlink()
    else:
        (copy / FILE).write_text("{")
    named = copy / FILE if how == "json" else tensors
    _all_refuse(run, verbs, copy, f"{named}: ")
    _refused(run("info", copy, "--json", "out.json"), f"{named}: ")


def test_a_skill_that_is_none_is_refused(
    run: Command, verbs: list[list[object]], tmp_path: Path
) -> None:
    _all_refuse(run, verbs, tmp_path / "nothing", "no such skill folder")
    (tmp_path / "nothing").mkdir()
    _all_refuse(run, verbs, tmp_path / "nothing", "not a (finished) skill")


# -- generate ----------------------------------------------------------------------------


def test_generate_streams_what_json_holds(run: Command, skill: Path, lm: Path) -> None:
    arguments = ("generate", "--skill", skill, "--text", "north question 1", "--json", "r.json")
    first = run(*arguments, "--max-new-tokens", 12)
    assert first.code == 0, first.err
    found = json.loads(Path("r.json").read_text())
    assert found["input"] == "north question 1"
    assert len(found["outputs"]) == 1
    assert first.out == found["outputs"][0]["text"] + "\n"
    assert run(*arguments, "--max-new-tokens", 12).out == first.out


@pytest.mark.parametrize("asked", [["--json", "-"], ["--json=-"]])
def test_json_may_go_to_standard_output(run: Command, skill: Path, asked: list[str]) -> None:
    """Then nothing else does, and no file of that name is written."""
    result = run("generate", "--skill", skill, "--text", "north question 1", *asked)
    assert result.code == 0, result.err
    text = json.loads(result.out)["outputs"][0]["text"]
    assert text + "\n" in result.err
    shown = run("info", skill, *asked)
    assert json.loads(shown.out)["trained_parameters"] > 0
    assert "trained" in shown.err
    assert not Path("-").exists()


def test_sampling_is_reproducible_by_its_seed(run: Command, skill: Path) -> None:
    def sample(seed: int, n: int = 3) -> list[str]:
        result = run(
            "generate", "--skill", skill, "--text", "north question 1", "--n", n,
            "--temperature", 1.0, "--seed", seed, "--max-new-tokens", 6, "--json", "r.json",
        )  # fmt: skip
        assert result.code == 0, result.err
        return [o["text"] for o in json.loads(Path("r.json").read_text())["outputs"]]

    assert sample(1) == sample(1)
    assert len(set(sample(1))) > 1
    assert sample(1) != sample(2)
    assert sample(1, n=1) == sample(1)[:1]


def test_generate_answers_a_file(run: Command, skill: Path, lm: Path, tmp_path: Path) -> None:
    values = [{"input": f"question {i}", "id": i, "note": "é"} for i in range(3)]
    given = write_jsonl(tmp_path / "in.jsonl", values)
    arguments = ("generate", "--skill", skill, "--input", given, "--max-new-tokens", 5)
    assert run(*arguments, "--output", "a.jsonl", "--n", 2, "--temperature", 0.9).code == 0
    assert run(*arguments, "--output", "b.jsonl", "--n", 2, "--temperature", 0.9).code == 0
    assert Path("a.jsonl").read_bytes() == Path("b.jsonl").read_bytes()
    written = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    for row, value in zip(written, values, strict=True):
        assert {k: row[k] for k in value} == value
        assert [set(o) for o in row["outputs"]] == [{"text", "logprob", "finish"}] * 2
    # One text alone gets the answer it gets in a file.
    assert run(*arguments, "--output", "c.jsonl").code == 0
    alone = run("generate", "--skill", skill, "--text", "question 2", "--max-new-tokens", 5)
    last = json.loads(Path("c.jsonl").read_text().splitlines()[2])
    assert alone.out == last["outputs"][0]["text"] + "\n"


def test_generate_renders_tasks_with_the_skills_templates(
    run: Command, skill: Path, lm: Path, tmp_path: Path
) -> None:
    loaded, _ = load_skill(skill, load_lm(str(lm), dtype="float32"), load_encoder)
    save_skill(loaded, tmp_path / "named", Templates({"north": ["N: {{ input }}?"]}), {})
    arguments = ("generate", "--skill", tmp_path / "named", "--max-new-tokens", 5)
    rendered = run(*arguments, "--text", "x", "--task", "north", "--json", "r.json")
    assert rendered.code == 0, rendered.err
    assert json.loads(Path("r.json").read_text())["input"] == "N: x?"
    assert run(*arguments, "--text", "N: x?").out == rendered.out
    _refused(run(*arguments, "--text", "x", "--task", "nroth"), "did you mean 'north'?")


def test_generate_renders_options_as_eval_does(
    run: Command, skill: Path, lm: Path, tmp_path: Path
) -> None:
    templates = tmp_path / "t.yaml"
    templates.write_text(
        "t: ['{{ input }}{% if options %} of {{ options|join(\"/\") }}{% endif %}?']"
    )
    values = [{"task": "t", "input": "x", "options": ["p", "q"]}, {"task": None, "input": "y"}]
    given = write_jsonl(tmp_path / "in.jsonl", values)
    arguments = ("generate", "--skill", skill, "--max-new-tokens", 5)
    written = ("--input", given, "--output", "o.jsonl", "--templates", templates)
    assert run(*arguments, *written).code == 0
    first, second = map(json.loads, Path("o.jsonl").read_text().splitlines())
    for text, row in (("x of p/q?", first), ("y", second)):
        assert run(*arguments, "--text", text).out == row["outputs"][0]["text"] + "\n"
    write_jsonl(given, [{"task": "t", "input": "x", "options": "p"}])
    _refused(run(*arguments, *written), "in.jsonl:1: 'options' must be a list of texts")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give either --text or --input"),
        (["--text", "x", "--input", "in.jsonl", "--output", "o"], "give either --text or --input"),
        (["--input", "in.jsonl"], "--input and --output go together"),
        (["--text", "x", "--output", "o.jsonl"], "--input and --output go together"),
        (["--text", " "], "--text is empty"),
        (["--text", "x", "--top-p", "0"], "top-p"),
        (["--text", "x", "--stop", ""], "--stop: "),
        (["--text", "caf\udce9"], "--text is not valid UTF-8"),
        (["--input", "half.jsonl", "--output", "o"], "half.jsonl:1: the row holds half a surrog"),
        (["--input", "note.jsonl", "--output", "o"], "note.jsonl:1: the row holds half a surrog"),
        (["--input", "nothing.jsonl", "--output", "o"], "nothing.jsonl: no such file"),
        (["--input", "bad.jsonl", "--output", "o"], "bad.jsonl:2: not valid JSON"),
        (["--input", "noinput.jsonl", "--output", "o"], "noinput.jsonl:1: each line needs"),
        (["--input", "empty.jsonl", "--output", "o"], "empty.jsonl: is empty"),
        (["--text", "x", "--json", "in.jsonl/r.json"], "in.jsonl/r.json: cannot write"),
    ],
)
def test_generate_refuses(arguments: list[str], reason: str, run: Command, skill: Path) -> None:
    Path("in.jsonl").write_text('{"input": "a"}\n')
    Path("bad.jsonl").write_text('{"input": "a"}\n{"input"\n')
    Path("noinput.jsonl").write_text('{"text": "a"}\n')
    Path("empty.jsonl").write_text("")
    Path("half.jsonl").write_text('{"input": "abc \\ud800 x"}\n')
    Path("note.jsonl").write_text('{"input": "abc", "note": "\\ud800"}\n')
    _refused(run("generate", "--skill", skill, *arguments), reason)
    assert len(list(Path.cwd().iterdir())) == 6


def test_generate_names_the_row_that_is_too_long(run: Command, skill: Path) -> None:
    given = write_jsonl(Path("in.jsonl"), [{"input": "a"}, {"input": "too long " * WINDOW}])
    arguments = ("generate", "--skill", skill, "--input", given, "--output", "o.jsonl")
    _refused(run(*arguments), "in.jsonl:2: ('too long", "truncation")
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["in.jsonl"]
    assert run(*arguments, "--keep", "start", "--max-new-tokens", 2).code == 0
    assert len(Path("o.jsonl").read_text().splitlines()) == 2
    _refused(run("generate", "--skill", skill, "--text", "too long " * WINDOW), "truncation")


def test_generate_goes_on_from_what_it_kept(
    run: Command, skill: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered is not asked again, whatever became of the file's other rows."""
    given, few = Path("in.jsonl"), ("--max-new-tokens", 5, "--n", 2, "--temperature", 0.9)
    arguments = ("generate", "--skill", skill, "--input", given, *few)
    write_jsonl(given, [{"input": f"question {i}"} for i in range(5)])
    assert run(*arguments, "--output", "whole.jsonl").code == 0

    asked: list[list[str]] = []
    real = Skill.generate

    def stopped(self: Skill, texts: Sequence[str], *rest: Any, **named: Any) -> Any:
        asked.append(list(texts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, texts, *rest, **named)

    monkeypatch.setattr(Skill, "generate", stopped)
    monkeypatch.setattr("shoulders.cli.generate.TOGETHER", 4)
    mine = (*arguments, "--output", "o.jsonl")
    result = run(*mine)
    assert (result.code, Path("o.jsonl").exists()) == (130, False)
    assert "o.jsonl.answered: keeps 4 answers; --resume goes on" in " ".join(result.err.split())
    _refused(run(*mine), "o.jsonl.answered: holds the answers of a run that was stopped")
    other = run(*mine, "--seed", 1, "--keep", "start", "--resume")
    _refused(other, "o.jsonl.answered: its answers were asked for with another keep, seed")
    with Path("o.jsonl.answered").open("a") as file:
        file.write('{"text": "quest')  # as a kill in the midst of writing leaves it
    write_jsonl(given, [{"input": f"question {i}", "id": i} for i in (5, 0, 1, 2, 3, 4, 0)])
    del asked[:]
    note = skill / "notes.txt"  # of a skill's folder, what it answers with counts alone
    note.write_text("mine")
    assert run(*mine, "--resume").code == 0
    note.unlink()
    assert asked == [["question 5", "question 4"]]
    assert sorted(p.name for p in Path.cwd().iterdir()) == ["in.jsonl", "o.jsonl", "whole.jsonl"]

    def outputs(name: str) -> dict[str, Any]:
        rows = map(json.loads, Path(name).read_text().splitlines())
        return {row["input"]: [o["text"] for o in row["outputs"]] for row in rows}

    assert {k: v for k, v in outputs("o.jsonl").items() if k != "question 5"} == outputs(
        "whole.jsonl"
    )
    assert [json.loads(x)["id"] for x in Path("o.jsonl").read_text().splitlines()] == [
        5, 0, 1, 2, 3, 4, 0
    ]  # fmt: skip


def test_several_greedy_answers_are_refused(run: Command, skill: Path) -> None:
    result = run("generate", "--skill", skill, "--text", "hello", "--n", 2)
    _refused(result, "--n 2: without --temperature all answers are the same one")


def test_answers_are_kept_where_the_output_cannot_be_written(
    run: Command, skill: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise ShouldersError("o.jsonl: cannot write: No space left on device")

    given = write_jsonl(Path("in.jsonl"), [{"input": f"question {i}"} for i in range(3)])
    arguments = ("generate", "--skill", skill, "--input", given, "--output", "o.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr("shoulders.cli.generate.write_answers", full)
        result = run(*arguments)
    _refused(result, "No space left")
    assert "o.jsonl.answered: keeps 3 answers" in result.err
    monkeypatch.delattr("shoulders.skills.skill.Skill.generate")
    assert run(*arguments, "--resume").code == 0
    assert len(Path("o.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("verb", ["generate", "eval", "info"])
def test_outputs_do_not_replace_the_skill(verb: str, run: Command, skill: Path) -> None:
    before = (skill / FILE).read_bytes()
    given = write_jsonl(Path("rows.jsonl"), rows("north", 2))
    asked = {"generate": ("--skill", skill, "--text", "x"), "eval": (skill, "--data", given)}
    _refused(run(verb, *asked.get(verb, (skill,)), "--json", skill / FILE), "would be overwritten")
    assert (skill / FILE).read_bytes() == before


def test_letters_that_a_terminal_does_not_have_are_written_as_codes(skill: Path) -> None:
    command = [SCRIPT, "info", str(skill)]
    given = {**environment(skill.parent / "cache"), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, env=given, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"static" in done.stdout
    assert done.stdout.isascii()


# -- info --------------------------------------------------------------------------------


def test_info_on_a_skill(run: Command, skill: Path) -> None:
    result = run("info", skill, "--json", "r.json")
    assert result.code == 0, result.err
    facts, stored = json.loads(Path("r.json").read_text()), json.loads((skill / FILE).read_text())
    assert facts["lm_fingerprint"] == stored["lm"]["fingerprint"]
    assert facts["prompt"]["kind"] == "static"
    assert facts["trained_parameters"] == stored["trained_parameters"] == 4 * 32
    assert facts["provenance"] == stored["provenance"]
    assert stored["lm"]["fingerprint"] in result.out


def test_info_on_an_lm(run: Command, lm: Path) -> None:
    result = run("info", "--lm", lm, "--json", "r.json")
    assert result.code == 0, result.err
    facts = json.loads(Path("r.json").read_text())
    assert facts["lm_fingerprint"] == load_lm(str(lm), dtype="float32").fingerprint
    assert facts["window"] == WINDOW
    assert Path(facts["weights"]) == lm
    assert facts["trained_parameters"] == 0


def test_libraries_draw_no_bars_into_logs() -> None:
    script = (
        "from shoulders.cli.common import quiet_imports; quiet_imports();"
        "from tqdm.auto import tqdm; print(sum(tqdm(range(3))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("3\n", "")


# -- serve -------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Serve nobody: what would have been served on is noted."""
    uvicorn = pytest.importorskip("uvicorn")
    found: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda _, sockets=None: found.append(sockets))
    before = signal.getsignal(signal.SIGTERM)
    yield found
    signal.signal(signal.SIGTERM, before)
    for one in [one for sockets in found for one in sockets or ()]:
        one.close()


def test_serve_takes_no_two_skills_of_one_name(run: Command, served: list[Any]) -> None:
    for path in ("a/skill", "b/skill"):
        Path(path).mkdir(parents=True)
    result = run("serve", "--skills", "a/skill", "--skills", "b/skill")
    _refused(result, "a/skill and b/skill are both named 'skill'", "NAME=FOLDER")
    _refused(run("serve", "--skills", "x=a/skill", "--skills", "x=b/skill"), "named 'x'")
    assert not served


def test_serve_takes_folders_whose_path_holds_an_equals_sign(
    run: Command, served: list[Any], skill: Path
) -> None:
    folder = shutil.copytree(skill, Path("runs", "lr=0.1", "skill"))
    result = run("serve", "--skills", folder, "--skills", f"x={folder}", "--port", 0)
    assert result.code == 0, result.err
    assert "skill, x on http" in result.err
    assert len(served) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_serve_tells_the_free_port_that_it_takes(
    run: Command, served: list[Any], lm: Path, host: str
) -> None:
    result = run("serve", "--lm", lm, "--host", host, "--port", 0)
    assert result.code == 0, result.err
    (sockets,) = served
    (port,) = {one.getsockname()[1] for one in sockets}
    assert f"on http://{host}:{port}/v1, a playground on http://{host}:{port}/" in result.err
    socket.create_connection((host, port), timeout=10).close()


def test_serve_refuses_a_port_in_use_before_it_reads_the_lm(
    run: Command, served: list[Any]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        _refused(run("serve", "--lm", "no/such/lm", "--port", port), f"--port {port}", "in use")
    _refused(run("serve", "--host", "no.such.host.invalid"), "no.such.host.invalid")
    assert not served


def test_serve_does_not_say_that_it_serves_on_a_port_that_another_took(
    run: Command, served: list[Any], lm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two may bind a port; one can listen."""
    bound = listening.bound
    others: list[socket.socket] = []

    def late(host: str, port: int) -> list[socket.socket]:
        found = bound(host, port)
        others.extend(bound(host, found[0].getsockname()[1]))
        others[0].listen()
        return found

    monkeypatch.setattr(listening, "bound", late)
    result = run("serve", "--lm", lm, "--port", 0)
    _refused(result, f"--port {others[0].getsockname()[1]}", "in use")
    others[0].close()
    assert not served


def test_a_key_file_may_begin_with_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"\xef\xbb\xbf" + "schlüssel\r\n".encode())
    assert key_of(file, "--api-key-file") == "schlüssel"
    for content, why in ((b"\xef\xbb\xbf\n", "holds no key"), ("ü".encode("latin-1"), "UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ShouldersError, match=why):
            key_of(file, "--api-key-file")
