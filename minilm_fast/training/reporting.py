"""What a run says about itself: the progress line, TensorBoard scalars, the share of the machine's peak."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilm_fast.errors import UserError
from minilm_fast.training.distributed import World

logger = logging.getLogger(__name__)

# A line is due after so many seconds even if --logging_steps are not over.
LONGEST_SILENCE = 60.0
_CPU_SIZE, _GPU_SIZE = 768, 8192


@dataclass(frozen=True)
class StepReport:
    """One optimiser step.

    Args:
        losses: of this process' micro-batches.
        parts: the step's loss (``"loss"``) and what else the task reports, over all processes.
        grad_norm: before clipping.
        learning_rate: that was used.
        tokens, flops: of all processes.
        skipped: whether a gradient was not finite, so that nothing was updated.
        signal: number of the signal that a process received, or 0.
    """

    losses: list[float]
    parts: dict[str, float]
    grad_norm: float
    learning_rate: float
    tokens: int
    flops: float
    skipped: bool
    signal: int


def peak_flops(world: World, dtype: torch.dtype) -> float:
    """Floating-point operations a second of matrix products of one size, the best of a few, over all processes."""
    size = _GPU_SIZE if world.device.type == "cuda" else _CPU_SIZE
    generator = torch.Generator(world.device).manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, device=world.device).to(dtype)
    best = 0.0
    world.wait()
    for _ in range(4):
        _synchronize(world.device)
        start = time.perf_counter()
        matrix @ matrix
        _synchronize(world.device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return float(world.sum(torch.tensor(best, dtype=torch.float32, device=world.device)))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Adds steps up; time spent in :meth:`pause` does not count."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.steps = self.tokens = 0
        self.flops = 0.0
        self.sums: dict[str, float] = {}
        self.counted = 0
        self._since = time.perf_counter()

    def add(self, report: StepReport) -> None:
        """One more step; the losses of a skipped one do not count."""
        self.steps += 1
        self.tokens += report.tokens
        self.flops += report.flops
        if not report.skipped:
            self.counted += 1
            for name, value in report.parts.items():
                self.sums[name] = self.sums.get(name, 0.0) + value

    def exclude(self, seconds: float) -> None:
        """Take out time in which no step was made."""
        self._since += seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the last reset."""
        return max(time.perf_counter() - self._since, 1e-9)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` takes: the sums, not the time."""
        return {"steps": self.steps, "counted": self.counted, "sums": self.sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from these sums."""
        self.reset()
        self.steps, self.counted, self.sums = state["steps"], state["counted"], dict(state["sums"])

    def means(self) -> dict[str, float]:
        """Mean of each part over the steps that counted."""
        return {name: value / max(1, self.counted) for name, value in self.sums.items()}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return "under 1 min"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"


class Reporter:
    """Progress lines and TensorBoard scalars of the first process; silent in the others.

    Args:
        log_dir: where event files go; None: ``default_log_dir``, if TensorBoard is installed.
        peak: floating-point operations a second that count as the whole.
    """

    def __init__(
        self,
        world: World,
        logging_steps: int,
        total_steps: int,
        log_dir: Path | None,
        default_log_dir: Path,
        peak: float,
    ) -> None:
        self.world = world
        self.logging_steps = logging_steps
        self.total_steps = total_steps
        self.peak = peak
        self.meter = Meter()
        self.skipped = 0
        self._folder = _event_folder(log_dir, default_log_dir) if world.is_main else None
        self._writer: Any = None

    def step(self, step: int, report: StepReport, skipped: int) -> None:
        """Take note of the step that ended as number ``step``, and print a line when one is due.

        Args:
            skipped: steps of the run that updated nothing.
        """
        self.meter.add(report)
        self.skipped = skipped
        if step % self.logging_steps == 0 or self.meter.elapsed > LONGEST_SILENCE or step == self.total_steps:
            if self.world.is_main:
                self._print(step, report)
                self._write_step(step, report)
            self.meter.reset()

    def _share(self) -> float:
        return self.meter.flops / self.meter.elapsed / self.peak

    def _print(self, step: int, report: StepReport) -> None:
        meter = self.meter
        parts = meter.means()
        fields = [f"step {step}/{self.total_steps}", f"loss {parts.pop('loss', float('nan')):.4f}"]
        fields += [f"{name} {value:.4f}" for name, value in parts.items()]
        fields += [f"lr {report.learning_rate:.3g}", f"grad norm {report.grad_norm:.2f}"]
        fields += [f"{meter.tokens / meter.elapsed:.0f} tokens/s", f"{100 * self._share():.0f}% of peak"]
        if self.skipped:
            fields.append(f"{self.skipped} steps skipped")
        left = meter.elapsed / meter.steps * (self.total_steps - step)
        fields.append(f"{_duration(left)} left" if step < self.total_steps else "done")
        logger.info("  ".join(fields))

    def _write_step(self, step: int, report: StepReport) -> None:
        scalars = {f"train/{name}": value for name, value in self.meter.means().items()}
        scalars |= {
            "train/learning_rate": report.learning_rate,
            "train/grad_norm": report.grad_norm,
            "train/tokens_per_second": self.meter.tokens / self.meter.elapsed,
            "train/share_of_peak": self._share(),
            "train/skipped_steps": self.skipped,
        }
        self._write(step, scalars)

    def evaluation(self, step: int, measures: Mapping[str, float]) -> None:
        """Print and write what was measured after ``step``."""
        if self.world.is_main and measures:
            logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in measures.items()))
            self._write(step, {f"dev/{name.removeprefix('dev_')}": value for name, value in measures.items()})

    def _write(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._folder is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Events of a run that was cut short are dropped from here on.
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _event_folder(log_dir: Path | None, default: Path) -> Path | None:
    installed = importlib.util.find_spec("tensorboard") is not None
    if log_dir is None:
        return default if installed else None
    if not installed:
        raise UserError("--log_dir needs TensorBoard: pip install tensorboard")
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--log_dir {log_dir}: {error.strerror}") from None
    return log_dir
