"""Outcomes → files, by their names' endings.

    result.txt     key text
    result.jsonl   all that is known of each
    result.tsv     a table: key, duration, confidence, flags, error, text
    talk.srt .vtt  subtitles of one recording; of several by a name with {key} in it: 'subtitles/{key}.srt'

Every one has a line (a subtitle file) for each record, in order, whatever happened to it, and is written aside first.
"""

import html
import math
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from json import dumps
from pathlib import Path
from statistics import fmean
from typing import TextIO
from urllib.parse import unquote

from manifest import Record
from score import report, score
from settings import InputError
from sources import SUFFIXES
from transcript import Transcript

CUE_LINE, CUE_LINES, CUE_SECONDS, CUE_PAUSE = 42, 2, 7.0, 1.0  # the limits that broadcasters set themselves


@dataclass
class Outcome:
    """What became of one record. `seconds`: the time that decoding it took."""

    key: str
    wav: str
    transcript: Transcript
    seconds: float

    @property
    def text(self) -> str:
        return self.transcript.text

    @property
    def error(self) -> str:
        return self.transcript.error

    @property
    def duration(self) -> float:
        return self.transcript.duration

    def as_dict(self) -> dict:
        """A line of result.jsonl. confidence: the mean of its words'; where they are not known exp(score / tokens), the
        geometric mean of its tokens' probabilities (scores of two votes are no such thing)."""
        known = asdict(self.transcript)
        confidence = math.exp(known["score"] / known["tokens"]) if known["tokens"] else None
        if known["words"]:
            confidence = fmean(word["confidence"] for word in known["words"])
        first = {"key": self.key, "text": known.pop("text"), "confidence": confidence}
        if known["unguarded"] in (None, self.text):
            del known["unguarded"]
        return first | known | {"seconds": round(self.seconds, 3), "wav": self.wav}


def txt(outcomes: Iterable[dict]) -> Iterator[str]:
    for outcome in outcomes:
        yield f"{outcome['key']} {outcome['text']}\n"


def jsonl(outcomes: Iterable[dict]) -> Iterator[str]:
    for outcome in outcomes:
        yield dumps(outcome, ensure_ascii=False) + "\n"


def tsv(outcomes: Iterable[dict]) -> Iterator[str]:
    """Keys and texts have neither tabs nor line breaks; errors may."""
    yield "key\tduration\tconfidence\tflags\terror\ttext\n"
    for o in outcomes:
        confidence = "" if o["confidence"] is None else f"{o['confidence']:.4f}"
        error = " ".join(o["error"].split())
        yield f"{o['key']}\t{o['duration']:.3f}\t{confidence}\t{','.join(o['flags'])}\t{error}\t{o['text']}\n"


def srt(outcomes: Iterable[dict]) -> Iterator[str]:
    for outcome in outcomes:
        for number, (start, end, text) in enumerate(cues(outcome), start=1):
            yield f"{number}\n{clock(start, ',')} --> {clock(end, ',')}\n{text}\n\n"


def vtt(outcomes: Iterable[dict]) -> Iterator[str]:
    for outcome in outcomes:
        yield "WEBVTT\n\n"
        for start, end, text in cues(outcome):
            yield f"{clock(start, '.')} --> {clock(end, '.')}\n{html.escape(text, quote=False)}\n\n"


def clock(seconds: float, point: str) -> str:
    """hh:mm:ss.mmm."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02}{point}{rest % 1000:03}"


def timed(outcome: dict) -> Iterator[tuple[str, float, float]]:
    """(word, start, end): by the CTC where it knows, else a piece's time shared out over its words by their letters."""
    words = outcome["words"] or []
    for segment in outcome["segments"]:
        start, end = segment["start"], segment["end"]
        texts = segment["text"].split()
        known = [word for word in words if start <= word["start"] < end]
        if [word["text"] for word in known] == texts:
            yield from ((word["text"], word["start"], word["end"]) for word in known)
            continue
        letter = (end - start) / sum(len(text) + 1 for text in texts)
        for text in texts:
            yield text, start, start + letter * len(text)
            start += letter * (len(text) + 1)


