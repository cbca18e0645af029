"""What to recognize: names on the command line → records with unique keys.

    test.jsonl                a manifest; its keys
    a.wav b.mp3 'calls/*.m4a' files, and patterns, quoted or not
    calls/                    a folder, searched through and through for audio files, in the order of their names
    corpus/                   with `audio/` and `transcriptions/` in it: `audio/x/1.flac` says `transcriptions/x/1.txt`

The key of a file is its path as given; of a folder's file, if that folder is all that is given, its path within (within
`audio/` where there is one). Since a result has lines `key text`, white space in a key is written as in a URL (`my talk.wav`
is `my%20talk.wav`, and % is %25; urllib.parse.unquote undoes it).
"""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from urllib.parse import quote

import numpy as np
import soundfile

from audio import sndfile_name
from manifest import Record, read_manifest
from settings import InputError

AUDIO = ".aac .aif .aiff .amr .au .caf .flac .m4a .m4b .mka .mkv .mov .mp2 .mp3 .mp4 .oga .ogg .opus .wav .weba .webm .wma"
SUFFIXES = frozenset(AUDIO.split())
NOT_IN_A_KEY = re.compile(r"[\s%\ud800-\udfff]")  # surrogates: bytes of a file's name that are not UTF-8
BYTES_PER_SECOND = 16_000  # 128 kbit/s, to guess a duration


def key_of(path: str | Path) -> str:
    """A path as a key: without white space, readable, and to be undone by urllib.parse.unquote."""
    return NOT_IN_A_KEY.sub(lambda found: quote(found[0], errors="surrogateescape"), str(path))


def has_transcriptions(name: str | Path) -> bool:
    return all(os.path.isdir(os.path.join(name, part)) for part in ("audio", "transcriptions"))


def find(names: Sequence[str]) -> Sequence[Record]:
    """The records that `names` stand for, in their order; a file that is named twice is one record.

    Raises InputError for a manifest that cannot be used, a folder or pattern with nothing in it, and for a key that two
    files share.
    """
    if len(names) == 1 and is_manifest(names[0]):
        return read_manifest(names[0], need_txt=False)
    records: dict[str, Record] = {}
    for name in names:
        for record in _named(name, alone=len(names) == 1):
            seen = records.setdefault(record.key, record)
            if seen._replace(where="", txt=None) != record._replace(where="", txt=None):
                raise InputError(f"key {record.key!r} is of {seen.where} and of {record.where}: recognize them separately")
    return list(records.values())


def is_manifest(name: str) -> bool:
    return name.endswith((".jsonl", ".json")) and not os.path.isdir(name)


def _named(name: str, alone: bool) -> Iterator[Record]:
    if is_manifest(name):
        yield from read_manifest(name, need_txt=False)
    elif os.path.isdir(name):
        yield from _folder(Path(name), alone)
    elif not os.path.exists(name) and any(sign in name for sign in "*?["):
        matches = sorted(glob(name, recursive=True))
        if not matches:
            raise InputError(f"{name}: no file has such a name")
        for match in matches:
            yield from _named(match, alone=False)
    else:
        yield Record(key_of(name), Path(name), None, None, where=name)


def _folder(folder: Path, alone: bool) -> Iterator[Record]:
    paired = has_transcriptions(folder)
    root = folder / "audio" if paired else folder
    found = False
    for path in _audio_files(root):
        found, within = True, path.relative_to(root)
        said = folder / "transcriptions" / within.with_suffix(".txt")
        txt = _read_text(said) if paired and said.exists() else None
        yield Record(key_of(within if alone else path), path, txt, None, where=str(path))
    if not found:
        raise InputError(f"{root}: no audio file in it ({AUDIO})")


def _audio_files(folder: Path) -> Iterator[Path]:
    """In the order of their names, links followed, hidden ones left out."""
    seen = set()  # a link may lead back up
    for parent, folders, files in os.walk(folder, onerror=_unreadable, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (
                Path(parent, name)
                for name in sorted(files)
                if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
            )
        seen.add(real)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot read this folder ({error.strerror})")


def _read_text(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the transcription ({error.strerror})") from None


def seconds_of(record: Record) -> float:
    """How long a record is, for sharing out work: quick rather than exact.

    As its manifest says, else by the file's header, else a guess by its size; 0 if it cannot be read.
    """
    if record.duration is not None:
        return record.duration
    try:
        return soundfile.info(sndfile_name(record.wav)).duration
    except (soundfile.LibsndfileError, OSError, ValueError):  # ValueError: a name that no file can have
        return os.path.getsize(record.wav) / BYTES_PER_SECOND if os.path.isfile(record.wav) else 0.0


def shares(records: Sequence[Record], processes: int) -> list[np.ndarray]:
    """For each process the places of its records, in order: the longest first, each to whom has least.

    Depends on the records alone, so that processes agree without a word, also after an interruption.
    """
    if processes == 1:
        return [np.arange(len(records))]
    seconds = np.array([seconds_of(record) for record in records])
    owner, load = np.zeros(len(records), int), np.zeros(processes)
    for place in np.argsort(-seconds, kind="stable"):
        owner[place] = load.argmin()
        load[owner[place]] += seconds[place] + 1e-3  # so that what cannot be read is spread too
    return [np.flatnonzero(owner == process) for process in range(processes)]


def transcriptions(names: Sequence[str], records: Sequence[Record]) -> dict[str, str]:
    """key → text, if a folder with transcriptions was named; says how many lack one."""
    if not any(map(has_transcriptions, names)):
        return {}
    known = {record.key: record.txt for record in records if record.txt is not None}
    if len(known) < len(records):
        print(f"{len(records) - len(known)} of {len(records)} have no transcription and are not scored", file=sys.stderr)
    return known
