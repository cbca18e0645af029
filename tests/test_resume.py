"""Killed, stopped, out of disk, started twice: what the next start makes of it."""

import json
import os
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import write_manifest
from jobs import Job, die
from safetensors.torch import load_file
from test_train import TOKENS, arguments, losses

# both phases, every kind of chance, accumulated batches that cross the end of an epoch, losses logged every other step
EVERYTHING = (
    *(*TOKENS, "3", "--lora_r", "2", "--projector_dropout", "0.1", "--spec_augment", "--speed_perturb", "--noise_snr", "20"),
    *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--max_steps", "8", "--save_steps", "3"),
    *("--logging_steps", "2", "--dataloader_num_workers", "1", "--dataloader_persistent_workers", "True"),
)


def curve(folder):
    """Every number that was logged but the clock's."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if k in ("step", "epoch", "loss", "grad_norm", "learning_rate")} for entry in log]


def assert_same(a, b):
    assert curve(a) == curve(b)
    ours, theirs = (load_file(run / "model.safetensors") for run in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


def die_at_step(step, rank):
    import train

    inner = train.SpeechTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and self.args.process_index == rank:
            die()
        return inner(self, *args, **kwargs)

    train.SpeechTrainer.training_step = training_step


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_steps(tiny, tmp_path, ranks):
    """The losses not logged yet at a save were forgotten: the first loss after a resume was the mean of fewer steps."""
    flags = (*EVERYTHING, "--text_data_path", str(tiny.root / "texts.txt"))
    whole = Job(arguments(tiny, tmp_path / "whole", *flags), tmp_path / "logs", ranks)
    assert whole.wait() == [0] * ranks, whole.output()
    assert len([entry for entry in curve(tmp_path / "whole") if "loss" in entry]) == 4
    seed = random.randrange(1000)
    rng = random.Random(seed)
    for step in sorted(rng.sample(range(8), 3)):
        t=time.time()
        job = Job(
            arguments(tiny, tmp_path / "cut", *flags),
            tmp_path / "logs",
            ranks,
            partial(die_at_step, step, rng.randrange(ranks)),
        )
        assert -signal.SIGKILL in job.wait(), job.output()
        print(time.time()-t)
    job = Job(arguments(tiny, tmp_path / "cut", *flags), tmp_path / "logs", ranks)
    assert job.wait() == [0] * ranks, job.output()
    assert_same(tmp_path / "cut", tmp_path / "whole")
