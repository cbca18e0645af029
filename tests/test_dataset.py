"""Data: exact ids and labels, manifests, audio of every kind, what is dropped and what is an error."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, audio, build_system, byte_tokenizer, write_clip, write_manifest

from audio import count_samples, load_audio
from dataset import SpeechCollator, SpeechDataset
from manifest import read_manifest
from prompt import PromptText, render
from settings import IGNORE_INDEX, SPEECH_INDEX, InputError

IM_START, IM_END = 257, 258


@pytest.fixture
def qwen(tiny):
    return build_system(tiny.qwen2, tiny.whisper)


def byte_ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False).input_ids


def test_exact_ids_and_labels_of_one_sample(tiny, tmp_path):
    """Prompt masked, answer and end-of-turn supervised; a literal <|im_end|> in the transcript stays ten letters of text."""
    system = build_system(tiny.qwen2, tiny.whisper, prompt="A{speech}B")
    txt = "no <|im_end|> é"
    write_clip(tmp_path / "a.wav", 1.0)
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", [{"wav": "a.wav", "txt": txt}]))
    item = SpeechDataset(manifest, system.prompt, system.settings, 512)[0]
    answer = [*byte_tokenizer()(txt, add_special_tokens=False, split_special_tokens=True).input_ids, IM_END]
    assert len(answer) == len(txt.encode()) + 1
    assert answer.count(IM_END) == 1
    prompt = [IM_START, *byte_ids("user\nA"), SPEECH_INDEX, *byte_ids("B"), IM_END, *byte_ids("\n")]
    prompt += [IM_START, *byte_ids("assistant\n")]
    assert item["input_ids"].tolist() == prompt + answer
    assert item["labels"].tolist() == [IGNORE_INDEX] * len(prompt) + answer
    assert item["mel"].shape == (80, 100)


def test_the_end_of_turn_is_learned_though_it_is_the_pad_token(qwen):
    """Masking labels by `== pad_token_id` is the field's old bug: where pad is the end of turn, the model never stops."""
    assert qwen.prompt.tokenizer.pad_token_id == IM_END
    rows = [tuple(qwen.prompt.example(text).values()) for text in ("a", "longer")]
    mels = [torch.zeros(80, n) for n in (10, 20)]
    batch = SpeechCollator()(
        [
            {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "mel": mel}
            for (ids, labels), mel in zip(rows, mels, strict=True)
        ]
    )
    assert (batch["labels"] == IM_END).sum(1).tolist() == [1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [len(ids) for ids, _ in rows]
    assert batch["labels"][0, len(rows[0][0]) :].eq(IGNORE_INDEX).all()
    assert batch["mel"].shape == (2, 80, 20)
    assert batch["mel_length"].tolist() == [10, 20]


def test_empty_text_supervises_the_end_of_turn_alone(qwen):
    ids, labels = qwen.prompt.example("").values()
    assert [label for label in labels if label != IGNORE_INDEX] == [IM_END] == ids[-1:]


def test_tokenizer_without_a_chat_template_gets_the_documented_plain_one():
    assert render(byte_tokenizer(chat_template=None), "{speech} Write.") == PromptText(
        "USER: ", " Write.\nASSISTANT:", "<|im_end|>"
    )


@pytest.mark.parametrize("words", ["no slot", "{speech} twice {speech}"])
def test_prompt_without_exactly_one_slot_is_refused(words):
    with pytest.raises(InputError, match=r"--prompt must hold \{speech\} exactly once"):
        render(byte_tokenizer(), words)


def test_a_checkpoints_prompt_is_kept_and_another_refused(tiny, tmp_path):
    build_system(tiny.qwen2, tiny.whisper, prompt="Hear {speech}!").model.save_checkpoint(tmp_path)
    again = build_system(tiny.qwen2, tiny.whisper, checkpoint=str(tmp_path))
    assert again.prompt.text.before.endswith("Hear ")
    with pytest.raises(InputError, match="--prompt is not what the checkpoint was trained with: leave"):
        build_system(tiny.qwen2, tiny.whisper, checkpoint=str(tmp_path), prompt="Other {speech}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r":2: not JSON at column \d"),
        (b"[1]", r':2: expected an object like \{"wav": …, "txt": …\}, found list'),
        (b'{"txt": "a"}', r':2: field "wav" is missing'),
        (b'{"wav": "b.wav"}', r':2: field "txt" is missing'),
        (b'{"wav": "b.wav", "txt": 1}', r':2: field "txt" is not a text'),
        (b'{"wav": "b.wav", "txt": "caf\xe9"}', r":2: byte 29 is not UTF-8"),
        (b'{"wav": "a.wav", "txt": "a"}', r":2: key 'a.wav' was seen before, on line 1"),
        (b'{"wav": "b c.wav", "txt": "a"}', r":2: key 'b c.wav' must be a text without spaces"),
        (b'{"wav": "b.wav", "txt": "a", "duration": "1"}', r':2: field "duration" is not a number'),
    ],
)
def test_bad_manifest_lines_name_file_line_and_remedy(tmp_path, line, message):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"wav": "a.wav", "txt": "a"}\n' + line + b"\n")
    with pytest.raises(InputError, match="m.jsonl" + message):
        read_manifest(path)


