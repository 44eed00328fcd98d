"""Options that several commands take, and the LM that four of them name together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoulders.errors import ShouldersError

if TYPE_CHECKING:
    from shoulders.lm.frozen import FrozenLM
    from shoulders.skills.artefact import Artefact

LMName = Annotated[str | None, typer.Option(help="LM: embedded, Hub id, folder, .gguf.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or int8.")]
Quantize = Annotated[
    str | None, typer.Option(help="The LM's weights: int8, nf4 or none. Default: the skill's.")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="auto: what does not fit into memory stays on disk.")
]
TemplateFile = Annotated[
    Path | None, typer.Option(help="YAML templates. Default: the skill's own.")
]
Keep = Annotated[
    str | None, typer.Option(help="Truncate over-long inputs: keep their 'start' or 'end'.")
]
RecurseBelow = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Recursion: only where the first answer is less likely right."),
]
VllmURL = Annotated[
    str | None, typer.Option(help="A vLLM server that runs the LM; see docs/vllm.md.")
]
VllmKeyFile = Annotated[Path | None, typer.Option(help="File with the key that it asks for.")]


@dataclass(frozen=True)
class LMChoice:
    """Which LM, and how it is held; None where a command was not told, see the options above."""

    name: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    device_map: str | None = None

    def load(self, trained: Artefact | None = None, *, remote: bool = False) -> FrozenLM:
        """Load the LM; what was not told is as a skill was trained.

        With `remote` a server runs it, which holds no int8: what was trained in int8 gets the LM
        as it is. Where the LM lies is each machine's own affair, not the skill's.

        Raises:
            ShouldersError: an option's value is unknown.
            LMError: see `load_lm`.
        """
        from shoulders.lm.load import EMBEDDED, PRECISIONS, load_lm
        from shoulders.lm.quantized import QUANTIZATIONS

        before = trained.lm_dtype if trained else "auto"
        if remote and self.dtype == "int8":
            raise ShouldersError("vLLM serves no int8: use --dtype float32 or bfloat16")
        dtype: Any = self.dtype or ("auto" if remote and before == "int8" else before)
        if dtype not in PRECISIONS:
            raise ShouldersError(f"--dtype {dtype}: use one of {', '.join(PRECISIONS)}")
        quantize: Any = self.quantize or (trained.lm_quantize if trained else None)
        if quantize not in (None, "none", *QUANTIZATIONS):
            known = ", ".join(QUANTIZATIONS)
            raise ShouldersError(f"--quantize {quantize}: use one of {known}, none")
        device_map: Any = self.device_map
        if device_map not in (None, "auto"):
            raise ShouldersError(f"--device-map {device_map}: use auto")
        return load_lm(
            self.name or (trained.lm.name if trained else EMBEDDED),
            dtype=dtype,
            quantize=None if quantize == "none" else quantize,
            device_map=device_map,
        )
