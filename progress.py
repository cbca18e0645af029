"""What a decoding has done so far, in files beside its result, so that nothing is lost however it ends.

    RESULT.partial, RESULT.partial.1, …   of each process: the run's identity, then a line for each outcome as it comes
    RESULT.partial.lock                   of several: held by each at work; who finds itself alone puts the result together

Processes never wait for each other on the way, and a lock ends with its process, so none can hang for one that died.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from manifest import Record
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


def identity(records: Sequence[Record], weights: Path, options: dict) -> dict:
    """What an outcome depends on: only such a run may be continued."""
    listed = sha256()
    for record in records:
        listed.update(repr(record._replace(txt=None, where="")).encode("utf-8", "backslashreplace"))
    return {"weights": sha256(weights.read_bytes()).hexdigest(), "records": listed.hexdigest(), "options": options}


def beside(result: Path, suffix: str = "") -> Path:
    return result.with_name(f"{result.name}.partial{suffix}")


class Desk(NamedTuple):
    """A process's place at work: the lock it holds beside others, which run it belongs to, and who started it."""

    lock: TextIO | None
    run: str
    parent: int


def at_work(result: Path) -> Desk:
    """Take part in making `result`. Of several processes each works in a child of its own, where this returns.

    For torchrun ends all processes as soon as one fails. So a parent whose child has failed ends when no other is at work
    any more: the others finish their shares.
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    run, (process, count) = this_run(), processes()
    if count == 1:
        return Desk(None, run, os.getppid())
    lock = beside(result, ".lock").open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return Desk(lock, run, os.getppid())
    said = f"process {process} goes on for the 30 s that torchrun gives it; then {AGAIN}\n".encode()
    signal.signal(signal.SIGTERM, lambda *_: os.write(2, said) and None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child gets it too
    lock.close()  # the child holds it on, and it ends with the child
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        what = f"process {process} was ended by signal {-code}: what it had done is kept, the others go on; then {AGAIN}"
        print(what, file=sys.stderr, flush=True)
    if code:
        with suppress(FileNotFoundError), beside(result, ".lock").open("r+") as lock:  # gone: the result is written
            fcntl.flock(lock, fcntl.LOCK_EX)
    os._exit(code if code >= 0 else 1)


class Progress:
    """The outcomes (dicts that JSON can hold, with `error`) of `count` records, by place."""

    def __init__(self, result: Path, desk: Desk, identity: dict, count: int) -> None:
        """Continue what stands beside `result` if it has this identity.

        Raises InputError if another run writes there.
        """
        self.result, self.desk, self.count = result, desk, count
        self.process, self.processes = processes()
        self.mark = {"run": desk.run, "process": self.process}
        self.header = json.dumps(identity).encode() + b"\n"
        own = beside(result, f".{self.process}" if self.process else "")
        self.own = own.open("a+b")
        if fcntl:
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

    def _write(self, data: bytes) -> None:
        self.own.write(data)
        self.own.flush()

    def _write_line(self, item: object) -> None:
        self._write(json.dumps(item).encode() + b"\n")

    def add(self, place: int, outcome: dict) -> None:
        self._write_line([place, outcome])
        if os.getppid() != self.desk.parent and self.processes > 1:
            raise InputError("torchrun, or the process it started, is gone")

    def read(self) -> None:
        """Where each outcome stands, in the files of all processes; a success goes before a failure, then the later line."""
        siblings = re.compile(re.escape(beside(self.result).name) + r"(\.\d+)?")
        paths = sorted(path for path in self.result.parent.iterdir() if siblings.fullmatch(path.name))
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

    def finish(self) -> bool:
        """This process is done. Whether all have begun and none is at work any more: then it is to write the result."""
        self._write_line(self.mark | {"ended": True})
        if self.desk.lock:
            fcntl.flock(self.desk.lock, fcntl.LOCK_UN)
            try:
                fcntl.flock(self.desk.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        if not fcntl:  # Windows deletes no open file; elsewhere the lock stays until it is gone
            self.own.close()
        for file in self.files:
            file.close()
            Path(file.name).unlink()
        beside(self.result, ".lock").unlink(missing_ok=True)


def _whole_lines(path: Path) -> int:
    """The bytes of a file up to its last newline."""
    size = 0
    with path.open("rb") as file:
        for line in file:
            size += len(line) if line.endswith(b"\n") else 0
    return size
