"""Long recordings: read as a stream, cut at pauses, no speech lost, in memory that does not grow."""

import shutil
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import DATA, RATE, audio, write_clip
from test_dataset import tone

import audio as audio_module
from audio import AudioStream, load_audio
from longform import CHUNK, Pieces, cut
from manifest import read_manifest
from settings import InputError
from transcriber import DecodeArguments, Transcriber

LONGEST = 30 * RATE


def noise(seconds: float, db: float, rng: np.random.Generator) -> np.ndarray:
    return (10 ** (db / 20) * rng.standard_normal(int(seconds * RATE))).astype(np.float32)


def check(pieces, sound: np.ndarray) -> np.ndarray:
    """In how many pieces each sample stands; pieces are at most 30 s, in order, and what stands at their start."""
    count, end = np.zeros(len(sound), int), 0
    for start, piece in pieces:
        first = round(start * RATE)
        assert 0 < len(piece) <= LONGEST
        assert first >= end
        end = first + len(piece)
        assert np.array_equal(sound[first:end], piece)
        count[first:end] += 1
    return count


@pytest.mark.parametrize(
    ("name", "rate", "channels", "subtype"),
    [
        ("8ch.wav", 48000, 8, "PCM_16"),
        ("8bit.wav", 8000, 1, "PCM_U8"),
        ("a.mp3", 44100, 2, None),
        ("16k.mp3", 16000, 1, None),
        ("a.opus", 48000, 2, "OPUS"),
        ("a.flac", 16000, 1, None),
    ],
)
def test_a_file_read_in_blocks_is_the_file_read_at_once(tmp_path, monkeypatch, name, rate, channels, subtype):
    """To 1e-6: what libsndfile decodes of mp3 differs in the last bit with the size of a read, all else is sample-exact."""
    monkeypatch.setattr(audio_module, "BLOCK", 5000)
    options = {"format": "OGG"} if name.endswith("opus") else {}
    sound = audio(3.3)[:, None] + np.reshape(tone(3.3, RATE, channels), (int(3.3 * RATE), channels))
    soundfile.write(tmp_path / name, sound, rate, subtype=subtype, **options)
    expected = soundfile.read(tmp_path / name, dtype="float32", always_2d=True)[0].mean(1)
    expected = soxr.resample(expected, rate, RATE) if rate != RATE else expected
    blocks = list(AudioStream(tmp_path / name))
    assert len(blocks) > 5
    streamed = np.concatenate(blocks)
    assert streamed.dtype == np.float32
    assert len(streamed) == len(expected)
    assert np.abs(streamed - expected).max() <= (1e-6 if name.endswith("mp3") else 0)
    assert np.array_equal(load_audio(tmp_path / name)[0], streamed)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_a_file_read_through_ffmpeg_may_be_left_before_its_end(tmp_path, monkeypatch):
    """The program waits for a reader who does not come: it must be ended with the stream."""
    wav = write_clip(tmp_path / "a.wav", 60)
    subprocess.run(["ffmpeg", "-v", "error", "-i", wav, tmp_path / "a.m4a"], check=True)
    stream = iter(AudioStream(tmp_path / "a.m4a"))
    started, real = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    assert len(next(stream)) == audio_module.BLOCK
    assert started[0].poll() is None
    stream.close()
    assert started[0].poll() < 0
    pieces = Pieces(tmp_path / "a.m4a")
    assert sum(len(piece.audio) for piece in pieces) / RATE == pytest.approx(60, abs=0.2)
    assert pieces.problem == ""


def test_a_part_of_a_file_is_cut_as_if_it_were_alone(tmp_path):
    sound = soundfile.read(write_clip(tmp_path / "a.flac", 100), dtype="float32")[0]
    pieces = Pieces(tmp_path / "a.flac", 10.5, 70)
    part = sound[int(10.5 * RATE) : 70 * RATE]
    assert check(pieces, part).all()
    assert pieces.seconds == 59.5
    pieces = Pieces(tmp_path / "a.flac", 95, 120)
    ((start, piece),) = pieces
    assert start == 0
    assert np.array_equal(piece, sound[95 * RATE :])
    assert pieces.problem == "ends 20.00 s before its part does, at 120 s"


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_damaged_long_file_yields_its_pieces_and_then_says_what_is_wrong(tmp_path, suffix):
    sound = soundfile.read(write_clip(tmp_path / f"a.{suffix}", 80), dtype="float32")[0]
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    pieces = Pieces(tmp_path / f"cut.{suffix}")
    count = check(pieces, sound)
    readable = round(pieces.seconds * RATE)
    assert 38 * RATE < readable <= 40 * RATE
    assert np.array_equal(count, np.arange(len(sound)) < readable)  # noise without a pause: every sample once
    assert pieces.problem.startswith("truncated" if suffix == "wav" else "corrupt after 3")


