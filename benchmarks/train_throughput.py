"""How fast one training step is: that of the published script (a) and ours (b), alternating in one run.

    python benchmarks/train_throughput.py                       # the demo's models and data: minutes on 2 cores
    python benchmarks/train_throughput.py --parts ratio --profile
    python benchmarks/train_throughput.py --llm_shape qwen2-1.5b    # random weights of that shape: for a GPU

(a) is benchmarks/published.py: 30 s and 512 positions for each clip. (b) is model.py and dataset.py as train.py runs them:
frames, and tokens in both phases; `tokens` itself is the default, half of the steps each. All read their audio within the
step (no workers), run in one precision (bfloat16 where the processor has units for it), and end with AdamW. Batches of (b)
hold clips of about one length, as `--group_by_length` makes them. Ratios are of medians; the machine should be idle.

Share of peak: floating point operations of useful work in a second (`useful_flops`: no padding, nothing that could be left
out) over those of the best product of two large matrices, in the same precision, on the same threads, in the same run.

An untrained CTC would hear a token in every frame: instead the clip's own tokens are put on its path, evenly, so that the
LLM reads as many soft tokens as after a training.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import whisper
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from published import PublishedData, PublishedModel

from audio import SAMPLE_RATE, load_audio
from dataset import SpeechCollator, SpeechDataset
from manifest import read_manifest
from model import SpeechLLM, build_model
from prompt import Prompt, Spelling, load_tokenizer
from settings import IGNORE_INDEX, SPEECH_INDEX, InputError, ModelArguments, one_line_errors, resolve_settings
from train import encode_once

ROOT = Path(__file__).resolve().parent.parent
MAX_LENGTH = 512
SHAPES = {  # layers, hidden, intermediate, heads, key-value heads, vocabulary
    "smollm2-135m": (LlamaConfig, 30, 576, 1536, 9, 3, 49152),
    "qwen2-0.5b": (Qwen2Config, 24, 896, 4864, 14, 2, 151936),
    "qwen2-1.5b": (Qwen2Config, 28, 1536, 8960, 12, 2, 151936),
}
GROUPS = {  # operators by what they are spent on; the first that fits
    "matrix products": ("mm", "addmm", "bmm", "convolution", "mkldnn_conv", "scaled_dot_product", "baddbmm"),
    "softmax, norms, loss": ("softmax", "norm", "pow", "rsqrt", "mean", "ctc_loss", "nll_loss", "sum", "div"),
    "activations, products, sums": ("silu", "gelu", "relu", "threshold", "mul", "add", "neg", "sub", "cos", "sin", "exp"),
    "copies, casts, indexing": ("copy", "cat", "clone", "fill", "zero", "index", "gather", "where", "pad", "stack", "empty"),
}


@dataclass
class Row:
    """One way to train: `step` takes some clips, by their places in the manifest, and makes an optimizer step of them."""

    name: str
    model: nn.Module
    data: torch.utils.data.Dataset
    collate: Callable
    loss: Callable[[dict], Tensor]
    device: str
    dtype: torch.dtype
    clock: Callable[[], float]
    flops: Callable[[dict], float] | None = None
    seconds: list[float] = field(default_factory=list)  # of each repetition, for one clip

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        kept = getattr(self.data, "kept", range(len(self.data)))  # ours drops what cannot be trained on
        self.index = {place: i for i, place in enumerate(kept)}

    def batch(self, places: list[int]) -> dict[str, Tensor]:
        batch = self.collate([self.data[self.index[place]] for place in places])
        return {name: value.to(self.device) for name, value in batch.items()}

    def forward_backward(self, batch: dict[str, Tensor]) -> None:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.loss(batch)
        loss.backward()

    def step(self, places: list[int]) -> None:
        self.forward_backward(self.batch(places))
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def time(self, batches: list[list[int]]) -> float:
        """Seconds a clip."""
        synchronize(self.device)
        start = self.clock()
        for places in batches:
            self.step(places)
        synchronize(self.device)
        return (self.clock() - start) / sum(map(len, batches))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_flops(device: str, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Floating point operations a second of the best of some products of two large square matrices."""
    n = 8192 if device == "cuda" else 1536
    a = torch.randn(n, n, device=device).to(dtype)
    best = math.inf
    for _ in range(8):
        synchronize(device)
        start = clock()
        a @ a
        synchronize(device)
        best = min(best, clock() - start)
    return 2 * n**3 / best


