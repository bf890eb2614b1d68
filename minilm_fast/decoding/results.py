"""Where the results of a run are kept until all are there: journals beside an output file, or memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

from minilm_fast.atomic import remove_quietly
from minilm_fast.decoding.journal import Header, Journal, MergedJournals, Record, is_journal, journal_path, journals_of
from minilm_fast.decoding.sharding import Group
from minilm_fast.errors import UserError


class Results(Protocol):
    """Results by sentence.

    Attributes:
        note: what a user should know about an earlier run's results; may be empty.
    """

    note: str

    @property
    def done(self) -> Collection[int]:
        """Sentences that an earlier run finished."""

    def append(self, record: Record) -> None:
        """Keeps the result of a sentence."""

    def in_order(self) -> Iterator[Record]:
        """All results, in the order of the input."""

    def close(self) -> None:
        """Lets go of files; results stay in them."""

    def remove(self) -> None:
        """Forgets the results, which are in the output now."""

    def hint(self) -> str:
        """What to do after an interruption; may be empty."""


class MemoryResults:
    """Results of a run whose output is no file: nothing to resume from."""

    done: Collection[int] = ()
    note = ""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def append(self, record: Record) -> None:
        self._records.append(record)

    def in_order(self) -> Iterator[Record]:
        return iter(sorted(self._records, key=lambda record: record["index"]))

    def close(self) -> None:
        pass

    def remove(self) -> None:
        self._records.clear()

    def hint(self) -> str:
        return ""


class JournalResults:
    """Results of a group of processes, each with a journal of its own beside the output.

    Args:
        output: the output file.
        header: identifies the run, see :mod:`minilm_fast.decoding.journal`.
        resume: go on with the journals that are there, whatever number of processes wrote them.
        group: the processes; all of them make this object.

    Raises:
        UserError: a journal cannot be written, belongs to another run, or another run is writing it; or the processes
            do not agree on what to do.
    """

    def __init__(self, output: Path, header: Header, resume: bool, group: Group) -> None:
        self._output = output
        self._header = header
        self._group = group
        self.note = ""
        plan = None
        if group.rank == 0:
            plan = self._start(resume)
        plan = group.broadcast(plan)
        assert plan is not None
        common, self.done = plan
        differing = [name for name in header if header[name] != common[name]]
        if differing:
            raise UserError(f"the processes differ in {', '.join(differing)}: give all the same flags and files")
        if group.rank:
            self._journal = Journal(journal_path(output, group.rank), header, resume=True)

    def _start(self, resume: bool) -> tuple[Header, list[int]]:
        """Opens the first process' journal; returns what all must agree on and what is done."""
        found = journals_of(self._output)
        kept = MergedJournals(found, self._header) if resume else None
        own = journal_path(self._output)
        self._journal = Journal(own, self._header, resume)
        if kept is None:
            for path in found:
                if path != own and is_journal(path):
                    remove_quietly(path)
            if found:
                self.note = f"{found[0]}, left by an unfinished run, is overwritten; --resume would have gone on"
            return self._header, []
        if kept.dropped:
            self.note = f"{kept.dropped} bytes of an unfinished record are dropped from the journal"
        elif not found:
            self.note = f"there is no {own} to resume from: starting from the beginning"
        return self._header, sorted(kept.done)

    def append(self, record: Record) -> None:
        self._journal.append(record)

    def in_order(self) -> Iterator[Record]:
        merged = MergedJournals(journals_of(self._output), self._header)
        missing = self._header["examples"] - len(merged.done)
        if missing:
            raise UserError(
                f"{self._output}: the results of {missing} sentences are not there: all processes must see this folder"
            )
        return merged.in_order()

    def close(self) -> None:
        self._journal.close()

    def remove(self) -> None:
        for path in journals_of(self._output):
            remove_quietly(path)

    def hint(self) -> str:
        if not self._journal.count:
            return ""
        return f"; what is done is in {self._journal.path}: the same command with --resume goes on"
