"""A cross-encoder reads question and passage together and scores the pair.

On disk: what sentence-transformers writes (JSON and safetensors) and `reranker.json`, which lists
every file with its SHA-256.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shoulders import __version__
from shoulders.encoders.load import EMBEDDED, embedded_folder
from shoulders.errors import ArtefactError, LMError
from shoulders.files import atomic_directory, sha256_of_file, write_json
from shoulders.manifest import read_versioned
from shoulders.reader.libraries import needed
from shoulders.reader.mining import MiningConfig
from shoulders.reader.passage import Passage
from shoulders.reader.reranker import OnPairs, Scores, check_shapes, headed, length_sorted
from shoulders.reader.rerankers.global_state import quiet, seeded
from shoulders.reader.rerankers.losses import LossKind

FILE = "reranker.json"
FORMAT_VERSION = 1
BATCH_PAIRS = 32
# A batch's characters (about four to a token): long passages go together in smaller batches.
BATCH_CHARACTERS = 24_000
# No token is that long: what lies behind it is cut away in any case, here before it is tokenized.
MOST_CHARACTERS_A_TOKEN = 32


class CrossEncoderConfig(BaseModel):
    """How a cross-encoder is made and trained.

    Attributes:
        encoder: where to start: `embedded` (MiniLM), a Hub id or a folder; an encoder without a
            head gets a new one.
        max_length: most tokens of question and passage together; the end of the passage is cut.
        loss: `listwise` or `binary` (`losses.loss_of_list`).
        epochs: passes over the questions.
        rows_per_step: questions, each with its list of passages, in one optimizer step.
        rows_per_pass: questions in one forward and backward pass: bounds memory.
        lr: AdamW's highest learning rate, after a linear warm-up and before a linear decay.
        warmup: share of the steps.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        dropout: instead of the encoder's own; 0 takes a quarter off the time on CPUs.
        seed: of a new head, of dropout, of the order of questions, and of folds.
        mining: the passages of a list.
        folds: in how many parts the questions are split to be scored by models that did not see
            them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = EMBEDDED
    max_length: int = Field(default=192, ge=8)
    loss: LossKind = "listwise"
    epochs: int = Field(default=2, ge=1)
    rows_per_step: int = Field(default=16, ge=1)
    rows_per_pass: int = Field(default=4, ge=1)
    lr: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    seed: int = Field(default=0, ge=0)
    mining: MiningConfig = MiningConfig()
    folds: int = Field(default=3, ge=2)


