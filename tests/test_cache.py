"""The encoder's outputs on disk: found by content, whole or made anew, shared by many writers."""

import os
import shutil
import threading
from functools import partial

import numpy as np
import pytest
import torch
from conftest import build_system, write_clip, write_manifest
from jobs import run_job
from test_train import TOKENS, arguments, losses

import train
from cache import EncoderCache
from dataset import SpeechDataset
from manifest import read_manifest
from settings import InputError


@pytest.fixture
def clips(tiny):
    system = build_system(tiny.qwen2, tiny.whisper)
    return SpeechDataset(read_manifest(tiny.manifest), system.prompt, system.settings, 512), system.model.encoder


class Counting:
    def __init__(self, encoder):
        self.encoder, self.calls = encoder, 0

    def __call__(self, *args):
        self.calls += 1
        with torch.no_grad():
            return self.encoder(*args)


def files(folder):
    return sorted(folder.rglob("*.npy"))


def test_it_is_read_through_a_memory_map_and_is_what_the_encoder_says(clips, tmp_path):
    dataset, encoder = clips
    cache = EncoderCache(tmp_path, dataset.settings)
    cache.fill(dataset, Counting(encoder))
    array = cache._read(cache.file(dataset.digests[1].tobytes()))
    assert isinstance(array, np.memmap)
    mel = dataset.log_mel(1)
    with torch.no_grad():
        expected = encoder(mel[None], torch.tensor([mel.shape[-1]]))[0]
    assert torch.equal(dataset[1]["encoded"], expected.half())


def test_a_second_start_encodes_nothing_and_a_killed_one_goes_on(clips, tmp_path):
    dataset, encoder = clips
    counting = Counting(encoder)
    EncoderCache(tmp_path, dataset.settings).fill(dataset, counting)
    assert counting.calls == 5
    files(tmp_path)[0].unlink()
    EncoderCache(tmp_path, dataset.settings).fill(dataset, counting)
    assert counting.calls == 6


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "zeros", "other"])
def test_a_corrupt_file_is_told_when_read_and_made_anew_at_the_next_start(clips, tmp_path, damage):
    """A power cut leaves a renamed file with zeros in it, a bad disk a flipped bit: the training would learn from noise."""
    dataset, encoder = clips
    cache = EncoderCache(tmp_path, dataset.settings)
    cache.fill(dataset, Counting(encoder))
    path = cache.file(dataset.digests[2].tobytes())
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "zeros": bytes(len(whole)),
            "other": b"this is a text",
        }[damage]
    )
    with pytest.raises(InputError, match=rf"{path.name}: missing or corrupt: start again"):
        dataset[2]
    counting = Counting(encoder)
    cache.fill(dataset, counting)
    assert counting.calls == 1
    assert path.read_bytes() == whole


def test_a_renamed_clip_is_known_and_a_changed_one_is_not(clips, tiny, tmp_path):
    dataset, _ = clips
    cache = EncoderCache(tmp_path, dataset.settings)
    shutil.copy(tiny.root / "0.wav", tmp_path / "x.wav")
    assert cache.digest(tmp_path / "x.wav") == cache.digest(tiny.root / "0.wav")
    write_clip(tmp_path / "x.wav", 1.0, seed=9)
    assert cache.digest(tmp_path / "x.wav") != cache.digest(tiny.root / "0.wav")


def test_parts_of_one_file_are_clips_of_their_own_and_it_is_read_once(clips, tiny, tmp_path, monkeypatch):
    """Named by the file alone, all its parts would share the output of the first."""
    system = build_system(tiny.qwen2, tiny.whisper)
    write_clip(tmp_path / "a.wav", 4.0)
    parts = [{}, {"start": 0, "end": 1}, {"start": 1, "end": 2}, {"start": 1, "end": 3}, {"start": 1}]
    lines = [{"wav": str(tmp_path / "a.wav"), "txt": "a"} | part for part in parts]
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", lines))
    dataset = SpeechDataset(manifest, system.prompt, system.settings, 512)
    cache, read, digest = EncoderCache(tmp_path, dataset.settings), [], EncoderCache.digest
    monkeypatch.setattr(cache, "digest", lambda wav: read.append(wav) or digest(wav))
    cache.fill(dataset, Counting(clips[1]))
    assert len({row.tobytes() for row in dataset.digests}) == len(parts)
    assert [len(dataset[i]["encoded"]) for i in range(len(parts))] == [200, 50, 50, 100, 150]
    assert len(read) == 1


def test_a_clip_that_is_gone_is_told_with_its_line(clips, tmp_path, monkeypatch):
    dataset, encoder = clips
    gone = dataset.record(0)._replace(wav=tmp_path / "gone.wav")
    monkeypatch.setattr(dataset, "record", lambda index: gone)
    with pytest.raises(InputError, match=rf"^{gone.where}: {tmp_path}/gone.wav: No such file or directory: mend or remove"):
        EncoderCache(tmp_path, dataset.settings).fill(dataset, encoder)


def test_many_writers_of_one_clip_leave_one_whole_file(clips, tmp_path):
    """Their temporary names were those of the process: two threads, or two machines with one disk, wrote into one file."""
    dataset, encoder = clips
    cache = EncoderCache(tmp_path, dataset.settings)
    mel, digest = dataset.log_mel(3), bytes(16)
    writers = [threading.Thread(target=cache.write, args=(digest, Counting(encoder), mel)) for _ in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert cache.has(digest)
    assert [p.name for p in cache.file(digest).parent.iterdir()] == [cache.file(digest).name]


def test_a_disk_that_is_full_leaves_nothing_behind(clips, tmp_path, monkeypatch):
    dataset, encoder = clips
    cache = EncoderCache(tmp_path, dataset.settings)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        cache.write(bytes(16), Counting(encoder), dataset.log_mel(0))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def note_digests(file):
    real = EncoderCache.digest

    def digest(wav):
        with file.open("a") as out:
            out.write(f"{os.environ['RANK']} {wav.name}\n")
        return real(wav)

    EncoderCache.digest = staticmethod(digest)


def test_two_processes_hash_and_encode_their_shares_and_train_as_without(tiny, tmp_path):
    """Each reads only its own share of the audio; the other's names come from it. float16: the tolerance is 1e-2."""
    flags = (*TOKENS, "2", "--max_steps", "3")
    argv = arguments(tiny, tmp_path / "cached", *flags, "--cache_dir", str(tmp_path / "cache"))
    run_job(argv, tmp_path / "logs", partial(note_digests, tmp_path / "hashed"))
    hashed = sorted((tmp_path / "hashed").read_text().split("\n"))[1:]
    assert len(hashed) == len({line.split()[1] for line in hashed}) == len(files(tmp_path / "cache")) >= 4
    assert {line.split()[0] for line in hashed} == {"0", "1"}
    train.main(
        arguments(
            tiny, tmp_path / "plain", *flags, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"
        )
    )
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-2)
