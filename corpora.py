"""Corpora in the layouts in which they are delivered: (folder, flags) → clips. Nothing is written, and no sound is read, but
that of a Hugging Face dataset, which is unpacked beside --out.
"""

import argparse
import csv
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from settings import InputError, first_line

AUDIO = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".webm", ".mp4", ".aif", ".aiff", ".sph", ".au")
OURS = ("key", "wav", "txt", "duration", "start", "end", "speaker")  # names that no corpus gives another meaning
TEXTS = ("txt", "text", "sentence", "transcription", "transcript", "normalized_text")
SPEAKERS = ("speaker", "speaker_id", "client_id")

# what wav.scp may say instead of a file, and mean no more than that: FILE has nothing that a shell would change
FILE = r"""(?:"(?P<a>[^"$`\\]+)"|'(?P<b>[^']+)'|(?P<c>(?!-)[\w./+:@%,=-]+))"""
COMMANDS = [
    re.compile(rf"(?:[\w./-]*/)?{command}\s*\|")
    for command in (
        rf"sph2pipe(?:\s+-f\s*(?:wav|riff?)|\s+-p)*\s+{FILE}",
        rf"flac(?:\s+-[cds]+|\s+--(?:stdout|decode|silent|totally-silent))+\s+{FILE}",
        rf"sox(?:\s+-(?:G|V\d?))*\s+{FILE}(?:\s+-(?:t\s*wav|r\s*[\d.]+k?|b\s*\d+|c\s*1|e\s*signed(?:-integer)?))*\s+-",
    )
]

# key, wav, txt (None: no transcript); start and end in seconds, of a part; speaker, and what else is known
Clip = dict[str, Any]


def librispeech(root: Path, args: argparse.Namespace) -> Iterator[Clip]:
    """84/121123/84-121123.trans.txt beside 84/121123/84-121123-0000.flac; gender from SPEAKERS.TXT above, where it is."""
    known = next((path for there in (root, root.parent) if (path := there / "SPEAKERS.TXT").is_file()), None)
    rows = [row.split("|") for _, row in read_lines(known) if not row.startswith(";")] if known else []
    genders = {row[0].strip(): {"gender": row[1].strip()} for row in rows if len(row) > 1}
    for texts in files(root / (args.split or ""), (".trans.txt",)):
        speaker, _, chapter = texts.name.removesuffix(".trans.txt").partition("-")
        for key, txt in table(texts).items():
            clip = {"key": key, "wav": texts.parent / f"{key}.flac", "txt": txt, "speaker": speaker, "chapter": chapter}
            yield clip | genders.get(speaker, {})


def aishell(root: Path, args: argparse.Namespace) -> Iterator[Clip]:
    """wav/train/S0002/BAC009S0002W0122.wav, transcript/aishell_transcript_v0.8.txt, whose spaces are left out."""
    choose(args, (path.name for path in root.glob("wav/*") if path.is_dir()))
    texts = table(root / "transcript" / "aishell_transcript_v0.8.txt")
    for wav in files(root / "wav" / args.split, (".wav",)):
        txt = texts.get(wav.stem)
        yield {"key": wav.stem, "wav": wav, "txt": txt and "".join(txt.split()), "speaker": wav.parent.name}


def commonvoice(root: Path, args: argparse.Namespace) -> Iterator[Clip]:
    """SPLIT.tsv (client_id, path, sentence, …) beside clips/*.mp3."""
    choose(args, (path.stem for path in root.glob("*.tsv")))
    tsv = root / f"{args.split}.tsv"
    rows = csv.DictReader((row for _, row in read_lines(tsv)), delimiter="\t", quoting=csv.QUOTE_NONE)
    lacking = {"client_id", "path", "sentence"} - set(rows.fieldnames or ())
    if lacking:
        raise InputError(f"{tsv}:1: no column {', '.join(sorted(lacking))}: is it a list of clips?")
    for row in rows:
        path, txt, speaker = row.pop("path"), row.pop("sentence"), row.pop("client_id")
        if path is None or txt is None:
            raise InputError(f"{tsv}: the row of client_id {speaker} is cut off: fetch the file again")
        wav = root / "clips" / (path if Path(path).suffix else f"{path}.mp3")  # the first releases left it out
        yield {"key": wav.stem, "wav": wav, "txt": txt, "speaker": speaker, **others(row)}


def folder(root: Path, args: argparse.Namespace) -> Iterator[Clip]:
    """audio/A/1.wav and transcriptions/A/1.txt; or, without a folder audio/, A/1.wav and A/1.txt side by side."""
    apart = (root / "audio").is_dir()
    audio, texts = (root / "audio", root / "transcriptions") if apart else (root, root)
    for wav in files(audio / (args.split or ""), AUDIO):
        key = wav.relative_to(audio).with_suffix("").as_posix()
        text = texts / f"{key}.txt"
        yield {"key": key, "wav": wav, "txt": " ".join(row for _, row in read_lines(text)) if text.is_file() else None}


def kaldi(root: Path, args: argparse.Namespace) -> Iterator[Clip]:
    """A data folder: wav.scp; text, segments, utt2spk, spk2gender where they are. Its commands are never run: a plain
    sph2pipe, flac or sox stands for the file that it reads, any other is refused. Paths are seen from here, or from root."""
    known = {name: table(root / name) if (root / name).is_file() else {} for name in ("text", "utt2spk", "spk2gender")}
    recordings = {key: kaldi_file(entry, key, root) for key, entry in table(root / "wav.scp").items()}
    clips = ({"key": key, "wav": wav} for key, wav in recordings.items())
    if (root / "segments").is_file():
        clips = (kaldi_segment(where, row, recordings) for where, row in read_lines(root / "segments"))
    for clip in clips:
        speaker = known["utt2spk"].get(clip["key"])
        extra = {"speaker": speaker, "gender": known["spk2gender"].get(speaker)}
        yield clip | {"txt": known["text"].get(clip["key"])} | {name: value for name, value in extra.items() if value}