class Manifest(BaseModel):
    """What `reranker.json` holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    shoulders_version: str
    kind: Literal["cross_encoder"]
    config: CrossEncoderConfig
    parameters: int
    files: dict[str, str]
    provenance: dict[str, Any]


class CrossEncoderReranker:
    """Scores pairs by the logit of a sentence-transformers `CrossEncoder` with one output."""

    def __init__(self, model: Any, config: CrossEncoderConfig) -> None:
        self.model = model.eval()
        self.config = config

    @classmethod
    def start(
        cls, config: CrossEncoderConfig, *, device: str | None = None
    ) -> CrossEncoderReranker:
        """Return the encoder that training starts from; a new head is drawn from `config.seed`.

        A Hub model that was trained as a re-ranker scores as it is.

        Raises:
            LMError: the encoder cannot be found or read, or its head has several outputs.
            ShouldersError: sentence-transformers is not installed.
        """
        source = str(embedded_folder()) if config.encoder == EMBEDDED else config.encoder
        with seeded(config.seed):
            model = _opened(source, config.encoder, config.max_length, device)
        return cls(model, config)

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def score(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        retrieved: Sequence[Sequence[float]],
        *,
        on_pairs: OnPairs | None = None,
    ) -> Scores:
        """Return the logit of each pair, computed in batches of similar length."""
        import torch

        check_shapes(questions, passages, retrieved)
        most = MOST_CHARACTERS_A_TOKEN * self.config.max_length
        pairs = [
            (question[:most], headed(passage)[:most])
            for question, own in zip(questions, passages, strict=True)
            for passage in own
        ]
        logits = [0.0] * len(pairs)
        lengths = [len(question) + len(text) for question, text in pairs]
        for batch in length_sorted(lengths, BATCH_CHARACTERS, BATCH_PAIRS):
            with quiet():
                values = self.model.predict(
                    [pairs[i] for i in batch],
                    batch_size=len(batch),
                    activation_fn=torch.nn.Identity(),
                    show_progress_bar=False,
                )
            for i, value in zip(batch, values.tolist(), strict=True):
                logits[i] = value
            if on_pairs is not None:
                on_pairs(len(batch))
        rest = iter(logits)
        return [[next(rest) for _ in own] for own in passages]


def save_cross_encoder(
    reranker: CrossEncoderReranker, folder: Path, provenance: dict[str, Any] | None = None
) -> Manifest:
    """Write a re-ranker to a new folder, all of it or nothing.

    Raises:
        ArtefactError: the folder already holds a re-ranker.
        ShouldersError: the folder cannot be written.
    """
    if (folder / FILE).exists():
        raise ArtefactError(f"{folder}: already holds a re-ranker; choose another folder")
    with atomic_directory(folder) as temporary:
        with quiet():
            reranker.model.save_pretrained(str(temporary), create_model_card=False)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            shoulders_version=__version__,
            kind="cross_encoder",
            config=reranker.config,
            parameters=reranker.parameters,
            files=_hashes(temporary),
            provenance=provenance or {},
        )
        write_json(temporary / FILE, manifest.model_dump(mode="json"))
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read `reranker.json` and check every file against it; loads no model.

    Raises `ArtefactError` naming the file that is missing, damaged or not listed.
    """
    manifest = read_versioned(folder, FILE, Manifest, FORMAT_VERSION, "re-ranker")
    found = _hashes(folder)
    for name, expected in manifest.files.items():
        if name not in found:
            raise ArtefactError(f"{folder / name}: missing")
        if found[name] != expected:
            raise ArtefactError(
                f"{folder / name}: damaged or edited: sha256 {found[name][:16]}..., "
                f"{FILE} says {expected[:16]}..."
            )
    # The library would read what it finds: an adapter, say, or weights as a pickle.
    if extra := sorted(found.keys() - manifest.files.keys()):
        raise ArtefactError(f"{folder / extra[0]}: not listed in {FILE}; take it away")
    return manifest


def load_cross_encoder(folder: Path, *, device: str | None = None) -> CrossEncoderReranker:
    """Load a re-ranker that `save_cross_encoder` wrote, after checking every file's hash.

    Raises:
        ArtefactError: the folder is missing, damaged or not a re-ranker.
        ShouldersError: sentence-transformers is not installed.
    """
    manifest = read_manifest(folder)
    model = _opened(str(folder), str(folder), manifest.config.max_length, device)
    return CrossEncoderReranker(model, manifest.config)


def _hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the manifest, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: sha256_of_file(path) for name, path in names.items() if name != FILE}


def _opened(source: str, name: str, max_length: int, device: str | None) -> Any:
    """Return a `CrossEncoder` with one output and `max_length`, or what its positions allow."""
    with quiet():
        library = needed("sentence_transformers.cross_encoder")
        try:
            model = library.CrossEncoder(
                source,
                num_labels=1,
                device=device,
                local_files_only=Path(source).is_dir(),
                trust_remote_code=False,
                model_kwargs={"dtype": "float32", "use_safetensors": True},
            )
        except Exception as error:
            # Anything may go wrong inside: the user needs the name and the reason.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise LMError(f"cross-encoder {name}: cannot be loaded: {reason}") from error
    positions = getattr(model.config, "max_position_embeddings", None)
    model.max_seq_length = min(max_length, int(positions or max_length))
    return model
