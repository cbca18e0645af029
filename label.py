"""Speech without transcripts → what a Whisper teacher hears in it, and how sure it is; filter_labels.py keeps the good ones.

    python label.py --teacher large-v3 --data_path speech.jsonl --out labelled
    python filter_labels.py --labels labelled            # → labelled/kept.jsonl, a manifest to train on

OUT/labels.jsonl has a line for every clip, whatever its quality, in the manifest's order: `txt`, by the teacher, its
`language`, Whisper's own measures, the manifest's `transcript`, if it has one, and `txt2` of a second decoding; `problem`
instead for a file that cannot be read, which makes the exit code 1.

Every clip is padded to 30 s, as in Whisper's own training: with less, its decoder does not know when to stop. Labelling
that was interrupted, by kill -9 too, continues when it is started again. Raises InputError.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import whisper
from torch import Tensor
from tqdm import tqdm
from whisper.audio import N_SAMPLES, N_SAMPLES_PER_TOKEN, SAMPLE_RATE
from whisper.decoding import DecodingOptions, DecodingResult, DecodingTask
from whisper.tokenizer import LANGUAGES, Tokenizer, get_tokenizer

from audio import log_mel
from decoding import out_of_memory
from longform import Pieces
from manifest import Record, read_manifest
from settings import InputError, first_line, one_line_errors, parse
from transcriber import usable_device

LONGEST = N_SAMPLES // SAMPLE_RATE  # seconds
FIGURES = frozenset("0123456789%$£€¥")
HOW_SURE = ("avg_logprob", "compression_ratio", "no_speech_prob")  # as Whisper measures them


def flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class LabelArguments:
    """How the teacher listens: another value makes another set of labels."""

    teacher: str | None = flag(None, "Whisper by openai-whisper's name, or a .pt file.")
    data_path: str | None = flag(None, 'Manifest (jsonl) of the speech, with or without "txt".')
    language: str | None = flag(None, "en, zh, ja …; by default the teacher finds out, clip by clip.")
    beam_size: int = flag(1, "Of its beam search; 1 is greedy.")
    timestamps: bool = flag(False, "Cut clips over 30 s by Whisper's timestamps; else they are dropped.")
    suppress_numerals: bool = flag(False, "No figures: numbers are written as words.")
    teacher2: str | None = flag(None, "A second Whisper, to see where both agree.")
    beam_size2: int | None = flag(None, "Its beam, by default the first one's. Alone: the same teacher once more.")


@dataclass
class RunArguments:
    out: str | None = flag(None, "Folder for labels.jsonl.")
    batch_size: int = flag(16, "Clips that are decoded together.")
    device: str | None = flag(None, "cuda, cpu …; by default the best there is.")


class BatchedTask(DecodingTask):
    """Whisper's decoding of several clips with several beams: openai-whisper 20250625 repeats the tokens, not the speech."""

    def _get_audio_features(self, mel: Tensor) -> Tensor:
        return super()._get_audio_features(mel).repeat_interleave(self.n_group, dim=0)  # (B · beams, 1500, d)

    def _detect_language(self, audio_features: Tensor, tokens: Tensor) -> tuple:
        return super()._detect_language(audio_features[:: self.n_group], tokens)


class Listener:
    """A Whisper model and how it is to listen."""

    def __init__(self, name: str, beam_size: int, args: LabelArguments, run: RunArguments) -> None:
        device = usable_device(run.device)
        try:
            self.model = whisper.load_model(name, device=device)
        except Exception as error:  # no such file, no network, no checkpoint: a dozen types
            names = ", ".join(whisper.available_models())
            raise InputError(
                f"cannot load the teacher {name!r} ({first_line(error)}): a .pt file, or one of {names}"
            ) from None
        multilingual, self.batch_size = self.model.is_multilingual, run.batch_size
        if not multilingual and args.language not in (None, "en"):
            raise InputError(f"--language {args.language}: the teacher {name} knows English alone")
        language = args.language if multilingual else "en"
        self.tokenizer = get_tokenizer(multilingual, num_languages=self.model.num_languages, language=language)
        ids = range(self.tokenizer.eot if args.suppress_numerals else 0)
        self.options = DecodingOptions(
            language=language,
            beam_size=beam_size if beam_size > 1 else None,
            without_timestamps=not args.timestamps,
            suppress_tokens=[-1, *(i for i in ids if FIGURES.intersection(self.tokenizer.decode([i])))],
            fp16=device.type == "cuda",
        )

    def hear(self, clips: Sequence[np.ndarray]) -> Iterator[DecodingResult]:
        """What Whisper makes of each clip, float32 (samples,) of at most 30 s at 16 kHz."""
        for first in range(0, len(clips), self.batch_size):
            batch, on = clips[first : first + self.batch_size], self.model.device
            mel = torch.stack([log_mel(clip, self.model.dims.n_mels, "30s", on) for clip in batch])  # (B, n_mels, 3000)
            try:
                yield from BatchedTask(self.model, self.options).run(mel.to(self.model.device))
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error):
                    raise InputError(
                        f"out of memory on {len(batch)} clips: start again with a smaller --batch_size"
                    ) from None
                raise


