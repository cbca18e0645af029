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

import math
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple, get_args, get_origin
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.utils import logging as transformers_logging
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from audio import log_mel, samples_of, speech_vectors, vector_seconds
from ctc import greedy_path, log_likelihood
from dataset import SpeechCollator
from guard import guarded
from longform import DETECTORS, Piece, Pieces, cut
from manifest import Record
from model import LogLikelihood, Sample, SpeechLLM, build_model
from progress import AGAIN, Progress, at_work, identity, processes
from prompt import Prompt, answer_ids, load_tokenizer
from results import Outcome, Summary, write
from results import check as check_results
from settings import InputError, ModelArguments, first_line, one_line_errors, parse, resolve_settings, weights_file
from sources import find, shares, transcriptions
from transcript import Hypothesis, Transcript, joined, timed_words

DEMO = Path(__file__).resolve().parent / "demo"
MAX_TOKENS_PER_SECOND = 12  # fast speech has about 5 words a second; digits and names cost 2 tokens each
SPARE_TOKENS = 8
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
    guard: Literal["on", "off"] = field(default="on", metadata={"help": "Against loops, refusals and text on silence."})
    draft: bool = field(default=True, metadata={"help": "Greedy search verifies the CTC's text: faster, the same result."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Bounded by the clip's duration unless given."})
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, mps, cpu; the first that is there."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the frozen weights; auto is bfloat16 on a GPU, float32 elsewhere."}
    )
    vad: Literal["energy", "silero", "none"] = field(
        default="energy", metadata={"help": "What finds the pauses of audio longer than 30 s; none: the quietest places."}
    )

    def check(self) -> None:
        """Raises InputError for values that cannot be."""
        for own in fields(self):  # the command line checks these itself, Python does not
            value, choices = getattr(self, own.name), get_args(own.type) if get_origin(own.type) is Literal else ()
            if choices and value not in choices:
                raise InputError(f"--{own.name} {value!r} is none of {', '.join(choices)}")
        for name in ("num_beams", "nbest", "batch_size", "batch_seconds", "max_new_tokens"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise InputError(f"--{name} must be at least 1")
        if not 0 <= self.joint_weight < math.inf:
            raise InputError("--joint_weight must not be negative (0: the LLM alone)")
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
        self.decoder = self._decoder(args)
        DETECTORS[args.vad]()  # a missing package is told before the first file
        self.device = next(model.parameters()).device
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
        args.check()
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
        for one in inputs:
            if not isinstance(one, str | Path | np.ndarray | Tensor):
                raise InputError(f"{type(one).__name__} is not audio: give a file's path, or an array or tensor of samples")

        def pieces_of(record: Record) -> Pieces | ArrayPieces:
            file = isinstance(record.wav, str | Path)
            vad = self.args.vad
            return Pieces(record.wav, vad=vad) if file else ArrayPieces(record.wav, sampling_rate, vad)

        records = [Record(str(i), one, None, None, "") for i, one in enumerate(inputs)]
        sizes = self.args.batch_size, self.args.batch_seconds
        outcomes = {o.key: o for o in recognize(self, records, *sizes, pieces_of=pieces_of)}
        found = []
        for record in records:
            transcript = outcomes[record.key].transcript
            if transcript.error and isinstance(record.wav, str | Path):
                transcript.error = f"{record.wav}: {transcript.error}"
            found.append(transcript)
        if several:
            return found
        if found[0].error and not found[0].segments:
            raise InputError(found[0].error)
        return found[0]

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
            raise InputError(f"clips must be one projector window to 30 s long, not {', '.join(wrong)}: longform.cut helps")
        with self.turn, torch.no_grad():
            return self._decode(clips, args, decoder) if clips else []

    def _decode(self, clips: Sequence[np.ndarray], args: DecodeArguments, decoder: str) -> list[Hypothesis]:
        settings, spelling = self.model.settings, self.prompt.spelling
        n_mels, padding = settings["encoder"]["n_mels"], settings["encoder_padding"]
        ids = torch.tensor(self.prompt.ids)
        on = self.device if self.device.type == "cuda" else "cpu"  # many processors took 55 ms a clip beside an H100
        mels = [log_mel(clip, n_mels, padding, on) for clip in clips]
        batch = SpeechCollator()([{"input_ids": ids, "mel": mel} for mel in mels])
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
        return guarded(transcriber, clips) if transcriber.args.guard == "on" else transcriber.hypotheses(clips)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if len(clips) == 1:
            return [InputError(f"out of memory on {len(clips[0]) / SAMPLE_RATE:.1f} s alone")]
    torch.cuda.empty_cache()
    half = len(clips) // 2
    return decode(transcriber, clips[:half]) + decode(transcriber, clips[half:])


class ArrayPieces:
    """An array's pieces, as longform.Pieces are a file's."""

    problem, seconds = "", 0.0

    def __init__(self, array: Any, sampling_rate: float | None, vad: str) -> None:
        self.array, self.sampling_rate, self.vad = array, sampling_rate, vad

    def __iter__(self) -> Iterator[Piece]:
        audio = samples_of(self.array, self.sampling_rate)
        self.seconds = len(audio) / SAMPLE_RATE
        return cut([audio], self.vad)


class Part(NamedTuple):
    """A piece of a record, or its end: then `problem` and `seconds` are the whole record's."""

    record: Record
    piece: Piece | None
    problem: str = ""
    seconds: float = 0.0


Found = tuple[float, float, Hypothesis | InputError]  # of a piece: its start and duration (seconds), what was decoded


def read_parts(
    transcriber: Transcriber, records: Iterable[Record], pieces_of: Callable[[Record], Pieces | ArrayPieces]
) -> Iterator[Part]:
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
        fit = max(1, int(min(size, seconds * SAMPLE_RATE / len(parts[0].piece.audio))))
        batch, parts = parts[:fit], parts[fit:]
        yield batch


def recognize(
    transcriber: Transcriber,
    records: Iterable[Record],
    batch_size: int,
    batch_seconds: float = 240.0,
    window_batches: int = WINDOW_BATCHES,
    pieces_of: Callable[[Record], Pieces | ArrayPieces] | None = None,
) -> Iterator[Outcome]:
    """One outcome for each record, whatever happens to it, as soon as it is complete: not in the records' order."""
    pieces_of = pieces_of or (lambda record: Pieces(*record.part, vad=transcriber.args.vad))
    found: dict[str, list[Found]] = defaultdict(list)  # of records that are not complete
    spent: dict[str, float] = defaultdict(float)
    for window in read_ahead(read_parts(transcriber, records, pieces_of), batch_seconds * window_batches):
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
                samples = len(part.piece.audio)  # not kept: it would be all of a long recording
                found[key].append((part.piece.start, samples / SAMPLE_RATE, hypothesis))
                spent[key] += share * samples
                left[key] -= 1
                if not left[key] and key in ends:
                    yield complete(ends[key], found.pop(key), spent.pop(key))


def complete(end: Part, found: list[Found], seconds: float) -> Outcome:
    """A record's pieces, decoded in any order, as its outcome."""
    found = sorted(found, key=lambda piece: piece[0])
    lost = [str(hypothesis) for _, _, hypothesis in found if isinstance(hypothesis, InputError)]
    pieces = [piece for piece in found if not isinstance(piece[2], InputError)]
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
    args.check()
    records = find(names)
    paths = [Path(path) for path in args.result_path or (["result.txt"] if args.data_path else [])]
    check_results(paths, records)
    for path in paths:
        if any(os.path.exists(name) and path.exists() and path.samefile(name) for name in names):
            raise InputError(f"--result_path {path} is what is to be recognized: it would be overwritten")
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

    try:
        with tqdm(total=len(todo), unit="file", disable=True if progress.process else None) as bar:
            for outcome in recognize(transcriber, reading(), args.batch_size, args.batch_seconds):
                progress.add(places.pop(outcome.key), outcome.as_dict())
                bar.update()
    except RuntimeError:  # a CUDA error, say: its traceback follows
        print(f"process {progress.process} failed, what it had done is kept: {AGAIN}", file=sys.stderr)
        raise
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
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes out the rest at its end
            return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a screen may lack letters
    sys.exit(main())
