"""Manifests: jsonl files whose lines are read when they are asked for; texts, a sentence a line, alike.

Each line of a manifest is a JSON object:

    {"wav": "clips/0001.flac", "txt": "hello world", "key": "0001"}

`wav` may be relative to the manifest's own folder; `key` defaults to `wav`; `duration` in seconds, where given, spares
reading the file's header. A line may be of a part of a longer file, from `start` to `end`, in seconds, or with one of them:
`duration` is then the part's (and not needed beside an `end`), and the key defaults to `wav-START-END` in milliseconds.
Raises InputError, naming file and line, for whatever cannot be used. Of each line some twenty bytes stay in memory, so a
million lines are no burden.
"""

import json
import math
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from settings import InputError
from texts import BOM, NUMBER, is_part, part_key


@dataclass(frozen=True)
class Form:
    """Which fields of a line are read, and what is made of its transcript."""

    audio: str = "wav"
    text: str = "txt"
    lowercase: bool = False
    ignore: str = ""  # characters to leave out

    def clean(self, txt: str) -> str:
        if self.ignore:
            txt = " ".join(txt.translate(dict.fromkeys(map(ord, self.ignore))).split())
        return txt.lower() if self.lowercase else txt


AS_IS = Form()


class Record(NamedTuple):
    key: str
    wav: Path
    txt: str | None
    duration: float | None
    where: str  # "manifest:line", for messages
    start: float | None = None  # seconds, of a part of the file
    end: float | None = None

    @property
    def part(self) -> tuple[Path, float | None, float | None]:
        """What load_audio takes."""
        return self.wav, self.start, self.end


# key, wav as it is written, txt, duration, start, end
Row = tuple[str, str, str | None, float | None, float | None, float | None]

_scan = json.JSONDecoder().scan_once


def _loads(text: str) -> Any:
    """json.loads at twice its speed on a line of nothing but one value."""
    try:
        item, end = _scan(text, 0)
        if end == len(text):
            return item
    except StopIteration:
        pass
    return json.loads(text)