def phrases(tokens: Sequence[int], tokenizer: Tokenizer, seconds: float) -> Iterator[tuple[float, float, str]]:
    """(start, end, text) of what Whisper put between two timestamps, or after the last one, in so many seconds."""
    start, ids = 0.0, []
    for token in [*tokens, None]:
        if token is not None and token < tokenizer.timestamp_begin:
            ids.append(token)
            continue
        time = seconds if token is None else (token - tokenizer.timestamp_begin) * N_SAMPLES_PER_TOKEN / SAMPLE_RATE
        time = min(time, seconds)  # the padding has times too
        if ids and time > start:
            yield start, time, tokenizer.decode(ids)
        start, ids = time, []


def named(record: Record) -> dict:
    part = {"start": record.start, "end": record.end}
    return {"key": record.key, "wav": os.path.abspath(record.wav)} | {k: t for k, t in part.items() if t is not None}


def pieces_of(record: Record, timestamps: bool) -> tuple[list[tuple[float | None, np.ndarray]], list[dict]]:
    """What is to be heard of a clip: (None, samples), or (start in the file, samples) of each piece of one over 30 s; or
    the line that says why there is nothing."""
    pieces = Pieces(*record.part)
    try:
        found = [(piece.start + (record.start or 0), piece.audio) for piece in pieces]
        problem = pieces.problem or ("" if pieces.seconds else "has no samples")
    except InputError as error:
        problem = str(error)
    if problem:
        return [], [named(record) | {"problem": problem}]
    if pieces.seconds <= LONGEST:
        return [(None, audio) for _, audio in found], []
    if timestamps and found:
        return found, []
    return [], [named(record) | {"duration": round(pieces.seconds, 3)} | ({"txt": ""} if timestamps else {})]


def label(listeners: Sequence[Listener], records: Sequence[Record], timestamps: bool) -> list[list[dict]]:
    """The lines of each record: one, or one a phrase if it is over 30 s; one without "txt" where it cannot be labelled.

    The first listener writes "txt" and how sure it was, the second, if there is one, "txt2".
    """
    pieces, lines = map(list, zip(*(pieces_of(record, timestamps) for record in records), strict=True))
    flat = [(i, at, audio) for i, some in enumerate(pieces) for at, audio in some]
    spoken: list[tuple[dict, np.ndarray]] = []
    for (i, at, audio), heard in zip(flat, listeners[0].hear([audio for *_, audio in flat]), strict=True):
        record, seconds = records[i], len(audio) / SAMPLE_RATE
        spans = [(0.0, seconds, heard.text)]
        if at is not None:
            spans = list(phrases(heard.tokens, listeners[0].tokenizer, seconds)) or spans
        for start, end, text in spans:
            line = named(record) | {"txt": " ".join(text.split()), "duration": round(end - start, 3)}
            line |= {name: round(getattr(heard, name), 4) for name in HOW_SURE} | {"language": heard.language}
            if at is not None:
                line |= {"start": round(at + start, 3), "end": round(at + end, 3)}
                line["key"] += f"-{round(1000 * line['start'])}-{round(1000 * line['end'])}"
            elif record.txt is not None:
                line["transcript"] = record.txt
            lines[i].append(line)
            spoken.append((line, audio[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)]))
    for second in listeners[1:]:
        for (line, _), heard in zip(spoken, second.hear([audio for _, audio in spoken]), strict=True):
            line["txt2"] = " ".join(heard.text.split())
    return lines


