"""Reference and hypothesis → WER and CER, joined by key.

    python score.py --ref test.jsonl --hyp result.txt
    python score.py --ref test.jsonl --hyp result.txt --normalizer english --per_utterance

Either file is a jsonl (fields `key` or `wav`, and `txt`) or has lines `key text`. Alignment and counts are those of NIST
sclite: the cheapest path when a substitution costs 4, a deletion or insertion 3. CER is over characters other than
spaces, as `sclite -c` counts them.
"""

import argparse
import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SUBSTITUTION, GAP = 4, 3  # sclite's costs

CJK = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]"
# A refusal is no transcript: these openings, unless the reference has one too.
UNABLE = r"(i|we)('m| am|'re| are)? (can't|cannot|can not|unable to|not able to|don't have)"
REFUSAL = re.compile(
    rf"((i'm|i am|we're|we are) )?sorry (but )?{UNABLE}|{UNABLE} (transcribe|hear|listen|process|access|assist|help)"
    r"|as an? (ai|artificial|language model)|(很抱歉|抱歉|对不起) ?我(无法|不能|没有)|作为(一个|一名)? ?(人工智能|ai)"
)
LOOP_UNIT, LOOP_TIMES = 10, 4  # a loop is a unit of at most 10 tokens said at least 4 times in a row


class ScoreError(ValueError):
    """A user's mistake, told in one line that names file, line and remedy."""


def _none(text: str) -> str:
    return text


def _basic(text: str) -> str:
    """NFKC, lower case; punctuation and symbols become spaces, but for apostrophes inside words."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    return "".join(" " if c != "'" and unicodedata.category(c)[0] in "PS" else c for c in text)


def _chinese(text: str) -> str:
    """As basic, with every Chinese character a word of its own: WER then counts characters, and words in other scripts."""
    return re.sub(f"({CJK})", r" \1 ", _basic(text))


def normalizer(name: str) -> Callable[[str], str]:
    """The function of that name; `english` is that of the Whisper paper (openai-whisper), imported only when asked for."""
    if name == "english":
        from whisper.normalizers import EnglishTextNormalizer

        return EnglishTextNormalizer()
    return {"none": _none, "basic": _basic, "chinese": _chinese}[name]


NORMALIZERS = ("none", "basic", "english", "chinese")


def align(reference: list[str], hypothesis: list[str]) -> list[tuple[str | None, str | None]]:
    """Aligned pairs (reference, hypothesis), None for a gap: sclite's alignment (dynamic programming, row by row)."""
    n, m = len(reference), len(hypothesis)
    ids: dict[str, int] = {}
    r = np.array([ids.setdefault(token, len(ids)) for token in reference], dtype=np.int32)
    h = np.array([ids.setdefault(token, len(ids)) for token in hypothesis], dtype=np.int32)
    ramp = GAP * np.arange(m + 1, dtype=np.int32)
    cost, insert, diagonal = ramp, np.ones((n + 1, m + 1), dtype=bool), np.zeros((n + 1, m + 1), dtype=bool)
    for i in range(1, n + 1):
        above, cost = cost, cost + GAP
        across = above[:-1] + SUBSTITUTION * (h != r[i - 1])
        np.minimum(cost[1:], across, out=cost[1:])
        cost = np.minimum.accumulate(cost - ramp) + ramp  # insertions, left to right
        diagonal[i, 1:] = cost[1:] == across
        insert[i, 1:], insert[i, 0] = cost[1:] == cost[:-1] + GAP, False
    pairs: list[tuple[str | None, str | None]] = []
    i, j = n, m
    while i or j:  # where several paths cost the same, sclite's choice: diagonal, then insertion
        if diagonal[i, j]:
            i, j = i - 1, j - 1
            pairs.append((reference[i], hypothesis[j]))
        elif insert[i, j]:
            j -= 1
            pairs.append((None, hypothesis[j]))
        else:
            i -= 1
            pairs.append((reference[i], None))
    return pairs[::-1]


