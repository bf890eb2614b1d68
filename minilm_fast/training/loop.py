"""The training loop: optimiser steps over micro-batches and processes, checkpoints, an exact resume."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilm_fast.errors import NotEnoughMemory, UserError, enough_memory
from minilm_fast.training import checkpointing
from minilm_fast.training.checkpointing import RunFolder, checkpoint_folder
from minilm_fast.training.distributed import World
from minilm_fast.training.history import History
from minilm_fast.training.memory import keep_large_blocks
from minilm_fast.training.optimizer import AdamW, linear_schedule, parameter_groups
from minilm_fast.training.precision import Precision
from minilm_fast.training.reporting import Meter, Reporter, StepReport, peak_flops
from minilm_fast.training.signals import DeferredSignals, stop
from minilm_fast.training.task import StepData, Task, loss_parts

logger = logging.getLogger(__name__)

# The scale of the loss halves with every skipped step: after so many in a row it is of no use any more.
MOST_SKIPPED_IN_A_ROW = 40
MEMORY_ADVICE = (
    "a lower --per_gpu_train_batch_size needs less, with more --gradient_accumulation_steps for the same steps"
)


@dataclass(frozen=True)
class LoopOptions:
    """Settings of a run; the names are those of the command line's flags.

    Args:
        total_steps: optimiser steps of the whole run, over which the learning rate falls to 0.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        save_total_limit: how many checkpoints to keep beside the best; None: all.
        evaluate_checkpoints: measure each checkpoint as it is saved.
        metric_for_best_model: the measure that decides which checkpoint is the best.
        log_dir: folder of TensorBoard's files; None: ``runs`` in the output folder, if it is installed.
        peak_tflops: of one process' device, in units of 1e12 operations a second; None: measured.
    """

    total_steps: int
    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_warmup_steps: int = 0
    logging_steps: int = 500
    save_steps: int = 1500
    save_total_limit: int | None = None
    precision: str = "fp32"
    seed: int = 42
    evaluate_checkpoints: bool = True
    metric_for_best_model: str = "dev_loss"
    log_dir: Path | None = None
    peak_tflops: float | None = None

    def fingerprint(self) -> dict[str, Any]:
        """The options that the weights depend on."""
        free = {"logging_steps", "save_steps", "save_total_limit", "log_dir", "peak_tflops"}
        free |= {"evaluate_checkpoints", "metric_for_best_model"}
        values = {name: value for name, value in asdict(self).items() if name not in free}
        values["num_training_steps"] = values.pop("total_steps")
        precision = values.pop("precision")
        return values | {name: precision == name for name in ("fp16", "bf16")}


class Trainer:
    """Trains a task, alone or as one of several processes.

    Args:
        task: its module is moved to the device of this process.
        world: connected.
    """

    def __init__(self, task: Task, options: LoopOptions, output_dir: Path, world: World) -> None:
        self.task = task
        self.options = options
        self.output_dir = output_dir
        self.world = world
        self.precision = Precision(options.precision, world.device)
        if world.device.type == "cpu":
            keep_large_blocks()
        task.module.to(world.device)
        self.optimizer = AdamW(
            parameter_groups(task.module, options.weight_decay), lr=options.learning_rate, eps=options.adam_epsilon
        )
        self.module = world.distribute(task.module, find_unused_parameters=task.find_unused_parameters)
        self.step = 0
        self.saved_step = 0
        self.skipped_in_a_row = 0
        self.skipped = 0
        self.history = History(output_dir / "history.json", options.metric_for_best_model)
        self.since_record = Meter()
        self.record: dict[str, float] = {}
        self.reporter: Reporter | None = None
        self._data_state: Mapping[str, Any] = task.data_state()
        if world.rank:
            torch.manual_seed(options.seed + world.rank)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the coming step."""
        options = self.options
        return options.learning_rate * linear_schedule(self.step, options.num_warmup_steps, options.total_steps)

    def train_step(self, received: Callable[[], int] = int) -> StepReport:
        """One optimiser step.

        Args:
            received: number of the signal that this process has received by the end of the backward pass, or 0.

        Raises:
            UserError: the loss or a gradient is not finite, in any process; nothing has been updated.
            NotEnoughMemory: for a forward or backward pass; nothing has been updated, no gradient is left.
        """
        data = self.task.step_data(self.step)
        try:
            with self.world.watching(), enough_memory(MEMORY_ADVICE):
                results = self._accumulate(data)
        except NotEnoughMemory:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        parts, signal = self._agree(data, results, received())
        norm = self.precision.clip(self.optimizer, self.task.module, self.options.max_grad_norm)
        skipped = self._check(parts["loss"], norm)
        rate = self.learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.precision.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self._data_state = data.state
        self.step += 1
        losses = torch.stack([result["loss"] for result in results]).tolist()
        report = StepReport(losses, parts, norm, rate, data.tokens, data.flops, skipped, signal)
        self.skipped += skipped
        self.since_record.add(report)
        return report

    def _accumulate(self, data: StepData) -> list[dict[str, Tensor]]:
        """Forward and backward of every micro-batch; the last backward also averages over the processes."""
        factor = self._factor(data)
        results = []
        for number, batch in enumerate(data.batches):
            last = number == len(data.batches) - 1
            alone = contextlib.nullcontext() if last or self.world.size == 1 else self.module.no_sync()  # type: ignore[operator]
            with alone:
                with self.precision.autocast():
                    parts = loss_parts(self.module(batch.to(self.world.device), data.normalizer))
                self.precision.backward(parts["loss"] * factor)
            results.append({name: value.detach().float() for name, value in parts.items()})
        return results

    def _factor(self, data: StepData) -> float:
        """What a micro-batch's loss is multiplied by; gradients are averaged over the processes afterwards."""
        return 1 / len(data.batches) if data.normalizer is None else float(self.world.size)

    def _agree(self, data: StepData, results: list[dict[str, Tensor]], signal: int) -> tuple[dict[str, float], int]:
        """Losses over all processes, and the signal that any of them received."""
        names = list(results[0])
        local = torch.stack([torch.stack([result[name] for result in results]).sum() for name in names])
        local = local * (self._factor(data) / self.world.size)
        flags = torch.zeros(64, device=local.device)
        flags[signal] = 1
        together = self.world.sum(torch.cat([local, flags])).tolist()
        received = [number for number, count in enumerate(together[len(names) :]) if count and number]
        return dict(zip(names, together, strict=False)), max(received, default=0)

    def _check(self, loss: float, norm: float) -> bool:
        """Whether the step is to be skipped."""
        if math.isfinite(norm) and math.isfinite(loss):
            self.skipped_in_a_row = 0
            return False
        found = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradients is {norm}"
        advice = "try a lower --learning_rate"
        if self.precision.scaled and not math.isfinite(norm):
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row <= MOST_SKIPPED_IN_A_ROW:
                return True
            found += f" as in the {MOST_SKIPPED_IN_A_ROW} steps before"
            advice += ", or --bf16"
        raise UserError(f"step {self.step + 1}: {found}; {advice}")

    def prepare(self, folder: RunFolder | None, *, overwrite: bool = False) -> None:
        """Claim the output folder and go on from its last whole checkpoint, if there is one.

        Args:
            folder: held by the first process; None in the others.
            overwrite: remove the checkpoints of another run.

        Raises:
            UserError: the folder holds checkpoints of another run, or none of this run's is whole.
        """

        def claim() -> None:
            if folder is not None:
                folder.claim(self.options.fingerprint() | self.task.fingerprint(), overwrite=overwrite)

        self.world.on_main(claim)
        step = self.world.on_main(self._restore_latest)
        if step is not None and not self.world.is_main:
            self._restore(step)
        if step is not None:
            logger.info("resuming after step %d", step)

    def _restore_latest(self) -> int | None:
        failures: list[UserError] = []
        for step in reversed(checkpointing.whole_steps(self.output_dir)):
            try:
                self._restore(step)
            except UserError as error:
                logger.warning("warning: %s", error)
                failures.append(error)
                continue
            return step
        if failures:
            raise failures[0]
        return None

    def _restore(self, step: int) -> None:
        state = checkpointing.read_state(self.output_dir, step)
        try:
            self.task.load_weights(checkpoint_folder(self.output_dir, step))
            self.optimizer.load_state_dict(state["optimizer"])
            self.precision.scaler.load_state_dict(state["scaler"])
            self.task.load_data_state(state["data"])
            self._data_state = state["data"]
            self._restore_random(state["random"], step)
            self.record = dict(state["record"])
            self.since_record.restore(state["since_record"])
            self.skipped, self.skipped_in_a_row = state["skipped"]
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            path = checkpointing.state_file(self.output_dir, step)
            raise UserError(f"cannot resume from {path}: {reason}") from None
        self.step = self.saved_step = step
        self.history.load(step)

    def _restore_random(self, states: list[dict[str, Tensor]], step: int) -> None:
        """A process that took no part when the checkpoint was written starts its own sequence."""
        rank = self.world.rank
        if rank >= len(states):
            torch.manual_seed(self.options.seed + rank + 1_000_003 * step)
            return
        torch.set_rng_state(states[rank]["cpu"])
        if "cuda" in states[rank] and self.world.device.type == "cuda":
            torch.cuda.set_rng_state(states[rank]["cuda"], self.world.device)

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return state

    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            UserError: it cannot be written, in every process; the one before is as it was.
        """
        if self._is_save_step():
            means = self.since_record.means()
            self.record = {
                "step": self.step,
                "learning_rate": self.learning_rate,
                **means,
                "skipped_steps": self.skipped,
            }
            self.since_record.reset()
        random = self.world.gather(self._random_state())

        def write() -> None:
            state = {
                "step": self.step,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.precision.scaler.state_dict(),
                "data": dict(self._data_state),
                "random": random,
                "record": self.record,
                "since_record": self.since_record.state(),
                "skipped": [self.skipped, self.skipped_in_a_row],
            }
            folder = checkpointing.save(self.output_dir, self.step, state, self.task.save_weights)
            logger.info("saved %s", folder)

        self.world.on_main(write)
        self.saved_step = self.step

    def evaluate(self) -> None:
        """Measure the checkpoint that was just written, and record it."""
        folder = checkpoint_folder(self.output_dir, self.step)
        measures = self.measure(folder) if self.options.evaluate_checkpoints else {}

        def write() -> None:
            self.history.add(self.record | measures)
            self._tidy()

        self.world.on_main(write)
        if self.reporter is not None:
            self.reporter.evaluation(self.step, measures)

    def measure(self, folder: Path) -> dict[str, float]:
        """What the task measures of the model as it is.

        Args:
            folder: with the model's weights.
        """
        self.task.module.eval()
        with torch.no_grad():
            measures = self.task.evaluate(self.world, self.precision, folder)
        self.task.module.train()
        return measures

    def _tidy(self) -> None:
        """Point to the best checkpoint, and remove those above the limit."""
        best = self.history.best()
        if best is not None:
            checkpointing.point_to_best(self.output_dir, best["step"])
        limit = self.options.save_total_limit
        checkpointing.prune(self.output_dir, self.step, limit, best["step"] if best else None)

    def hint(self) -> str:
        """What a message about a run that was cut short ends with."""
        return f"; the same command goes on after step {self.saved_step}" if self.saved_step else ""

    def _is_save_step(self) -> bool:
        return self.step > 0 and (self.step % self.options.save_steps == 0 or self.step == self.options.total_steps)

    def train(self) -> None:
        """Run to the last step; save and evaluate every ``save_steps`` and at the end.

        Raises:
            Terminated, KeyboardInterrupt: a signal came; the step was finished and saved.
        """
        self.task.module.train()
        self._start_reporter()
        try:
            if self.record.get("step") == self.step:
                if self.history.has(self.step):
                    self.world.on_main(self._tidy)  # the run may have been killed just before
                else:
                    self.evaluate()
            if self.step >= self.options.total_steps:
                logger.info("all %d steps are done", self.options.total_steps)
            with DeferredSignals() as signals:
                while self.step < self.options.total_steps:
                    self._train_and_save(signals)
        finally:
            if self.reporter is not None:
                self.reporter.close()

    def _start_reporter(self) -> None:
        options = self.options
        if options.peak_tflops is not None:
            peak = options.peak_tflops * 1e12 * self.world.size
        else:
            peak = peak_flops(self.world, self.precision.dtype)
        self.reporter = Reporter(
            self.world, options.logging_steps, options.total_steps, options.log_dir, self.output_dir / "runs", peak
        )

    def _train_and_save(self, signals: DeferredSignals) -> None:
        report = self.train_step(lambda: signals.received)
        assert self.reporter is not None
        self.reporter.step(self.step, report, self.skipped)
        start = time.perf_counter()
        if report.signal:
            self.save()
            stop(report.signal)
        if self._is_save_step():
            self.save()
            self.evaluate()
            self.reporter.meter.exclude(time.perf_counter() - start)
