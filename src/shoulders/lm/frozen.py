"""`FrozenLM`: one causal LM that never changes, seen as embeddings -> hidden -> logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from shoulders.fingerprint import digest
from shoulders.lm.drivable import check_drivable, fused_as_its_own, packs_apart
from shoulders.lm.factors import Site
from shoulders.lm.fused import Blocks
from shoulders.lm.head import Head
from shoulders.lm.hooks import LayerHooks
from shoulders.lm.identity import lm_fingerprint, lm_tensors
from shoulders.lm.int8 import Int8Linear
from shoulders.lm.lent import device_of, held_tensors, size
from shoulders.lm.masks import masks_by_position
from shoulders.lm.prefix_shape import PrefixShape, prefix_shape
from shoulders.lm.quantized import Quantization
from shoulders.lm.shard import Shards, decoder_layers
from shoulders.lm.sites import sites_of
from shoulders.lm.tokens import Tokens
from shoulders.lm.updates import Updates
from shoulders.lm.window import has_local_places, sliding_window_of, window_of


class FrozenLM:
    """A Hugging Face causal LM, frozen and in eval mode.

    Everything above this class speaks embeddings `[b, s, d]`, hidden states `[b, s, d]` and
    logits at chosen positions `[n, vocabulary]`; architecture differences end here.

    Raises:
        LMError: the model cannot be driven from embeddings exactly (checked once, by
            comparing with its own forward pass on token ids).

    Examples:
        >>> from shoulders.lm.load import load_lm
        >>> lm = load_lm("embedded")
        >>> lm.hidden_size, lm.max_positions
        (576, 8192)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        *,
        fingerprint: str | None = None,
        quantize: Quantization | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._tokens = Tokens(tokenizer)
        self.name = name
        self.quantize = quantize
        self._embedding = model.get_input_embeddings()
        self._head = model.get_output_embeddings()
        self._body = model.base_model
        self.shards = shards
        # Length of its window in positions, and how many its sliding layers see.
        self.max_positions = window_of(model.config, name)
        self.sliding_window = sliding_window_of(model.config)
        self._laid = Blocks.of(model) if shards is None else None
        if self._laid is not None and self.precision != "float32":
            # Beyond a sliding window our own layers do not compute; others round otherwise, and
            # which ones do must not depend on what a row is beside.
            self.max_positions = self.seen_whole
        self._fingerprint = fingerprint
        self.takes_positions = "position_ids" in inspect.signature(self._body.forward).parameters
        # Whether rows may be laid end to end, each with positions of its own.
        self.packs = self.takes_positions and not has_local_places(model.config)
        alone = check_drivable(self)
        self.packs = self.packs and packs_apart(self, alone)

    @functools.cached_property
    def blocks(self) -> Blocks | None:
        """Our own layers, where they compute what the LM's do; tried when first asked for.

        Not when it is loaded: to try them packs the weights, which takes memory.
        """
        laid = self._laid
        if laid is None or fused_as_its_own(self, laid):
            return laid
        self._laid = None  # and with it what was packed to try them
        return None

    # -- facts ---------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Device of the LM's embeddings, where its inputs must be."""
        return device_of(self._embedding)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type in which the LM computes."""
        return self._embedding.weight.dtype

    @property
    def hidden_size(self) -> int:
        """Width `d` of token embeddings and hidden states."""
        return self._embedding.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding matrix."""
        return self._embedding.weight.shape[0]

    @property
    def layers(self) -> int:
        """Number of its layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def parameters(self) -> int:
        """Number of frozen parameters (tied matrices counted once)."""
        held = held_tensors(self.model)
        return sum(size(t) for _, _, t in held if isinstance(t, nn.Parameter))

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer; the first is the one taught in training."""
        return self._tokens.ends(self.model.generation_config)

    @functools.cached_property
    def start_ids(self) -> tuple[int, ...]:
        """Token ids that every text begins with; a chat template brings its own."""
        return self._tokens.starts()

    @functools.cached_property
    def prefix_shape(self) -> PrefixShape:
        """Shape of the key/value cache; raises `LMError` where layers differ in shape or place."""
        return prefix_shape(self)

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """Products of a layer that low-rank factors change; `LMError` where layers differ."""
        return sites_of(decoder_layers(self.model), self.name)

    @functools.cached_property
    def embedding_scale(self) -> float:
        """Standard deviation of the token embeddings as the LM sees them.

        Measured through the embedding module, since some LMs (Gemma) scale inside it.
        """
        ids = torch.arange(0, self.vocab_size, max(1, self.vocab_size // 4096))
        return float(self.embed(ids.to(self.device)).float().std())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of weights and tokenizer that a skill is bound to (64 hex digits).

        Independent of the precision the weights were loaded in; computed on first use.
        """
        return self._fingerprint or lm_fingerprint(self.model, self.tokenizer)

    @functools.cached_property
    def precision(self) -> str:
        """What its linear layers compute in: `float32`, `bfloat16`, ... or `int8`."""
        if any(isinstance(module, Int8Linear) for module in self.model.modules()):
            return "int8"
        return str(self.dtype).removeprefix("torch.")

    def digest(self) -> str:
        """Return the SHA-256 over every byte of every tensor as it is now (promise 1)."""
        return digest(lm_tensors(self.model))

    # -- computing -----------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Map token ids `[...]` to embeddings `[..., d]`, scaled as the LM itself does."""
        embedded: Tensor = self._embedding(ids)
        return embedded

    def embed_rows(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the embeddings of rows of token ids end to end, `[t, d]`."""
        return self.embed(torch.tensor([i for ids in token_ids for i in ids], device=self.device))

    @property
    def seen_whole(self) -> int:
        """Positions within which every layer sees all that came before: its window, or less."""
        return min(self.max_positions, self.sliding_window or self.max_positions)

    def new_cache(self) -> DynamicCache:
        """Return an empty key/value cache for this LM.

        Sliding-window LMs get plain layers: theirs would drop keys by place in the batch,
        where pads count, and `hidden` masks by position instead.
        """
        return DynamicCache() if self.sliding_window else DynamicCache(config=self.model.config)

    def hidden(
        self,
        embeddings: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: DynamicCache | None = None,
        taps: Sequence[int] = (),
        updates: Updates | None = None,
        owner: Tensor | None = None,
    ) -> Tensor:
        """Run the LM's layers.

        Args:
            embeddings: `[b, s, d]`.
            mask: `[b, c + s]` int64, 1 where a position is real; `c` positions are cached.
                Or `[b, 1, s, c + s]`, added to the attention scores of every layer as it is.
            positions: `[b, s]` int64, each token's place among its row's real positions.
            cache: keys/values of earlier positions; extended in place.
            taps: layers to return the states of instead: 0 is what the first layer reads, `i` what
                the `i`-th has written. The last layer's, before the final norm, is seen through
                fused layers only (`Blocks`).
            updates: of the rows' states between layers.
            owner: `[b, s]`, with updates: the row of each position; by default row `i` is `i`.

        Returns:
            Last hidden states after the final norm, `[b, s, d]`; with `k` taps `[k, b, s, d]`.
        """
        if self.shards is not None:
            self.shards.announce()
        if self.sliding_window and mask.dim() == 2 and mask.shape[1] > self.sliding_window:
            mask = masks_by_position(
                mask, embeddings.shape[1], self.sliding_window, self.dtype, self.model.config
            )
        arguments: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        if owner is None:
            owner = torch.arange(len(embeddings), device=self.device)[:, None].expand_as(positions)
        with self._hooks.applying(updates, owner) if updates else nullcontext():
            output = self._body(
                inputs_embeds=embeddings.to(self.dtype),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=cache is not None,
                output_hidden_states=bool(taps),
                **arguments,
            )
        if taps:
            # Its last entry is normed: not what the last layer has written.
            return torch.stack([output.hidden_states[:-1][i].to(self.device) for i in taps])
        states: Tensor = output.last_hidden_state
        return states.to(self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states at chosen positions `[n, d]` to float32 logits `[n, vocabulary]`.

        Two-dimensional on purpose: a batched backward would copy the vocabulary matrix.
        """
        if self._packed_head is not None and not hidden.requires_grad:
            return self._packed_head.logits(hidden)
        return self.plain_logits(hidden)

    def plain_logits(self, hidden: Tensor) -> Tensor:
        """Return `logits` through the LM's own head, whatever is packed."""
        logits: Tensor = self._head(hidden.to(self.dtype)).to(self.device).float()
        cap = self._cap
        return torch.tanh(logits / cap) * cap if cap is not None else logits

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return negative log-likelihoods `[n]` of `targets [n]` at hidden states `[n, d]`."""
        if self._packed_head is not None:
            return self._packed_head.losses(hidden, targets)
        return nn.functional.cross_entropy(self.logits(hidden), targets, reduction="none")

    def settle(self) -> None:
        """Return when no process needs this one any more for the layers that they share."""
        if self.shards is not None:
            self.shards.settle()

    def tokenize(self, texts: Sequence[str], *, markup: bool = False) -> list[list[int]]:
        """Return token ids of each text, special ones only with `markup`; see `Tokens`."""
        return self._tokens.of(texts, markup=markup)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are left out, spaces kept as they are."""
        return self._tokens.text(ids)

    @functools.cached_property
    def _packed_head(self) -> Head | None:
        capped = self._cap is not None
        if capped or self.blocks is None or self.precision not in ("int8", "bfloat16"):
            return None  # float32 stays exact
        return Head.of(self._head)

    @property
    def _cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    @functools.cached_property
    def _hooks(self) -> LayerHooks:
        return LayerHooks(decoder_layers(self.model))
