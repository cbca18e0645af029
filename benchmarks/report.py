"""The whole project in one table: the checkpoint that comes along, Whisper tiny.en and PocketSphinx on the same clips.

    pip install pocketsphinx          # brings its US English model; without it that row is left out
    python benchmarks/report.py

WER and CER (Whisper's English normalizer) on the demo's test prompts, on the CPU, one system after the other in one run.
× real time: seconds of speech to seconds of decoding, models loaded and files read before. MB: the files that must be there
(Whisper's .pt has its text decoder in it, which hark does not use). Parameters: those that run, in millions.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import whisper
from whisper.audio import SAMPLE_RATE

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import load_audio
from inference import Merged
from manifest import read_manifest
from score import normalizer, score
from settings import ModelArguments, one_line_errors, weights_file
from transcriber import DecodeArguments, Transcriber, beams, use_shipped

ROOT = Path(__file__).resolve().parent.parent


class System(NamedTuple):
    name: str
    transcribe: Callable[[list[np.ndarray]], list[str]]  # clips, float32 (samples,) at 16 kHz → texts
    files: list[Path]
    parameters: int | None


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def hark(models: ModelArguments, args: argparse.Namespace, **options: object) -> System:
    """The checkpoint; clips of like lengths stand in a batch."""
    options = {"device": "cpu", "dtype": args.dtype, "batch_size": args.batch_size, "guard": "off"} | options
    transcriber = Transcriber.from_arguments(models, DecodeArguments(**options))

    def transcribe(clips: list[np.ndarray]) -> list[str]:
        return [found.text for found in transcriber(clips, SAMPLE_RATE)]

    llm, encoder = Path(models.llm_model_name_or_path), Path(models.whisper_model_name_or_path)
    files = [*llm.glob("*"), encoder, weights_file(models.checkpoint)]
    name = f"hark, {transcriber.decoder}" + (
        f", beam {beams(transcriber.decoder, transcriber.args)}" if transcriber.decoder != "ctc" else ""
    )
    language_model = transcriber.model.llm
    # with and without LoRA a layer is there twice
    unused = sum(parameters(module.plain) for module in language_model.modules() if isinstance(module, Merged))
    if language_model.config.tie_word_embeddings:  # packed, it is a copy of the embedding table
        unused += language_model.get_output_embeddings().weight.numel()
    if transcriber.decoder == "ctc":
        unused = parameters(language_model)
    return System(name, transcribe, files, parameters(transcriber.model) - unused)


def whisper_itself(path: Path) -> System:
    """One clip after the other, as its own command line does."""
    model = whisper.load_model(str(path), device="cpu")

    def transcribe(clips: list[np.ndarray]) -> list[str]:
        return [model.transcribe(clip, language="en", fp16=False, beam_size=5)["text"] for clip in clips]

    return System(f"{path.stem}, beam 5", transcribe, [path], parameters(model))


def sphinx() -> System:
    from pocketsphinx import Decoder, get_model_path

    decoder = Decoder()  # its US English model

    def transcribe(clips: list[np.ndarray]) -> list[str]:
        texts = []
        for clip in clips:
            decoder.start_utt()
            decoder.process_raw((clip.clip(-1, 1) * 32767).astype(np.int16).tobytes(), full_utt=True)
            decoder.end_utt()
            texts.append(decoder.hyp().hypstr if decoder.hyp() else "")
        return texts

    return System("PocketSphinx, en-us", transcribe, list(Path(get_model_path()).rglob("en-us*/**/*")), None)


def systems(args: argparse.Namespace) -> Iterator[System]:
    """One after the other, so that only one is in memory."""
    models = ModelArguments()
    use_shipped(models)
    models.checkpoint = args.checkpoint or models.checkpoint
    yield hark(models, args, decoder="ctc")
    yield hark(models, args)
    yield whisper_itself(Path(models.whisper_model_name_or_path))
    if importlib.util.find_spec("pocketsphinx"):
        yield sphinx()
    else:
        print("no row for PocketSphinx: pip install pocketsphinx", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="instead of the one that comes along")
    parser.add_argument("--data_path", type=Path, default=ROOT / "demo" / "data" / "test.jsonl")
    parser.add_argument("--clips", type=int, help="the first so many alone")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="of PyTorch; PocketSphinx has one")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    records = list(read_manifest(args.data_path))[: args.clips]
    clips = [load_audio(*record.part)[0] for record in records]
    references = {record.key: record.txt for record in records}
    seconds = sum(map(len, clips)) / SAMPLE_RATE
    print(f"{len(records)} clips, {seconds / 60:.1f} minutes; {torch.get_num_threads()} threads, {args.dtype}\n")
    print("| system | WER, % | CER, % | × real time | MB | parameters, M |\n|---|---|---|---|---|---|")
    for system in systems(args):
        start = time.monotonic()
        texts = system.transcribe(clips)
        speed = seconds / (time.monotonic() - start)
        result = score(references, dict(zip(references, texts, strict=True)), normalizer("english"))
        rates = " | ".join(f"{100 * counts.rate:.1f}" for counts in (result.words, result.characters))
        size = sum(file.stat().st_size for file in system.files if file.is_file()) / 1e6
        count = "–" if system.parameters is None else f"{system.parameters / 1e6:.0f}"
        print(f"| {system.name} | {rates} | {speed:.1f} | {size:.0f} | {count} |", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