def kaldi_file(entry: str, key: str, root: Path) -> Path:
    """The file that an entry of wav.scp names."""
    if "|" in entry:
        found = next(filter(None, (command.fullmatch(entry) for command in COMMANDS)), None)
        if not found:
            what = f"{root / 'wav.scp'}: {key} is what a command prints ({entry}), and commands are never run here"
            raise InputError(f"{what}: let it write a file, and name that file")
        entry = found["a"] or found["b"] or found["c"]
    elif re.search(r"\.ark:\d+$", entry) or entry in ("", "-"):
        raise InputError(f"{root / 'wav.scp'}: {key} is not a file of its own ({entry}): write it to one (wav-copy does)")
    return Path(entry) if os.path.exists(entry) else root / entry


def kaldi_segment(where: str, row: str, recordings: dict[str, Path]) -> Clip:
    try:
        key, recording, start, end = row.split()[:4]
        start, end = float(start), float(end)
    except ValueError:
        raise InputError(f"{where}: expected `utterance recording start end`, times in seconds") from None
    if not (start >= 0 and (end > start or end == -1)):
        raise InputError(f"{where}: expected 0 ≤ start < end (or an end of -1, which is the recording's)")
    if recording not in recordings:
        raise InputError(f"{where}: the recording {recording} is not in wav.scp: add it there")
    return {"key": key, "wav": recordings[recording], "start": start, "end": None if end == -1 else end}


def huggingface(root: Path, args: argparse.Namespace) -> Iterator[Clip]:
    """A dataset of the hub, or a folder of one; its sounds are written, undecoded, into a folder named like the jsonl."""
    try:
        import datasets

        if int(datasets.__version__.split(".")[0]) < 4:  # it would run the dataset's own script
            raise ImportError
    except ImportError:
        raise InputError("a Hugging Face dataset needs the package datasets: pip install 'datasets>=4'") from None
    try:
        if any((root / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(args.source)
        else:
            data = datasets.load_dataset(args.source, args.config, split=args.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"cannot load the dataset {args.source!r}: {first_line(error.__cause__ or error)}") from None
    if isinstance(data, datasets.DatasetDict):
        choose(args, data)
        data = data[args.split]
    sound = next((name for name, kind in data.features.items() if isinstance(kind, datasets.Audio)), None)
    text = args.text_field or next((name for name in TEXTS if name in data.features), None)
    if sound is None or text not in (None, *data.features):
        missing = "that holds audio" if sound is None else text
        raise InputError(f"{args.source}: no column {missing} (there: {', '.join(data.features)})")
    speaker = next((name for name in SPEAKERS if name in data.features), None)
    target = args.out.with_suffix("")
    target.mkdir(parents=True, exist_ok=True)
    rows = data.cast_column(sound, datasets.Audio(decode=False))
    for number, row in enumerate(tqdm(rows, desc="writing", unit="clip", disable=None)):
        wav, content = Path(row[sound]["path"] or ""), row[sound]["bytes"]
        if content is not None:
            wav = target / f"{number:07d}{wav.suffix or '.audio'}"
            wav.write_bytes(content)
        clip = {"key": f"{number:07d}", "wav": wav, "txt": row.pop(text, None)}
        yield clip | ({"speaker": str(row.pop(speaker))} if speaker else {}) | others(row)


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """("path:number", line) of each line that is not blank; raises InputError for what is no UTF-8 text."""
    try:
        with path.open("rb") as file:
            for number, row in enumerate(file, start=1):
                if row.strip():
                    yield f"{path}:{number}", row.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{number}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): is this the folder of the corpus?") from None


def table(path: Path) -> dict[str, str]:
    """Lines `key value`; raises InputError for a key that stands there twice."""
    rows: dict[str, str] = {}
    for where, row in read_lines(path):
        key, *value = row.split(maxsplit=1)
        if key in rows:
            raise InputError(f"{where}: {key} was seen before")
        rows[key] = value[0].strip() if value else ""
    return rows


def files(root: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files anywhere in a folder, sorted, hidden ones left out; each folder once, whatever links lead to it.

    Raises InputError if there are none.
    """

    def stop(error: OSError) -> None:
        raise error

    paths, seen = [], set()
    for there, folders, names in os.walk(root, onerror=stop, followlinks=True):
        folders.sort()
        real = os.path.realpath(there)
        if real in seen:
            folders.clear()
        else:
            paths += [Path(there, name) for name in names if name.lower().endswith(endings) and name[0] != "."]
        seen.add(real)
    if not paths:
        raise InputError(f"{root}: no {endings[0]} file in it: is it the right folder, and unpacked?")
    return sorted(paths)


def others(row: dict) -> Clip:
    """The fields of a row that may be kept under their names: texts that are not empty, and numbers."""
    return {n: v for n, v in row.items() if n not in OURS and isinstance(v, str | int | float) and v == v and v != ""}


def choose(args: argparse.Namespace, there: Iterable[str]) -> None:
    """Raise InputError unless --split is one of those that are there."""
    there = sorted(there)
    if args.split not in there:
        parts = f"give --split, one of {', '.join(there)}" if there else "no part in it: is it the right folder, unpacked?"
        raise InputError(f"{args.source}: {parts}")


CORPORA = {corpus.__name__: corpus for corpus in (librispeech, aishell, commonvoice, folder, kaldi, huggingface)}
