"""Whether an LM can be driven from embeddings, and whether our own layers are its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, LinearAttentionCacheLayerMixin

from shoulders.errors import LMError
from shoulders.lm.prompt import Prompt

if TYPE_CHECKING:
    from shoulders.lm.frozen import FrozenLM
    from shoulders.lm.fused import Blocks


@torch.no_grad()
def check_drivable(lm: FrozenLM) -> Tensor:
    """Refuse an LM whose logits from embeddings are not its own logits from token ids.

    Catches what architectures do outside layers and head (scaled embeddings, capped or
    multiplied logits, projections between body and head), and those where pads before a row, or
    reading it in two pieces, change what it is.

    Returns:
        Its own logits `[3, vocabulary]` of the row that is tried, for `packs_apart`.

    Raises:
        LMError: it has no head, keeps other states than keys and values, or its logits differ.
    """
    kind = f"{lm.name} ({type(lm.model).__name__})"
    if lm.model.get_output_embeddings() is None:
        raise LMError(f"{lm.name}: has no output embeddings; a causal LM is needed")
    try:
        # Rows that leave a batch and samples that share a prompt need caches that can be cut up.
        layers = DynamicCache(config=lm.model.config).layers
        if odd := sorted({type(one).__name__ for one in layers if not _is_plain(one)}):
            raise LMError(
                f"{kind}: keeps other states than keys and values ({', '.join(odd)}); only "
                "attention is supported"
            )
        ids = _tried(lm)
        expected = lm.model(input_ids=ids, use_cache=False).logits[0].float()
        found = {"from embeddings": _logits(lm, ids), "behind pads": _behind_pads(lm, ids)}
        last = torch.cat([expected[:2], _from_cache(lm, ids)])
        found["after what a cache holds"] = last
    except LMError:
        raise
    except Exception as error:  # whatever an architecture that we do not know may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LMError(f"{kind}: this architecture is not supported: {reason}") from error
    for where, logits in found.items():
        if not _equal(lm, logits, expected):
            difference = float((logits - expected).abs().max())
            raise LMError(
                f"{kind}: logits {where} differ "
                f"from its own by {difference:.2g}; this architecture is not supported"
            )
    return expected


@torch.no_grad()
def packs_apart(lm: FrozenLM, alone: Tensor) -> bool:
    """Return whether rows that lie end to end, masked from each other, are what each is alone.

    Not where layers count places themselves (ALiBi's biases, recurrent states). `alone` is what
    `check_drivable` returned.
    """
    before = torch.arange(4, 8, device=lm.device)[None] % lm.vocab_size
    ids = torch.cat([before, _tried(lm)], 1)
    mask = torch.full((7, 7), torch.finfo(lm.dtype).min, dtype=lm.dtype, device=lm.device).triu(1)
    mask[4:, :4] = torch.finfo(lm.dtype).min
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=lm.device)
    try:
        hidden = lm.hidden(lm.embed(ids), mask[None, None], positions)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):
        return False
    return _equal(lm, lm.plain_logits(hidden[0, 4:]), alone)


def _tried(lm: FrozenLM) -> Tensor:
    return torch.arange(1, 4, device=lm.device)[None] % lm.vocab_size


def _behind_pads(lm: FrozenLM, ids: Tensor) -> Tensor:
    pads = torch.tensor([[0, 0]], device=lm.device)
    mask = torch.tensor([[0, 0, 1, 1, 1]], device=lm.device)
    positions = torch.tensor([[0, 0, 0, 1, 2]], device=lm.device)
    embedded = lm.embed(torch.cat([pads, ids], 1))
    return lm.plain_logits(lm.hidden(embedded, mask, positions)[0, 2:])


def _from_cache(lm: FrozenLM, ids: Tensor) -> Tensor:
    """Return the last token's logits `[1, vocabulary]`, where those before it are cached."""
    cache, positions = lm.new_cache(), torch.arange(3, device=lm.device)[None]
    for own in (slice(0, 2), slice(2, 3)):
        seen = torch.ones_like(ids[:, : own.stop])
        hidden = lm.hidden(lm.embed(ids[:, own]), seen, positions[:, own], cache)
    return lm.plain_logits(hidden[0, -1:])


def _logits(lm: FrozenLM, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1], device=lm.device)[None]
    return lm.plain_logits(lm.hidden(lm.embed(ids), torch.ones_like(ids), positions)[0])


def _equal(lm: FrozenLM, found: Tensor, expected: Tensor) -> bool:
    difference = float((found - expected).abs().max())
    tolerance = 1e-4 if lm.dtype == torch.float32 else 0.05
    return difference <= tolerance * max(1.0, float(expected.abs().max()))


def _is_plain(layer: Any) -> bool:
    linear = isinstance(layer, LinearAttentionCacheLayerMixin)
    return hasattr(layer, "batch_select_indices") and not linear


@torch.no_grad()
def fused_as_its_own(lm: FrozenLM, blocks: Blocks) -> bool:
    """Return whether the fused layers compute what the LM's own do.

    Layers may be built of Llama's parts and put them together in another way (positions turned
    pair by pair, or not at all in some layers): only what they write tells. Rounding to int8 or
    bfloat16 is a few hundredths of the states' norm, another rotation a fifth and more.
    """
    count = 8  # the first position is turned by nothing, later ones more and more
    ids = torch.arange(1, count + 1)[None] * 7 % lm.vocab_size
    embedded = lm.embed(ids)
    own = lm.hidden(embedded, torch.ones_like(ids), torch.arange(count)[None])[0].float()
    rows = blocks.pack(Prompt.empty(1), embedded[0], [count])
    found = blocks.hidden(rows)[rows.first_token[0] :].float()
    tolerance = 1e-3 if lm.precision == "float32" else 0.1
    return bool((found - own).norm() <= tolerance * own.norm())
