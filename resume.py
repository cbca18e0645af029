"""Surviving: which checkpoint to continue from, what makes one complete, and what SIGTERM or a full disk may do to it.

A checkpoint is written in place. `resume.json` comes when every process has written its files, transformers'
`trainer_state.json` after that, so that whatever was killed on the way can be told from what is whole.
"""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import nested_gather

from settings import InputError, first_line
from zero3 import save_only_trained

try:
    import fcntl
except ImportError:  # Windows: two trainings in one folder go unnoticed
    fcntl = None

RESUME = "resume.json"
LOCK = ".lock"
STOPPED = 128 + signal.SIGTERM  # the exit status that a shell shows for it
T = TypeVar("T")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The folders checkpoint-N, the lowest N first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def flaw(folder: str | Path) -> str:
    """Why a training cannot continue from this checkpoint ("" if it can): a file of any process is gone, or cut."""
    folder = Path(folder)
    try:
        processes = json.loads((folder / RESUME).read_text(encoding="utf-8"))["processes"]
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        int(json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
        with safe_open(folder / "model.safetensors", "pt"):  # checks the header against the size
            pass
        states = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
        if (folder / "latest").exists():  # DeepSpeed's word for the folder of its states
            parts = folder / (folder / "latest").read_text(encoding="utf-8").strip()
            optimizers = sorted(parts.glob("*_optim_states.pt"))
            if len(optimizers) not in (0, processes):  # 0: without ZeRO they are among the model's
                return f"{len(optimizers)} of {processes} *_optim_states.pt in {parts.name}"
            models = sorted(parts.glob("*_model_states.pt")) or [parts / "*_model_states.pt"]
            states += [file.relative_to(folder) for file in (*optimizers, *models)]
        else:
            states += ["optimizer.pt", "scheduler.pt"]
        for name in states:
            with zipfile.ZipFile(folder / name) as file:  # its directory stands at the end
                file.namelist()
    except zipfile.BadZipFile:
        return f"{name} is cut"
    except SafetensorError:
        return "model.safetensors is cut"
    except FileNotFoundError as error:
        return f"{Path(error.filename or folder / 'model.safetensors').name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return "config.json, resume.json or trainer_state.json is cut"
    return ""


def newest_complete_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The complete checkpoint-N of the highest N, and those above it that are not complete, each with its flaw."""
    torn = []
    for folder in reversed(checkpoints(output_dir)):
        reason = flaw(folder)
        if not reason:
            return folder, torn
        torn.append((folder, reason))
    return None, torn


def checkpoint_to_resume(output_dir: str | Path, asked: str | None, overwrite: bool, deepspeed: bool) -> Path | None:
    """`asked` (--resume_from_checkpoint), else the newest complete one unless `overwrite`; the first process decides.

    Says which it is and what it passed over. Raises InputError, on every process, for a torn one that was asked for, and
    for one of another number of processes, or with DeepSpeed where this has none, or the other way round.
    """

    def decide() -> Path | None:
        if asked in (None, "True", "true"):  # true is transformers' word for the newest
            resume, torn = (None, []) if overwrite else newest_complete_checkpoint(output_dir)
            for folder, reason in torn:
                print(f"ignoring {folder}, which is not complete: {reason}", flush=True)
        else:
            resume, reason = Path(asked), flaw(asked)
            if reason:
                raise InputError(
                    f"{asked} is not complete ({reason}): leave --resume_from_checkpoint out to continue from the newest "
                    "complete one"
                )
        if resume:
            stored = json.loads((resume / RESUME).read_text(encoding="utf-8"))
            then, now = (_processes(stored["processes"], stored["deepspeed"]), _processes(_world_size(), deepspeed))
            if then != now:
                raise InputError(
                    f"{resume} was trained by {then}, this is {now}: start as many again, or a new training from its "
                    f"weights alone: --checkpoint {resume} --output_dir NEW (and --align_steps 0, if that is done)"
                )
        return resume

    return from_first(decide)


def _processes(count: int, deepspeed: bool) -> str:
    return f"{count} process{'es' if count > 1 else ''} with{'' if deepspeed else 'out'} DeepSpeed"


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def from_first(task: Callable[[], T]) -> T:
    """What `task` gives on the first process, on all of them; all raise its InputError."""
    if not dist.is_initialized():
        return task()
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told = [task(), None]
        except InputError as error:
            told = [None, str(error)]
        except OSError as error:
            told = [None, f"{error.filename or 'system'}: {error.strerror or error}"]
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise InputError(told[1])
    return told[0]


@contextmanager
def only_training(output_dir: str | Path) -> Iterator[None]:
    """Of all trainings the only one that writes this folder; raises InputError where another does, or where a process sees
    another disk than the first. However the first process ends, its lock ends with it."""
    path = Path(output_dir, LOCK)
    held = []

    def lock() -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        held.append(file)
        file.seek(0)
        owner = file.read().strip()
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a data worker would go on holding
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"{output_dir} is being written by another training ({owner}): end that one, or give another --output_dir"
            ) from None
        except OSError as error:
            print(f"{path}: {error.strerror}: take care that no other training writes there", flush=True)
        owner = f"process {os.getpid()} on {socket.gethostname()}, started {time.strftime('%Y-%m-%d %H:%M:%S')}"
        file.truncate(0)
        file.write(owner)
        file.flush()
        return owner

    try:
        owner = from_first(lock)
        _same_disk(path, owner)
        yield
    finally:
        for file in held:
            file.close()


def _same_disk(path: Path, owner: str, patience: int = 30) -> None:
    """Raises InputError, on every process, where one of them does not see the first one's lock within `patience` seconds."""
    if _world_size() == 1:
        return

    def seen() -> bool:
        try:
            os.listdir(path.parent)  # a network disk looks again
            return path.read_text(encoding="utf-8") == owner
        except OSError:
            return False

    if dist.get_rank() != 0:  # which would lose its lock by closing the file again
        deadline = time.monotonic() + patience
        while not seen() and time.monotonic() < deadline:
            time.sleep(0.5)
    blind = [None] * _world_size()
    dist.all_gather_object(blind, None if dist.get_rank() == 0 or seen() else socket.gethostname())
    if any(blind):
        raise InputError(
            f"{path.parent} on {next(filter(None, blind))} is not that of the first process: --output_dir must be on a disk "
            "that all machines share"
        )


@contextmanager
def told_if_full(folder: str | Path, output_dir: str | Path) -> Iterator[None]:
    """A write that fails is one line, with what is free on the disk and what the next start continues from."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError):
            if "gloo" in str(error) or "NCCL" in str(error):
                raise InputError(f"{folder} is not complete: another process has ended, see what it says") from None
            if "inline_container" not in str(error) and "iostream" not in str(error):  # torch.save's words
                raise
        free = shutil.disk_usage(output_dir).free / 1e9
        newest, _ = newest_complete_checkpoint(output_dir)
        raise InputError(
            f"cannot write {folder} ({first_line(error)}; {free:.1f} GB are free): make room (--save_total_limit 2 keeps "
            f"two checkpoints) and start again, it continues from {newest or 'the beginning'}"
        ) from None


class StopOnSignal(TrainerCallback):
    """After SIGTERM to any process all save at the end of the step, and stop."""

    def __init__(self) -> None:
        self.asked = self.agreed = False
        self.before = signal.SIG_DFL

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._ask)

    def agree(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        asked = torch.tensor(int(self.asked), device=args.device)
        if _world_size() > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked.item():
            self.agreed = control.should_save = control.should_training_stop = True
            control.should_evaluate &= state.global_step >= state.max_steps  # torchrun kills after 30 s

    on_step_end = on_evaluate = agree

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agreed:  # by --save_strategy epoch it would be deleted and written again
            control.should_save = control.should_evaluate = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)


def _heed_only_the_parent(init: Callable[[int], None] | None, worker: int) -> None:
    """A data worker that outlives a SIGTERM to the whole group (torchrun's, a scheduler's), as the step it feeds does."""
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

        def listen() -> None:
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
                pass
            os._exit(0)

        threading.Thread(target=listen, daemon=True).start()
    if init:
        init(worker)


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints are complete or can be told from those that are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep = None  # so many checkpoints; transformers' own rotation may take a torn one for the newest
        if not self.args.save_only_model:
            self.keep, self.args.save_total_limit = self.args.save_total_limit, None
        self.stop = StopOnSignal()
        self.add_callback(self.stop)

    @property
    def interrupted(self) -> bool:
        return self.stop.agreed and self.state.global_step < self.state.max_steps

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> torch.utils.data.DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        inner = loader.base_dataloader  # accelerate's hull asks it for everything
        inner.worker_init_fn = partial(_heed_only_the_parent, inner.worker_init_fn)
        # its seed for workers would come from the generator of dropout: once a run where they persist, once more on a resume
        inner.generator = torch.Generator()
        return loader

    def _run_epoch(self, **kwargs: Any) -> None:
        resume = kwargs["resume_from_checkpoint"]
        if resume and kwargs["epoch"] == kwargs["epochs_trained"]:  # transformers forgets the losses not logged yet
            stored = json.loads(Path(resume, RESUME).read_text(encoding="utf-8"))
            self._tr_loss += stored["loss"][self.args.process_index]
            self._total_loss_scalar -= sum(stored["loss"]) / len(stored["loss"])
            self._globalstep_last_logged = stored["last_logged"]
            self.state.compute_steps(self.args, self.state.max_steps)  # it would go by the checkpoint's --save_steps, …
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:  # and train one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        output_dir = self._get_output_dir(trial)
        folder = Path(output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # its old files and the new ones would look like one
        self.accelerator.wait_for_everyone()
        with told_if_full(folder, output_dir):
            super()._save_checkpoint(model, trial)
        if self.keep and self.args.should_save:
            rotate(output_dir, self.keep, {folder, Path(self.state.best_model_checkpoint or folder)})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            save_only_trained(self.model_wrapped)
        super()._save_optimizer_and_scheduler(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        losses = nested_gather(self._tr_loss, self.args.parallel_mode).flatten().tolist()  # after it all have written
        if self.args.should_save:
            stored = {"processes": self.args.world_size, "deepspeed": self.is_deepspeed_enabled}
            stored |= {"loss": losses, "last_logged": self._globalstep_last_logged}
            Path(output_dir, RESUME).write_text(json.dumps(stored) + "\n", encoding="utf-8")

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.interrupted:
            if self.args.should_save:
                folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
                more = "" if self.args.save_only_model else ", the same command continues from it"
                print(f"stopped by SIGTERM: {folder} is saved{more}", flush=True)
            self.args.load_best_model_at_end = False  # the best is for the end
        return super()._finalize_training(*args, **kwargs)


def rotate(output_dir: str | Path, limit: int, keep: set[Path]) -> None:
    """Delete the oldest complete checkpoints beyond `limit`, but for those in `keep`; torn ones neither count nor go."""
    complete = [folder for folder in checkpoints(output_dir) if not flaw(folder)]
    kept = {folder.resolve() for folder in keep}
    spare = [folder for folder in complete if folder.resolve() not in kept]
    for folder in spare[: max(0, len(complete) - limit)]:
        shutil.rmtree(folder, ignore_errors=True)


def leave_together() -> None:
    """End the processes' connection, lest one tears it from another (a SIGABRT at the end of a good training).

    The trainer must be gone: DDP would be the last to hold the connection, and let go of it with Python's lock in its hand,
    for which gloo's thread waits (a process that never ended).
    """
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
