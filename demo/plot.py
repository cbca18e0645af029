"""Loss curve of a finished training: python demo/plot.py OUTPUT_DIR CURVE.png"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(output_dir: str, png: str) -> None:
    state = json.loads(Path(output_dir, "trainer_state.json").read_text(encoding="utf-8"))
    points = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*points, strict=True), linewidth=1.5)
    axes.set(xlabel="optimizer step", ylabel="loss a token", title=f"Training loss, {output_dir}", ylim=(0, None))
    axes.grid(alpha=0.3)
    partial = Path(png).with_suffix(".partial.png")
    figure.savefig(partial, dpi=120)
    partial.replace(png)


if __name__ == "__main__":
    main(*sys.argv[1:])
