"""What a training tells about itself, beside its loss.

    evaluate (train.py) ─ dev_metrics ┬─ WER, CER, …: dev clips through transcriber.py and score.py
                                      └─ hearing gap: the LLM's loss with another clip's speech, minus that with its own
    at log events ─ Diary ─ log.jsonl, curve.png and README.md (a model card) in --output_dir

Every process decodes its share, in as many batches as the others (DeepSpeed ZeRO-3 needs all of them in each forward pass);
the numbers are gathered, so that all processes agree on the best checkpoint and on when to stop.
"""

import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from arguments import TrainingArguments
from audio import load_audio
from dataset import SpeechCollator, SpeechDataset
from model import SpeechLLM
from score import score
from settings import IGNORE_INDEX, InputError
from transcriber import DecodeArguments, Transcriber, as_trained

HERE = Path(__file__).resolve().parent
DEAF, EVALUATIONS = 0.05, 3  # a hearing gap below so many nats a token, so many times in a row: it does not hear
OURS = "<!-- train.py wrote this page and keeps it up to date; without this line it leaves it alone -->"


def check(args: TrainingArguments) -> None:
    """Raises InputError for flags of this room that do not go together."""
    measured = ("loss", "wer", "cer") if args.predict_with_generate else ("loss",)
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in measured:
        remedy = "" if args.predict_with_generate else "; --predict_with_generate adds wer and cer"
        raise InputError(f"--metric_for_best_model {metric}: there is {', '.join(measured)}{remedy}")
    if args.predict_with_generate and args.eval_strategy == "no":
        raise InputError("--predict_with_generate decodes at evaluations: give --eval_strategy steps and --eval_data_path")
    if args.eval_clips < 0:
        raise InputError("--eval_clips must not be negative (0: all)")
    if args.early_stopping_patience is not None:
        if args.early_stopping_patience < 1:
            raise InputError("--early_stopping_patience must be at least 1")
        if not args.metric_for_best_model or args.eval_strategy == "no":
            raise InputError("--early_stopping_patience needs --metric_for_best_model and --eval_strategy steps or epoch")
        if metric == "loss" and args.align_steps != 0:
            raise InputError(
                "--early_stopping_patience cannot go by loss, which is another one after the align phase: give "
                "--predict_with_generate --metric_for_best_model wer, or --align_steps 0"
            )
    if "tensorboard" in args.report_to and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        raise InputError("--report_to tensorboard needs the package tensorboard: pip install tensorboard")


# --- at an evaluation


def even_pick(count: int, most: int, seed: int) -> list[int]:
    """At most `most` (0: all) of `count` places, evenly spread, in order; the seed moves them."""
    number = min(most, count) or count
    shift = random.Random(seed).random()
    return [int((i + shift) * count / number) for i in range(number)]


def share(picked: Sequence[int], rank: int, ranks: int) -> list[int]:
    """This process's part: equally many for each, at least two where there are two; those of all ranks in a row are
    `picked`, then `picked` again."""
    size = min(max(2, math.ceil(len(picked) / ranks)), len(picked))
    return [picked[(rank * size + i) % len(picked)] for i in range(size)]


