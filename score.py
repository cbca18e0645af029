"""Reference and hypothesis → WER and CER, joined by key.

    python score.py --ref test.jsonl --hyp result.txt
    python score.py --ref test.jsonl --hyp result.txt --normalizer english --per_utterance --errors --html report.html
    python score.py --ref test=test.jsonl dev=dev.jsonl --hyp old=old/test.txt old=old/dev.txt new=new/{test,dev}.txt

References and hypotheses are jsonl (fields `key` or `wav`, and `txt` or `text`), tsv (columns of those names) or lines
`key text`. Alignment and counts are those of NIST sclite (align.py). CER is over characters other than spaces, as
`sclite -c` counts them; MER over Chinese and Japanese characters and the words of other scripts.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare
from align import Counts, align, alignments
from normalize import HAS_CJK, NORMALIZERS, basic, mixed, none, normalizer, versioned
from score_page import clips, write_page
from texts import ScoreError, read_texts, write_trn

# A refusal is no transcript: these openings, unless the reference has one too.
UNABLE = r"(i|we)('m| am|'re| are)? (can't|cannot|can not|unable to|not able to|don't have)"
REFUSAL = re.compile(
    rf"((i'm|i am|we're|we are) )?sorry (but )?{UNABLE}|{UNABLE} (transcribe|hear|listen|process|access|assist|help)"
    r"|as an? (ai|artificial|language model)|(很抱歉|抱歉|对不起) ?我(无法|不能|没有)|作为(一个|一名)? ?(人工智能|ai)"
)
RESAMPLES = 10_000
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


# --- several systems on several sets


@dataclass(frozen=True)
class TestSet:
    """A set, and its results by system."""

    name: str
    path: Path  # of the reference
    fields: dict[str, dict[str, Any]]  # of the reference: name → key → value
    results: dict[str, Score]
    raw: dict[str, Score]  # without normalisation

    def groups(self, field: str, result: Score) -> dict[str, Score]:
        """A result's parts by what the field says, in alphabetical order; durations by size."""
        values, parts, missing = self.fields[field], {}, set(result.missing)
        for utterance in result.utterances:
            part = parts.setdefault(compare.group(field, values.get(utterance.key)), Score([], []))
            part.utterances.append(utterance)
            part.missing.extend([utterance.key] if utterance.key in missing else [])
        return {group: parts[group] for group in sorted(parts, key=compare.group_order)}


def read_and_score(name: str, path: str, files: dict[str, str], args: argparse.Namespace, with_raw: bool) -> TestSet:
    """A reference and the systems' files; raises ScoreError."""
    fields: dict[str, dict] = {field: {} for field in ("duration", "wav", "start", "end", args.by) if field}
    references, results, raw = read_texts(path, fields), {}, {}
    if args.by and not fields[args.by]:
        raise ScoreError(f'{path}: no line has the field "{args.by}"')
    for system, file in files.items():
        hypotheses = read_texts(file, text_field="text")
        try:
            results[system] = score(references, hypotheses, normalizer(args.normalizer))
        except ScoreError as error:
            raise ScoreError(f"{file}: {error}") from None
        raw |= {system: score(references, hypotheses, none)} if with_raw else {}
    return TestSet(name, Path(path), fields, results, raw)


def table_rows(test: TestSet, by: str | None, resamples: int, seed: int) -> Iterator[dict[str, Any]]:
    """A row of numbers for each system and group, and for each system; the latter beside the first system's."""
    first = None
    for system, result in test.results.items():
        where, raw = {"system": system, "set": test.name}, test.raw.get(system)
        if by:
            raws = test.groups(by, raw)
            for group, part in test.groups(by, result).items():
                yield where | {by: group} | compare.row(part, raws[group])
        yield where | ({by: "all"} if by else {}) | compare.row(result, raw, first, resamples, seed)
        first = first or result


# --- what is printed


def _percent(counts: Counts) -> str:
    return "n/a (no reference)" if counts.rate is None else f"{100 * counts.rate:.2f} %"


def _line(name: str, counts: Counts, unit: str) -> str:
    parts = f"S {counts.substitutions}, D {counts.deletions}, I {counts.insertions}"
    return f"{name}: {_percent(counts)} ({parts}; {counts.reference_length} reference {unit})"


