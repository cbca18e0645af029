"""How fast decoding is: the published way and ours, alternating in one run.

    python benchmarks/decode_throughput.py                          # the shipped checkpoint and the demo's test clips
    python benchmarks/decode_throughput.py --checkpoint demo/exp/tuned --parts ratio
    python benchmarks/decode_throughput.py --llm_shape qwen2-1.5b --parts ratio --clips 32     # for a GPU, one minute

Published (benchmarks/published.py): one clip at a time, padded to 30 s, 300 vectors, transformers' generate, which runs the
prompt once for each beam. There is no trained checkpoint of that shape: the projector is untrained, so that it has no WER,
and writes --new_tokens tokens of each clip; the encoder and the LLM are those of ours. Ours: a Transcriber as
recognize.py uses it, without the guard: clips sorted by length, new tokens bounded by duration.

Each time is a median. Accepted: of the tokens written, those that the draft had right; passes: of the LLM, for a batch.
Memory: the most that was held at once over what was held before; on a CPU as Linux counts it.

With --llm_shape the LLM and the CTC are random: nobody ends, all write --new_tokens tokens, the clip's own words are put
on the CTC's path, and a draft is what plain greedy search writes, right to the last token: the most that drafts can gain.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
import whisper
from torch import Tensor
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from published import PublishedModel
from train_throughput import SHAPES, Bench, device_name, synchronize, table

import draft
from audio import load_audio
from manifest import read_manifest
from score import normalizer, score
from search import Found
from settings import InputError, ModelArguments, one_line_errors
from transcriber import VOTES, DecodeArguments, Transcriber, use_shipped
from transcript import Hypothesis

ROOT = Path(__file__).resolve().parent.parent
RATE = whisper.audio.SAMPLE_RATE
SEARCHING = [decoder for decoder in VOTES if decoder != "ctc"]


@dataclass
class Row:
    """One way to decode: `decode` takes clips (samples,) and gives their texts."""

    name: str
    decode: Callable[[list[np.ndarray]], list[str]]
    against: str  # the row of the published way that it is compared with
    seconds: list[float] = field(default_factory=list)  # for one second of speech
    texts: list[str] = field(default_factory=list)
    passes: list[draft.Written] = field(default_factory=list)
    memory: float = 0.0

    def time(self, clips: list[np.ndarray], clock: Callable[[], float], device: str) -> None:
        self.passes, verify = [], draft.verify

        def record(*args: object) -> draft.Written:
            self.passes.append(verify(*args))
            return self.passes[-1]

        with patch.object(draft, "verify", record), peak_memory(device) as peak:
            synchronize(device)
            start = clock()
            self.texts = self.decode(clips)
            synchronize(device)
            self.seconds.append((clock() - start) / sum(map(len, clips)) * RATE)
        self.memory = max(self.memory, peak[0])

    def drafts(self) -> tuple[str, str]:
        """(share of tokens accepted, passes of the LLM a batch), as text."""
        if not self.passes:
            return "–", "–"
        written = sum(len(text.ids) for w in self.passes for text in w.texts)
        accepted = sum(sum(w.accepted) for w in self.passes)
        return f"{100 * accepted / written:.0f} %", f"{statistics.mean(w.passes for w in self.passes):.1f}"


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """A list whose one number will be the most megabytes held inside over those held before."""
    peak, status = [0.0], Path("/proc/self/status")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = (torch.cuda.max_memory_allocated() - before) / 1e6
        return
    if not status.exists():  # no Linux
        yield peak
        return
    held = lambda name: int(status.read_text().partition(name)[2].split()[0]) / 1e3  # noqa: E731
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = held("VmRSS:")
    yield peak
    peak[0] = max(held("VmHWM:") - before, 0.0)


def ours(args: argparse.Namespace, bench: Bench) -> Transcriber:
    """The checkpoint's system, or of --llm_shape one with random weights that hears what is said."""
    options = DecodeArguments(device=args.device, dtype=args.dtype, guard="off")
    if not args.llm_shape:
        models = ModelArguments(args.llm, args.whisper)
        use_shipped(models)
        models.checkpoint = args.checkpoint or models.checkpoint
        return Transcriber.from_arguments(models, options)
    options.max_new_tokens = args.new_tokens
    return Transcriber(bench.ours("tokens").eval().for_decoding(), bench.prompt, options)


