"""Which splice, and with what? Each row trains for the same minutes on the same machine: dev WER against time.

    python demo/make_speech.py --hours 18 --out demo/exp/speech
    python benchmarks/ablate.py --train demo/exp/speech/train.jsonl --dev demo/exp/speech/dev.jsonl --minutes 10

prints a table; OUT/ablation.json has every measured point, OUT/ablation.png the curves. Measuring the WER does not count as
time. --rows names some of the rows; rows that OUT/ablation.json has already are not run again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset import Manifest, read_manifest
from model import ModelArguments, SpeechLLM, one_line_errors, parse
from recognize import DecodeArguments, Transcriber, recognize
from score import normalizer, score
from train import DataArguments, SpeechTrainer, TrainingArguments, build_trainer

MODELS = Path(__file__).resolve().parent.parent / "demo" / "models"
FRAMES, TOKENS = ["--splice", "frames"], ["--splice", "tokens"]


def keep_blanks(model: SpeechLLM) -> None:
    """Every frame stands in the prompt: nothing dropped, nothing averaged."""
    model.ctc.soft_tokens = lambda log_probs, length: (log_probs[..., :-1].softmax(-1) @ model.ctc.embeddings, length)


def acoustic_residual(model: SpeechLLM) -> None:
    """A linear map of the projector's vectors, zero at first, is added to the soft tokens."""
    head = model.ctc
    head.residual = nn.Linear(head.embeddings.shape[1], head.embeddings.shape[1], bias=False)
    nn.init.zeros_(head.residual.weight)
    forward, soft = head.forward, head.soft

    def remember(vectors: Tensor) -> Tensor:
        head.last_vectors = vectors
        return forward(vectors)

    head.forward = remember
    head.soft = lambda log_probs, row, frame: soft(log_probs, row, frame) + head.residual(head.last_vectors[row, frame])


def frames_after_ctc(model: SpeechLLM) -> None:
    """The projector learns by CTC, then its own vectors stand in the prompt."""
    model.ctc.soft_tokens = lambda log_probs, length: (model.last_vectors, length)
    embed = model.embed_speech

    def remember(*args: Tensor) -> tuple[Tensor, Tensor]:
        model.last_vectors, length = embed(*args)
        return model.last_vectors, length

    model.embed_speech = remember


class Row:
    def __init__(self, flags: list[str], align: float = 0.0, change: Callable | None = None, decoder: str = "llm") -> None:
        """`align`: the share of the minutes that is CTC alone."""
        self.flags, self.align, self.change, self.decoder = flags, align, change, decoder


ALIGN = 0.6
ROWS = {
    "frames (published)": Row(FRAMES),
    "frames, soft prompt": Row([*FRAMES, "--soft_prompt", "True"]),
    "frames from an aligned projector": Row(TOKENS, ALIGN, frames_after_ctc),
    "tokens, no LLM (ctc)": Row(TOKENS, 1.0, decoder="ctc"),
    "tokens": Row(TOKENS, ALIGN),
    "tokens, joint": Row(TOKENS, ALIGN, decoder="joint"),
    "tokens, no align phase": Row(TOKENS),
    "tokens, fixed prompt": Row([*TOKENS, "--soft_prompt", "False"], ALIGN),
    "tokens, blanks kept": Row(TOKENS, ALIGN, keep_blanks),
    "tokens, acoustic residual": Row(TOKENS, ALIGN, acoustic_residual),
    "tokens, CTC weight 0": Row([*TOKENS, "--ctc_weight", "0"], ALIGN),
    "tokens, CTC weight 1": Row([*TOKENS, "--ctc_weight", "1"], ALIGN),
    "tokens, LoRA 8": Row([*TOKENS, "--lora_r", "8"], ALIGN),
    "tokens, LoRA 16": Row([*TOKENS, "--lora_r", "16"], ALIGN),
    **{
        f"ctc, stride {stride}, kernel {kernel}, {merges} merges": Row(
            [*TOKENS, "--projector_stride", str(stride), "--projector_kernel", str(kernel), "--ctc_merges", str(merges)],
            1.0,
            decoder="ctc",
        )
        for stride, kernel, merges in (
            *((2, 8, 500), (3, 8, 500), (4, 8, 500), (5, 8, 500), (2, 2, 500), (2, 16, 500)),
            *((2, 8, 0), (2, 8, 2000), (2, 8, 8000), (5, 5, 100000)),
        )
    },
}


