"""WER of the shipped checkpoint by decoder and set, and that of Whisper tiny.en itself on the same clips.

    apt-get install pocketsphinx-testdata          # the LibriVox clips; left out where they are not there
    python benchmarks/decoders.py [--checkpoint demo/pretrained …] [--joint_weight 0.5 1 2]

Whisper's English normalizer. dev: every fourth of the demo's training prompts, on which --joint_weight is chosen.
"""

import argparse
import re
import sys
import time
from itertools import product
from pathlib import Path

import whisper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import load_audio
from manifest import Record, read_manifest
from recognize import DecodeArguments, Transcriber, recognize, use_shipped
from score import normalizer, score
from settings import ModelArguments, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
LIBRIVOX = Path("/usr/share/pocketsphinx/test/data/librivox")


def librivox() -> list[Record]:
    """The clips of pocketsphinx-testdata with the words of its transcription file: `words (name)` a line."""
    lines = (LIBRIVOX / "transcription").read_text().splitlines() if LIBRIVOX.is_dir() else []
    found = [re.fullmatch(r"(?:<s>)?\s*(.*?)\s*(?:</s>)?\s*\((\S+)\)", line) for line in lines]
    return [Record(m[2], LIBRIVOX / f"{m[2]}.wav", m[1], None, "") for m in found if m]


def wer(records: list[Record], texts: dict[str, str]) -> str:
    rate = score({record.key: record.txt for record in records}, texts, normalizer("english")).words.rate
    return f"{100 * rate:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="+", default=[str(ROOT / "demo" / "pretrained")])
    parser.add_argument("--joint_weight", type=float, nargs="*", default=[DecodeArguments.joint_weight])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--decoders", nargs="*", choices=["ctc", "llm", "joint"], default=["ctc", "llm", "joint"])
    parser.add_argument("--without_whisper", action="store_true", help="leave out the row of Whisper itself")
    parser.add_argument("--sets", nargs="*", default=["dev", "test", "librivox"])
    args = parser.parse_args()
    data = ROOT / "demo" / "data"
    sets = {
        "dev": list(read_manifest(data / "train.jsonl"))[3::4],
        "test": list(read_manifest(data / "test.jsonl")),
        "librivox": librivox(),
    }
    sets = {name: sets[name] for name in args.sets if sets[name]}
    rows = {"ctc": {"decoder": "ctc"}, "llm, greedy": {"decoder": "llm", "num_beams": 1}}
    rows["llm, beam 4"] = {"decoder": "llm", "num_beams": 4}
    for weight in args.joint_weight:
        for beams in (1, 4):
            name = f"joint {weight:g}, {'greedy' if beams == 1 else f'beam {beams}'}"
            rows[name] = {"decoder": "joint", "num_beams": beams, "joint_weight": weight}

    rows = {name: options for name, options in rows.items() if options["decoder"] in args.decoders}
    print("| decoder | " + " | ".join(f"{name} ({len(records)})" for name, records in sets.items()) + " | × real time |")
    print("|---" * (len(sets) + 2) + "|")
    models = ModelArguments()
    use_shipped(models)
    for checkpoint, (name, options) in product(args.checkpoint, rows.items()):
        models.checkpoint = checkpoint
        transcriber = Transcriber.from_arguments(models, DecodeArguments(dtype=args.dtype, **options))
        cells, seconds, start = [], 0.0, time.monotonic()
        for records in sets.values():
            outcomes = recognize(transcriber, records, 16)
            seconds += sum(outcome.seconds for outcome in outcomes)
            cells.append(wer(records, {outcome.key: outcome.text for outcome in outcomes}))
        name = name if len(args.checkpoint) == 1 else f"{checkpoint}, {name}"
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds / (time.monotonic() - start):.1f} |", flush=True)
    if args.without_whisper:
        return

    teacher = whisper.load_model(models.whisper_model_name_or_path, device="cpu")
    cells, seconds, start = [], 0.0, time.monotonic()
    for records in sets.values():
        texts = {}
        for record in records:
            audio, _ = load_audio(*record.part)
            seconds += len(audio) / 16000
            texts[record.key] = teacher.transcribe(audio, language="en", fp16=False, beam_size=5)["text"]
        cells.append(wer(records, texts))
    print("| Whisper tiny.en, beam 5 | " + " | ".join(cells) + f" | {seconds / (time.monotonic() - start):.1f} |")


if __name__ == "__main__":
    with one_line_errors():
        main()