def parse_line(line: bytes, path: Path, number: int, form: Form = AS_IS) -> Row:
    """One manifest line; raises InputError naming `path:number`."""

    def wrong(what: str) -> InputError:
        return InputError(f"{path}:{number}: {what}")

    try:
        item = _loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise wrong(f"byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise wrong(f"not JSON at column {error.colno} ({error.msg})") from None
    if not isinstance(item, dict):
        example = f'{{"{form.audio}": …, "{form.text}": …}}'
        raise wrong(f"expected an object like {example}, found {type(item).__name__}")
    wav = item.get(form.audio)
    if not isinstance(wav, str) or not wav:
        raise wrong(f'field "{form.audio}" is missing or not a text: it names the audio file')
    txt, duration, start, end = item.get(form.text), item.get("duration"), item.get("start"), item.get("end")
    if start is not None or end is not None:
        if not is_part(start, end):
            raise wrong('"start" and "end" must be numbers of seconds in the file, 0 ≤ start < end')
        wav_key = part_key(wav, start, end)
        duration = duration if end is None else end - (start or 0)
    else:
        wav_key = wav
    key = item.get("key", wav_key)
    if not isinstance(key, str) or not key or key.split() != [key]:
        raise wrong(f'key {key!r} must be a text without spaces: give the line a "key"')
    if txt is not None and not isinstance(txt, str):
        raise wrong(f'field "{form.text}" is not a text')
    if duration is not None and not (isinstance(duration, NUMBER) and math.isfinite(duration) and duration >= 0):
        raise wrong('field "duration" is not a number of seconds')
    return key, wav, txt if txt is None else form.clean(txt), duration, start, end


class Manifest(Sequence):
    """The records of one or more jsonl files, held as byte offsets: a line is parsed when it is asked for."""

    def __init__(self, paths: Sequence[Path], form: Form = AS_IS) -> None:
        self.paths, self.form = list(paths), form
        self.starts: list[int] = []  # of each file, the index of its first record
        self.offsets, self.lines = array("q"), array("I")
        self.durations = array("d")  # seconds; NaN where not stated

    @property
    def path(self) -> Path:
        return self.paths[0]

    def __str__(self) -> str:
        return " ".join(map(str, self.paths))

    def __len__(self) -> int:
        return len(self.offsets)

    def file_of(self, index: int) -> Path:
        return self.paths[bisect_right(self.starts, index) - 1]

    def where(self, index: int) -> str:
        return f"{self.file_of(index)}:{self.lines[index]}"

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        path = self.file_of(index)
        with path.open("rb") as file:
            file.seek(self.offsets[index])
            key, wav, txt, duration, start, end = parse_line(file.readline(), path, self.lines[index], self.form)
        beside = path.parent / wav
        wav = beside if os.path.exists(beside) else Path(wav)  # False also for a name too long
        return Record(key, wav, txt, duration, self.where(index), start, end)

    def texts(self) -> Iterator[str]:
        """All transcripts, in one pass over lines that read_manifest has checked."""
        for path, start, end in zip(self.paths, self.starts, [*self.starts[1:], len(self)], strict=True):
            with path.open("rb") as file:
                file.seek(self.offsets[start])
                for line in islice(filter(bytes.strip, file), end - start):
                    yield self.form.clean(_loads(line.decode("utf-8").rstrip())[self.form.text])

    def some_texts(self, most: int = 5_000) -> Iterator[str]:
        """The transcripts, or so many of them, evenly spaced."""
        if len(self) <= most:
            return self.texts()
        return (self[index].txt for index in self.spread(most))

    def spread(self, most: int) -> range:
        """Indices of at most so many records, evenly spaced."""
        return range(0, len(self), max(1, math.ceil(len(self) / most)))


def read_manifest(paths: str | Path | Sequence[str | Path], need_txt: bool = True, form: Form = AS_IS) -> Manifest:
    """Check one or more jsonl files in one pass and return their records; blank lines and a BOM are skipped.

    Keys are unique within a file. Raises InputError for the first line that is not a usable record: bad JSON, a missing
    field (the text if `need_txt`), not UTF-8; else for a key seen before.
    """
    manifest = Manifest([Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)], form)
    keys = array("q")
    for path in manifest.paths:
        manifest.starts.append(len(manifest))
        try:
            with path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    bom = len(BOM) if number == 1 and line.startswith(BOM) else 0
                    if line[bom:].strip():
                        key, _, txt, duration, _, _ = parse_line(line[bom:], path, number, form)
                        if need_txt and txt is None:
                            raise InputError(f'{path}:{number}: field "{form.text}" is missing: it holds the transcript')
                        keys.append(hash(key) ^ len(manifest.starts))  # another in another file
                        manifest.offsets.append(offset + bom)
                        manifest.lines.append(number)
                        manifest.durations.append(math.nan if duration is None else duration)
                    offset += len(line)
        except OSError as error:
            raise InputError(f"{path}: cannot read the manifest ({error.strerror})") from None
        if len(manifest) == manifest.starts[-1]:
            raise InputError(f"{path}: no line in it")
    _check_keys(manifest, np.frombuffer(keys, np.int64))
    return manifest


def _check_keys(manifest: Manifest, hashes: np.ndarray) -> None:
    """Raise InputError at the first line whose key was seen before; hashes (lines,)."""
    order = np.argsort(hashes, kind="stable")
    again = hashes[order[1:]] == hashes[order[:-1]]
    for later, earlier in sorted(zip(order[1:][again].tolist(), order[:-1][again].tolist(), strict=True)):
        key, same_file = manifest[later].key, manifest.file_of(later) == manifest.file_of(earlier)
        if key == manifest[earlier].key and same_file:  # else two keys of one hash
            seen = f"was seen before, on line {manifest.lines[earlier]}"
            raise InputError(f'{manifest.where(later)}: key {key!r} {seen}: give each line its own "key"')


class TextLines(Sequence):
    """The lines of a text file that are not blank, held as byte offsets."""

    def __init__(self, path: str | Path, form: Form = AS_IS) -> None:
        """Raises InputError for a file that cannot be read, is not UTF-8, or has no line."""
        self.path, self.form, self.offsets, offset = Path(path), form, array("q"), 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    try:
                        self.offsets.extend([offset] if line.decode("utf-8-sig").strip() else [])
                    except UnicodeDecodeError as error:
                        where = f"{path}:{number}: byte {error.start + 1}"
                        raise InputError(f"{where} is not UTF-8: save the file as UTF-8") from None
                    offset += len(line)
        except OSError as error:
            raise InputError(f"{path}: cannot read the texts ({error.strerror})") from None
        if not self.offsets:
            raise InputError(f"{path}: no line in it")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> str:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return self.form.clean(file.readline().decode("utf-8-sig").strip())