def batches(clips: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Clips of like lengths together, no clip alone if there are two."""
    clips, size = sorted(clips, key=lambda i: lengths[i]), max(size, 2)
    groups = [clips[i : i + size] for i in range(0, len(clips), size)]
    if len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    return groups


def clip_losses(model: SpeechLLM, batch: dict[str, Tensor]) -> Tensor:
    """The LLM's cross-entropy of each clip, in nats, summed over its tokens: (B,)."""
    supervised = batch["labels"][:, 1:] != IGNORE_INDEX  # (B, T - 1)
    losses = F.cross_entropy(model(**batch)["logits"], batch["labels"][:, 1:][supervised], reduction="none")
    return losses.new_zeros(len(supervised)).index_add(0, supervised.nonzero()[:, 0], losses)


def hearing(model: SpeechLLM, batch: dict[str, Tensor]) -> list[tuple[float, float, int]]:
    """For each clip the LLM's loss with its own speech, that with the speech of the row before, and how many tokens.

    The CTC's loss, which would tell them apart for certain, is not counted: the question is whether the LLM hears.
    """
    other = batch | {name: batch[name].roll(1, 0) for name in batch.keys() & {"mel", "encoded", "mel_length"}}
    tokens = (batch["labels"] != IGNORE_INDEX).sum(1)
    rows = zip(clip_losses(model, batch).tolist(), clip_losses(model, other).tolist(), tokens.tolist(), strict=True)
    return list(rows)


@torch.no_grad()
def dev_metrics(trainer: Trainer, dataset: SpeechDataset) -> dict[str, float]:
    """What is told about `dataset` beside its loss; every process calls it and gets the same.

    hearing_gap (nats a token) once the LLM is trained; with --predict_with_generate wer, cer, length_ratio (words written
    to words said), loop_rate, refusal_rate, and eot_rate (how many ended by themselves) where the LLM writes.
    """
    args, model = trainer.args, trainer.model
    picked = even_pick(len(dataset), args.eval_clips, args.seed)
    mine = share(picked, args.process_index, args.world_size)
    groups = batches(mine, dataset.lengths, args.per_device_eval_batch_size)

    def gather(measured: dict[int, Any]) -> list[Any]:
        """Of each picked clip what one of the processes measured."""
        return gather_object([measured[i] for i in mine])[: len(picked)]

    metrics = {}
    if len(picked) > 1 and not model.aligning:
        losses: dict[int, tuple[float, float, int]] = {}
        for group in groups:
            batch = SpeechCollator()([dataset[i] for i in group])
            batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
            losses |= zip(group, hearing(model, batch), strict=True)
        own, other, tokens = (sum(column) for column in zip(*gather(losses), strict=True))
        metrics["hearing_gap"] = (other - own) / tokens
    if args.predict_with_generate:
        transcriber = Transcriber(model, dataset.prompt, DecodeArguments(decoder=as_trained(model), num_beams=1))
        written = {}
        for group in groups:
            clips = [load_audio(*dataset.record(i).part)[0] for i in group]
            written |= zip(group, transcriber.hypotheses(clips), strict=True)
        hypotheses = dict(zip(map(str, picked), gather(written), strict=True))
        metrics |= rates({key: dataset.manifest[dataset.kept[int(key)]].txt for key in hypotheses}, hypotheses)
    return metrics


def rates(references: dict[str, str], hypotheses: dict[str, Any]) -> dict[str, float]:
    """Shares, 1 being 100 %, of references and Hypotheses by key. Raises InputError for references without a word."""
    result = score(references, {key: hypothesis.text for key, hypothesis in hypotheses.items()})
    words, count = result.words, len(result.utterances)
    found = [utterance.hallucination for utterance in result.utterances]
    ended = [hypothesis.ended for hypothesis in hypotheses.values()]
    if not words.reference_length:
        raise InputError(f"--predict_with_generate: no word in the txt of {count} clips of --eval_data_path")
    written = words.hits + words.substitutions + words.insertions
    metrics = {"wer": words.rate, "cer": result.characters.rate, "length_ratio": written / words.reference_length}
    if None not in ended:
        metrics["eot_rate"] = sum(ended) / count
    return metrics | {"loop_rate": found.count("loop") / count, "refusal_rate": found.count("refusal") / count}


# --- callbacks


class EarlyStopping(EarlyStoppingCallback):
    """transformers' own, which on a resume goes on counting where the checkpoint was, and may join in then. While the CTC
    aligns it does not count: it would end the training before the LLM's part has begun."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]
        control.should_training_stop |= self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not model.aligning:
            super().on_evaluate(args, state, control, model=model, **kwargs)


class HearingWarning(TrainerCallback):
    """Says so, with advice, when the loss has long been the same with another clip's speech."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gaps = [entry["eval_hearing_gap"] for entry in state.log_history if "eval_hearing_gap" in entry]
        heard = [i for i, gap in enumerate(gaps) if not gap < DEAF]
        deaf = len(gaps) - (heard[-1] + 1 if heard else 0)  # evaluations in a row, up to this one
        if "eval_hearing_gap" in state.log_history[-1] and deaf and not deaf % EVALUATIONS and state.is_world_process_zero:
            print(
                f"warning: step {state.global_step}: for {deaf} evaluations the LLM's loss has been the same with another "
                f"clip's speech (eval_hearing_gap {gaps[-1]:.3f}): it does not hear yet. With --splice frames that may last "
                "thousands of steps. Else: does each wav belong to its txt? Is eval_wer low at the end of the align phase "
                "(if not, more --align_steps)? Is --learning_rate too small?",
                file=sys.stderr,
                flush=True,
            )


class Diary(TrainerCallback):
    """log.jsonl, curve.png and README.md in --output_dir, written by the job's first process."""

    def __init__(self, command: str, train_set: SpeechDataset, eval_set: SpeechDataset | None) -> None:
        self.command, self.train_set, self.eval_set = command, train_set, eval_set
        self.commit = git_commit()  # now: later it may be another

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # after a resume: what was logged past the checkpoint is lost, and will be logged again
            replace(Path(args.output_dir, "log.jsonl"), "".join(map(json_line, state.log_history)))
            self.write_card(args, state, model)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with Path(args.output_dir, "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json_line(state.log_history[-1]))

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            partial = folder / "curve.partial.png"
            curve(state.log_history, f"Training, {folder.resolve().name}").savefig(partial, dpi=120)
            os.replace(partial, folder / "curve.png")
            self.write_card(args, state, model)

    on_save = on_train_end = on_evaluate

    def write_card(self, args: Any, state: Any, model: SpeechLLM) -> None:
        """Unless there is a page that is not ours."""
        page = Path(args.output_dir, "README.md")
        if not page.exists() or page.read_text(encoding="utf-8", errors="replace").startswith(OURS):
            replace(page, self.card(args, state, model))

    def card(self, args: Any, state: Any, model: SpeechLLM) -> str:
        settings = model.settings
        libraries = ["torch", "transformers", "accelerate", "openai-whisper"]
        libraries += ["peft"] * bool(settings["lora_r"]) + ["deepspeed"] * bool(args.deepspeed)
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.trainable().values())
        rows = {
            "models": f"Whisper `{settings['encoder']['name']}`, `{settings['llm']['name']}`; --splice {settings['splice']}",
            "trained parameters": f"{trained:,}",
            "steps": f"{state.global_step} of {state.max_steps} ({state.epoch or 0:.2f} epochs)",
            **dict(measured(args, state.log_history)),
            "training data": f"`{self.train_set.manifest}`: {self.train_set.summary()}",
            "dev data": f"`{self.eval_set.manifest}`: {self.eval_set.summary()}" if self.eval_set else "",
            "processes": f"{args.world_size} ({args.device.type})",
            "versions": f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {version(name)}" for name in libraries),
            "commit": self.commit,
        }
        if args.load_best_model_at_end and state.best_model_checkpoint:
            metric = args.metric_for_best_model.removeprefix("eval_")
            best = state.best_model_checkpoint.rpartition("-")[2]
            rows["weights here"] = f"in the end those of step {best} (best dev {metric} of those saved)"
        folder = Path(args.output_dir)
        return "\n".join(
            [
                OURS,
                f"# {folder.resolve().name}",
                "",
                "Speech recognition: what was trained between a frozen Whisper encoder and a frozen LLM.",
                "",
                "| | |\n|---|---|",
                *(f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows.items() if text),
                "",
                "Trained by",
                "",
                f"```\n{self.command}\n```",
                "",
                "Recognize with it:",
                "",
                f"```\npython recognize.py --checkpoint {shlex.quote(args.output_dir)} FILE.wav\n```",
                "",
                *(["![loss and WER over the steps](curve.png)", ""] if (folder / "curve.png").exists() else []),
            ]
        )


def watchers(trainer: Trainer, command: str) -> list[TrainerCallback]:
    patience = trainer.args.early_stopping_patience
    diary = Diary(command, trainer.train_dataset, trainer.eval_dataset)
    return [diary, HearingWarning(), *([EarlyStopping(patience)] if patience else [])]


def measured(args: Any, history: Sequence[dict]) -> list[tuple[str, str]]:
    """Rows of the card: the last evaluation, and the one with the lowest WER."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    if not evaluations:
        return []
    last = evaluations[-1]
    rows = [("dev loss", f"{last['eval_loss']:.3f} at step {last['step']}")]
    scored = [entry for entry in evaluations if "eval_wer" in entry]
    if scored:
        clips = f"at most {args.eval_clips} clips" if args.eval_clips else "all clips"
        for name, entry in (("dev WER", scored[-1]), ("lowest dev WER", min(scored, key=lambda e: e["eval_wer"]))):
            percents = f"{100 * entry['eval_wer']:.2f} % (CER {100 * entry['eval_cer']:.2f} %) at step {entry['step']}"
            rows.append((name, f"{percents}; greedy, {clips}, normalizer basic"))
    if "eval_hearing_gap" in last:
        rows.append(("hearing gap", f"{last['eval_hearing_gap']:.3f} nats a token"))
    return rows


# --- files


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def json_line(entry: dict) -> str:
    """One line; what is no number in JSON (nan, inf) is null."""
    entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
    return json.dumps(entry) + "\n"


def curve(history: Sequence[dict], title: str) -> Figure:
    """Losses over the steps and, where it was measured, the WER (on the right)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    left.set(xlabel="optimizer step", ylabel="loss a token", title=title)
    left.grid(alpha=0.3)
    curves = [("loss", "training loss", 1, left, "C0-"), ("eval_loss", "dev loss", 1, left, "C1o-")]
    if any("eval_wer" in entry for entry in history):
        right = left.twinx()
        right.set(ylabel="dev WER, %")
        curves.append(("eval_wer", "dev WER (right)", 100, right, "C2s-"))
    lines = []
    for name, label, unit, side, style in curves:
        points = [(entry["step"], unit * entry[name]) for entry in history if name in entry]
        lines += side.plot(*zip(*points, strict=True), style, linewidth=1.5, markersize=3, label=label) if points else []
    for side in figure.axes:
        side.set_ylim(bottom=0)  # last: it holds the upper end too
    if lines:
        left.legend(handles=lines)
    return figure


def launch_command(argv: Sequence[str] | None = None) -> str:
    """The shell command of this training, torchrun's part included; values of …token flags are left out.

    argv: the flags, where they do not come from the command line.
    """
    words = ["python", "train.py", *argv] if argv else ["python", *sys.orig_argv[1:]]
    if not argv and "TORCHELASTIC_RUN_ID" in os.environ:  # the parent is torchrun
        try:
            words = psutil.Process().parent().cmdline()
        except (psutil.Error, AttributeError):  # it may not be seen
            nodes, here = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
            words = ["torchrun", f"--nnodes={nodes}", f"--nproc_per_node={here}", *sys.argv]
        if Path(words[0]).name.startswith("python"):
            script = len(words) > 1 and not words[1].startswith("-")
            words = [Path(words[1]).name, *words[2:]] if script else ["python", *words[1:]]
    words = [re.sub(r"^(--\w*token=).*", r"\1...", word) for word in words]
    secret = [bool(re.fullmatch(r"--\w*token", word)) for word in ["", *words]]
    return shlex.join("..." if hide else word for word, hide in zip(words, secret, strict=False))


def git_commit() -> str:
    """Of these scripts, with -dirty for changes that are not committed; "" where they are in no repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "watch.py")
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return ""
