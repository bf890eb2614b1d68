"""The processes of a training run, as ``torchrun`` starts them, and the device of this one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from minilm_fast.decoding.sharding import Group, set_threads
from minilm_fast.errors import UserError

Value = TypeVar("Value")

_COMMUNICATION = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")


class World(Group):
    """The processes that train one model together; alone if the environment names no others.

    Args:
        environment: with ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and
            ``MASTER_PORT`` where a launcher started the process.
        local_rank: number of this process on its machine, where ``LOCAL_RANK`` is not set; below 0: unknown.
        cuda: use a GPU if there is one.

    Attributes:
        device: what this process computes on.

    Raises:
        UserError: the environment is wrong, or there is no GPU of the number ``local_rank``.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, local_rank: int = -1, *, cuda: bool = True) -> None:
        super().__init__(environment)
        set_threads(None, self, environment)
        self.device = torch.device("cpu")
        if not cuda or not torch.cuda.is_available():
            return
        given = environment.get("LOCAL_RANK", "")
        number = int(given) if given.isdecimal() else max(0, local_rank)
        if number >= torch.cuda.device_count():
            raise UserError(f"process {number} of this machine has no GPU: there are {torch.cuda.device_count()}")
        self.device = torch.device("cuda", number)
        torch.cuda.set_device(self.device)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def connect(self, backend: str | None = None) -> None:
        """Finds the other processes; gradients go through NCCL between GPUs and gloo between CPUs.

        Raises:
            UserError: they cannot be reached.
        """
        super().connect(backend or ("nccl" if self.device.type == "cuda" else "gloo"))

    def distribute(self, module: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:
        """The module, wrapped so that its gradients are the mean over the processes."""
        if self.size == 1:
            return module
        devices = [self.device.index] if self.device.type == "cuda" else None
        with self.watching():
            return nn.parallel.DistributedDataParallel(
                module, device_ids=devices, find_unused_parameters=find_unused_parameters
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, in place; the same tensor."""
        if self.size > 1:
            with self.watching():
                distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Value) -> list[Value]:
        """Every process' value, in order, in every process."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.watching():
            distributed.all_gather_object(found, value, group=self._workers)
        return found

    def on_main(self, work: Callable[[], Value]) -> Value:
        """What ``work`` gives in the first process; the others wait and get the same.

        Raises:
            UserError: that ``work`` raised, in every process.
        """
        if self.size == 1:
            return work()
        outcome: tuple[Any, str | None] = (None, None)
        if self.is_main:
            try:
                outcome = (work(), None)
            except UserError as error:
                outcome = (None, str(error))
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise UserError(failure)
        return value

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the failure of a connection becomes a :class:`UserError`."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            known = isinstance(error, distributed.DistError) or any(sign in text.lower() for sign in _COMMUNICATION)
            if self.size == 1 or not known:
                raise
            raise UserError(f"another process has ended early ({text.splitlines()[0][:160]})") from None
