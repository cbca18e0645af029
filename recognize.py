"""Speech → text with a trained projector: one line `key text` for each file, or line of a manifest, in its order.

    python recognize.py speech.wav more.mp3 folder/    # with the small checkpoint that comes along
    python recognize.py --checkpoint exp --data_path test.jsonl --result_path result.txt result.jsonl
    torchrun --nproc_per_node 8 recognize.py --checkpoint exp --data_path test.jsonl --result_path result.txt
    python recognize.py --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny \\
        --projector_model_path exp/checkpoint-600/model.safetensors --data_path test.jsonl --result_path result.txt

    names ─ find ─ records ─ read_ahead ─ windows of pieces ─ batches ─ decode ─ complete ─ outcomes ─ Progress ─ write

A file that cannot be decoded gets an empty line, is reported on stderr and in the last line, and makes the exit code 1.
An interrupted run continues when started again: finished files wait in `RESULT_PATH.partial`.
"""

import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
from manifest import Record
from model import SpeechLLM, build_model
from progress import Progress, at_work, identity, processes
from prompt import Prompt, load_tokenizer
from results import Outcome, Summary, write
from results import check as check_results
from settings import InputError, ModelArguments, first_line, one_line_errors, parse, resolve_settings, weights_file
from sources import find, shares, transcriptions
from transcript import Hypothesis, joined

DEMO = Path(__file__).resolve().parent / "demo"
MAX_TOKENS_PER_SECOND = 12  # fast speech has about 5 words a second; digits and names cost 2 tokens each
SPARE_TOKENS = 8
PAUSE_WINDOW = SAMPLE_RATE // 5  # a cut falls on the quietest 0.2 s
WINDOW_BATCHES = 4  # so many times --batch_seconds are read ahead and sorted by length
NO_MATTER = ("data_path", "result_path", "batch_size", "batch_seconds", "device")  # to an outcome


@dataclass
class DecodeArguments:
    data_path: str | None = field(default=None, metadata={"help": "What to recognize: manifest (jsonl), folder, file."})
    result_path: list[str] | None = field(
        default=None,
        metadata={"help": "Files to write: .txt .jsonl .tsv .srt .vtt; of a --data_path result.txt, else the screen."},
    )
    decoder: Literal["auto", "ctc", "llm", "joint"] = field(
        default="auto",
        metadata={"help": "ctc: no LLM runs; llm: it alone; joint: both vote. auto: as the checkpoint was trained."},
    )
    joint_weight: float = field(default=0.8, metadata={"help": "Of the CTC's log-probability beside the LLM's."})
    num_beams: int = field(default=4, metadata={"help": "1 is greedy."})
    batch_size: int = field(default=8, metadata={"help": "At most so many clips are decoded together …"})
    batch_seconds: float = field(default=240.0, metadata={"help": "… and at most so many seconds, padding included."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Bounded by the clip's duration unless given."})
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, mps, cpu; the first that is there."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the frozen weights; auto is bfloat16 on a GPU, float32 elsewhere."}
    )


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
    own = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(torch.cuda.device_count(), 1)}"  # of each process another
    best = own if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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


class Piece(NamedTuple):
    start: float  # seconds
    audio: np.ndarray


class Pieces:
    """The pieces of a recording, each at most 30 s; once they are read, its `problem` and length in `seconds` are known."""

    def __init__(self, path: Path) -> None:
        self.path, self.problem, self.seconds = path, "", 0.0

    def __iter__(self) -> Iterator[Piece]:
        audio, self.problem = load_audio(self.path)
        for piece in cut_at_pauses(audio):
            yield Piece(self.seconds, piece)
            self.seconds += len(piece) / SAMPLE_RATE


class Part(NamedTuple):
    """A piece of a record, or its end: then `problem` and `seconds` are the whole record's."""

    record: Record
    piece: Piece | None
    problem: str = ""
    seconds: float = 0.0


def pieces_of(record: Record) -> Pieces:
    return Pieces(record.wav)


