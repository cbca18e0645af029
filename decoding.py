"""Records → their pieces → batches of like length → an outcome for each record, whatever happens to it.

    records ─ read_parts ─ read_ahead ─ batches ─ decode ─ complete ─ outcomes

`recognize` is the whole way. It holds two windows of audio, however many records there are and however long they are.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from whisper.audio import SAMPLE_RATE

from audio import samples_of
from guard import guarded
from longform import Piece, Pieces, cut
from manifest import Record
from results import Outcome
from settings import InputError
from transcript import Hypothesis, joined

if TYPE_CHECKING:
    from transcriber import Transcriber

ALIKE = 0.5  # the shortest clip of a batch, of its longest
WINDOW_BATCHES = 4  # so many times --batch_seconds are read ahead and sorted by length


def out_of_memory(error: BaseException) -> bool:
    """Each device words it in its own way."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def decode(transcriber: "Transcriber", clips: Sequence[np.ndarray]) -> list[Hypothesis | InputError]:
    """Transcribe a batch; a clip for which there is not enough memory yields an InputError in its place."""
    hypotheses = partial(fitting, transcriber)
    return guarded(transcriber, clips, hypotheses) if transcriber.args.guard == "on" else hypotheses(clips)


def fitting(transcriber: "Transcriber", clips: Sequence[np.ndarray], **search: Any) -> list[Hypothesis | InputError]:
    """The hypotheses of a batch, or out of memory of its halves."""
    try:
        return transcriber.hypotheses(clips, **search)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(clips) == 1:
            return [InputError(f"out of memory on {len(clips[0]) / SAMPLE_RATE:.1f} s alone")]
    torch.cuda.empty_cache()
    half = len(clips) // 2
    return fitting(transcriber, clips[:half], **search) + fitting(transcriber, clips[half:], **search)


class ArrayPieces:
    """An array's pieces, as longform.Pieces are a file's."""

    problem, seconds = "", 0.0

    def __init__(self, array: Any, sampling_rate: float | None, vad: str) -> None:
        self.array, self.sampling_rate, self.vad = array, sampling_rate, vad

    def __iter__(self) -> Iterator[Piece]:
        audio = samples_of(self.array, self.sampling_rate)
        self.seconds = len(audio) / SAMPLE_RATE
        return cut([audio], self.vad)


class Part(NamedTuple):
    """A piece of a record, or its end: then `problem` and `seconds` are the whole record's."""

    record: Record
    piece: Piece | None
    problem: str = ""
    seconds: float = 0.0


Found = tuple[float, float, Hypothesis | InputError]  # of a piece: its start and duration (seconds), what was decoded


def read_parts(
    transcriber: "Transcriber", records: Iterable[Record], pieces_of: Callable[[Record], Pieces | ArrayPieces]
) -> Iterator[Part]:
    """The usable pieces of each record, then its end; whatever is wrong with a file is its `problem`."""
    for record in records:
        pieces, problem, usable = pieces_of(record), "", []
        try:
            for piece in pieces:
                usable.append(transcriber.usable(piece.audio))
                if usable[-1]:
                    yield Part(record, piece)
        except InputError as error:
            problem = str(error).removeprefix(f"{record.wav}: ")
        problem = problem or pieces.problem
        if not problem and not pieces.seconds:
            problem = "has no samples"
        if not problem and usable and not any(usable):  # no piece at all: nothing but silence
            problem = "shorter than one projector window"
        yield Part(record, None, problem, pieces.seconds)


def read_ahead(parts: Iterator[Part], seconds: float) -> Iterator[list[Part]]:
    """Windows of so many seconds of audio: while one is worked on, a thread reads the next."""

    def gather() -> list[Part]:
        window, total = [], 0.0
        while total < seconds and (part := next(parts, None)):
            window.append(part)
            total += len(part.piece.audio) / SAMPLE_RATE if part.piece else 0.1  # a record without audio takes room too
        return window

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(gather)
        while window := ahead.result():
            ahead = reader.submit(gather)
            yield window


def batches(parts: Sequence[Part], size: int, seconds: float) -> Iterator[list[Part]]:
    """The longest first, neighbours in length together: as many as `seconds` hold with their padding, at most `size`, and
    none that is much shorter than the first: a batch takes as long as its longest."""
    parts = sorted(parts, key=lambda part: len(part.piece.audio), reverse=True)
    while parts:
        longest = len(parts[0].piece.audio)
        fit = max(1, int(min(size, seconds * SAMPLE_RATE / longest)))
        fit = sum(len(part.piece.audio) >= ALIKE * longest for part in parts[:fit])
        batch, parts = parts[:fit], parts[fit:]
        yield batch


def recognize(
    transcriber: "Transcriber",
    records: Iterable[Record],
    batch_size: int,
    batch_seconds: float = 240.0,
    window_batches: int = WINDOW_BATCHES,
    pieces_of: Callable[[Record], Pieces | ArrayPieces] | None = None,
) -> Iterator[Outcome]:
    """One outcome for each record, whatever happens to it, as soon as it is complete: not in the records' order."""
    pieces_of = pieces_of or (lambda record: Pieces(*record.part, vad=transcriber.args.vad))
    found: dict[str, list[Found]] = defaultdict(list)  # of records that are not complete
    spent: dict[str, float] = defaultdict(float)
    for window in read_ahead(read_parts(transcriber, records, pieces_of), batch_seconds * window_batches):
        ends = {part.record.key: part for part in window if not part.piece}
        pieces = [part for part in window if part.piece]
        left = Counter(part.record.key for part in pieces)
        yield from (complete(end, found.pop(key, []), spent.pop(key, 0.0)) for key, end in ends.items() if not left[key])
        for batch in batches(pieces, batch_size, batch_seconds):
            began = time.monotonic()
            hypotheses = decode(transcriber, [part.piece.audio for part in batch])
            share = (time.monotonic() - began) / sum(len(part.piece.audio) for part in batch)
            for part, hypothesis in zip(batch, hypotheses, strict=True):
                key = part.record.key
                samples = len(part.piece.audio)  # not kept: it would be all of a long recording
                found[key].append((part.piece.start, samples / SAMPLE_RATE, hypothesis))
                spent[key] += share * samples
                left[key] -= 1
                if not left[key] and key in ends:
                    yield complete(ends[key], found.pop(key), spent.pop(key))


def complete(end: Part, found: list[Found], seconds: float) -> Outcome:
    """A record's pieces, decoded in any order, as its outcome."""
    found = sorted(found, key=lambda piece: piece[0])
    lost = [str(hypothesis) for _, _, hypothesis in found if isinstance(hypothesis, InputError)]
    pieces = [piece for piece in found if not isinstance(piece[2], InputError)]
    transcript = joined(pieces, end.seconds, "; ".join(filter(None, [end.problem, *lost])))
    return Outcome(end.record.key, str(end.record.wav), transcript, seconds)
