"""lm-evaluation-harness: a frozen LM, alone or with a skill, as one of its models.

Without a skill it gives the numbers of the harness's own transformers backend: tokens are split,
windows are cut and answers are stopped as there. With one, there are two ways to read a request:
`format=skill` (the default) as `shoulders eval` does, the context being the skill's input and the
continuation an answer in its text format; `format=plain` puts no separator between the two and
splits tokens as the backend does, the skill's prompt standing before them. Running text is read
plainly in both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from shoulders.errors import ShouldersError, WindowError
from shoulders.evaluation.harness.options import (
    BASE,
    batch_rows,
    checked_room,
    decoding_of,
    leaving,
    opened,
)
from shoulders.evaluation.harness.requests import bar, in_order
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.score import Score
from shoulders.reader.libraries import needed
from shoulders.skills.config import BATCH_ROWS
from shoulders.skills.generating import generated
from shoulders.skills.scoring import scored_ids

LOG = logging.getLogger("shoulders.evaluation")
TemplateLM: Any = needed("lm_eval.api.model", "harness").TemplateLM


class HarnessModel(TemplateLM):
    """The model `shoulders` of the harness.

    Args:
        skill: a skill's folder, or `base` for the LM alone.
        lm: `embedded`, a Hub id, a folder or a `.gguf` file; default: the skill's own.
        dtype: `auto`, `float32`, `bfloat16` or `int8`; default: the skill's own, or `auto`.
        format: `skill` or `plain`, see above; default: `plain` for the LM alone.
        batch_size: rows computed together, or `auto`.
        max_batch_size: most of them, with `auto`.
        device: a torch device; one of CUDA is left out where there is none.
        max_gen_toks: longest answer of tasks that name none.
        seed: of sampled answers.

    Raises:
        ShouldersError: an argument is unknown or cannot be had; the skill is a reader.
    """

    def __init__(
        self,
        skill: str = BASE,
        lm: str | None = None,
        dtype: str | None = None,
        format: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ShouldersError(
                f"--model_args {', '.join(unknown)}: unknown; there are skill, lm, dtype, format, "
                "batch_size, max_batch_size, device, max_gen_toks and seed"
            )
        if format not in (None, "skill", "plain"):
            raise ShouldersError(f"format={format}: use skill or plain")
        self._name = str(skill)
        self._rows = batch_rows(batch_size, max_batch_size)
        self._plain = (format or ("plain" if self._name == BASE else "skill")) == "plain"
        self.skill = opened(self._name, lm, dtype, device)
        self.max_gen_toks, self._seed = int(max_gen_toks), int(seed)
        self.tokenizer = self.skill.lm.tokenizer
        self._device = self.skill.lm.device
        proposals = self.skill.proposals
        if proposals is not None and self._plain:
            raise ShouldersError(f"{self._name} proposes text in its own format: leave out plain")
        self._judges = proposals is None or proposals.config.chooser == "second_pass"

    # -- facts ---------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens that fit beside the skill's prompt."""
        return self.skill.lm.max_positions - self.skill.prompt_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end: int = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context."""
        first: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps tokenised requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness notes beside its results."""
        lm = self.skill.lm
        return {
            "model_num_parameters": lm.parameters,
            "model_dtype": lm.precision,
            "skill": self._name,
            "skill_parameters": self.skill.trained_parameters,
            "skill_format": "plain" if self._plain else "skill",
            "lm": lm.name,
            "lm_fingerprint": lm.fingerprint,
        }

    # -- texts and tokens ----------------------------------------------------------------

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: Any,
    ) -> list[int]:
        """Return token ids as the transformers backend has them, special tokens included."""
        options: dict[str, Any] = {}
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        elif string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            options["add_special_tokens"] = False
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation in the LM's chat template, to be read plainly."""
        if not self._plain:
            raise ShouldersError(
                f"{self._name} frames inputs itself: leave out --apply_chat_template, or add "
                "format=plain to --model_args"
            )
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # -- likelihoods ---------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return each continuation's log-likelihood and whether it is the greedy answer.

        In the skill's format the end of the answer is part of it, as in training.
        """
        if self._plain:
            found: list[tuple[float, bool]] = super().loglikelihood(
                list(requests), disable_tqdm=disable_tqdm
            )
            return found
        if not self._judges:
            raise ShouldersError(f"{self._name} chooses among samples: it has no likelihoods")
        pairs = [request.args for request in requests]
        rows: dict[str, list[int]] = {}
        for number, (context, _) in enumerate(pairs):
            rows.setdefault(context, []).append(number)
        texts = list(rows)
        # The format brings its own space before an answer.
        answers = [[pairs[i][1].lstrip() for i in own] for own in rows.values()]
        skill = leaving(self.skill)
        scores: list[list[Score]] = []
        with bar("likelihoods", len(texts), disable_tqdm) as advance:
            for at in range(0, len(texts), self._rows or len(texts)):
                part = slice(at, at + (self._rows or len(texts)))
                scores += skill.score(texts[part], answers[part], on_rows=advance)
        return in_order(pairs, list(rows.values()), scores, self.cache_hook)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Score continuations in tokens; those of equal contexts share what is read."""
        rows: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        cut = 0
        for number, (strings, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise WindowError(
                    f"a continuation has {len(continuation)} tokens, {self.max_length} fit"
                )
            # The last token is not read, so that the context has the window but one.
            kept = context[-(self.max_length + 1 - len(continuation)) :]
            cut += len(kept) < len(context)
            rows.setdefault((strings[0] if strings else "", tuple(kept)), []).append(number)
        if cut:
            LOG.warning("%d contexts are longer than the window: their ends are read", cut)
        with bar("likelihoods", len(rows), disable_tqdm) as advance:
            scores = scored_ids(
                self.skill,
                [text for text, _ in rows],
                [list(ids) for _, ids in rows],
                [[list(requests[i][2]) for i in own] for own in rows.values()],
                advance,
                self._rows or BATCH_ROWS,
            )
        asked = [strings for strings, _, _ in requests]
        return in_order(asked, list(rows.values()), scores, self.cache_hook)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of running texts, window by window; producers read nothing."""
        if self.skill.proposals is not None:
            raise ShouldersError(f"{self._name} proposes text: it predicts no running text")
        utils = needed("lm_eval.utils", "harness")
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm) if windows else []
        for owner, (logprob, _) in zip(owners, found, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # -- answers -------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return each context's answer, up to the first of its stop strings."""
        normalize = needed("lm_eval.models.utils", "harness").normalize_gen_kwargs
        groups: dict[tuple[str, int], list[int]] = {}
        seen: dict[tuple[str, str], int] = {}
        for number, request in enumerate(requests):
            context, how = request.args
            key = json.dumps(how, sort_keys=True, default=str)
            # The same request again is another sample of it: another seed.
            again = seen[context, key] = seen.get((context, key), -1) + 1
            groups.setdefault((key, again), []).append(number)
        found: dict[int, str] = {}
        with bar("answers", len(requests), disable_tqdm) as advance:
            for (_, again), own in groups.items():
                how = normalize(requests[own[0]].args[1], self.max_gen_toks)
                texts = [requests[i].args[0] for i in own]
                decoding = decoding_of(how, self._seed + again)
                answers = self._answers(texts, decoding, advance)
                found |= dict(zip(own, answers, strict=True))
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, found[number])
        return [found[i] for i in range(len(requests))]

    def _answers(
        self, texts: Sequence[str], decoding: DecodingConfig, advance: Callable[[int], None]
    ) -> list[str]:
        if not self._plain:
            skill, size = leaving(self.skill, decoding.max_new_tokens), self._rows or len(texts)
            several = []
            for at in range(0, len(texts), size):
                several += skill.generate(texts[at : at + size], decoding, on_rows=advance)
            return [own[0].text for own in several]
        room = checked_room(self.max_length - decoding.max_new_tokens, decoding.max_new_tokens)
        ids = [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in texts]
        most = self._rows or BATCH_ROWS
        return [own[0].text for own in generated(self.skill, texts, ids, decoding, advance, most)]
