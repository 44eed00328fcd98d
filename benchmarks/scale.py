"""How large an index gets, how fast it is built and asked, at a million synthetic passages.

    .venv/bin/python benchmarks/scale.py --folder runs/scale

Passages of 100 words by Zipf's law, written as DPR's table. Sparse: our own index, beside bm25s
used directly and LanceDB. Dense: vectors of 384 dimensions in clusters, float16, instead of an
encoder's (MiniLM alone would take hours for a million passages; its speed is measured on a few);
exact and approximate, beside a plain product with a matrix in memory. Every part runs in a process
of its own, which is killed above `--memory`. Linux only (`/proc`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shoulders.files import write_json
from shoulders.machine import machine
from synthetic import DIMENSIONS, QUESTION_WORDS, VOCABULARY, WORDS

ROOT = Path(__file__).parents[1]
GROUPS = {
    "sparse": ("sparse_build", "sparse_serve"),
    "bm25s": ("bm25s_build", "bm25s_serve"),
    "engine": ("engine_build", "engine_serve"),
    "dense": ("vectors", "dense_serve", "product", "approximate_build", "approximate_serve"),
    "encoder": ("encoder",),
}
NATURAL = ROOT.parent / "shared/data/nq/passages.tsv"  # numbered words are many tokens each
LIBRARIES = ("tantivy", "faiss-cpu", "numpy", "torch", "bm25s", "lancedb")


def main() -> None:
    """Run the parts one after the other and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--vectors", type=int, help="by default as many as passages")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--queries", type=int, default=500, help="of each measurement, at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement, at most")
    parser.add_argument("--encoded", type=int, default=256, help="passages for the encoder")
    parser.add_argument("--encoded-table", type=Path, default=NATURAL, help="they are from here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=8.0, help="GB that a part may take")
    parser.add_argument("--minutes", type=float, default=600, help="after which no part begins")
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    parser.add_argument("--resume", action="store_true", help="only what --out does not have yet")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scale.json")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="scale-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = measured(folder, options)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)
    print(markdown(result))
    over = [name for name, part in result["parts"].items() if "failed" in part]
    if over:
        sys.exit(f"failed: {', '.join(over)}")


