"""label.py and filter_labels.py: a real teacher on real prompts; the limits on made-up lines; what survives a kill."""

import json
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import DATA, RATE, ROOT, write_manifest
from whisper.tokenizer import get_tokenizer

import filter_labels
import label
from audio import load_audio
from filter_labels import FilterArguments, faults, measured
from label import LabelArguments, Listener, RunArguments, phrases
from manifest import read_manifest
from score import normalizer, score

CLIPS = ("digits-14", "conf-onlyone", "transfer", "vm-review")
SURE = {"avg_logprob": -0.1, "compression_ratio": 1.0, "no_speech_prob": 0.01, "language": "en", "duration": 1.0}


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts(keys):
    found = {record.key: record for record in read_manifest(DATA / "train.jsonl")}
    return [found[key] for key in keys]


def plain(text):
    return " ".join(normalizer("basic")(text).split())


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Four prompts, the second with a wrong transcript and the third with its own; a file that is no audio; 40 s."""
    root, records = tmp_path_factory.mktemp("speech"), prompts(CLIPS)
    lines = [{"key": r.key, "wav": str(r.wav), "duration": r.duration} for r in records]
    lines[1]["txt"], lines[2]["txt"] = "somebody said something else", records[2].txt.upper()
    (root / "noaudio.wav").write_text("no audio")
    joined = [np.pad(load_audio(r.wav)[0], (0, RATE // 2)) for r in records]
    soundfile.write(root / "long.wav", np.concatenate(joined * 2)[: 40 * RATE], RATE)
    lines[2:2] = [{"key": "broken", "wav": "noaudio.wav"}, {"key": "long", "wav": "long.wav"}]
    return SimpleNamespace(root=root, manifest=write_manifest(root / "speech.jsonl", lines), records=records, lines=lines)


@pytest.fixture(scope="module")
def labelled(real, speech):
    """The folder of what Whisper tiny.en hears in them."""
    out = speech.root / "labelled"
    flags = ["--teacher", str(real.whisper), "--data_path", str(speech.manifest), "--out", str(out)]
    assert label.main([*flags, "--suppress_numerals", "--batch_size", "3"]) == 1  # a file cannot be read
    return out


def test_a_real_teacher_writes_what_is_said(labelled, speech):
    """In the manifest's order, whatever the order of decoding; numbers as words."""
    labels = lines_of(labelled / "labels.jsonl")
    assert [line["key"] for line in labels] == [line["key"] for line in speech.lines]
    heard = {line["key"]: plain(line["txt"]) for line in labels if "txt" in line}
    assert heard == {record.key: record.txt for record in speech.records}
    for line in labels:
        assert "txt" not in line or (line["avg_logprob"] < 0 < line["compression_ratio"] and line["duration"] > 0.5)


def test_every_line_is_kept_or_dropped_with_its_reason(labelled, speech):
    filter_labels.main(["--labels", str(labelled), "--plain"])
    kept, dropped = (lines_of(labelled / name) for name in ("kept.jsonl", "dropped.jsonl"))
    assert [line["key"] for line in kept] == ["digits-14", "transfer", "vm-review"]
    reasons = {line["key"]: list(line["dropped"]) for line in dropped}
    assert reasons == {"conf-onlyone": ["--max_wer 10"], "broken": ["cannot be read"], "long": ["over 30 s"]}
    assert "noaudio.wav" in dropped[1]["dropped"]["cannot be read"]
    records = read_manifest(labelled / "kept.jsonl")  # a manifest to train on
    assert [record.txt for record in records] == [speech.records[i].txt for i in (0, 2, 3)]
    assert all(record.wav.is_file() for record in records)


def test_other_limits_give_another_table(labelled, capsys):
    """What has a transcript, as transfer, is judged by it alone; the teacher's words are kept where they are asked for."""
    filter_labels.main(["--labels", str(labelled), "--max_chars_per_second", "8.6", "--text", "teacher"])
    kept = lines_of(labelled / "kept.jsonl")
    assert [line["key"] for line in kept] == ["digits-14", "transfer"]
    assert kept[1]["txt"] == "Please hold while I try that extension."
    assert "| dropped: --max_chars_per_second 8.6 | 1 | 0.00 |" in capsys.readouterr().out


