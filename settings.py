"""What a system is made of: its flags, the config.json of a checkpoint, and how a user's mistake is told."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError
from transformers import HfArgumentParser

if TYPE_CHECKING:
    from torch import Tensor

SPEECH_INDEX = -200  # the speech marker in input_ids: outside every vocabulary, so no table is resized
IGNORE_INDEX = -100  # a label that is not supervised
CHECKPOINT_FORMAT = 3
REMEDY = "leave the flag out, or train anew in another --output_dir"


class InputError(ValueError):
    """A user's mistake, told in one line that names what is wrong and the remedy."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with `error: …` on an InputError; anything else is a bug and keeps its traceback."""
    try:
        yield
    except InputError as error:  # from a data worker it comes wrapped in that worker's traceback
        raise SystemExit(f"error: {str(error).rpartition('InputError: ')[2].strip()}") from None


def parse(types: Sequence[type], argv: Sequence[str] | None, files: bool = False) -> tuple:
    """Dataclasses from the command line, and what else stands there if `files` may; what cannot be is an InputError."""
    try:
        *parsed, unknown = HfArgumentParser(types).parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as error:
        raise InputError(first_line(error)) from None
    if unknown and (not files or any(word.startswith("-") for word in unknown)):
        raise InputError(f"unknown flags or values: {' '.join(unknown)} (--help lists what there is)")
    return (*parsed, unknown) if files else tuple(parsed)


def cannot_load(what: str, flag: str, name: str, error: BaseException) -> InputError:
    """An InputError for a model that is neither a folder here nor to be had by name."""
    local = "" if os.path.isdir(name) else "no such folder here, and "
    return InputError(f"cannot load the {what} {name!r}: {local}{first_line(error)}: give {flag}")


