"""What the guard of guard.py takes away and what it costs, with the checkpoint that comes along.

    python benchmarks/invented_words.py          # the demo's test split, and what is made with seed 1
    python benchmarks/invented_words.py --dev    # what the thresholds were chosen on: dev, and what is made with seed 0

Of each decoder, without and with the guard (one decoding serves both: what the guard replaced is kept), float32:
WER (score.py, Whisper's English normalizer) on the prompts, on some of them at −50 dB and under pink noise as loud as they
are less 5 dB; and invented words (score.py's insertions) in those prompts whose first text was a loop, and on sounds without
speech. dev is every fourth of the demo's training prompts.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import load_audio
from guard import guarded, with_and_without
from manifest import read_manifest
from scoring import Score
from settings import ModelArguments, one_line_errors
from transcriber import DecodeArguments, Transcriber, use_shipped

ROOT = Path(__file__).resolve().parent.parent
RATE = 16000
Sound = Callable[[np.random.Generator, int], np.ndarray]  # so many samples


class Clip(NamedTuple):
    key: str
    audio: np.ndarray
    txt: str


def gain(decibels: float) -> float:
    return 10 ** (decibels / 20)


def rms(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))


def coloured(rng: np.random.Generator, samples: int, slope: int) -> np.ndarray:
    """Noise of RMS 1 whose power falls as frequency to the power of `slope`: 0 white, 1 pink, 2 brown."""
    length = 2 ** samples.bit_length()  # a transform of a prime length is slow
    spectrum = rng.standard_normal((2, length // 2 + 1)).T @ [1, 1j]
    frequency = np.fft.rfftfreq(length, 1 / RATE).clip(min=20)
    noise = np.fft.irfft(spectrum * frequency ** (-slope / 2))[:samples]
    return noise / rms(noise)


def silence(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Nothing; nothing, dithered to 16 bits; a room with its mains hum."""
    mains, t = rng.choice([50, 60]), np.arange(samples) / RATE
    hum = sum(np.sin(2 * np.pi * mains * k * t + rng.uniform(0, 6)) / k for k in (1, 2, 3, 5))
    dither = np.round(rng.random(samples) - rng.random(samples)) / 2**15
    return [np.zeros(samples), dither, gain(-55) * hum + gain(-65) * coloured(rng, samples, 1)][rng.integers(3)]


def noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    return gain(rng.uniform(-60, -12)) * coloured(rng, samples, int(rng.integers(3)))


