"""Killed, stopped, out of disk, started twice: what the next start makes of it."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build_system, write_manifest
from jobs import Job, die
from safetensors.torch import load_file
from test_train import TOKENS, arguments, losses

import resume
import train
from audio import Augmentation
from dataset import SpeechDataset
from manifest import read_manifest

# both phases, every kind of chance, accumulated batches, losses logged every other step, saves between them
EVERYTHING = (
    *(*TOKENS, "3", "--lora_r", "2", "--projector_dropout", "0.1", "--spec_augment", "--speed_perturb", "--noise_snr", "20"),
    *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "8", "--save_steps", "3"),
    *("--logging_steps", "2"),
)
WORKERS = ("--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True")


def curve(folder):
    """Every number that was logged, but the clock's."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in e.items() if k in ("step", "epoch", "loss", "grad_norm", "learning_rate")} for e in log]


def assert_same(a, b):
    """Bit for bit."""
    assert curve(a) == curve(b)
    ours, theirs = (load_file(run / "model.safetensors") for run in (a, b))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def at_step(step, action, rank=0):
    """Before this step `action` on this rank."""
    inner = train.SpeechTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and self.args.process_index == rank:
            action()
        return inner(self, *args, **kwargs)

    train.SpeechTrainer.training_step = training_step


def wait_for(text, log, seconds=60):
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_steps(tiny, tmp_path, ranks):
    """The curve is the uninterrupted run's, bit for bit. Three things once broke it: the losses not logged yet at a save
    were forgotten; the data loader drew its workers' seed from the generator of dropout, where workers persist once a run,
    and once more after a resume; and workers that persist never heard of a new epoch.
    """
    flags = (*EVERYTHING, *(WORKERS if ranks == 1 else ()), "--text_data_path", tiny.root / "texts.txt")
    whole = Job(arguments(tiny, tmp_path / "whole", *flags), tmp_path / "logs", ranks)
    assert whole.wait() == [0] * ranks, whole.output()
    assert sum("loss" in entry for entry in curve(tmp_path / "whole")) == 4
    seed = random.randrange(10**6)
    print(f"{seed = }")
    chance = random.Random(seed)
    for step in sorted(chance.sample(range(8), 3 - ranks + 1)):
        kill = partial(at_step, step, die, chance.randrange(ranks))
        job = Job(arguments(tiny, tmp_path / "cut", *flags), tmp_path / "logs", ranks, kill)
        assert -signal.SIGKILL in job.wait(), job.output()
    job = Job(arguments(tiny, tmp_path / "cut", *flags), tmp_path / "logs", ranks)
    assert job.wait() == [0] * ranks, job.output()
    assert_same(tmp_path / "cut", tmp_path / "whole")
    if ranks == 1:
        return
    newest = tmp_path / "cut" / "checkpoint-8"
    with pytest.raises(SystemExit) as stop:  # fewer processes: refused, with a way out that works
        train.main([*map(str, arguments(tiny, tmp_path / "cut", *flags))])
    assert str(stop.value) == (
        f"error: {newest} was trained by 2 processes without DeepSpeed, this is 1 process without DeepSpeed: start as many "
        f"again, or a new training from its weights alone: --checkpoint {newest} --output_dir NEW (and --align_steps 0, if "
        "that is done)"
    )
    more = ("--checkpoint", str(newest), "--max_steps", "1", "--learning_rate", "0")
    train.main(arguments(tiny, tmp_path / "new", *more))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "new", newest))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def die_while_writing(nth, step, rank):
    """Of the files of the checkpoint at `step` this rank's nth is half written when the process is killed."""
    import transformers.trainer_callback

    import model

    written = []

    def dying(write, path_of):
        def dies(*args, **kwargs):
            path = Path(path_of(*args))
            trainer_saves = f"checkpoint-{step}" in str(path)
            if trainer_saves and int(os.environ.get("RANK", 0)) == rank:
                written.append(path)
            write(*args, **kwargs)
            if trainer_saves and len(written) == nth + 1:
                os.truncate(path, path.stat().st_size // 2)
                print(f"killed in {path.name}", flush=True)
                die()

        return dies

    torch.save = dying(torch.save, lambda value, path: path)
    model.save_file = dying(model.save_file, lambda state, path: path)
    Path.write_text = dying(Path.write_text, lambda path, text: path)
    state = transformers.trainer_callback.TrainerState
    state.save_to_json = dying(state.save_to_json, lambda self, path: path)


def test_killed_within_a_save(tiny, tmp_path):
    """Killed once in each of a checkpoint's files: the one before is continued, what is torn is said. Between two processes
    the second one's files may come last: it was taken for complete without them.
    """
    flags = (*EVERYTHING, "--save_steps", "2", "--max_steps", "5")
    job = Job(arguments(tiny, tmp_path / "whole", *flags), tmp_path / "logs")
    assert job.wait() == [0], job.output()
    said = []
    for nth in range(7):
        job = Job(arguments(tiny, tmp_path / "cut", *flags), tmp_path / "logs", 1, partial(die_while_writing, nth, 4, 0))
        assert job.wait() == [-signal.SIGKILL], job.output()
        said.append(job.output())
        if nth:
            assert f"ignoring {tmp_path / 'cut' / 'checkpoint-4'}, which is not complete: " in said[-1]
            assert f"continuing from {tmp_path / 'cut' / 'checkpoint-2'}\n" in said[-1]
    names = ["config.json", "model.safetensors.partial", "optimizer.pt", "scheduler.pt", "rng_state.pth", "resume.json"]
    assert [text.rpartition("killed in ")[2].strip() for text in said] == [*names, "trainer_state.json"]
    job = Job(arguments(tiny, tmp_path / "cut", *flags), tmp_path / "logs")
    assert job.wait() == [0], job.output()
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_the_other_process_killed_within_a_save(tiny, tmp_path):
    flags = (*EVERYTHING, "--save_steps", "2", "--max_steps", "3")
    job = Job(arguments(tiny, tmp_path, *flags), tmp_path / "logs", 2, partial(die_while_writing, 0, 2, 1))
    assert job.wait()[1] == -signal.SIGKILL
    assert "killed in rng_state_1.pth" in job.output()
    assert not (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    found, [(torn, reason)] = resume.newest_complete_checkpoint(tmp_path)
    assert (found, torn.name, reason) == (None, "checkpoint-2", "resume.json is missing")


def test_what_a_complete_checkpoint_needs(tiny, tmp_path):
    """Every file, each whole: one that is cut or gone sends the search on to the checkpoint before."""
    train.main(arguments(tiny, tmp_path, "--max_steps", "4"))
    older, newer = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    assert resume.newest_complete_checkpoint(tmp_path) == (newer, [])
    assert resume.newest_complete_checkpoint(tmp_path / "nowhere") == (None, [])
    files = sorted(file.name for file in newer.iterdir() if file.name != "training_args.bin")
    assert len(files) == 7
    for name in files:
        whole = (newer / name).read_bytes()
        (newer / name).write_bytes(whole[:-8])
        found, [(torn, reason)] = resume.newest_complete_checkpoint(tmp_path)
        assert (found, torn) == (older, newer)
        assert reason.endswith(" is cut")
        assert name in reason
        (newer / name).unlink()
        assert resume.newest_complete_checkpoint(tmp_path) == (older, [(newer, f"{name} is missing")])
        (newer / name).write_bytes(whole)
    (newer / "optimizer.pt").unlink()
    with pytest.raises(
        SystemExit, match=r"error: .*checkpoint-4 is not complete \(optimizer.pt is missing\): leave --resume"
    ):
        train.main(arguments(tiny, tmp_path, "--resume_from_checkpoint", str(newer)))


def test_rotation_spares_the_only_complete_checkpoint(tiny, tmp_path):
    """transformers took a torn checkpoint of a higher number for the newest, kept that and deleted the one just saved."""
    train.main(arguments(tiny, tmp_path, "--max_steps", "2"))
    torn = tmp_path / "checkpoint-9"
    shutil.copytree(tmp_path / "checkpoint-2", torn)
    (torn / "optimizer.pt").unlink()
    train.main(arguments(tiny, tmp_path, "--max_steps", "6", "--save_total_limit", "1"))
    assert [folder.name for folder in resume.checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-9"]
    assert resume.newest_complete_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-6"


def test_a_finished_training_trains_no_step_more(tiny, tmp_path):
    """Started again within an epoch, transformers trained one step past --max_steps, and again at every start."""
    train.main(arguments(tiny, tmp_path, "--max_steps", "4"))
    before, weights = losses(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()  # killed before it was written
    train.main(arguments(tiny, tmp_path, "--max_steps", "4"))
    assert losses(tmp_path) == before
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_the_command_line_and_not_the_checkpoint_says_how_often(tiny, tmp_path):
    """transformers goes on by the --save_steps and --eval_steps that the checkpoint was trained with."""
    train.main(arguments(tiny, tmp_path, "--max_steps", "2", "--save_steps", "2"))
    train.main(arguments(tiny, tmp_path, "--max_steps", "5", "--save_steps", "3"))
    assert [folder.name for folder in resume.checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-5"]


def test_a_training_that_is_prolonged_does_not_align_again(tiny, tmp_path):
    """Half of the steps align by default: half of more steps lay past the resumed one, and the LLM was left out again."""
    tokens = arguments(tiny, tmp_path, "--splice", "tokens")
    train.main([*tokens, "--max_steps", "3"])
    aligning = []
    at_every = train.SpeechTrainer.training_step

    def training_step(self, *args, **kwargs):
        loss = at_every(self, *args, **kwargs)
        aligning.append(self.model.aligning)
        return loss

    train.SpeechTrainer.training_step = training_step
    try:
        train.main([*tokens, "--max_steps", "9"])
    finally:
        train.SpeechTrainer.training_step = at_every
    assert aligning == [False] * 6


def test_a_worker_that_persists_hears_of_the_epoch(tiny):
    system = build_system(tiny.qwen2, tiny.whisper)
    dataset = SpeechDataset(read_manifest(tiny.manifest), system.prompt, system.settings, 512, Augmentation(noise_snr=20.0))
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        epochs.append([example["mel"] for example in loader])
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert all(torch.equal(heard, dataset[i]["mel"]) for i, heard in enumerate(epochs[1]))


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_one_line_and_the_older_checkpoint_is_continued(tiny, tmp_path):
    """The kernel refuses to write on within model.safetensors, then within optimizer.pt (for another reason than a full
    disk, on the same way through the libraries)."""
    flags = (*EVERYTHING, "--save_steps", "2", "--max_steps", "5", "--save_total_limit", "1")
    for size in (100_000, 600_000):
        full = partial(at_step, 3, partial(limit_file_size, size))
        job = Job(arguments(tiny, tmp_path / "cut", *flags), tmp_path / "logs", 1, full)
        assert job.wait() == [1], job.output()
        last = job.output().strip().splitlines()[-1]
        assert last.startswith(f"error: cannot write {tmp_path / 'cut' / 'checkpoint-4'} ("), job.output()
        assert last.endswith(f"and start again, it continues from {tmp_path / 'cut' / 'checkpoint-2'}")
        assert "Traceback" not in job.output()
    for run in ("cut", "whole"):
        job = Job(arguments(tiny, tmp_path / run, *flags), tmp_path / "logs")
        assert job.wait() == [0], job.output()
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_one_folder_one_training(tiny, tmp_path):
    """The second is refused; killed with -9 the first leaves no lock, though its data worker lives on for seconds."""
    flags = ("--max_steps", "2", "--dataloader_num_workers", "1")
    job = Job(arguments(tiny, tmp_path, *flags), tmp_path / "logs", 1, partial(at_step, 1, partial(time.sleep, 100)))
    wait_for("'loss'", job.logs[0])
    with pytest.raises(
        SystemExit, match=rf"error: {tmp_path} is being written by another training \(process \d+ on .*\): end"
    ):
        train.main(arguments(tiny, tmp_path, *flags))
    job.kill()
    train.main(arguments(tiny, tmp_path, *flags))
    assert len(losses(tmp_path)) == 2


def test_sigterm_to_one_process_or_to_torchrun_saves_and_stops(tiny, tmp_path):
    """All processes stop after the same step, data workers survive torchrun's signal to their whole group; the same command
    ends as if nothing had been."""
    items = [
        clip | {"key": f"{n}-{clip['key']}", "wav": str(tiny.root / clip["wav"])} for n in range(4) for clip in tiny.clips
    ]
    data = ("--data_path", write_manifest(tmp_path / "many.jsonl", items), "--gradient_accumulation_steps", "1")
    flags = (*EVERYTHING, *WORKERS[:2], *data, "--save_steps", "100", "--max_steps", "6", "--save_total_limit", "1")
    argv = [str(word) for word in arguments(tiny, tmp_path / "cut", *flags)]
    job = Job(argv, tmp_path / "logs", 2)
    assert job.wait() == [0, 0], job.output()
    shutil.move(tmp_path / "cut", tmp_path / "whole")

    job = Job(argv, tmp_path / "logs", 2, partial(at_step, 1, terminate_myself, 1))
    assert job.wait() == [resume.STOPPED] * 2, job.output()
    checkpoint = tmp_path / "cut" / "checkpoint-2"
    assert f"stopped by SIGTERM: {checkpoint} is saved, the same command continues from it" in job.output()
    assert resume.newest_complete_checkpoint(tmp_path / "cut") == (checkpoint, [])
    assert not (tmp_path / "cut" / "model.safetensors").exists()

    slow = tmp_path / "slow.py"
    slow.write_text(
        f"import sys, time\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\nimport test_resume, train\n"
        "test_resume.at_step(3, lambda: (print('at step 3', flush=True), time.sleep(2)))\ntrain.main()\n"
    )
    log = tmp_path / "torchrun.log"
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc_per_node=2", slow, *argv]
    with log.open("w") as out:
        torchrun = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for("at step 3", log)
    torchrun.terminate()
    torchrun.wait(60)
    assert f"stopped by SIGTERM: {tmp_path / 'cut' / 'checkpoint-4'} is saved" in log.read_text(), log.read_text()
    assert "DataLoader worker" not in log.read_text()

    job = Job(argv, tmp_path / "logs", 2)
    assert job.wait() == [0, 0], job.output()
    assert_same(tmp_path / "cut", tmp_path / "whole")


def terminate_myself():
    os.kill(os.getpid(), signal.SIGTERM)
