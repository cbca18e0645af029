"""Scores 100,000 made-up utterances: seconds on one core and memory, of each part of score.py.

    python benchmarks/score_scale.py
    python benchmarks/score_scale.py --lines 10000 --normalizer english

Texts are English words drawn from the demo's transcripts, 3 to 20 in an utterance, 10 % of them damaged. Each row is a
process of its own, with one thread; its memory is what stands resident at its peak, beyond the imports. Seconds are those it
computed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "WER, CER": ["--hyp", "a.txt"],
    "frequent errors, worst clips": ["--hyp", "a.txt", "--errors"],
    "a page to look at": ["--hyp", "a.txt", "--html", "report.html"],
    "raw beside it, by speaker": ["--hyp", "a.txt", "--by", "speaker"],
    "two systems, raw beside them, bootstrap": ["--hyp", "a.txt", "b.txt"],
}
CHILD = """
import json, resource, sys, time
import score, normalize
normalize.normalizer(sys.argv[sys.argv.index("--normalizer") + 1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1000)  # kB to MB
before, start = peak(), time.process_time()
score.main(sys.argv[1:])
print(json.dumps([time.process_time() - start, peak() - before]), file=sys.stderr)
"""


def write(folder: Path, lines: int) -> None:
    rng = random.Random(0)
    demo = (ROOT / "demo/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    words = sorted({word for line in demo for word in json.loads(line)["txt"].split()})
    with (folder / "ref.jsonl").open("w") as ref, (folder / "a.txt").open("w") as a, (folder / "b.txt").open("w") as b:
        for i in range(lines):
            said = rng.choices(words, k=rng.randint(3, 20))
            line = {"key": f"clip{i}", "txt": " ".join(said), "duration": len(said) / 2.5, "speaker": f"s{i % 500}"}
            ref.write(json.dumps(line) + "\n")
            for file in (a, b):
                heard = [rng.choice(words) if rng.random() < 0.06 else word for word in said if rng.random() > 0.04]
                file.write(f"clip{i} {' '.join(heard)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--normalizer", default="basic")
    args = parser.parse_args()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    print(f"{args.lines} utterances, normalizer {args.normalizer}\n\n| what | seconds | MB |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.lines)
        for what, flags in FLAGS.items():
            command = [sys.executable, "-c", CHILD, "--ref", "ref.jsonl", *flags, "--normalizer", args.normalizer]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            seconds, megabytes = json.loads(done.stderr.splitlines()[-1])
            print(f"| {what} | {seconds:.1f} | {megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
