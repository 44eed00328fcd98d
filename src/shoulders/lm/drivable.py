"""Whether an LM can be driven from embeddings, and whether our own layers are its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shoulders.errors import LMError
from shoulders.lm.prompt import Prompt

if TYPE_CHECKING:
    from shoulders.lm.frozen import FrozenLM
    from shoulders.lm.fused import Blocks


@torch.no_grad()
def check_drivable(lm: FrozenLM) -> None:
    """Refuse an LM whose logits from embeddings are not its own logits from token ids.

    Catches what architectures do outside layers and head: scaled embeddings, capped or
    multiplied logits, projections between body and head.

    Raises:
        LMError: it has no head, or its logits differ.
    """
    if lm.model.get_output_embeddings() is None:
        raise LMError(f"{lm.name}: has no output embeddings; a causal LM is needed")
    ids = torch.arange(1, 4, device=lm.device)[None] % lm.vocab_size
    expected = lm.model(input_ids=ids, use_cache=False).logits[0].float()
    positions = torch.arange(3, device=lm.device)[None]
    hidden = lm.hidden(lm.embed(ids), torch.ones_like(ids), positions)
    difference = float((lm.plain_logits(hidden[0]) - expected).abs().max())
    tolerance = 1e-4 if lm.dtype == torch.float32 else 0.05
    if not difference <= tolerance * max(1.0, float(expected.abs().max())):
        raise LMError(
            f"{lm.name} ({type(lm.model).__name__}): logits from embeddings differ "
            f"from its own by {difference:.2g}; this architecture is not supported"
        )


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
