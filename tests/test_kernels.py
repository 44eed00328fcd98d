"""Every compiled function against its plain torch reference."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoulders.lm import block, kernels
from shoulders.lm.block import Saved, times, times_back
from shoulders.lm.kernels import Kernels
from shoulders.lm.laid import Laid
from shoulders.lm.layer import Mask, Matrix, Rows, Sizes
from shoulders.lm.pairs import Pairs
from shoulders.lm.tiles import Tiles, packed
from shoulders.lm.wide import Wide

EPSILON = 1e-5


@pytest.fixture(scope="module", params=["native", "avx2"])
def compiled(request: pytest.FixtureRequest) -> Kernels:
    """As they are built for this processor, and for one whose best is AVX2."""
    if request.param == "avx2":
        older: Kernels = request.getfixturevalue("avx2_kernels")
        return older
    found = kernels.available()
    assert found is not None, "CI has a C compiler"
    return found


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return float((mine - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def restored(rounded: tuple[Tensor, Tensor]) -> Tensor:
    return rounded[0].float() * rounded[1].view(-1, 1)


def level(x: Tensor) -> Tensor:
    """Return half a level of each row: the most that rounding may be off."""
    return 0.501 * x.abs().amax(-1, keepdim=True) / 127


@pytest.mark.parametrize("n", [1, 15, 64, 577])
def test_rounding_is_within_half_a_level(compiled: Kernels, n: int) -> None:
    x, channel = drawn(7, n), drawn(n, seed=1)
    x[3] = 0
    assert bool(((restored(compiled.round_rows(x)) - x).abs() <= level(x)).all())
    scaled = x * channel
    off = (restored(compiled.round_rows(x, channel)) - scaled).abs()
    assert bool((off <= level(scaled)).all())
    levels, scales = block.rounded(x)
    assert bool(((levels.float() * scales - x).abs() <= level(x)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_seen(compiled: Kernels, bad: float) -> None:
    x = drawn(3, 40)
    x[1, 7] = bad
    _, scale = compiled.round_rows(x)
    assert torch.isfinite(scale).tolist() == [True, False, True]
    product = torch.ones(3, 4, dtype=torch.int32)
    y = compiled.rescale(product, scale, None)
    assert torch.isfinite(y).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("n", [33, 576])
def test_norm_and_its_gradient(compiled: Kernels, n: int) -> None:
    x, weight = drawn(9, n), 1 + drawn(n, seed=1, scale=0.3)
    normed = block.norm(x, weight, EPSILON)
    off = (restored(compiled.norm_round(x, weight, EPSILON)) - normed).abs()
    assert bool((off <= level(normed) + 1e-6).all())
    product = torch.randint(-9999, 9999, (9, n), dtype=torch.int32, generator=seeded())
    scale, rest = drawn(9, seed=2).abs() * 1e-4, drawn(9, n, seed=3)
    mine = compiled.norm_back(product, scale, x, weight, EPSILON, rest)
    leaf = x.clone().requires_grad_()
    block.norm(leaf, weight, EPSILON).backward(product.float() * scale[:, None])
    assert leaf.grad is not None
    assert close(mine, rest + leaf.grad)


def test_products_are_scaled_and_added_to(compiled: Kernels) -> None:
    product = torch.randint(-99999, 99999, (5, 70), dtype=torch.int32, generator=seeded())
    scale, channel, bias = drawn(5).abs(), drawn(70, seed=1), drawn(70, seed=2)
    rest = drawn(5, 70, seed=3)
    plain = product.float() * scale[:, None]
    assert close(compiled.rescale(product, scale, None), plain)
    assert close(
        compiled.rescale(product, scale, channel, bias, rest), plain * channel + bias + rest
    )


@pytest.fixture
def tiles(compiled: Kernels) -> Tiles:
    if compiled.tiles is None:
        pytest.skip("this processor has no AMX")
    return compiled.tiles


@pytest.fixture
def products(compiled: Kernels) -> Tiles | Pairs:
    if compiled.int8 is None:
        pytest.skip("on this processor torch multiplies int8")
    return compiled.int8


@pytest.mark.parametrize("m", [1, 5, 6, 15, 16, 31, 32, 33, 70, 700])
@pytest.mark.parametrize(("n", "k"), [(64, 192), (192, 64), (64, 1600)])
def test_products_of_packed_int8(
    compiled: Kernels, products: Tiles | Pairs, m: int, n: int, k: int
) -> None:
    random = torch.Generator().manual_seed(0)
    levels = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=random)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=random)
    assert products.fits(weight)
    laid = products.packed(weight)
    exact = (levels.long() @ weight.long().T).int()
    assert torch.equal(products.product(levels, laid), exact)
    scale, channel, bias, rest = drawn(m), drawn(n, seed=1), drawn(n, seed=2), drawn(m, n, seed=3)
    for some in (
        (channel, None, None),
        (channel, bias, None),
        (None, None, rest),
        (channel, bias, rest),
    ):
        mine = products.product(levels, laid, scale, *some)
        assert close(mine, compiled.rescale(exact, scale, *some), 1e-6)
        if isinstance(products, Tiles):
            halved = products.product(levels, laid, scale, *some, half=True)
            assert torch.equal(halved, mine.bfloat16())


@pytest.mark.parametrize("m", [1, 5, 6, 7, 70])
def test_products_of_floats_with_packed_halves(products: Tiles | Pairs, m: int) -> None:
    x, weight = drawn(m, 96), drawn(64, 96, seed=1).bfloat16()
    assert products.fits(weight)
    laid = products.packed(weight)
    mine = products.wide_product(x, laid)
    assert close(mine.double(), x.double() @ weight.double().T, 3e-5)
    for row in range(m):
        assert torch.equal(products.wide_product(x[row : row + 1].contiguous(), laid)[0], mine[row])


@pytest.mark.parametrize("m", [1, 16, 33, 70, 700])
@pytest.mark.parametrize("k", [96, 832])  # a panel in one piece, in three
def test_products_of_halves_in_tiles(tiles: Tiles, m: int, k: int) -> None:
    x, weight = drawn(m, k).bfloat16(), drawn(64, k, seed=1).bfloat16()
    bias, rest, laid = drawn(64, seed=2), drawn(m, 64, seed=3), packed(weight)
    plain = x.double() @ weight.double().T
    assert close(tiles.product(x, laid).double(), plain, 1e-6)
    both = tiles.product(x, laid, None, None, bias, rest)
    assert close(both.double(), plain + bias + rest, 1e-6)
    assert torch.equal(tiles.product(x, laid, None, None, bias, rest, half=True), both.bfloat16())
    assert torch.equal(tiles.product(x[:1].contiguous(), laid), tiles.product(x, laid)[:1])
    wide = drawn(m, k, seed=4)
    assert close(tiles.wide_product(wide, laid).double(), wide.double() @ weight.double().T, 3e-5)


def test_widened_products_are_the_plain_ones(compiled: Kernels) -> None:
    if compiled.pairs is None:
        pytest.skip("this processor has other products")
    wide = Wide(compiled.pairs, Laid(Pairs.packed))
    matrix = Matrix(drawn(64, 96, seed=1).bfloat16(), None, drawn(64, seed=2))
    x, g = drawn(7, 96), drawn(7, 64)
    assert close(wide.times(x, matrix), times(x, matrix))
    assert close(wide.back(g, matrix), times_back(g, matrix))
    odd = Matrix(drawn(10, 12, seed=1).bfloat16(), None, None)  # not in whole panels
    assert close(wide.times(drawn(7, 12), odd), drawn(7, 12) @ odd.values.float().T)
    assert close(wide.back(drawn(7, 10), odd), drawn(7, 10) @ odd.values.float())


def test_norms_and_gates_in_halves(tiles: Tiles) -> None:
    x, weight, rest = drawn(5, 40).requires_grad_(True), drawn(40, seed=1), drawn(5, 40, seed=2)
    plain = block.norm(x, weight, EPSILON)
    assert close(tiles.norm_half(x.detach(), weight, EPSILON).float(), plain, 5e-3)
    gradient = drawn(5, 40, seed=3)
    (own,) = torch.autograd.grad(plain, x, gradient)
    mine = tiles.norm_back(gradient, x.detach(), weight, EPSILON, rest)
    assert close(mine, rest + own)
    gate_up = drawn(5, 80, seed=4).bfloat16()
    gates = gate_up.float().requires_grad_(True)
    plain = torch.nn.functional.silu(gates[:, :40]) * gates[:, 40:]
    assert close(tiles.gate_half(gate_up).float(), plain, 5e-3)
    (own,) = torch.autograd.grad(plain, gates, gradient)
    assert close(tiles.gate_back_half(gradient, gate_up).float(), own, 5e-3)


@pytest.mark.parametrize("m", [1, 17, 32, 50, 64, 130])
def test_losses_of_a_packed_head(products: Tiles | Pairs, m: int) -> None:
    states, weight = drawn(m, 64, scale=2.0), drawn(224, 64, seed=1).bfloat16()
    targets = torch.randint(0, 224, (m,), generator=torch.Generator().manual_seed(2))
    laid, back = products.packed(weight), products.packed(weight.T)
    losses, gradient = products.head_losses(states, laid, back, targets)
    wide = states.double().requires_grad_(True)
    wanted = torch.nn.functional.cross_entropy(wide @ weight.double().T, targets, reduction="none")
    wanted.sum().backward()
    assert gradient is not None
    assert wide.grad is not None
    # 16 bits of a state and of a logit's gradient are left; float32 sums.
    assert close(losses.double(), wanted.detach(), 1e-4)
    assert close(gradient.double(), wide.grad, 1e-4)
    alone, none = products.head_losses(states[:1].contiguous(), laid, None, targets[:1])
    assert none is None
    assert torch.equal(alone, losses[:1]), "a row depends on what stands beside it"


def test_nan_in_a_state_reaches_its_own_loss_only(products: Tiles | Pairs) -> None:
    states, weight = drawn(5, 64), drawn(64, 64, seed=1).bfloat16()
    states[2, 3] = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)[0]
    laid, targets = products.packed(weight), torch.arange(5)
    losses, _ = products.head_losses(states, laid, None, targets)
    assert torch.isfinite(losses).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("size", [1.0, 30.0, 300.0])
def test_gates_and_their_gradient(compiled: Kernels, size: float) -> None:
    gate_up = drawn(6, 100, scale=size).requires_grad_()
    gate, up = gate_up.chunk(2, -1)
    opened = torch.nn.functional.silu(gate) * up
    plain = opened.detach()
    off = (restored(compiled.gate_round(gate_up.detach())) - plain).abs()
    assert bool((off <= level(plain) + 1e-6).all())
    product = torch.randint(-9999, 9999, (6, 50), dtype=torch.int32, generator=seeded())
    scale, channel = drawn(6).abs() * 1e-4, drawn(100, seed=4).abs()
    opened.backward(product.float() * scale[:, None])
    assert gate_up.grad is not None
    expected = gate_up.grad * channel
    mine = restored(compiled.gate_back_round(product, scale, gate_up.detach(), channel))
    assert bool(((mine - expected).abs() <= level(expected) + 1e-6).all())


def rows_of(lengths: list[int], q: int, shared: int, width: int) -> Rows:
    """Lay out rows as `laid_rows` does, with angles drawn at random."""
    t, s, b = sum(lengths), max(lengths), len(lengths)
    spread, packed = torch.zeros(b, s, dtype=torch.long), torch.zeros(t, dtype=torch.long)
    mask = torch.full((b, s, q + shared + s), torch.finfo(torch.float32).min)
    start = 0
    starts = []
    for r, length in enumerate(lengths):
        starts.append(start)
        spread[r, :length] = torch.arange(start, start + length)
        packed[start : start + length] = r * s + torch.arange(length)
        for i in range(s):
            mask[r, i, :q] = 0
            if r or not shared:
                mask[r, i, q : q + shared] = 0
            mask[r, i, q + shared : q + shared + i + 1] = 0
        start += length
    angle = drawn(t, 1, width // 2, seed=9)
    given = Mask((b, 1, s, q + shared + s), lambda: mask[:, None])
    return Rows(
        *(angle.cos(), angle.sin(), spread.flatten(), packed, given),
        *(torch.tensor(starts), torch.tensor(lengths)),
    )


@pytest.mark.parametrize(
    ("lengths", "q", "shared"),
    [
        ([5, 1, 3], 0, 0),
        ([40, 70, 2], 3, 0),
        ([3, 5, 1], 0, 3),
        ([4, 33, 29], 20, 4),
        ([1], 0, 0),
    ],
)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (4, 2, 8), (2, 2, 40)])
def test_attention_and_its_gradient(
    compiled: Kernels,
    lengths: list[int],
    q: int,
    shared: int,
    heads: int,
    kv_heads: int,
    width: int,
) -> None:
    sizes = Sizes(heads, kv_heads, width, EPSILON, shared)
    rows = rows_of(lengths, q, shared, width)
    t, b = sum(lengths), len(lengths)
    qkv = drawn(t, (heads + 2 * kv_heads) * width)
    prefix = drawn(2, b, q, kv_heads, width, seed=1)
    turned = qkv.clone()
    compiled.rotate(turned, rows, sizes)
    assert close(turned, block.turned(qkv, rows, sizes))
    expected = block.attend(turned, prefix, rows, sizes)
    out = compiled.attend(turned, prefix, rows, sizes)
    assert close(out, expected.out)

    gradient = drawn(t, heads * width, seed=2)
    empty = torch.empty(0)
    saved = Saved(empty, empty, *expected.saved, empty)
    g_qkv, g_prefix = block.attend_back(gradient, saved, rows, sizes)
    mine, mine_prefix = compiled.attend_back(gradient, turned, prefix, rows, sizes)
    assert close(mine, g_qkv)
    back = mine.clone()
    compiled.rotate(back, rows, sizes, -1.0)
    assert close(back, block.turned(mine, rows, sizes, back=True))
    assert not q or close(mine_prefix, g_prefix)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (5, 1, 40), (4, 2, 8)])
def test_one_position_of_every_row_over_a_cache(
    compiled: Kernels, heads: int, kv_heads: int, width: int
) -> None:
    """As decoding reads: slots in any order, other numbers seen, what lies behind them not read."""
    sizes, seen, slot = Sizes(heads, kv_heads, width, EPSILON, 0), [7, 0, 33, 20], [4, 0, 2, 1]
    room, b = 36, len(seen)
    mask = torch.full((b, 1, 1, room + 1), torch.finfo(torch.float32).min)
    cache = drawn(2, 5, room, kv_heads, width, seed=1)
    for row, count in enumerate(seen):
        mask[row, :, :, :count] = 0
        mask[row, :, :, room] = 0
    ones, all_rows = torch.ones(b, dtype=torch.long), torch.arange(b)
    angle, given = torch.zeros(b, 1, width // 2), Mask((b, 1, 1, room + 1), lambda: mask)
    rows = Rows(
        *(angle.cos(), angle.sin(), all_rows, all_rows, given, all_rows, ones),
        *(torch.tensor(seen), torch.tensor(slot)),
    )
    qkv = drawn(b, (heads + 2 * kv_heads) * width) * 3
    expected = block.attend(qkv, cache, rows, sizes).out
    assert close(compiled.attend(qkv, cache, rows, sizes), expected)
    # What a row does not see is not read, and a NaN that it sees stays in it.
    for row, count in enumerate(seen):
        cache[:, slot[row], count:] = float("nan")
    assert close(compiled.attend(qkv, cache, rows, sizes), expected)
    cache[0, slot[2], 5] = float("nan")
    out = compiled.attend(qkv, cache, rows, sizes)
    assert torch.isnan(out[2]).all()
    assert close(out[[0, 1, 3]], expected[[0, 1, 3]])


def test_compiled_attention_makes_no_mask(compiled: Kernels) -> None:
    sizes, rows = Sizes(2, 1, 8, EPSILON, 3), rows_of([3, 5, 1], 2, 3, 8)
    qkv, prefix = drawn(9, 4 * 8), drawn(2, 3, 2, 1, 8, seed=1)
    out = compiled.attend(qkv, prefix, rows, sizes)
    bare = rows._replace(mask=Mask(rows.mask.shape, lambda: pytest.fail("a mask was made")))
    assert torch.equal(compiled.attend(qkv, prefix, bare, sizes), out)


def test_nan_in_a_row_stays_in_it_and_is_seen(compiled: Kernels) -> None:
    sizes = Sizes(2, 1, 8, EPSILON, 0)
    rows = rows_of([3, 4], 0, 0, 8)
    qkv = drawn(7, 32)
    qkv[4, 3] = float("nan")
    out = compiled.attend(qkv, drawn(2, 2, 0, 1, 8), rows, sizes)
    assert torch.isfinite(out[:3]).all()
    assert torch.isnan(out[4]).any()


def test_a_damaged_library_is_built_again_by_a_compiler_with_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CC", f"env {shutil.which('cc') or 'gcc'}")
    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "one"))
    kernels.available.cache_clear()
    try:
        assert kernels.available() is not None
        (built,) = tmp_path.rglob("*.so")
        # Elsewhere: this process has the first one loaded, whatever becomes of its file.
        library = tmp_path / "other" / "kernels" / built.name
        library.parent.mkdir(parents=True)
        library.write_bytes(b"cut")
        monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "other"))
        kernels.available.cache_clear()
        assert kernels.available() is not None
        assert library.stat().st_size > 1000
    finally:
        kernels.available.cache_clear()


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path))
    kernels.available.cache_clear()
    try:
        assert kernels.available() is None
        assert not list(tmp_path.rglob("*.so"))
    finally:
        kernels.available.cache_clear()
