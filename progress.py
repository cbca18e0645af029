"""What a decoding has done so far, in files beside its result, so that nothing is lost however it ends.

    RESULT.partial, RESULT.partial.1, …   of each process: the run's identity, then a line for each outcome as it comes
    RESULT.partial.lock                   held by every process at work; whoever finds itself alone puts the result together

Processes never wait for each other on the way, and a lock ends with its process, so none can hang for one that died.
"""

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from settings import InputError

try:
    import fcntl
except ImportError:  # Windows: one process
    fcntl = None


AGAIN = "the same command continues where this one stopped, with any number of processes"


def processes() -> tuple[int, int]:
    """(which of how many), as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def this_run() -> str:
    """The same for all processes that torchrun started together, another each time."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return " ".join([*(os.environ.get(name, "") for name in names), str(os.getppid()) if one_machine else ""])


class Progress:
    """The outcomes (dicts that JSON can hold, with `error`) of `count` records, by place."""

    def __init__(self, result: Path, identity: dict, count: int) -> None:
        """Continue what stands beside `result` if it has this identity. Raises InputError if another run writes there."""
        self.base, self.count = result.with_name(f"{result.name}.partial"), count
        self.process, self.processes = processes()
        self.mark = {"run": this_run(), "process": self.process}
        self.header = json.dumps(identity).encode() + b"\n"
        self.lock = self._sibling("lock").open("a")
        own = self._sibling(str(self.process)) if self.process else self.base
        self.own = own.open("a+b")
        if fcntl:
            fcntl.flock(self.lock, fcntl.LOCK_SH)
            try:
                fcntl.flock(self.own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{result} is being written by another run: end that one, or give another name") from None
        self.own.seek(0)
        known = self.own.read(len(self.header)) == self.header
        self.own.truncate(_whole_lines(own) if known else 0)  # what follows was cut off by the interruption
        if not known:
            self._write(self.header)
        self._write_line(self.mark | {"ended": False})
        self.read()
        self.before = (self.file >= 0) & ~self.failed  # the others are tried again

    def _sibling(self, suffix: str) -> Path:
        return self.base.with_name(f"{self.base.name}.{suffix}")

    def _write(self, data: bytes) -> None:
        self.own.write(data)
        self.own.flush()

    def _write_line(self, item: object) -> None:
        self._write(json.dumps(item).encode() + b"\n")

    def add(self, place: int, outcome: dict) -> None:
        self._write_line([place, outcome])

    def read(self) -> None:
        """Where each outcome stands, in the files of all processes; a success goes before a failure, then the later line."""
        siblings = re.compile(re.escape(self.base.name) + r"(\.\d+)?")
        paths = sorted(path for path in self.base.parent.iterdir() if siblings.fullmatch(path.name))
        self.files = [path.open("rb") for path in paths]
        self.file, self.offset = np.full(self.count, -1, np.int32), np.zeros(self.count, np.int64)
        self.failed, self.ended = np.zeros(self.count, bool), {}
        for number, file in enumerate(self.files):
            if file.readline() != self.header:
                continue
            offset = len(self.header)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                match json.loads(line):
                    case [place, outcome]:
                        failed = bool(outcome["error"])
                        if self.file[place] in (-1, number) or not failed:
                            self.file[place], self.offset[place], self.failed[place] = number, offset, failed
                    case {"run": run, "process": process, "ended": ended} if run == self.mark["run"]:
                        self.ended[process] = ended
                offset += len(line)

    def __iter__(self) -> Iterator[dict]:
        """The outcomes of all records, in order, read anew from disk."""
        for number, offset in zip(self.file.tolist(), self.offset.tolist(), strict=True):
            self.files[number].seek(offset)
            yield json.loads(self.files[number].readline())[1]

    @contextmanager
    def others_go_on(self) -> Iterator[None]:
        """torchrun ends every process when one does not end well: so a failed one waits, and the others take their time.

        Raises InputError, when no other is at work any more, for whatever fails within.
        """
        if self.processes == 1:
            yield
            return
        said = f"process {self.process} goes on for the 30 s that torchrun gives it; then {AGAIN}\n".encode()
        signal.signal(signal.SIGTERM, lambda *_: os.write(2, said) and None)
        try:
            yield
        except Exception:
            traceback.print_exc()
            print(f"process {self.process} failed: what it has done is kept, the others go on", file=sys.stderr, flush=True)
            self.finish(wait=True)
            raise InputError(self.lacking()) from None

    def finish(self, wait: bool = False) -> bool:
        """This process is done. Whether all have begun, and none is at work any more (`wait` until that is so): then the
        result is this one's to write."""
        self._write_line(self.mark | {"ended": not wait})
        if fcntl:
            fcntl.flock(self.lock, fcntl.LOCK_UN)
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return False
        self.read()
        return set(self.ended) >= set(range(self.processes))

    def lacking(self) -> str:
        """What is not done, and why; "" if nothing."""
        missing = int((self.file < 0).sum())
        early = " and ".join(str(process) for process, ended in sorted(self.ended.items()) if not ended)
        return f"{missing} of {self.count} files are not done, since process {early} ended early: {AGAIN}" if missing else ""

    def remove(self) -> None:
        """All that stands beside the result."""
        for file in self.files:
            file.close()
            Path(file.name).unlink()
        self._sibling("lock").unlink()


def _whole_lines(path: Path) -> int:
    """The bytes of a file up to its last newline."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            size += len(line) if line.endswith(b"\n") else 0
    return size
