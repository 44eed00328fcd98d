"""A row does not depend on what stands beside it, to the last bit where that decides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoulders.lm.cache import Cache
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.lm.steady import FEW, MANY, steady_logits


class Head:
    """A head with two tokens for everything, as likely as each other but for the last bits."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        weight = torch.randn(1000, 576, generator=random)
        noise = torch.randn(weight.shape, generator=random)
        self.weight = torch.cat([weight, weight + 3e-7 * noise])

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.nn.functional.linear(hidden, self.weight)


def test_greedy_choices_do_not_depend_on_how_many_there_are() -> None:
    lm: Any = Head()
    hidden = torch.randn(64, 576, generator=torch.Generator().manual_seed(1))
    every = steady_logits(lm, hidden).argmax(-1)
    for count in (1, 2, FEW, 7, MANY - 1, MANY, MANY + 1, 33):
        parts = hidden.split(count)
        found = torch.cat([steady_logits(lm, part).argmax(-1) for part in parts])
        assert torch.equal(found, every), count
        for part in parts:
            assert torch.allclose(steady_logits(lm, part), lm.logits(part), atol=1e-4)


@pytest.mark.parametrize("at", [(5, 2), (2, 2, 3), (2, 5)])
def test_an_input_read_in_pieces_is_the_input_bit_by_bit(
    at: tuple[int, ...], fresh_lm: Callable[..., FrozenLM], tmp_path: Path, own_cache: Path
) -> None:
    plain = fresh_lm("llama")
    plain.model.save_pretrained(tmp_path / "lm")
    plain.tokenizer.save_pretrained(tmp_path / "lm")
    lm: FrozenLM = load_lm(str(tmp_path / "lm"), dtype="int8")
    assert lm.blocks is not None
    x = lm.embed_rows([[5, 6, 7, 8, 9, 10, 11]])

    def read(counts: tuple[int, ...], other: int = 0) -> Tensor:
        """Read the row in pieces, beside another row of some length."""
        rows = 2 if other else 1
        assert lm.blocks is not None
        cache = Cache.of(Prompt.empty(rows), lm.blocks.cache_shape, 64, lm.dtype)
        states = []
        for piece in x.split(counts):
            beside = lm.embed_rows([[12] * other]) if other else x[:0]
            both = [len(piece), other] if other else [len(piece)]
            states.append(lm.blocks.read(torch.cat([piece, beside]), both, cache)[: len(piece)])
        return torch.cat(states)

    assert torch.equal(read(at), read((7,)))
    assert torch.equal(read(at, 1), read((7,)))
    assert torch.equal(read(at, 9), read((7,)))