class Decoding:
    """The rows of one run, their clips and references."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.clock = time.process_time if args.processor_time else time.perf_counter
        bench = Bench(args, args.data_path)
        records = list(read_manifest(args.data_path))
        audio = sorted(((load_audio(r.wav)[0], r.txt) for r in records), key=lambda pair: len(pair[0]))
        count = len(audio) if args.clips is None else args.clips
        if not 1 <= count <= len(audio):
            raise InputError(f"--clips: 1 to {len(audio)}")
        chosen = [audio[int((i + 0.5) * len(audio) / count)] for i in range(count)]
        self.clips, self.references = [list(part) for part in zip(*chosen, strict=True)]
        self.said = {clip.tobytes(): txt for clip, txt in audio}
        self.transcriber = ours(args, bench)
        encoder = whisper.load_model(args.whisper, device=args.device)
        llm = bench.load_llm(args.llm, bench.dtype)
        self.published = PublishedModel(encoder, llm).to(args.device).eval()
        (
            self.published.conv.to(bench.dtype),
            self.published.linears.to(bench.dtype),
        )  # openai-whisper casts its own as it runs
        self.dtype, self.tokenizer = bench.dtype, bench.tokenizer
        chat = [{"role": "user", "content": "Transcribe the speech"}]
        text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before, _, after = text.partition("Transcribe the speech")
        ids = (self.tokenizer(part, add_special_tokens=False) for part in (before, f"Transcribe the speech{after}"))
        self.words = [torch.tensor([part.input_ids], device=args.device) for part in ids]

    def theirs(self, beams: int) -> Row:
        def decode(clips: list[np.ndarray]) -> list[str]:
            for clip in clips:
                mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(clip), self.published.encoder.dims.n_mels)
                mel = mel[None].to(self.args.device, self.dtype)
                self.published.generate(*self.words, mel, beams, self.args.new_tokens)
            return []

        name = f"published, {search(beams)}"
        return Row(name, decode, name)

    def row(self, decoder: str, beams: int = 1, drafts: bool = False, batch_size: int | None = None) -> Row:
        size = batch_size or self.args.batch_size
        args = replace(self.transcriber.args, decoder=decoder, num_beams=beams, draft=drafts, batch_size=size)
        one = Transcriber(self.transcriber.model, self.transcriber.prompt, args)
        if self.args.llm_shape:
            self.plant(one)
        name = "ctc" if decoder == "ctc" else f"{decoder}, {search(beams)}{', draft' * drafts}"
        return Row(name, lambda clips: [found.text for found in one(clips, RATE)], f"published, {search(beams)}")

    def plant(self, one: Transcriber) -> None:
        """With random weights: the CTC hears the clip's words, drafts are what the LLM will write."""
        model, prompt, known = one.model, one.prompt, {}
        generate, hypotheses = model.generate, one.hypotheses

        def planted(clips: list[np.ndarray]) -> list[Hypothesis]:
            said = [prompt.example(self.said.get(clip.tobytes(), ""))["ctc_labels"] for clip in clips]

            def hear(_: object, __: tuple, log_probs: Tensor) -> Tensor:
                classes = log_probs.shape[-1]
                path = torch.full(log_probs.shape[:2], classes - 1)
                for row, labels in zip(path, said, strict=True):
                    row[torch.linspace(0, len(row) - 1, 2 * len(labels) + 1).long()[1::2]] = torch.tensor(labels).long()
                return (log_probs + 50 * F.one_hot(path.to(log_probs.device), classes)).log_softmax(-1)

            def with_drafts(**options: object) -> list[list[Found]]:
                key = tuple(map(len, clips))
                if options["drafts"] is not None and key not in known:  # the first time, which is not timed
                    best = [texts[0] for texts in generate(**options | {"drafts": None})]
                    known[key] = [text.ids[:-1] if text.ended else text.ids for text in best]
                return generate(**options | {"drafts": options["drafts"] and known[key]})

            handle = model.ctc.register_forward_hook(hear)
            try:
                with patch.object(model, "generate", with_drafts):
                    return hypotheses(clips)
            finally:
                handle.remove()

        one.hypotheses = planted

    def time(self, rows: list[Row], clips: list[np.ndarray], repetitions: int) -> None:
        """Alternating. The published way takes as long whatever the clip: a few of them will do."""
        few = clips[len(clips) // 2 :][: self.args.published_clips]
        share = (sum(map(len, few)) / len(few)) / (sum(map(len, clips)) / len(clips))
        for repetition in range(repetitions + 1):
            for row in rows:
                theirs = row.name == row.against
                some = few if theirs else clips
                if repetition == 0 and not self.args.llm_shape:  # kernels, memory; with random weights also the drafts
                    some = some[: self.args.batch_size]
                row.time(some, self.clock, self.args.device)
                if theirs:
                    row.seconds[-1] *= share  # of speech of the average clip
                if repetition == 0:
                    row.seconds.clear()

    def wer(self, texts: list[str]) -> str:
        if not texts or self.args.llm_shape:
            return "–"
        keys = [str(i) for i in range(len(texts))]
        pairs = (dict(zip(keys, column, strict=True)) for column in (self.references, texts))
        return f"{100 * score(*pairs, normalizer('english')).words.rate:.1f}"


def search(beams: int) -> str:
    return "greedy" if beams == 1 else f"beam {beams}"


def ratio(run: Decoding) -> None:
    """The published way and ours, of the same clips."""
    args, beams = run.args, run.args.num_beams
    rows = [run.theirs(1), run.theirs(beams), run.row("ctc")]
    rows += [run.row(decoder, 1, drafts) for decoder in SEARCHING for drafts in (False, True)]
    rows += [run.row(decoder, beams) for decoder in SEARCHING]
    seconds = sum(map(len, run.clips)) / RATE
    print(f"\n{len(run.clips)} clips, {seconds:.0f} s, batches of at most {args.batch_size}, {args.repetitions} repetitions")
    run.time(rows, run.clips, args.repetitions)
    cost = {row.name: statistics.median(row.seconds) for row in rows}
    lines = []
    for row in rows:
        faster = f"{cost[row.against] / cost[row.name]:.1f}"
        plain = row.name.removesuffix(", draft")
        gain = f"{cost[plain] / cost[row.name]:.2f}" if plain != row.name else "–"
        cells = (f"{1 / cost[row.name]:.1f}", faster, gain, *row.drafts(), run.wer(row.texts), f"{row.memory:.0f}")
        lines.append((row.name, *cells))
    head = ("speech s/s", "× published", "× plain", "accepted", "passes", "WER %", "memory, MB")
    table(("row", *head), lines)


def some_rows(run: Decoding, size: int) -> list[Row]:
    rows = [run.row("ctc", batch_size=size), run.row("llm", 1, True, size), run.row("fusion", 1, False, size)]
    return [*rows, run.row("fusion", 1, True, size), run.row("fusion", run.args.num_beams, batch_size=size)]


def sweep(run: Decoding, what: str, points: list[tuple[str, list[Row], list[np.ndarray]]]) -> None:
    lines = []
    for label, rows, clips in points:
        run.time(rows, clips, 1)
        lines.append((label, *(f"{1 / statistics.median(row.seconds):.1f}" for row in rows)))
    table((what, *(row.name for row in points[0][1])), lines)


def batch_sizes(run: Decoding) -> None:
    """Seconds of speech a second by batch size."""
    some = run.clips[:: max(len(run.clips) // run.args.sweep_clips, 1)][: run.args.sweep_clips]
    sweep(run, "batch size", [(str(size), some_rows(run, size), some) for size in run.args.batch_sizes])


def lengths(run: Decoding) -> None:
    """The same by length of clip: clips strung together, cut to so many seconds."""
    points, size = [], min(run.args.batch_size, 4)
    order = np.random.default_rng(0).permutation(len(run.clips))
    speech = np.concatenate([run.clips[i] for i in order])
    for seconds in run.args.lengths:
        samples = int(seconds * RATE)
        clips = [np.resize(np.roll(speech, -i * samples), samples) for i in range(size)]
        points.append((f"{seconds:g} s", some_rows(run, size), clips))
    sweep(run, "clips of", points)


PARTS = {"ratio": ratio, "batch_sizes": batch_sizes, "lengths": lengths}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    models, on_gpu = ROOT / "demo/models", torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--checkpoint", help="of the token splice; the one that comes along")
    parser.add_argument("--llm", default=str(models / "SmolLM2-135M-Instruct"), help="with --llm_shape: its tokenizer")
    parser.add_argument("--llm_shape", choices=list(SHAPES), help="random weights of this shape instead of --llm's")
    parser.add_argument("--whisper", default=str(models / "whisper-tiny.en.pt"), help="a name or .pt file of openai-whisper")
    parser.add_argument("--data_path", type=Path, default=ROOT / "demo/data/test.jsonl")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--num_beams", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=12, help="that the published way writes of each clip")
    parser.add_argument("--batch_size", type=int, default=DecodeArguments.batch_size)
    parser.add_argument("--clips", type=int, help="evenly taken by length; all")
    parser.add_argument("--published_clips", type=int, default=3, help="of these, for the published way")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--sweep_clips", type=int, default=16, help="in each point of the part batch_sizes")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--lengths", type=float, nargs="+", default=[2.5, 10], help="of clips, in seconds")
    parser.add_argument(
        "--processor_time", action="store_true", help="on a busy machine, with --threads 1, instead of the clock's"
    )
    parser.add_argument("--threads", type=int, help="of the processor")
    args = parser.parse_args(argv)
    args.share_prompt = "auto"
    return args


@torch.no_grad()
def main() -> None:
    args = arguments()
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{device_name(args.device)}; {args.dtype}; LLM {args.llm_shape or Path(args.llm).name}")
    with one_line_errors():
        run = Decoding(args)
        for part in args.parts:
            PARTS[part](run)


if __name__ == "__main__":
    main()
