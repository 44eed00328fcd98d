"""Whether an LM can be driven from embeddings, which is how everything here asks it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shoulders.errors import LMError

if TYPE_CHECKING:
    from shoulders.lm.frozen import FrozenLM


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
