"""Batches by duration: their bound, their order, the same on every process and after a resume; padding is logged."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_clip, write_manifest
from jobs import run_job
from test_train import TOKENS, arguments, losses

import train
from audio import UNCHANGED
from batches import DurationSampler, LengthSampler, Padding, padded_lengths
from settings import InputError

RATE = 16000


def lengths(clips: int, longest: float = 20.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.3 * RATE, longest * RATE, clips).astype(np.int64)


def padding(batches, of):
    return 1 - of.sum() / sum(of[batch].max() * len(batch) for batch in batches)


@pytest.mark.parametrize("clips", [7, 50, 2000])
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 3), (3, 1)])
def test_each_clip_stands_in_one_batch_and_no_batch_is_too_long_or_empty(clips, processes, accumulation):
    of = lengths(clips)
    samplers = [DurationSampler(of, 60, 0, process, processes, accumulation) for process in range(processes)]
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert {len(share) for share in shares} == {len(samplers[0])}
        assert len(samplers[0]) % accumulation == 0
        batches = [batch for share in shares for batch in share]
        assert sorted(i for batch in batches for i in batch) == list(range(clips))
        assert all(batch for batch in batches)
        assert max(of[batch].max() * len(batch) for batch in batches) <= 60 * RATE


def test_there_is_little_padding_and_another_composition_each_epoch():
    of = lengths(5000)
    sampler = DurationSampler(of, 120, 0)
    first = sampler.batches()
    sampler.set_epoch(1)
    second = sampler.batches()
    assert padding(first, of) < 0.06 < 0.3 < padding(np.array_split(np.random.default_rng(0).permutation(5000), 500), of)
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    again = DurationSampler(of, 120, 0)
    again.set_epoch(1)
    assert [batch.tolist() for batch in again.batches()] == [batch.tolist() for batch in second]
    assert len(first) < 1.15 * of.sum() / RATE / 120  # and they are full


def test_fewer_clips_than_processes_stand_in_several_batches():
    """accelerate begins from the front again, too: a process without a batch would hang the others."""
    shares = [list(DurationSampler(lengths(2), 60, 0, process, 5)) for process in range(5)]
    assert [len(share) for share in shares] == [1] * 5
    assert {i for share in shares for batch in share for i in batch} == {0, 1}
    of = np.full(20, 9 * RATE)  # in several buckets
    shares = [list(DurationSampler(of, 10, 0, process, 64)) for process in range(64)]
    times = np.bincount([i for share in shares for batch in share for i in batch])
    assert {len(batch) for share in shares for batch in share} == {1}
    assert set(times) == {3, 4}


def test_accumulating_one_process_sees_the_global_batches_of_two():
    of = lengths(300)
    one = list(DurationSampler(of, 30, 0, accumulation=2))
    two = [list(DurationSampler(of, 30, 0, process, 2)) for process in (0, 1)]
    assert one == [batch for pair in zip(*two, strict=True) for batch in pair]


def test_a_clip_longer_than_a_batch_is_refused():
    with pytest.raises(InputError, match=r"--batch_seconds 10 is less than the longest clip, 1\d\.\d\d s: raise it"):
        DurationSampler(lengths(100), 10, 0)


def test_padding_is_counted_by_the_longest_of_each_batch():
    counted = Padding()
    counted.add(torch.tensor([100, 50]))
    counted.add(torch.tensor([10]))
    assert counted.share() == pytest.approx(50 / 210, abs=1e-4)
    counted.add(torch.tensor([30, 10]))  # since then
    assert counted.share() == pytest.approx(20 / 60, abs=1e-4)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Fourteen clips of 0.5 to 2.5 s."""
    folder = tmp_path_factory.mktemp("clips")
    rng, items = np.random.default_rng(0), []
    for i in range(14):
        write_clip(folder / f"{i}.wav", seconds := float(rng.uniform(0.5, 2.5)), seed=i)
        items.append({"key": f"c{i}", "wav": f"{i}.wav", "txt": "text " + "ab" * (i % 3), "duration": seconds})
    return write_manifest(folder / "m.jsonl", items)


def by_seconds(tiny, output, manifest, *more):
    flags = arguments(tiny, output, "--data_path", str(manifest), "--batch_seconds", "5", *more)
    at = flags.index("--per_device_train_batch_size")
    return flags[:at] + flags[at + 2 :]


def history(folder, name):
    return [e[name] for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if name in e]


