"""Take a Llama-style model's layers apart into plain matrices, without storing anything twice.

Where an LM has Llama's layers (Llama, SmolLM, Mistral, Qwen2), its query, key and value weights
are laid together, as are gate and up, so that one product serves several; the Hugging Face
modules become views of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.lm.int8 import Int8Linear
from shoulders.lm.layer import Layer, Matrix
from shoulders.lm.lent import is_quantised


def is_llama_style(model: Any) -> bool:
    """Tell whether `block.forward` computes what the model's layers do."""
    body = model.base_model
    if model.device.type != "cpu" or getattr(model.config, "hidden_act", None) != "silu":
        return False
    if "llama_4_scaling_beta" in (getattr(model.config, "rope_parameters", None) or {}):
        return False  # Ministral 3: queries grow with their positions
    if is_quantised(model) or any(p.is_meta for p in model.parameters()):
        return False  # no plain matrices to lay out, or none that is to stay in memory
    try:
        for layer in body.layers:
            attention = layer.self_attn
            named = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
            named += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
            if not all(isinstance(m, nn.Linear | Int8Linear) for m in named):
                return False
            norms = (layer.input_layernorm, layer.post_attention_layernorm)
            parts = len(list(layer.children())), len(list(attention.children()))
            if parts != (4, 4) or not all(hasattr(n, "variance_epsilon") for n in norms):
                return False  # further norms or projections
            if attention.scaling != attention.head_dim**-0.5:
                return False
            if not getattr(attention, "use_rope", True):  # SmolLM3: some layers know no positions
                return False
        position = torch.zeros(1, 1, dtype=torch.long)
        cos, _ = body.rotary_emb(torch.zeros(1, 1, 1), position)
    except (AttributeError, TypeError):
        return False
    return bool(cos.shape[-1] == body.layers[0].self_attn.head_dim)


def laid_out(layer: Any) -> Layer:
    """Return a decoder layer's matrices; its modules become views of them."""
    attention, feed = layer.self_attn, layer.mlp
    return Layer(
        layer.input_layernorm.weight,
        _joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        _joined([attention.o_proj]),
        layer.post_attention_layernorm.weight,
        _joined([feed.gate_proj, feed.up_proj]),
        _joined([feed.down_proj]),
    )


@torch.no_grad()
def _joined(linears: Sequence[Any]) -> Matrix:
    """Lay the weights of several linear layers one below the other, and make them views of that."""
    sizes = [linear.weight.shape[0] for linear in linears]
    values = torch.cat([linear.weight for linear in linears])
    for linear, view in zip(linears, values.split(sizes), strict=True):
        linear.weight.data = view
    scales: list[Tensor] = [linear.scale for linear in linears if isinstance(linear, Int8Linear)]
    biases: list[Tensor] = []
    if any(linear.bias is not None for linear in linears):
        empty = values.new_zeros(1, dtype=torch.float32)
        biases = [
            empty.expand(size) if linear.bias is None else linear.bias
            for linear, size in zip(linears, sizes, strict=True)
        ]
    writes = [getattr(linear, "writes", None) for linear in linears]
    ones = [values.new_ones(size, dtype=torch.float32) for size in sizes]
    divided = [o if w is None else w for w, o in zip(writes, ones, strict=True)]
    return Matrix(
        values,
        torch.cat(scales) if scales else None,
        torch.cat(biases) if biases else None,
        getattr(linears[0], "reads", None),  # they read the same
        torch.cat(divided) if any(w is not None for w in writes) else None,
    )
