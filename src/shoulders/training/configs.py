"""The parts of a recipe that say what is frozen, how to train, and on which running text."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shoulders.lm.load import Precision
from shoulders.lm.quantized import DeviceMap, Quantization

Select = Literal["loss", "exact_match", "last"]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LMConfig(BaseModel):
    """The frozen LM: `embedded`, a Hub id, a folder or a .gguf file; see `load_lm`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "embedded"
    dtype: Precision = "auto"
    revision: str | None = None
    quantize: Quantization | None = None
    device_map: DeviceMap | None = None
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: str | None = None


class OptimizerConfig(BaseModel):
    """AdamW, Adafactor, or Muon for weight matrices and AdamW for the rest; rates by part.

    `lr_for` gives parts their own rate: the longest key that a parameter's name starts with
    (`base`, `generator`, `project`, ...) wins over `lr`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["adamw", "adafactor", "muon"] = "adamw"
    lr: Rate
    lr_for: dict[str, Rate] = {}
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.98)


class TrainingConfig(BaseModel):
    """How to train.

    Attributes:
        steps: optimizer steps.
        rows_per_step: examples per step; their loss is the mean over their answer tokens.
        micro_tokens: most positions in one forward pass; a step is split into such passes, and
            their gradients add up.
        streams: passes computed side by side, each on its share of the processor's threads;
            by default as many as threads, four at most, where the LM's layers are fused.
        shard_lm: started in several processes, each holds only its share of the LM's layers and
            gathers them one at a time (FSDP2); for LMs that do not fit beside their activations.
        recompute: keep only each layer's input of a pass and compute the rest again backwards:
            a third more work, a fraction of the memory. Needs fused layers.
        warmup_steps: linear from 0 to the full rate.
        decay: from there to 0 at the last step (`linear`, `cosine`) or not (`constant`).
        clip: largest norm of the gradient.
        seed: of initial values and of the order of examples.
        validate_every: steps between validations; the last step always validates.
        validation_rows: rows per task that select the best checkpoint (of running text, chunks);
            by default some 200 in all, of many tasks 8 each.
        select: what the best checkpoint is best at, averaged over tasks; `last` takes the last
            weights. Read several times, rows are answered better and better while the loss on
            others rises already: then `loss` stops too early.
        save_every: steps between checkpoints.
        tensorboard: also write TensorBoard event files.
        remember_first_pass: keep the states of a first pass without prompt on disk, so that later
            epochs read them: 4 bytes for every token and unit of width.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    rows_per_step: int = Field(default=16, ge=1)
    micro_tokens: int = Field(default=1024, ge=1)
    streams: int | None = Field(default=None, ge=1)
    shard_lm: bool = False
    recompute: bool = False
    optimizer: OptimizerConfig
    warmup_steps: int = Field(default=20, ge=0)
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**63)
    validate_every: int = Field(default=200, ge=1)
    validation_rows: int | None = Field(default=None, ge=1)
    select: Select = "loss"
    save_every: int = Field(default=50, ge=1)
    tensorboard: bool = False
    remember_first_pass: bool = False


class RunningTextConfig(BaseModel):
    """Text files to learn the language-modelling task on.

    Attributes:
        train: UTF-8 files.
        validation: files to select on.
        chunk: tokens that are read at once; the first one is only read, the others predicted too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: list[str] = Field(min_length=1)
    validation: list[str] = []
    chunk: int = Field(default=128, ge=2)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if both := sorted(set(self.train) & set(self.validation)):
            raise ValueError(f"'{both[0]}' is in both train and validation; remove it from one")
        return self


class CrossFitConfig(BaseModel):
    """How textual recursion gets the candidates that its second pass is trained on.

    A first pass that has seen a question proposes unrealistically good answers to it. So the
    training rows are split, and every fold's candidates come from a first pass that was trained
    on the other folds.

    Attributes:
        folds: how many such first passes are trained.
        steps: of each; None is as many as the first pass itself was trained for.
        rows: examples that the second pass is trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: int = Field(default=2, ge=2)
    steps: int | None = Field(default=None, ge=1)
    rows: int = Field(default=4096, ge=1)