@pytest.mark.parametrize("extra", [(), ("--deepspeed", "ds_config_zero3.json")])
def test_two_processes_train_as_one_with_the_same_global_batches_and_resume_in_an_epoch(tiny, tmp_path, manifest, extra):
    """Unequal batches: the loss is a sum over all labels, so two processes with a batch each are one that accumulates two.

    The resume is within the second epoch: with several processes no one told the sampler, which went on with the order of
    the first. Tolerance 1e-4, under ZeRO-3 1e-2.
    """
    flags = (*TOKENS, "3", "--max_steps", "7", "--save_steps", "5")
    train.main(by_seconds(tiny, tmp_path / "one", manifest, *flags, "--gradient_accumulation_steps", "2"))
    argv = by_seconds(tiny, tmp_path / "two", manifest, *flags, *extra)
    run_job(argv, tmp_path / "logs")
    tolerance = 1e-2 if extra else 1e-4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    epochs = history(tmp_path / "two", "epoch")
    assert 1 < epochs[4] < 2 < epochs[6]
    before = losses(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-7")
    assert "checkpoint-5" in re.search(r"continuing from (.*)", run_job(argv, tmp_path / "logs"))[1]
    assert losses(tmp_path / "two") == pytest.approx(before, rel=1e-6)


def test_one_process_resumes_within_an_epoch_bit_for_bit(tiny, tmp_path, manifest):
    flags = ("--max_steps", "13", "--save_steps", "11", "--spec_augment", "--speed_perturb")
    train.main(by_seconds(tiny, tmp_path / "o", manifest, *flags))
    before, epochs = losses(tmp_path / "o"), history(tmp_path / "o", "epoch")
    assert 1 < epochs[10] < 2
    shutil.rmtree(tmp_path / "o" / "checkpoint-13")
    train.main(by_seconds(tiny, tmp_path / "o", manifest, *flags))
    assert losses(tmp_path / "o") == before


def test_two_processes_keep_the_order_of_lengths_after_a_resume(tiny, tmp_path, manifest):
    """accelerate does not reach our sampler behind the batches it skips: a resume within the second epoch of several
    processes read the clips in the order of the first."""
    order = ("--max_steps", "6", "--save_steps", "5", "--group_by_length")
    flags = arguments(tiny, tmp_path / "o", "--data_path", str(manifest), *order)
    run_job(flags, tmp_path / "logs")
    before = losses(tmp_path / "o")
    assert 1 < history(tmp_path / "o", "epoch")[4] < 2
    shutil.rmtree(tmp_path / "o" / "checkpoint-6")
    run_job(flags, tmp_path / "logs")
    assert losses(tmp_path / "o") == before


def test_padding_is_in_the_log_of_every_way_of_batching(tiny, tmp_path, manifest):
    """And less by duration than at random, over the same epochs."""
    shares = {}
    for name, flags in (("random", ()), ("length", ("--group_by_length",))):
        more = (
            "--data_path",
            str(manifest),
            "--num_train_epochs",
            "2",
            "--logging_steps",
            "100",
            "--logging_strategy",
            "epoch",
        )
        train.main(arguments(tiny, tmp_path / name, *more, *flags, "--per_device_train_batch_size", "4"))
        shares[name] = history(tmp_path / name, "padding")
    train.main(by_seconds(tiny, tmp_path / "d", manifest, "--num_train_epochs", "2", "--logging_strategy", "epoch"))
    shares["duration"] = history(tmp_path / "d", "padding")
    assert all(len(values) == 2 and min(values) > 0 for values in shares.values())
    assert sum(shares["duration"]) < sum(shares["random"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--per_device_train_batch_size", "2"), "and so does --per_device_train_batch_size: leave one out"),
        (("--group_by_length",), "and so does --group_by_length or --train_sampling_strategy"),
        (("--auto_find_batch_size",), "and so does --auto_find_batch_size"),
        (("--dataloader_drop_last",), "and so does --dataloader_drop_last"),
        (("--batch_seconds", "0"), "--batch_seconds must be more than 0"),
        (("--batch_seconds", "2"), "error: --batch_seconds 2 is less than the longest clip"),
    ],
)
def test_contradictions_are_refused_in_one_line(tiny, tmp_path, manifest, flags, message):
    with pytest.raises(SystemExit) as stop:
        train.main(by_seconds(tiny, tmp_path, manifest, *flags))
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_a_batch_too_short_is_told_before_anything_is_deleted(tiny, tmp_path, manifest):
    train.main(by_seconds(tiny, tmp_path, manifest, "--max_steps", "1"))
    with pytest.raises(SystemExit, match="--batch_seconds 2 is less than the longest clip"):
        train.main(by_seconds(tiny, tmp_path, manifest, "--batch_seconds", "2", "--overwrite_output_dir"))
    assert (tmp_path / "checkpoint-1").is_dir()


def test_padding_to_30_s_counts():
    dataset = SimpleNamespace(lengths=np.array([16000, 32000]), settings={"encoder_padding": "30s"}, augmentation=UNCHANGED)
    assert padded_lengths(dataset).tolist() == [480000, 480000]


def test_length_sampler_takes_arrays():
    of = lengths(40)
    assert sorted(LengthSampler(4, of, 0)) == list(range(40))