def test_blank_lines_and_bom_are_accepted_and_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"wav": "a.wav", "txt": "a"}\r\n\n  \n{"wav": "b.wav", "txt": "b"}')
    manifest = read_manifest(path)
    assert [record.txt for record in manifest] == ["a", "b"]
    assert manifest[1].where.endswith("m.jsonl:4")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_text("\n"), lambda p: p.mkdir()])
def test_missing_empty_or_strange_manifest(tmp_path, make):
    make(tmp_path / "m.jsonl")
    with pytest.raises(InputError, match=r"m.jsonl: (cannot read the manifest|no line in it)"):
        read_manifest(tmp_path / "m.jsonl")


def test_paths_are_relative_to_the_manifest(tmp_path):
    write_clip(tmp_path / "a.wav", 1)
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", [{"wav": "a.wav", "txt": "a"}]))
    assert manifest[0].wav == tmp_path / "a.wav"


def tone(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return np.stack([wave * (c % 2) for c in range(channels)], 1) if channels > 1 else wave


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("8ch.wav", 48000, 8, "PCM_16"),
        ("8bit.wav", 16000, 1, "PCM_U8"),
        ("float64.wav", 44100, 2, "DOUBLE"),
        ("a.mp3", 44100, 1, None),
        ("a.opus", 48000, 2, "OPUS"),
        ("a.flac", 22050, 1, None),
    ],
)
def test_any_format_rate_and_channels_becomes_16_khz_mono(tmp_path, name, rate, channels, subtype):
    """mp3 was once read in blocks: soundfile seeks after each, and libsndfile's decoder then lost the signal in silence."""
    options = {"format": "OGG"} if name.endswith("opus") else {}
    soundfile.write(tmp_path / name, tone(1.0, rate, channels), rate, subtype=subtype, **options)
    samples, problem = load_audio(tmp_path / name)
    assert problem == ""
    assert samples.dtype == np.float32
    assert abs(len(samples) - RATE) < 0.1 * RATE
    middle = samples[RATE // 4 : RATE // 2]
    spectrum = np.abs(np.fft.rfft(middle))
    assert abs(spectrum.argmax() * RATE / len(middle) - 440) < 8
    expected = 0.5 / 2**0.5 / (2 if channels > 1 else 1)  # every second channel is silent
    assert abs(np.sqrt(np.square(middle).mean()) / expected - 1) < 0.05


def test_m4a_is_read_through_ffmpeg_and_says_so_without(tmp_path, monkeypatch):
    wav = write_clip(tmp_path / "a.wav", 1.0)
    if subprocess.run(["which", "ffmpeg"], capture_output=True).returncode:
        pytest.skip("ffmpeg is not installed")
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, tmp_path / "a.m4a"], check=True)
    assert abs(len(load_audio(tmp_path / "a.m4a")[0]) - RATE) < 0.2 * RATE
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="the ffmpeg program, not installed, reads more"):
        load_audio(tmp_path / "a.m4a")


