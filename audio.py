"""An audio file → samples → log-mel; what training does to them.

Raises InputError for whatever cannot be read.
"""

import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
import torch
import whisper
from torch import Tensor
from whisper.audio import HOP_LENGTH, N_FFT, N_SAMPLES, SAMPLE_RATE

from settings import InputError

BLOCK = 1 << 16  # frames read at a time
ROUNDING = 0.01  # seconds that the end of a part may lie behind its file's, since times are often written so
MOST_CHANNELS = 8  # of an array: more are rather several clips
LOUDEST = 10  # 20 dB above full scale: no recording, a mistake of scale
UNKNOWN_FRAMES = 1 << 48  # libsndfile's answer for a FLAC written to a pipe is 2 ** 63 - 1
OPEN_ENDED_BYTES = (1 << 31) - (1 << 16)  # a wav written to a pipe says 2 ** 32 - 1 or thereabouts


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a file with something in it."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'is a directory' if os.path.isdir(path) else 'no such file'}")
    if not path.stat().st_size:
        raise InputError(f"{path}: is empty (0 bytes)")


def sndfile_name(path: str | Path) -> str | bytes:
    """The path as soundfile takes it: of a name that is not UTF-8 only the bytes."""
    return str(path) if os.name == "nt" else os.fsencode(path)


def truncation(libsndfile_log: str) -> str:
    """What libsndfile's log says of a header that promises more than there is; a streamed wav's open-ended size is fine."""
    promised = re.search(r"data : (\d+) \(should be", libsndfile_log)
    truncated = promised and int(promised[1]) < OPEN_ENDED_BYTES
    return "truncated: its header promises more than the file holds" if truncated else ""


class AudioStream:
    """An audio file of any length, or its part from `start` to `end` (seconds), block by block: float32 mono at 16 kHz
    (samples,).

    wav, flac, ogg, opus and mp3 are read by libsndfile, the rest by the `ffmpeg` program where it is installed; both seek. A
    truncated or corrupt file yields what stands before the damage, a part that goes on behind the file's end what is there
    of it; damage behind a part is no problem of the part. Once iterated, `problem` says what is wrong ("" if nothing), and
    `samples` how many there were. Iterating raises InputError when nothing can be read, or at the first block with NaN or
    infinite samples.
    """

    def __init__(self, path: str | Path, start: float | None = None, end: float | None = None) -> None:
        self.path, self.start, self.end = Path(path), start or 0.0, math.inf if end is None else end
        self.problem, self.samples = "", 0

    def __iter__(self) -> Iterator[np.ndarray]:
        check_file(self.path)
        self.samples = 0
        for block in self._blocks():
            if not np.isfinite(block).all():
                raise InputError(f"{self.path}: has NaN or infinite samples")
            self.samples += len(block)
            yield block
        lacking = self.end - self.start - self.samples / SAMPLE_RATE
        if lacking <= ROUNDING:
            self.problem = ""
        elif self.end < math.inf:
            self.problem = self.problem or f"ends {lacking:.2f} s before its part does, at {self.end:g} s"
        elif self.start and not self.samples:
            self.problem = self.problem or f"ends before its part begins, at {self.start:g} s"
        if self.problem and not self.samples:
            raise InputError(f"{self.path}: {self.problem}")

    def _blocks(self) -> Iterator[np.ndarray]:
        try:
            with soundfile.SoundFile(sndfile_name(self.path)) as file:
                rate, frames, self.problem = file.samplerate, file.frames, truncation(file.extra_info)
        except soundfile.LibsndfileError as error:
            yield from self._ffmpeg(error.error_string)
            return
        blocks = self._libsndfile(rate, frames)
        if rate == SAMPLE_RATE:
            yield from blocks
            return
        resampler = soxr.ResampleStream(rate, SAMPLE_RATE, num_channels=1)
        for block in blocks:
            yield resampler.resample_chunk(block)
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)

    def _libsndfile(self, rate: int, frames: int) -> Iterator[np.ndarray]:
        done, last = min(round(self.start * rate), frames), round(min(self.end * rate, UNKNOWN_FRAMES))
        size, why = BLOCK, ""
        while size:
            with _InOrder(sndfile_name(self.path)) as file:
                try:
                    file.seek(done)
                    while done < last:
                        block = file.read(min(size, last - done), "float32", always_2d=True).mean(1)
                        if not len(block):
                            return
                        yield block
                        done += len(block)
                    return
                except soundfile.LibsndfileError as error:  # the damage, or the end of a file whose length is unknown
                    why = why or error.error_string
            size //= 2  # it lies within the next block: come closer
        if frames < UNKNOWN_FRAMES:
            self.problem = f"corrupt after {done / rate:.2f} s ({why})"

    def _ffmpeg(self, why: str) -> Iterator[np.ndarray]:
        if not shutil.which("ffmpeg"):
            neither = f"not audio that libsndfile reads ({why}); the ffmpeg program, not installed, reads more"
            raise InputError(f"{self.path}: {neither}")
        command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe"]
        command += ["-ss", f"{self.start:f}"] if self.start else []
        command += ["-t", f"{self.end - self.start:f}"] if self.end < math.inf else []
        command += ["-i", f"file:{self.path.resolve()}", "-vn", "-f", "f32le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-"]
        with TemporaryFile() as complaints, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints) as ffmpeg:
            try:
                while samples := ffmpeg.stdout.read(BLOCK * np.dtype(np.float32).itemsize):
                    yield np.frombuffer(samples, np.float32)
                ffmpeg.wait()
            finally:
                ffmpeg.kill()  # where the reader stopped before the end
            complaints.seek(0)
            complaint = complaints.readline().decode("utf-8", "replace").strip()
        if not self.samples and (ffmpeg.returncode or not self.start):
            raise InputError(f"{self.path}: not audio that libsndfile or ffmpeg reads ({why})")
        self.problem = f"corrupt ({complaint})" if ffmpeg.returncode else ""


