"""What is told of several results: a row of numbers for each, which is better, and where they err."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align import alignments, paired
from scoring import Score
from texts import ScoreError

TABLE = 4_000_000  # numbers held at a time
ALL = "(all)"  # the group of every clip
EDGES = (1, 2, 5, 10, 20, 30)  # seconds
BUCKETS = [f"{low}–{high} s" for low, high in zip((0, *EDGES), EDGES, strict=False)] + [f"{EDGES[-1]} s and more"]


@dataclass(frozen=True)
class ScoredSet:
    """A set, and its results by system."""

    name: str
    path: Path  # of the reference
    fields: dict[str, dict[str, Any]]  # of the reference: name → key → value
    results: dict[str, Score]
    raw: dict[str, Score]  # without normalisation; or empty

    def groups(self, result: Score, field: str) -> dict[str, Score]:
        """A result's parts by what the field says, in alphabetical order; durations by size."""
        parts: dict[str, Score] = {}
        missing = set(result.missing)
        for utterance in result.utterances:
            name = group(field, self.fields[field].get(utterance.key))
            part = parts.setdefault(name, Score([], []))
            part.utterances.append(utterance)
            part.missing.extend([utterance.key] if utterance.key in missing else [])
        return {
            name: parts[name] for name in sorted(parts, key=lambda name: (name in BUCKETS and BUCKETS.index(name), name))
        }

    def rows(self, by: str | None, resamples: int, seed: int) -> Iterator[dict[str, Any]]:
        """A row of numbers for each system and group, and for each system, the latter compared with the first one's.

        Raises ScoreError for a field named like a number.
        """
        first = None
        for system, result in self.results.items():
            where, raw = {"system": system, "set": self.name}, self.raw.get(system)
            total = rates(result, raw)
            total |= compared(result, first, resamples, seed) if resamples and result.words.reference_length else {}
            if by in where | total:
                raise ScoreError(f"--by {by}: the table has a column of that name: call the field of {self.path} otherwise")
            if by:
                raws = self.groups(raw, by) if raw else {}
                for name, part in self.groups(result, by).items():
                    yield where | {by: name} | rates(part, raws.get(name))
            yield where | ({by: ALL} if by else {}) | total
            first = first or result

    def error_lines(self, result: Score, most: int) -> Iterator[str]:
        """The most frequent errors and the worst clips, so many of each; WER by duration where durations are known."""
        for kind, counter in frequent_errors(result).items():
            found = ", ".join(f"{times} × {what}" for what, times in counter.most_common(most))
            yield f"most frequent {kind}: {found or 'none'}"
        yield "worst clips:"
        yield from (f"  {utterance}" for utterance in result.worst[:most] if utterance.words.errors)
        if self.fields["duration"]:
            parts = self.groups(result, "duration").items()
            yield "WER by duration: " + ", ".join(f"{name} {part.words.percent}" for name, part in parts)


def group(field: str, value: Any) -> str:
    """The name of the group that a manifest's value falls into: for durations one of BUCKETS, else the value."""
    if field == "duration" and (length := seconds(value)) is not None:
        return BUCKETS[int(np.searchsorted(EDGES, length, side="right"))]
    return "(none)" if value is None else str(value)


def seconds(duration: Any) -> float | None:
    """A manifest's duration, which a tsv has as a text; None if it is no finite number."""
    try:
        return float(duration) if math.isfinite(float(duration)) else None
    except (TypeError, ValueError, OverflowError):
        return None


def frequent_errors(result: Score) -> dict[str, Counter[str]]:
    """How often each substitution "said → written", deletion and insertion of words stands in the alignments."""
    wrong = [(u.reference, u.hypothesis) for u in result.utterances if u.words.errors]
    found: dict[str, Counter[str]] = {"substitutions": Counter(), "deletions": Counter(), "insertions": Counter()}
    for (ref, hyp), steps in zip(wrong, alignments((ref.split(), hyp.split()) for ref, hyp in wrong), strict=True):
        for said, written in paired(ref.split(), hyp.split(), steps):
            if said is None:
                found["insertions"][written] += 1
            elif written is None:
                found["deletions"][said] += 1
            elif said != written:
                found["substitutions"][f"{said} → {written}"] += 1
    return found