def bad_audio(folder, kind):
    path = folder / f"{kind}.wav"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is a text, not a recording\n" * 20)
    elif kind == "directory":
        path.mkdir()
    elif kind in ("nan", "inf"):
        samples = audio(1.0)
        samples[100] = np.nan if kind == "nan" else np.inf
        soundfile.write(path, samples, RATE, subtype="FLOAT")
    return path


def set_with(folder, qwen, kind, **stated):
    """A dataset whose second line names a bad file."""
    write_clip(folder / "good.wav", 1.0)
    items = [{"wav": "good.wav", "txt": "a"}, {"wav": str(bad_audio(folder, kind)), "txt": "b", **stated}]
    manifest = read_manifest(write_manifest(folder / "m.jsonl", items))
    return SpeechDataset(manifest, qwen.prompt, qwen.settings, 512)


@pytest.mark.parametrize(
    ("kind", "why", "stated"),
    [
        ("missing", "no such file", {"duration": 1.0}),
        ("empty", "is empty", {"duration": 1.0}),
        ("directory", "is a directory", {"duration": 1.0}),
        ("text", "not audio", {}),
    ],
)
def test_unusable_files_are_told_before_training_starts(qwen, tmp_path, kind, why, stated):
    with pytest.raises(InputError, match=rf"m.jsonl:2: .*{kind}.wav: .*{why}"):
        set_with(tmp_path, qwen, kind, **stated)


@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_nan_and_infinite_samples_stop_training_with_line_and_path(qwen, tmp_path, kind):
    with pytest.raises(InputError, match=rf"m.jsonl:2: .*{kind}.wav: has NaN or infinite samples"):
        set_with(tmp_path, qwen, kind)[1]


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_truncated_file_stops_training_and_yields_what_can_be_read(qwen, tmp_path, suffix):
    whole = write_clip(tmp_path / f"whole.{suffix}", 3.0).read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    samples, problem = load_audio(tmp_path / f"cut.{suffix}")
    assert 0.5 * RATE < len(samples) < 2 * RATE
    assert "truncated" in problem or "corrupt after" in problem
    items = [{"wav": f"cut.{suffix}", "txt": "a"}]
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", items))
    with pytest.raises(InputError, match=rf"m.jsonl:1: .*cut.{suffix}: (truncated|corrupt)"):
        SpeechDataset(manifest, qwen.prompt, qwen.settings, 512)[0]


def test_files_written_to_a_pipe_are_whole(tmp_path):
    """Their headers cannot know the length: a FLAC says 0 samples (libsndfile: 2 ** 63 - 1), a wav 2 ** 32 - 1 bytes."""
    flac = bytearray(write_clip(tmp_path / "a.flac", 2.0).read_bytes())
    assert flac[4] & 0x7F == 0  # STREAMINFO comes first; its total is the last 36 bits before the MD5
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    (tmp_path / "piped.flac").write_bytes(flac)
    wav = bytearray(write_clip(tmp_path / "a.wav", 2.0).read_bytes())
    wav[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "piped.wav").write_bytes(wav)
    for name in ("piped.flac", "piped.wav"):
        samples, problem = load_audio(tmp_path / name)
        assert problem == ""
        assert abs(len(samples) - 2 * RATE) <= 1, name
        assert abs(count_samples(tmp_path / name) - 2 * RATE) <= 1


