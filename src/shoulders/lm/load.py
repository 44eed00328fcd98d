"""Load the LM: the embedded one, a Hugging Face id or folder, or a GGUF file."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from shoulders.errors import LMError
from shoulders.lm.gguf import converted, embedded_lm
from shoulders.lm.quantized import (
    DeviceMap,
    Quantization,
    check_options,
    check_quantised,
    check_stored,
    quantization_config,
)

if TYPE_CHECKING:  # torch is imported when an LM is loaded, not before
    from shoulders.lm.frozen import FrozenLM

Precision = Literal["auto", "float32", "bfloat16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
EMBEDDED = "embedded"


def load_lm(
    name: str | Path = EMBEDDED,
    *,
    dtype: Precision = "auto",
    device: str | None = None,
    revision: str | None = None,
    quantize: Quantization | None = None,
    device_map: DeviceMap | None = None,
    max_memory: dict[int | str, int | str] | None = None,
    offload_folder: str | None = None,
    shard: bool = False,
) -> FrozenLM:
    """Load a causal LM and freeze it.

    Args:
        name: `embedded` (SmolLM2-135M-Instruct, offline), a Hub id, a folder in Hugging
            Face format, or a `.gguf` file.
        dtype: `auto` takes bfloat16 where the hardware multiplies it faster (CUDA, AMX or
            AVX512-BF16 processors) and float32 elsewhere. `int8` rounds the linear layers'
            weights once, and activations and gradients row by row: the fastest on CPUs, at a
            small loss of precision (docs/speed.md).
        device: a torch device; default `cuda` where there is one, else `cpu`; int8 is the CPU's.
        revision: branch, tag or commit of a Hub id.
        quantize: round the linear layers' weights while they are read and keep only that:
            `int8` through torchao, `nf4` (4 bits) through bitsandbytes; computing stays in
            `dtype`. An LM that is stored quantised loads as it is, without this.
        device_map: `auto` fills GPUs, then main memory, and leaves the rest on disk; or a
            mapping from module names to devices (`0`, `cpu`, `disk`). Weights that are not where
            they are multiplied are fetched for each product. Needs accelerate.
        max_memory: with `auto`, the most to use of each device, such as `{0: 6GB, cpu: 10GB}`.
        offload_folder: where `disk` keeps what is not in safetensors files already.
        shard: spread the layers over the processes that a launcher has started, all of which
            must load it (`shoulders.lm.shard`). Each reads the whole LM into main memory once.

    Returns:
        The LM, frozen.

    Raises:
        LMError: the model cannot be found, downloaded, verified, read, quantised or sharded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from shoulders.lm.frozen import FrozenLM
    from shoulders.lm.identity import lm_fingerprint
    from shoulders.lm.lent import lend
    from shoulders.lm.rounding import round_to_int8
    from shoulders.lm.shard import Shards, check_shardable
    from shoulders.lm.whole import check_whole

    name, place = str(name), _place("cpu" if device is None and dtype == "int8" else device)
    precision = _precision(dtype, place)
    check_options(dtype, quantize, device_map, device)
    if device_map is None and (max_memory is not None or offload_folder is not None):
        raise LMError("max_memory and offload_folder say where a device_map puts weights: give one")
    if shard:
        check_shardable(dtype)
        if quantize is not None or device_map is not None:
            raise LMError("a sharded LM is neither quantised nor placed: leave out one of them")
    # What is rounded to int8 is read as it is stored (mapped, not copied), layer by layer.
    options: dict[str, Any] = {"dtype": "auto" if dtype == "int8" else precision}
    if quantize is not None:
        options["quantization_config"] = quantization_config(quantize, precision)
        options["device_map"] = {"": place}
    if device_map is not None:
        options["device_map"] = device_map
        options |= {"max_memory": max_memory, "offload_folder": offload_folder}
    source, at = _source(name, revision), revision or "main"
    read = functools.partial(AutoModelForCausalLM.from_pretrained, source, revision=at)
    with _explained(name):
        config = AutoConfig.from_pretrained(source, revision=at)
        if getattr(config, "is_encoder_decoder", False):
            raise LMError(f"{name}: an encoder and a decoder; a causal LM is needed")
        check_stored(name, config, dtype, quantize)
        model, info = read(**options, output_loading_info=True)
        check_whole(name, model, info)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=at)
        rows = model.get_input_embeddings().weight.shape[0]
        tokens = max(tokenizer.vocab_size, (tokenizer.eos_token_id or 0) + 1)
        if tokens > rows:
            raise LMError(
                f"{name}: its tokenizer has {tokens} tokens, the LM embeddings for "
                f"{rows}: they do not belong together"
            )
    if shard:
        fingerprint = lm_fingerprint(model, tokenizer)
        shards = Shards.of(model.requires_grad_(False), place)
        model = model.to(place)
        return FrozenLM(model, tokenizer, name, fingerprint=fingerprint, shards=shards)
    check_quantised(name, model, quantize)
    # A skill is bound to the LM that was rounded, not to how it was. What is rounded while it is
    # read has to be read once more for that: mapped, a tensor at a time.
    bound = None
    if quantize is not None:
        bound = lm_fingerprint(read(dtype="auto"), tokenizer)
    elif dtype == "int8":
        bound = lm_fingerprint(model, tokenizer)
    model.requires_grad_(False)
    if dtype == "int8":
        assert bound is not None
        round_to_int8(model, tokenizer, bound)
    elif not hasattr(model, "hf_device_map"):
        model.to(place)
    lend(model)
    return FrozenLM(model, tokenizer, name, fingerprint=bound, quantize=quantize)


def _place(device: str | None) -> Any:
    import torch

    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # unknown, or not in this machine or torch
        raise LMError(f"device '{device}': {str(error).splitlines()[0]}") from None
    return place


def _precision(dtype: Precision, device: Any) -> Any:
    import torch

    from shoulders.lm.processor import fast_bfloat16

    if dtype not in PRECISIONS:
        raise LMError(f"dtype '{dtype}': use one of {', '.join(PRECISIONS)}")
    if dtype == "int8" and device.type != "cpu":
        raise LMError(f"dtype int8 is for CPUs, the device is {device.type}; use bfloat16")
    if dtype in ("int8", "float32"):
        return torch.float32
    if dtype == "bfloat16":
        return torch.bfloat16
    return torch.bfloat16 if fast_bfloat16(device.type) else torch.float32


def _source(name: str, revision: str | None) -> str | Path:
    """Return what transformers reads an LM from: a folder, or a Hub id."""
    source: str | Path = name
    if name == EMBEDDED:
        source = embedded_lm()
    elif name.endswith(".gguf"):
        source = converted(Path(name))
    elif Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise LMError(f"{name}: not a model folder: no config.json in it")
    if revision is not None and (source != name or Path(name).exists()):
        raise LMError(f"{name}: has no revisions, it is not on the Hub; leave revision out")
    return source


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while an LM is read into an `LMError` with the name and the reason.

    Anything may (network, missing file, damaged safetensors, unknown architecture): the user needs
    the first line of it.
    """
    try:
        yield
    except LMError:
        raise
    except Exception as error:
        raise LMError(_explain(name, error)) from error


def _explain(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).exists() or name == EMBEDDED or name.endswith(".gguf"):
        return f"{name}: cannot be loaded: {reason}"
    return (
        f"{name}: neither a local folder nor reachable on the Hub ({reason}); check the "
        "spelling and the network, or pass a folder, a .gguf file, or 'embedded'"
    )
