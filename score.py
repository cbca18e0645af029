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
from collections.abc import Iterator
from pathlib import Path

from align import Counts
from compare import ALL, ScoredSet, markdown, verdict
from normalize import NORMALIZERS, none, normalizer, versioned
from score_page import write_page
from scoring import Score, Utterance, score
from texts import ScoreError, files_by_name, read_texts, write_trn

RESAMPLES = 10_000


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
