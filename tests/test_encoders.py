"""Frozen encoders: rows do not depend on each other, weights never move, the cache is exact."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import ElectraConfig, ElectraModel

from shoulders.encoders.cache import RECENT, EncoderCache
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.encoders.load import load_encoder
from shoulders.errors import LMError
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.store import ArrayStore
from tiny_models import save_tiny_encoder

TEXTS = [
    "The capital of France",
    "no",
    "one two three four five six seven eight nine ten and some more words",
    "Who wrote the book?",
    "Who wrote the books?",
    "who wrote the book?",
]


@pytest.fixture(params=["bert", "t5", pytest.param("embedded", marks=pytest.mark.slow)])
def encoder(request: pytest.FixtureRequest) -> FrozenEncoder:
    if request.param == "embedded":
        return load_encoder("embedded")
    name = {"bert": "tiny_encoder", "t5": "tiny_t5"}[request.param]
    found: FrozenEncoder = request.getfixturevalue(name)
    return found


@pytest.mark.parametrize("soft", [0, 3])
@torch.no_grad()
def test_states_do_not_depend_on_the_batch(encoder: FrozenEncoder, soft: int) -> None:
    random = torch.Generator().manual_seed(0)
    prompt = torch.randn(soft, encoder.hidden_size, generator=random) if soft else None
    ids = encoder.tokenize(TEXTS, room=soft)
    lengths = [len(row) for row in ids]
    assert len(set(lengths)) > 1
    states, mask = encoder.states(ids, prompt)
    assert mask.sum(1).tolist() == [soft + n for n in lengths]
    for row, own in enumerate(ids):
        alone, alone_mask = encoder.states([own], prompt)
        assert alone_mask.all()
        assert float(alone.std()) > 0.01
        difference = (states[row][mask[row]] - alone[0]).abs().max()
        assert float(difference) <= 1e-5 * max(1.0, float(alone.abs().max()))
    other, _ = encoder.states([[*reversed(row)] if i == 2 else row for i, row in enumerate(ids)])
    plain, _ = encoder.states(ids)
    for row in (0, 1, 3, 4, 5):
        assert torch.equal(other[row][: lengths[row]], plain[row][: lengths[row]])
    assert not torch.equal(other[2], plain[2])


@torch.no_grad()
def test_states_equal_the_model_itself(encoder: FrozenEncoder) -> None:
    (ids,) = encoder.tokenize(TEXTS[:1])
    states, _ = encoder.states([ids])
    expected = encoder.model(input_ids=torch.tensor([ids])).last_hidden_state
    assert float((states - expected).abs().max()) <= 1e-5


def test_soft_prompt_is_trained_and_weights_are_not(encoder: FrozenEncoder) -> None:
    before = encoder.digest()
    random = torch.Generator().manual_seed(0)
    start = torch.randn(3, encoder.hidden_size, generator=random) * encoder.embedding_scale
    prompt = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([prompt], lr=1.0)
    states, _ = encoder.states(encoder.tokenize(TEXTS, room=3), prompt)
    # Only the texts' own positions are read: the prompt must act through attention.
    states[:, 3:, ::2].square().mean().backward()
    assert prompt.grad is not None
    assert (prompt.grad.abs().amax(1) > 0).all()
    optimizer.step()
    assert not torch.equal(prompt.detach(), start)
    assert all(not p.requires_grad and p.grad is None for p in encoder.model.parameters())
    assert encoder.digest() == before


def test_long_texts_lose_their_end(encoder: FrozenEncoder) -> None:
    n = encoder.max_tokens
    assert n == (40 if encoder.model.config.model_type == "bert" and n < 512 else 512)
    long, longer = "one two three " * 400, "one two three " * 500
    for room in (0, 5):
        ids = encoder.tokenize([long, longer], room=room)
        assert [len(row) for row in ids] == [n - room] * 2
        assert ids[0] == ids[1]
    with torch.no_grad():
        states, mask = encoder.states(ids, torch.zeros(5, encoder.hidden_size))
    assert states.shape == (2, n, encoder.hidden_size)
    assert mask.all()


# -- cache -------------------------------------------------------------------------------


def fresh(encoder: FrozenEncoder, text: str) -> torch.Tensor:
    with torch.no_grad():
        states, _ = encoder.states(encoder.tokenize([text]))
    return states[0]


def assert_exact(cache: EncoderCache, encoder: FrozenEncoder, texts: list[str]) -> None:
    states, mask = cache.states(texts)
    assert states.dtype == torch.float32
    for row, text in enumerate(texts):
        expected = fresh(encoder, text)
        assert mask[row].tolist() == [True] * len(expected) + [False] * (
            mask.shape[1] - len(expected)
        )
        assert torch.equal(states[row][mask[row]], expected)
        assert not states[row][~mask[row]].any()


def count_encoded(encoder: FrozenEncoder, patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by one entry for every row the encoder computes."""
    calls: list[int] = []
    inner = encoder.states

    def counting(ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.extend(len(row) for row in ids)
        return inner(ids)

    patch.setattr(encoder, "states", counting)
    return calls


def test_cached_states_equal_fresh_ones_bit_for_bit(
    encoder: FrozenEncoder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = EncoderCache(encoder)
    assert_exact(first, encoder, TEXTS[:3])
    assert_exact(first, encoder, [TEXTS[1]])
    second = EncoderCache(encoder)
    assert_exact(second, encoder, [*reversed(TEXTS), TEXTS[0]])
    first.close()
    second.close()
    assert [path.suffix for path in own_cache.rglob("*.sqlite")] == [".sqlite"]
    calls = count_encoded(encoder, monkeypatch)
    third = EncoderCache(encoder)
    states, _ = third.states(TEXTS)
    assert calls == [], "what another instance wrote was not read"
    third.states(["", *TEXTS])
    assert len(calls) == 1
    assert states.shape[0] == len(TEXTS)
    third.close()


def test_how_many_threads_have_computed_is_part_of_the_key(
    tiny_encoder: FrozenEncoder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums may be split between them, and with them the last bits."""
    calls = count_encoded(tiny_encoder, monkeypatch)
    for threads in (1, 2, 1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        cache = EncoderCache(tiny_encoder)
        cache.states(TEXTS[:1])
        cache.close()
    assert len(calls) == 2


def test_a_store_that_another_process_makes_is_waited_for(
    tiny_encoder: FrozenEncoder, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, failed = ArrayStore._open, []

    def busy(path: Path | str) -> sqlite3.Connection:
        if len(failed) < 3:
            failed.append(path)
            raise sqlite3.OperationalError("database is locked")
        return opened(path)

    monkeypatch.setattr(ArrayStore, "_open", staticmethod(busy))
    EncoderCache(tiny_encoder).states(TEXTS[:1])
    calls = count_encoded(tiny_encoder, monkeypatch)
    EncoderCache(tiny_encoder).states(TEXTS[:1])
    assert calls == [], "it was kept on disk"
    assert len(failed) == 3


def test_a_soft_prompt_is_as_wide_as_the_embeddings(
    tmp_path: Path, tiny_lm: Callable[[str], FrozenLM]
) -> None:
    """ELECTRA's and ALBERT's are narrower than their states."""
    save_tiny_encoder(tmp_path)  # for its tokenizer
    sizes = {"embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 1}
    config = ElectraConfig(vocab_size=330, **sizes, num_attention_heads=2, intermediate_size=16)
    ElectraModel(config).save_pretrained(tmp_path)
    generator = {"encoder": str(tmp_path), "encoder_prompt": 3, "width": 16, "heads": 2}
    prompt = {"kind": "idpt", "length": 2, "generator": generator}
    config = SkillConfig.model_validate({"passes": [{"prompt": prompt}]})
    random = torch.Generator().manual_seed(0)
    skill = Skill.create(tiny_lm("llama"), config, load_encoder, random)
    assert skill.generate(TEXTS[:2], DecodingConfig(max_new_tokens=2))


def test_writing_to_what_the_cache_gave_does_not_change_it(
    tiny_encoder: FrozenEncoder, own_cache: Path
) -> None:
    cache = EncoderCache(tiny_encoder)
    states, _ = cache.states(TEXTS)
    states.zero_()
    assert_exact(cache, tiny_encoder, TEXTS)


def test_a_servers_encoder_keeps_the_recent_in_memory_alone(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_encoder(str(save_tiny_encoder(tmp_path / "encoder")), on_disk=False)
    cache = EncoderCache(encoder)
    fresh, _ = cache.states(TEXTS[:1])
    read: list[object] = []
    states = encoder.states
    monkeypatch.setattr(encoder, "states", lambda *a: (read.append(a), states(*a))[1])
    again, _ = cache.states(TEXTS[:1])
    assert torch.equal(fresh, again)
    assert not read, "it was kept"
    cache.states([f"text {i}" for i in range(RECENT)])
    read.clear()
    cache.states(TEXTS[:1])
    assert len(read) == 1, "others were used more recently"
    assert not list(own_cache.rglob("*.sqlite"))


@pytest.mark.parametrize("damage", ["garbage", "empty", "middle", "short row"])
def test_damaged_cache_only_costs_time(
    tiny_encoder: FrozenEncoder, own_cache: Path, damage: str
) -> None:
    cache = EncoderCache(tiny_encoder)
    cache.states([f"text number {i}" for i in range(40)])
    cache.states(TEXTS)
    cache.close()
    (file,) = own_cache.rglob("*.sqlite")
    data = file.read_bytes()
    assert len(data) > 20_000
    if damage == "garbage":
        file.write_bytes(b"\x07" * len(data))
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "middle":
        file.write_bytes(data[:4096] + b"\xff" * (len(data) - 8192) + data[-4096:])
    else:
        db = sqlite3.connect(file)
        db.execute("UPDATE outputs SET states = substr(states, 1, length(states) - 3)")
        db.commit()
        db.close()
    again = EncoderCache(tiny_encoder)
    assert_exact(again, tiny_encoder, TEXTS)
    assert_exact(again, tiny_encoder, TEXTS)
    again.close()


def test_encoders_do_not_share_entries(
    tiny_encoder: FrozenEncoder, tiny_t5: FrozenEncoder, own_cache: Path
) -> None:
    assert tiny_encoder.fingerprint != tiny_t5.fingerprint
    for encoder in (tiny_encoder, tiny_t5):
        assert_exact(EncoderCache(encoder), encoder, TEXTS)
    assert len(list(own_cache.rglob("*.sqlite"))) == 2


# -- loading -----------------------------------------------------------------------------


def test_encoder_half_of_t5_is_loaded(tiny_t5: FrozenEncoder) -> None:
    names = [name for name, _ in tiny_t5.model.named_parameters()]
    assert names
    assert not any("decoder" in name or "lm_head" in name for name in names)
    assert not tiny_t5.model.training


def test_wrong_name_is_an_lm_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LMError, match="no-such-org/no-such-encoder"):
        load_encoder("no-such-org/no-such-encoder")
    with pytest.raises(LMError, match=f"encoder {tmp_path}: not a readable local folder"):
        load_encoder(str(tmp_path))


def test_damaged_weights_are_an_lm_error(bert_folder: Path, tmp_path: Path) -> None:
    for file in bert_folder.iterdir():
        data = file.read_bytes()
        half = len(data) // 2 if file.suffix == ".safetensors" else len(data)
        (tmp_path / file.name).write_bytes(data[:half])
    with pytest.raises(LMError, match=str(tmp_path)):
        load_encoder(str(tmp_path))


def test_an_encoder_lies_beside_the_lm_it_is_for(
    tiny_encoder: FrozenEncoder,
    tiny_lm: Callable[[str], FrozenLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a GPU is, encoders are loaded to it, an int8 LM to the CPU."""
    lm, moved = tiny_lm("llama"), []
    monkeypatch.setattr(FrozenEncoder, "beside", lambda self, device: moved.append(device) or self)
    config = SkillConfig.model_validate({"passes": [{"prompt": {"kind": "idpt", "length": 2}}]})
    Skill.create(lm, config, lambda _: tiny_encoder)
    assert moved == [lm.device]
    monkeypatch.undo()
    assert tiny_encoder.beside(torch.device("cpu")).device.type == "cpu"
    other = load_encoder(str(save_tiny_encoder(tmp_path / "encoder")), device="cpu")
    assert other.beside(torch.device("meta")).device.type == "meta"
