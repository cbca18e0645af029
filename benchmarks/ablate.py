"""Which splice, and with what? Every row trains for the same minutes on the same machine: dev WER against time.

    apt-get install flite espeak-ng wordnet-base
    python benchmarks/ablate.py

The speech: of five hours by demo/make_speech.py the clips of at most four seconds (so that a core makes a hundred steps in
minutes), and three of four of the demo's training prompts; dev is the fourth (the LLM's WER: every second of those). A row
has --align minutes of CTC alone, then --read minutes with the LLM; rows of the same align phase share it, one without it has
all the minutes with the LLM, and rows named "ctc" end after the align phase. The WER is that of greedy decoding: by the CTC
in the align phase, then by `joint` where there is a CTC and by the LLM where there is none; beside it stands the LLM's mean
loss on dev, which tells more after so few steps. Measuring does not count as time. Prints a table; OUT/*.json has every
measured point, OUT/ablation.png the curves. Rows that are there already are not run again; started twice at the same time,
the two programs share the rows out (a core each).
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import load_audio
from dataset import SpeechDataset
from decoding import recognize
from manifest import read_manifest
from model import SpeechLLM
from resume import STOPPED
from score import normalizer, score
from settings import ModelArguments, one_line_errors, parse
from train import DataArguments, SpeechTrainer, TrainingArguments, build_trainer
from transcriber import DecodeArguments, Transcriber

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "demo" / "models"


def keep_blanks(model: SpeechLLM) -> None:
    """Every frame stands in the prompt: nothing dropped, nothing averaged."""
    table = model.ctc.embeddings
    model.ctc.soft_tokens = lambda log_probs, length: (log_probs.detach()[..., :-1].softmax(-1) @ table, length)


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
    """The projector has learned by CTC; now its own vectors stand in the prompt."""
    model.ctc.soft_tokens = lambda log_probs, length: (model.last_vectors, length)
    embed = model.embed_speech

    def remember(*args: Tensor) -> tuple[Tensor, Tensor]:
        model.last_vectors, length = embed(*args)
        return model.last_vectors, length

    model.embed_speech = remember


def fixed_prompt(model: SpeechLLM) -> None:
    """The prompt stays the words that it starts with."""
    model.soft_prompt.requires_grad_(False)


@dataclass
class Row:
    align: str | None = ""  # flags of the align phase; None: there is none
    read: str | None = ""  # flags of the LLM phase; None: there is none
    change: Callable[[SpeechLLM], None] = lambda model: None
    silence: float = 0.0  # seconds before each clip


ROWS = {
    "frames (published)": Row(None, "--splice frames"),
    "tokens": Row(),
    "tokens, no align phase": Row(None, "--splice tokens --align_steps 0"),
    "frames from the aligned projector": Row(change=frames_after_ctc),
    "tokens, fixed prompt": Row(change=fixed_prompt),
    "tokens, blanks kept": Row(change=keep_blanks),
    "tokens, acoustic residual": Row(change=acoustic_residual),
    "tokens, CTC weight 0": Row(read="--ctc_weight 0"),
    "tokens, LoRA 8": Row(read="--lora_r 8"),
    "tokens, LoRA 16": Row(read="--lora_r 16"),
    "tokens, LoRA 8, half text": Row(read="--lora_r 8 --text_data_path {texts}"),
    "ctc": Row(read=None),
    "ctc, stride 3": Row("--projector_stride 3 --projector_kernel 9", None),
    "ctc, stride 4": Row("--projector_stride 4 --projector_kernel 8", None),
    "ctc, stride 5": Row("--projector_stride 5 --projector_kernel 9", None),
    "ctc, kernel 2": Row("--projector_kernel 2", None),
    "ctc, frozen layers": Row("--projector_layers 0", None),
    "ctc, 1 trained layer": Row("--projector_layers 1", None),
    "ctc, all the LLM's tokens": Row("--ctc_merges 100000", None),
    "ctc, 0.4 s of silence first": Row("", None, silence=0.4),
}


# a step with the LLM costs about ten times that of the CTC: fewer clips, so that there are enough of them
ALIGN = "--splice tokens --align_steps 1000000 --learning_rate 1e-3 --per_device_train_batch_size 16"
READ = "--learning_rate 5e-4 --per_device_train_batch_size 4"


class Clock(TrainerCallback):
    """Trains for some minutes, the learning rate falling to zero in them, and measures dev WER on the way."""

    def __init__(self, trainer: SpeechTrainer, dev: Path, minutes: float, measurements: int) -> None:
        self.trainer, self.dev, self.minutes = trainer, read_manifest(dev), minutes
        self.marks = [minutes * (i + 1) / measurements for i in range(measurements)]
        self.points: list[dict] = []
        self.spent, self.since = 0.0, time.monotonic()

    def on_step_begin(self, args, state, control, optimizer, **_) -> None:
        left = 1 - min(self.minutes_spent() / self.minutes, 1)
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(left, (state.global_step + 1) / 50)

    def on_step_end(self, args, state, control, **_) -> None:
        spent = self.minutes_spent()
        if spent >= self.marks[len(self.points)]:
            aligning, has_ctc = bool(args.align_steps), self.trainer.model.ctc is not None
            wer, vectors = self.measure("ctc" if aligning else "joint" if has_ctc else "llm")
            point = {"wer": wer, "vectors_per_second": vectors, "minutes": round(spent, 2), "steps": state.global_step}
            point["loss"] = None if aligning else self.loss_of_the_llm()
            self.points.append(point)
            print(json.dumps(point), flush=True)
            self.spent, self.since = spent, time.monotonic()
        control.should_training_stop = len(self.points) == len(self.marks)

    def minutes_spent(self) -> float:
        return self.spent + (time.monotonic() - self.since) / 60

    def measure(self, decoder: str) -> tuple[float, float]:
        """WER on dev, greedy, and how many vectors of a second of speech the LLM read."""
        model, dataset = self.trainer.model, self.trainer.train_dataset
        read, splice = [], model.splice

        def counting(ids: Tensor, mask: Tensor, speech: Tensor, length: Tensor, **options) -> tuple[Tensor, ...]:
            read.append(int(length.sum()))
            return splice(ids, mask, speech, length, **options)

        model.eval()
        model.splice = counting
        dev = self.dev if decoder == "ctc" else list(self.dev)[::2]  # with the LLM it takes a minute
        options = DecodeArguments(decoder=decoder, num_beams=1, guard="off")
        outcomes = list(recognize(Transcriber(model, dataset.prompt, options), dev, 16))
        model.splice = splice
        model.train()
        spoken, written = {r.key: r.txt for r in dev}, {o.key: o.text for o in outcomes}
        seconds = sum(outcome.duration for outcome in outcomes)
        return score(spoken, written, normalizer("english")).words.rate, round(sum(read) / seconds, 2)

    def loss_of_the_llm(self) -> float:
        model, train_set = self.trainer.model, self.trainer.train_dataset
        weight, model.ctc_weight = model.ctc_weight, 0.0
        dev_set = SpeechDataset(self.dev, train_set.prompt, train_set.settings, train_set.limits.max_length)
        loss = self.trainer.evaluate(dev_set)["eval_loss"]
        model.ctc_weight = weight
        model.train()
        return loss


def prepare(out: Path, hours: float, longest: float, silence: float) -> None:
    """OUT/silence-N/{train,dev}.jsonl and in it texts.txt, the definitions of WordNet, unless they are there."""
    folder = out / f"silence-{silence}"
    if (folder / "texts.txt").exists():
        return
    demo = ROOT / "demo"
    subprocess.run([sys.executable, demo / "make_speech.py", "--hours", str(hours), "--out", out / "speech"], check=True)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = read_manifest(ROOT / "demo/data/train.jsonl")
    synthetic = (record for record in read_manifest(out / "speech/train.jsonl") if record.duration <= longest)
    sets = {"train": [*synthetic, *(r for i, r in enumerate(prompts) if i % 4 != 3)], "dev": list(prompts)[3::4]}
    for name, records in sets.items():
        lines = []
        for record in records:
            wav = record.wav.resolve()
            if silence:
                clip, wav = load_audio(*record.part)[0], folder.resolve() / f"{record.key}.wav"
                soundfile.write(wav, np.pad(clip, (int(silence * 16000), 0)), 16000)
            lines.append(json.dumps({"key": record.key, "wav": str(wav), "txt": record.txt}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    sys.path.insert(0, str(demo))
    import make_speech as texts

    _, definitions = texts.wordnet_sentences()
    (folder / "texts.txt").write_text("".join(f"{texts.words_of(t)}\n" for t in definitions), encoding="utf-8")


def phase(row: Row, flags: str, minutes: float, measurements: int, change: Callable, args: argparse.Namespace) -> list[dict]:
    """One training of so many minutes, left in args.out/scratch; its measured points."""
    data = args.out / f"silence-{row.silence}"
    words = [
        *("--llm_model_name_or_path", MODELS / "SmolLM2-135M-Instruct", "--data_path", data / "train.jsonl"),
        *("--whisper_model_name_or_path", MODELS / "whisper-tiny.en.pt", "--cache_dir", args.out / "cache"),
        *("--output_dir", args.scratch, "--overwrite_output_dir", "--max_steps", "1000000", "--bf16", args.bf16),
        *("--group_by_length", "--save_strategy", "no", "--report_to", "none"),
        *("--disable_tqdm", "True", "--logging_steps", "100", *flags.format(texts=data / "texts.txt").split()),
    ]
    torch.manual_seed(0)
    trainer, _ = build_trainer(*parse((ModelArguments, DataArguments, TrainingArguments), [str(word) for word in words]))
    change(trainer.model)
    clock = Clock(trainer, data / "dev.jsonl", minutes, measurements)
    trainer.add_callback(clock)
    trainer.train()
    if trainer.stop.agreed:  # by SIGTERM
        raise SystemExit(STOPPED)
    trainer.save_model()
    return clock.points


def run(row: Row, args: argparse.Namespace) -> list[dict]:
    with FileLock(args.out / "prepare.lock"):
        prepare(args.out, args.hours, args.longest, row.silence)
    if row.align is None:
        return phase(row, f"{READ} {row.read}", args.align + args.read, args.measurements, row.change, args)
    aligned = args.out / "aligned" / re.sub(r"\W+", "_", f"align {row.align} {row.silence}")
    with FileLock(f"{args.out / aligned.name}.lock"):
        if not (aligned / "points.json").exists():
            points = phase(row, f"{ALIGN} {row.align}", args.align, 6, lambda model: None, args)
            aligned.parent.mkdir(exist_ok=True)
            args.scratch.rename(aligned)
            (aligned / "points.json").write_text(json.dumps(points))
    points = json.loads((aligned / "points.json").read_text())
    if row.read is None:
        return points
    done = points[-1]
    read = phase(row, f"{READ} --checkpoint {aligned} {row.read}", args.read, 1, row.change, args)
    return points + [p | {"minutes": p["minutes"] + done["minutes"], "steps": p["steps"] + done["steps"]} for p in read]


def table(results: dict[str, list[dict]]) -> str:
    head = ("row", "minutes", "steps", "dev WER, %", "loss", "under 50 % after", "vectors a second")
    lines = [head, ["---"] * len(head)]
    for name, points in results.items():
        last = points[-1]
        under = next((f"{p['minutes']:.1f} min, {p['steps']} steps" for p in points if p["wer"] < 0.5), "–")
        loss = f"{last['loss']:.2f}" if last["loss"] else "–"
        cells = (name, f"{last['minutes']:.1f}", last["steps"], f"{100 * last['wer']:.1f}", loss, under)
        lines.append([*cells, last["vectors_per_second"] or "–"])
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def plot(results: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for name, points in results.items():
        side = axes[int(name.startswith("ctc"))]
        side.plot([p["minutes"] for p in points], [min(100 * p["wer"], 120) for p in points], marker="o", label=name)
    for side, title in zip(axes, ("with the LLM", "CTC alone"), strict=True):
        side.set(xlabel="minutes of training", title=title)
        if side.lines:
            side.legend(fontsize=6)
    axes[0].set(ylabel="dev WER, %, cut at 120")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=5.0, help="of synthetic speech")
    parser.add_argument("--longest", type=float, default=4.0, help="clip of it, in seconds")
    parser.add_argument("--align", type=float, default=2.0, help="minutes")
    parser.add_argument("--read", type=float, default=3.0, help="minutes")
    parser.add_argument("--measurements", type=int, default=1, help="on the way, of rows without an align phase")
    parser.add_argument("--threads", type=int, default=1, help="of each program")
    parser.add_argument("--bf16", choices=("True", "False"), default="False")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--out", type=Path, default=ROOT / "demo/exp/ablation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.rows:
        store = args.out / f"{name}.json"
        try:
            with FileLock(args.out / f"{name}.lock", timeout=0):
                if store.exists():
                    continue
                print(f"== {name}", flush=True)
                args.scratch = args.out / f"{name}.scratch"
                with one_line_errors():
                    store.write_text(json.dumps(run(ROWS[name], args), indent=1))
        except Timeout:
            continue  # the other program has it
    results = {name: json.loads(file.read_text()) for name in args.rows if (file := args.out / f"{name}.json").exists()}
    plot(results, args.out / "ablation.png")
    print(table(results))


if __name__ == "__main__":
    main()