def tone(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A pure tone, or one beep a second."""
    t = np.arange(samples) / RATE
    on = 1 if rng.random() < 0.5 else t % 1 < rng.uniform(0.2, 0.8)
    return 0.2 * on * np.sin(2 * np.pi * rng.uniform(200, 3000) * t)


def note(pitch: float, samples: int, decay: float) -> np.ndarray:
    t = np.arange(samples) / RATE
    wave = sum(np.sin(2 * np.pi * pitch * k * t) / k**1.5 for k in range(1, 6))
    return wave * np.minimum(t / 0.01, 1) * np.exp(-t / decay)


def chords(rng: np.random.Generator, samples: int) -> np.ndarray:
    length = int(rng.uniform(0.5, 2) * RATE)
    sound = np.zeros(samples + length)
    for at in range(0, samples, length):
        root, third = 110 * 2 ** (rng.integers(24) / 12), rng.choice([3, 4])
        sound[at : at + length] = sum(note(root * 2 ** (step / 12), length, 2.0) for step in (0, third, 7))
    return 0.1 * sound[:samples]


def arpeggio(rng: np.random.Generator, samples: int) -> np.ndarray:
    length = int(rng.uniform(0.1, 0.3) * RATE)
    root = 110 * 2 ** (rng.integers(24) / 12)
    sound = np.zeros(samples + 2 * length)
    for at in range(0, samples, length):
        sound[at : at + 2 * length] += note(root * 2 ** (rng.choice([0, 4, 7, 12, 16]) / 12), 2 * length, 0.2)
    return 0.15 * sound[:samples]


def drums(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Kick, hat, snare, hat."""
    beat, length = int(rng.uniform(0.2, 0.4) * RATE), RATE // 5
    t = np.arange(length) / RATE
    sound = np.zeros(samples + length)
    for i, at in enumerate(range(0, samples, beat)):
        white = coloured(rng, length + 2, 0)
        kick = np.sin(2 * np.pi * (50 * t + 0.24 * (1 - np.exp(-t / 0.03)))) * np.exp(-t / 0.08)
        snare = 0.4 * white[:length] * np.exp(-t / 0.05)
        hat = 0.15 * np.diff(white)[:length] * np.exp(-t / 0.015)
        sound[at : at + length] += [kick, hat, snare, hat][i % 4]
    return 0.4 * sound[:samples]


SOUNDS: list[Sound] = [silence, noise, tone, chords, arpeggio, drums]


def sounds(make: Sound, seed: int, count: int) -> list[Clip]:
    """So many clips of 1 to 20 s, the short ones as likely as the long."""
    clips = []
    for i in range(count):
        rng = np.random.default_rng([seed, SOUNDS.index(make), i])
        clips.append(Clip(f"{make.__name__}{i}", make(rng, int(RATE * 20 ** rng.uniform())), ""))
    return clips


def sets(dev: bool, count: int) -> tuple[dict[str, list[Clip]], dict[str, list[Clip]]]:
    """Those measured by WER, and those by invented words."""
    data, seed = ROOT / "demo" / "data", 0 if dev else 1
    records = list(read_manifest(data / "train.jsonl"))[3::4] if dev else list(read_manifest(data / "test.jsonl"))
    prompts = [Clip(record.key, load_audio(*record.part)[0], record.txt) for record in records]
    rng, some = np.random.default_rng(seed), prompts[::3]
    quiet = [clip._replace(audio=gain(-50) * clip.audio) for clip in some]
    noisy = [
        clip._replace(audio=clip.audio + gain(-5) * rms(clip.audio) * coloured(rng, len(clip.audio), 1)) for clip in some
    ]
    speech = {"dev" if dev else "test": prompts, "quiet": quiet, "noisy": noisy}
    return speech, {make.__name__: sounds(make, seed, count) for make in SOUNDS}


def both(transcriber: Transcriber, clips: list[Clip], verbose: bool) -> tuple[Score, Score]:
    """Scores with and without the guard."""
    found = {}
    clips = sorted(clips, key=lambda clip: len(clip.audio))
    for start in range(0, len(clips), 8):
        batch = clips[start : start + 8]
        for clip, one in zip(batch, guarded(transcriber, [c.audio.astype(np.float32) for c in batch]), strict=True):
            found[clip.key] = one
            if verbose and one.flags:
                print(f"  {clip.key} {one.flags}: {one.unguarded!r} → {one.text!r} ({clip.txt!r})", file=sys.stderr)
    return with_and_without(found, {clip.key: clip.txt for clip in clips}, "english")


def loops(after: Score, before: Score) -> list[int]:
    """Invented words in the texts that were loops without the guard: with it, without it."""
    pairs = [pair for pair in zip(after.utterances, before.utterances, strict=True) if pair[1].hallucination == "loop"]
    return [sum(utterance.words.insertions for utterance in side) for side in zip(*pairs, strict=True)] or [0, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dev", action="store_true", help="what the thresholds were chosen on")
    parser.add_argument("--checkpoint", default=str(ROOT / "demo" / "pretrained"))
    parser.add_argument("--decoders", nargs="*", default=["ctc", "llm 1", "llm 4", "joint 1", "joint 4", "fusion 10"])
    parser.add_argument("--sets", nargs="*", help="some of them; all by default")
    parser.add_argument("--count", type=int, default=6, help="clips of each kind of sound")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--verbose", action="store_true", help="each replaced text, on stderr")
    args = parser.parse_args()
    models = ModelArguments()
    use_shipped(models)
    models.checkpoint = args.checkpoint
    system = Transcriber.from_arguments(models, DecodeArguments(dtype=args.dtype))
    speech, sound = ({n: c for n, c in s.items() if n in (args.sets or s)} for s in sets(args.dev, args.count))
    seconds = {name: sum(len(clip.audio) for clip in clips) / RATE for name, clips in (speech | sound).items()}
    print("without → with the guard: WER in %, then invented words")
    names = [f"{name} ({len(clips)}, {seconds[name]:.0f} s)" for name, clips in (speech | sound).items()]
    names.insert(len(speech), "loops")
    print(f"| decoder, beams | {' | '.join(names)} | all | removed |")
    print("|---" * (len(names) + 3) + "|")
    for row in args.decoders:
        decoder, *beams = row.split()
        options = DecodeArguments(dtype=args.dtype, decoder=decoder, num_beams=int(beams[0]) if beams else 1)
        transcriber = Transcriber(system.model, system.prompt, options)
        cells, invented = [], [[0, 0]]  # words: after, before
        for clips in speech.values():
            scores = both(transcriber, clips, args.verbose)
            after, before = (100 * result.words.rate for result in scores)
            cells.append(f"{before:.1f} → {after:.1f}")
            invented[0] = [sum(both) for both in zip(invented[0], loops(*scores), strict=True)]
        for clips in sound.values():
            invented.append([result.words.insertions for result in both(transcriber, clips, args.verbose)])
        invented.append(list(np.sum(invented, axis=0)))
        cells += [f"{before} → {after}" for after, before in invented]
        after, before = invented[-1]
        cells.append(f"{100 * (before - after) / before:.0f} %" if before else "–")
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
