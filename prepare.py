"""Corpora that people have → a jsonl with durations, for train.py, recognize.py and score.py.

    python prepare.py librispeech LibriSpeech/train-clean-100 --out train.jsonl
    python prepare.py aishell data_aishell --split train --out train.jsonl
    python prepare.py commonvoice cv-corpus-24.0/ja --split train --out train.jsonl
    python prepare.py folder DIR --out train.jsonl         # DIR/audio/…/NAME.wav and DIR/transcriptions/…/NAME.txt
    python prepare.py kaldi data/train --out train.jsonl   # wav.scp, text, segments, utt2spk, spk2gender
    python prepare.py huggingface NAME_OR_FOLDER --split train --out train.jsonl   # pip install 'datasets>=4'

Every file is opened for its length. What cannot be used stands with its reason in train.left_out.txt beside train.jsonl;
broken files are told on stderr too, and make the exit code 1. The order is that of the corpus, or of the files' names.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm
from whisper.audio import SAMPLE_RATE

from audio import count_samples
from corpora import CORPORA, OURS, Clip
from settings import InputError, first_line, one_line_errors

OVERSHOOT = 0.5  # seconds that a segment may end behind its file, as in Kaldi's extract-segments: it is cut there
TOLD = 20  # broken files on stderr; all are in the list


def length(wav: Path) -> float | str:
    """Seconds, or what is wrong with the file."""
    try:
        str(wav).encode()
        return count_samples(wav) / SAMPLE_RATE or "has no samples"
    except (InputError, OSError) as error:
        return first_line(error).removeprefix(f"{wav}: ").removesuffix(": mend the file or remove the line")
    except UnicodeEncodeError:
        return "its name is not UTF-8"


def as_written(clip: Clip, seconds: float, beside: str) -> Clip | str:
    """The line of a clip of a file of so many seconds, or why it cannot be used."""
    start, end, part = clip.get("start"), clip.get("end"), {}
    if start is not None or end is not None:
        first, last = round(start or 0, 3), round(min(seconds if end is None else end, seconds), 3)
        if first >= last or (end or 0) > seconds + OVERSHOOT:
            until = "the end" if end is None else f"{end:g}"
            return f"its part from {start or 0:g} to {until} s is empty or not in its {seconds:.2f} s"
        part, seconds = {"start": first, "end": last}, last - first
    wav = os.path.abspath(clip["wav"])
    wav = os.path.relpath(wav, beside) if wav.startswith(os.path.join(beside, "")) else wav
    txt = {} if clip["txt"] is None else {"txt": " ".join(clip["txt"].split())}
    extra = {name: value for name, value in clip.items() if name not in OURS or name == "speaker"}
    return {"key": clip["key"], "wav": wav, **txt, "duration": round(seconds, 3), **part, **extra}


def prepare(clips: Sequence[Clip], out: Path, untranscribed: bool = False) -> int:
    """Measure clips and write `out`, whole or not at all, and the list of what is left out; returns the exit code.

    Clips without a transcript are left out unless `untranscribed`. Raises InputError for two clips of one key, and if none
    is left.
    """
    seen: dict[str, Clip] = {}
    for clip in clips:
        clip["key"] = "_".join(clip["key"].split())
        other = seen.setdefault(clip["key"], clip)
        if other is not clip:
            raise InputError(f"{clip['wav']} and {other['wav']} have the same key, {clip['key']}: rename or remove one")
    wavs = list(dict.fromkeys(clip["wav"] for clip in clips if untranscribed or clip["txt"] is not None))
    with ThreadPool(os.cpu_count()) as pool:  # libsndfile and ffmpeg leave Python's lock to others
        measured = tqdm(pool.imap(length, wavs, chunksize=16), "measuring", len(wavs), unit="file", disable=None)
        lengths = dict(zip(wavs, measured, strict=True))
    lines, silent, broken, beside = [], [], [], os.path.abspath(out.parent)
    total, speakers = 0.0, set()
    for clip in clips:
        if clip["txt"] is None and not untranscribed:
            silent.append(f"{clip['wav']}: no transcript")
            continue
        seconds = lengths[clip["wav"]]
        line = seconds if isinstance(seconds, str) else as_written(clip, seconds, beside)
        if isinstance(line, str):
            broken.append(f"{clip['wav']}: {line}")
        else:
            lines.append(json.dumps(line, ensure_ascii=False))
            total += line["duration"]
            speakers |= {line.get("speaker")} - {None}
    listed = out.with_suffix(".left_out.txt")
    replace(listed, broken + silent)
    more = [f"{len(broken) - TOLD} more: see {listed}"] if len(broken) > TOLD else []
    for problem in broken[:TOLD] + more:
        print(problem, file=sys.stderr)
    if not lines:
        raise InputError(f"{out} is not written: all {len(clips)} clips are left out, the first is {(broken + silent)[0]}")
    replace(out, lines)
    heard, without = f" of {len(speakers)} speakers" if speakers else "", f"{len(silent)} without a transcript"
    print(f"{out}: {len(lines)} clips{heard}, {total / 3600:.2f} h; left out: {len(broken)} broken, {without}")
    return 1 if broken else 0


def replace(path: Path, lines: list[str]) -> None:
    """Put lines in a file's place, whole or not at all; no lines, no file."""
    if not lines:
        return path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    try:
        with new.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{line}\n" for line in lines)
        return os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("source", help="its folder; of huggingface, a folder or a name")
    parser.add_argument("--out", type=Path, required=True, help="the jsonl; audio in its folder is named relative to it")
    parser.add_argument("--split", help="which part, where the corpus has several")
    parser.add_argument("--untranscribed", action="store_true", help="keep clips without a transcript: lines without txt")
    parser.add_argument("--config", help="huggingface: the configuration of the dataset, as en")
    parser.add_argument("--text_field", help="huggingface: the column of the transcript")
    args = parser.parse_args(argv)
    with one_line_errors():
        try:
            if args.out.suffix != ".jsonl":
                raise InputError(f"--out {args.out}: give it a name that ends in .jsonl")
            return prepare(list(CORPORA[args.corpus](Path(args.source), args)), args.out, args.untranscribed)
        except OSError as error:
            raise InputError(f"{error.filename or args.out}: {error.strerror}") from None
        except KeyboardInterrupt:
            raise InputError(f"interrupted: {args.out} is as it was") from None


if __name__ == "__main__":
    sys.exit(main())
