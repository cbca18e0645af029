"""The benchmarks run, and count what they say they count."""

import itertools
import re
import sys

import pytest
import torch
from conftest import DATA, RATE, ROOT, build_system, run_script, write_manifest
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config

from manifest import read_manifest

sys.path.insert(0, str(ROOT / "benchmarks"))
import decode_throughput
import decoders
import report
import train_throughput


def cells(output: str, head: str) -> dict[str, list[str]]:
    """Rows of the printed table whose first column is called `head`, by their first cells."""
    lines = iter(output.splitlines())
    next(line for line in lines if line.startswith(f"| {head} |"))
    next(lines)  # under the head
    rows = [line.strip("| ").split(" | ") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    return {name: rest for name, *rest in rows}


def test_train_throughput_prints_every_table(tiny):
    done = run_script(
        *(sys.executable, "benchmarks/train_throughput.py", "--llm", tiny.qwen2, "--whisper", tiny.whisper),
        *("--data_path", tiny.manifest, "--device", "cpu", "--dtype", "float32", "--profile", "--threads", "1"),
        *("--clips", "4", "--batch_size", "2", "--repetitions", "1", "--sweep_clips", "4"),
        *("--batch_sizes", "1", "4", "--lengths", "1", "2"),
    )
    assert done.returncode == 0, done.stderr
    ratio = cells(done.stdout, "row")
    assert list(ratio) == ["published", "frames", "tokens, align", "tokens, LLM", "tokens"]
    published, align, llm, both = (float(ratio[name][0]) for name in ("published", "tokens, align", "tokens, LLM", "tokens"))
    assert both == pytest.approx(2 / (1 / align + 1 / llm), rel=0.05)  # half of the steps each
    assert float(ratio["frames"][2]) == pytest.approx(float(ratio["frames"][0]) / published, rel=0.05)
    assert list(cells(done.stdout, "batch size")) == ["1", "4"]
    assert list(cells(done.stdout, "clips of")) == ["1 s", "2 s"]
    assert re.search(r"matrix products +\|", done.stdout)
    assert "kB a second" in done.stdout


def test_report_has_a_row_for_each_system(real, tmp_path, monkeypatch, capsys):
    """PocketSphinx, where it is not installed, is left out with a line. A short prompt that all hear right."""
    record = next(record for record in read_manifest(DATA / "train.jsonl") if record.key == "conf-onlyone")
    line = {"key": record.key, "wav": str(record.wav), "txt": record.txt}
    path = write_manifest(tmp_path / "one.jsonl", [line])
    monkeypatch.setattr(sys, "argv", ["report.py", "--data_path", str(path)])
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    report.main()
    printed = capsys.readouterr()
    rows = cells(printed.out, "system")
    assert list(rows) == ["hark, ctc", "hark, fusion, beam 10", "whisper-tiny.en, beam 5"]
    assert rows["whisper-tiny.en, beam 5"][:2] == ["0.0", "0.0"]
    assert [row[4] for row in rows.values()] == ["11", "146", "37"]  # millions of parameters that run
    assert "no row for PocketSphinx: pip install pocketsphinx" in printed.err


def test_a_mistake_is_one_line(tiny):
    done = run_script(sys.executable, "benchmarks/train_throughput.py", "--llm", tiny.qwen2, "--data_path", "none.jsonl")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: none.jsonl")


@pytest.mark.parametrize("name", train_throughput.OURS)
def test_useful_operations_are_those_that_a_batch_without_padding_executes(real, name):
    """One clip twice, so nothing is padding: the formula is what PyTorch counts of the products it runs, less the upper
    half of the LLM's causal attention, which eager attention computes and masks."""
    argv = ["--llm", str(real.llm), "--whisper", str(real.whisper), "--device", "cpu", "--dtype", "float32"]
    bench = train_throughput.Bench(train_throughput.arguments(argv), DATA / "train.jsonl")
    (row,) = bench.rows([name])
    row.model.encoder.whisper.config._attn_implementation = "eager"  # the fused kernel is not counted
    place = min(row.index, key=lambda place: abs(train_throughput.samples(row, place) - 4 * RATE))
    batch = row.batch([place, place])
    with FlopCounterMode(display=False) as counter:
        row.forward_backward(batch)
    assert 0.93 < row.flops(batch) / counter.get_total_flops() <= 1.005


def test_the_published_shape_is_padded_to_512_positions(real):
    argv = ["--llm", str(real.llm), "--whisper", str(real.whisper), "--device", "cpu"]
    row = train_throughput.Bench(train_throughput.arguments(argv), DATA / "train.jsonl").published()
    example = row.data[0]
    assert example["mel"].shape == (80, 3000)
    assert all(example[key].shape == (512,) for key in ("input_ids", "labels", "attention_mask"))
    text = row.data.tokenizer.decode(example["labels"][example["labels"] != -100])
    assert "activated" in text
    assert torch.equal(example["attention_mask"][300:], example["labels"][300:] != -100)


def test_long_audio_prints_the_wer_of_one_file_beside_that_of_its_parts(real):
    """Real prompts and models: the one file is heard in pieces of 1 to 30 s, and not worse than its parts by a point."""
    done = run_script(
        *(sys.executable, "benchmarks/long_audio.py", "--minutes", "0.6", "--decoder", "ctc", "--num_beams", "1")
    )
    assert done.returncode == 0, done.stderr
    parts, one = cells(done.stdout, "row").values()
    assert 5 < float(parts[1]) < 60
    assert float(one[2]) <= float(parts[1]) + 1
    assert re.fullmatch(r"\d+: \d+\.\d to (\d|[12]\d)\.\d, mean \d+\.\d", one[0])
    assert re.search(r"^peak memory \d\.\d\d GB$", done.stdout, re.MULTILINE)


def test_decoders_prints_a_row_for_every_beam_and_what_a_batch_changes(real, monkeypatch, capsys):
    """Greedy is a beam of one; the CTC alone has none. In float32 no text depends on its batch."""
    rows = decoders.decoders([1, 3], [0.8], ["llm", "joint"])
    assert list(rows) == ["llm, greedy", "llm, beam 3", "joint 0.8, greedy", "joint 0.8, beam 3"]
    assert list(decoders.decoders([4], [None], ["ctc", "fusion"])) == ["ctc", "fusion 0.9, beam 4"]
    assert rows["joint 0.8, beam 3"] == {"decoder": "joint", "joint_weight": 0.8, "num_beams": 3}
    argv = ["decoders.py", "--sets", "test", "--clips", "2", "--decoders", "ctc", "--device", "cpu", "--without_whisper"]
    monkeypatch.setattr(sys, "argv", argv)
    decoders.main()
    table = cells(capsys.readouterr().out, "decoder | test (2)")
    wer, _ = table["ctc"]
    monkeypatch.setattr(sys, "argv", [*argv, "--invariance", "--batch_size", "2"])
    decoders.main()
    said = capsys.readouterr().out
    assert "batches of 1 and 2 in float32" in said
    assert f"| ctc | 0 of 2, WER {wer} / {wer} |" in said


@pytest.mark.parametrize("shape", [[], ["--llm_shape", "tiny"]])
def test_decode_throughput_prints_every_table(tiny, tmp_path, shape, monkeypatch, capsys):
    """Also without a trained checkpoint, where drafts are right to the last token."""
    monkeypatch.setitem(train_throughput.SHAPES, "tiny", (Qwen2Config, 2, 32, 64, 4, 2, 300))
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens")
    system.model.save_checkpoint(tmp_path)
    argv = ["--llm", tiny.qwen2, "--whisper", tiny.whisper, "--data_path", tiny.manifest, "--device", "cpu", *shape]
    argv += ["--dtype", "float32", "--checkpoint", tmp_path, "--clips", "3", "--batch_size", "2", "--repetitions", "1"]
    argv += ["--sweep_clips", "2", "--batch_sizes", "1", "2", "--lengths", "1", "2", "--num_beams", "2", "--new_tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["decode_throughput.py", *map(str, argv)])
    decode_throughput.main()
    output = capsys.readouterr().out
    ratio = cells(output, "row")
    assert list(ratio)[:3] == ["published, greedy", "published, beam 2", "ctc"]
    assert len(ratio) == 12
    assert ratio["published, greedy"][1] == "1.0"
    for name in ("llm, greedy, draft", "joint, greedy, draft", "fusion, greedy, draft"):
        assert re.fullmatch(r"\d+ %", ratio[name][3])
        if shape:  # every token, in one pass; an end that the limit sets is not written
            assert ratio[name][3:5] == ["100 %", "1.0"]
    assert list(cells(output, "batch size")) == ["1", "2"]
    assert list(cells(output, "clips of")) == ["1 s", "2 s"]
