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
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from align import Counts, align, alignments
from compare import ALL, ScoredSet, markdown, verdict
from normalize import HAS_CJK, NORMALIZERS, basic, mixed, none, normalizer, versioned
from score_page import write_page
from texts import ScoreError, files_by_name, read_texts, write_trn

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


# --- what is printed


def _line(name: str, counts: Counts, unit: str) -> str:
    parts = f"S {counts.substitutions}, D {counts.deletions}, I {counts.insertions}"
    return f"{name}: {counts.percent} ({parts}; {counts.reference_length} reference {unit})"


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
        lines.append(_line("MER", result.mixed, "words and Chinese or Japanese characters"))
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
    lines = [str(utterance), f"  REF: {' '.join(rows[0])}".rstrip(), f"  HYP: {' '.join(rows[1])}".rstrip()]
    return "\n".join(lines)


def paragraphs(tests: list[ScoredSet], rows: list[dict], args: argparse.Namespace) -> Iterator[str]:
    """What is printed when it is neither csv nor json."""
    single = len(tests) == len(tests[0].results) == 1
    for test in tests:
        for system, result in test.results.items():
            said = [*map(aligned, result.worst), ""] if args.per_utterance else []
            if single and not args.format:
                said.append(report(result, args.normalizer))
            elif result.missing:
                said.append(missing(result))
            said += test.error_lines(result, args.errors) if args.errors else []
            if said:
                yield "\n".join(said if single else [f"{system} on {test.name}:", *said])
    if not single or args.by or args.format:
        yield markdown(rows, args.by)
    notes = [] if single and not args.format else [f"normalizer: {versioned(args.normalizer)}"]
    notes += [verdict(row, next(iter(tests[0].results))) for row in rows if "p" in row]
    if single and args.bootstrap:
        notes += [
            f"WER of 95 % of the resamples: {row['WER low']:.2f} to {row['WER high']:.2f} %"
            for row in rows
            if "WER low" in row
        ]
    if args.bootstrap:
        notes.append(f"(paired bootstrap over utterances: {args.bootstrap} resamples, seed {args.seed})")
    if notes:
        yield "\n".join(notes)


# --- the command line


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", required=True, nargs="+", metavar="[SET=]FILE", help="jsonl, or lines `key text`")
    parser.add_argument(
        "--hyp",
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


def read_and_score(name: str, path: str, files: dict[str, str], args: argparse.Namespace, with_raw: bool) -> ScoredSet:
    """A reference and the systems' files; raises ScoreError."""
    fields: dict[str, dict] = {field: {} for field in ("duration", "wav", "start", "end", args.by) if field}
    references, results, raw = read_texts(path, fields), {}, {}
    if not references:
        raise ScoreError(f"{path}: no line in it")
    if args.by and not fields[args.by]:
        raise ScoreError(f'{path}: no line has the field "{args.by}"')
    for system, file in files.items():
        hypotheses = read_texts(file, text_field="text")
        try:
            results[system] = score(references, hypotheses, normalizer(args.normalizer))
        except ScoreError as error:
            raise ScoreError(f"{file}: {error}") from None
        raw |= {system: score(references, hypotheses, none)} if with_raw else {}
    return ScoredSet(name, Path(path), fields, results, raw)


def main(argv: list[str] | None = None) -> None:
    try:
        run(arguments(argv))
    except ScoreError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # score.py … | head has seen enough; what is not yet flushed would be an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(args: argparse.Namespace) -> None:
    sets, systems = files_by_name(args.ref, args.hyp)
    single = len(sets) == len(systems) == 1
    if args.format in ("csv", "json") and (args.per_utterance or args.errors):
        raise ScoreError("--per_utterance and --errors are text: leave --format away")
    for flag in ("bootstrap", "errors", "seed"):
        if (getattr(args, flag) or 0) < 0:
            raise ScoreError(f"--{flag} {getattr(args, flag)}: a number from 0 on")
    if args.bootstrap is None:
        args.bootstrap = 0 if single else RESAMPLES
    with_raw = args.normalizer != "none" and (not single or bool(args.by or args.format))
    tests = [
        read_and_score(name, path, {system: files[place] for system, files in systems.items()}, args, with_raw)
        for place, (name, path) in enumerate(sets.items())
    ]
    rows = [row for test in tests for row in test.rows(args.by, args.bootstrap, args.seed)]
    if all(row["MER"] == row["WER"] for row in rows):  # neither Chinese nor Japanese
        for row in rows:
            del row["MER"]
    write_files(tests, rows, args)
    if args.format == "json":
        told = {"normalizer": versioned(args.normalizer), "resamples": args.bootstrap, "seed": args.seed, "rows": rows}
        print(json.dumps(told, ensure_ascii=False, indent=1))
    elif args.format == "csv":
        writer = csv.DictWriter(sys.stdout, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        print("\n\n".join(paragraphs(tests, rows, args)))
    sys.stdout.flush()


def write_files(tests: list[ScoredSet], rows: list[dict], args: argparse.Namespace) -> None:
    """--trn and --html; raises ScoreError."""
    single = len(tests) == len(tests[0].results) == 1
    try:
        for test in tests if args.trn else ():
            for system, result in test.results.items():
                folder = args.trn if single else args.trn / re.sub(r"[^\w.-]", "_", f"{system}.{test.name}")
                folder.mkdir(parents=True, exist_ok=True)
                write_trn(folder / "ref.trn", ((u.key, u.reference) for u in result.utterances))
                write_trn(folder / "hyp.trn", ((u.key, u.hypothesis) for u in result.utterances))
        if args.html:
            totals = [row for row in rows if row.get(args.by, ALL) == ALL]
            write_page(args.html, tests, totals, versioned(args.normalizer), args.by)
    except OSError as error:
        raise ScoreError(f"{error.filename}: cannot write ({error.strerror})") from None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a console may know no Chinese, and no code page a lone surrogate
    main()
