"""Vectors of texts: as sentence-transformers makes them, and as DPR and Spider do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from shoulders.encoders.load import load_encoder
from shoulders.encoders.sentence import _batches, load_sentence_encoder
from shoulders.errors import LMError
from tiny_models import save_tiny_encoder, tiny_tokenizer

TEXTS = ["a", "the capital of france", "of spain is madrid and so on and on and on", "two words"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def alone(folder: Path, text: str) -> torch.Tensor:
    """Return the states `[t, e]` of one text by the plain model."""
    encoder = load_encoder(str(folder))
    with torch.no_grad():
        return encoder.states(encoder.tokenize([text]))[0][0]


def test_mean_and_first_state(tiny: Path) -> None:
    means = load_sentence_encoder(str(tiny)).questions(TEXTS)
    firsts = load_sentence_encoder(str(tiny), pooling="cls").questions(TEXTS)
    assert means.dtype == np.float32
    for text, mean, first in zip(TEXTS, means, firsts, strict=True):
        states = alone(tiny, text)
        expected = torch.nn.functional.normalize(states.mean(0), dim=-1)
        np.testing.assert_allclose(mean, expected, atol=1e-5)
        np.testing.assert_allclose(first, states[0], atol=1e-5)
    assert load_sentence_encoder(str(tiny)).questions([]).shape == (0, 24)


def test_passages_are_title_and_text_and_keep_their_order(tiny: Path) -> None:
    encoder = load_sentence_encoder(str(tiny))
    titled = [("t" * (n % 3), "word " * (n % 7 + 1)) for n in range(40)]
    told: list[int] = []
    vectors = encoder.passages(titled, told.append)
    assert sum(told) == 40
    singly = np.concatenate([encoder.passages([pair]) for pair in titled])
    np.testing.assert_allclose(vectors, singly, atol=1e-5)
    np.testing.assert_allclose(
        encoder.passages([("of", "spain"), ("", "spain")]),
        encoder.questions(["of. spain", "spain"]),
        atol=1e-6,
    )


def test_batches_have_few_pads() -> None:
    lengths = np.random.default_rng(0).integers(5, 250, size=2000).tolist()
    batches = _batches(lengths)
    assert sorted(i for batch in batches for i in batch) == list(range(2000))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert max(padded) <= 4096
    assert sum(padded) < 1.05 * sum(lengths)


def with_modules(tiny: Path, folder: Path, pooling: dict, *, normalize: bool, **more: dict) -> str:
    shutil.copytree(tiny, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {"path": "" if kind == "Transformer" else f"{n}_{kind}", "type": f"x.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules + more.pop("modules", [])))
    for name, value in more.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return str(folder)


def test_an_encoder_that_names_no_pooling_is_asked_for_it(tiny: Path, tmp_path: Path) -> None:
    name = with_modules(tiny, tmp_path / "a", {}, normalize=False)
    modules = [{"path": "", "type": "x.models.Transformer"}]
    (Path(name) / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(LMError, match="its modules name no Pooling"):
        load_sentence_encoder(name)
    assert load_sentence_encoder(name, pooling="cls").config.pooling == "cls"


def test_what_the_folder_says_is_done(tiny: Path, tmp_path: Path) -> None:
    old = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    prompts = {"prompts": {"query": "question ", "document": "document "}}
    name = with_modules(
        tiny,
        tmp_path / "a",
        old,
        normalize=False,
        sentence_bert_config={"max_seq_length": 5},
        config_sentence_transformers=prompts,
    )
    encoder = load_sentence_encoder(name)
    found = encoder.config
    assert (found.pooling, found.normalize, found.pair, found.max_tokens) == (
        "cls",
        False,
        False,
        5,
    )
    plain = load_sentence_encoder(str(tiny), pooling="cls")
    long = load_encoder(str(tiny)).tokenize(["question abcdefgh"])[0]
    assert len(long) > 5, "more tokens than the folder allows"
    np.testing.assert_allclose(encoder.questions(["abcdefgh"]), plain._embed([long[:5]]), atol=1e-5)
    assert encoder.config.question_prompt == "question "
    assert encoder.config.passage_prompt == "document "
    new = with_modules(tiny, tmp_path / "b", {"pooling_mode": "mean"}, normalize=True)
    assert load_sentence_encoder(new).config.pooling == "mean"
    assert load_sentence_encoder(new, pooling="cls").config.pooling == "cls"


def test_what_is_not_known_is_refused(tiny: Path, tmp_path: Path) -> None:
    odd = with_modules(tiny, tmp_path / "a", {"pooling_mode": "lasttoken"}, normalize=True)
    with pytest.raises(LMError, match="its pooling lasttoken is not supported"):
        load_sentence_encoder(odd)
    module = {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    odd = with_modules(
        tiny, tmp_path / "b", {"pooling_mode": "mean"}, normalize=True, modules=[module]
    )
    with pytest.raises(LMError, match="its module Dense is not supported"):
        load_sentence_encoder(odd)


@pytest.mark.parametrize("kind", ["DPRContextEncoder", "DPRQuestionEncoder"])
def test_dpr_encoders_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(3)
    config = transformers.DPRConfig(
        vocab_size=330,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    encoder = load_sentence_encoder(str(tmp_path))
    assert (encoder.config.pooling, encoder.config.normalize, encoder.config.pair) == (
        "cls",
        False,
        True,
    )
    ids = tokenizer("the capital", "of spain", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).pooler_output[0]
    np.testing.assert_allclose(
        encoder.passages([("the capital", "of spain")])[0], expected, atol=1e-5
    )


@pytest.mark.slow
def test_the_embedded_encoder_as_sentence_transformers_has_it() -> None:
    library = pytest.importorskip("sentence_transformers")
    from shoulders.encoders.load import embedded_folder

    texts = ["who wrote Hamlet", "Hamlet is a tragedy by William Shakespeare. " * 40]
    expected = library.SentenceTransformer(str(embedded_folder()), device="cpu").encode(texts)
    found = load_sentence_encoder(device="cpu").questions(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)
