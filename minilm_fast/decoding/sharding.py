"""Several processes on one input, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from minilm_fast.data.parallel import available_cores
from minilm_fast.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Value = TypeVar("Value")

# To find one another the processes get minutes; a share of the work may take any time.
MEETING = timedelta(minutes=10)
WORKING = timedelta(days=365)


class Group:
    """The processes that share an input; alone if the environment names no others.

    Args:
        environment: with ``RANK``, ``WORLD_SIZE``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` where
            ``torchrun`` or another launcher started the process.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_size: of which so many run on this machine.

    Raises:
        UserError: the environment is wrong.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.rank = _number(environment, "RANK", 0)
        self.size = _number(environment, "WORLD_SIZE", 1)
        self.local_size = _number(environment, "LOCAL_WORLD_SIZE", self.size)
        self._workers: ProcessGroup | None = None
        if not 0 <= self.rank < self.size:
            raise UserError(f"RANK={self.rank} is not below WORLD_SIZE={self.size}")

    def connect(self, backend: str = "gloo") -> None:
        """Finds the other processes.

        Args:
            backend: of the default process group; what this class does itself goes through ``gloo``.

        Raises:
            UserError: they cannot be reached.
        """
        if self.size == 1 or self._workers is not None:
            return
        from torch import distributed

        try:
            distributed.init_process_group(backend, timeout=MEETING)
            self._workers = distributed.new_group(timeout=WORKING, backend="gloo")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the other processes cannot be reached: {_first_line(error)}") from None

    def broadcast(self, value: Value) -> Value:
        """The first process' value, in every process.

        Raises:
            UserError: another process has ended early.
        """
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        try:
            distributed.broadcast_object_list(box, src=0, group=self._workers)
        except RuntimeError as error:
            raise _lost(error) from None
        return box[0]

    def wait(self) -> None:
        """Waits until every process has come here.

        Raises:
            UserError: another process has ended early.
        """
        if self.size == 1:
            return
        from torch import distributed

        try:
            distributed.barrier(group=self._workers)
        except RuntimeError as error:
            raise _lost(error) from None

    def close(self) -> None:
        """Says goodbye to the others; not needed after an error."""
        if self._workers is not None:
            from torch import distributed

            distributed.destroy_process_group()
            self._workers = None


def set_threads(requested: int | None, group: Group, environment: Mapping[str, str] = os.environ) -> None:
    """Shares the processor's cores among the processes of this machine.

    Args:
        requested: threads of this process; by default ``OMP_NUM_THREADS`` decides, and without it every process gets
            an equal share of the cores. ``torchrun`` sets ``OMP_NUM_THREADS=1`` where it is not set, so that value
            counts as not set there.
    """
    import torch

    chosen = environment.get("OMP_NUM_THREADS")
    if chosen == "1" and "TORCHELASTIC_RUN_ID" in environment:
        chosen = None
    if requested is not None:
        torch.set_num_threads(requested)
    elif chosen is None and group.local_size > 1:
        torch.set_num_threads(max(1, available_cores() // group.local_size))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name) or str(default)
    if not value.isdecimal():
        raise UserError(f"{name}={value} is not a number of processes")
    return int(value)


def _lost(error: RuntimeError) -> UserError:
    return UserError(f"another process has ended early ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160]
