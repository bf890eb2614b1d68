"""Fine-tuning a model that extracts answers, and measuring it with the official scores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from minilm_fast.atomic import atomic_write
from minilm_fast.data.answer_windows import Window
from minilm_fast.metrics.squad import average, squad_scores, squad_v2_scores
from minilm_fast.modeling.answers import AnswerOptions, Prediction, choose_answers
from minilm_fast.modeling.question_answering import QuestionAnswerer, QuestionAnsweringBatch, span_losses
from minilm_fast.tokenization import Tokenizer
from minilm_fast.training.distributed import World
from minilm_fast.training.flops import encoder_flops
from minilm_fast.training.head_task import HeadTask, Scorer
from minilm_fast.training.precision import Precision
from minilm_fast.training.task import StepData


@dataclass(frozen=True)
class QuestionAnsweringOptions:
    """Settings of the data; the names are those of the command line's flags.

    Args:
        answers: how answers are chosen.
        eval_all_checkpoints: write the predictions of every checkpoint that is measured.
        eval_dtype: see :class:`minilm_fast.training.head_task.Scorer`.
    """

    per_gpu_train_batch_size: int = 8
    per_gpu_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    seed: int = 42
    save_format: str = "safetensors"
    pad_to_multiple_of: int = 1
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    eval_all_checkpoints: bool = False
    eval_dtype: str | None = None


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """The questions of a file.

    Attributes:
        name: for people; tells the sets of a run apart.
        ids: of the questions, in the order of their numbers.
        answers: id -> the texts of its answers.
        windows: of all questions, in order.
        language: whose rules of MLQA the score follows; None: SQuAD's.
    """

    name: str
    ids: Sequence[str]
    answers: Mapping[str, Sequence[str]]
    windows: Sequence[Window]
    language: str | None = None


class QuestionAnsweringModule(nn.Module):
    """The loss of a batch: the mean over its windows, or their sum over ``normalizer``."""

    def __init__(self, model: QuestionAnswerer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: QuestionAnsweringBatch, normalizer: float | None = None) -> Tensor:
        """fp32 scalar."""
        losses = span_losses(self.model.span_logits(batch), batch)
        return losses.sum() / (len(losses) if normalizer is None else normalizer)


class QuestionAnsweringTask(HeadTask):
    """Trains on windows.

    Args:
        windows: of the training set; may be empty if nothing is trained.
        dev: measured at checkpoints; of several sets the average decides.
        identity: what the run is known by beside ``options``: plain values by the name of their flag.
        test: sets that are measured once, at the end, and whose predictions are written.
        on_report: called in the first process with what :meth:`report` found for each set, and the output folder.
    """

    model: QuestionAnswerer

    def __init__(
        self,
        model: QuestionAnswerer,
        tokenizer: Tokenizer,
        windows: Sequence[Window],
        dev: Sequence[QuestionSet],
        options: QuestionAnsweringOptions,
        world: World,
        identity: Mapping[str, Any] | None = None,
        *,
        test: Sequence[QuestionSet] = (),
        on_report: Callable[[Mapping[str, Mapping[str, float]], Path], None] | None = None,
    ) -> None:
        lengths = [len(window) for window in windows]
        super().__init__(
            QuestionAnsweringModule(model), model, tokenizer, lengths, options, world, identity, batches_per_group=64
        )
        self.windows = windows
        self.dev = dev
        self.options = options
        self.test = test
        self.on_report = on_report
        # Predictions of the weights as they are.
        self._known: dict[QuestionSet, dict[str, Prediction]] = {}

    def step_data(self, step: int) -> StepData:
        """See :class:`HeadTask`."""
        self._known.clear()
        return super().step_data(step)

    def training_batch(self, indices: Sequence[int]) -> QuestionAnsweringBatch:
        """See :class:`HeadTask`."""
        return QuestionAnsweringBatch.collate([self.windows[i] for i in indices], self.options.pad_to_multiple_of)

    def forward_flops(self, lengths: np.ndarray) -> float:
        """See :class:`HeadTask`."""
        config = self.model.config
        return encoder_flops(config, int(lengths.sum()), int((lengths**2).sum()), config.num_hidden_layers)

    def logits(self, windows: Sequence[Window], world: World, scorer: Scorer) -> list[np.ndarray]:
        """fp32 ``[tokens, 2]`` for each window: start and end; each process computes a share and all get all."""
        own = range(world.rank, len(windows), world.size)
        # Long ones first, so that what does not fit into memory is found at once.
        order = sorted(own, key=lambda index: -len(windows[index]))
        found: dict[int, np.ndarray] = {}
        for chosen in _pieces(order, self.options.per_gpu_eval_batch_size):
            batch = QuestionAnsweringBatch.collate([windows[index] for index in chosen], scorer.multiple)
            batch = batch.to(world.device)
            scores = scorer(batch.tokens, batch.token_type_ids)[: batch.rows].cpu().numpy()
            bounds = np.cumsum([len(windows[index]) for index in chosen])[:-1]
            found |= zip(chosen, np.split(scores, bounds), strict=True)
        for share in world.gather(found):
            found |= share
        return [found[index] for index in range(len(windows))]

    def predictions(self, questions: QuestionSet, world: World, precision: Precision) -> dict[str, Prediction]:
        """Question id -> prediction of the model as it is."""
        self._predict([questions], world, precision)
        return self._known[questions]

    def _predict(self, sets: Sequence[QuestionSet], world: World, precision: Precision) -> None:
        """Makes the predictions of all these sets known."""
        missing = [questions for questions in sets if questions not in self._known]
        if not missing:
            return
        scorer = self.scorer(precision)
        for questions in missing:
            logits = self.logits(questions.windows, world, scorer)
            chosen = choose_answers(questions.windows, logits, self.options.answers)
            self._known[questions] = {questions.ids[number]: found for number, found in chosen.items()}

    def scores(self, questions: QuestionSet, world: World, precision: Precision) -> dict[str, float]:
        """The official scores of the model as it is, under the names of the official script, in percent."""
        predictions = self.predictions(questions, world, precision)
        texts = {name: found.text for name, found in predictions.items()}
        if not self.options.answers.version_2_with_negative:
            return squad_scores(questions.answers, texts, questions.language)
        odds = {name: found.null_odds for name, found in predictions.items()}
        # The texts follow the threshold already.
        return squad_v2_scores(questions.answers, texts, odds, na_prob_thresh=np.inf)

    def measure_names(self) -> list[str]:
        """The names of the measures that can decide which checkpoint is best."""
        exact = "exact" if self.options.answers.version_2_with_negative else "exact_match"
        names = [exact, "f1"] + (["best_exact", "best_f1"] if exact == "exact" else [])
        return [f"dev_{name}" for name in names]

    def evaluate(self, world: World, precision: Precision, weights: Path) -> dict[str, float]:
        """The official scores of the dev set as ``dev_NAME``; of several the average, and ``dev_SET_NAME`` of each.

        Where all checkpoints are to be measured, the predictions of each are written beside it.
        """
        self._predict(self.dev, world, precision)
        found = {questions.name: self.scores(questions, world, precision) for questions in self.dev}
        step = re.fullmatch(r"ckpt-(\d+)", weights.name)
        if self.options.eval_all_checkpoints and step:
            self._write(self.dev, world, precision, weights.parent, step[1])
        if not found:
            return {}
        measures = {f"dev_{name}": value for name, value in average(found).items()}
        if len(found) > 1:
            measures |= {f"dev_{key}_{name}": value for key, each in found.items() for name, value in each.items()}
        return measures

    def report(self, world: World, precision: Precision, output_dir: Path) -> dict[str, float]:
        """The official scores of the test set, named as the official script does; of several sets see :meth:`evaluate`.

        Writes the predictions of each set.
        """
        self._predict(self.test, world, precision)
        found = {questions.name: self.scores(questions, world, precision) for questions in self.test}
        self.predict_files(world, precision, output_dir)
        if self.on_report is not None:
            show = self.on_report
            world.on_main(lambda: show(found, output_dir))
        if len(found) == 1:
            return next(iter(found.values()))
        measures = {f"{key}_{name}": value for key, each in found.items() for name, value in each.items()}
        return {f"average_{name}": value for name, value in average(found).items()} | measures

    def predict_files(self, world: World, precision: Precision, output_dir: Path) -> list[Path]:
        """``predictions_.json``, ``nbest_predictions_.json`` and, with negatives, ``null_odds_.json``.

        Of several sets ``predictions_SET.json`` and so on.
        """
        return self._write(self.test, world, precision, output_dir, "")

    def _write(
        self, sets: Sequence[QuestionSet], world: World, precision: Precision, folder: Path, step: str
    ) -> list[Path]:
        self._predict(sets, world, precision)
        files: dict[Path, dict[str, Any]] = {}
        for questions in sets:
            suffix = "_".join([questions.name] * (len(sets) > 1) + [step] * bool(step))
            found = self.predictions(questions, world, precision)
            files[folder / f"predictions_{suffix}.json"] = {name: each.text for name, each in found.items()}
            files[folder / f"nbest_predictions_{suffix}.json"] = {name: each.nbest() for name, each in found.items()}
            if self.options.answers.version_2_with_negative:
                files[folder / f"null_odds_{suffix}.json"] = {name: each.null_odds for name, each in found.items()}

        def write() -> None:
            for path, content in files.items():
                with atomic_write(path) as file:
                    file.write((json.dumps(content, indent=4) + "\n").encode())

        world.on_main(write)
        return list(files)

    def load_weights(self, folder: Path) -> None:
        """See :class:`HeadTask`."""
        self._known.clear()
        super().load_weights(folder)


def _pieces(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))
