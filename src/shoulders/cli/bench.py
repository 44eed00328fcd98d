"""`shoulders bench train|generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from shoulders.cli.common import check_outputs, emit_json, quiet_libraries, stderr, stdout
from shoulders.errors import InterruptedBenchmark, ShouldersError

app = typer.Typer(
    help="Measure training or generation: tokens per second, share of this machine's limit, "
    "and how that compares with other libraries in the same run.",
    no_args_is_help=True,
)

_Data = Annotated[
    Path | None, typer.Option(help="JSONL or Parquet rows. Default: the demo's tasks.")
]
_Templates = Annotated[Path | None, typer.Option(help="Templates for --data (YAML).")]
_LM = Annotated[str, typer.Option(help="LM: embedded, Hub id, folder, .gguf.")]
_Dtype = Annotated[
    list[str] | None,
    typer.Option(help="Precision; repeatable, the first is the headline. Default: int8, float32."),
]
_Kind = Annotated[
    list[str] | None,
    typer.Option(help="Kind of prompt; repeatable. Default: static, idpt, static_kv, idpt_kv."),
]
_Length = Annotated[int, typer.Option(min=1, help="Prompt positions.")]
_Peers = Annotated[
    Path | None,
    typer.Option(help="Folder with the peers' scripts (comparisons/ of the repository)."),
]
_NoPeers = Annotated[bool, typer.Option("--no-peers", help="Measure shoulders alone.")]
_Runs = Annotated[int, typer.Option(min=1, help="Runs of each contender; medians are shown.")]
_JSON = Annotated[Path | None, typer.Option(help="Write every figure here.")]


@app.command("train")
def train(
    data: _Data = None,
    templates: _Templates = None,
    lm: _LM = "embedded",
    dtype: _Dtype = None,
    kind: _Kind = None,
    rows_per_step: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Steps in one run.")] = 2,
    length: _Length = 20,
    runs: _Runs = 5,
    peers: _Peers = None,
    no_peers: _NoPeers = False,
    json: _JSON = None,
) -> None:
    """Measure the training step against PEFT with transformers' Trainer, on the same rows."""
    from shoulders.benchmark.rows import benchmark_rows
    from shoulders.benchmark.train import TrainBenchmark, bench_train

    check_outputs(json, read=[data, templates])
    quiet_libraries()
    dtypes, kinds = _checked(dtype, kind)
    settings = TrainBenchmark(
        lm=lm,
        dtypes=dtypes,
        kinds=kinds,
        rows_per_step=rows_per_step,
        length=length,
        runs=runs,
        peers=None if no_peers else _found(peers, "peft_train.py"),
    )
    rows = benchmark_rows(data, templates, rows_per_step * steps)
    result = bench_train(settings, rows, stderr())
    emit_json(json, result)
    table = Table("", "real tokens/s", "share of limit", "times PEFT", "its best", "LoRA", "RSS")
    for name, entry in result["methods"].items():
        ratios = entry.get("ratios", {})
        table.add_row(
            name,
            f"{entry['real_tokens_per_s']:.0f}",
            f"{entry['share_of_limit']:.0%}" if "share_of_limit" in entry else "",
            *(_times(ratios.get(peer)) for peer in ("peft_default", "peft_best", "lora")),
            f"{entry['peak_rss_bytes'] / 2**30:.1f} GiB",
        )
    stdout().print(table)
    stdout().print(_limits(result["limit_operations_per_s"]))
    _whole(result["runs"], runs)


@app.command("generate")
def generate(
    data: _Data = None,
    templates: _Templates = None,
    lm: _LM = "embedded",
    dtype: _Dtype = None,
    kind: _Kind = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to answer.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written for each row.")] = 24,
    length: _Length = 20,
    batch: Annotated[int, typer.Option(min=1, help="The peer's batch size.")] = 32,
    runs: _Runs = 5,
    peers: _Peers = None,
    no_peers: _NoPeers = False,
    vllm: Annotated[
        Path | None,
        typer.Option(help="Python of an environment with vLLM: measured, too (comparisons/)."),
    ] = None,
    json: _JSON = None,
) -> None:
    """Measure generation against transformers' `generate` (and vLLM), on the same rows."""
    from shoulders.benchmark.generate import GenerateBenchmark, bench_generate
    from shoulders.benchmark.rows import benchmark_rows

    check_outputs(json, read=[data, templates])
    quiet_libraries()
    dtypes, kinds = _checked(dtype, kind)
    if vllm is not None and not vllm.is_file():
        raise ShouldersError(f"--vllm {vllm}: not found; give the Python of an environment of vLLM")
    settings = GenerateBenchmark(
        lm=lm,
        dtypes=dtypes,
        kinds=kinds,
        length=length,
        new_tokens=new_tokens,
        batch=batch,
        runs=runs,
        peers=None if no_peers else _found(peers, "hf_generate.py"),
        vllm=vllm,
    )
    result = bench_generate(settings, benchmark_rows(data, templates, rows), stderr())
    emit_json(json, result)
    table = Table("", "new tokens/s", "share of limit", "times HF", "vLLM", "RSS")
    for name, entry in result["methods"].items():
        ratios = entry.get("ratios", {})
        table.add_row(
            name,
            f"{entry['new_tokens_per_s']:.0f}",
            f"{entry['share_of_limit']:.0%}" if "share_of_limit" in entry else "",
            *(_times(ratios.get(peer)) for peer in ("hf_best", "vllm_best")),
            f"{entry['peak_rss_bytes'] / 2**30:.1f} GiB",
        )
    stdout().print(table)
    stdout().print(_limits(result["limit_operations_per_s"]))
    _whole(result["runs"], runs)


def _checked(dtype: list[str] | None, kind: list[str] | None) -> tuple[list[str], list[str]]:
    """Return what was asked for, or everything; raises for what there is not."""
    from shoulders.benchmark.train import KINDS
    from shoulders.lm.load import PRECISIONS
    from shoulders.prompts.build import producer_kinds

    for wanted in dtype or ():
        if wanted not in PRECISIONS:
            raise ShouldersError(f"--dtype {wanted}: use one of {', '.join(PRECISIONS)}")
    for wanted in kind or ():
        if wanted not in producer_kinds():
            known = ", ".join(producer_kinds())
            raise ShouldersError(f"--kind {wanted}: use one of {known}")
    return dtype or ["int8", "float32"], kind or list(KINDS)


def _found(folder: Path | None, script: str) -> Path:
    """Return the folder of the peers' scripts: as given, or beside the working folder."""
    chosen = folder or Path("comparisons")
    if not (chosen / script).is_file():
        raise ShouldersError(
            f"{chosen / script}: not found; give --peers, the folder comparisons/ of the "
            "repository, or --no-peers"
        )
    return chosen


def _whole(ended: int, runs: int) -> None:
    """Raise where Ctrl-C left some of the runs undone."""
    if ended < runs:
        raise InterruptedBenchmark(f"stopped: these figures are of {ended} of {runs} runs")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.1f}x"


def _limits(rates: dict[str, Any]) -> str:
    shown = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in rates.items())
    return (
        f"matrix products on the LM's shapes, in 10^9 operations per second: {shown}; "
        "the limit is the faster floating-point one, which int8 can exceed"
    )
