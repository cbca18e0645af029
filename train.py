"""Train the projector between a frozen Whisper encoder and a frozen LLM.

    python train.py --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny \\
        --data_path train.jsonl --output_dir exp --bf16 True --num_train_epochs 5 --learning_rate 3e-4
    torchrun --standalone --nproc_per_node 8 train.py … --deepspeed ds_config_zero3.json

Every flag of transformers' TrainingArguments works, those that transformers 5 renamed or dropped too. A second start
continues from the newest complete checkpoint in --output_dir. The trained weights end up in --output_dir itself.
"""

import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.utils import logging as transformers_logging

import zero3
from arguments import DataArguments, TrainingArguments, current_flags
from audio import Augmentation
from batches import BatchingTrainer, NewEpoch, check_longest, padded_lengths
from cache import EncoderCache
from dataset import SpeechCollator, SpeechDataset
from manifest import TextLines, read_manifest
from model import SpeechLLM, build_model
from preflight import preflight
from prompt import Prompt, Spelling, load_tokenizer
from resume import STOPPED, ResumableTrainer, checkpoint_to_resume, leave_together, only_training, told_if_full
from settings import InputError, ModelArguments, first_line, one_line_errors, parse, read_settings, resolve_settings
from watch import check, dev_metrics, launch_command, watchers


class SpeechTrainer(BatchingTrainer, ResumableTrainer):
    """The Trainer, saving what is trained instead of everything."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.model.save_checkpoint(output_dir or self.args.output_dir, write=self.args.should_save)

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        align_steps = self.args.align_steps
        if align_steps is None:  # a training that is prolonged does not go back to aligning
            align_steps = 0 if self.model.settings["llm_reads"] else self.state.max_steps // 2
        self.model.aligning = self.state.global_step < align_steps
        if self.is_deepspeed_enabled and self.state.global_step == align_steps > 0:
            zero3.begin_late(self.optimizer)
        loss = super().training_step(model, *args, **kwargs)
        if self.model.aligning:  # the zeros that DDP waits for: as gradients they would spoil the optimizer's averages
            for p in self.model.late():
                p.grad = None
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.is_deepspeed_enabled:
            zero3.part_late(optimizer, set(self.model.late()))
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: SpeechLLM | None = None) -> None:
        self.model.load_checkpoint(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self.is_deepspeed_enabled:  # what is saved are its optimizer's weights
            super()._load_best_model()
            self.model.settings["llm_reads"] = read_settings(best)["llm_reads"]
        else:
            self.model.load_checkpoint(best)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        measured = dev_metrics(self, dataloader.dataset)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output


def encode_once(dataset: SpeechDataset, model: SpeechLLM, cache_dir: str, args: TrainingArguments) -> None:
    """The frozen encoder's output of each clip, each process its share."""
    encoder, device = model.encoder.to(args.device), args.device
    with zero3.gathered(model.encoder.parameters()), torch.no_grad():
        encode = lambda mel, length: encoder(mel.to(device), length.to(device))  # noqa: E731
        cache = EncoderCache(cache_dir, dataset.settings, next(encoder.parameters()).dtype)
        cache.fill(dataset, encode, args.process_index, args.world_size)


