"""Several processes decode one manifest: they share nothing but files, and none waits for another."""

import json
import os
import re
import signal
from functools import partial

import pytest
from conftest import build_system, write_clip, write_manifest
from jobs import Job

import decoding
import recognize
import sources
from manifest import Record
from progress import Progress, at_work
from settings import InputError


@pytest.fixture(scope="module")
def corpus(tiny, tmp_path_factory):
    """A checkpoint, and a manifest of 12 clips, one of them missing."""
    root = tmp_path_factory.mktemp("corpus")
    build_system(tiny.qwen2, tiny.whisper).model.save_checkpoint(root / "checkpoint")
    items = []
    for i in range(12):
        write_clip(root / f"{i}.wav", 0.5 + i / 4, seed=i)
        items.append({"key": f"k{i}", "wav": f"{i}.wav"})
    (root / "7.wav").unlink()
    write_manifest(root / "test.jsonl", items)
    return root


def arguments(corpus, result, *more):
    flags = [
        "--checkpoint",
        corpus / "checkpoint",
        "--data_path",
        corpus / "test.jsonl",
        "--num_beams",
        1,
        "--device",
        "cpu",
    ]
    return [str(word) for word in (*flags, "--batch_size", 2, "--max_new_tokens", 6, "--result_path", result, *more)]


def dies_in_its_second_batch(rank, how):
    """In process `rank`, a `decode` that ends with it."""
    real, calls = decoding.decode, []

    def decode(transcriber, clips):
        calls.append(len(clips))
        if os.environ["RANK"] == str(rank) and len(calls) == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(transcriber, clips)

    decoding.decode = decode


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_two_processes_write_what_one_writes(corpus, tmp_path, capsys):
    """In the manifest's order, with one report of the failed clip, and nothing left beside the results."""
    assert recognize.main(arguments(corpus, tmp_path / "one.txt")) == 1
    job = Job(arguments(corpus, tmp_path / "two.txt", tmp_path / "two.jsonl"), tmp_path / "logs", 2, script="recognize")
    assert sorted(job.wait()) == [0, 1], job.output()
    assert lines(tmp_path / "two.txt") == lines(tmp_path / "one.txt")
    assert [json.loads(line)["key"] for line in lines(tmp_path / "two.jsonl")] == [f"k{i}" for i in range(12)]
    assert job.output().count("no such file") == 2  # its own line, and the last one
    assert "12 files, 0.01 h, RTFx " in job.output()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "one.txt", "two.jsonl", "two.txt"]


@pytest.mark.parametrize(
    ("rank", "how", "said"),
    [
        (1, "killed", "process 1 was ended by signal 9: what it had done is kept"),
        (0, "raises", "CUDA error: an illegal memory access"),
    ],
)
def test_a_process_that_dies_loses_only_what_it_had_not_done(corpus, tmp_path, rank, how, said):
    """torchrun ended the others too, 30 s later at most. They finish, the run ends in an error that says what is lacking,
    and the same command continues, with another number of processes too: no line twice, none lost."""
    recognize.main(arguments(corpus, tmp_path / "expected.txt"))
    result = tmp_path / "r.txt"
    before = partial(dies_in_its_second_batch, rank, how)
    job = Job(arguments(corpus, result), tmp_path / "logs", 2, before, script="recognize")
    assert job.wait()[rank] == 1, job.output()
    assert said in job.output()
    assert "the same command continues where this one stopped" in job.output()
    share = [len(places) for places in sources.shares(sources.find([str(corpus / "test.jsonl")]), 2)][rank]
    of_the_dead = result.with_name(f"r.txt.partial.{rank}" if rank else "r.txt.partial")
    kept = [json.loads(line) for line in lines(of_the_dead)[1:]]
    kept = [line for line in kept if isinstance(line, list)]
    assert 1 < len(kept) < share
    lacking = share - len(kept)
    assert not result.exists()

    job = Job(arguments(corpus, result), tmp_path / "again", 3, script="recognize")
    assert sorted(job.wait()) == [0, 0, 1], job.output()  # the missing clip
    done = int(re.search(r"continuing: (\d+) of 12 are done", job.output())[1])
    assert 11 - lacking <= done < 12  # the other processes may have gone on before the first one counts
    assert lines(result) == lines(tmp_path / "expected.txt")
    assert not list(tmp_path.glob("r.txt.*"))


def test_work_is_shared_by_duration(tmp_path):
    """A long clip against many short ones; durations of the manifest, else of the headers."""
    write_clip(tmp_path / "8.wav", 8.0)
    items = [Record(f"s{i}", tmp_path / "no.wav", None, 1.0, "") for i in range(10)]
    items.insert(3, Record("long", tmp_path / "8.wav", None, None, ""))
    first, second = sources.shares(items, 2)
    assert 3 in first
    assert (len(first), len(second)) == (2, 9) or (len(first), len(second)) == (3, 8)
    assert sorted([*first, *second]) == list(range(11))
    assert [list(share) for share in sources.shares(items, 2)] == [list(first), list(second)]


def test_two_runs_do_not_write_one_result(corpus, tmp_path):
    """Their lines would mix."""
    first = Progress(tmp_path / "r.txt", at_work(tmp_path / "r.txt"), {}, 1)
    with pytest.raises(InputError, match=r"r\.txt is being written by another run"):
        Progress(tmp_path / "r.txt", at_work(tmp_path / "r.txt"), {}, 1)
    first.add(0, {"text": "a", "error": ""})
    assert first.finish()
    assert not first.lacking()
