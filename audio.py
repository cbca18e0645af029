"""An audio file → samples → log-mel; what training does to them.

Raises InputError for whatever cannot be read.
"""

import math
import os
import re
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
import torch
import whisper
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, N_SAMPLES, SAMPLE_RATE

from settings import InputError

BLOCK = 4096  # frames read at a time from a corrupt file
ROUNDING = 0.01  # seconds that the end of a part may lie behind its file's, since times are often written so
UNKNOWN_FRAMES = 1 << 48  # libsndfile's answer for a FLAC written to a pipe is 2 ** 63 - 1
OPEN_ENDED_BYTES = (1 << 31) - (1 << 16)  # a wav written to a pipe says 2 ** 32 - 1 or thereabouts


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a file with something in it."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'is a directory' if os.path.isdir(path) else 'no such file'}")
    if not path.stat().st_size:
        raise InputError(f"{path}: is empty (0 bytes)")


def truncation(libsndfile_log: str) -> str:
    """What libsndfile's log says of a header that promises more than there is; a streamed wav's open-ended size is fine."""
    promised = re.search(r"data : (\d+) \(should be", libsndfile_log)
    truncated = promised and int(promised[1]) < OPEN_ENDED_BYTES
    return "truncated: its header promises more than the file holds" if truncated else ""