@dataclass
class ModelArguments:
    llm_model_name_or_path: str | None = field(default=None, metadata={"help": "Causal LM: a hub name or a folder."})
    whisper_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "tiny … large-v3, a .pt file, or a Hugging Face name or folder of a Whisper model."},
    )
    checkpoint: str | None = field(default=None, metadata={"help": "Folder with model.safetensors and config.json."})
    projector_model_path: str | None = field(default=None, metadata={"help": "The same by file: …/model.safetensors."})
    splice: Literal["frames", "tokens"] | None = field(
        default=None,
        metadata={
            "help": "What the LLM reads: soft tokens by CTC (tokens; the default) or every projector vector (frames)."
        },
    )
    projector_stride: int | None = field(
        default=None, metadata={"help": "Encoder frames (20 ms) to one projector vector: 2, with --splice frames 5."}
    )
    projector_kernel: int | None = field(
        default=None, metadata={"help": "Encoder frames that each vector sees: 8, with frames as many as the stride."}
    )
    projector_layers: int | None = field(
        default=None,
        metadata={"help": "So many last layers of the encoder are trained, as the projector's first; 2, frames: 0."},
    )
    ctc_merges: int | None = field(
        default=None, metadata={"help": "The CTC's tokens are made by so many first merges of the LLM's tokenizer; 500."}
    )
    soft_prompt: bool | None = field(
        default=None, metadata={"help": "Train the embeddings of the prompt, from its words on; False with --splice frames."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of LoRA on the LLM; 0 (default): it stays frozen."})
    encoder_padding: Literal["none", "30s"] | None = field(
        default=None, metadata={"help": "30s: pad every clip as published. none (default): clips keep their length."}
    )
    prompt: str | None = field(
        default=None, metadata={"help": "The user's words around the speech, with one {speech} in them."}
    )

    def start(self) -> str | None:
        """The checkpoint that was named, by either flag."""
        if self.checkpoint and self.projector_model_path:
            raise InputError("--checkpoint and --projector_model_path name the same thing: give one of them")
        return self.checkpoint or self.projector_model_path


# how to decode with a checkpoint, if it was chosen for it: recognize.py's defaults, written into config.json by hand; the
# bonus is that of joint
CHOSEN = ("decoder", "length_bonus")

# what a checkpoint fixes, by splice; a kernel of None is as wide as the stride
DEFAULTS = {
    "frames": {
        "splice": "frames",
        "encoder_padding": "none",
        "projector_stride": 5,
        "projector_kernel": None,
        "projector_layers": 0,
        "soft_prompt": False,
        "lora_r": 0,
        "ctc_merges": 0,
    },
}
DEFAULTS["tokens"] = DEFAULTS["frames"] | {
    "splice": "tokens",
    "projector_stride": 2,
    "projector_kernel": 8,
    "projector_layers": 2,
    "soft_prompt": True,
    "ctc_merges": 500,
}


def resolve_settings(args: ModelArguments, path: str | Path | None) -> dict:
    """Flags, completed by config.json of the checkpoint at `path` (if any) or the defaults.

    Raises InputError when flags and checkpoint disagree.
    """
    stored = read_settings(path) if path else {}
    flags = {key: getattr(args, key) for key in DEFAULTS["frames"]}
    if stored and not stored["lora_r"]:
        stored["lora_r"] = args.lora_r or 0  # LoRA may join a checkpoint without
    differing = [key for key in flags if stored and flags[key] not in (None, stored[key])]
    if differing:
        given = " ".join(f"--{key} {flags[key]}" for key in differing)
        trained = ", ".join(f"{key} {stored[key]}" for key in differing)
        raise InputError(f"{given} differs from {path} (trained with {trained}): {REMEDY}")
    settings = dict(DEFAULTS[args.splice or "tokens"])
    settings |= {key: given for key, given in flags.items() if given is not None}
    settings |= {key: stored[key] for key in (*flags, "prompt", "ctc_tokens", *CHOSEN) if key in stored}
    settings["projector_kernel"] = settings["projector_kernel"] or settings["projector_stride"]
    settings["encoder"] = {"name": args.whisper_model_name_or_path or stored.get("encoder", {}).get("name")}
    settings["llm"] = {"name": args.llm_model_name_or_path or stored.get("llm", {}).get("name")}
    for part, flag in (("encoder", "whisper"), ("llm", "llm")):
        if not settings[part]["name"]:
            raise InputError(f"give --{flag}_model_name_or_path, or --checkpoint to take it from there")
    if not 1 <= settings["projector_stride"] <= settings["projector_kernel"]:
        raise InputError("--projector_stride must be at least 1, and --projector_kernel at least the stride")
    for name in ("projector_layers", "lora_r", "ctc_merges"):
        if settings[name] < 0:
            raise InputError(f"--{name} must not be negative")
    return {"format": CHECKPOINT_FORMAT, **settings}


def weights_file(path: str | Path) -> Path:
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


def read_weights(path: str | Path) -> "dict[str, Tensor]":
    """The tensors of a checkpoint by name; raises InputError."""
    from safetensors.torch import load_file  # torch takes seconds, which prepare.py need not wait

    file = weights_file(path)
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({first_line(error)})") from None


def read_settings(path: str | Path) -> dict:
    """The config.json of a checkpoint, given as its folder or its model.safetensors; raises InputError."""
    weights = weights_file(path)
    config = weights.with_name("config.json")
    missing = [file.name for file in (weights, config) if not file.is_file()]
    if missing:
        folder = weights.parent
        if not os.path.exists(path):
            raise InputError(f"{path} is not a checkpoint: no such file or folder")
        here = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise InputError(f"{path} is not a checkpoint: {' and '.join(missing)} missing in {folder} (there: {here})")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{config}: not JSON ({error})") from None
    if not isinstance(settings, dict) or settings.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{config}: not a checkpoint of this project in format {CHECKPOINT_FORMAT}")
    return settings


# two copies of one model may lie anywhere, the fingerprint decides; llm_reads: a training has got past its align phase
_INFORMATIVE = ("name", "versions", "llm_reads", *CHOSEN)


def differences(stored: Any, built: Any, where: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(built, dict):
        keys = [key for key in {**stored, **built} if key not in _INFORMATIVE]
        return [d for key in keys for d in differences(stored.get(key), built.get(key), f"{where}.{key}".strip("."))]
    return [] if stored == built else [f"{where} is {stored!r} in the checkpoint, {built!r} here"]