def weights(*modules: nn.Module) -> int:
    """Entries of the matrices that a position is multiplied by: Linear and Conv1d (the projector's, at its stride)."""
    layers = (layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d))
    return sum(layer.weight.numel() for layer in layers)


def useful_flops(model: SpeechLLM, batch: dict[str, Tensor]) -> float:
    """Operations that one step needs at least, two for a multiplication and addition, padding not counted.

    A frozen matrix of N entries costs 2·N a position forward and 2·N for the gradient of its input, a trained one 2·N more
    for its own. Attention costs 4 · queries · keys seen · width forward, twice that backward.
    - encoder: forward; its last layers, where they are trained, and the projector: 6·N;
    - CTC: 4·V·D a vector;
    - LLM: 4·N for each position from the speech on; the prompt before it, alike in all rows, once for the batch, 2·N where
      it is not trained; its output layer: 4·V·D for each label.
    """
    mel = batch["mel_length"].double()
    frames = (mel + 1) // 2  # (B,) of the encoder
    vectors = frames // model.projector.stride
    frozen, handed_over = model.encoder.whisper, model.projector.layers
    d = model.encoder.dim
    stem = 2 * (mel.sum() * frozen.conv1.weight.numel() + frames.sum() * frozen.conv2.weight.numel())
    attention = 4 * d * frames.square().sum()  # of one layer, forward
    total = stem + 2 * weights(frozen.layers) * frames.sum() + len(frozen.layers) * attention
    total += 6 * weights(handed_over) * frames.sum() + 3 * len(handed_over) * attention
    projector = model.projector
    total += 6 * weights(projector.conv, projector.linear1, projector.linear2) * vectors.sum()
    read = vectors
    if model.ctc:
        total += 4 * model.ctc.directions.numel() * vectors.sum()
        if model.aligning:
            return float(total)
        read = (batch["ctc_labels"] != IGNORE_INDEX).sum(1)
    layers = model.llm.base_model.layers
    config = model.llm.config
    supervised = (batch["labels"] != IGNORE_INDEX).sum()
    before = int((batch["input_ids"][0] == SPEECH_INDEX).nonzero()[0])  # of the prompt, alike in all rows
    after = batch["attention_mask"].sum(1) - 1 - before + read  # (B,) speech, the rest of the prompt, the answer
    width = config.num_attention_heads * layers[0].self_attn.head_dim
    seen = (after * before + after * (after + 1) / 2).sum()  # causal: what each position attends to, in sum
    total += 4 * weights(layers) * after.sum() + 12 * len(layers) * width * seen
    times = 2 if model.soft_prompt else 1  # forward and backward, or forward alone
    total += 2 * times * weights(layers) * before
    return float(total + 4 * config.vocab_size * config.hidden_size * supervised)


@dataclass
class WithPath:
    """A batch and `path` (B, N): its CTC classes spread evenly over each clip's vectors, blanks between them."""

    stride: int
    blank: int

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        batch = SpeechCollator()(examples)
        vectors = (batch["mel_length"] + 1) // 2 // self.stride  # (B,)
        path = torch.full((len(vectors), int(vectors.max())), self.blank)
        for row, labels, length in zip(path, batch["ctc_labels"], vectors.tolist(), strict=True):
            labels = labels[labels != IGNORE_INDEX]
            row[torch.linspace(0, length - 1, 2 * len(labels) + 1).long()[1::2]] = labels
        return batch | {"path": path}


