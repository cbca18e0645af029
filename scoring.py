"""Reference and hypothesis, key → text, → counts of every utterance and of the set."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from align import Counts, align, alignments
from normalize import HAS_CJK, basic, mixed
from texts import ScoreError

# A refusal is no transcript: these openings, unless the reference has one too.
UNABLE = r"(i|we)('m| am|'re| are)? (can't|cannot|can not|unable to|not able to|don't have)"
REFUSAL = re.compile(
    rf"((i'm|i am|we're|we are) )?sorry (but )?{UNABLE}|{UNABLE} (transcribe|hear|listen|process|access|assist|help)"
    r"|as an? (ai|artificial|language model)|(很抱歉|抱歉|对不起) ?我(无法|不能|没有)|作为(一个|一名)? ?(人工智能|ai)"
)
LOOP_UNIT, LOOP_TIMES = 10, 4  # a loop is a unit of at most 10 tokens said at least 4 times in a row


@dataclass(frozen=True, slots=True)
class Utterance:
    key: str
    reference: str  # normalised, as is the hypothesis
    hypothesis: str
    words: Counts
    characters: Counts
    mixed: Counts  # of Han characters and kana, and of words in other scripts
    hallucination: str  # "refusal", "loop" or ""

    def __str__(self) -> str:
        note = f" [{self.hallucination}]" if self.hallucination else ""
        return f"{self.key}: {self.words.percent}, {self.words.errors} errors{note}"

    @property
    def pairs(self) -> list[tuple[str | None, str | None]]:
        return align(self.reference.split(), self.hypothesis.split())


@dataclass(frozen=True)
class Score:
    """WER, CER and MER of a set. `faithful` is the WER without the utterances that are plain hallucinations."""

    utterances: list[Utterance]
    missing: list[str]

    @property
    def words(self) -> Counts:
        return sum((u.words for u in self.utterances), Counts())

    @property
    def characters(self) -> Counts:
        return sum((u.characters for u in self.utterances), Counts())

    @property
    def mixed(self) -> Counts:
        return sum((u.mixed for u in self.utterances), Counts())

    @property
    def faithful(self) -> Counts:
        return sum((u.words for u in self.utterances if not u.hallucination), Counts())

    @property
    def worst(self) -> list[Utterance]:
        """Most errors first."""
        return sorted(self.utterances, key=lambda u: (u.words.errors, u.words.rate or 0), reverse=True)


def hallucination(reference: str, hypothesis: str) -> str:
    """ "refusal", "loop" or "": whether a hypothesis is plainly no transcript (basic normalisation).

    A refusal begins as REFUSAL says where the reference does not. A loop says a unit of at most LOOP_UNIT tokens at least
    LOOP_TIMES in a row and is longer than the reference.
    """
    ref, hyp = (" ".join(basic(text).split()) for text in (reference, hypothesis))
    if REFUSAL.match(hyp) and not REFUSAL.match(ref):
        return "refusal"
    ref_tokens, tokens = mixed(ref).split(), mixed(hyp).split()
    for unit in range(1, LOOP_UNIT + 1) if len(tokens) > len(ref_tokens) else ():
        run = 0
        for earlier, later in zip(tokens, tokens[unit:], strict=False):
            run = run + 1 if earlier == later else 0
            if run >= unit * (LOOP_TIMES - 1):
                return "loop"
    return ""


def score(references: dict[str, str], hypotheses: dict[str, str], normalize: Callable[[str], str] = basic) -> Score:
    """Score hypotheses against references, both key → text, in the references' order.

    A missing hypothesis counts as deletions. Raises ScoreError for a hypothesis whose key no reference has.
    """
    unknown = [key for key in hypotheses if key not in references]
    if unknown:
        raise ScoreError(f"{len(unknown)} keys are not in the reference, the first is {unknown[0]!r}: is it the same set?")
    given = [(key, references[key], hypotheses.get(key, "")) for key in references]
    texts = [tuple(" ".join(normalize(text).split()) for text in pair) for _, *pair in given]
    words = alignments((ref.split(), hyp.split()) for ref, hyp in texts)
    characters = alignments((ref.replace(" ", ""), hyp.replace(" ", "")) for ref, hyp in texts)
    others = alignments((mixed(ref).split(), mixed(hyp).split()) for ref, hyp in texts if HAS_CJK.search(ref + hyp))
    utterances = []
    for (key, *pair), (ref, hyp), steps, spelled in zip(given, texts, words, characters, strict=True):
        counts = Counts.of(steps)
        other = Counts.of(next(others)) if HAS_CJK.search(ref + hyp) else counts
        utterances.append(Utterance(key, ref, hyp, counts, Counts.of(spelled), other, hallucination(*pair)))
    return Score(utterances, [key for key in references if key not in hypotheses])
