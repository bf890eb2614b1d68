"""Steps of a search for the tests of ``advance_beams``: random states, and what must become of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from minilm_fast.ops import BeamState, reference

SEP, PAD = 3, 0
Operator = Callable[..., None]


@dataclass(frozen=True)
class BeamCase:
    """Sizes and rules of a step; ``chosen``: the rows of its examples, None for all."""

    rows: int = 7
    beams: int = 4
    length: int = 9
    chosen: tuple[int, ...] | None = None
    entering: int = -1
    traced: bool = False
    penalty: float = 0.0
    min_len: int = 1
    early_exit: bool = True
    ties: bool = False
    special: bool = False
    seed: int = 0


CASES = {
    "plain": BeamCase(),
    "ties": BeamCase(rows=30, ties=True, penalty=0.7),
    "ties traced": BeamCase(rows=20, beams=2, ties=True, traced=True, early_exit=False, penalty=1.3),
    "penalty": BeamCase(rows=40, beams=5, length=33, penalty=0.9, min_len=20, seed=1),
    "falling divisors": BeamCase(rows=9, beams=3, penalty=-0.5),
    "not finite": BeamCase(rows=60, beams=3, special=True, ties=True),
    "some rows": BeamCase(chosen=(5, 0, 3), traced=True),
    "entering": BeamCase(chosen=(6, 2), entering=0, traced=True, ties=True),
    "entering all": BeamCase(entering=1, min_len=2, special=True),
    "greedy": BeamCase(rows=40, beams=1, length=5, ties=True),
    "greedy to the end": BeamCase(rows=5, beams=1, early_exit=False),
    "greedy entering": BeamCase(beams=1, entering=1, chosen=(1,)),
    "one frame": BeamCase(length=1, entering=0),
    "long": BeamCase(rows=2, beams=11, length=300, penalty=0.6, seed=3),
    "many beams": BeamCase(rows=1, beams=40, length=4, ties=True),
    "no rows": BeamCase(rows=0),
    "no examples": BeamCase(chosen=(), entering=0),
}


def arguments(case: BeamCase) -> dict[str, Any]:
    """The operator's arguments by name: rows in the middle of an output, or standing still."""
    draw = torch.Generator().manual_seed(case.seed)
    rows, beams, length = case.rows, case.beams, case.length
    history = length + max(case.entering, 0)

    def ints(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=draw, dtype=torch.int32)

    def scores(*shape: int) -> torch.Tensor:
        x = -3 * torch.rand(shape, generator=draw)
        x = x.round() if case.ties else x
        if case.special:
            odd = torch.tensor([float("nan"), float("-inf"), float("inf")])
            x = torch.where(torch.rand(shape, generator=draw) < 0.1, odd[ints(3, *shape).long()], x)
        return x

    running = torch.rand(rows, generator=draw) < 0.8
    # The last frame is often the next one.
    frame = torch.where(torch.rand(rows, generator=draw) < 0.3, max(length - 1, 0), ints(length, rows)).int()
    ended_before = torch.rand(rows, generator=draw) < 0.4
    traced = length if case.traced else 0
    state = BeamState(
        running=running,
        frame=torch.where(running, frame, length).int(),
        steps=torch.where(running, frame, 0).int(),
        scores=scores(rows, beams),
        last_ids=ints(6, rows, beams),
        tokens=ints(50, rows, beams, length),
        ancestry=ints(beams, rows, beams, history),
        best_score=torch.where(ended_before, scores(rows).double(), -torch.inf),
        best_tokens=ints(50, rows, length),
        best_length=ints(length + 1, rows),
        all_ended=torch.where(ended_before & (frame % 2 == 1), frame - 1, -1).int(),
        lengths=ints(length + 1, rows, beams),
        suppress=ints(2, rows, beams).bool(),
        trace_scores=scores(rows, traced, beams),
        trace_ids=ints(50, rows, traced, beams),
        trace_parents=ints(beams, rows, traced, beams),
    )
    examples = rows if case.chosen is None else len(case.chosen)
    shape = (examples, 1 if case.entering >= 0 else beams, beams)
    frames = torch.arange(length, dtype=torch.float64)
    return {
        "candidate_scores": scores(*shape).sort(dim=2, descending=True, stable=True).values,
        "candidate_ids": ints(6, *shape),
        "rows": None if case.chosen is None else torch.tensor(case.chosen, dtype=torch.int32),
        "divisors": ((6 + frames) / 6) ** case.penalty,
        **state._asdict(),
        "sep": SEP,
        "pad": PAD,
        "min_len": case.min_len,
        "early_exit": case.early_exit,
        "entering": case.entering,
    }


