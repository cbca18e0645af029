"""WER of the shipped checkpoint by decoder, beam and set, and that of Whisper tiny.en itself on the same clips.

    apt-get install pocketsphinx-testdata          # the LibriVox clips; left out where they are not there
    python benchmarks/decoders.py [--checkpoint demo/pretrained …] [--joint_weight 0.5 1 2] [--length_bonus 0] …
    python benchmarks/decoders.py --beams 1 3 4 5 8 10 --without_whisper                        # the table of beams
    python benchmarks/decoders.py --invariance --dtype bfloat16          # texts that the size of a batch changes

Whisper's English normalizer. dev: every fourth of the demo's training prompts; --sets train: all of them, on which
--joint_weight, --length_bonus and --beam_threshold were chosen.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import whisper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import load_audio
from manifest import Record, read_manifest
from score import normalizer, score
from settings import ModelArguments, one_line_errors
from transcriber import VOTES, DecodeArguments, Transcriber, use_shipped

ROOT = Path(__file__).resolve().parent.parent
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")


def librivox() -> list[Record]:
    """The clips of pocketsphinx-testdata with the words of its transcription file: `words (name)` a line."""
    lines = (LIBRIVOX / "transcription").read_text().splitlines() if LIBRIVOX.is_dir() else []
    found = [re.fullmatch(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)", line) for line in lines]
    return [Record(m[2], LIBRIVOX / f"{m[2]}.wav", m[1], None, "") for m in found if m]


def wer(records: list[Record], texts: Sequence[str]) -> str:
    hypotheses = {record.key: text for record, text in zip(records, texts, strict=True)}
    rate = score({record.key: record.txt for record in records}, hypotheses, normalizer("english")).words.rate
    return f"{100 * rate:.1f}"


def decoders(beams: Sequence[int], weights: Sequence[float | None], chosen: Sequence[str]) -> dict[str, dict]:
    """Rows of the table: DecodeArguments' fields by name."""
    rows = {"ctc": {"decoder": "ctc"}} if "ctc" in chosen else {}
    for decoder in [decoder for decoder in ("llm", "joint", "fusion") if decoder in chosen]:
        for weight in [None] if decoder == "llm" else weights:
            if decoder == "fusion" and weight == 0:
                continue  # an LLM that hears nothing, alone
            for count in beams:
                name = "llm" if decoder == "llm" else f"{decoder} {VOTES[decoder][0] if weight is None else weight:g}"
                search = {"decoder": decoder, "joint_weight": weight, "num_beams": count}
                rows[f"{name}, {'greedy' if count == 1 else f'beam {count}'}"] = search
    return rows


def accuracy(transcriber: Transcriber, name: str, sets: dict[str, list[Record]]) -> None:
    cells, seconds, start = [], 0.0, time.monotonic()
    for records in sets.values():
        found = transcriber([record.wav for record in records])
        seconds += sum(transcript.duration for transcript in found)
        cells.append(wer(records, [transcript.text for transcript in found]))
    print(f"| {name} | " + " | ".join(cells) + f" | {seconds / (time.monotonic() - start):.1f} |", flush=True)


def invariance(transcriber: Transcriber, name: str, sets: dict[str, list[Record]], size: int) -> None:
    """How many texts a clip's company changes, and whether that makes them worse."""
    alone = Transcriber(transcriber.model, transcriber.prompt, replace(transcriber.args, batch_size=1))
    together = Transcriber(transcriber.model, transcriber.prompt, replace(transcriber.args, batch_size=size))
    cells = []
    for records in sets.values():
        one, many = ([found.text for found in t([record.wav for record in records])] for t in (alone, together))
        changed = sum(a != b for a, b in zip(one, many, strict=True))
        cells.append(f"{changed} of {len(records)}, WER {wer(records, one)} / {wer(records, many)}")
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", default=[str(ROOT / "demo" / "pretrained")])
    parser.add_argument("--joint_weight", type=float, nargs="*", default=[None])
    parser.add_argument("--length_bonus", type=float, default=DecodeArguments.length_bonus)
    parser.add_argument("--beam_threshold", type=float, default=DecodeArguments.beam_threshold)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4, 10], help="1 is greedy")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--decoders", nargs="*", choices=VOTES, default=VOTES)
    parser.add_argument("--without_whisper", action="store_true", help="leave out the row of Whisper itself")
    parser.add_argument("--invariance", action="store_true", help="batches of 1 against those of --batch_size instead")
    parser.add_argument("--sets", nargs="*", default=["dev", "test", "librivox"])
    parser.add_argument("--clips", type=int, help="of each set only the first so many")
    args = parser.parse_args()
    data = ROOT / "demo" / "data"
    prompts = list(read_manifest(data / "train.jsonl"))
    sets = {
        "train": prompts,
        "dev": prompts[3::4],
        "test": list(read_manifest(data / "test.jsonl")),
        "librivox": librivox(),
    }
    sets = {name: sets[name][: args.clips] for name in args.sets if sets[name]}
    last = [] if args.invariance else ["× real time"]
    head = ["decoder", *(f"{name} ({len(records)})" for name, records in sets.items()), *last]
    if args.invariance:
        print(f"texts that differ between batches of 1 and {args.batch_size} in {args.dtype}, and the WER of both\n")
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    models = ModelArguments()
    use_shipped(models)
    for checkpoint in args.checkpoint:
        models.checkpoint = checkpoint
        options = DecodeArguments(dtype=args.dtype, device=args.device, batch_size=args.batch_size, guard="off")
        options.length_bonus, options.beam_threshold = args.length_bonus, args.beam_threshold
        loaded = Transcriber.from_arguments(models, options)
        for name, row in decoders(args.beams, args.joint_weight, args.decoders).items():
            name = name if len(args.checkpoint) == 1 else f"{checkpoint}, {name}"
            transcriber = Transcriber(loaded.model, loaded.prompt, replace(options, **row))
            if args.invariance:
                invariance(transcriber, name, sets, args.batch_size)
            else:
                accuracy(transcriber, name, sets)
    if args.without_whisper or args.invariance:
        return

    teacher = whisper.load_model(models.whisper_model_name_or_path, device="cpu")
    cells, seconds, start = [], 0.0, time.monotonic()
    for records in sets.values():
        texts = []
        for record in records:
            audio, _ = load_audio(*record.part)
            seconds += len(audio) / 16000
            texts.append(teacher.transcribe(audio, language="en", fp16=False, beam_size=5)["text"])
        cells.append(wer(records, texts))
    print("| Whisper tiny.en, beam 5 | " + " | ".join(cells) + f" | {seconds / (time.monotonic() - start):.1f} |")


if __name__ == "__main__":
    with one_line_errors():
        main()