def read_parts(transcriber: Transcriber, records: Iterable[Record]) -> Iterator[Part]:
    """The usable pieces of each record, then its end; whatever is wrong with a file is its `problem`."""
    for record in records:
        pieces, problem, usable = pieces_of(record), "", []
        try:
            for piece in pieces:
                usable.append(transcriber.usable(piece.audio))
                if usable[-1]:
                    yield Part(record, piece)
        except InputError as error:
            problem = str(error).removeprefix(f"{record.wav}: ")
        problem = problem or pieces.problem
        if not problem and not pieces.seconds:
            problem = "has no samples"
        if not problem and usable and not any(usable):  # no piece at all: nothing but silence
            problem = "shorter than one projector window"
        yield Part(record, None, problem, pieces.seconds)


def read_ahead(parts: Iterator[Part], seconds: float) -> Iterator[list[Part]]:
    """Windows of so many seconds of audio: while one is worked on, a thread reads the next."""

    def gather() -> list[Part]:
        window, total = [], 0.0
        while total < seconds and (part := next(parts, None)):
            window.append(part)
            total += len(part.piece.audio) / SAMPLE_RATE if part.piece else 0.1  # a record without audio takes room too
        return window

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(gather)
        while window := ahead.result():
            ahead = reader.submit(gather)
            yield window


def batches(parts: Sequence[Part], size: int, seconds: float) -> Iterator[list[Part]]:
    """The longest first, neighbours in length together: as many as `seconds` hold with their padding, at most `size`."""
    parts = sorted(parts, key=lambda part: len(part.piece.audio), reverse=True)
    while parts:
        fit = int(seconds * SAMPLE_RATE / len(parts[0].piece.audio))
        batch, parts = parts[: max(1, min(fit, size))], parts[max(1, min(fit, size)) :]
        yield batch


def recognize(
    transcriber: Transcriber,
    records: Iterable[Record],
    batch_size: int,
    batch_seconds: float = 240.0,
    window_batches: int = WINDOW_BATCHES,
) -> Iterator[Outcome]:
    """One outcome for each record, whatever happens to it, as soon as it is complete: not in the records' order."""
    found: dict[str, list[tuple[Piece, Hypothesis | InputError]]] = defaultdict(list)  # of records that are not complete
    spent: dict[str, float] = defaultdict(float)
    for window in read_ahead(read_parts(transcriber, records), batch_seconds * window_batches):
        ends = {part.record.key: part for part in window if not part.piece}
        pieces = [part for part in window if part.piece]
        left = Counter(part.record.key for part in pieces)
        yield from (complete(end, found.pop(key, []), spent.pop(key, 0.0)) for key, end in ends.items() if not left[key])
        for batch in batches(pieces, batch_size, batch_seconds):
            began = time.monotonic()
            hypotheses = decode(transcriber, [part.piece.audio for part in batch])
            share = (time.monotonic() - began) / sum(len(part.piece.audio) for part in batch)
            for part, hypothesis in zip(batch, hypotheses, strict=True):
                key = part.record.key
                found[key].append((part.piece, hypothesis))
                spent[key] += share * len(part.piece.audio)
                left[key] -= 1
                if not left[key] and key in ends:
                    yield complete(ends[key], found.pop(key), spent.pop(key))


def complete(end: Part, found: list[tuple[Piece, Hypothesis | InputError]], seconds: float) -> Outcome:
    """A record's pieces, decoded in any order, as its outcome."""
    found = sorted(found, key=lambda pair: pair[0].start)
    lost = [str(hypothesis) for _, hypothesis in found if isinstance(hypothesis, InputError)]
    pieces = [(p.start, len(p.audio) / SAMPLE_RATE, h) for p, h in found if not isinstance(h, InputError)]
    transcript = joined(pieces, end.seconds, "; ".join(filter(None, [end.problem, *lost])))
    return Outcome(end.record.key, str(end.record.wav), transcript, seconds)


def use_shipped(model_args: ModelArguments) -> None:
    """Without a checkpoint: the one in demo/pretrained, with its two small models, which are fetched on first use."""
    small = {"llm_model_name_or_path": "SmolLM2-135M-Instruct", "whisper_model_name_or_path": "whisper-tiny.en.pt"}
    for flag, name in small.items():
        path = DEMO / "models" / name
        if not getattr(model_args, flag):
            setattr(model_args, flag, str(path))
            if not path.exists():
                if processes()[1] > 1:
                    raise InputError("fetch the two small models first: python demo/fetch_models.py")
                print("fetching two small models for the checkpoint that comes along (164 MB, once)", file=sys.stderr)
                if subprocess.run([sys.executable, DEMO / "fetch_models.py"], stdout=sys.stderr).returncode:
                    raise InputError("the models could not be fetched: see above, or give --checkpoint")
    model_args.checkpoint = str(DEMO / "pretrained")


