"""Train a cross-encoder with sentence-transformers' trainer."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoulders.errors import TrainingError
from shoulders.reader.libraries import needed
from shoulders.reader.mining import Mined
from shoulders.reader.reranker import headed
from shoulders.reader.rerankers.cross_encoder import CrossEncoderConfig, CrossEncoderReranker
from shoulders.reader.rerankers.global_state import quiet, seeded
from shoulders.reader.rerankers.losses import ListLoss


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained cross-encoder and the loss of every forward pass, in order."""

    reranker: CrossEncoderReranker
    losses: list[float]


def train_cross_encoder(
    examples: Sequence[Mined],
    config: CrossEncoderConfig,
    *,
    device: str | None = None,
    on_questions: Callable[[int], None] | None = None,
) -> Trained:
    """Train a cross-encoder from `config.encoder`; the same twice on the same machine.

    Args:
        examples: questions with positives and negatives.
        config: how.
        device: a torch device; default `cuda` where there is one, else `cpu`.
        on_questions: called with the number of questions after each pass;
            `config.epochs * len(examples)` in all.

    Raises:
        TrainingError: no examples, or the loss or a weight is not finite.
        LMError: the encoder cannot be loaded.
        ShouldersError: sentence-transformers, datasets or accelerate is not installed.
    """
    if not examples:
        raise TrainingError("no question has both a passage with its answer and one without")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # Already importing the libraries draws from Python's generator.
    with seeded(config.seed), quiet():
        for library in ("accelerate", "datasets", "sentence_transformers.cross_encoder"):
            needed(library)
        reranker = CrossEncoderReranker.start(config, device=str(place))
        for module in reranker.model.modules():
            if isinstance(module, torch.nn.Dropout) and config.dropout is not None:
                module.p = config.dropout
        loss = ListLoss(reranker.model, config.loss, on_questions)
        with tempfile.TemporaryDirectory() as folder:
            _trainer(reranker.model, loss, examples, config, folder, place).train()
    reranker.model.eval()
    if not all(bool(torch.isfinite(p).all()) for p in reranker.model.parameters()):
        raise TrainingError("the re-ranker's weights are not finite: use a lower learning rate")
    return Trained(reranker, loss.values)


def _trainer(
    model: Any,
    loss: ListLoss,
    examples: Sequence[Mined],
    config: CrossEncoderConfig,
    folder: str,
    device: torch.device,
) -> Any:
    from transformers.trainer_callback import PrinterCallback

    datasets, library = needed("datasets"), needed("sentence_transformers.cross_encoder")
    per_pass = min(config.rows_per_pass, config.rows_per_step)
    arguments = library.CrossEncoderTrainingArguments(
        output_dir=folder,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=per_pass,
        gradient_accumulation_steps=math.ceil(config.rows_per_step / per_pass),
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        max_grad_norm=config.clip,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lists = [[*example.positives, *example.negatives] for example in examples]
    rows = datasets.Dataset.from_dict(
        {
            "question": [example.question for example in examples],
            "passages": [[headed(passage) for passage in own] for own in lists],
            "label": [
                [1.0] * len(example.positives) + [0.0] * len(example.negatives)
                for example in examples
            ],
        }
    )
    trainer = library.CrossEncoderTrainer(
        model=model, args=arguments, train_dataset=rows, loss=loss
    )
    trainer.remove_callback(PrinterCallback)
    # Our loss is a mean over the questions of a pass, to be divided by the passes of a step. The
    # trainer takes the model's `**kwargs` for a sign that it divides by itself.
    trainer.model_accepts_loss_kwargs = False
    return trainer