@dataclass(frozen=True)
class Counts:
    """Alignment counts; they add up."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @classmethod
    def of(cls, pairs: Iterable[tuple[str | None, str | None]]) -> "Counts":
        hits = substitutions = deletions = insertions = 0
        for reference, hypothesis in pairs:
            if reference is None:
                insertions += 1
            elif hypothesis is None:
                deletions += 1
            elif reference == hypothesis:
                hits += 1
            else:
                substitutions += 1
        return cls(hits, substitutions, deletions, insertions)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def reference_length(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Errors for each reference token; None where there is no reference token to divide by."""
        return self.errors / self.reference_length if self.reference_length else None


@dataclass(frozen=True)
class Utterance:
    key: str
    words: Counts
    characters: Counts
    pairs: list[tuple[str | None, str | None]]
    hallucination: str  # "refusal", "loop" or ""


@dataclass(frozen=True)
class Score:
    """WER and CER of a set. `faithful` is the WER after leaving out the utterances that are plain hallucinations."""

    utterances: list[Utterance]
    missing: list[str]

    @property
    def words(self) -> Counts:
        return sum((u.words for u in self.utterances), Counts())

    @property
    def characters(self) -> Counts:
        return sum((u.characters for u in self.utterances), Counts())

    @property
    def faithful(self) -> Counts:
        return sum((u.words for u in self.utterances if not u.hallucination), Counts())


def hallucination(reference: str, hypothesis: str) -> str:
    """ "refusal", "loop" or "": whether a hypothesis is plainly no transcript (basic normalisation).

    A refusal begins as REFUSAL says where the reference does not. A loop says a unit of at most LOOP_UNIT tokens at least
    LOOP_TIMES in a row and is longer than the reference.
    """
    ref, hyp = (" ".join(_basic(text).split()) for text in (reference, hypothesis))
    if REFUSAL.match(hyp) and not REFUSAL.match(ref):
        return "refusal"
    ref_tokens, tokens = _chinese(ref).split(), _chinese(hyp).split()
    for unit in range(1, LOOP_UNIT + 1) if len(tokens) > len(ref_tokens) else ():
        run = 0
        for earlier, later in zip(tokens, tokens[unit:], strict=False):
            run = run + 1 if earlier == later else 0
            if run >= unit * (LOOP_TIMES - 1):
                return "loop"
    return ""


def score(references: dict[str, str], hypotheses: dict[str, str], normalize: Callable[[str], str] = _basic) -> Score:
    """Score hypotheses against references, both key → text, in the references' order.

    A missing hypothesis counts as deletions. Raises ScoreError for a hypothesis whose key no reference has.
    """
    unknown = [key for key in hypotheses if key not in references]
    if unknown:
        raise ScoreError(f"{len(unknown)} keys are not in the reference, the first is {unknown[0]!r}: is it the same set?")
    utterances = []
    for key, reference in references.items():
        hypothesis = hypotheses.get(key, "")
        ref, hyp = normalize(reference).split(), normalize(hypothesis).split()
        pairs = align(ref, hyp)
        characters = Counts.of(align(list("".join(ref)), list("".join(hyp))))
        utterances.append(Utterance(key, Counts.of(pairs), characters, pairs, hallucination(reference, hypothesis)))
    return Score(utterances, [key for key in references if key not in hypotheses])


