"""Speech → text with a trained projector: one line `key text` for each file, or line of the manifest, in its order.

    python recognize.py speech.wav more.mp3            # with the small checkpoint that comes along
    python recognize.py --checkpoint exp --data_path test.jsonl --result_path result.txt
    python recognize.py --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny \\
        --projector_model_path exp/checkpoint-600/model.safetensors --data_path test.jsonl --result_path result.txt

A clip that cannot be decoded gets an empty line, is reported on stderr and in the summary, and makes the exit code 1.
An interrupted run continues when started again: finished clips wait in `RESULT_PATH.partial`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from audio import load_audio, log_mel, speech_vectors
from ctc import greedy_path
from dataset import SpeechCollator
from manifest import Manifest, Record, read_manifest
from model import SpeechLLM, build_model
from prompt import Prompt, load_tokenizer
from settings import InputError, ModelArguments, first_line, one_line_errors, parse, resolve_settings, weights_file

DEMO = Path(__file__).resolve().parent / "demo"
MAX_TOKENS_PER_SECOND = 12  # fast speech has about 5 words a second; digits and names cost 2 tokens each
SPARE_TOKENS = 8
PAUSE_WINDOW = SAMPLE_RATE // 5  # a cut falls on the quietest 0.2 s


@dataclass
class DecodeArguments:
    data_path: str | None = field(default=None, metadata={"help": "Manifest (jsonl) of what to recognize."})
    result_path: str | None = field(
        default=None, metadata={"help": "Where the lines `key text` of a manifest go; result.txt."}
    )
    decoder: Literal["auto", "ctc", "llm", "joint"] = field(
        default="auto",
        metadata={"help": "ctc: no LLM runs; llm: it alone; joint: both vote. auto: as the checkpoint was trained."},
    )
    joint_weight: float = field(default=0.8, metadata={"help": "Of the CTC's log-probability beside the LLM's."})
    num_beams: int = field(default=4, metadata={"help": "1 is greedy."})
    batch_size: int = field(default=8, metadata={"help": "Clips decoded together."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Bounded by the clip's duration unless given."})
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, mps, cpu; the first that is there."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the frozen weights; auto is bfloat16 on a GPU, float32 elsewhere."}
    )


class Hypothesis(NamedTuple):
    text: str
    ended: bool | None  # by the LLM's end-of-turn token rather than by the limit; None where no LLM writes


class Transcriber:
    """A model ready to transcribe. One thread at a time."""

    def __init__(self, model: SpeechLLM, prompt: Prompt, args: DecodeArguments) -> None:
        """Raises InputError for a decoder that needs a CTC where the checkpoint has none."""
        self.model, self.prompt, self.args = model, prompt, args
        self.device = next(model.parameters()).device
        auto = "llm" if not model.ctc else "joint" if model.settings["llm_reads"] else "ctc"
        self.decoder = auto if args.decoder == "auto" else args.decoder
        if self.decoder != "llm" and not model.ctc:
            raise InputError(f"--decoder {self.decoder} needs a checkpoint trained with --splice tokens")
        self.search: dict[str, Any] = {"num_beams": args.num_beams, "do_sample": False}
        if self.decoder == "joint":  # both scores are sums over the whole text: no average over its length
            spelling = prompt.spelling.table(len(prompt.tokenizer)).to(self.device)
            self.search |= {"joint_weight": args.joint_weight, "spelling": spelling}
            self.search |= {"length_penalty": 0.0} if args.num_beams > 1 else {}  # greedy search would warn of it

    @classmethod
    def from_arguments(cls, model_args: ModelArguments, args: DecodeArguments) -> "Transcriber":
        """Rebuild exactly the system of the checkpoint that `model_args` name, or raise InputError."""
        checkpoint = model_args.start()
        if not checkpoint:
            raise InputError("give --checkpoint DIR or --projector_model_path …/model.safetensors")
        device = usable_device(args.device)
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        settings = resolve_settings(model_args, checkpoint)
        prompt = Prompt.build(load_tokenizer(settings["llm"]["name"]), model_args.prompt, settings)
        dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
        model = build_model(settings, prompt.word_ids, prompt.end_of_turn, dtype, checkpoint)
        return cls(model.to(device), prompt, args)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, **options: Any) -> "Transcriber":
        """`Transcriber.from_checkpoint("exp", num_beams=1, device="cpu")`; options are DecodeArguments' fields."""
        return cls.from_arguments(ModelArguments(checkpoint=str(folder)), DecodeArguments(**options))

    def usable(self, audio: np.ndarray) -> bool:
        """At least one projector window long and at most 30 s."""
        return speech_vectors(len(audio), self.model.settings) > 0 and len(audio) <= N_SAMPLES

    def transcribe(self, clips: Sequence[np.ndarray]) -> list[str]:
        """One text for each clip, float32 (samples,) at 16 kHz. Raises InputError unless every clip is `usable`."""
        return [hypothesis.text for hypothesis in self.hypotheses(clips)]

    def hypotheses(self, clips: Sequence[np.ndarray]) -> list[Hypothesis]:
        """As `transcribe`, with how each text ended."""
        settings = self.model.settings
        if not all(isinstance(clip, np.ndarray) and clip.ndim == 1 and clip.dtype.kind == "f" for clip in clips):
            raise InputError("clips must be a list of float arrays (samples,) at 16 kHz, as load_audio gives them")
        wrong = [f"{len(clip) / SAMPLE_RATE:.2f} s" for clip in clips if not self.usable(clip)]
        if wrong:
            raise InputError(f"clips must be one projector window to 30 s long, not {', '.join(wrong)}: cut_at_pauses helps")
        n_mels, padding = settings["encoder"]["n_mels"], settings["encoder_padding"]
        ids = torch.tensor(self.prompt.ids)
        batch = SpeechCollator()([{"input_ids": ids, "mel": log_mel(clip, n_mels, padding)} for clip in clips])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if self.decoder == "ctc":
            with torch.no_grad():
                paths = greedy_path(*self.model.hear(batch["mel"], batch["mel_length"]))
            return [Hypothesis(self._text([self.prompt.spelling.tokens[c] for c in path]), None) for path in paths]
        seconds = torch.tensor([len(clip) / SAMPLE_RATE for clip in clips])
        allowed = (seconds * MAX_TOKENS_PER_SECOND).long() + SPARE_TOKENS  # (B,)
        if self.args.max_new_tokens is not None:
            allowed = torch.full_like(allowed, self.args.max_new_tokens)
        new = self.model.generate(**batch, max_new_tokens=allowed.to(self.device), **self.search)
        ends = set(self.model.llm.generation_config.eos_token_id)
        rows = zip(new.tolist(), allowed.tolist(), strict=True)
        return [Hypothesis(self._text(row), not ends.isdisjoint(row[:limit])) for row, limit in rows]

    def _text(self, ids: list[int]) -> str:
        ends = self.model.llm.generation_config.eos_token_id
        length = next((i for i, id in enumerate(ids) if id in ends), len(ids))
        text = self.prompt.tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return " ".join(text.split())


