"""`shoulders index`: what it prints, writes and refuses; SIGKILL at random moments."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from shoulders.cli.app import main
from shoulders.reader.index.index import Index
from shoulders.reader.index.manifest import FILE
from shoulders.reader.index.plan import read_plan
from tiny_models import environment, save_tiny_encoder

KILLS = 20


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def shoulders(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["shoulders", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capfd.readouterr()
        code = stopped.value.code
        return Result(code if isinstance(code, int) else int(code is not None), out, err)

    return run


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.md").write_text("# Cats\n\nCats sleep for most of the day.")
    (folder / "b.txt").write_text("Dogs bark at night.")
    (folder / "scan.pdf").write_bytes(b"%PDF-1.4 nothing")
    return folder


def test_a_folder_is_indexed_grown_and_pruned(shoulders: Any, docs: Path, tmp_path: Path) -> None:
    out, facts = tmp_path / "index", tmp_path / "facts.json"
    done = shoulders("index", docs, "--out", out, "--json", facts)
    assert done.code == 0, done.err
    assert "passages; needs" in done.err.replace("\n", " ")
    assert "scan.pdf: left out: not a readable PDF" in done.err.replace("\n", " ")
    assert "bytes per passage" in done.out
    written = json.loads(facts.read_text())
    assert (written["passages"], written["retrievers"]) == (2, ["sparse"])
    assert len(written["notes"]) == 2

    more = tmp_path / "c.txt"
    more.write_text("Owls hunt mice.")
    assert shoulders("index", more, "--out", out, "--add").code == 0
    assert shoulders("index", "--out", out, "--delete", "a.md", "--delete", "b.txt#1").code == 0
    with Index(out) as index:
        assert index.sparse().search(["owls cats dogs"], 5).ids == [["c.txt#1"]]

    shown = shoulders("info", out, "--json", facts)
    assert shown.code == 0
    assert "generation" in shown.out
    assert json.loads(facts.read_text())["verified"] is True


def test_outputs_do_not_replace_documents_and_options_are_not_lost(
    shoulders: Any, docs: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "own.tsv", tmp_path / "index"
    source.write_text("id\ttext\ttitle\n1\ta b\tc\n")
    for arguments, said in (
        (("index", source, "--out", out, "--json", source), "would be overwritten"),
        (("index", docs, "--out", out, "--json", docs / "facts.json"), "among the documents"),
        (("index", source, "--out", out, "--pooling", "cls"), "--pooling is of --dense"),
        (("index", "--delete", "1", "--words", "50", "--out", out), "--delete stands alone"),
        (("index", "--abandon", "--add", "--out", out), "--abandon stands alone"),
    ):
        done = shoulders(*arguments)
        assert (done.code, said in done.err) == (2, True), done.err
    assert not out.exists()
    assert shoulders("index", source, "--out", out).code == 0
    assert "nothing is unfinished" in shoulders("index", "--abandon", "--out", out).err


def test_what_is_left_out_of_a_folder_is_told(shoulders: Any, docs: Path, tmp_path: Path) -> None:
    (docs / "c.docx").write_bytes(b"PK")
    (docs / "d.docx").write_bytes(b"PK")
    (tmp_path / "more").mkdir()
    (docs / "linked").symlink_to(tmp_path / "more")
    done = shoulders("index", docs, "--out", tmp_path / "index")
    said = " ".join(done.err.split())
    assert "left out, files of other kinds: 2 .docx" in said
    assert "'linked': left out: a link to a folder" in said


def test_refusals_are_one_line(shoulders: Any, docs: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    assert shoulders("index", docs, "--out", out).code == 0
    broken = tmp_path / "t.tsv"
    broken.write_text("id\ttext\ttitle\n1\ta\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, said in (
        ((docs, "--out", out), "an index is there; grow it with --add"),
        ((tmp_path / "none", "--out", tmp_path / "x"), "no such file or folder"),
        ((broken, "--out", tmp_path / "x"), "t.tsv:2: 2 columns, expected 3"),
        ((empty, "--out", tmp_path / "z"), "no documents in it"),
        (("--out", tmp_path / "x"), "which SOURCE?"),
        (("--out", tmp_path / "x", "--resume"), "no such folder; make one with"),
        (("--out", empty, "--resume"), "no index in this folder"),
        ((docs, "--out", out, "--add"), "a.md#1' is in the index; delete it first"),
        ((docs, "--out", out, "--add", "--dense"), "--add keeps to the encoders"),
        ((docs, "--out", out, "--delete", "x"), "--delete stands alone"),
        (("--out", out, "--delete", "nobody"), "no passage with the id 'nobody'"),
        ((docs, "--out", tmp_path / "x", "--pooling", "max"), "use mean or cls"),
        ((docs, "--out", tmp_path / "y", "--encoder", tmp_path / "no"), "not a readable local"),
    ):
        refused = shoulders("index", *arguments)
        assert refused.code == 2, arguments
        last = refused.err.strip().splitlines()[-1]
        assert last.startswith("error: "), refused.err
        assert said in last
        assert "Traceback" not in refused.err
    assert not (tmp_path / "z").exists(), "nothing was begun there"
    assert shoulders("index", docs, "--out", out, "--resume").code == 0


def test_dense_by_the_command_line(shoulders: Any, docs: Path, tmp_path: Path) -> None:
    encoder, out = save_tiny_encoder(tmp_path / "encoder"), tmp_path / "index"
    assert shoulders("index", docs, "--out", out, "--encoder", encoder).code == 0
    with Index(out) as index:
        assert len(index.retriever().search(["cats"], 5).ids[0]) == 2
    refused = shoulders("index", "--out", out, "--approximate")
    assert refused.code == 2
    assert "needs at least 1,000 passages, here are 2" in refused.err
    with Index(out) as index:
        assert len(index) == 2, "as it was"


def test_help_needs_no_library_of_readers() -> None:
    code = (
        "import sys; import shoulders.cli.app as app; "
        "print([m for m in ('tantivy', 'faiss', 'pypdf', 'selectolax', 'torch') "
        "if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def rows(first: int, last: int) -> str:
    source = random.Random(first)
    return "id\ttext\ttitle\n" + "".join(
        f"{n}\t{' '.join(f'word{source.randint(0, 300)}' for _ in range(30))}\ttitle {n % 7}\n"
        for n in range(first, last)
    )


def progress(out: Path) -> tuple[int, int, int]:
    """Return how far a change has come: generation, rows remembered, bytes of vectors."""
    plan = read_plan(out) if out.is_dir() else None
    vectors = out / "vectors.float16"
    generation = 0 if plan is None else plan.generation
    remembered = 0 if plan is None else plan.checkpoints[-1].rows
    return generation, remembered, vectors.stat().st_size if vectors.exists() else 0


@pytest.mark.slow
def test_twenty_kills_and_the_same_index(tmp_path: Path) -> None:
    encoder = save_tiny_encoder(tmp_path / "encoder")
    (tmp_path / "a.tsv").write_text(rows(0, 3000))
    (tmp_path / "b.tsv").write_text(rows(3000, 5000))
    index = [sys.executable, "-m", "shoulders", "index"]
    steps = (  # most kills where a process starts sooner: without the encoder
        ([*index, "--batch", "50", str(tmp_path / "a.tsv")], KILLS - 8),
        ([*index, "--encoder", str(encoder), "--approximate", "--batch", "100"], 4),
        ([*index, "--batch", "50", str(tmp_path / "b.tsv"), "--add"], 4),
    )
    surroundings = environment(tmp_path / "cache")

    def run(command: list[str], out: Path) -> None:
        command = [*command, "--out", str(out), "--resume"]
        subprocess.run(command, env=surroundings, check=True, capture_output=True)

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    source, seen, kills = random.Random(0), [], 0
    for number, (command, count) in enumerate(steps):
        run(command, straight)
        for kill in range(count):
            before = progress(killed)
            process = subprocess.Popen(
                [*command, "--out", str(killed), "--resume"],
                env=surroundings,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            # Some die while they load, the others soon after they have got on.
            loading = kill % 5 == 3
            until = time.monotonic() + (source.uniform(0.2, 4) if loading else 300)
            while progress(killed) == before and process.poll() is None:
                if time.monotonic() > until:
                    break
                time.sleep(0.002)
            if not loading:
                time.sleep(source.uniform(0, 0.1))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
            seen.append(progress(killed))
            if number:
                with Index(killed) as opened:  # as before, or as after
                    assert len(opened) in (3000, 5000)
        run(command, killed)
        assert (killed / FILE).exists()
    assert kills >= KILLS * 3 // 4
    assert len(set(seen)) > KILLS // 2, "they died at different moments"

    questions = [f"word{n} word{n + 1} title" for n in range(50)]
    with Index(straight) as expected, Index(killed) as found:
        assert found.manifest.content == expected.manifest.content
        assert found.manifest.rows == expected.manifest.rows == 5000
        for kind in ("sparse", "dense", "approximate", "hybrid"):
            a, b = (i.retriever(kind).search(questions, 20) for i in (expected, found))
            assert a == b, kind
    for name in ("vectors.float16", "ids.utf8", "ids.ends"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes()
    assert {p.name for p in killed.iterdir()} == {p.name for p in straight.iterdir()}


@pytest.mark.slow
def test_fifty_megabytes_in_one_line(tmp_path: Path) -> None:
    """Built in memory of a few hundred MB, measured in a process of its own."""
    (tmp_path / "docs").mkdir()
    with (tmp_path / "docs" / "one.txt").open("w") as file:
        for n in range(500_000):
            file.write(f"The number {n} is followed by {n + 1} and by many more words after it. ")
    assert (tmp_path / "docs" / "one.txt").stat().st_size > 33_000_000
    code = (
        "from shoulders.cli.app import main\n"
        "try: main()\n"
        # Not getrusage: its peak counts the process that this one was forked from.
        "finally: print('peak', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, "index", str(tmp_path / "docs"), "--out"]
    run = subprocess.run(
        [*command, str(tmp_path / "index")],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(run.stdout.split("peak")[1]) < 700_000, "kB"
    with Index(tmp_path / "index") as index:
        found = index.sparse().search(["number 123456"], 2)
        assert any("123456" in p.text for p in index.passages(found.ids[0]))
