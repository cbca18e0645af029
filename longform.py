"""A recording of any length → pieces of at most 30 s, cut at its pauses, while it is read.

    for piece in Pieces("talk.mp3"):
        print(piece.start, len(piece.audio) / SAMPLE_RATE)

A recording of 30 s or less is one piece, whole. In a longer one a voice-activity detector says which frames (16 ms) may be
speech; pieces end in pauses, keep a little silence around the speech, and what lies between them is left out. Speech without
a pause is cut at its quietest place. Every frame that may be speech stands in exactly one piece.

`--vad energy`, built in: a frame may be speech if it is 10 dB louder than the noise (the fifth percentile of the frames of
the last five minutes and of the next half minute), or within 25 dB of the loudest (the 99th). So where loud and quiet frames
are alike, be it noise or speech upon much noise, all is speech: in doubt it is decoded. `--vad silero`: the small network of
the package silero-vad, which tells speech from noise. `--vad none`: all is speech, and is cut at the quietest places.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from audio import AudioStream
from settings import InputError

FRAME = 256  # samples; two are what silero judges at a time
CHUNK = 2000 * FRAME  # samples that are judged together: 32 s


def frames(seconds: float) -> int:
    return int(seconds * SAMPLE_RATE / FRAME)


LONGEST = N_SAMPLES // FRAME
TARGET = frames(10)  # pieces end in the longest pause of the second half of this
PAUSE = frames(0.25)  # shorter ones are within a word
MARGIN = frames(0.25)  # of silence, kept on either side of speech
QUIET = frames(0.2)  # without a pause a cut falls on the quietest so long
REMEMBERED = frames(300)
SILENCE = frames(2)  # ends a piece, however short
SILERO_THRESHOLD = 0.35  # of a probability; its own for the end of speech
DIGITAL_SILENCE = -90  # dB below full scale: the last bit of 16


class Piece(NamedTuple):
    start: float  # seconds from the beginning of the recording, or of its part
    audio: np.ndarray  # float32 (samples,) at 16 kHz, at most 30 s


class Pieces:
    """The pieces of a file, or of its part from `start` to `end` (seconds), read as they are asked for.

    Once iterated, `problem` says what is wrong with the file ("" if nothing), and `seconds` how long it is. Iterating raises
    InputError as AudioStream does, after the pieces before: for NaN, say.
    """

    def __init__(self, path: str | Path, start: float | None = None, end: float | None = None, vad: str = "energy") -> None:
        self.stream, self.vad = AudioStream(path, start, end), vad

    def __iter__(self) -> Iterator[Piece]:
        return cut(self.stream, self.vad)

    @property
    def problem(self) -> str:
        return self.stream.problem

    @property
    def seconds(self) -> float:
        return self.stream.samples / SAMPLE_RATE


def cut(blocks: Iterable[np.ndarray], vad: str = "energy") -> Iterator[Piece]:
    """Blocks of a recording, float32 (samples,) at 16 kHz → its pieces, in order. Little more than a minute is in memory.

    Raises InputError for `--vad silero` without its package.
    """
    audio, level, speech = np.zeros(0, np.float32), np.zeros(0), np.zeros(0, bool)  # (samples,), (F,), (F,)
    position, judge = 0, None  # frames before `audio`
    for chunk, last in _chunks(blocks):
        if judge is None and last and len(chunk) <= N_SAMPLES:
            yield from [Piece(0.0, chunk)] if len(chunk) else []
            return
        judge = judge or DETECTORS[vad]()
        padded = np.pad(chunk, (0, -len(chunk) % FRAME)).reshape(-1, FRAME)  # (F, FRAME)
        levels = 10 * np.log10(np.maximum(padded.var(1), 1e-10))  # (F,) dB; a constant offset is no sound
        audio, level = np.concatenate([audio, chunk]), np.concatenate([level, levels])
        speech = np.concatenate([speech, judge(padded, levels)])
        while True:
            start = max(int(speech.argmax()) - MARGIN, 0) if speech.any() else len(speech)
            found = speech.any() and (last or len(speech) - start > LONGEST)
            end = start + _piece_end(speech[start:], level[start:], last) if found else max(0, start - MARGIN)
            if found:
                yield Piece((position + start) * FRAME / SAMPLE_RATE, audio[start * FRAME : end * FRAME].copy())
            audio, level, speech, position = audio[end * FRAME :], level[end:], speech[end:], position + end
            if not found:
                break


def _chunks(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Blocks of any length → (CHUNK samples, False) …, (the rest, True)."""
    buffer = np.zeros(0, np.float32)
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) > CHUNK:
            yield buffer[:CHUNK], False
            buffer = buffer[CHUNK:]
    yield buffer, True


