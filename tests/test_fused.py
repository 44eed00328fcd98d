"""The fused layers against the Hugging Face modules: full hidden states and full gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shoulders.lm import fused
from shoulders.lm.combine import combine
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt

FUSED = ("llama", "qwen2")
# rows share their prompt or not; vectors; prefix positions
FORMS = [(s, p, q) for s in (True, False) for p, q in ((0, 0), (3, 0), (0, 4), (2, 3))]
ROWS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 6]]
TOLERANCE = 1e-5


def test_only_llama_style_lms_are_fused(tiny_lm: Callable[[str], FrozenLM]) -> None:
    for arch in ("llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma2"):
        assert (tiny_lm(arch).blocks is not None) == (arch in FUSED), arch


def prompt_of(lm: FrozenLM, shared: bool, p: int, q: int) -> tuple[Prompt, list[torch.Tensor]]:
    """Return a random prompt for all rows, and its leaves."""
    random = torch.Generator().manual_seed(0)
    b, shape = 1 if shared else len(ROWS), lm.prefix_shape
    vectors = 0.2 * torch.randn(b, p, lm.hidden_size, generator=random)
    kv = torch.randn(b, shape.layers, 2, shape.kv_heads, q, shape.head_dim, generator=random)
    leaves = [vectors.requires_grad_(), kv.requires_grad_()]
    prompt = Prompt(
        vectors, torch.ones(b, p, dtype=torch.bool), kv, torch.ones(b, q, dtype=torch.bool)
    )
    return (prompt.repeated(len(ROWS)) if shared else prompt), leaves


@pytest.mark.parametrize("compute", ["plain", "recompute", "without a compiler"])
@pytest.mark.parametrize(("shared", "p", "q"), FORMS)
@pytest.mark.parametrize("arch", FUSED)
def test_hidden_states_and_gradients_are_those_of_the_model(
    arch: str,
    shared: bool,
    p: int,
    q: int,
    compute: str,
    tiny_lm: Callable[[str], FrozenLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if compute == "without a compiler":
        monkeypatch.setattr(fused, "available", lambda: None)
    lm = tiny_lm(arch)
    assert lm.blocks is not None
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(len(ids), lm.hidden_size, generator=random) for ids in ROWS]

    def states(own: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        prompt, leaves = prompt_of(lm, shared, p, q)
        assert lm.blocks is not None
        if own:
            pack = lm.blocks.pack(lm.embed, prompt, ROWS)
            flat = lm.blocks.hidden(pack, recompute=compute == "recompute")
            rows = [flat[i : i + len(r)] for i, r in zip(pack.first_token, ROWS, strict=True)]
        else:
            batch = combine(lm, prompt, ROWS)
            hidden = lm.hidden(batch.embeddings, batch.mask, batch.positions, batch.cache)
            starts = batch.first_token.tolist()
            rows = [
                hidden[i, at : at + len(r)]
                for i, (at, r) in enumerate(zip(starts, ROWS, strict=True))
            ]
        if p or q:
            torch.stack(
                [(w * r).sum() for w, r in zip(weights, rows, strict=True)]
            ).sum().backward()
        return rows, [leaf.grad for leaf in leaves if leaf.numel() and leaf.grad is not None]

    rows, gradients = states(own=True)
    expected_rows, expected_gradients = states(own=False)
    assert len(gradients) == len(expected_gradients) == (p > 0) + (q > 0)
    for mine, theirs in zip(
        [*rows, *gradients], [*expected_rows, *expected_gradients], strict=True
    ):
        mine, theirs = mine.detach(), theirs.detach()
        largest = float(theirs.abs().max())
        assert float((mine - theirs).abs().max()) <= TOLERANCE * max(1.0, largest)