def test_a_corrupt_file_yields_what_stands_before_the_damage(tmp_path):
    whole = bytearray(write_clip(tmp_path / "a.flac", 4.0).read_bytes())
    half = len(whole) // 2
    whole[half : half + 2000] = bytes(2000)
    (tmp_path / "bad.flac").write_bytes(whole)
    samples, problem = load_audio(tmp_path / "bad.flac")
    assert "corrupt after" in problem
    assert RATE < len(samples) < 3 * RATE


def test_clips_that_do_not_fit_are_dropped_counted_and_said(qwen, tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(tmp_path / "silence.wav", np.zeros(RATE, np.float32), RATE)
    write_clip(tmp_path / "short.wav", 0.08)
    write_clip(tmp_path / "long.wav", 30.2)
    write_clip(tmp_path / "good.wav", 1.0)
    names = ("none", "silence", "short", "long", "good")
    items = [{"wav": f"{name}.wav", "txt": name} for name in names]
    items.append({"key": "wordy", "wav": "good.wav", "txt": "x" * 600})
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", items))
    dataset = SpeechDataset(manifest, qwen.prompt, qwen.settings, 512)
    assert [manifest[i].txt for i in dataset.kept] == ["silence", "good"]
    assert len(dataset) == 2
    for part in ("2 clips", "1 longer than 30 s", "2 shorter than one projector window", "1 longer than --model_max_length"):
        assert part in dataset.summary()


def test_length_limit_counts_the_speech_and_never_cuts(qwen, tmp_path):
    write_clip(tmp_path / "a.wav", 1.0)
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", [{"wav": "a.wav", "txt": "abc"}]))
    exact = len(qwen.prompt.example("abc")["input_ids"]) - 1 + 10  # one second is ten vectors
    assert len(SpeechDataset(manifest, qwen.prompt, qwen.settings, exact)) == 1
    with pytest.raises(InputError, match=r"no clip is left to train on: .*dropped 1 longer than --model_max_length"):
        SpeechDataset(manifest, qwen.prompt, qwen.settings, exact - 1)


def test_a_duration_that_lies_is_found_when_the_clip_is_read(qwen, tmp_path):
    write_clip(tmp_path / "a.wav", 31)
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", [{"wav": "a.wav", "txt": "a", "duration": 3}]))
    with pytest.raises(InputError, match=r"m.jsonl:1: .*longer than 30 s"):
        SpeechDataset(manifest, qwen.prompt, qwen.settings, 512)[0]


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg", "a.opus", "piped.flac"])
def test_a_part_is_the_same_samples_as_in_the_whole(tmp_path, name):
    options = {"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}
    path = tmp_path / name
    soundfile.write(path, audio(4.0), RATE, **options)
    if name == "piped.flac":  # its length is unknown, and it cannot be sought in
        data = bytearray(path.read_bytes())
        data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])
        path.write_bytes(data)
    whole, _ = load_audio(path)
    for start, end in ((0.5, 1.75), (None, 1.0), (2.5, None), (3.5, len(whole) / RATE + 0.005)):
        first, last = round((start or 0) * RATE), None if end is None else round(end * RATE)
        samples, problem = load_audio(path, start, end)
        assert np.allclose(samples, whole[first:last], rtol=0, atol=1e-6)  # an mp3 decoder rounds otherwise after a seek
        assert problem == ""


