"""One vector for each text: pooled states of a frozen encoder, as its makers meant them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.encoders.load import EMBEDDED, embedded_folder, load_encoder
from shoulders.errors import LMError

Pooling = Literal["mean", "cls"]
# Positions of a batch, pads included: enough to keep two cores busy, small enough for their cache.
_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class SentenceConfig:
    """How states become one vector.

    Attributes:
        pooling: mean over the text's tokens (sentence-transformers' usual), or the first token's
            state (DPR, Spider).
        normalize: to length 1.
        pair: title and text are given as two segments, as DPR and Spider do; else as one text.
        max_tokens: what is longer loses its end.
        question_prompt: put before questions, where the encoder was trained so.
        passage_prompt: put before passages.
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    pair: bool = False
    max_tokens: int = 512
    question_prompt: str = ""
    passage_prompt: str = ""


class SentenceEncoder:
    """A frozen encoder with pooling: questions and passages -> vectors `[n, e]` float32."""

    def __init__(self, encoder: FrozenEncoder, config: SentenceConfig) -> None:
        self.encoder = encoder
        self.config = config

    @property
    def dimensions(self) -> int:
        """Width `e` of the vectors."""
        return self.encoder.hidden_size

    def questions(self, texts: Sequence[str]) -> np.ndarray:
        """Return vectors `[n, e]` of questions."""
        return self._embed(self._ids([self.config.question_prompt + text for text in texts]))

    def passages(
        self, titled: Sequence[tuple[str, str]], advance: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """Return vectors `[n, e]` of passages, given as title and text.

        Those of like length are encoded together; `advance` is told after each batch.
        """
        prompt = self.config.passage_prompt
        if self.config.pair:
            # A passage without a title is one segment, not an empty one and another.
            ids = self._ids(
                [prompt + (title or text) for title, text in titled],
                [text if title else None for title, text in titled],
            )
        else:
            ids = self._ids([prompt + (f"{t}. {x}" if t else x) for t, x in titled])
        return self._embed(ids, advance)

    def _ids(
        self, texts: Sequence[str], pairs: Sequence[str | None] | None = None
    ) -> list[list[int]]:
        tokenize = functools.partial(self.encoder.tokenize, most=self.config.max_tokens)
        if pairs is None or not any(pairs):
            return tokenize(texts) if texts else []
        return [
            tokenize([text], second=None if pair is None else [pair])[0]
            for text, pair in zip(texts, pairs, strict=True)
        ]

    @torch.inference_mode()
    def _embed(
        self, ids: list[list[int]], advance: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        vectors = np.zeros((len(ids), self.dimensions), dtype=np.float32)
        for batch in _batches([len(row) for row in ids]):
            states, mask = self.encoder.states([ids[i] for i in batch])
            vectors[batch] = self._pooled(states.float(), mask).cpu().numpy()
            advance(len(batch))
        return vectors

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.config.pooling == "cls":
            pooled = states[:, 0]
        else:
            weights = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=-1) if self.config.normalize else pooled


def load_sentence_encoder(
    name: str = EMBEDDED, *, pooling: Pooling | None = None, device: str | None = None
) -> SentenceEncoder:
    """Load a text encoder and how it is pooled.

    Args:
        name: `embedded`, a Hub id, or a folder; of sentence-transformers, DPR, or any encoder.
        pooling: overrides what the folder says. Where it says nothing: mean and length 1, of a
            DPR encoder its first state as it is.
        device: a torch device; default `cuda` where there is one, else `cpu`.

    Raises:
        LMError: it cannot be loaded, or its vectors are made in a way that is not known here.
    """
    encoder = load_encoder(name, device=device)
    source = str(embedded_folder()) if name == EMBEDDED else name
    config = _config(source, name, encoder, pooling)
    return SentenceEncoder(encoder, config)


def _config(
    source: str, name: str, encoder: FrozenEncoder, pooling: Pooling | None
) -> SentenceConfig:
    modules = _json(source, "modules.json")
    if modules is None:
        if encoder.model.name_or_path and _is_dpr(source) and pooling in (None, "cls"):
            return SentenceConfig("cls", False, True, encoder.max_tokens)
        cls = pooling == "cls"
        # An encoder without a word about pooling: vectors of length 1, but CLS as DPR and Spider.
        return SentenceConfig(pooling or "mean", not cls, cls, encoder.max_tokens)
    kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    unknown = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise LMError(f"encoder {name}: its module {', '.join(unknown)} is not supported")
    if "Pooling" in kinds:
        own = _pooling(_json(source, f"{kinds['Pooling']}/config.json") or {}, name)
    elif pooling is None:
        raise LMError(f"encoder {name}: its modules name no Pooling; say which (mean, cls)")
    limits = _json(source, "sentence_bert_config.json") or {}
    prompts = (_json(source, "config_sentence_transformers.json") or {}).get("prompts") or {}
    return SentenceConfig(
        pooling=pooling or own,
        normalize="Normalize" in kinds,
        pair=False,
        max_tokens=min(int(limits.get("max_seq_length") or 512), encoder.max_tokens),
        question_prompt=prompts.get("query") or "",
        passage_prompt=prompts.get("document") or prompts.get("passage") or "",
    )


def _pooling(config: dict[str, Any], name: str) -> Pooling:
    """Return the pooling of a sentence-transformers module, in its older form or the newer one."""
    modes = config.get("pooling_mode")
    if modes is None:
        names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
        modes = [names.get(key, key) for key, on in config.items() if on is True and "mode" in key]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if modes not in (["mean"], ["cls"]):
        raise LMError(f"encoder {name}: its pooling {', '.join(modes)} is not supported")
    return modes[0]


def _is_dpr(source: str) -> bool:
    return (_json(source, "config.json") or {}).get("model_type") == "dpr"


def _json(source: str, file: str) -> Any:
    """Return a JSON file of a local folder or Hub repository, None where there is none."""
    from transformers.utils import cached_file

    path = cached_file(
        source,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as handle:  # noqa: PTH123 - a path of another library
        return json.load(handle)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Group places by length, longest first: few pads, and memory at its most at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= _BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
