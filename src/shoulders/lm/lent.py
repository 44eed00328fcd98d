"""Linear layers whose plain weight exists only while something is multiplied with it.

A weight in 8 or 4 bits, or one that stays in main memory or on disk, becomes a plain matrix for one
product. Autograd would keep each of these matrices for the backward pass, and with them the whole
plain LM at once, which is what there was no room for. Here the backward pass borrows them again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Plain = Callable[[], Tensor]


class LentLinear(nn.Module):
    """`x W^T + b` for inputs `[..., k]`, outputs `[..., n]` in `x`'s dtype.

    Attributes:
        weight: as it is stored: quantised, or a meta tensor of an offloaded one.
        bias: `[n]` or None.
        plain: returns the weight as a float matrix `[n, k]`.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, plain: Plain) -> None:
        super().__init__()
        self.weight, self.bias, self.plain = weight, bias, plain

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`."""
        y: Tensor = _LentProduct.apply(x, self.plain, self.bias)
        return y


class _LentProduct(torch.autograd.Function):
    """`x W^T + b` and, backwards, `g W`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plain: Plain, bias: Tensor | None) -> Tensor:
        ctx.plain = plain
        return nn.functional.linear(x, plain().to(x), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        g = gradients[0]
        return g @ ctx.plain().to(g), None, None


def lend(model: Any) -> None:
    """Replace every linear layer whose weight is quantised or offloaded, in place.

    On a GPU, bitsandbytes' own layers stay: they borrow by themselves, and have kernels there.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            plain = _plain(child) if isinstance(child, nn.Linear) else None
            if plain is not None:
                setattr(parent, name, LentLinear(child.weight, _bias(child), plain))


def is_quantised(model: Any) -> bool:
    """Tell whether torchao or bitsandbytes hold any of a model's parameters."""
    return any(_of_torchao(p) or _of_bitsandbytes(p) for p in model.parameters())


def size(parameter: Tensor) -> int:
    """Return how many numbers a parameter stands for, however they are packed."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def held_tensors(model: Any) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield name, owner and tensor of every parameter and buffer, tied ones once."""
    seen: set[int] = set()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                full = f"{prefix}.{name}".lstrip(".")
                # Tied tensors that are offloaded are no longer one object.
                if tensor is None or id(tensor) in seen or (tensor.is_meta and full in tied):
                    continue
                seen.add(id(tensor))
                yield full, module, tensor


def stored(name: str, module: Any, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a module's parameter or buffer consists of.

    Those of an offloaded one are read from where they lie, those of a quantised one are its
    integers and scales.
    """
    if tensor.is_meta:
        last = name.rpartition(".")[2]
        yield name, module.plain() if isinstance(module, LentLinear) else _lender(module)[last]
    elif _of_torchao(tensor):
        for part in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield f"{name}.{part}", getattr(tensor, part)
    else:
        yield name, tensor.data
        state, scale = getattr(tensor, "quant_state", None), getattr(tensor, "SCB", None)
        if state is not None:
            for part, value in state.as_dict(packed=True).items():
                yield f"{name}.{part}", value
        # Its first product moves the scale of bitsandbytes' 8-bit weight to the layer.
        elif _of_bitsandbytes(tensor):
            yield f"{name}.SCB", module.state.SCB if scale is None else scale


def device_of(module: Any) -> torch.device:
    """Return where a module with a weight computes, wherever the weight itself lies."""
    weight: Tensor = module.weight
    return torch.device(module._hf_hook.execution_device) if weight.is_meta else weight.device


def _plain(linear: Any) -> Plain | None:
    """Return what makes a layer's weight plain; None where it is, or where it lends by itself."""
    weight = linear.weight
    if weight.is_meta:
        lender = _lender(linear)
        return lambda: lender["weight"]
    if _of_torchao(weight):
        return lambda: weight.dequantize()
    if not _of_bitsandbytes(weight) or weight.device.type != "cpu":
        return None
    # On some processors its 4-bit layers pack their weights anew for speed: bytes would change.
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    state = getattr(weight, "quant_state", None)
    if state is None:
        return lambda: int8_vectorwise_dequant(weight.data, weight.SCB)
    # One row for each block: its CPU function (0.50) begins a block at every row, though rows that
    # are no multiple of a block were rounded end to end, and gives wrong numbers for those.
    rows = copy.copy(state)
    count, left = divmod(math.prod(state.shape), state.blocksize)
    rows.shape = torch.Size([1, math.prod(state.shape)] if left else [count, state.blocksize])
    return lambda: dequantize_4bit(weight.data, rows).view(state.shape)


def _bias(linear: Any) -> nn.Parameter | None:
    if linear.bias is None or not linear.bias.is_meta:
        return linear.bias
    value = _lender(linear)["bias"].to(linear._hf_hook.execution_device)
    return nn.Parameter(value, requires_grad=False)


def _lender(module: Any) -> Any:
    """Return accelerate's mapping from an offloaded module's names to values, read on access."""
    return module._hf_hook.weights_map


def _of_torchao(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith("torchao.")


def _of_bitsandbytes(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith("bitsandbytes.")