def loss_of(model: SpeechLLM, batch: dict[str, Tensor]) -> Tensor:
    """The loss; where the LLM reads soft tokens, as if the CTC had heard the batch's path."""
    path = batch.get("path")
    batch = {name: value for name, value in batch.items() if name != "path"}
    if path is None or model.aligning:
        return model(**batch)["loss"]

    def hear(_: nn.Module, __: tuple, log_probs: Tensor) -> Tensor:
        classes = log_probs.shape[-1]
        heard = F.pad(path, (0, log_probs.shape[1] - path.shape[1]), value=classes - 1)
        return (log_probs + 50 * F.one_hot(heard, classes)).log_softmax(-1)

    handle = model.ctc.register_forward_hook(hear)
    try:
        return model(**batch)["loss"]
    finally:
        handle.remove()


def llm_config(shape: str) -> PreTrainedConfig:
    kind, layers, hidden, intermediate, heads, kv_heads, vocabulary = SHAPES[shape]
    return kind(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


class Bench:
    """The models and rows of one run, on one device."""

    def __init__(self, args: argparse.Namespace, manifest: Path) -> None:
        self.args, self.manifest = args, read_manifest(manifest)
        self.device = args.device
        self.clock = time.process_time if args.processor_time else time.perf_counter
        self.tokenizer = load_tokenizer(args.llm)
        self.dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32

    def load_llm(self, name: str, dtype: torch.dtype | str = "auto") -> nn.Module:
        if not self.args.llm_shape:
            return self.original(name, dtype=dtype)
        dtype = self.dtype if dtype == "auto" else dtype
        with torch.device(self.device):  # a GPU draws the weights at once
            return AutoModelForCausalLM.from_config(llm_config(self.args.llm_shape), dtype=dtype).to("cpu")

    original = staticmethod(AutoModelForCausalLM.from_pretrained)

    def published(self) -> Row:
        encoder = whisper.load_model(self.args.whisper, device=self.device)
        model = PublishedModel(encoder, self.load_llm(self.args.llm)).to(self.device)
        data = PublishedData(list(self.manifest), self.tokenizer, MAX_LENGTH, encoder.dims.n_mels)
        return Row(
            "published", model, data, default_collate, lambda batch: model(**batch), self.device, self.dtype, self.clock
        )

    def ours(self, splice: str) -> SpeechLLM:
        models = ModelArguments(self.args.llm, self.args.whisper, splice=splice)
        settings = resolve_settings(models, None)
        if splice == "tokens":
            texts = (record.txt for record in self.manifest)
            settings["ctc_tokens"] = Spelling.choose(self.tokenizer, texts, settings["ctc_merges"]).tokens
        prompt = Prompt.build(self.tokenizer, None, settings)
        torch.manual_seed(0)
        with patch.object(AutoModelForCausalLM, "from_pretrained", self.load_llm):
            model = build_model(settings, prompt.word_ids, prompt.end_of_turn, self.dtype)
        if self.device == "cpu":
            model.llm.set_attn_implementation("eager")  # as train.py
        if self.args.share_prompt != "auto":
            model.share_prompt = self.args.share_prompt == "True"
        model.ctc_weight = 0.3
        self.prompt, self.settings = prompt, settings
        return model.to(self.device).train()

    def rows(self, names: list[str]) -> list[Row]:
        """The rows that were asked for; both phases of tokens share one model."""
        rows, models = [], {}
        for name in names:
            if name == "published":
                rows.append(self.published())
                continue
            splice, _, phase = name.partition(", ")
            if splice not in models:
                model = self.ours(splice)
                models[splice] = model, SpeechDataset(self.manifest, self.prompt, self.settings, MAX_LENGTH)
            model, data = models[splice]
            rows.append(self.our_row(name, model, data, phase == "align"))
        return rows

    def our_row(self, name: str, model: SpeechLLM, data: SpeechDataset, aligning: bool) -> Row:
        def loss(batch: dict[str, Tensor]) -> Tensor:
            model.aligning = aligning
            return loss_of(model, batch)

        def flops(batch: dict[str, Tensor]) -> float:
            model.aligning = aligning
            return useful_flops(model, batch)

        collate = WithPath(model.projector.stride, len(model.ctc.directions)) if model.ctc else SpeechCollator()
        return Row(name, model, data, collate, loss, self.device, self.dtype, self.clock, flops)


def samples(row: Row, place: int) -> int:
    return row.data.lengths[row.index[place]]


def batches_of(rows: list[Row], clips: int, size: int, by_length: bool = True) -> list[list[int]]:
    """Some of the clips that every row can use, the same in every call, in batches: random ones, or all clips sorted by
    length and cut into batches, of which these are evenly taken."""
    usable = sorted(set.intersection(*(set(row.index) for row in rows)))
    places = np.random.default_rng(0).permutation(usable).tolist()
    if by_length:
        places.sort(key=lambda place: samples(rows[-1], place))
    batches = [places[i : i + size] for i in range(0, len(places), size)]
    count = min(max(clips // size, 1), len(batches))
    return [batches[int((i + 0.5) * len(batches) / count)] for i in range(count)]


def mean_seconds(row: Row, batches: list[list[int]]) -> float:
    return statistics.mean(samples(row, place) / SAMPLE_RATE for places in batches for place in places)


def table(head: tuple, lines: list[tuple]) -> None:
    print("\n" + "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines)), flush=True)


def half_and_half(align: float, llm: float) -> float:
    """Seconds a clip where half of the steps align."""
    return (align + llm) / 2


def ratio(bench: Bench) -> None:
    """Clips a second of (a) and (b), alternating, and the share of the peak that (b) reaches."""
    args = bench.args
    rows = bench.rows(["published", "frames", "tokens, align", "tokens, LLM"])
    ours = rows[1:]
    batches = batches_of(rows, args.clips, args.batch_size, not args.random_batches)
    theirs = [batches[len(batches) // 2]]  # whatever the clips, its step takes as long
    seconds = mean_seconds(ours[0], batches)
    clips = sum(map(len, batches))
    print(f"\n{clips} clips of {seconds:.2f} s on average, batches of {args.batch_size}, {args.repetitions} repetitions")
    for row in rows:  # kernels for these shapes, memory
        row.time(theirs[:1] if row is rows[0] else batches)
    peaks = []
    for _ in range(args.repetitions):
        peaks.append(peak_flops(bench.device, bench.dtype, bench.clock))
        for row in rows:
            row.seconds.append(row.time(theirs if row is rows[0] else batches))
    peak = statistics.median(peaks)
    cost = {row.name: statistics.median(row.seconds) for row in rows}
    cost["tokens"] = statistics.median(map(half_and_half, rows[2].seconds, rows[3].seconds))
    needed = {row.name: sum(row.flops(row.batch(places)) for places in batches) / clips for row in ours}
    needed["tokens"] = half_and_half(needed["tokens, align"], needed["tokens, LLM"])
    print(f"peak of {args.dtype} products: {peak / 1e9:.0f} GFLOP/s (of {', '.join(f'{p / 1e9:.0f}' for p in peaks)})")
    lines = []
    for name in ("published", "frames", "tokens, align", "tokens, LLM", "tokens"):
        clip = cost[name]
        flops = needed.get(name)
        share = f"{flops / 1e9:.1f} | {100 * flops / clip / peak:.0f} %" if flops else "– | –"
        lines.append((name, f"{1 / clip:.2f}", f"{seconds / clip:.1f}", f"{cost['published'] / clip:.1f}", share))
    table(("row", "clips/s", "speech s/s", "× published", "useful GFLOP a clip", "of the peak"), lines)


def sweep(bench: Bench, points: list[tuple[str, list[Row], list[list[int]]]], what: str) -> None:
    """Clips and seconds of speech a second of frames and tokens for each point."""
    lines = []
    for label, (frames, align, llm), batches in points:
        took = []
        for row in (frames, align, llm):
            row.time(batches[:1])
            took.append(row.time(batches))
        seconds = mean_seconds(frames, batches)
        for name, clip in (("frames", took[0]), ("tokens", half_and_half(*took[1:]))):
            lines.append((label, name, f"{1 / clip:.2f}", f"{seconds / clip:.1f}"))
    table((what, "splice", "clips/s", "speech s/s"), lines)


OURS = ["frames", "tokens, align", "tokens, LLM"]


def batch_sizes(bench: Bench) -> None:
    rows = bench.rows(OURS)
    points = [(size, rows, batches_of(rows, bench.args.sweep_clips, size)) for size in bench.args.batch_sizes]
    sweep(bench, points, "batch size")


def clip_lengths(bench: Bench) -> None:
    """Demo clips strung together (and their texts) to so many seconds."""
    points, records = [], list(bench.manifest)
    size = bench.args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for seconds in bench.args.lengths:
            for n in range(size):
                audio, texts, i = np.zeros(0, np.float32), [], n
                while len(audio) < seconds * SAMPLE_RATE:
                    audio = np.concatenate([audio, load_audio(*records[i % len(records)].part)[0]])
                    texts.append(records[i % len(records)].txt)
                    i += size
                # the last clip is cut, and of its words as many are left out
                share = seconds * SAMPLE_RATE / len(audio)
                words = " ".join(texts).split()
                name = f"{seconds:g}-{n}.wav"
                soundfile.write(Path(folder, name), audio[: int(seconds * SAMPLE_RATE)], SAMPLE_RATE)
                lines.append({"wav": name, "txt": " ".join(words[: math.ceil(share * len(words))])})
        manifest = Path(folder, "clips.jsonl")
        manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        strung = copy.copy(bench)
        strung.manifest = read_manifest(manifest)
        rows = strung.rows(OURS)
        for row in rows[:2]:
            if len(row.data) != len(lines):
                raise InputError(f"--lengths: {row.name}: {row.data.summary()}")
        for n, seconds in enumerate(bench.args.lengths):
            points.append((f"{seconds:g} s", rows, [list(range(n * size, (n + 1) * size))]))
        sweep(strung, points, "clips of")


def cache(bench: Bench) -> None:
    """What an epoch costs with and without --cache_dir, and what the cache costs."""
    rows, args, lines = bench.rows(OURS), bench.args, []
    for names in (("frames",), ("tokens, align", "tokens, LLM")):
        group = [row for row in rows if row.name in names]
        data, model = group[0].data, group[0].model
        batches = batches_of(group, args.sweep_clips, args.batch_size)
        places = [group[0].index[place] for batch in batches for place in batch]
        speech = sum(data.lengths[i] for i in places) / SAMPLE_RATE
        few = copy.copy(data)  # the cache is of these clips alone
        few.kept, few.lengths = ([column[i] for i in places] for column in (data.kept, data.lengths))
        with tempfile.TemporaryDirectory() as folder:
            for row in group:
                row.data, row.index = few, {place: i for i, place in enumerate(few.kept)}
                row.time(batches)
            plain = [row.time(batches) for row in group]
            start = bench.clock()
            process = SimpleNamespace(device=torch.device(bench.device), process_index=0, world_size=1)
            encode_once(few, model, folder, process)
            once = (bench.clock() - start) / len(few)
            for row in group:
                row.time(batches)
            cached = [row.time(batches) for row in group]
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        named = list(zip(names, plain, cached, strict=True))
        if len(group) == 2:
            named.append(("tokens", half_and_half(*plain), half_and_half(*cached)))
        for name, without, with_cache in named:
            saved = without - with_cache
            pays = f"{math.floor(once / saved) + 1}" if saved > 0 else "never"
            cells = (f"{1 / without:.2f}", f"{1 / with_cache:.2f}", f"{1000 * once:.0f}", f"{1000 * saved:.0f}", pays)
            lines.append((name, *cells, f"{size / speech / 1000:.1f}"))
    head = ("row", "clips/s", "clips/s, cached", "to encode, ms a clip", "saved, ms a clip", "pays in epoch", "kB a second")
    table(head, lines)


def group_of(operator: str) -> str:
    name = operator.removeprefix("aten::").lstrip("_")
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "the rest")


def profile(bench: Bench) -> None:
    """Where a step's time goes, by groups of operators; under "between" is Python, autograd and waiting."""
    from torch.profiler import ProfilerActivity

    on_gpu = bench.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for row in bench.rows(OURS):
        batches = batches_of([row], bench.args.sweep_clips, bench.args.batch_size)
        batch = row.batch(batches[len(batches) // 2])
        row.forward_backward(batch)
        synchronize(bench.device)
        start = time.perf_counter()
        row.forward_backward(batch)
        synchronize(bench.device)
        bare = time.perf_counter() - start
        with torch.profiler.profile(activities=activities) as profiler:
            start = time.perf_counter()
            row.forward_backward(batch)
            synchronize(bench.device)
            whole = time.perf_counter() - start
        spent, calls = Counter(), Counter()
        for event in profiler.key_averages():
            if event.key.startswith("aten::"):
                own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                spent[group_of(event.key)] += own / 1e6
                calls[group_of(event.key)] += event.count
        spent["between"] = max(whole - sum(spent.values()), 0.0)
        total = sum(spent.values())
        lines = [(g, calls[g] or "", f"{1000 * s:.0f}", f"{100 * s / total:.0f} %") for g, s in spent.most_common()]
        table((f"{row.name} ({1000 * bare:.0f} ms unprofiled)", "calls", "ms", "share"), lines)


PARTS = {"ratio": ratio, "lengths": clip_lengths, "batch_sizes": batch_sizes, "cache": cache}


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    models = ROOT / "demo/models"
    on_gpu = torch.cuda.is_available()
    has_bf16 = on_gpu or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--profile", action="store_true", help="also print where a step's time goes")
    parser.add_argument("--llm", default=str(models / "SmolLM2-135M-Instruct"), help="with --llm_shape: its tokenizer")
    parser.add_argument("--llm_shape", choices=list(SHAPES), help="random weights of this shape instead of --llm's")
    parser.add_argument("--whisper", default=str(models / "whisper-tiny.en.pt"), help="a name or .pt file of openai-whisper")
    parser.add_argument("--data_path", type=Path, default=ROOT / "demo/data/train.jsonl")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if has_bf16 else "float32")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--clips", type=int, default=96, help="in each repetition of (b)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--random_batches", action="store_true", help="clips of any length in a batch, in the part ratio")
    parser.add_argument("--sweep_clips", type=int, default=32, help="in each point of the parts batch_sizes and cache")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--lengths", type=float, nargs="+", default=[1.25, 2.5, 5, 10, 20], help="of clips, in seconds")
    parser.add_argument("--share_prompt", choices=["auto", "True", "False"], default="auto", help="see SpeechLLM")
    parser.add_argument(
        "--processor_time", action="store_true", help="on a busy machine, with --threads 1, instead of the clock's"
    )
    parser.add_argument("--threads", type=int, help="of the processor")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{device_name(args.device)}; {args.dtype}; LLM {args.llm_shape or Path(args.llm).name}")
    with one_line_errors():
        bench = Bench(args, args.data_path)
        for part in args.parts:
            PARTS[part](bench)
        if args.profile:
            profile(bench)


if __name__ == "__main__":
    main()
