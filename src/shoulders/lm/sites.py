"""Where in an LM's layers low-rank factors have their place, whatever its architecture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from shoulders.errors import LMError
from shoulders.lm.factors import Site
from shoulders.lm.int8 import Int8Linear
from shoulders.lm.lent import LentLinear

# Linear layers that read the same states, as Llama and its like name them.
ALIKE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def sites_of(layers: Iterable[nn.Module], name: str) -> tuple[Site, ...]:
    """Return the sites of an LM's decoder layers, in the order of the modules.

    Linear layers of experts are left out: they read some positions only.

    Raises:
        LMError: there are none, or the layers differ; names the LM.
    """
    first, *others = [_sites(layer) for layer in layers]
    if not first or any(own != first for own in others):
        raise LMError(f"{name}: its layers differ or have no linear layers: no place for factors")
    return first


def _sites(layer: nn.Module) -> tuple[Site, ...]:
    found: dict[str, tuple[int, int]] = {}
    for path, module in layer.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D | Int8Linear | LentLinear)
        if linear and "experts" not in path.split("."):
            found[path] = _shape(module)
    sites, taken = [], set[str]()
    for path, (reads, _) in found.items():
        if path in taken:
            continue
        outer, _, own = path.rpartition(".")
        group = next((names for names in ALIKE if own in names), (own,))
        names = [f"{outer}.{one}" if outer else one for one in group]
        members = tuple(n for n in names if n in found and found[n][0] == reads)
        taken |= set(members)
        sites.append(Site(members, reads, tuple(found[n][1] for n in members)))
    return tuple(sites)


def _shape(module: Any) -> tuple[int, int]:
    """Return how many channels a linear layer reads and writes."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, LentLinear):
        n, k = module.plain().shape
        return k, n
    return module.in_features, module.out_features
