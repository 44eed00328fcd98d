"""Load the LM: the embedded one, a Hugging Face id or folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

from shoulders.errors import LMError
from shoulders.lm.gguf import converted, embedded_gguf

Precision = Literal["auto", "float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
EMBEDDED = "embedded"


def load_lm(
    name: str = EMBEDDED,
    *,
    dtype: Precision = "auto",
    device: str | None = None,
    revision: str | None = None,
    shard: bool = False,
) -> Any:
    """Load a causal LM and freeze it.

    Args:
        name: `embedded` (SmolLM2-135M-Instruct, offline), a Hub id, a folder in Hugging
            Face format, or a `.gguf` file.
        dtype: `auto` takes bfloat16 where the hardware multiplies it faster (CUDA, AMX or
            AVX512-BF16 processors) and float32 elsewhere. `int8` rounds the linear layers'
            weights once, and activations and gradients row by row: about three times as fast
            to train on processors with VNNI, at a small loss of precision (docs/log.md).
        device: a torch device; default `cuda` where there is one, else `cpu`.
        revision: branch, tag or commit of a Hub id.
        shard: spread the layers over the processes that a launcher has started, all of which
            must load it (`shoulders.lm.shard`). Each reads the whole LM into main memory once.

    Returns:
        A `shoulders.lm.frozen.FrozenLM`.

    Raises:
        LMError: the model cannot be found, downloaded, verified, read or sharded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shoulders.lm.frozen import FrozenLM, lm_fingerprint
    from shoulders.lm.int8 import to_int8
    from shoulders.lm.layout import is_llama_style
    from shoulders.lm.shard import Shards, check_shardable
    from shoulders.lm.smooth import smooth

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = _precision(dtype, place)
    if shard:
        check_shardable(dtype)
    source: str | Path = name
    if name == EMBEDDED:
        source = converted(embedded_gguf())
    elif name.endswith(".gguf"):
        source = converted(Path(name))
    elif Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise LMError(f"{name}: not a model folder: no config.json in it")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=precision, revision=revision or "main"
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except Exception as error:
        # Anything may go wrong inside (network, missing file, damaged safetensors, unknown
        # architecture): the user needs the name and the first line of the reason.
        raise LMError(_explain(name, error)) from error
    if shard:
        fingerprint = lm_fingerprint(model, tokenizer)
        shards = Shards.of(model.requires_grad_(False), place)
        model = model.to(place)
        return FrozenLM(model, tokenizer, name, fingerprint=fingerprint, shards=shards)
    model = model.to(place).requires_grad_(False)
    if dtype != "int8":
        return FrozenLM(model, tokenizer, name)
    # A skill is bound to the LM that was rounded, not to how it was.
    fingerprint = lm_fingerprint(model, tokenizer)
    if is_llama_style(model):
        smooth(model, tokenizer)
    to_int8(model)
    return FrozenLM(model, tokenizer, name, fingerprint=fingerprint)


def _precision(dtype: Precision, device: Any) -> Any:
    import torch

    if dtype not in PRECISIONS:
        raise LMError(f"dtype '{dtype}': use one of {', '.join(PRECISIONS)}")
    if dtype == "int8" and device.type != "cpu":
        raise LMError(f"dtype int8 is for CPUs, the device is {device.type}; use bfloat16")
    if dtype in ("int8", "float32"):
        return torch.float32
    if dtype == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    fast = capabilities.get("amx_tile") or capabilities.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def _explain(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).exists() or name == EMBEDDED or name.endswith(".gguf"):
        return f"{name}: cannot be loaded: {reason}"
    return (
        f"{name}: neither a local folder nor reachable on the Hub ({reason}); check the "
        "spelling and the network, or pass a folder, a .gguf file, or 'embedded'"
    )
