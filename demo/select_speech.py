"""Keep the clips of a manifest that Whisper itself can hear: what its encoder did not catch no projector can learn.

    python demo/select_speech.py --data_path all.jsonl --out clear.jsonl [--cache_dir …]

A clip is kept if Whisper's own decoder, each time told the words so far, would have written --at_least this share of the
tokens next. `--cache_dir`, as train.py has it, keeps what the encoder made of each clip, so that it runs once for both.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import whisper
from tqdm import tqdm
from whisper.tokenizer import Tokenizer, get_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio import load_audio, log_mel
from dataset import EncoderCache, read_manifest
from model import SpeechEncoder, fingerprint
from settings import InputError, one_line_errors


class Listener:
    """Whisper, and where the outputs of its encoder are kept."""

    def __init__(self, name: str, cache_dir: str) -> None:
        self.encoder = SpeechEncoder.from_pretrained(name, torch.float32)
        model = whisper.load_model(name, device="cpu").float()
        self.decoder = model.decoder
        self.tokenizer: Tokenizer = get_tokenizer(model.is_multilingual, num_languages=model.num_languages)
        settings = {"encoder": {"fingerprint": fingerprint(self.encoder)}, "encoder_padding": "none"}
        self.cache = EncoderCache(cache_dir, settings)

    @torch.inference_mode()
    def hears(self, wav: Path, txt: str) -> float:
        """The share of the tokens of ` txt`, but the first, that the decoder finds the likeliest; 1 without any."""
        file = self.cache.file(wav)
        if not file.exists():
            self.cache.write(file, self.encoder, log_mel(load_audio(wav)[0], self.encoder.n_mels))
        encoded = torch.from_numpy(np.load(file)).float()[None]  # (1, E, d)
        start = [*self.tokenizer.sot_sequence, self.tokenizer.no_timestamps]
        words = torch.tensor(self.tokenizer.encode(f" {txt}"))  # (T,); which style of writing is asked for, the first tells
        ids = torch.cat([torch.tensor(start), words])[None, : self.decoder.positional_embedding.shape[0]]
        likeliest = self.decoder(ids[:, :-1], encoded).argmax(-1)[0, len(start) :]  # (T - 1,)
        right = likeliest == ids[0, len(start) + 1 :]
        return float(right.float().mean()) if len(right) else 1.0


def listen(name: str, cache_dir: str) -> None:
    """Make a process of the pool ready: one Listener, one thread."""
    global listener
    torch.set_num_threads(1)
    listener = Listener(name, cache_dir)


def share(wav: Path, txt: str) -> float:
    return listener.hears(wav, txt)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="manifest (jsonl)")
    parser.add_argument("--out", type=Path, required=True, help="manifest of what is kept, in the folder of --data_path")
    parser.add_argument("--at_least", type=float, default=0.75, help="share of the tokens")
    parser.add_argument("--whisper_model_name_or_path", default="demo/models/whisper-tiny.en.pt")
    parser.add_argument("--cache_dir")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    with one_line_errors(), TemporaryDirectory() as folder:
        manifest = read_manifest(args.data_path)
        if args.out.resolve().parent != manifest.path.resolve().parent:
            raise InputError(f"{args.out}: paths in a manifest may be relative to it: write it beside {args.data_path}")
        lines = manifest.path.read_text(encoding="utf-8-sig").split("\n")
        begin = (args.whisper_model_name_or_path, args.cache_dir or folder)
        with ProcessPoolExecutor(args.workers, initializer=listen, initargs=begin) as pool:
            clips = [(record.wav, record.txt) for record in manifest]
            shares = list(tqdm(pool.map(share, *zip(*clips, strict=True), chunksize=8), total=len(clips), disable=None))
        kept = [line for line, heard in zip(manifest.lines, shares, strict=True) if heard >= args.at_least]
        partial = args.out.with_suffix(".partial")
        partial.write_text("".join(json.dumps(json.loads(lines[i - 1])) + "\n" for i in kept), encoding="utf-8")
        os.replace(partial, args.out)
    print(f"{args.out}: {len(kept)} of {len(shares)} clips, {np.mean(shares):.1%} of the tokens heard")


if __name__ == "__main__":
    main()
