"""What is known of a transcript: scores, other readings, when each word was said, joined over the pieces of a recording.

Scores are natural logarithms of probabilities, summed over a text (`tokens` terms; score / tokens is the average):

    llm    log P_LLM(tokens, end of turn | speech), of the LLM itself, whatever penalties and limits shaped the search
    ctc    log P_CTC(tokens | speech), of all paths that say them
    joint  the LLM's plus --joint_weight times the CTC's, without the bonus by which the search chose
    fusion the same of an LLM that hears nothing, where the end of turn has one probability after any token

What the guard has decoded again (its flags say so) has the score of that search: twice the weight, or ctc.

A text that was cut off at its limit has no end of turn: it is scored without one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import nlargest
from itertools import product

import numpy as np

from ctc import forced_alignment
from prompt import Spelling


@dataclass
class Word:
    text: str
    start: float  # seconds
    end: float  # a CTC's peaks are narrow: a word may sound a little longer
    confidence: float  # geometric mean of the CTC's posteriors of its tokens, over the frames they were found in


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
    unguarded: str | None = None  # what was first written, where the guard has put `text` in its place


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
    tokens: int
    nbest: list[tuple[str, float]]
    words: list[Word] | None
    segments: list[Segment]
    flags: list[str]
    duration: float  # seconds
    error: str = ""
    unguarded: str | None = None


def joined(pieces: Sequence[tuple[float, float, Hypothesis]], duration: float, error: str = "") -> Transcript:
    """The (start, duration in seconds, hypothesis) of a recording's pieces as one transcript; scores are sums.

    `words` lacks those of pieces that have none; None where no piece has any. `nbest` of several pieces: the text, then the
    combinations of theirs with the highest sums.
    """
    nbest: list[tuple[str, float]] = []
    for i, (_, _, piece) in enumerate(pieces):
        readings = piece.nbest or [(piece.text, piece.score)]
        if not i:
            nbest = readings
            continue
        text, *others = ((f"{a} {b}".strip(), score + more) for (a, score), (b, more) in product(nbest, readings))
        nbest = [text, *nlargest(max(len(nbest), len(readings)) - 1, others, key=lambda reading: reading[1])]
    words = [
        Word(word.text, start + word.start, start + word.end, word.confidence)
        for start, _, piece in pieces
        for word in piece.words or ()
    ]
    unguarded = [piece.text if piece.unguarded is None else piece.unguarded for _, _, piece in pieces]
    return Transcript(
        text=" ".join(piece.text for _, _, piece in pieces if piece.text),
        score=sum(piece.score for _, _, piece in pieces),
        tokens=sum(piece.tokens for _, _, piece in pieces),
        nbest=nbest,
        words=words if any(piece.words is not None for _, _, piece in pieces) else None,
        segments=[Segment(start, start + seconds, piece.text) for start, seconds, piece in pieces if piece.text],
        flags=list(dict.fromkeys(flag for _, _, piece in pieces for flag in piece.flags)),
        duration=duration,
        error=error,
        unguarded=" ".join(filter(None, unguarded)) if any(piece.unguarded is not None for _, _, piece in pieces) else None,
    )


def timed_words(
    ids: Sequence[int], spelling: Spelling, log_probs: np.ndarray, seconds: float, duration: float
) -> list[Word] | None:
    """When the words of a text were said, by the CTC (forced alignment); None: it cannot spell it, or has too few frames.

    ids: the text's tokens; log_probs (N, V + 1) of a clip of `duration` seconds, each frame `seconds` long.
    """
    classes = spelling(ids)
    spans = forced_alignment(log_probs, classes) if spelling.whole(ids) else None
    if spans is None:
        return None
    decode = partial(spelling.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    owner = []  # of each class, the word that it belongs to, from 1; 0: a space that stands alone
    for i, id in enumerate(ids):
        so_far = decode(ids[: i + 1])
        owner += [0 if so_far[-1:].isspace() else len(so_far.split())] * len(spelling.of_token(id))
    words = []
    for number, text in enumerate(decode(ids).split(), 1):
        own = [(first, last, c) for (first, last), c, o in zip(spans, classes, owner, strict=True) if o == number]
        if not own:
            return None
        said = np.concatenate([log_probs[first : last + 1, c] for first, last, c in own])
        start, end = own[0][0] * seconds, min((own[-1][1] + 1) * seconds, duration)
        words.append(Word(text, start, end, float(np.exp(said.mean()))))
    return words
