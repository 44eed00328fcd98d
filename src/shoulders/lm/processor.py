"""What the hardware multiplies fast."""

from __future__ import annotations

import functools

import torch


@functools.cache
def has(feature: str) -> bool:
    """Tell whether this machine's processor has a feature that torch knows by this name."""
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(known.get(feature))


def has_int8() -> bool:
    """Tell whether torch multiplies int8 faster than float32 here (VNNI or AMX)."""
    return has("avx512_vnni") or has("amx_int8")


def fast_bfloat16(device: str | None = None) -> bool:
    """Tell whether a device multiplies bfloat16 faster than float32; default: the GPU, if any."""
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        return torch.cuda.is_bf16_supported()
    return has("amx_tile") or has("avx512_bf16")