def rates(result: Score, raw: Score | None) -> dict[str, Any]:
    """Numbers of one result; rates in percent, None without a reference word."""
    words, counts = result.words, {"WER": result.words, "CER": result.characters, "MER": result.mixed}
    counts |= {"raw WER": raw.words, "raw CER": raw.characters} if raw else {}
    numbers: dict[str, Any] = {"utterances": len(result.utterances), "missing": len(result.missing)}
    numbers |= {name: percent(count.rate) for name, count in counts.items()}
    numbers |= {"S": words.substitutions, "D": words.deletions, "I": words.insertions, "words": words.reference_length}
    return numbers | {"WER without hallucinations": percent(result.faithful.rate)}


def percent(rate: float | None) -> float | None:
    return None if rate is None else round(100 * rate, 4)


def compared(result: Score, first: Score | None, resamples: int, seed: int) -> dict[str, Any]:
    """The middle 95 % of a result's resampled WERs, in percent; and how it differs from a first result of the same set.

    p is two-sided: how often resampling turns the difference round, or makes it nothing, doubled.
    """
    both = [result, first] if first else [result]
    errors = np.array([[u.words.errors for u in one.utterances] for one in both]).T  # (utterances, 1 or 2)
    lengths = np.array([u.words.reference_length for u in result.utterances])  # (utterances,)
    drawn = 100 * resampled_rates(errors, lengths, resamples, seed)  # (resamples, 1 or 2)
    low, high = np.percentile(drawn[:, 0], (2.5, 97.5)).round(4).tolist()
    numbers = {"WER low": low, "WER high": high}
    if first:
        differences = drawn[:, 0] - drawn[:, 1]  # (resamples,)
        low, high = np.percentile(differences, (2.5, 97.5)).round(4).tolist()
        rarer = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
        numbers |= {
            "difference": percent(result.words.rate - first.words.rate),
            "difference low": low,
            "difference high": high,
        }
        numbers |= {"p": min(1.0, 2 * (rarer + 1) / (resamples + 1))}
    return numbers


def resampled_rates(errors: np.ndarray, lengths: np.ndarray, times: int, seed: int) -> np.ndarray:
    """Rates (times, systems) of as many utterances drawn with replacement, the same ones for every system.

    errors (utterances, systems) and lengths (utterances,) are counts. The bootstrap of Bisani and Ney, "Bootstrap estimates
    for confidence intervals in ASR performance evaluation", ICASSP 2004. Utterances with the same counts are drawn together,
    by a multinomial, which is the same in distribution and takes a fraction of the time.
    """
    kinds, count = np.unique(np.column_stack([errors, lengths]), axis=0, return_counts=True)  # (kinds, systems + 1)
    random, share, step = np.random.default_rng(seed), count / count.sum(), max(1, TABLE // len(count))
    drawn = [
        random.multinomial(len(lengths), share, size=min(step, times - done)) @ kinds  # (step, systems + 1)
        for done in range(0, times, step)
    ]
    sums = np.concatenate(drawn)
    return sums[:, :-1] / np.maximum(sums[:, -1:], 1)


def markdown(rows: Sequence[dict[str, Any]], by: str | None) -> str:
    """Rows are systems (and groups), columns the sets' rates."""
    names = [name for name in ("WER", "CER", "MER", "raw WER", "raw CER") if any(name in row for row in rows)]
    sets = dict.fromkeys(row["set"] for row in rows)
    cells = {(row["system"], row.get(by), row["set"]): row for row in rows}
    heads = ["system", *([by] if by else []), *(f"{test} {name}" for test in sets for name in names)]
    lines = [heads, ["---"] * len(heads)]
    for system, part in dict.fromkeys((system, part) for system, part, _ in cells):
        found = [cells.get((system, part, test), {}).get(name) for test in sets for name in names]
        lines.append([system, *([part] if by else []), *("–" if rate is None else f"{rate:.2f}" for rate in found)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def verdict(row: dict[str, Any], first: str) -> str:
    """Whether a row's system is better than the first, in words."""
    low, high = row["difference low"], row["difference high"]
    better = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    against = f"{row['system']} against {first} on {row['set']}: WER {row['difference']:+.2f} points"
    return f"{against} (95 %: {low:+.2f} to {high:+.2f}), p = {row['p']:.4f}: {better}"