class _InOrder(soundfile.SoundFile):
    """soundfile seeks to where it is after each block, which garbles mp3, unless the file says that it cannot."""

    def seekable(self) -> bool:
        return False


def load_audio(path: str | Path, start: float | None = None, end: float | None = None) -> tuple[np.ndarray, str]:
    """The whole of an AudioStream (samples,), and its problem."""
    stream = AudioStream(path, start, end)
    return np.concatenate([np.zeros(0, np.float32), *stream]), stream.problem


def samples_of(array: Any, sampling_rate: float | None) -> np.ndarray:
    """An array or tensor of samples, mono or with channels, as float32 mono at 16 kHz (samples,).

    Floats lie between −1 and 1; int8, int16 and int32 are scaled by their range, uint8 is around 128. Of two dimensions
    the one with at most MOST_CHANNELS is the channels'. Raises InputError for what could mean several things.
    """
    if sampling_rate is None or not sampling_rate > 0:
        raise InputError(f"an array needs sampling_rate=… in samples a second, not {sampling_rate}")
    if isinstance(array, Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    kind = array.dtype.name
    if array.dtype.kind != "f" and kind not in ("int8", "uint8", "int16", "int32"):
        raise InputError(f"samples of {kind}: what is full scale? Give floats between -1 and 1, int16 or int32")
    if array.ndim != 1 and not (array.ndim == 2 and min(array.shape) <= MOST_CHANNELS < max(array.shape)):
        raise InputError(
            f"an array of shape {array.shape} is neither (samples,) nor one clip with at most {MOST_CHANNELS} channels, "
            "(channels, samples) or (samples, channels): give several clips as a list"
        )
    samples = array.astype(np.float32)
    if array.dtype.kind != "f":
        samples = (
            samples / 2**31
            if kind == "int32"
            else samples / 2**15
            if kind == "int16"
            else samples / 2**7 - (kind == "uint8")
        )
    if array.ndim == 2:
        samples = samples.mean(int(np.argmin(array.shape)))
    if not np.isfinite(samples).all():
        raise InputError("has NaN or infinite samples")
    if len(samples) and np.abs(samples).max() > LOUDEST:
        raise InputError(
            f"floats up to {np.abs(samples).max():.0f}: samples lie between -1 and 1 (divide those of int16 by 32768)"
        )
    return soxr.resample(samples, sampling_rate, SAMPLE_RATE) if sampling_rate != SAMPLE_RATE else samples


def count_samples(path: Path, start: float | None = None) -> int:
    """Samples at 16 kHz, from `start` (seconds) on, by the file's header alone where it says; raises InputError for a file
    that is not whole, or that ends before."""
    count = _count_samples(path)
    if start and count <= start * SAMPLE_RATE:
        raise InputError(f"{path}: ends before its part begins, at {start:g} s")
    return count - round((start or 0) * SAMPLE_RATE)


def _count_samples(path: Path) -> int:
    try:
        with soundfile.SoundFile(sndfile_name(path)) as file:
            frames, rate, problem = file.frames, file.samplerate, truncation(file.extra_info)
        if frames < UNKNOWN_FRAMES and not problem:
            return math.ceil(frames * SAMPLE_RATE / rate)
    except soundfile.LibsndfileError:
        pass
    stream = AudioStream(path)
    count = sum(map(len, stream))
    if stream.problem:
        raise InputError(f"{path}: {stream.problem}: mend the file or remove the line")
    return count


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


def vector_seconds(stride: int) -> float:
    """From one projector vector to the next, by the rule above."""
    return 2 * stride * HOP_LENGTH / SAMPLE_RATE


def speech_vectors(samples: Any, settings: dict) -> Any:
    """How many projector vectors `samples` at 16 kHz (int or array) yield under a checkpoint's settings; 0 when they are
    too few."""
    padded = N_SAMPLES if settings["encoder_padding"] == "30s" else samples
    enough = samples > N_FFT // 2  # the spectrogram reflects half a window at each end
    return speech_lengths(padded, settings["projector_stride"]).speech * enough


def log_mel(audio: np.ndarray, n_mels: int, encoder_padding: str = "none", device: str | torch.device = "cpu") -> Tensor:
    """audio (samples,) at 16 kHz → Whisper's log-mel (n_mels, frames), of this clip alone, on `device`."""
    if encoder_padding == "30s":
        audio = whisper.pad_or_trim(audio)
    return whisper.log_mel_spectrogram(torch.from_numpy(np.ascontiguousarray(audio, np.float32)), n_mels, device=device)


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
