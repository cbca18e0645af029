"""What is known of a transcript, joined over the pieces of a recording."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import product


@dataclass
class Word:
    text: str
    start: float  # seconds
    end: float
    confidence: float


@dataclass
class Hypothesis:
    """One decoded piece of at most 30 s."""

    text: str
    ended: bool | None = None  # by the LLM's end-of-turn token rather than by the limit; None where no LLM writes
    score: float = 0.0
    tokens: int = 0
    nbest: list[tuple[str, float]] = field(default_factory=list)  # different texts and their scores, the search's best first
    words: list[Word] | None = None  # None without a CTC, or where it cannot spell the text or has too few frames for it
    ctc_text: str | None = None  # the CTC's own, by its best path
    flags: list[str] = field(default_factory=list)
    unguarded: str | None = None


@dataclass
class Segment:
    start: float  # seconds
    end: float
    text: str


@dataclass
class Transcript:
    """A whole recording. `error`: what was wrong with it, and is not in the text; "" if nothing."""

    text: str
    score: float
    nbest: list[tuple[str, float]]
    words: list[Word] | None
    segments: list[Segment]
    flags: list[str]
    duration: float  # seconds
    error: str = ""
    tokens: int = 0
    unguarded: str | None = None  # what the guard found, where it kept another text


def joined(pieces: Sequence[tuple[float, float, Hypothesis]], duration: float, error: str = "") -> Transcript:
    """The (start, duration in seconds, hypothesis) of a recording's pieces as one transcript; scores are sums.

    `words` lacks those of pieces that have none; None where no piece has any.
    """
    nbest = [("", 0.0)] if pieces else []
    for _, _, piece in pieces:
        readings = piece.nbest or [(piece.text, piece.score)]
        both = [(f"{a} {b}".strip(), score + more) for (a, score), (b, more) in product(nbest, readings)]
        nbest = both if len(pieces) == 1 else nlargest(len(readings), both, key=lambda reading: reading[1])
    words = [
        Word(word.text, start + word.start, start + word.end, word.confidence)
        for start, _, piece in pieces
        for word in piece.words or ()
    ]
    unguarded = [piece.text if piece.unguarded is None else piece.unguarded for _, _, piece in pieces]
    return Transcript(
        text=" ".join(piece.text for _, _, piece in pieces if piece.text),
        score=sum(piece.score for _, _, piece in pieces),
        nbest=nbest,
        words=words if any(piece.words is not None for _, _, piece in pieces) else None,
        segments=[Segment(start, start + seconds, piece.text) for start, seconds, piece in pieces if piece.text],
        flags=list(dict.fromkeys(flag for _, _, piece in pieces for flag in piece.flags)),
        duration=duration,
        error=error,
        tokens=sum(piece.tokens for _, _, piece in pieces),
        unguarded=" ".join(filter(None, unguarded)) if any(p.unguarded is not None for _, _, p in pieces) else None,
    )