def run(model_args: ModelArguments, args: DecodeArguments, files: Sequence[str] = ()) -> int:
    """Decode onto the screen, or into args.result_path; returns the exit code.

    Raises InputError for what stops everything.
    """
    names = [*files, *([args.data_path] if args.data_path else [])]
    if not names:
        raise InputError("give audio files, folders or a manifest (jsonl) to recognize, or --data_path")
    for name in ("num_beams", "batch_size", "batch_seconds", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    records = find(names)
    paths = [Path(path) for path in args.result_path or (["result.txt"] if args.data_path else [])]
    check_results(paths, records)
    if processes()[1] > 1 and not paths:
        raise InputError("several processes need a --result_path")
    if not model_args.start():
        use_shipped(model_args)
    references = transcriptions(names, records)
    if not paths:
        return onto_the_screen(Transcriber.from_arguments(model_args, args), records, Summary(references))
    with one_line_os_errors(paths[0]):
        desk = at_work(paths[0])
    transcriber = Transcriber.from_arguments(model_args, args)
    with one_line_os_errors(paths[0]):
        options = {name: value for name, value in asdict(args).items() if name not in NO_MATTER}
        progress = Progress(paths[0], desk, identity(records, weights_file(model_args.start()), options), len(records))
        return into_files(transcriber, records, progress, Summary(references), paths)


@contextmanager
def one_line_os_errors(result: Path) -> Iterator[None]:
    """Bad files are reported one by one: what is left is the result's own folder."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or result}: cannot write the result ({error.strerror})") from None


def onto_the_screen(transcriber: Transcriber, records: Sequence[Record], summary: Summary) -> int:
    """Print `key text` for each, in order."""
    began, args = time.monotonic(), transcriber.args
    outcomes = recognize(transcriber, records, args.batch_size, args.batch_seconds, window_batches=1)
    waiting: dict[str, Outcome] = {}
    for record in records:
        while record.key not in waiting:
            outcome = next(outcomes)
            waiting[outcome.key] = outcome
        outcome = waiting.pop(record.key)
        print(f"{outcome.key} {outcome.text}", flush=True)
        summary.add(outcome.as_dict())
    return summary.tell(summary.audio, time.monotonic() - began, sys.stderr)


def into_files(
    transcriber: Transcriber, records: Sequence[Record], progress: Progress, summary: Summary, paths: Sequence[Path]
) -> int:
    """Decode this process's share of what earlier runs have left; the last process writes `paths`, in the records' order."""
    began, args = time.monotonic(), transcriber.args
    share = shares(records, progress.processes)[progress.process]
    todo = [int(place) for place in share if not progress.before[place]]
    if progress.before.any() and not progress.process:
        print(f"continuing: {progress.before.sum()} of {len(records)} are done", file=sys.stderr)
    places: dict[str, int] = {}  # of the records that are being read or decoded

    def reading() -> Iterator[Record]:
        for place in todo:
            record = records[place]
            places[record.key] = place
            yield record

    with tqdm(total=len(todo), unit="file", disable=True if progress.process else None) as bar:
        for outcome in recognize(transcriber, reading(), args.batch_size, args.batch_seconds):
            progress.add(places.pop(outcome.key), outcome.as_dict())
            bar.update()
    if not progress.finish():
        who = f"process {progress.process}"
        print(f"{who}: its {len(share)} files are done; the last process writes the result", file=sys.stderr)
        return 0
    if progress.lacking():
        raise InputError(progress.lacking())
    for path in paths:
        write(path, progress)
    audio = 0.0  # of this run
    for outcome, before in zip(progress, progress.before, strict=True):
        summary.add(outcome)
        audio += 0 if before else outcome["duration"]
    progress.remove()
    return summary.tell(audio, time.monotonic() - began, sys.stdout, paths)


def main(argv: Sequence[str] | None = None) -> int:
    transformers_logging.disable_progress_bar()
    with one_line_errors():
        try:
            *arguments, files = parse((ModelArguments, DecodeArguments), argv, files=True)
            return run(*arguments, files)
        except KeyboardInterrupt:
            raise InputError("interrupted: with a --result_path the same command continues where it stopped") from None


if __name__ == "__main__":
    sys.exit(main())
