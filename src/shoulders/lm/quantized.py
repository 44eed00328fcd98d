"""What the options `quantize` and `device_map` need: libraries, settings, refusals."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, get_args

from shoulders.errors import LMError, install

Quantization = Literal["int8", "nf4"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
DeviceMap = Literal["auto"] | dict[str, int | str]

_NEEDS = {"int8": ("torchao", "accelerate"), "nf4": ("bitsandbytes", "accelerate")}


def check_options(
    dtype: str, quantize: str | None, device_map: DeviceMap | None, device: str | None
) -> None:
    """Raise `LMError`, saying what to do, where these options of `load_lm` do not go together."""
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise LMError(f"quantize '{quantize}': use int8, or nf4 for 4 bits")
    if isinstance(device_map, str) and device_map != "auto":
        raise LMError(f"device_map '{device_map}': use auto, or a mapping from modules to devices")
    if device_map is not None and device is not None:
        raise LMError("device_map says where the LM lies: leave out device")
    for option, value in (("quantize", quantize), ("device_map", device_map)):
        if dtype == "int8" and value is not None:
            raise LMError(
                f"dtype int8 rounds the LM by itself and keeps it on the CPU: leave out {option}, "
                "or choose another dtype"
            )
    missing = [p for p in _NEEDS.get(quantize or "", ()) if find_spec(p) is None]
    if missing:
        raise LMError(
            f"quantize '{quantize}' needs {' and '.join(missing)}; run: {install('quantize')}"
        )
    if device_map is not None and find_spec("accelerate") is None:
        raise LMError(f"device_map needs accelerate; run: {install('quantize')}")


def quantization_config(quantize: Quantization, precision: Any) -> Any:
    """Return transformers' settings that round an LM while it is read.

    Args:
        quantize: `int8` is torchao's, one scale an output channel; `nf4` is bitsandbytes' 4-bit
            NormalFloat (QLoRA, arXiv 2305.14314), one scale for 64 weights.
        precision: the floating-point type to compute in.

    Raises:
        LMError: the installed library cannot do it here.
    """
    import transformers

    try:
        if quantize == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            return transformers.TorchAoConfig(Int8WeightOnlyConfig())
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision
        )
    except Exception as error:  # its version, its compiled part or its platform does not fit
        reason = " ".join(str(error).split())
        raise LMError(f"quantize '{quantize}' does not work on this machine: {reason}") from error


def check_stored(name: str, config: Any, dtype: str, quantize: str | None) -> None:
    """Raise `LMError` where an LM is to be rounded that is stored so, as its config says."""
    if getattr(config, "quantization_config", None) is None:
        return
    if quantize is not None:
        raise LMError(f"{name}: is stored in quantised form already: leave out quantize")
    if dtype == "int8":
        raise LMError(f"{name}: is stored in quantised form already: choose another dtype")


def check_quantised(name: str, model: Any, quantize: Quantization | None) -> None:
    """Raise `LMError` where what was read is not quantised as asked for, or cannot be used."""
    from shoulders.lm.lent import is_quantised

    if quantize is not None and not is_quantised(model):
        raise LMError(
            f"{name} ({type(model).__name__}): '{quantize}' finds no linear layer to quantise; "
            f"{'try nf4, or ' if quantize == 'int8' else ''}leave out quantize"
        )
    if is_quantised(model) and any(p.is_meta for p in model.parameters()):
        raise LMError(
            f"{name}: quantised weights cannot be offloaded: give a device_map without 'disk' "
            "(and without 'cpu' beside a GPU), or leave out quantize"
        )