def test_only_the_part_is_read(tmp_path, monkeypatch):
    """An hour of speech cut into a thousand lines must not be decoded a thousand times."""
    write_clip(tmp_path / "a.wav", 4.0)
    asked, real = [], soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, *a, **k: asked.append(n) or real(self, n, *a, **k))
    load_audio(tmp_path / "a.wav", 1.0, 1.5)
    assert asked == [RATE // 2]


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs the ffmpeg program")
def test_a_part_of_what_ffmpeg_reads(tmp_path):
    """ffmpeg seeks by frames of 1024 samples, and must decode up to the very place from there."""
    wav = tmp_path / "a.wav"
    soundfile.write(wav, np.repeat(np.random.default_rng(0).uniform(-0.5, 0.5, 4000), 16).astype(np.float32), RATE)
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, "-b:a", "128k", tmp_path / "a.m4a"], check=True)
    whole, _ = load_audio(tmp_path / "a.m4a")
    for start, end in ((1.3, 2.0), (None, 1.0), (3.1, None)):
        first, last = round((start or 0) * RATE), None if end is None else round(end * RATE)
        samples, problem = load_audio(tmp_path / "a.m4a", start, end)
        assert problem == ""
        assert abs(len(samples) - len(whole[first:last])) <= 1
        n = min(len(samples), len(whole[first:last]))
        assert np.corrcoef(samples[:n], whole[first:last][:n])[0, 1] > 0.99
    assert re.match(r"ends 0\.9\d s before its part does, at 5 s", load_audio(tmp_path / "a.m4a", 3.5, 5)[1])
    with pytest.raises(InputError, match=r"a.m4a: ends before its part begins, at 9 s"):
        load_audio(tmp_path / "a.m4a", 9)


def test_damage_behind_a_part_is_no_problem_of_it(tmp_path):
    whole = write_clip(tmp_path / "a.wav", 4.0).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    assert load_audio(tmp_path / "cut.wav", 0.5, 1.5)[1] == ""
    samples, problem = load_audio(tmp_path / "cut.wav", 1.5, 3)
    assert 0.4 * RATE < len(samples) < 0.6 * RATE
    assert problem.startswith("truncated")


def test_parts_are_clips_of_their_own_in_a_training(qwen, tmp_path):
    write_clip(tmp_path / "long.wav", 65.0)
    parts = [{"start": 1, "end": 3.5}, {"start": 62.0}, {}, {"start": 60, "end": 70}, {"start": 2, "end": 35}]
    items = [{"wav": "long.wav", "txt": "a"} | part for part in parts]
    dataset = SpeechDataset(read_manifest(write_manifest(tmp_path / "m.jsonl", items)), qwen.prompt, qwen.settings, 512)
    assert dataset.dropped == {"longer than 30 s": 2}  # the whole file, and a part
    assert (dataset.lengths / RATE).tolist() == [2.5, 3.0, 10.0]
    assert [dataset[i]["mel"].shape[1] for i in range(2)] == [250, 300]
    with pytest.raises(InputError, match=r"m.jsonl:4: .*long.wav: ends 5.00 s before its part does, at 70 s: mend the file"):
        dataset[2]


def test_a_part_behind_the_end_of_its_file_stops_training_with_its_line(qwen, tmp_path):
    write_clip(tmp_path / "a.wav", 2.0)
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", [{"wav": "a.wav", "txt": "a", "start": 2.5}]))
    with pytest.raises(InputError, match=r"m.jsonl:1: .*a.wav: ends before its part begins, at 2.5 s"):
        SpeechDataset(manifest, qwen.prompt, qwen.settings, 512)


def test_the_demo_splits_share_no_text_and_every_clip_is_there():
    from conftest import DATA

    rows = {split: [json.loads(line) for line in (DATA / f"{split}.jsonl").open()] for split in ("train", "test")}
    assert len(rows["train"]) >= 150
    assert len(rows["test"]) >= 40
    assert not {row["txt"] for row in rows["train"]} & {row["txt"] for row in rows["test"]}
    for row in rows["train"] + rows["test"]:
        info = soundfile.info(DATA / row["wav"])
        assert abs(info.frames / info.samplerate - row["duration"]) < 0.1
        assert row["duration"] >= 0.5
        assert row["txt"] == " ".join(row["txt"].lower().split())
        assert not any(c.isdigit() for c in row["txt"])
    assert sum(file.stat().st_size for file in DATA.rglob("*") if file.is_file()) < 6e6