def batches(records: Iterable[Record], batch_size: int) -> Iterator[list[Record]]:
    """Clips of like durations together, so that their texts end together; a clip over 30 s alone."""
    batch: list[Record] = []
    for record in sorted(records, key=lambda record: record.duration or 0):
        batch.append(record)
        if len(batch) == batch_size or (record.duration or 0) > LONGEST:
            yield batch
            batch = []
    yield from [batch] if batch else []


def read_lines(path: Path) -> list:
    """The JSON lines of a file that label.py wrote; a last line that a kill cut off is left out."""
    try:
        whole = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise InputError(f"{path}: not as label.py wrote it ({error}): remove it to label again") from None


def write_lines(path: Path, lines: Iterable) -> None:
    """A JSON line each, and at once: the file is all there or as it was before."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    os.replace(new, path)


def label_manifest(args: LabelArguments, run: RunArguments, out: Path) -> list[dict]:
    """Write OUT/labels.jsonl, in the manifest's order, and return its lines.

    Finished clips wait in OUT/labels.partial, a JSON line each; OUT/labels.json says how the teacher listens.
    """
    manifest = read_manifest(args.data_path, need_txt=False)
    made_by = asdict(args) | {"data_path": sha256(manifest.path.read_bytes()).hexdigest()}
    labels, partial, how = out / "labels.jsonl", out / "labels.partial", out / "labels.json"
    out.mkdir(parents=True, exist_ok=True)
    (before,) = read_lines(how) or [made_by]
    if different := [name for name in made_by if before.get(name) != made_by[name]]:
        raise InputError(f"{out} has labels with another {', '.join(different)}: give another --out, or remove that one")
    if labels.exists():
        print(f"{labels} is there: nothing to label", file=sys.stderr)
        return read_lines(labels)
    write_lines(how, [made_by])
    done: dict[str, list[dict]] = dict(read_lines(partial))
    write_lines(partial, done.items())
    todo = [record for record in manifest if record.key not in done]
    if done:
        print(f"continuing: {len(done)} of {len(manifest)} are labelled", file=sys.stderr)
    listeners = [Listener(args.teacher, args.beam_size, args, run)]
    if args.teacher2 or args.beam_size2:
        listeners.append(Listener(args.teacher2 or args.teacher, args.beam_size2 or args.beam_size, args, run))
    with tqdm(total=len(todo), unit="clip", disable=None) as bar, partial.open("a", encoding="utf-8") as file:
        for batch in batches(todo, run.batch_size):
            for record, lines in zip(batch, label(listeners, batch, args.timestamps), strict=True):
                done[record.key] = lines
                print(json.dumps([record.key, lines], ensure_ascii=False), file=file, flush=True)
            bar.update(len(batch))
    lines = [line for record in manifest for line in done[record.key]]
    write_lines(labels, lines)
    partial.unlink()
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    with one_line_errors():
        args, run = parse((LabelArguments, RunArguments), argv)
        if not (args.teacher and args.data_path and run.out):
            raise InputError("give --teacher, --data_path and --out, a folder for labels.jsonl")
        if args.language not in (None, *LANGUAGES):
            raise InputError(f"--language {args.language}: Whisper knows {', '.join(LANGUAGES)}")
        if min(args.beam_size, args.beam_size2 or 1, run.batch_size) < 1:
            raise InputError("--beam_size, --beam_size2 and --batch_size must be at least 1")
        try:
            lines = label_manifest(args, run, Path(run.out))
        except OSError as error:  # bad files are told one by one: what is left is the folder
            raise InputError(f"{error.filename or run.out}: cannot write ({error.strerror})") from None
        except KeyboardInterrupt:
            raise InputError("interrupted: the same command continues where it stopped") from None
        bad = [line for line in lines if "problem" in line]
        for line in bad:
            print(f"{line['key']}: {line['problem']}", file=sys.stderr)
        hours = sum(line.get("duration", 0) for line in lines) / 3600
        print(f"{Path(run.out) / 'labels.jsonl'}: {len(lines)} lines, {hours:.2f} h, {len(bad)} files that cannot be read")
        return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