def cut_at_pauses(audio: np.ndarray, longest: int = N_SAMPLES) -> list[np.ndarray]:
    """Pieces of at most `longest` samples, cut at the quietest place in the second half of each; joined they are `audio`."""
    pieces = []
    while len(audio) > longest:
        energy = np.square(audio[longest // 2 : longest], dtype=np.float64).cumsum()
        window = energy[PAUSE_WINDOW:] - energy[:-PAUSE_WINDOW]
        cut = longest // 2 + int(window.argmin()) + PAUSE_WINDOW // 2
        pieces.append(audio[:cut])
        audio = audio[cut:]
    return [*pieces, audio]


def usable_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is; raises InputError for one that is not there."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name or best)
        return torch.device(name or best)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {first_line(error)}") from None


def out_of_memory(error: BaseException) -> bool:
    """Each device words it in its own way."""
    words = ("out of memory", "allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def decode(transcriber: Transcriber, clips: Sequence[np.ndarray]) -> list[str | InputError]:
    """Transcribe a batch; out of memory, its halves; a clip that does not fit alone yields an InputError in its place."""
    try:
        return transcriber.transcribe(clips)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(clips) == 1:
            return [InputError(f"out of memory on {len(clips[0]) / SAMPLE_RATE:.1f} s alone")]
    torch.cuda.empty_cache()
    half = len(clips) // 2
    return decode(transcriber, clips[:half]) + decode(transcriber, clips[half:])


class Outcome(NamedTuple):
    key: str
    text: str
    error: str
    seconds: float


def read_clip(transcriber: Transcriber, record: Record) -> tuple[list[np.ndarray], str, float]:
    """(pieces that can be decoded, what is wrong, seconds) of a record; never raises for a bad file."""
    try:
        audio, problem = load_audio(*record.part)
    except InputError as error:
        return [], str(error), 0.0
    pieces = [piece for piece in cut_at_pauses(audio) if transcriber.usable(piece)]
    if not pieces:
        problem = problem or ("shorter than one projector window" if len(audio) else "has no samples")
    return pieces, f"{record.wav}: {problem}" if problem else "", len(audio) / SAMPLE_RATE


def recognize(transcriber: Transcriber, records: Sequence[Record], batch_size: int) -> list[Outcome]:
    """Decode some records together, `batch_size` pieces at a time; one outcome for each, whatever happens to it."""
    read = [read_clip(transcriber, record) for record in records]
    flat = [(i, piece) for i, (pieces, _, _) in enumerate(read) for piece in pieces]
    texts: list[list[str]] = [[] for _ in records]
    errors = [problem for _, problem, _ in read]
    for start in range(0, len(flat), batch_size):
        batch = flat[start : start + batch_size]
        for (i, _), text in zip(batch, decode(transcriber, [piece for _, piece in batch]), strict=True):
            if isinstance(text, InputError):
                errors[i] = f"{records[i].wav}: {text}"
            else:
                texts[i].append(text)
    return [
        Outcome(record.key, " ".join(filter(None, words)), error, seconds)
        for record, words, error, (_, _, seconds) in zip(records, texts, errors, read, strict=True)
    ]


class Progress:
    """Outcomes as they come, in RESULT_PATH.partial: a first line that identifies the run, then one JSON line each."""

    def __init__(self, path: Path, identity: dict) -> None:
        self.path, self.done = path, {}
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        whole = lines[:-1]  # what follows the last newline was cut off by the interruption
        if whole and whole[0] == json.dumps(identity):
            outcomes = (Outcome(*json.loads(line)) for line in whole[1:])
            self.done = {outcome.key: outcome for outcome in outcomes if not outcome.error}  # the others are tried again
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(identity) + "\n")
        self.add(list(self.done.values()))

    def add(self, outcomes: list[Outcome]) -> None:
        self.done |= {outcome.key: outcome for outcome in outcomes}
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(outcome) + "\n" for outcome in outcomes)


def use_shipped(model_args: ModelArguments) -> None:
    """Without a checkpoint: the one in demo/pretrained, with its two small models, which are fetched on first use."""
    small = {"llm_model_name_or_path": "SmolLM2-135M-Instruct", "whisper_model_name_or_path": "whisper-tiny.en.pt"}
    for flag, name in small.items():
        path = DEMO / "models" / name
        if not getattr(model_args, flag):
            setattr(model_args, flag, str(path))
            if not path.exists():
                print("fetching two small models for the checkpoint that comes along (164 MB, once)", file=sys.stderr)
                if subprocess.run([sys.executable, DEMO / "fetch_models.py"], stdout=sys.stderr).returncode:
                    raise InputError("the models could not be fetched: see above, or give --checkpoint")
    model_args.checkpoint = str(DEMO / "pretrained")


def run(model_args: ModelArguments, args: DecodeArguments, files: Sequence[str] = ()) -> int:
    """Decode files onto the screen, or a manifest into args.result_path; returns the exit code.

    Raises InputError for what stops everything.
    """
    if bool(files) == bool(args.data_path):
        raise InputError("give either audio files or --data_path, the manifest (jsonl) of what to recognize")
    for name in ("num_beams", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    if not model_args.start():
        use_shipped(model_args)
    if files and args.result_path:
        raise InputError("--result_path is for a --data_path: the text of files goes to the screen")
    if files:
        return recognize_files(Transcriber.from_arguments(model_args, args), files, args.batch_size)
    manifest = read_manifest(args.data_path, need_txt=False)
    transcriber = Transcriber.from_arguments(model_args, args)
    result = Path(args.result_path or "result.txt")
    try:
        result.parent.mkdir(parents=True, exist_ok=True)
        outcomes, speed = decode_manifest(transcriber, manifest, result, model_args, args)
        finished = result.with_name(f"{result.name}.new")
        finished.write_text("".join(f"{o.key} {o.text}\n" for o in outcomes), encoding="utf-8")
        os.replace(finished, result)
        partial_path(result).unlink()
    except OSError as error:  # bad clips were reported one by one: what is left is the result's own folder
        raise InputError(f"{error.filename or result}: cannot write the result ({error.strerror})") from None
    return summarize(outcomes, speed, result)


def recognize_files(transcriber: Transcriber, files: Sequence[str], batch_size: int) -> int:
    """Print `file text` for each; returns the exit code."""
    problems = 0
    for first in range(0, len(files), batch_size):
        records = [Record(file, Path(file), None, None, file) for file in files[first : first + batch_size]]
        for outcome in recognize(transcriber, records, batch_size):
            print(f"{outcome.key} {outcome.text}", flush=True)
            if outcome.error:
                print(outcome.error, file=sys.stderr)
                problems += 1
    return 1 if problems else 0


def partial_path(result: Path) -> Path:
    return result.with_name(f"{result.name}.partial")


def decode_manifest(
    transcriber: Transcriber, manifest: Manifest, result: Path, model_args: ModelArguments, args: DecodeArguments
) -> tuple[list[Outcome], float]:
    """Decode what an earlier, interrupted run has not; (outcomes in manifest order, × real time of this run)."""
    weights = weights_file(model_args.start())
    digests = [sha256(path.read_bytes()).hexdigest() for path in (weights, manifest.path)]
    options = [args.num_beams, args.max_new_tokens, args.dtype, args.decoder, args.joint_weight]
    progress = Progress(partial_path(result), {"weights": digests[0], "manifest": digests[1], "options": options})
    if progress.done:
        print(f"continuing: {len(progress.done)} of {len(manifest)} are done", file=sys.stderr)
    todo = [i for i, record in enumerate(manifest) if record.key not in progress.done]
    start = time.monotonic()
    with tqdm(total=len(todo), unit="clip", disable=None) as bar:
        for first in range(0, len(todo), args.batch_size):
            records = [manifest[i] for i in todo[first : first + args.batch_size]]
            progress.add(recognize(transcriber, records, args.batch_size))
            bar.update(len(records))
    seconds = sum(progress.done[manifest[i].key].seconds for i in todo)
    return [progress.done[record.key] for record in manifest], seconds / (time.monotonic() - start)


def summarize(outcomes: list[Outcome], speed: float, result: Path) -> int:
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"{outcome.key}: {outcome.error}", file=sys.stderr)
    hours = sum(outcome.seconds for outcome in outcomes) / 3600
    print(f"{result}: {len(outcomes)} clips, {hours:.2f} h, {speed:.1f} × real time, {len(failed)} with problems")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    transformers_logging.disable_progress_bar()
    with one_line_errors():
        try:
            *arguments, files = parse((ModelArguments, DecodeArguments), argv, files=True)
            return run(*arguments, files)
        except KeyboardInterrupt:
            raise InputError("interrupted: with --data_path the same command continues where it stopped") from None


if __name__ == "__main__":
    sys.exit(main())