def build_trainer(
    model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments
) -> tuple[SpeechTrainer | None, Path | None]:
    """The trainer, and the checkpoint in --output_dir to resume from if there is one; raises InputError. No trainer with
    --preflight_only."""
    if not data_args.data_path:
        raise InputError("give --data_path, the training manifest (jsonl)")
    set_seed(args.seed)
    asked, fresh = args.resume_from_checkpoint, args.overwrite_output_dir
    resume = checkpoint_to_resume(args.output_dir, asked, fresh, bool(args.deepspeed))
    start = resume or model_args.start()
    if args.overwrite_output_dir and start and Path(args.output_dir).resolve() in Path(start).resolve().parents:
        raise InputError(f"--overwrite_output_dir would delete {start}, which is to be started from: give another folder")
    settings = resolve_settings(model_args, start)
    if args.align_steps and settings["splice"] != "tokens":
        raise InputError("--align_steps trains a CTC: it needs --splice tokens")
    if args.align_steps is None and (settings["splice"] != "tokens" or model_args.start()):
        args.align_steps = 0
    check(args)
    if data_args.text_data_path and settings["splice"] != "tokens":
        raise InputError("--text_data_path is text as a CTC would hear it: it needs --splice tokens")
    if not 0 <= args.projector_dropout < 1:
        raise InputError("--projector_dropout must be at least 0 and below 1")
    data_args.check()
    zero3.check(args)
    form = data_args.form()
    manifest = read_manifest(data_args.data_path, form=form)
    tokenizer = load_tokenizer(settings["llm"]["name"])
    if settings["splice"] == "tokens" and "ctc_tokens" not in settings:
        texts = manifest.some_texts()
        settings["ctc_tokens"] = Spelling.choose(tokenizer, texts, settings["ctc_merges"]).tokens
    prompt = Prompt.build(tokenizer, model_args.prompt, settings)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    model = build_model(settings, prompt.word_ids, prompt.end_of_turn, dtype, start)
    if not torch.accelerator.is_available():
        model.llm.set_attn_implementation("eager")  # on a CPU its gradient costs a third of the fused kernel's
    model.ctc_weight, model.projector.dropout = args.ctc_weight, args.projector_dropout

    augmentation = Augmentation(data_args.speed_perturb, data_args.noise_snr, data_args.spec_augment)
    texts = TextLines(data_args.text_data_path, form) if data_args.text_data_path else ()
    durations = {"shortest": data_args.min_duration_in_seconds, "longest": data_args.max_duration_in_seconds}
    make_set = partial(SpeechDataset, prompt=prompt, settings=settings, max_length=args.model_max_length, **durations)
    train_set = make_set(manifest, augmentation=augmentation, seed=args.seed, texts=texts, text_share=data_args.text_share)
    eval_set = None
    if data_args.eval_data_path:
        eval_set = make_set(read_manifest(data_args.eval_data_path, form=form))
    if args.process_index == 0:
        print(f"projector: {model.projector.size()} (÷ 1024²) parameters")
        preflight(train_set, eval_set)
        print(f"continuing from {resume}" if resume else f"starting from {start or 'an untrained projector'}", flush=True)

    if args.batch_seconds:
        check_longest(padded_lengths(train_set), args.batch_seconds)
    if data_args.preflight_only:
        return None, None
    if data_args.cache_dir:
        encode_once(train_set, model, data_args.cache_dir, args)
    args._n_gpu = min(args.n_gpu, 1)  # one process drives one GPU; several need torchrun, not nn.DataParallel
    try:
        trainer = SpeechTrainer(
            model=model,
            args=args,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=SpeechCollator(),
            callbacks=[NewEpoch()],
        )
    except ValueError as error:
        raise InputError(first_line(error)) from None
    if args.overwrite_output_dir and not resume and args.should_save:  # else a later start would continue the old run
        for folder in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder)
    return trainer, resume


def run(model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, command: str) -> bool:
    """Build, resume if there is something to resume from, train, save; False if a signal cut it; raises InputError."""
    trainer, resume = build_trainer(model_args, data_args, args)
    if not trainer:
        return True
    for callback in watchers(trainer, command):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if not trainer.interrupted:
        with told_if_full(args.output_dir, args.output_dir):
            trainer.save_state()
            trainer.save_model()
    return not trainer.interrupted


def main(argv: Sequence[str] | None = None) -> None:
    transformers_logging.disable_progress_bar()
    with one_line_errors():
        parsed = parse((ModelArguments, DataArguments, TrainingArguments), current_flags(argv or sys.argv[1:]))
        try:
            _, data_args, args = parsed
            with nullcontext() if data_args.preflight_only else only_training(args.output_dir):
                finished = run(*parsed, launch_command(argv))
                leave_together()
        except OSError as error:
            raise InputError(f"{error.filename or 'system'}: {error.strerror or error}") from None
    if not finished:
        raise SystemExit(STOPPED)


if __name__ == "__main__":
    main()