def test_a_long_file_is_cut_by_timestamps(real, speech):
    """Its lines are parts of the file that say, one after the other, what is said in it."""
    lines = [line for line in speech.lines if line["key"] == "long"]
    manifest, out = write_manifest(speech.root / "long.jsonl", lines), speech.root / "long"
    flags = ["--teacher", str(real.whisper), "--data_path", str(manifest), "--out", str(out)]
    assert label.main([*flags, "--timestamps", "--suppress_numerals"]) == 0
    labels = lines_of(out / "labels.jsonl")
    assert len(labels) >= 4
    assert all(0 < line["duration"] <= 30 and line["end"] <= 40 for line in labels)
    assert all(before["end"] <= after["start"] for before, after in pairwise(labels))
    assert all(line["key"] == f"long-{round(1000 * line['start'])}-{round(1000 * line['end'])}" for line in labels)
    seconds = soundfile.info(speech.root / "long.wav").duration
    said = " ".join([record.txt for record in speech.records] * 2)
    result = score({"long": said}, {"long": plain(" ".join(line["txt"] for line in labels))})
    assert result.words.rate < 0.2
    assert 0.7 * seconds < sum(line["duration"] for line in labels) <= seconds


def test_a_part_of_a_file_is_labelled_as_a_clip_and_long_silence_said(real, speech, tmp_path):
    """The second prompt of the 40 s, and 31 s of zeros, in which there is no piece to hear."""
    first, second = (len(load_audio(record.wav)[0]) / RATE for record in speech.records[:2])
    soundfile.write(tmp_path / "silence.wav", np.zeros(31 * RATE), RATE)
    part = {"start": first + 0.5, "end": first + 0.5 + second, "wav": str(speech.root / "long.wav")}
    manifest = write_manifest(tmp_path / "part.jsonl", [{"key": "part"} | part, {"wav": "silence.wav", "key": "silence"}])
    flags = ["--teacher", str(real.whisper), "--data_path", str(manifest), "--out", str(tmp_path), "--timestamps"]
    assert label.main(flags) == 0
    labelled, silence = lines_of(tmp_path / "labels.jsonl")
    assert plain(labelled["txt"]) == speech.records[1].txt
    assert {name: labelled[name] for name in part} == part
    assert "nothing heard" in faults(measured(silence, FilterArguments()), FilterArguments())
    assert silence["duration"] == 31


def test_phrases_lie_between_timestamps():
    """One that is not closed ends with the window; a time in the padding is the window's end."""
    tokenizer = get_tokenizer(False)
    zero, words = tokenizer.timestamp_begin, {word: tokenizer.encode(f" {word}") for word in ("one", "two", "three")}
    tokens = [zero, *words["one"], zero + 100, zero + 150, *words["two"], zero + 200, *words["three"]]
    assert list(phrases(tokens, tokenizer, 5.0)) == [(0, 2, " one"), (3, 4, " two"), (4, 5, " three")]
    assert list(phrases([zero, *words["one"], zero + 1500], tokenizer, 5.0)) == [(0, 5, " one")]
    assert list(phrases([zero, zero + 1500], tokenizer, 5.0)) == []


def test_beams_in_a_batch_hear_what_they_hear_alone(real, speech):
    """openai-whisper 20250625 fails on several clips with several beams: it repeats the tokens, not the speech."""
    listener = Listener(str(real.whisper), 2, LabelArguments(), RunArguments(device="cpu"))
    clips = [load_audio(record.wav)[0] for record in speech.records[:2]]
    alone = [heard.text for clip in clips for heard in listener.hear([clip])]
    assert [heard.text for heard in listener.hear(clips)] == alone
    assert plain(alone[1]) == speech.records[1].txt


def test_a_second_teacher_that_hears_nothing_disagrees(real, tiny, speech, tmp_path):
    """tiny: random weights."""
    manifest = write_manifest(tmp_path / "one.jsonl", [speech.lines[0]])
    flags = ["--teacher", str(real.whisper), "--teacher2", str(tiny.whisper), "--data_path", str(manifest)]
    assert label.main([*flags, "--out", str(tmp_path / "out")]) == 0
    filter_labels.main(["--labels", str(tmp_path / "out")])
    assert lines_of(tmp_path / "out" / "kept.jsonl") == []
    assert list(lines_of(tmp_path / "out" / "dropped.jsonl")[0]["dropped"]) == ["--max_disagreement 10"]