def load_audio(path: str | Path, start: float | None = None, end: float | None = None) -> tuple[np.ndarray, str]:
    """Read any audio file, or its part from `start` to `end` (seconds), as float32 mono at 16 kHz (samples,), and what is
    wrong with it ("" if nothing).

    A truncated or corrupt file yields what stands before the damage, a part that goes on behind the file's end what is
    there of it; damage behind a part is no problem of the part. wav, flac, ogg, opus and mp3 are read by libsndfile, which
    seeks, the rest by the `ffmpeg` program where it is installed. Raises InputError when nothing can be read, or when
    samples are NaN or infinite.
    """
    path = Path(path)
    check_file(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, problem = file.samplerate, truncation(file.extra_info)
            first, last = round((start or 0) * rate), None if end is None else round(end * rate)
            if file.frames < UNKNOWN_FRAMES:
                try:
                    if first:
                        file.seek(min(first, file.frames))
                    audio = file.read(-1 if last is None else last - first, "float32", always_2d=True).mean(1)
                except soundfile.LibsndfileError as error:
                    audio = _in_blocks(path)
                    problem = f"corrupt after {len(audio) / rate:.2f} s ({error.error_string})"
                    audio = audio[first:last]
            else:
                audio = _in_blocks(path)[first:last]
    except soundfile.LibsndfileError as error:
        rate, (audio, problem) = SAMPLE_RATE, _ffmpeg(path, error.error_string, start, end)
    if end is not None:
        lacking = end - (start or 0) - len(audio) / rate
        problem = (problem or f"ends {lacking:.2f} s before its part does, at {end:g} s") if lacking > ROUNDING else ""
    elif start and not len(audio):
        problem = problem or f"ends before its part begins, at {start:g} s"
    if problem and not len(audio):
        raise InputError(f"{path}: {problem}")
    if not np.isfinite(audio).all():
        raise InputError(f"{path}: has NaN or infinite samples")
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
    return audio, problem


def _in_blocks(path: Path) -> np.ndarray:
    """A file whose length is unknown, or that is corrupt: soundfile seeks between blocks, which would garble mp3."""
    blocks, done, size = [np.zeros(0, np.float32)], 0, BLOCK
    while size:
        with soundfile.SoundFile(path) as file, suppress(soundfile.LibsndfileError):
            file.seek(done)
            while len(block := file.read(size, dtype="float32", always_2d=True).mean(1)):
                blocks.append(block)
                done += len(block)
        size //= 2  # the end or the damage lies within the next block: come closer
    return np.concatenate(blocks)


def _ffmpeg(path: Path, why: str, start: float | None, end: float | None) -> tuple[np.ndarray, str]:
    if not shutil.which("ffmpeg"):
        raise InputError(f"{path}: not audio that libsndfile reads ({why}); the ffmpeg program, not installed, reads more")
    command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe"]
    command += ["-ss", f"{start:f}"] if start else []
    command += ["-t", f"{end - (start or 0):f}"] if end is not None else []
    command += ["-i", f"file:{path.resolve()}", "-vn", "-f", "f32le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-"]
    done = subprocess.run(command, capture_output=True)
    if not done.stdout and not (start and not done.returncode):
        raise InputError(f"{path}: not audio that libsndfile or ffmpeg reads ({why})")
    complaint = done.stderr.decode("utf-8", "replace").strip().splitlines() if done.returncode else []
    return np.frombuffer(done.stdout, np.float32).copy(), f"corrupt ({complaint[0]})" if complaint else ""


def count_samples(path: Path, start: float | None = None) -> int:
    """Samples at 16 kHz, from `start` (seconds) on, by the file's header alone where it says; raises InputError for a file
    that is not whole, or that ends before."""
    count = _count_samples(path)
    if start and count <= start * SAMPLE_RATE:
        raise InputError(f"{path}: ends before its part begins, at {start:g} s")
    return count - round((start or 0) * SAMPLE_RATE)


def _count_samples(path: Path) -> int:
    try:
        with soundfile.SoundFile(path) as file:
            frames, rate, problem = file.frames, file.samplerate, truncation(file.extra_info)
        if frames < UNKNOWN_FRAMES and not problem:
            return math.ceil(frames * SAMPLE_RATE / rate)
    except soundfile.LibsndfileError:
        pass
    audio, problem = load_audio(path)
    if problem:
        raise InputError(f"{path}: {problem}: mend the file or remove the line")
    return len(audio)


class SpeechLengths(NamedTuple):
    mel: Any
    encoder: Any
    speech: Any


def speech_lengths(samples: Any, stride: int) -> SpeechLengths:
    """The one length rule: samples at 16 kHz → log-mel frames → encoder frames → projector vectors (int or tensor).

    A mel frame is whisper's hop (10 ms), the encoder's second convolution halves them (rounding up), the projector takes
    whole windows of `stride` encoder frames.
    """
    mel = samples // HOP_LENGTH
    encoder = (mel + 1) // 2
    return SpeechLengths(mel, encoder, encoder // stride)


def speech_vectors(samples: Any, settings: dict) -> Any:
    """How many projector vectors `samples` at 16 kHz (int or array) yield under a checkpoint's settings; 0 when they are
    too few."""
    padded = N_SAMPLES if settings["encoder_padding"] == "30s" else samples
    enough = samples > N_FFT // 2  # the spectrogram reflects half a window at each end
    return speech_lengths(padded, settings["projector_stride"]).speech * enough


def log_mel(audio: np.ndarray, n_mels: int, encoder_padding: str = "none") -> Tensor:
    """audio (samples,) at 16 kHz → Whisper's log-mel (n_mels, frames), of this clip alone."""
    if encoder_padding == "30s":
        audio = whisper.pad_or_trim(audio)
    return whisper.log_mel_spectrogram(torch.from_numpy(np.ascontiguousarray(audio, np.float32)), n_mels)


@dataclass(frozen=True)
class Augmentation:
    """What training does to a clip, anew in each epoch."""

    speed: bool = False  # 0.9, 1 or 1.1 times as fast (Ko et al. 2015), where it lasts 1 to 30 s
    noise_snr: float | None = None  # white noise, so many dB below the speech
    spectrum: bool = False  # SpecAugment (Park et al. 2019): two bands of at most 27 of 80 bins, two spans of 5 %;
    # where the encoder has run before, spans of its output instead

    def waveform(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """audio (samples,) → (about as many samples,), at most 30 s."""
        factor = rng.choice([0.9, 1.0, 1.1]) if self.speed else 1.0
        if factor != 1 and SAMPLE_RATE < len(audio) / factor < N_SAMPLES:
            audio = soxr.resample(audio, SAMPLE_RATE * factor, SAMPLE_RATE)
        if self.noise_snr is not None:
            loudness = np.sqrt(np.mean(np.square(audio)) / 10 ** (self.noise_snr / 10))
            audio = audio + loudness * rng.standard_normal(len(audio), dtype=np.float32)
        return audio

    def log_mel(self, mel: Tensor, rng: np.random.Generator) -> Tensor:
        """mel (n_mels, F) → the same with bands and spans at its mean."""
        mel, mean = mel.clone(), mel.mean()
        for masked, widest in ((mel, 27 * len(mel) // 80), (mel.T, mel.shape[1] // 20)):
            for width in rng.integers(widest + 1, size=2) if self.spectrum else ():
                start = rng.integers(len(masked) - width + 1)
                masked[start : start + width] = mean
        return mel

    def encoded(self, encoded: Tensor, rng: np.random.Generator) -> Tensor:
        """The encoder's output (E, d) → the same with spans of at most 0.3 s at zero, one in two seconds."""
        encoded = encoded.clone()
        for width in rng.integers(15 + 1, size=len(encoded) // 100 + 1) if self.spectrum else ():
            start = rng.integers(max(len(encoded) - width, 0) + 1)
            encoded[start : start + width] = 0
        return encoded


UNCHANGED = Augmentation()
