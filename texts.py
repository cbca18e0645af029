"""Texts by key, from the files that recordings, people and recognize.py give them in; and into sclite's."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"
NUMBER = (int, float)  # int | float would be made anew for each of a million lines


class ScoreError(ValueError):
    """A user's mistake, told in one line that names file, line and remedy."""


def is_part(start: Any, end: Any) -> bool:
    """Whether a manifest's "start" and "end", each None or seconds, say a part of a file."""
    start = 0 if start is None else start
    finite = all(isinstance(time, NUMBER) and math.isfinite(time) for time in (start, 0 if end is None else end))
    return finite and start >= 0 and (end is None or start < end)


def part_key(wav: str, start: float | None, end: float | None) -> str:
    """`wav-START-END` in milliseconds: the key of a part that has none of its own."""
    return f"{wav}-{round((start or 0) * 1000)}-{'end' if end is None else round(end * 1000)}"


def _named(given: list[str]) -> list[tuple[str, str]]:
    """NAME=FILE or FILE → (name or "", file)."""
    return [("", item) if "=" not in item or Path(item).exists() else tuple(item.split("=", 1)) for item in given]


def files_by_name(refs: list[str], hyps: list[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Set → reference, and system → hypotheses, one for each set in that order; raises ScoreError."""
    sets, systems = {}, {}
    for name, file in _named(refs):
        name = name or Path(file).stem
        if name in sets:
            raise ScoreError(f"--ref: two sets are called {name}: name one otherwise, as NAME={file}")
        sets[name] = file
    stems = [Path(file).stem for _, file in _named(hyps)]
    for name, file in _named(hyps):
        unnamed = "result" if len(sets) > 1 else Path(file).stem if stems.count(Path(file).stem) == 1 else file
        systems.setdefault(name or unnamed, []).append(file)
    for name, files in systems.items():
        if len(files) != len(sets):
            raise ScoreError(
                f"--hyp: {len(files)} files of {name} for {len(sets)} sets ({', '.join(sets)}): give one for each, in the "
                "order of --ref; with several systems each as NAME=FILE"
            )
    return sets, systems


def read_texts(path: str | Path, fields: dict[str, dict[str, Any]] | None = None, text_field: str = "txt") -> dict[str, str]:
    """key → text of a jsonl (`key` or `wav`, and `txt` or `text`), a tsv with such columns, or lines `key text`.

    Where both text fields are there, `text_field` is taken. `fields` are filled: name → key → what stands there.
    Raises ScoreError naming file and line.
    """
    texts: dict[str, str] = {}
    heads: list[str] = []
    for number, line in _lines(path):
        where, item = f"{path}:{number}", {}
        if line.lstrip().startswith("{") or str(path).endswith(".jsonl"):
            item = _json_line(line, where, text_field)
        elif str(path).endswith(".tsv"):
            if not heads:
                heads = line.split("\t")
                if "key" not in heads or not {"txt", "text"} & set(heads):
                    raise ScoreError(f"{where}: a tsv needs a first line that names its columns, key and text among them")
                continue
            item = _tsv_line(line, heads, where, text_field)
        else:
            key, *text = line.split(maxsplit=1)
            item = {"key": key, text_field: text[0] if text else ""}
        key, text = item["key"], item[text_field]
        if key in texts:
            raise ScoreError(f"{where}: key {key!r} was seen before: keys must be unique")
        texts[key] = text
        for name, values in (fields or {}).items():
            if item.get(name) is not None:
                values[key] = item[name]
    return texts


def _lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.removeprefix(BOM if number == 1 else b"").decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    where = f"{path}:{number}: byte {error.start + 1}"
                    raise ScoreError(f"{where} is not UTF-8: save the file as UTF-8") from None
                if line.strip():
                    yield number, line
    except OSError as error:
        raise ScoreError(f"{path}: cannot read ({error.strerror})") from None


def _json_line(line: str, where: str, text_field: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
        key, start, end = item.get("key", item.get("wav")), item.get("start"), item.get("end")
    except (ValueError, AttributeError, RecursionError):
        raise ScoreError(f"{where}: not a JSON object") from None
    if (start, end) != (None, None):
        if not is_part(start, end):
            raise ScoreError(f'{where}: "start" and "end" must be numbers of seconds in the file, 0 ≤ start < end')
        key = item.get("key", key and part_key(key, start, end))
        item |= {} if end is None else {"duration": end - (start or 0)}
    text = item.get(text_field, item.get("txt", item.get("text")))
    if not isinstance(key, str) or not isinstance(text, str):
        raise ScoreError(f'{where}: needs the fields "key" (or "wav") and "txt" (or "text"), both texts')
    return item | {"key": key, text_field: text}


def _tsv_line(line: str, heads: list[str], where: str, text_field: str) -> dict[str, Any]:
    cells = line.split("\t")
    if len(cells) != len(heads):
        raise ScoreError(f"{where}: {len(cells)} columns, {len(heads)} names of columns in the first line")
    item = dict(zip(heads, cells, strict=True))
    return item | {text_field: item.get(text_field, item.get("txt", item.get("text")))}


def write_trn(path: Path, texts: Iterable[tuple[str, str]]) -> None:
    """(key, text) as sclite's trn, `text (key)`; raises ScoreError for characters that sclite takes for its own."""
    with path.open("w", encoding="utf-8", errors="replace") as file:  # JSON may hold half a character
        for key, text in texts:
            strange = set("(){}@;*\\") & set(text) or set("()") & set(key)
            if strange:
                raise ScoreError(
                    f"{path}: {strange.pop()} means something to sclite, in {key}: another key, or --normalizer basic"
                )
            file.write(f"{text} ({key})\n")