@pytest.mark.parametrize(
    ("line", "rules"),
    [
        ({"txt": "please hold"}, []),
        ({"txt": "please hold", "avg_logprob": -0.51}, ["--min_avg_logprob -0.5"]),
        ({"txt": "please hold", "compression_ratio": 2.5, "no_speech_prob": 0.7}, None),  # two rules
        ({"txt": "please hold", "duration": 20.0}, ["--min_chars_per_second 1"]),
        ({"txt": "please hold", "duration": 0.3}, ["--max_chars_per_second 25"]),
        ({"txt": "", "duration": 1.0}, ["nothing heard", "--min_chars_per_second 1"]),
        ({"txt": "Please, hold 2!", "txt2": "please hold two"}, []),  # alike after normalisation
        ({"txt": "please hold", "txt2": "please old"}, ["--max_disagreement 10"]),
        # a transcript is what counts, however unsure the teacher was
        ({"txt": "Please hold.", "transcript": "PLEASE HOLD", "avg_logprob": -3.0}, []),
        ({"txt": "please old", "transcript": "please hold"}, ["--max_wer 10"]),
        ({"txt": "", "transcript": ""}, []),
        ({"txt": "thank you", "transcript": ""}, ["--max_wer 10"]),
        # one of twelve characters, but a third and all of the words
        ({"txt": "今天天气很好我们去公园吧", "transcript": "今天天气很好我们去公园啊", "language": "zh"}, []),
        ({"txt": "今日は天気がいいですね、", "transcript": "今日は天気が良いですね。", "language": "ja"}, []),
        ({"txt": "今日は天気がいいですね", "transcript": "今日は電気が要らないですね", "language": "ja"}, ["--max_wer 10"]),
        ({"problem": "a.wav: is empty (0 bytes)"}, ["cannot be read"]),
    ],
)
def test_what_the_limits_drop(line, rules):
    line = (SURE | line) if "txt" in line else line
    found = faults(measured(line, FilterArguments()), FilterArguments())
    assert list(found) == (["--max_compression_ratio 2.4", "--max_no_speech_prob 0.6"] if rules is None else rules)


def test_a_killed_run_goes_on(tiny, tmp_path, monkeypatch):
    """kill -9 after three of five clips, and half a line behind them: no clip twice, none lost, none heard again."""
    flags = ["--teacher", str(tiny.whisper), "--data_path", str(tiny.manifest), "--batch_size", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    die = """
import os, signal, sys, label
write, heard = label.label, []
def listen(listeners, batch, timestamps):
    heard.append(batch)
    return os.kill(os.getpid(), signal.SIGKILL) if len(heard) == 4 else write(listeners, batch, timestamps)
label.label = listen
label.main(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", die, *flags, "--out", str(killed)], cwd=ROOT)
    assert done.returncode == -9
    partial = killed / "labels.partial"
    assert len(lines_of(partial)) == 3
    assert not (killed / "labels.jsonl").exists()
    with partial.open("a") as file:
        file.write('["clip1", [{"key": "cl')
    heard, write = [], label.label
    monkeypatch.setattr(label, "label", lambda *given: heard.extend(given[1]) or write(*given))
    label.main([*flags, "--out", str(killed)])
    assert len(heard) == 2
    label.main([*flags, "--out", str(whole)])
    assert (killed / "labels.jsonl").read_bytes() == (whole / "labels.jsonl").read_bytes()
    assert [line["key"] for line in lines_of(whole / "labels.jsonl")] == [clip["key"] for clip in tiny.clips]
    assert not partial.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--out {tmp} --data_path {manifest}", "give --teacher, --data_path and --out"),
        ("--out {tmp} --teacher no.pt --data_path {manifest}", "cannot load the teacher 'no.pt'"),
        ("--out {tmp} --teacher {tiny} --data_path no.jsonl", "no.jsonl: cannot read the manifest"),
        ("--out {tmp} --teacher {tiny} --data_path {manifest} --language xx", "--language xx: Whisper knows en, zh"),
        ("--out {tmp} --teacher {tiny} --data_path {manifest} --language de", "knows English alone"),
        ("--out {tmp} --teacher {tiny} --data_path {manifest} --batch_size 0", "must be at least 1"),
        ("--out {manifest} --teacher {tiny} --data_path {manifest}", "cannot write"),
        ("--normalizer basic", "give --labels"),
        ("--labels {tmp}", "no labels.jsonl in it: label.py makes it"),
        ("--labels {tmp} --normalizer klingon", "--normalizer klingon: there are none, basic"),
    ],
)
def test_a_mistake_is_one_line(tiny, tmp_path, flags, message):
    script = label if "--out" in flags else filter_labels
    with pytest.raises(SystemExit) as stopped:
        script.main(flags.format(tmp=tmp_path, manifest=tiny.manifest, tiny=tiny.whisper).split())
    assert message in stopped.value.code
    assert stopped.value.code.startswith("error: ")
    assert "\n" not in stopped.value.code


def test_labels_that_are_no_text_are_told(tmp_path):
    """A byte that is not UTF-8 was a traceback."""
    (tmp_path / "labels.jsonl").write_bytes(b'{"txt": "caf\xe9"}\n')
    with pytest.raises(SystemExit, match=r"^error: .*labels.jsonl: not as label.py wrote it"):
        filter_labels.main(["--labels", str(tmp_path)])


def test_labels_of_another_teacher_are_not_mixed_in(tiny, tmp_path):
    flags = ["--data_path", str(tiny.manifest), "--teacher", str(tiny.whisper), "--out", str(tmp_path)]
    (tmp_path / "labels.json").write_text(json.dumps({"teacher": "large-v3", "beam_size": 1}) + "\n")
    with pytest.raises(SystemExit, match="has labels with another teacher"):
        label.main(flags)
