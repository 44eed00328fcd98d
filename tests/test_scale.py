"""`benchmarks/scale.py` on few passages: every figure is there, and what must agree does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILDS = ("sparse_build", "bm25s_build", "engine_build", "vectors", "approximate_build")
SERVES = (
    *("sparse_serve", "bm25s_serve", "engine_serve"),
    *("dense_serve", "product", "approximate_serve"),
)


@pytest.mark.slow
def test_scale_of_few_passages(tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    if not Path("/proc/self/status").is_file():
        pytest.skip("the benchmark reads memory from /proc")
    out = tmp_path / "scale.json"
    subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/scale.py", "--passages", "3000"),
            *("--queries", "20", "--encoded", "8", "--out", out),
        ],
        check=True,
        timeout=900,
    )
    result = json.loads(out.read_text())
    assert result["machine"]["processor"]
    assert result["versions"]["tantivy"]
    assert result["setting"]["seed"] == 0
    assert result["setting"]["passages"] == result["setting"]["vectors"] == 3000
    parts = result["parts"]
    there = [name for name in (*BUILDS, *SERVES) if name in parts]
    assert {*BUILDS, *SERVES} - {*there} <= {"engine_build", "engine_serve"}
    for part in parts.values():
        assert 0 < part["peak_rss_without_files"] < part["peak_rss"] < 8e9
    for name in set(BUILDS) & set(there):
        assert parts[name]["passages"] == 3000
        assert parts[name]["passages_per_second"] > 0
        assert parts[name]["seconds"] > 0
    # Texts are stored once and compressed; a vector of 384 halves, an id.
    assert 300 < parts["sparse_build"]["bytes_per_passage"] < 2000
    assert 776 < parts["vectors"]["bytes_per_passage"] < 790
    assert 48 < parts["approximate_build"]["bytes_per_passage"] < 400
    for name in set(SERVES) & set(there):
        spread = parts[name]["milliseconds"]
        assert parts[name]["queries"] == 20
        assert 0 < spread["p50"] <= spread["p95"] <= spread["p99"]
        assert parts[name]["queries_per_second"] > 0
    assert parts["encoder"]["passages_per_second"] > 0
    agreement = result["agreement"]
    assert agreement["sparse_with_bm25s_at_100"] > 0.9
    assert agreement.get("sparse_with_engine_at_100", 1) > 0.9
    assert agreement["exact_with_product_at_100"] > 0.99
    assert agreement["approximate_recall_at_10"] > 0.7
    assert agreement["approximate_recall_at_100"] > 0.7


@pytest.mark.slow
def test_a_part_that_takes_too_much_memory_is_stopped(tmp_path: Path) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("the benchmark reads memory from /proc")
    out = tmp_path / "scale.json"
    run = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks/scale.py", "--passages", "2000"),
            *("--groups", "sparse", "--memory", "0.1", "--out", out),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "failed: sparse_build" in run.stderr
    parts = json.loads(out.read_text())["parts"]
    assert parts["sparse_build"] == {"failed": "took more than 0.1 GB of memory"}
