"""What `shoulders bench` counts, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shoulders.benchmark.contender import Contender, by_turns, measured, median
from shoulders.benchmark.limits import layer_shapes, product_of, step_operations
from shoulders.benchmark.rows import benchmark_rows
from shoulders.benchmark.train import TrainBenchmark, contenders, summary
from shoulders.errors import ShouldersError
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.kernels import available
from tiny_models import environment, save_tiny_lm, write_jsonl


# GPT-2's positions are a table, not a product.
@pytest.mark.parametrize(("arch", "matrices"), [("llama", 7), ("qwen2", 7), ("gpt2", 4)])
def test_operations_are_those_that_torch_counts(
    arch: str, matrices: int, tiny_lm: Callable[[str], FrozenLM]
) -> None:
    lm = tiny_lm(arch)
    ids = torch.arange(2, 19)[None]
    x = lm.embed(ids).detach().requires_grad_()
    positions = torch.arange(17)[None]
    assert (lm.blocks is None) == (arch == "gpt2")  # tried before their first use: no part of it
    counter = FlopCounterMode(display=False)
    with counter:
        hidden = lm.hidden(x, torch.ones_like(ids), positions)
        lm.logits(hidden[0, -3:]).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op))
    assert step_operations(lm, 17, 0, 3) == products
    assert len(layer_shapes(lm)) == matrices * 3


def test_pairs_are_counted_for_every_head_and_layer(tiny_lm: Callable[[str], FrozenLM]) -> None:
    lm = tiny_lm("llama")  # 3 layers, 4 heads of 8
    # scores and reading, two operations each: forwards once, backwards twice
    assert step_operations(lm, 0, 10, 0) == 10 * 3 * 4 * 8 * (2 + 2) * 3


def test_contenders_run_by_turns_and_failures_are_named() -> None:
    from rich.console import Console

    code = "import json, time; print('log'); print(json.dumps({'t': time.time()}))"
    several = [Contender(name, [sys.executable, "-c", code]) for name in ("a", "b")]
    results = by_turns(several, 2, Console(quiet=True))
    order = sorted((run["t"], name) for name, runs in results.items() for run in runs)
    assert [name for _, name in order] == ["a", "b", "a", "b"]
    assert median(results["a"], "t") == pytest.approx(sum(r["t"] for r in results["a"]) / 2)
    with pytest.raises(ShouldersError, match="benchmark bad failed: ValueError: broken"):
        measured(Contender("bad", [sys.executable, "-c", "raise ValueError('broken')"]))
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(ShouldersError, match="benchmark big was ended by SIGKILL"):
        measured(Contender("big", [sys.executable, "-c", killed]))
    chatty = "print('hello'); print('{\"t\": 1}'); print('{so long}')"
    assert measured(Contender("chatty", [sys.executable, "-c", chatty])) == {"t": 1}


@pytest.mark.parametrize(("stopped_in", "kept"), [(1, None), (2, 1), (3, 2)])
def test_what_is_stopped_keeps_the_rounds_that_had_ended(
    stopped_in: int, kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    taken: list[str] = []

    def one(contender: Contender) -> dict[str, int]:
        taken.append(contender.name)
        if len(taken) == 2 * stopped_in:  # in the second contender's turn
            raise KeyboardInterrupt
        return {"run": len(taken)}

    monkeypatch.setattr("shoulders.benchmark.contender.measured", one)
    several = [Contender("a", []), Contender("b", [])]
    if kept is None:
        with pytest.raises(KeyboardInterrupt):
            by_turns(several, 5, Console(quiet=True))
        return
    results = by_turns(several, 5, Console(quiet=True))
    assert {name: len(runs) for name, runs in results.items()} == {"a": kept, "b": kept}


def test_lora_is_measured_in_both_precisions_and_counts_at_its_best(tmp_path: Path) -> None:
    settings = TrainBenchmark(
        lm=str(tmp_path), dtypes=["int8"], kinds=["static"], rows_per_step=4, length=3, runs=1,
        peers=tmp_path,
    )  # fmt: skip
    commands = {one.name: list(one.command) for one in contenders(settings, tmp_path / "rows")}
    for name, precision in (("peft_lora", "float32"), ("peft_lora_bf16", "bfloat16")):
        told = commands[name]
        assert told[told.index("--variant") + 1] == "lora"
        given = told[told.index("--dtype") + 1] if "--dtype" in told else "float32"
        assert given == precision
    figures = {"share_of_limit": 0.5}
    speeds = dict.fromkeys(commands, 10.0) | {"peft_lora_bf16": 40.0, "static int8": 80.0}
    methods = {name: {"real_tokens_per_s": v, **figures} for name, v in speeds.items()}
    result = summary(settings, methods, {"limit_samples": {"float32": [1.0, 1.0]}}, 8)
    assert result["ratios"]["lora"] == 2.0


def test_the_int8_limit_is_that_of_the_products_an_int8_lm_runs_on() -> None:
    kernels = available()
    if kernels is None or kernels.int8 is None:
        pytest.skip("this processor has no products of packed int8")
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (5, 64), dtype=torch.int8, generator=random)
    weight = torch.randint(-127, 128, (192, 64), dtype=torch.int8, generator=random)
    measured = product_of(x, weight)
    assert measured.func == kernels.int8.product
    assert torch.equal(measured(), x.int() @ weight.int().T)
    odd = torch.randint(-127, 128, (7, 64), dtype=torch.int8, generator=random)  # fits no panel
    assert torch.equal(product_of(x, odd)(), x.int() @ odd.int().T)


def test_rows_are_the_demos_or_a_users(tmp_path: Path) -> None:
    own = benchmark_rows(None, None, 24)
    assert len(own) == 24
    assert own == benchmark_rows(None, None, 24)
    assert all(r["text"].startswith(r["input"]) and r["answer"].strip() for r in own)
    file = write_jsonl(tmp_path / "r.jsonl", [{"task": "t", "input": "hot", "target": "cold"}])
    (row,) = benchmark_rows(file, None, 1)
    assert (row["text"], row["answer"]) == ("hot\nAnswer:", " cold")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "figure"),
    [("train", "real_tokens_per_s"), ("generate", "new_tokens_per_s")],
)
def test_bench_from_the_command_line(what: str, figure: str, tmp_path: Path) -> None:
    lm, file = save_tiny_lm(tmp_path / "lm"), tmp_path / "bench.json"
    data = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"task": "t", "input": f"number {i}", "target": "two"} for i in range(9)],
    )
    command = [sys.executable, "-m", "shoulders", "bench", what, "--lm", str(lm), "--no-peers"]
    command += ["--data", str(data), "--runs", "1", "--length", "3", "--json", str(file)]
    command += ["--kind", "static", "--kind", "static_kv", "--dtype", "int8"]
    command += ["--rows-per-step", "4"] if what == "train" else ["--rows", "5"]
    subprocess.run(command, env=environment(tmp_path / "cache"), check=True, capture_output=True)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert set(result["methods"]) == {"static int8", "static_kv int8"}
    assert result[figure] == result["methods"]["static int8"][figure] > 0
    assert result["share_of_limit"] > 0
    assert result["ratios"] == {}
    assert set(result["limit_operations_per_s"]) == {"float32", "bfloat16", "int8"}
    assert all(len(several) == 1 for several in result["limit_samples"].values())
    peaks = [entry["peak_rss_bytes"] for entry in result["methods"].values()]
    assert all(2**26 < peak < 2**31 for peak in peaks)


def test_missing_peers_and_unknown_kinds_are_named(tmp_path: Path) -> None:
    for extra, said in (
        (["--peers", str(tmp_path)], "peft_train.py: not found"),
        (["--kind", "magic", "--no-peers"], "--kind magic: use one of idpt"),
        (["--dtype", "int3", "--no-peers"], "--dtype int3: use one of auto"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "shoulders", "bench", "train", *extra],
            env=environment(tmp_path / "cache"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert said in " ".join(done.stderr.split())