def test_nan_far_into_a_file_is_an_error_after_the_pieces_before_it(tmp_path):
    sound = audio(200)
    sound[190 * RATE] = np.nan
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="FLOAT")
    found = []
    with pytest.raises(InputError, match=r"a\.wav: has NaN or infinite samples"):
        found.extend(Pieces(tmp_path / "a.wav"))
    assert found[-1].start > 60


@pytest.mark.parametrize("vad", ["energy", "none"])
@pytest.mark.parametrize("seconds", [0.01, 29.0, 30.0])
def test_a_recording_of_at_most_30_s_is_one_piece_whole(tmp_path, vad, seconds):
    sound = audio(seconds)
    sound[len(sound) // 3 :] = 0
    ((start, piece),) = cut(np.array_split(sound, 3), vad)
    assert start == 0
    assert np.array_equal(piece, sound)
    assert list(cut([], vad)) == []


@pytest.mark.parametrize("seed", range(12))
def test_no_speech_is_lost_and_none_comes_twice(seed):
    """Bursts of any length, within 22 dB of one another, gaps from none to minutes, blocks of any length, an offset.

    The threshold once followed the tenth percentile of minutes without a pause: a burst much quieter than those was lost.
    """
    rng = np.random.default_rng(seed)
    parts, loud = [], []
    while sum(map(len, parts)) < rng.uniform(31, 150) * RATE:
        burst = noise(rng.choice([0.03, 0.5, 3, 50]) * rng.uniform(0.5, 1.5), rng.uniform(-32, -10), rng)
        gap = noise(rng.choice([0, 0.1, 1, 10, 60]) * rng.uniform(0.5, 1.5), -75, rng)
        parts += [gap, burst]
        loud += [np.zeros(len(gap), bool), np.ones(len(burst), bool)]
    sound, loud = np.concatenate(parts) + np.float32(0.05), np.concatenate(loud)
    blocks = np.split(sound, np.sort(rng.integers(len(sound), size=rng.integers(1, 30))))
    count = check(cut(blocks), sound)
    assert (count <= 1).all()
    assert (count[loud] == 1).all()
    again = check(cut([sound]), sound)
    assert np.array_equal(count, again)  # how it was read makes no difference
    assert (check(cut(blocks, "none"), sound) == 1).all()


def test_pauses_end_pieces_and_long_silences_are_left_out():
    rng = np.random.default_rng(0)
    sound = np.concatenate([noise(s, -20 if i % 2 else -70, rng) for i, s in enumerate((20, 8, 0.5, 13, 60, 1, 30, 6, 0.4))])
    found = [(piece.start, len(piece.audio) / RATE) for piece in cut([sound])]
    # 0.25 s of silence around; the pause of 0.5 s at 28 s is cut in its middle
    expected = [(19.75, 8.5), (28.25, 13.5), (101.25, 1.5), (132.25, 6.65)]
    assert np.allclose(found, expected, atol=0.03)


def test_a_stretch_without_a_pause_is_cut_at_its_quietest_place():
    rng = np.random.default_rng(0)
    sound = np.concatenate([noise(s, db, rng) for s, db in ((22, -20), (0.4, -26), (20, -20), (0.2, -26), (4, -20))])
    (first, second) = cut([sound])
    assert len(first.audio) / RATE == pytest.approx(22.2, abs=0.15)
    assert second.start * RATE == len(first.audio)
    assert len(first.audio) + len(second.audio) == len(sound)


def test_what_is_left_after_a_cut_is_no_snippet():
    """30.05 s without a pause, quietest at the very end: a cut there would leave less than one projector window."""
    rng = np.random.default_rng(0)
    sound = np.concatenate([noise(29.7, -20, rng), noise(0.35, -26, rng)])
    assert min(len(piece.audio) for piece in cut([sound])) > RATE // 2


def test_in_doubt_it_is_speech():
    """Noise alone and speech upon equally loud noise cannot be told apart by loudness; digital silence can."""
    assert check(cut([audio(95)]), audio(95)).all()
    assert list(cut([np.zeros(200 * RATE, np.float32)])) == []


def test_real_prompts_stand_whole_in_the_pieces():
    """Of each prompt all that is louder than -45 dB below full scale, with low noise in between."""
    rng = np.random.default_rng(0)
    records = list(read_manifest(DATA / "test.jsonl"))
    clips = [load_audio(record.wav)[0] for record in records]
    parts = [part for clip in clips for part in (clip, noise(rng.uniform(0.3, 3), -70, rng))]
    sound = np.concatenate(parts)
    count = check(cut([sound]), sound)
    frames = sound[: len(sound) // 256 * 256].reshape(-1, 256)
    assert (count[: frames.size].reshape(-1, 256)[frames.std(1) > 10 ** (-45 / 20)] == 1).all()
    assert count.mean() < 0.97


def test_memory_does_not_grow_with_the_length(tmp_path):
    peaks = []
    minute = np.concatenate([audio(20), np.zeros(4 * RATE, np.float32), audio(36)])
    for minutes in (5, 60):
        with soundfile.SoundFile(tmp_path / "a.wav", "w", RATE, 1, subtype="PCM_U8") as file:
            for _ in range(minutes):
                file.write(minute)
        tracemalloc.start()
        pieces = Pieces(tmp_path / "a.wav")
        seconds = sum(len(piece.audio) for piece in pieces) / RATE
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert pieces.seconds == 60 * minutes
        assert 0.9 * pieces.seconds < seconds < pieces.seconds
    assert peaks[1] < 1.05 * peaks[0]
    assert peaks[1] < 10 * CHUNK * 4  # float32


def test_silero_is_asked_for_512_samples_at_a_time_and_leaves_torch_its_threads(monkeypatch):
    """The import of the real one sets the number of torch's threads to 1. Here: the tone is speech, the noise is not."""
    asked = []

    def model(window, rate):
        asked.append((tuple(window.shape), rate))
        return torch.tensor([[float(window.abs().max() < 0.06)]])

    def load_silero_vad():
        return model

    monkeypatch.setitem(sys.modules, "silero_vad", SimpleNamespace(load_silero_vad=load_silero_vad))
    threads = torch.get_num_threads()
    quiet = (0.1 * tone(35.01, RATE)).astype(np.float32)
    sound = np.concatenate([audio(40), quiet, audio(7)])
    count = check(cut([sound], "silero"), sound)
    assert set(asked) == {((512,), RATE)}
    assert len(asked) == -(-len(sound) // 512)
    assert torch.get_num_threads() == threads
    assert count[40 * RATE : 75 * RATE].all()
    assert not count[: 39 * RATE].any()
    assert not count[76 * RATE :].any()


def test_silero_itself_finds_real_speech_in_noise():
    pytest.importorskip("silero_vad", reason="pip install silero-vad")
    clip = np.concatenate([load_audio(record.wav)[0] for record in list(read_manifest(DATA / "test.jsonl"))[:3]])
    rng = np.random.default_rng(0)
    sound = np.concatenate([noise(40, -40, rng), clip + noise(len(clip) / RATE, -40, rng)[: len(clip)], noise(20, -40, rng)])
    count = check(cut([sound], "silero"), sound)
    assert count[40 * RATE : 40 * RATE + len(clip)].mean() > 0.9
    assert count[: 39 * RATE].mean() < 0.1


def test_a_missing_silero_is_named_before_the_first_file(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    model = SimpleNamespace(parameters=lambda: iter([torch.zeros(1)]), ctc=None, settings={})
    with pytest.raises(InputError, match="--vad silero needs the package silero-vad: pip install silero-vad"):
        Transcriber(model, None, DecodeArguments(vad="silero"))
