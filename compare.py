"""What is told of several results: a row of numbers for each, which is better, and where they err."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from align import alignments, paired

if TYPE_CHECKING:
    from score import Score

TABLE = 4_000_000  # numbers held at a time
EDGES = (1, 2, 5, 10, 20, 30)  # seconds
BUCKETS = [f"{low}–{high} s" for low, high in zip((0, *EDGES), EDGES, strict=False)] + [f"{EDGES[-1]} s and more"]


def resampled_rates(errors: np.ndarray, lengths: np.ndarray, times: int, seed: int) -> np.ndarray:
    """Rates (times, systems) of as many utterances drawn with replacement, the same ones for every system.

    errors (utterances, systems) and lengths (utterances,) are counts. The bootstrap of Bisani and Ney, "Bootstrap estimates
    for confidence intervals in ASR performance evaluation", ICASSP 2004. Utterances with the same counts are drawn together,
    by a multinomial, which is the same in distribution and takes a fraction of the time.
    """
    kinds, count = np.unique(np.column_stack([errors, lengths]), axis=0, return_counts=True)  # (kinds, systems + 1)
    random, share = np.random.default_rng(seed), count / count.sum()
    step = max(1, TABLE // len(kinds))
    sums = [
        random.multinomial(len(lengths), share, size=min(step, times - done)) @ kinds  # (step, systems + 1)
        for done in range(0, times, step)
    ]
    sums = np.concatenate(sums)
    return sums[:, :-1] / np.maximum(sums[:, -1:], 1)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided: how often resampling turns the difference round, or makes it nothing."""
    rarer = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return float(min(1, 2 * (rarer + 1) / (len(differences) + 1)))


def frequent_errors(texts: Sequence[tuple[str, str]]) -> dict[str, Counter]:
    """How often each substitution "said → written", deletion and insertion stands in the alignments of texts' words."""
    wrong = [(ref, hyp) for ref, hyp in texts if ref != hyp]
    found: dict[str, Counter] = {"substitutions": Counter(), "deletions": Counter(), "insertions": Counter()}
    for (ref, hyp), steps in zip(wrong, alignments((ref.split(), hyp.split()) for ref, hyp in wrong), strict=True):
        for said, written in paired(ref.split(), hyp.split(), steps):
            if said is None:
                found["insertions"][written] += 1
            elif written is None:
                found["deletions"][said] += 1
            elif said != written:
                found["substitutions"][f"{said} → {written}"] += 1
    return found


def group(field: str, value: Any) -> str:
    """The name of the group that a manifest's value falls into: for durations one of BUCKETS, else the value."""
    if field == "duration" and isinstance(value, int | float):
        return BUCKETS[int(np.searchsorted(EDGES, value, side="right"))]
    return "(none)" if value is None else str(value)


def group_order(name: str) -> tuple[int, str]:
    return (BUCKETS.index(name) if name in BUCKETS else -1, name)


def row(result: "Score", raw: "Score | None", first: "Score | None" = None, times: int = 0, seed: int = 0) -> dict[str, Any]:
    """Numbers of one result, rates in percent; with `times` resamples intervals, and the difference to a `first` result."""
    words, rates = result.words, {"WER": result.words, "CER": result.characters}
    if result.mixed != words:
        rates["MER"] = result.mixed
    if raw:
        rates |= {"raw WER": raw.words, "raw CER": raw.characters}
    numbers: dict[str, Any] = {"utterances": len(result.utterances), "missing": len(result.missing)}
    numbers |= {name: percent(counts.rate) for name, counts in rates.items()}
    numbers |= {"S": words.substitutions, "D": words.deletions, "I": words.insertions, "words": words.reference_length}
    numbers["WER without hallucinations"] = percent(result.faithful.rate)
    if times and words.reference_length:
        both = [result, first] if first else [result]
        errors = np.array([[u.words.errors for u in one.utterances] for one in both]).T  # (utterances, 1 or 2)
        lengths = np.array([u.words.reference_length for u in result.utterances])
        drawn = resampled_rates(errors, lengths, times, seed)  # (times, 1 or 2)
        numbers["WER low"], numbers["WER high"] = map(percent, interval(drawn[:, 0]))
        if first:
            numbers["difference"] = percent(words.rate - first.words.rate)
            numbers["difference low"], numbers["difference high"] = map(percent, interval(drawn[:, 0] - drawn[:, 1]))
            numbers["p"] = p_value(drawn[:, 0] - drawn[:, 1])
    return numbers


def percent(rate: float | None) -> float | None:
    return None if rate is None else round(100 * rate, 4)


def markdown(rows: Sequence[dict[str, Any]], by: str | None) -> str:
    """Rows are systems (and groups), columns the sets' rates."""
    rates = [name for name in ("WER", "CER", "MER", "raw WER", "raw CER") if any(name in row for row in rows)]
    sets = list(dict.fromkeys(row["set"] for row in rows))
    cells = {(row["system"], row.get(by), row["set"]): row for row in rows}
    heads = ["system", *([by] if by else []), *(f"{name} {rate}" for name in sets for rate in rates)]
    lines = ["| " + " | ".join(map(_cell, heads)) + " |", "|---" * len(heads) + "|"]
    for system, group in dict.fromkeys((system, group) for system, group, _ in cells):
        found = [cells.get((system, group, name), {}).get(rate) for name in sets for rate in rates]
        numbers = ["–" if number is None else f"{number:.2f}" for number in found]
        lines.append("| " + " | ".join([_cell(system), *([_cell(group)] if by else []), *numbers]) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def verdict(row: dict[str, Any], first: str) -> str:
    """Whether a row's system is better than the first, in words."""
    low, high = row["difference low"], row["difference high"]
    better = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    against = f"{row['system']} against {first} on {row['set']}: WER {row['difference']:+.2f} points"
    return f"{against} (95 %: {low:+.2f} to {high:+.2f}), p = {row['p']:.4f}: {better}"
