"""The encoder of questions that belongs to stored vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoulders.errors import ArtefactError
from shoulders.reader.index.manifest import EncoderFacts

if TYPE_CHECKING:
    from shoulders.encoders.sentence import SentenceEncoder


def question_encoder(
    facts: EncoderFacts, where: object, encoder: SentenceEncoder | None = None
) -> SentenceEncoder:
    """Return `encoder`, by default the one that `facts` names, if it is what made the vectors.

    Args:
        facts: of the encoder of questions.
        where: the vectors are, for messages.
        encoder: loaded already; None loads it.

    Raises:
        ArtefactError: it is another one, or set otherwise.
        LMError: it cannot be loaded.
    """
    from shoulders.encoders.sentence import load_sentence_encoder
    from shoulders.reader.index.dense import encoder_facts

    if encoder is None:
        encoder = load_sentence_encoder(facts.name, pooling=facts.pooling)
    if encoder_facts(encoder).model_copy(update={"name": facts.name}) != facts:
        raise ArtefactError(
            f"{where}: encoder {encoder.encoder.name} is not the one of its vectors, "
            f"{facts.name} (fingerprint or settings differ)"
        )
    return encoder
