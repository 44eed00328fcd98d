"""Prepare a Llama-style LM for int8: move what is hard to round from activations to weights.

Some channels of an LM's activations are far larger than the rest, and rounding by rows loses the
rest. Dividing a channel of an activation by `s` and multiplying the weights that read it by `s`
changes nothing in exact arithmetic (SmoothQuant, arXiv 2211.10438, alpha = 0.5), and here
costs nothing to compute: the division goes into the norm's weight, or into the weights that
write the channel. Keys and values stay as they are, although attention's output would round
better with the values' channels balanced: a trained prefix is keys and values, and must mean the
same in every precision. What was divided is noted on the layers (`reads`, `writes`), for low-rank
factors to undo it (`shoulders.lm.inside`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_ALPHA = 0.5
_SMALLEST = 1e-5
# What the LM reads while its activations are measured: prose, questions, lists, numbers, code.
_TEXT = """\
The river had frozen early that year, and by the second week of December people were crossing it
on foot. Question: Which city is the capital of Australia? Answer: Canberra. Translate the word
into German: house -> Haus; tree -> Baum; the night train -> der Nachtzug. The opposite of "warm"
is "cold". 17 + 26 = 43, and 43 - 19 = 24. Is this review positive or negative? "I have rarely
been so bored; the plot goes nowhere." negative. def area(r): return 3.14159 * r ** 2
1. Wash the rice. 2. Add two cups of water. 3. Simmer for fifteen minutes. In 1969, about 650
million people watched on television as two astronauts walked on the moon. Dear Ms. Alvarez, thank
you for your letter of 3 March; we shall send the missing parts by Friday. Write the plural:
one mouse, two mice; one leaf, two leaves. Which of these is larger, an elephant or a mouse?
An elephant. The committee did not agree; it rarely does. https://example.org/page?id=42 {"a": 1}
"""


@torch.no_grad()
def smooth(model: Any, tokenizer: Any, then: Callable[[nn.Module], None] | None = None) -> None:
    """Balance activations and weights of a Llama-style model, in place, in one pass over a text.

    A layer is cast to float32 when the pass reaches it, and balanced when it has left: `then` may
    round it, so that one layer at a time stands in memory twice.
    """
    largest: dict[Any, Tensor] = {}

    def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
        largest[module] = inputs[0].detach().flatten(0, -2).abs().amax(0).float()

    def begin(layer: Any, _: Any) -> None:
        layer.float()

    def end(layer: Any, *_: Any) -> None:
        _balance(layer, largest)
        largest.clear()
        if then is not None:
            then(layer)

    body, hooks = model.base_model, []
    for layer in body.layers:
        hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
        for module in _measured(layer):
            hooks.append(module.register_forward_pre_hook(note))
    for name, module in body.named_children():
        if name != "layers":
            module.float()
    ids = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    ids = ids[: model.config.max_position_embeddings]
    body(torch.tensor([ids], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()


def _measured(layer: Any) -> list[Any]:
    """Return the projections whose input channels are measured; the others read the same."""
    attention, feed = layer.self_attn, layer.mlp
    return [attention.q_proj, feed.gate_proj, feed.down_proj]


def _balance(layer: Any, largest: dict[Any, Tensor]) -> None:
    """Balance one layer, given the largest magnitude of every channel that it read."""
    attention, feed = layer.self_attn, layer.mlp
    readers = [attention.q_proj, attention.k_proj, attention.v_proj]
    _through_norm(layer.input_layernorm, readers, largest[attention.q_proj])
    _through_norm(
        layer.post_attention_layernorm, [feed.gate_proj, feed.up_proj], largest[feed.gate_proj]
    )
    s = _scale(largest[feed.down_proj], feed.down_proj.weight.abs().amax(0))
    _divide(feed.up_proj, s)  # silu(gate) * up is linear in up
    _multiply(feed.down_proj, s)


def _scale(activation: Tensor, weight: Tensor) -> Tensor:
    largest = activation.clamp_min(_SMALLEST), weight.float().clamp_min(_SMALLEST)
    return largest[0] ** _ALPHA / largest[1] ** (1 - _ALPHA)


def _through_norm(norm: Any, readers: Sequence[Any], largest: Tensor) -> None:
    s = _scale(largest, torch.stack([r.weight.abs().amax(0) for r in readers]).amax(0))
    norm.weight.data = norm.weight / s
    for reader in readers:
        _multiply(reader, s)


# Not in place: weights may be mapped from a file, whose pages a write would copy for good.
def _multiply(linear: Any, s: Tensor) -> None:
    linear.weight.data = linear.weight * s
    linear.reads = s.clone()  # each its own: a buffer that is shared is stored once


def _divide(linear: Any, s: Tensor) -> None:
    linear.weight.data = linear.weight / s[:, None]
    linear.writes = s.clone()
    if linear.bias is not None:
        linear.bias.data = linear.bias / s