def read_texts(path: str | Path) -> dict[str, str]:
    """key → text of a jsonl (`key` or `wav`, `txt`) or of lines `key text`; raises ScoreError naming file and line."""
    texts: dict[str, str] = {}
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ScoreError(f"{path}: cannot read ({error.strerror})") from None
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").rstrip("\r")
        except UnicodeDecodeError as error:
            raise ScoreError(f"{path}:{number}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
        if not line.strip():
            continue
        json_line = line.lstrip().startswith("{") or str(path).endswith(".jsonl")
        key, text = _json_line(line, f"{path}:{number}") if json_line else _text_line(line)
        if key in texts:
            raise ScoreError(f"{path}:{number}: key {key!r} was seen before: keys must be unique")
        texts[key] = text
    return texts


def _text_line(line: str) -> tuple[str, str]:
    key, *text = line.split(maxsplit=1)
    return key, text[0] if text else ""


def _json_line(line: str, where: str) -> tuple[str, str]:
    try:
        item = json.loads(line)
        key, text = item.get("key", item.get("wav")), item.get("txt")
        start, end = item.get("start"), item.get("end")
        if "key" not in item and (start, end) != (None, None):  # a part of a file: manifest.py's rule
            key = f"{key}-{round((start or 0) * 1000)}-{'end' if end is None else round(end * 1000)}"
    except (ValueError, AttributeError, TypeError):
        raise ScoreError(f"{where}: not a JSON object") from None
    if not isinstance(key, str) or not isinstance(text, str):
        raise ScoreError(f'{where}: needs the fields "key" (or "wav") and "txt", both texts')
    return key, text


def _percent(counts: Counts) -> str:
    return "n/a (no reference)" if counts.rate is None else f"{100 * counts.rate:.2f} %"


def _line(name: str, counts: Counts, unit: str) -> str:
    parts = f"S {counts.substitutions}, D {counts.deletions}, I {counts.insertions}"
    return f"{name}: {_percent(counts)} ({parts}; {counts.reference_length} reference {unit})"


def report(result: Score, normalizer_name: str) -> str:
    """What the command line prints."""
    left_out = [u.hallucination for u in result.utterances if u.hallucination]
    lines = [
        f"normalizer: {normalizer_name}; {len(result.utterances)} utterances",
        _line("WER", result.words, "words"),
        _line("CER", result.characters, "characters"),
        _line("WER without hallucinations", result.faithful, "words")
        + f"; left out: {left_out.count('refusal')} refusals, {left_out.count('loop')} loops",
    ]
    if result.missing:
        some = ", ".join(result.missing[:5]) + (", …" if len(result.missing) > 5 else "")
        lines.append(f"missing hypotheses, counted as deletions: {len(result.missing)} ({some})")
    return "\n".join(lines)


def aligned(utterance: Utterance) -> str:
    """Two lines, one pair above the other, gaps as asterisks, errors in capitals, after a line of counts."""
    rows: tuple[list[str], list[str]] = ([], [])
    for pair in utterance.pairs:
        wrong = pair[0] != pair[1]
        cells = ["*" * len(next(filter(None, pair))) if token is None else token for token in pair]
        width = max(map(len, cells))
        for row, cell in zip(rows, cells, strict=True):
            row.append((cell.upper() if wrong else cell).ljust(width))
    note = f" [{utterance.hallucination}]" if utterance.hallucination else ""
    head = f"{utterance.key}: {_percent(utterance.words)}, {utterance.words.errors} errors{note}"
    return "\n".join([head, f"  REF: {' '.join(rows[0])}".rstrip(), f"  HYP: {' '.join(rows[1])}".rstrip()])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", required=True, help="jsonl, or lines `key text`")
    parser.add_argument("--hyp", required=True, help="result.txt: lines `key text`, or jsonl")
    parser.add_argument("--normalizer", choices=NORMALIZERS, default="basic", help="default: basic")
    parser.add_argument("--per_utterance", action="store_true", help="aligned pairs, most errors first")
    args = parser.parse_args(argv)
    try:
        result = score(read_texts(args.ref), read_texts(args.hyp), normalizer(args.normalizer))
    except ScoreError as error:
        sys.exit(f"error: {error}")
    if args.per_utterance:
        worst = sorted(result.utterances, key=lambda u: (u.words.errors, u.words.rate or 0), reverse=True)
        print("\n".join(map(aligned, worst)), end="\n\n")
    print(report(result, args.normalizer))


if __name__ == "__main__":
    main()