def _piece_end(speech: np.ndarray, level: np.ndarray, last: bool) -> int:
    """speech (F,), which begins with at most MARGIN of silence, level (F,) → how many frames the next piece takes.

    It ends in the first long silence, else in the longest pause of the second half of TARGET, else of what follows up to
    30 s, else of what comes before, else at the quietest place of the second half of 30 s.
    """
    edges = np.flatnonzero(np.diff(speech, prepend=True, append=True))
    starts, ends = edges[::2], edges[1::2]  # of silences
    pauses = (starts > 0) & (starts < LONGEST) & (ends - starts >= PAUSE)
    starts, lengths = starts[pauses], (ends - starts)[pauses]
    long = np.flatnonzero((lengths >= SILENCE) & (starts < TARGET))[:1]
    if last and not len(long) and len(speech) <= (TARGET if len(starts) else LONGEST):
        return len(speech)
    windows = [(TARGET // 2, TARGET), (TARGET, LONGEST), (0, TARGET // 2)]
    for found in (long, *(np.flatnonzero((starts >= low) & (starts < high)) for low, high in windows)):
        if len(found):
            pause = found[lengths[found].argmax()]
            return int(min(starts[pause] + min(MARGIN, lengths[pause] // 2), LONGEST))
    room = min(LONGEST, len(speech) - frames(1))  # what remains shall not be a snippet
    energy = np.convolve(10 ** (level[room // 2 : room] / 10), np.ones(QUIET), "valid")
    return room // 2 + int(energy.argmin()) + QUIET // 2


Detector = Callable[[np.ndarray, np.ndarray], np.ndarray]  # frames (F, FRAME), their levels (F,) dB → speech (F,)


def _energy() -> Detector:
    past = np.zeros(0)

    def judge(audio: np.ndarray, level: np.ndarray) -> np.ndarray:
        nonlocal past
        past = np.concatenate([past, level])[-REMEMBERED:]
        noise, loudest = np.percentile(past, (5, 99))
        return level > max(min(noise + 10, loudest - 25), DIGITAL_SILENCE)

    return judge


def _silero() -> Detector:
    threads = torch.get_num_threads()
    try:
        from silero_vad import load_silero_vad
    except ImportError:
        raise InputError("--vad silero needs the package silero-vad: pip install silero-vad") from None
    finally:
        torch.set_num_threads(threads)  # its import sets 1
    model = load_silero_vad()

    def judge(audio: np.ndarray, level: np.ndarray) -> np.ndarray:
        padded = np.pad(audio, ((0, len(audio) % 2), (0, 0))).reshape(-1, 2 * FRAME)
        with torch.no_grad():
            heard = [float(model(window, SAMPLE_RATE)) >= SILERO_THRESHOLD for window in torch.from_numpy(padded)]
        return np.repeat(heard, 2)[: len(audio)]

    return judge


def _none() -> Detector:
    return lambda audio, level: np.ones(len(level), bool)


DETECTORS: dict[str, Callable[[], Detector]] = {"energy": _energy, "silero": _silero, "none": _none}
