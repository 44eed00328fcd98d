"""Load the LM: the embedded one, a Hugging Face id or folder, or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from shoulders.errors import LMError
from shoulders.lm.gguf import converted, embedded_gguf

Precision = Literal["auto", "float32", "bfloat16"]
EMBEDDED = "embedded"


def load_lm(
    name: str = EMBEDDED,
    *,
    dtype: Precision = "auto",
    device: str | None = None,
    revision: str | None = None,
) -> Any:
    """Load a causal LM and freeze it.

    Args:
        name: `embedded` (SmolLM2-135M-Instruct, offline), a Hub id, a folder in Hugging
            Face format, or a `.gguf` file.
        dtype: `auto` takes bfloat16 where the hardware multiplies it faster (CUDA, AMX or
            AVX512-BF16 processors) and float32 elsewhere.
        device: a torch device; default `cuda` where there is one, else `cpu`.
        revision: branch, tag or commit of a Hub id.

    Returns:
        A `shoulders.lm.frozen.FrozenLM`.

    Raises:
        LMError: the model cannot be found, downloaded, verified or read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shoulders.lm.frozen import FrozenLM

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = _precision(dtype, place)
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
    return FrozenLM(model.to(place), tokenizer, name)


def _precision(dtype: Precision, device: Any) -> Any:
    import torch

    if dtype not in ("auto", "float32", "bfloat16"):
        raise LMError(f"dtype '{dtype}': use auto, float32 or bfloat16")
    if dtype != "auto":
        return getattr(torch, dtype)
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