def measured(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run every part and compare what they found."""
    setting = {
        "folder": str(folder),
        "passages": options.passages,
        "vectors": options.vectors or options.passages,
        "seed": options.seed,
        "queries": options.queries,
        "seconds_per_measurement": options.seconds,
        "encoded": options.encoded,
        "encoded_table": os.path.relpath(options.encoded_table)
        if options.encoded_table.is_file()
        else None,
    }
    (folder / "setting.json").write_text(json.dumps(setting))
    began, load = time.monotonic(), os.getloadavg()
    names = ["source", *(name for group in options.groups for name in GROUPS[group])]
    if importlib.util.find_spec("lancedb") is None:
        names = [name for name in names if not name.startswith("engine")]
    if not options.resume:
        for old in ("index", "lance"):
            shutil.rmtree(folder / old, ignore_errors=True)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine()
        | {
            "processors": len(os.sched_getaffinity(0)),
            "niceness": os.nice(0),
            "load_average_before": load,
        },
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "setting": {name: value for name, value in setting.items() if name != "folder"}
        | {"words": WORDS, "vocabulary": VOCABULARY, "question_words": QUESTION_WORDS}
        | {"dimensions": DIMENSIONS, "k": 100, "memory_limit_gb": options.memory},
        "parts": {},
    }
    spent = 0.0
    if options.resume:
        earlier = json.loads(options.out.read_text())
        if earlier["setting"] != result["setting"]:
            sys.exit(f"{options.out}: of another setting; leave out --resume")
        spent = earlier["seconds"]
        result |= {name: earlier[name] for name in ("date", "machine", "versions")}
        result |= {name: earlier[name] for name in ("seconds", "agreement")}
        result["parts"] = {n: part for n, part in earlier["parts"].items() if "failed" not in part}
        names = [name for name in names if name not in result["parts"]]
    for name in names:
        if time.monotonic() - began > 60 * options.minutes:
            result["parts"][name] = {"failed": f"not begun after {options.minutes:g} minutes"}
            continue
        result["parts"][name] = run(name, folder, options.memory * 1e9)
        print(f"{name}: {json.dumps(result['parts'][name])}", file=sys.stderr)
        result["seconds"] = spent + time.monotonic() - began
        result["machine"]["load_average_after"] = os.getloadavg()
        result["agreement"] = agreement(folder, list(result["parts"]))
        write_json(options.out, result)  # each time: for one who stops it
    return result


def run(name: str, folder: Path, limit: float) -> dict[str, Any]:
    """Run a part in a process of its own; kill it where it takes more memory than the limit."""
    script = Path(__file__).with_name("scale_parts.py")
    output, errors = folder / f"{name}.json", folder / f"{name}.log"
    with output.open("w") as out, errors.open("w") as log:
        child = subprocess.Popen(
            [sys.executable, script, name, folder / "setting.json"], stdout=out, stderr=log
        )
        own, pause = 0, 0.02
        while child.poll() is None:
            rss, anonymous = memory(child.pid)
            own = max(own, anonymous)
            if rss > limit:
                child.kill()
                child.wait()
                return {"failed": f"took more than {limit / 1e9:g} GB of memory"}
            time.sleep(pause)
            pause = min(pause * 1.2, 0.25)
    if child.returncode:
        said = errors.read_text().strip().splitlines() or [""]
        return {"failed": f"ended with {child.returncode}: {said[-1]}"}
    facts = json.loads(output.read_text().splitlines()[-1])
    # Without the pages of mapped files, which the system takes back when it needs them.
    return {**facts, "peak_rss_without_files": own}


def memory(process: int) -> tuple[int, int]:
    """Return a process's resident bytes, and those of them that no file backs."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return tuple(int(fields.get(n, "0").split()[0]) * 1024 for n in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def agreement(folder: Path, names: list[str]) -> dict[str, float]:
    """Return how much of what one way found another found as well, on average over questions."""
    results = {}
    for name, (part, base) in {
        "sparse_with_bm25s_at_100": ("sparse", "bm25s"),
        "sparse_with_engine_at_100": ("sparse", "engine"),
        "exact_with_product_at_100": ("exact", "product"),
        "approximate_recall_at_10": ("approximate", "exact"),
        "approximate_recall_at_100": ("approximate", "exact"),
    }.items():
        files = [folder / f"found-{which}.json" for which in (part, base)]
        parts = {"exact": "dense_serve", "product": "product"}
        if all(parts.get(w, f"{w}_serve") in names for w in (part, base)) and all(
            f.is_file() for f in files
        ):
            k = int(name.rsplit("_", 1)[1])
            rows = zip(*(json.loads(f.read_text()) for f in files), strict=False)
            results[name] = float(
                np.mean([len({*a[:k]} & {*b[:k]}) / len(b[:k]) for a, b in rows if b])
            )
    return results


def _version(name: str) -> str | None:
    try:
        return version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def markdown(result: dict[str, Any]) -> str:
    """Return the figures as a table."""
    lines = ["| part | time | passages/s | peak RSS | B/passage | queries/s | p50 / p95 / p99 ms |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, part in result["parts"].items():
        if "failed" in part:
            lines.append(f"| {name} | {part['failed']} |")
            continue
        spread = part.get("milliseconds", {})
        cells = [
            f"{part['seconds']:.0f} s" if "seconds" in part else "",
            f"{part['passages_per_second']:,.0f}" if "passages_per_second" in part else "",
            f"{part['peak_rss'] / 1e9:.2f} GB",
            f"{part['bytes_per_passage']:.0f}" if "bytes_per_passage" in part else "",
            f"{part['queries_per_second']:.1f}" if "queries_per_second" in part else "",
            " / ".join(f"{value:.1f}" for value in spread.values()),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"{name}: {value:.3f}" for name, value in result["agreement"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
