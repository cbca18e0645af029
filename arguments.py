"""The flags of a training: today's, and those of older transformers with their old meaning."""

import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import transformers
from accelerate import PartialState

from batches import check_batch_flags
from manifest import Form
from settings import InputError


@dataclass
class DataArguments:
    data_path: list[str] | None = field(default=None, metadata={"help": "Training manifests (jsonl)."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Manifest to measure the loss on."})
    text_data_path: str | None = field(
        default=None,
        metadata={"help": "Text without speech, a sentence a line: the LLM reads it as the CTC might have heard it."},
    )
    text_share: float = field(default=0.5, metadata={"help": "Of the examples of a batch, those of --text_data_path."})
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Run the frozen encoder once a clip and keep its output here (38 kB/s: tiny)."},
    )
    speed_perturb: bool = field(default=False, metadata={"help": "Clips 0.9, 1 or 1.1 times as fast."})
    noise_snr: float | None = field(default=None, metadata={"help": "Add white noise, so many dB below the speech."})
    spec_augment: bool = field(default=False, metadata={"help": "Mask bands and spans (SpecAugment)."})
    audio_column_name: str = field(default="wav", metadata={"help": "The field of a manifest that names the audio file."})
    text_column_name: str = field(default="txt", metadata={"help": "The field of a manifest that holds the transcript."})
    text_lowercase: bool = field(default=False, metadata={"help": "Transcripts (and other text) in small letters."})
    chars_to_ignore: list[str] | None = field(
        default=None, metadata={"help": "Characters to leave out of transcripts (and other text): , . ? …"}
    )
    min_duration_in_seconds: float | None = field(default=None, metadata={"help": "Shorter clips are dropped, counted."})
    max_duration_in_seconds: float | None = field(default=None, metadata={"help": "Longer clips are dropped, counted."})
    preflight_only: bool = field(default=False, metadata={"help": "Say what the data are like, and stop."})

    def form(self) -> Form:
        return Form(self.audio_column_name, self.text_column_name, self.text_lowercase, "".join(self.chars_to_ignore or ()))

    def check(self) -> None:
        shortest, longest = self.min_duration_in_seconds or 0, self.max_duration_in_seconds or math.inf
        if not 0 <= shortest < longest:
            raise InputError("--min_duration_in_seconds must be at least 0 and less than --max_duration_in_seconds")
        if not 0 <= self.text_share < 1:
            raise InputError("--text_share must be at least 0 and below 1")
        if self.cache_dir and (self.speed_perturb or self.noise_snr is not None):
            raise InputError("--cache_dir keeps one encoding of each clip: leave it out, or --speed_perturb and --noise_snr")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, and what older versions had, with its old meaning."""

    align_steps: int | None = field(
        default=None,
        metadata={
            "help": "With --splice tokens: so many first steps by CTC alone, without the LLM. By default half of the steps, "
            "none from a checkpoint."
        },
    )
    ctc_weight: float = field(default=0.3, metadata={"help": "With --splice tokens: of the CTC beside the LLM's loss."})
    projector_dropout: float = field(default=0.0, metadata={"help": "Before the projector's convolution and linear layers."})
    model_max_length: int = field(default=512, metadata={"help": "Longer examples (prompt, speech, text) are dropped."})
    predict_with_generate: bool = field(default=False, metadata={"help": "Evaluations decode too: eval_wer, eval_cer, …"})
    eval_clips: int = field(
        default=100, metadata={"help": "Decode, and test for hearing, at most so many clips of --eval_data_path; 0: all."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations in a row without a better --metric_for_best_model."}
    )
    greater_is_better: bool | None = field(default=False, metadata={"help": "Of loss, wer and cer the smallest is best."})
    remove_unused_columns: bool = False
    prediction_loss_only: bool = True
    warmup_ratio: float | None = field(default=None, metadata={"help": "Share of the steps to warm up in."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start over, whatever --output_dir holds."})
    batch_seconds: float | None = field(
        default=None, metadata={"help": "Batches of so many seconds, padding included, instead of so many clips."}
    )
    group_by_length: bool = field(default=False, metadata={"help": "Batches of clips of about the same length."})
    adafactor: bool = field(default=False, metadata={"help": "The same as --optim adafactor."})
    logging_dir: str | None = field(default=None, metadata={"help": "Where TensorBoard's files go."})
    save_safetensors: bool = field(default=True, metadata={"help": "Always true here."})

    def __post_init__(self) -> None:
        if not self.save_safetensors:
            raise InputError("--save_safetensors False is not possible: checkpoints are always safetensors")
        if self.label_smoothing_factor or self.neftune_noise_alpha:
            raise InputError("--label_smoothing_factor and --neftune_noise_alpha are not supported: leave them out")
        if self.warmup_ratio and not self.warmup_steps:  # as ever: steps win over the ratio
            self.warmup_steps = self.warmup_ratio
        self.label_names = self.label_names or ["labels"]  # not ctc_labels too: the frame splice has none
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"
        check_batch_flags(self)
        if self.adafactor:
            self.optim = "adafactor"
        if self.logging_dir:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
        if self.activation_checkpointing is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every process runs every trainable module each step
        if not torch.accelerator.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            self.dataloader_pin_memory = False
            if self.deepspeed:
                _deepspeed_on_cpu()
                self.accelerator_config = {"use_configured_state": True}
            else:
                self.use_cpu = True
        super().__post_init__()

    def _validate_args(self) -> None:
        """transformers wants a GPU or use_cpu for bf16; a CPU has bf16 too, and use_cpu would keep DeepSpeed out."""
        asked, self.use_cpu = self.use_cpu, self.use_cpu or not torch.accelerator.is_available()
        super()._validate_args()
        self.use_cpu = asked


RENAMED = {
    "--evaluation_strategy": "--eval_strategy",
    "--no_cuda": "--use_cpu",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
}
# dropped, and without effect on what is trained here
WITHOUT_EFFECT = """
    --fp16_backend --fp16_opt_level --half_precision_backend --include_inputs_for_metrics --include_tokens_per_second
    --jit_mode_eval --mp_parameters --past_index --ray_scope --tpu_metrics_debug --tpu_num_cores --use_ipex
    --use_legacy_prediction_loop --use_mps_device
""".split()  # noqa: SIM905


def current_flags(argv: Sequence[str]) -> list[str]:
    """Flags under their present names, `--flag value` and `--flag=value` alike; those without effect are said and left."""
    flags: list[str] = []
    skip = False
    for arg in argv:
        name, equals, value = arg.partition("=") if arg.startswith("--") else (arg, "", "")
        skip = name in WITHOUT_EFFECT or (skip and not arg.startswith("--"))
        if name in WITHOUT_EFFECT:
            print(f"{name} has no effect any more: ignored", file=sys.stderr)
        if not skip:
            flags.append(RENAMED.get(name, name) + equals + value)
    return flags


def _deepspeed_on_cpu() -> None:
    """DeepSpeed asks accelerate for a backend; without a GPU it must be told before the first TrainingArguments."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    os.environ |= {name: os.environ.get(name, value) for name, value in alone.items()}  # torchrun sets them all
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # several a step
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a compiler runs at the first collective
    PartialState(backend="gloo")
