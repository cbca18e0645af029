"""A guard against what nobody said: loops, refusals, text on silence.

    guarded ─ hypotheses ─ broken_rules ┬─ none: the text is kept, nothing more is computed
                                        ├─ no_speech: the text is empty
                                        └─ another: decoded again more cautiously, at last by the CTC alone

The rules (`broken_rules`) need the clip and its text, and where the checkpoint has a CTC its greedy text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rapidfuzz.distance import Levenshtein
from whisper.audio import SAMPLE_RATE

from normalize import normalizer
from scoring import Score, hallucination, score
from settings import InputError
from transcript import Hypothesis, Transcript

if TYPE_CHECKING:
    from transcriber import Transcriber

WORDS_PER_SECOND, SPARE_WORDS = 8, 2  # the fastest speakers say 7 words a second; a clip's edges cut pauses off
DISAGREEMENT, FEWEST_EDITS = 0.4, 3  # edits between the text and the CTC's, a letter of the longer; a short word has few
SLICE = SAMPLE_RATE // 20  # 50 ms: shorter than a syllable
BANDS, SWING = 16, 7.0  # of half a kilohertz each; dB: steady noise swings 5, speech as loud as the noise around it 9
CAUTIOUS = {"no_repeat_ngram_size": 5, "temperature": 0.0}
FEWEST_BEAMS = 4  # where the user asked for so few
MORE_CTC = 2.0  # times --joint_weight


def steady(audio: np.ndarray) -> bool:
    """Whether float (samples,) holds nothing but silence, steady noise, a hum or one tone: no speech.

    Speech starts and stops in every band of the spectrum. In steady sound the level of a band, in slices of 50 ms, swings by
    a few dB (from its 10th to its 95th percentile). Loudness does not matter.
    """
    bright = np.diff(audio.astype(np.float64))  # else the lowest tones of a hum are all there is
    slices = bright[: len(bright) // SLICE * SLICE].reshape(-1, SLICE)  # (T, SLICE)
    if not len(slices):
        return False
    power = np.abs(np.fft.rfft(slices * np.hanning(SLICE))) ** 2  # (T, SLICE / 2 + 1)
    decibels = 10 * np.log10(power[:, 1:].reshape(len(slices), BANDS, -1).sum(-1) + 1e-10)  # (T, BANDS)
    low, high = np.percentile(decibels, [10, 95], axis=0)
    return bool((high - low).max() < SWING)


def disagree(text: str, ctc_text: str) -> bool:
    """Whether the edits from one's letters to the other's (basic normalisation) are too many for the same speech."""
    ours, theirs = ("".join(normalizer("basic")(t).split()) for t in (text, ctc_text))
    edits = Levenshtein.distance(ours, theirs)
    return edits >= FEWEST_EDITS and edits > DISAGREEMENT * max(len(ours), len(theirs))


def broken_rules(audio: np.ndarray, found: Hypothesis, bounded: bool = True) -> list[str]:
    """Which rules the text of a clip breaks; none for an empty one.

    no_speech: the CTC hears no word, or, where there is none, the clip is silent or steady throughout.
    loop, refusal: as scoring.hallucination has them; what the CTC hears too is none.
    too_fast: more words than WORDS_PER_SECOND and SPARE_WORDS (a Chinese character is a word).
    cut_off: it ran into the limit of tokens that the duration sets (`bounded`).
    disagrees: more than DISAGREEMENT of its letters, and at least FEWEST_EDITS, are not the CTC's.
    """
    if not found.text:
        return []
    if steady(audio) if found.ctc_text is None else not found.ctc_text:
        return ["no_speech"]
    words = len(normalizer("chinese")(found.text).split())
    rules = {
        hallucination(found.ctc_text or "", found.text): True,
        "too_fast": words > WORDS_PER_SECOND * len(audio) / SAMPLE_RATE + SPARE_WORDS,
        "cut_off": bounded and found.ended is False,
        "disagrees": found.ctc_text is not None and disagree(found.text, found.ctc_text),
    }
    return [rule for rule, broken in rules.items() if rule and broken]


def guarded(
    transcriber: "Transcriber",
    clips: Sequence[np.ndarray],
    hypotheses: Callable[..., list[Hypothesis | InputError]] | None = None,
) -> list[Hypothesis | InputError]:
    """As `transcriber.hypotheses(clips)`, with the suspicious texts replaced and `flags` and `unguarded` set.

    `hypotheses` takes its place if given, and may have an InputError in the place of a text: at first it stays the result,
    later what was found before is.

    Of a suspicious clip's decodings the first that breaks no rule is kept, else the one that breaks the fewest, and of
    those the shortest. Flags: the rules that the first one broke; then `decoded_again`, with `ctc_text` where the CTC's own
    text was kept and `doubtful` where what was kept breaks a rule too.
    """
    bounded = transcriber.args.max_new_tokens is None
    hypotheses = hypotheses or transcriber.hypotheses
    found = [[hypothesis] for hypothesis in hypotheses(clips)]
    broken = [
        [[] if isinstance(first, InputError) else broken_rules(clip, first, bounded)]
        for clip, (first,) in zip(clips, found, strict=True)
    ]
    for search in _more_cautious(transcriber):
        again = [i for i, rules in enumerate(broken) if rules[-1] and rules[0] != ["no_speech"]]
        if not again:
            break
        for i, hypothesis in zip(again, hypotheses([clips[i] for i in again], **search), strict=True):
            if not isinstance(hypothesis, InputError):
                found[i].append(hypothesis)
                nothing = ["disagrees"] if hypothesis.ctc_text and not hypothesis.text else []  # is no way out
                broken[i].append(nothing or broken_rules(clips[i], hypothesis, bounded))
    return [_kept(*both) for both in zip(found, broken, strict=True)]


def _more_cautious(transcriber: "Transcriber") -> list[dict[str, Any]]:
    """How a suspicious clip is decoded again, one way after the other."""
    asked = transcriber.args
    ngram = min(asked.no_repeat_ngram_size or math.inf, CAUTIOUS["no_repeat_ngram_size"])
    search = CAUTIOUS | {"num_beams": asked.num_beams and max(asked.num_beams, FEWEST_BEAMS), "no_repeat_ngram_size": ngram}
    if not transcriber.model.ctc:
        return [search]
    if transcriber.decoder == "ctc":
        return []
    decoder = "joint" if transcriber.decoder == "llm" else transcriber.decoder
    weight, _ = transcriber.vote(decoder, transcriber.args)
    return [search | {"decoder": decoder, "joint_weight": MORE_CTC * weight}, {"decoder": "ctc"}]


def _kept(found: Sequence[Hypothesis], broken: Sequence[list[str]]) -> Hypothesis:
    """One of a clip's decodings, in the order they were made, by the rules that each broke."""
    first, rules = found[0], broken[0]
    if not rules:
        return first
    if rules == ["no_speech"]:
        empty = {"text": "", "score": 0.0, "tokens": 0, "nbest": [], "words": None if first.words is None else []}
        return replace(first, **empty, flags=rules, unguarded=first.text)
    at = min(range(len(found)), key=lambda i: (len(broken[i]), len(found[i].text) if broken[i] else i))
    kept = found[at]
    notes = {"decoded_again": len(found) > 1, "ctc_text": at and kept.ended is None, "doubtful": broken[at]}
    flags = rules + [note for note, holds in notes.items() if holds]
    return replace(kept, flags=flags, unguarded=None if kept.text == first.text else first.text)


def with_and_without(
    found: Mapping[str, Hypothesis | Transcript], references: dict[str, str], normalize: str = "basic"
) -> tuple[Score, Score]:
    """The scores of what was kept and of what was written at first, by the keys of `references`.

    Raises ScoreError for a key without a reference.
    """
    kept = {key: one.text for key, one in found.items()}
    first = {key: one.text if one.unguarded is None else one.unguarded for key, one in found.items()}
    return score(references, kept, normalizer(normalize)), score(references, first, normalizer(normalize))