def report(result: Score, normalizer_name: str) -> str:
    """What the command line prints of one result."""
    left_out = [u.hallucination for u in result.utterances if u.hallucination]
    lines = [
        f"normalizer: {versioned(normalizer_name)}; {len(result.utterances)} utterances",
        _line("WER", result.words, "words"),
        _line("CER", result.characters, "characters"),
        _line("WER without hallucinations", result.faithful, "words")
        + f"; left out: {left_out.count('refusal')} refusals, {left_out.count('loop')} loops",
    ]
    if result.mixed != result.words:
        lines.insert(3, _line("MER", result.mixed, "words and Chinese or Japanese characters"))
    if result.missing:
        lines.append(missing(result))
    return "\n".join(lines)


def missing(result: Score) -> str:
    some = ", ".join(result.missing[:5]) + (", …" if len(result.missing) > 5 else "")
    return f"missing hypotheses, counted as deletions: {len(result.missing)} ({some})"


def aligned(utterance: Utterance) -> str:
    """Two lines, one pair above the other, gaps as asterisks, errors in capitals, after a line of counts."""
    rows: tuple[list[str], list[str]] = ([], [])
    for pair in utterance.pairs:
        wrong = pair[0] != pair[1]
        cells = ["*" * len(next(filter(None, pair))) if token is None else token for token in pair]
        width = max(map(len, cells))
        for row, cell in zip(rows, cells, strict=True):
            row.append((cell.upper() if wrong else cell).ljust(width))
    head = f"{summary(utterance)}\n  REF: {' '.join(rows[0])}".rstrip()
    return "\n".join([head, f"  HYP: {' '.join(rows[1])}".rstrip()])


def summary(utterance: Utterance) -> str:
    note = f" [{utterance.hallucination}]" if utterance.hallucination else ""
    return f"{utterance.key}: {_percent(utterance.words)}, {utterance.words.errors} errors{note}"


def worst(result: Score) -> list[Utterance]:
    return sorted(result.utterances, key=lambda u: (u.words.errors, u.words.rate or 0), reverse=True)


def errors(test: TestSet, result: Score, most: int) -> dict[str, Any]:
    """The most frequent errors and worst clips, at most so many of each; WER by duration where durations are known."""
    found = compare.frequent_errors([(u.reference, u.hypothesis) for u in result.utterances])
    told: dict[str, Any] = {kind: dict(counter.most_common(most)) for kind, counter in found.items()}
    told["worst"] = [summary(u) for u in worst(result)[:most] if u.words.errors]
    parts = test.groups("duration", result) if test.fields["duration"] else {}
    return told | {"durations": {name: _percent(part.words) for name, part in parts.items()}}


def error_lines(told: dict[str, Any]) -> list[str]:
    lines = []
    for kind in ("substitutions", "deletions", "insertions"):
        lines.append(f"most frequent {kind}: " + (", ".join(f"{n} × {what}" for what, n in told[kind].items()) or "none"))
    lines += ["worst clips:", *(f"  {line}" for line in told["worst"])]
    by_duration = ", ".join(f"{name} {rate}" for name, rate in told["durations"].items())
    return lines + ([f"WER by duration: {by_duration}"] if by_duration else [])


