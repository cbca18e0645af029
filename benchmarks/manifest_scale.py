"""Opens a manifest of a million lines: seconds, memory, the first batch, and memory over steps with two data workers.

    python benchmarks/manifest_scale.py                       # demo/models' tokenizer, tiny.en's sizes
    python benchmarks/manifest_scale.py --lines 100000 --longest 30

The lines name clips of 1 to --longest seconds with 14 letters a second; all of them one wav file, since what is measured
is the manifest. Each measurement is a process of its own. Memory is what stands resident beyond the imports, its peak.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from transformers import TrainingArguments  # noqa: E402, F401  (its imports are no memory of the manifest)

from batches import DurationSampler  # noqa: E402
from dataset import SpeechCollator, SpeechDataset  # noqa: E402
from manifest import read_manifest  # noqa: E402
from prompt import Prompt, Spelling, load_tokenizer  # noqa: E402
from settings import ModelArguments, resolve_settings  # noqa: E402

RATE = 16000


def write(folder: Path, lines: int, longest: float) -> Path:
    rng, path = random.Random(0), folder / "train.jsonl"
    known = [json.loads(line)["txt"].split() for line in (ROOT / "demo/data/train.jsonl").open(encoding="utf-8")]
    words = sorted({word for text in known for word in text})
    words += ["".join(rng.choices("etaoinshrdlucmfwypvbgk", k=rng.randint(3, 9))) for _ in range(50_000)]
    soundfile.write(folder / "clip.wav", np.zeros(int(longest * RATE), np.float32), RATE)
    with path.open("w", encoding="utf-8") as file:
        for i in range(lines):
            duration, text, letters = rng.uniform(1, longest), [], 0
            while letters < 14 * duration:
                text.append(rng.choice(words[:700] if rng.random() < 0.8 else words))
                letters += len(text[-1]) + 1
            line = {"key": f"speaker{i % 999}-{i}", "wav": "clip.wav", "txt": " ".join(text[:-1]), "duration": duration}
            file.write(json.dumps(line) + "\n")
    return path


def status(name: str, pid: int | str = "self") -> float:
    """MB by a line of /proc/…/status (resident: VmRSS, its peak: VmHWM) or smaps_rollup (Private_Dirty: its own)."""
    file = "smaps_rollup" if name.startswith("Private") else "status"
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1e3


def open_and_read(path: Path, llm: str, splice: str, steps: int) -> None:
    settings = resolve_settings(
        ModelArguments(llm_model_name_or_path=llm, whisper_model_name_or_path="tiny.en", splice=splice), None
    )
    settings["encoder"] |= {"n_mels": 80}
    tokenizer = load_tokenizer(llm)
    before, marks = status("VmRSS"), [(time.perf_counter(), time.process_time())]
    mark = lambda: marks.append((time.perf_counter(), time.process_time()))  # noqa: E731
    manifest = read_manifest(path)
    mark()
    if splice == "tokens":
        settings["ctc_tokens"] = Spelling.choose(tokenizer, manifest.some_texts(), settings["ctc_merges"]).tokens
    mark()
    dataset = SpeechDataset(manifest, Prompt.build(tokenizer, None, settings), settings, 512)
    mark()
    peak = status("VmHWM") - before
    sampler = DurationSampler(dataset.lengths, 120, seed=0)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, collate_fn=SpeechCollator(), num_workers=2, prefetch_factor=2
    )
    batches = iter(loader)
    next(batches)
    mark()
    print(f"{splice}: {len(manifest)} lines, {path.stat().st_size / 1e6:.0f} MB: {dataset.summary()}")
    print("  seconds (of them this process computing, when others had the cores too):")
    stages = ("read and checked", "the CTC's tokens chosen", "what fits sorted out", f"first batch, one of {len(sampler)}")
    for stage, (wall, cpu), (wall_before, cpu_before) in zip(stages, marks[1:], marks, strict=False):
        print(f"    {wall - wall_before:5.1f} ({cpu - cpu_before:.1f})  {stage}")
    print(f"  at most {peak:.0f} MB resident beyond the imports")
    workers = [worker.pid for worker in batches._workers]
    for step in range(2, steps + 1):
        next(batches)
        if step in {round(steps * part) for part in (0.1, 0.25, 0.5, 0.75, 1)}:
            own = " + ".join(f"{status('Private_Dirty', pid):.0f}" for pid in workers)
            print(f"  after {step} steps: {status('VmRSS'):.0f} MB resident, workers' own {own} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--longest", type=float, default=20.0, help="seconds")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--llm", default=str(ROOT / "demo/models/SmolLM2-135M-Instruct"))
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--splice", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.manifest:
        return open_and_read(args.manifest, args.llm, args.splice, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), args.lines, args.longest)
        for splice in ("tokens", "frames"):
            flags = ["--manifest", path, "--splice", splice, "--llm", args.llm, "--steps", str(args.steps)]
            subprocess.run([sys.executable, __file__, *map(str, flags)], check=True)
    return None


if __name__ == "__main__":
    main()
