"""WER of one long file against that of its parts, one by one: what cutting at pauses costs.

    python benchmarks/long_audio.py                                # 60 minutes, the default decoder
    python benchmarks/long_audio.py --minutes 10 --decoder ctc --vad energy silero none

The file is made of the demo's real prompts (train and test, shuffled by --seed, again and again until it is long enough),
with silences of 0.3 to 3 s between them: noise of --silence_db below full scale. Whisper's English normalizer; every row is
scored against all words as one text, `prompt by prompt` in the plain way too. --target: pieces end in the longest pause of
the second half of so many seconds.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import longform
from align import Counts, count
from audio import SAMPLE_RATE, load_audio
from decoding import recognize
from manifest import Record, read_manifest
from score import normalizer
from settings import ModelArguments, one_line_errors
from transcriber import VOTES, DecodeArguments, Transcriber, use_shipped

DATA = Path(__file__).resolve().parent.parent / "demo" / "data"


def make(path: Path, minutes: float, seed: int, silence_db: float) -> list[Record]:
    """Write the long file; returns the record of each prompt in it, in order."""
    rng = np.random.default_rng(seed)
    prompts = [record for name in ("train", "test") for record in read_manifest(DATA / f"{name}.jsonl")]
    used, samples = [], 0
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, channels=1) as file:
        while samples < minutes * 60 * SAMPLE_RATE:
            if len(used) % len(prompts) == 0:
                order = rng.permutation(len(prompts))
            record = prompts[order[len(used) % len(prompts)]]
            length = int(rng.uniform(0.3, 3) * SAMPLE_RATE)
            silence = 10 ** (silence_db / 20) * rng.standard_normal(length)
            for audio in (load_audio(*record.part)[0], silence):
                file.write(audio)
                samples += len(audio)
            used.append(record)
    return used


def errors(pairs: list[tuple[str, str]]) -> Counts:
    """Word errors of (reference, hypothesis) texts."""
    normalize = normalizer("english")
    return sum((count(*(normalize(text).split() for text in pair)) for pair in pairs), Counts())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--decoder", choices=["auto", *VOTES], default="auto")
    parser.add_argument("--num_beams", type=int, default=DecodeArguments.num_beams)
    parser.add_argument("--batch_size", type=int, default=DecodeArguments.batch_size)
    parser.add_argument("--vad", nargs="+", choices=list(longform.DETECTORS), default=["energy"])
    parser.add_argument("--target", type=float, nargs="+", default=[longform.TARGET * longform.FRAME / SAMPLE_RATE])
    parser.add_argument("--silence_db", type=float, default=-70)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    models = ModelArguments()
    use_shipped(models)
    options = {"decoder": args.decoder, "num_beams": args.num_beams}
    transcriber = Transcriber.from_arguments(models, DecodeArguments(**options))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.flac"
        used = make(path, args.minutes, args.seed, args.silence_db)
        words = " ".join(record.txt for record in used)
        print(f"{soundfile.info(path).duration / 60:.1f} minutes, {len(used)} prompts; decoder {transcriber.decoder}\n")
        print("| row | pieces, s | WER | WER, as one text | × real time |\n|---|---|---|---|---|", flush=True)

        once = list({record.key: record for record in used}.values())
        start = time.monotonic()
        outcomes = list(recognize(transcriber, once, args.batch_size))
        speed = sum(outcome.duration for outcome in outcomes) / (time.monotonic() - start)
        texts = {outcome.key: outcome.text for outcome in outcomes}
        rate = 100 * errors([(record.txt, texts[record.key]) for record in used]).rate
        joined = 100 * errors([(words, " ".join(texts[record.key] for record in used))]).rate
        print(f"| prompt by prompt | – | {rate:.2f} | {joined:.2f} | {speed:.1f} |", flush=True)

        for vad in args.vad:
            for target in args.target:
                longform.TARGET, transcriber.args.vad = longform.frames(target), vad
                lengths = [len(piece.audio) / SAMPLE_RATE for piece in longform.Pieces(path, vad=vad)]
                start = time.monotonic()
                (outcome,) = recognize(transcriber, [Record("long", path, words, None, "")], args.batch_size)
                speed = outcome.duration / (time.monotonic() - start)
                long = 100 * errors([(words, outcome.text)]).rate
                spread = f"{len(lengths)}: {min(lengths):.1f} to {max(lengths):.1f}, mean {np.mean(lengths):.1f}"
                print(f"| one file, --vad {vad}, {target:g} s | {spread} | – | {long:.2f} | {speed:.1f} |", flush=True)
                print(f"difference {long - rate:+.2f} points {outcome.error}", file=sys.stderr)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    with one_line_errors():
        main()
