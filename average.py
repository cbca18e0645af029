"""The mean of trained checkpoints: often it hears better than any of them.

    python average.py demo/pretrained exp --weights 0.35 0.65 --out exp/mean     # what a training started from, and its end
    python average.py run1 run2 run3 --out mean                                  # trainings from one start

Of a fine-tuning and its start: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (arXiv 2109.01903); of
several trainings: the same, "Model soups" (arXiv 2203.05482).
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from settings import InputError, differences, first_line, one_line_errors, parse, read_settings, read_weights, weights_file


@dataclass
class AverageArguments:
    out: str | None = field(default=None, metadata={"help": "Folder for the mean."})
    weights: list[float] | None = field(default=None, metadata={"help": "One for each checkpoint; by default equal."})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "bfloat16: half the size."})


def average(
    checkpoints: Sequence[str], weights: Sequence[float] | None, out: str | Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint whose tensors are the weighted means of those of `checkpoints`; raises InputError."""
    weights = [1.0] * len(checkpoints) if weights is None else weights
    if len(weights) != len(checkpoints):
        raise InputError(f"--weights: {len(weights)} for {len(checkpoints)} checkpoints")
    if not 0 < sum(weights) < float("inf"):
        raise InputError("--weights must be numbers with a sum above 0")
    first = checkpoints[0]
    mean: dict[str, torch.Tensor] = {}
    for checkpoint, weight in zip(checkpoints, weights, strict=True):
        differing = differences(read_settings(checkpoint), read_settings(first))
        if differing:
            raise InputError(f"{checkpoint} and {first} are of different systems: {'; '.join(differing)}")
        if Path(out).resolve() == weights_file(checkpoint).parent.resolve():
            raise InputError(f"--out {out} is one of the checkpoints: it would be overwritten")
        state = read_weights(checkpoint)
        shapes = {name: value.shape for name, value in state.items()}
        if mean and shapes != {name: value.shape for name, value in mean.items()}:
            raise InputError(f"{weights_file(checkpoint)} has other tensors than {weights_file(first)}")
        for name, value in state.items():
            mean[name] = mean.get(name, 0) + weight / sum(weights) * value.float()
    reads = next((checkpoint for checkpoint in checkpoints if read_settings(checkpoint).get("llm_reads")), first)
    partial = Path(out) / "model.safetensors.partial"
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        shutil.copy(weights_file(reads).with_name("config.json"), out)  # the LLM has learned to read, if any of them has
        save_file({name: value.to(dtype) for name, value in mean.items()}, partial, metadata={"format": "pt"})
        os.replace(partial, Path(out) / "model.safetensors")
    except (OSError, SafetensorError) as error:  # a full disk comes as either
        if partial.is_file():
            partial.unlink()
        raise InputError(f"{out}: cannot write ({first_line(error)})") from None


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        args, checkpoints = parse([AverageArguments], argv, files=True)
        if not checkpoints or not args.out:
            raise InputError("give checkpoints, and --out, the folder for their mean")
        average(checkpoints, args.weights, args.out, getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
