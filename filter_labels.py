"""Labels of label.py → a manifest to train on: the lines within the limits are kept, the others dropped, with the reasons.

    python filter_labels.py --labels labelled
    python filter_labels.py --labels labelled --min_avg_logprob -0.3 --plain

Reads labelled/labels.jsonl, writes kept.jsonl and dropped.jsonl beside it and prints a table. A line that has a transcript
is judged by it alone: --max_wer, of the teacher's text against it. One without is judged by how sure the teacher was, how
repetitive and how fast its text is, and by how far a second decoding, where there is one, differs from the first. Needs
neither teacher nor audio, so other limits take seconds. Raises InputError.
"""

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from label import HOW_SURE, flag, read_lines, write_lines
from score import NORMALIZERS, normalizer, score
from settings import InputError, one_line_errors, parse

BY_CHARACTER = ("zh", "yue", "ja")  # languages whose errors are counted by characters
NORMALIZER_OF = {"en": "english", "zh": "chinese", "yue": "chinese"}  # else basic


@dataclass
class FilterArguments:
    """What is kept: limits, named after the measures in a line."""

    labels: str | None = flag(None, "Folder of labels.jsonl, as label.py wrote it.")
    max_wer: float = flag(10, "Teacher against transcript, in %% (CER in zh, yue and ja).")
    max_disagreement: float = flag(10, "Second decoding against the first, as --max_wer.")
    min_avg_logprob: float = flag(-0.5, "Mean log-probability of the teacher's tokens.")
    max_compression_ratio: float = flag(2.4, "Of the text, by zlib: loops compress well.")
    max_no_speech_prob: float = flag(0.6, "Probability that nobody speaks.")
    min_chars_per_second: float = flag(1, "Without spaces. Less: words were missed.")
    max_chars_per_second: float = flag(25, "More: words were invented. Chinese has 3 to 8.")
    normalizer: str | None = flag(None, f"Of score.py: {', '.join(NORMALIZERS)}; by default the language's.")
    text: Literal["transcript", "teacher"] = flag("transcript", "Whose words are kept of a line that has a transcript.")
    plain: bool = flag(False, "Keep small letters without punctuation (score.py's basic).")


_normalizer = cache(normalizer)


def error_rate(reference: str, hypothesis: str, language: str, normalizer_name: str | None) -> float:
    """WER after normalisation, in %, or CER where a language is written without spaces."""
    normalize = _normalizer(normalizer_name or NORMALIZER_OF.get(language, "basic"))
    result = score({"": reference}, {"": hypothesis}, normalize)
    counts = result.characters if language in BY_CHARACTER else result.words
    return round(100 * counts.errors / max(counts.reference_length, 1), 2)


def measured(line: dict, args: FilterArguments) -> dict:
    """A label with all that the limits are about."""
    if "txt" not in line:
        return line
    line = line | {"chars_per_second": round(len("".join(line["txt"].split())) / max(line["duration"], 0.01), 2)}
    if "transcript" in line:
        line["wer"] = error_rate(line["transcript"], line["txt"], line["language"], args.normalizer)
    if "txt2" in line:
        line["disagreement"] = error_rate(line["txt"], line["txt2"], line["language"], args.normalizer)
    return line


def faults(line: dict, args: FilterArguments) -> dict[str, str]:
    """Rule → how a measured line breaks it; empty: it is kept."""
    if "txt" not in line:
        return {"cannot be read": line["problem"]} if "problem" in line else {"over 30 s": "--timestamps would cut it"}
    alone = "wer" in line  # a transcript tells more than all the others
    found = {} if line["txt"] or alone else {"nothing heard": "no text"}
    for name in ["wer"] if alone else [*HOW_SURE, "chars_per_second", "disagreement"]:
        for side, beyond in (("min", operator.lt), ("max", operator.gt)):
            limit = getattr(args, f"{side}_{name}", None)
            if limit is not None and name in line and beyond(line[name], limit):
                found[f"--{side}_{name} {limit:g}"] = f"{name} is {line[name]:g}"
    return found


def sort_out(args: FilterArguments, folder: Path) -> None:
    """labels.jsonl → kept.jsonl and dropped.jsonl; prints the table. A line may break several rules."""
    if not (folder / "labels.jsonl").exists():
        raise InputError(f"{folder}: no labels.jsonl in it: label.py makes it")
    kept, dropped, numbers, hours = [], [], Counter(), Counter()
    for line in (measured(line, args) for line in read_lines(folder / "labels.jsonl")):
        found = faults(line, args)
        for row in ("all", *(f"dropped: {rule}" for rule in found)) if found else ("all", "kept"):
            numbers[row] += 1
            hours[row] += line.get("duration", 0) / 3600
        if found:
            dropped.append(line | {"dropped": found})
            continue
        txt = line["transcript"] if args.text == "transcript" and "transcript" in line else line["txt"]
        kept.append(line | {"txt": " ".join(_normalizer("basic")(txt).split()) if args.plain else txt, "heard": line["txt"]})
    write_lines(folder / "kept.jsonl", kept)
    write_lines(folder / "dropped.jsonl", dropped)
    print("| lines | number | hours |\n|---|---|---|")
    for row in ("all", "kept", *sorted(set(numbers) - {"all", "kept"})):
        print(f"| {row} | {numbers[row]} | {hours[row]:.2f} |")


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        (args,) = parse([FilterArguments], argv)
        if not args.labels:
            raise InputError("give --labels, the folder of labels.jsonl")
        if args.normalizer not in (None, *NORMALIZERS):
            raise InputError(f"--normalizer {args.normalizer}: there are {', '.join(NORMALIZERS)}")
        try:
            sort_out(args, Path(args.labels))
        except OSError as error:
            raise InputError(f"{error.filename}: cannot write ({error.strerror})") from None


if __name__ == "__main__":
    main()
