"""Scripts in processes of their own, forked from one that has imported everything: a second each instead of ten."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from conftest import ROOT

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["torch", "transformers", "whisper", "deepspeed", "peft", "train"])


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(argv: list[str], environment: dict[str, str], log: Path, before: Callable[[], None] | None, script: str) -> None:
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of its data workers
    torch.set_num_threads(1)
    if before:
        before()
    sys.exit(importlib.import_module(script).main(argv))


class Job:
    """The processes of one training (or `script`), as torchrun would start them; `before` runs in each, and may break it."""

    def __init__(
        self,
        argv: Sequence,
        logs: Path,
        ranks: int = 1,
        before: Callable[[], None] | None = None,
        script: str = "train",
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank{rank}.log" for rank in range(ranks)]
        for log in self.logs:
            log.write_text("")
        together = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        together |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        if ranks == 1 and "--deepspeed" not in argv:
            together = {"OMP_NUM_THREADS": "1"}
        self.processes = []
        for rank, log in enumerate(self.logs):
            environment = together | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if "WORLD_SIZE" in together else {})
            process = server.Process(target=_run, args=([str(word) for word in argv], environment, log, before, script))
            process.start()
            self.processes.append(process)

    def wait(self, seconds: float = 120) -> list[int]:
        """Exit statuses, those of a signal negative; as torchrun does, the others are ended when one fails."""
        while any(p.exitcode is None for p in self.processes):
            multiprocessing.connection.wait([p.sentinel for p in self.processes if p.exitcode is None], timeout=seconds)
            if all(p.exitcode is None for p in self.processes):
                self.kill()
                raise TimeoutError(f"no process has ended within {seconds} s:\n{self.output()}")
            if any(p.exitcode for p in self.processes):
                for p in self.processes:
                    p.join(20)
                self.kill()
        return [p.exitcode for p in self.processes]

    def kill(self) -> None:
        for p in self.processes:
            if p.exitcode is None:
                os.kill(p.pid, signal.SIGKILL)
            p.join()

    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


def run_job(argv: Sequence, logs: Path, before: Callable[[], None] | None = None) -> str:
    """Two processes that train to the end; what they wrote."""
    job = Job(argv, logs, 2, before)
    assert job.wait() == [0, 0], job.output()
    return job.output()


def die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