def cues(outcome: dict) -> Iterator[tuple[float, float, str]]:
    """(start, end, text of one or two lines): a cue ends where a pause, its lines or its seconds would be too many."""
    cue: list[tuple[str, float, float]] = []

    def lines(*more: str) -> list[str]:
        return textwrap.wrap(" ".join([*(word for word, _, _ in cue), *more]), CUE_LINE)

    def closed() -> tuple[float, float, str]:
        return cue[0][1], cue[-1][2], "\n".join(lines()).replace("-->", "→")

    for word, start, end in timed(outcome):
        if cue and (len(lines(word)) > CUE_LINES or end - cue[0][1] > CUE_SECONDS or start - cue[-1][2] > CUE_PAUSE):
            yield closed()
            cue = []
        cue.append((word, start, end))
    if cue:
        yield closed()


FORMATS: dict[str, Callable[[Iterable[dict]], Iterator[str]]] = {
    **{".txt": txt, ".jsonl": jsonl, ".tsv": tsv, ".srt": srt, ".vtt": vtt}
}


def check(paths: Sequence[Path], records: Sequence[Record]) -> None:
    """Raise InputError, before anything is decoded, for a result that these records cannot be written to."""
    for path in paths:
        if path.suffix not in FORMATS:
            known = " ".join(FORMATS)
            raise InputError(f"--result_path {path}: a result ends in {known} (what to recognize stands before the flag)")
        if "{key}" in path.name:
            for name, count in Counter(file_of(path, record.key) for record in records).items():
                if count > 1:
                    raise InputError(f"--result_path {path}: {name} would be of {count} files: give a manifest with keys")
        elif path.suffix in (".srt", ".vtt") and len(records) > 1:
            many = path.with_name("{key}" + path.suffix)
            raise InputError(f"--result_path {path} is of one recording, and there are {len(records)}: give '{many}'")


def file_of(path: Path, key: str) -> Path:
    """Its key, a file's name again, in the place of {key}, without an audio file's ending; never outside `path`'s folder."""
    key = Path(unquote(key, errors="surrogateescape").replace("\0", ""))
    within = Path(*(part for part in key.parts if part not in ("..", key.anchor)))
    within = within.with_suffix("") if within.suffix.lower() in SUFFIXES else within
    return path.parent / path.name.replace("{key}", str(within))


def write(path: Path, outcomes: Iterable[dict]) -> None:
    """All outcomes into the file, or the files, that `path` names."""
    form = FORMATS[path.suffix]
    if "{key}" not in path.name:
        return _write_aside(path, form(outcomes))
    for outcome in outcomes:
        _write_aside(file_of(path, outcome["key"]), form([outcome]))


def _write_aside(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.writelines(lines)
    os.replace(new, path)


class Summary:
    """Counts for the last line; tells failures as they are added; scores what has a reference."""

    def __init__(self, references: dict[str, str]) -> None:
        self.references, self.texts, self.unguarded = references, {}, {}
        self.files, self.audio, self.failed = 0, 0.0, Counter()

    def add(self, outcome: dict) -> None:
        key, error = outcome["key"], outcome["error"]
        self.files += 1
        self.audio += outcome["duration"]
        if error:
            print(f"{key}: {error}" if outcome["wav"] == key else f"{key}: {outcome['wav']}: {error}", file=sys.stderr)
            self.failed[re.sub(r"\d+(\.\d+)?", "…", error)] += 1
        if key in self.references:
            self.texts[key] = outcome["text"]
            self.unguarded[key] = outcome.get("unguarded", outcome["text"])

    def tell(self, audio: float, seconds: float, stream: TextIO, paths: Sequence[Path] = ()) -> int:
        """`audio` seconds of it were decoded in `seconds`. Returns the exit code."""
        if self.references:
            print(report(score(self.references, self.texts), "basic"), file=stream)
        if self.texts != self.unguarded:
            rate = score(self.references, self.unguarded).words.rate
            print(f"WER without the guard: {'n/a' if rate is None else f'{100 * rate:.2f} %'}", file=stream)
        failed = ", ".join(f"{count} × {reason}" for reason, count in self.failed.most_common())
        failed = f"{self.failed.total()} failed" + (f" ({failed})" if failed else "")
        what = f"{' '.join(map(str, paths))}: " if paths else ""
        speed = f"RTFx {audio / max(seconds, 1e-9):.3g}"
        print(f"{what}{self.files} files, {self.audio / 3600:.2f} h, {speed}, {failed}", file=stream)
        return 1 if self.failed else 0
