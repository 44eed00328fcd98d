"""Low-rank updates in a Hugging Face model's own modules: any architecture, any device."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.errors import LMError
from shoulders.lm.factors import Factors, Site
from shoulders.lm.updates import Placed, Updates


class LayerHooks:
    """Applies updates between a model's own layers and inside them, for one call at a time.

    The hooks stay on the modules and do nothing unless their thread is inside `applying`.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._now, self._layers = threading.local(), layers
        self._lock, self._in_products = threading.Lock(), False
        for number, layer in enumerate(layers):
            # First: transformers' own hooks, which keep states (`taps`), must see updated ones.
            layer.register_forward_hook(self._layer_hook(number), prepend=True)

    @contextmanager
    def applying(self, updates: Updates, owner: Tensor) -> Iterator[None]:
        """Apply them to whatever this thread runs; `owner` `[b, s]` is each position's row."""
        factors = next((own for own in updates.sets if isinstance(own, Factors)), None)
        if factors is not None:
            self._hook_products(factors.sites)
        self._now.placed = updates.placed(owner.flatten())
        try:
            yield
        finally:
            self._now.placed = None

    def _hook_products(self, sites: Sequence[Site]) -> None:
        """Put hooks on the products, once; only factors need them, and layers that are alike."""
        with self._lock:
            if self._in_products:
                return
            self._in_products = True
            for number, layer in enumerate(self._layers):
                for index, site in enumerate(sites):
                    ends = torch.tensor(site.writes).cumsum(0).tolist()
                    for name, end, width in zip(site.names, ends, site.writes, strict=True):
                        hook = self._product_hook(number, index, slice(end - width, end), name)
                        layer.get_submodule(name).register_forward_hook(hook)

    def _layer_hook(self, number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            placed: Placed | None = getattr(self._now, "placed", None)
            if placed is None:
                return output
            states = output[0] if isinstance(output, tuple) else output
            new = placed.applied(number, states.flatten(0, -2)).view(states.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def _product_hook(self, number: int, site: int, columns: slice, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            placed: Placed | None = getattr(self._now, "placed", None)
            if placed is None or not placed.within:
                return output
            x, y = inputs[0].flatten(0, -2), output.flatten(0, -2)
            if len(x) != len(placed.which):
                raise LMError(f"{name}: reads {len(x)} positions of {len(placed.which)}; factors "
                              "have no place there")  # fmt: skip
            divided = [getattr(module, part, None) for part in ("reads", "writes")]
            x = x if divided[0] is None else x * divided[0]
            for _, pairs, places in placed.within:
                down, up = pairs[number][site]
                own = x if places is None else x[places]
                added = (own @ down.to(x)) @ up[:, columns].to(x)
                added = added if divided[1] is None else added / divided[1]
                y = y + added if places is None else y.index_add(0, places, added.to(y))
            return y.view(output.shape)

        return hook