def check(case: BeamCase, operator: Operator, device: str = "cpu") -> None:
    """Holds an implementation to the specification, bit for bit, and to leaving the other rows alone."""
    before = arguments(case)
    mine = {k: x.clone().to(device) if isinstance(x, torch.Tensor) else x for k, x in before.items()}
    theirs = {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in before.items()}
    operator(*mine.values())
    reference.advance_beams(*theirs.values())
    still = torch.ones(case.rows, dtype=torch.bool)
    still[list(range(case.rows) if case.chosen is None else case.chosen)] = False
    if case.entering < 0:
        still |= ~before["running"]
    for name in BeamState._fields:
        found = mine[name].cpu()
        for x, y in ((found, theirs[name]), (found[still], before[name][still])):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}")
    if case.rows and not still.all():
        assert any(not torch.equal(mine[name].cpu(), before[name]) for name in ("frame", "tokens", "last_ids"))


def bad_arguments() -> list[tuple[dict[str, Any], str]]:
    """Changes to the arguments of the case ``some rows`` that no implementation takes, and what it says of them."""
    floats, ints = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4).int()
    return [
        ({"candidate_scores": floats[:, :, :3].contiguous()}, "candidate_scores must have the shape"),
        ({"candidate_scores": floats.double()}, "candidate_scores must be"),
        ({"candidate_scores": floats.transpose(1, 2)}, "candidate_scores must be contiguous"),
        ({"candidate_ids": ints[:2].contiguous()}, "candidate_ids must have the shape"),
        ({"rows": torch.zeros(2).int()}, "rows must have the shape"),
        ({"rows": None}, "candidate_scores must have the shape"),
        ({"divisors": torch.ones(9)}, "divisors must be"),
        ({"divisors": torch.ones(8).double()}, "divisors must have the shape"),
        ({"running": torch.zeros(7).int()}, "running must be"),
        ({"frame": torch.zeros(7).long()}, "frame must be"),
        ({"steps": torch.zeros(6).int()}, "steps must have the shape"),
        ({"scores": torch.zeros(4, 7).t()}, "scores must be contiguous"),
        ({"last_ids": torch.zeros(7, 4)}, "last_ids must be"),
        ({"tokens": torch.zeros(7, 4).int()}, "tokens must have the shape"),
        ({"tokens": torch.zeros(7, 4, 0).int()}, "tokens must have from 1 to"),
        ({"ancestry": torch.zeros(7, 4, 7).int()}, "ancestry must hold from 8"),
        ({"best_score": torch.zeros(7)}, "best_score must be"),
        ({"best_tokens": torch.zeros(7, 8).int()}, "best_tokens must have the shape"),
        ({"best_length": torch.zeros(8).int()}, "best_length must have the shape"),
        ({"all_ended": torch.zeros(7).bool()}, "all_ended must be"),
        ({"lengths": torch.zeros(7).int()}, "lengths must have the shape"),
        ({"suppress": torch.zeros(7, 4).int()}, "suppress must be"),
        ({"trace_scores": torch.zeros(7, 5, 4)}, "trace_scores must hold no frame or 9"),
        ({"trace_ids": torch.zeros(7, 0, 4).int()}, "trace_ids must have the shape"),
        ({"trace_parents": torch.zeros(7, 9, 4)}, "trace_parents must be"),
        ({"entering": 0}, "candidate_scores must have the shape"),
    ]
