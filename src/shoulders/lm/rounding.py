"""An LM in int8, rounded once: what comes of it is kept in the cache folder.

Rounding measures the LM's activations and reads every weight several times; loading what came of it
takes a tenth of that. The file is bound to the LM by its fingerprint, and checked byte by byte.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoulders.errors import ShouldersError
from shoulders.files import atomic_path, cache_folder
from shoulders.fingerprint import digest
from shoulders.lm.int8 import Int8Linear, linears, to_int8
from shoulders.lm.layout import is_llama_style
from shoulders.lm.smooth import smooth

# Part of the file's name: raise it when smoothing or rounding change their result.
VERSION = 3
DIGEST = "digest"
PARTS = ("weight", "scale", "bias", "reads", "writes")  # of an `Int8Linear`


def round_to_int8(model: Any, tokenizer: Any, fingerprint: str) -> None:
    """Replace every linear layer of a Hugging Face LM by its int8 one, in place.

    Args:
        model: as stored; the rest of it comes to be float32.
        tokenizer: of the text on which activations are measured.
        fingerprint: of the LM as stored.
    """
    # The fingerprint is the same for an LM stored in float32 and in bfloat16, what is rounded not.
    stored = str(model.dtype).removeprefix("torch.")
    file = cache_folder() / "int8" / f"{fingerprint[:32]}-{stored}-v{VERSION}.safetensors"
    tensors = _kept(file)
    if tensors is not None and _put(model, tensors):
        model.float()
        return
    if is_llama_style(model):
        smooth(model, tokenizer, then=to_int8)
    to_int8(model)
    model.float()
    # A cache that cannot be written (disk full, read-only) only costs time.
    with contextlib.suppress(ShouldersError):
        _keep(model, file)


def _keep(model: Any, file: Path) -> None:
    """Write what rounding has changed: all but embedding table and head, which stay as stored."""
    same = {id(t) for t in _unchanged(model)}
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in same
    }
    with atomic_path(file) as temporary:
        try:
            save_file(tensors, temporary, {DIGEST: digest(tensors.items())})
        except SafetensorError as error:
            raise ShouldersError(f"{file}: cannot write: {error}") from error


def _kept(file: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file, if it is there and whole; one that is not is removed."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            wanted = (stored.metadata() or {}).get(DIGEST)
    except (SafetensorError, OSError):
        found, wanted = {}, None
    if digest(found.items()) == wanted:
        return found
    with contextlib.suppress(OSError):  # not ours to write
        file.unlink(missing_ok=True)
    return None


def _put(model: Any, tensors: dict[str, Tensor]) -> bool:
    """Put kept tensors into an LM; False, and nothing changed, where they are not all of it."""
    replaced = {name for name, *_ in linears(model)}
    same = {id(t) for t in _unchanged(model)}
    others = [
        (name, tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in same and name.rpartition(".")[0] not in replaced
    ]
    needed = {f"{name}.{part}" for name in replaced for part in ("weight", "scale")}
    if not needed | {name for name, _ in others} <= tensors.keys():
        return False
    for name, parent, child in linears(model):
        parts = (tensors.get(f"{name}.{part}") for part in PARTS)
        setattr(parent, child, Int8Linear(*parts))  # type: ignore[arg-type]
    for name, tensor in others:
        tensor.data = tensors[name]
    return True


def _unchanged(model: Any) -> list[Tensor]:
    own = (model.get_input_embeddings(), model.get_output_embeddings())
    return [part.weight for part in own if part is not None]
