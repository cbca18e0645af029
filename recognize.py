"""Speech → text with a trained projector: one line `key text` for each file, or line of the manifest, in its order.

    python recognize.py speech.wav more.mp3            # with the small checkpoint that comes along
    python recognize.py --checkpoint exp --data_path test.jsonl --result_path result.txt
    python recognize.py --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny \\
        --projector_model_path exp/checkpoint-600/model.safetensors --data_path test.jsonl --result_path result.txt

A clip that cannot be decoded gets an empty line, is reported on stderr and in the summary, and makes the exit code 1.
An interrupted run continues when started again: finished clips wait in `RESULT_PATH.partial`.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.utils import logging as transformers_logging
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from audio import load_audio, log_mel, samples_of, speech_vectors, vector_seconds
from ctc import greedy_path, log_likelihood
from dataset import SpeechCollator
from manifest import Manifest, Record, read_manifest
from model import LogLikelihood, Sample, SpeechLLM, build_model
from prompt import Prompt, answer_ids, load_tokenizer
from settings import InputError, ModelArguments, first_line, one_line_errors, parse, resolve_settings, weights_file
from transcript import Hypothesis, Transcript, joined, timed_words

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
    nbest: int = field(default=1, metadata={"help": "So many texts a clip with their scores; at most --num_beams."})
    length_penalty: float | None = field(
        default=None,
        metadata={"help": "Beams are ranked by score / tokens ** this. By default 1 for llm; 0 for joint: the sum itself."},
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 makes tokens that were written less likely."})
    no_repeat_ngram_size: int = field(default=0, metadata={"help": "No so many tokens twice in a text; 0: off."})
    temperature: float = field(
        default=0.0, metadata={"help": "Above 0: sample instead of searching, by a seed that the clip's samples give."}
    )
    draft: bool = field(default=True, metadata={"help": "Greedy search verifies the CTC's text: faster, the same result."})
    batch_size: int = field(default=8, metadata={"help": "Clips decoded together."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Bounded by the clip's duration unless given."})
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, mps, cpu; the first that is there."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the frozen weights; auto is bfloat16 on a GPU, float32 elsewhere."}
    )

    def check(self) -> None:
        """Raises InputError for values that cannot be."""
        for name in ("num_beams", "nbest", "batch_size", "max_new_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1")
        if self.nbest > self.num_beams:
            raise InputError(f"--nbest {self.nbest} needs --num_beams {self.nbest} or more, not {self.num_beams}")
        if not self.repetition_penalty > 0:
            raise InputError("--repetition_penalty must be above 0 (1: off)")
        if self.no_repeat_ngram_size < 0:
            raise InputError("--no_repeat_ngram_size must not be negative (0: off)")
        if not 0 <= self.temperature < math.inf:
            raise InputError("--temperature must not be negative (0: off)")
        if self.temperature and self.num_beams > 1:
            raise InputError("--temperature samples one text: give --num_beams 1")


class Reading(NamedTuple):
    """A text that a search came to."""

    text: str
    ids: list[int]  # without the end of turn
    ended: bool | None
    score: float


class Transcriber:
    """A model ready to transcribe. Threads may share it: they take turns, a batch at a time."""

    def __init__(self, model: SpeechLLM, prompt: Prompt, args: DecodeArguments) -> None:
        """Raises InputError for a decoder that needs a CTC where the checkpoint has none."""
        self.model, self.prompt, self.args = model, prompt, args
        self.device = next(model.parameters()).device
        self.decoder = self._decoder(args)
        self.turn = Lock()

    def _decoder(self, args: DecodeArguments) -> str:
        args.check()
        auto = "llm" if not self.model.ctc else "joint" if self.model.settings["llm_reads"] else "ctc"
        decoder = auto if args.decoder == "auto" else args.decoder
        if decoder != "llm" and not self.model.ctc:
            raise InputError(f"--decoder {decoder} needs a checkpoint trained with --splice tokens")
        return decoder

    @cached_property
    def spelling(self) -> Tensor:
        return self.prompt.spelling.table(len(self.prompt.tokenizer)).to(self.device)  # (vocabulary, P)

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
    def from_checkpoint(cls, folder: str | Path | None = None, **options: Any) -> "Transcriber":
        """`Transcriber.from_checkpoint("exp", num_beams=1, device="cpu")`; options are DecodeArguments' fields. Without a
        folder the checkpoint that comes along."""
        model_args = ModelArguments(checkpoint=None if folder is None else str(folder))
        if folder is None:
            use_shipped(model_args)
        return cls.from_arguments(model_args, DecodeArguments(**options))

    def __call__(self, audio: Any, sampling_rate: float | None = None) -> Transcript | list[Transcript]:
        """The transcript of a file (its path) or of an array or tensor of samples (see `samples_of`); of a list, a list.

        Recordings of any length; arrays need their sampling_rate. In a list, one that cannot be decoded has an empty text
        and says why in `error`; alone it raises that InputError.
        """
        several = isinstance(audio, list | tuple)
        inputs = audio if several else [audio]
        found: list[Transcript] = []
        for first in range(0, len(inputs), self.args.batch_size):
            found += self._transcripts(inputs[first : first + self.args.batch_size], sampling_rate)
        if several:
            return found
        if found[0].error and not found[0].segments:
            raise InputError(found[0].error)
        return found[0]

    def _transcripts(self, inputs: Sequence[Any], sampling_rate: float | None) -> list[Transcript]:
        read = [self._read(one, sampling_rate) for one in inputs]
        flat = [(i, *piece) for i, (pieces, _, _) in enumerate(read) for piece in pieces]
        flat.sort(key=lambda piece: len(piece[2]))
        pieces: list[list[tuple[float, float, Hypothesis]]] = [[] for _ in inputs]
        errors = [problem for _, problem, _ in read]
        for first in range(0, len(flat), self.args.batch_size):
            batch = flat[first : first + self.args.batch_size]
            for (i, start, clip), found in zip(batch, decode(self, [clip for _, _, clip in batch]), strict=True):
                if isinstance(found, InputError):
                    errors[i] = str(found)
                else:
                    pieces[i].append((start, len(clip) / SAMPLE_RATE, found))
        rows = zip(pieces, read, errors, strict=True)
        return [joined(sorted(found, key=itemgetter(0)), seconds, error) for found, (_, _, seconds), error in rows]

    def _read(self, source: Any, sampling_rate: float | None) -> tuple[list[tuple[float, np.ndarray]], str, float]:
        """(pieces that can be decoded, each with its start; what is wrong; seconds); never raises for bad audio."""
        file = isinstance(source, str | Path)
        if not file and not isinstance(source, np.ndarray | Tensor):
            raise InputError(f"{type(source).__name__} is not audio: give a file's path, or an array or tensor of samples")
        try:
            audio, problem = load_audio(source) if file else (samples_of(source, sampling_rate), "")
        except InputError as error:
            return [], str(error), 0.0
        start, pieces = 0, []
        for piece in cut_at_pauses(audio):
            pieces += [(start / SAMPLE_RATE, piece)] if self.usable(piece) else []
            start += len(piece)
        if not pieces:
            problem = problem or ("shorter than one projector window" if len(audio) else "has no samples")
        return pieces, f"{source}: {problem}" if problem and file else problem, len(audio) / SAMPLE_RATE

    def usable(self, audio: np.ndarray) -> bool:
        """At least one projector window long and at most 30 s."""
        return speech_vectors(len(audio), self.model.settings) > 0 and len(audio) <= N_SAMPLES

    def transcribe(self, clips: Sequence[np.ndarray]) -> list[str]:
        """One text for each clip, float32 (samples,) at 16 kHz. Raises InputError unless every clip is `usable`."""
        return [hypothesis.text for hypothesis in self.hypotheses(clips)]

    def hypotheses(self, clips: Sequence[np.ndarray], **search: Any) -> list[Hypothesis]:
        """As `transcribe`, with all that is known of each text. `search`: DecodeArguments' fields for this call alone."""
        args = replace(self.args, **search)
        decoder = self._decoder(args)
        if not all(isinstance(clip, np.ndarray) and clip.ndim == 1 and clip.dtype.kind == "f" for clip in clips):
            raise InputError("clips must be a list of float arrays (samples,) at 16 kHz, as load_audio gives them")
        wrong = [f"{len(clip) / SAMPLE_RATE:.2f} s" for clip in clips if not self.usable(clip)]
        if wrong:
            raise InputError(f"clips must be one projector window to 30 s long, not {', '.join(wrong)}: cut_at_pauses helps")
        with self.turn, torch.no_grad():
            return self._decode(clips, args, decoder)

    def _decode(self, clips: Sequence[np.ndarray], args: DecodeArguments, decoder: str) -> list[Hypothesis]:
        settings, spelling = self.model.settings, self.prompt.spelling
        n_mels, padding = settings["encoder"]["n_mels"], settings["encoder_padding"]
        ids = torch.tensor(self.prompt.ids)
        batch = SpeechCollator()([{"input_ids": ids, "mel": log_mel(clip, n_mels, padding)} for clip in clips])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if not self.model.ctc:
            return [_hypothesis(readings) for readings in self._write(batch, clips, args, decoder, None, None)]
        heard = self.model.hear(batch["mel"], batch["mel_length"])
        paths = [[spelling.tokens[c] for c in path] for path in greedy_path(*heard)]  # the CTC's own texts
        if decoder == "ctc":
            written = [[Reading(self._text(path), path, None, 0.0)] for path in paths]
        else:
            texts = map(self._text, paths) if args.draft else ()
            drafts = [answer_ids(self.prompt.tokenizer, text, spoken=True) for text in texts] or None
            written = self._write(batch, clips, args, decoder, heard, drafts)
        weight = {"ctc": 1.0, "llm": 0.0, "joint": args.joint_weight}[decoder]
        hypotheses = []
        for readings, clip, path, log_probs, length in zip(
            written, clips, paths, *(part.cpu() for part in heard), strict=True
        ):
            frames = log_probs[:length]  # (N, V + 1)
            if weight:
                votes = log_likelihood(frames, [spelling(reading.ids) for reading in readings])
                readings = [r._replace(score=r.score + weight * vote) for r, vote in zip(readings, votes, strict=True)]
            seconds = vector_seconds(settings["projector_stride"])
            words = timed_words(readings[0].ids, spelling, frames.numpy(), seconds, len(clip) / SAMPLE_RATE)
            hypotheses.append(replace(_hypothesis(readings), words=words, ctc_text=self._text(path)))
        return hypotheses

    def _write(
        self,
        batch: dict[str, Tensor],
        clips: Sequence[np.ndarray],
        args: DecodeArguments,
        decoder: str,
        heard: Any,
        drafts: Any,
    ) -> list[list[Reading]]:
        """The LLM's readings of each clip, those that the search likes best first, with its log-probabilities."""
        ends = self.model.llm.generation_config.eos_token_id
        seconds = torch.tensor([len(clip) / SAMPLE_RATE for clip in clips])
        allowed = (seconds * MAX_TOKENS_PER_SECOND).long() + SPARE_TOKENS  # (B,)
        if args.max_new_tokens is not None:
            allowed = torch.full_like(allowed, args.max_new_tokens)
        search: dict[str, Any] = {"num_beams": args.num_beams, "do_sample": False}
        several = args.num_beams if args.nbest > 1 else 1  # some are the same text in other tokens
        search |= {"num_return_sequences": several} if several > 1 else {}
        if args.num_beams > 1:  # greedy search would warn of it; the joint score is a sum: no average over its length
            default = 0.0 if decoder == "joint" else 1.0
            search["length_penalty"] = default if args.length_penalty is None else args.length_penalty
        if decoder == "joint":
            search |= {"joint_weight": args.joint_weight, "spelling": self.spelling}
        likelihood = LogLikelihood(len(clips), ends)
        before: list[LogitsProcessor] = [likelihood]
        # generate's own flag overlooks as many tokens of a text as its clip's prompt has padding on the left
        before += [RepetitionPenaltyLogitsProcessor(args.repetition_penalty)] if args.repetition_penalty != 1 else []
        before += [NoRepeatNGramLogitsProcessor(args.no_repeat_ngram_size)] if args.no_repeat_ngram_size else []
        after = [Sample(args.temperature, [crc32(clip.tobytes()) for clip in clips])] if args.temperature else []
        new = self.model.generate(
            **batch, max_new_tokens=allowed.to(self.device), heard=heard, drafts=drafts, before=before, after=after, **search
        )
        readings: list[list[Reading]] = [[] for _ in clips]
        for i, row in enumerate(new.tolist()):
            clip = i // several
            length = next((i for i, id in enumerate(row) if id in ends), len(row))
            ended = length < allowed[clip].item()
            score = likelihood.of(clip, row[:length], row[length] if ended else None)
            reading = Reading(self._text(row), row[:length], ended, score)
            if reading.text not in [other.text for other in readings[clip]]:
                readings[clip].append(reading)
        return [row[: args.nbest] for row in readings]

    def _text(self, ids: list[int]) -> str:
        ends = self.model.llm.generation_config.eos_token_id
        length = next((i for i, id in enumerate(ids) if id in ends), len(ids))
        text = self.prompt.tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return " ".join(text.split())


def _hypothesis(readings: Sequence[Reading]) -> Hypothesis:
    best = readings[0]
    nbest = [(reading.text, reading.score) for reading in readings]
    return Hypothesis(best.text, best.ended, best.score, len(best.ids) + bool(best.ended), nbest)


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


def decode(transcriber: Transcriber, clips: Sequence[np.ndarray]) -> list[Hypothesis | InputError]:
    """Transcribe a batch; out of memory, its halves; a clip that does not fit alone yields an InputError in its place."""
    try:
        return transcriber.hypotheses(clips)
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
        audio, problem = load_audio(record.wav)
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
        for (i, _), found in zip(batch, decode(transcriber, [piece for _, piece in batch]), strict=True):
            if isinstance(found, InputError):
                errors[i] = f"{records[i].wav}: {found}"
            else:
                texts[i].append(found.text)
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
    args.check()
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
    options = {
        name: value for name, value in vars(args).items() if name not in ("data_path", "result_path", "batch_size", "device")
    }
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