def text_lines(tests: list[TestSet], rows: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[str]:
    """All that is printed, when it is not csv or json."""
    single = len(tests) * len(tests[0].results) == 1
    for test in tests:
        for system, result in test.results.items():
            title = [] if single else [f"{system} on {test.name}:"]
            if args.per_utterance:
                yield from [*title, *map(aligned, worst(result)), ""]
            if single and not args.format:
                yield report(result, args.normalizer)
            elif result.missing:
                yield f"{system} on {test.name}: {missing(result)}"
            if args.errors:
                yield from [*title, *error_lines(errors(test, result, args.errors)), ""][: None if title else -1]
    if not single or args.by or args.format:
        yield compare.markdown(rows, args.by)
        yield f"normalizer: {versioned(args.normalizer)}; {sum(len(test.results[system].utterances) for test in tests)} utterances"
    for row in rows:
        if row.get("p") is not None:
            yield compare.verdict(row, next(iter(tests[0].results)))
        elif single and "WER low" in row:
            yield f"95 % of resamples: WER {row['WER low']:.2f} to {row['WER high']:.2f} %"
    if args.bootstrap:
        yield f"(paired bootstrap over utterances, {args.bootstrap} resamples, seed {args.seed})"


# --- the command line


def named(given: list[str]) -> list[tuple[str, str]]:
    """NAME=FILE or FILE → (name or "", file)."""
    return [("", item) if "=" not in item or Path(item).exists() else tuple(item.split("=", 1)) for item in given]


def files_by_name(refs: list[str], hyps: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Set → reference, and system → hypotheses, one for each set in that order; raises ScoreError."""
    sets, systems = {}, {}
    for name, file in named(refs):
        if sets.setdefault(name or Path(file).stem, file) != file:
            raise ScoreError(f"--ref: two sets are called {name or Path(file).stem}: name them, NAME={file}")
    stems = [Path(file).stem for _, file in named(hyps)]
    for name, file in named(hyps):
        unnamed = "result" if len(sets) > 1 else Path(file).stem if stems.count(Path(file).stem) == 1 else file
        systems.setdefault(name or unnamed, []).append(file)
    for name, files in systems.items():
        if len(files) != len(sets):
            raise ScoreError(
                f"--hyp: {len(files)} files of {name} for {len(sets)} sets ({', '.join(sets)}): give one for each, in the order "
                "of --ref; with several systems each as NAME=FILE"
            )
    return sets, systems


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", required=True, nargs="+", metavar="[SET=]FILE", help="jsonl, or lines `key text`")
    parser.add_argument(
        *("--hyp", "--hyps"),
        required=True,
        nargs="+",
        metavar="[SYSTEM=]FILE",
        help="result.txt, .jsonl or .tsv; with several sets each system has a file for each, in the order of --ref",
    )
    parser.add_argument("--normalizer", choices=NORMALIZERS, default="basic", help="default: basic")
    parser.add_argument("--by", metavar="FIELD", help="a row for each value of this field of --ref: speaker, duration, …")
    parser.add_argument("--format", choices=("markdown", "csv", "json"), help="of the table; rates in percent")
    parser.add_argument("--bootstrap", type=int, metavar="N", help="resamples for intervals; 10,000 with several systems")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument("--errors", type=int, nargs="?", const=10, metavar="N", help="the N most frequent, and worst clips")
    parser.add_argument("--per_utterance", action="store_true", help="aligned pairs, most errors first")
    parser.add_argument("--trn", type=Path, nargs="?", const=Path(), metavar="DIR", help="write ref.trn, hyp.trn for sclite")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page to look at")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    try:
        run(arguments(argv))
    except ScoreError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: cannot write ({error.strerror})")


def run(args: argparse.Namespace) -> None:
    sets, systems = files_by_name(args.ref, args.hyp)
    single = len(sets) * len(systems) == 1
    if args.format in ("csv", "json") and args.per_utterance or args.format == "csv" and args.errors:
        raise ScoreError("--per_utterance is text, and so is --errors beside --format csv: leave --format away")
    if args.bootstrap is None:
        args.bootstrap = 0 if single else RESAMPLES
    tests = [
        read_and_score(
            name,
            path,
            {system: files[place] for system, files in systems.items()},
            args,
            not single or bool(args.by or args.format),
        )
        for place, (name, path) in enumerate(sets.items())
    ]
    rows = [row for test in tests for row in table_rows(test, args.by, args.bootstrap, args.seed)]
    version = versioned(args.normalizer)
    if args.format == "json":
        found = [
            {"system": system, "set": test.name} | errors(test, result, args.errors or 0)
            for test in tests
            for system, result in test.results.items()
        ]
        told = {"normalizer": version, "resamples": args.bootstrap, "seed": args.seed, "rows": rows}
        print(json.dumps(told | ({"errors": found} if args.errors else {}), ensure_ascii=False, indent=1))
    elif args.format == "csv":
        writer = csv.DictWriter(sys.stdout, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print("\n".join(text_lines(tests, rows, args)))
    for test in tests if args.trn else ():
        for system, result in test.results.items():
            folder = args.trn if single else args.trn / system / test.name
            folder.mkdir(parents=True, exist_ok=True)
            write_trn(folder / "ref.trn", ((u.key, u.reference) for u in result.utterances))
            write_trn(folder / "hyp.trn", ((u.key, u.hypothesis) for u in result.utterances))
    if args.html:
        totals = [row for row in rows if row.get(args.by, "all") == "all"]
        data = {"systems": list(systems), "sets": list(sets), "normalizer": version, "rows": totals}
        write_page(args.html, data | {"clips": [clip for test in tests for clip in clips(test, args.html, args.by)]})


if __name__ == "__main__":
    main()