class Clock(TrainerCallback):
    """Stops after the minutes; measures dev WER on the way; ends the align phase when its share is over."""

    def __init__(self, trainer: SpeechTrainer, row: Row, dev: Manifest, minutes: float, every: float) -> None:
        self.trainer, self.row, self.dev, self.minutes, self.every = trainer, row, list(dev), minutes, every
        self.points: list[dict] = []
        self.spent, self.since = 0.0, time.monotonic()

    def on_step_end(self, args, state, control, **_) -> None:
        spent = self.spent + time.monotonic() - self.since
        if spent >= self.row.align * self.minutes * 60:
            args.align_steps = min(args.align_steps, state.global_step)
        if spent >= self.every * 60 * (len(self.points) + 1) or spent >= self.minutes * 60:
            self.measure(spent, state.global_step)
            self.spent, self.since = spent, time.monotonic()
        control.should_training_stop = spent >= self.minutes * 60

    def measure(self, spent: float, step: int) -> None:
        model, dataset = self.trainer.model, self.trainer.train_dataset
        aligning = step <= self.trainer.args.align_steps and self.row.align > 0
        options = DecodeArguments(decoder="ctc" if aligning else self.row.decoder, num_beams=1)
        model.eval()
        outcomes = recognize(Transcriber(model, dataset.prompt, options), self.dev, 16)
        model.train()
        result = score(
            {record.key: record.txt for record in self.dev}, {o.key: o.text for o in outcomes}, normalizer("english")
        )
        point = {"minutes": round(spent / 60, 2), "steps": step, "decoder": options.decoder, "wer": result.words.rate}
        self.points.append(point)
        print(json.dumps(point), flush=True)


def run(name: str, args: argparse.Namespace) -> list[dict]:
    row = ROWS[name]
    flags = [
        *("--llm_model_name_or_path", str(MODELS / "SmolLM2-135M-Instruct")),
        *("--whisper_model_name_or_path", str(MODELS / "whisper-tiny.en.pt"), "--data_path", args.train),
        *("--output_dir", str(Path(args.out, "scratch")), "--overwrite_output_dir", "--max_steps", "1000000"),
        *("--align_steps", "1000000" if row.align else "0", "--lr_scheduler_type", "constant_with_warmup"),
        *("--warmup_steps", "50", "--learning_rate", "1e-3", "--per_device_train_batch_size", "16"),
        *("--bf16", str(args.bf16), "--cache_dir", str(Path(args.out, "cache")), "--group_by_length", *row.flags),
        *("--save_strategy", "no", "--report_to", "none", "--logging_steps", "50", "--disable_tqdm", "True"),
    ]
    trainer, _ = build_trainer(*parse((ModelArguments, DataArguments, TrainingArguments), flags))
    if row.change:
        row.change(trainer.model)
    clock = Clock(trainer, row, read_manifest(args.dev), args.minutes, args.every)
    trainer.add_callback(clock)
    trainer.train()
    return clock.points


def table(results: dict[str, list[dict]]) -> str:
    lines = ["| row | steps | dev WER | best | minutes until < 50 % |", "|---|---|---|---|---|"]
    for name, points in results.items():
        under = next((f"{p['minutes']} ({p['steps']} steps)" for p in points if p["wer"] < 0.5), "–")
        best, last = min(p["wer"] for p in points), points[-1]
        lines.append(f"| {name} | {last['steps']} | {last['wer']:.1%} | {best:.1%} | {under} |")
    return "\n".join(lines)


def plot(results: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5))
    for name, points in results.items():
        axes.plot([p["minutes"] for p in points], [min(100 * p["wer"], 120) for p in points], marker="o", label=name)
    axes.set(xlabel="minutes of training", ylabel="dev WER, %, cut at 120")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="manifest")
    parser.add_argument("--dev", required=True, help="manifest")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training for each row")
    parser.add_argument("--every", type=float, default=2.0, help="minutes between two measurements")
    parser.add_argument("--bf16", type=lambda word: word == "True", default=False)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--out", default="demo/exp/ablation")
    args = parser.parse_args()
    store = Path(args.out, "ablation.json")
    results = json.loads(store.read_text()) if store.exists() else {}
    for name in args.rows:
        if name not in results:
            print(f"== {name}", flush=True)
            torch.manual_seed(0)
            with one_line_errors():
                results[name] = run(name, args)
            store.write_text(json.dumps(results, indent=1))
    plot(results, store.with_suffix(".png"))
    print(table(results))


if __name__ == "__main__":
    main()
