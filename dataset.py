"""A manifest's record → token ids, labels, log-mel; a list of them → a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from whisper.audio import SAMPLE_RATE

from audio import UNCHANGED, Augmentation, check_file, count_samples, load_audio, log_mel
from cache import EncoderCache
from limits import Limits
from manifest import Manifest, Record
from prompt import Prompt
from settings import IGNORE_INDEX, InputError

GRID = 64  # encoder frames: on a CPU every new shape costs memory that is kept (oneDNN's kernels), so there are few
CHECKED = 10_000  # files of stated duration that are looked for before the first step


class SpeechDataset(torch.utils.data.Dataset):
    """Training examples of a manifest: input_ids (T,), labels (T,), mel (n_mels, F) or encoded (E, d).

    Measures every clip up front, so that what is dropped is dropped before batches are formed, alike on every process;
    `dropped` counts them by reason. Raises InputError for a file that cannot be read.
    """

    def __init__(
        self,
        manifest: Manifest,
        prompt: Prompt,
        settings: dict,
        max_length: int,
        augmentation: Augmentation = UNCHANGED,
        seed: int = 0,
        texts: Sequence[str] = (),
        text_share: float = 0.5,
        shortest: float | None = None,
        longest: float | None = None,
    ) -> None:
        """`texts` are read without speech: drawn anew in each epoch, they are `text_share` of the examples. Clips that
        are not between `shortest` and `longest`, in seconds, are dropped."""
        self.manifest, self.prompt, self.settings = manifest, prompt, settings
        self.limits = Limits(prompt, settings, max_length, shortest, longest)
        self.texts, self.texts_per_clip = texts, text_share / (1 - text_share) if texts else 0.0
        self.augmentation, self.seed = augmentation, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # a data worker that persists must hear of it
        self.cache: EncoderCache | None = None
        self.digests = np.zeros((0, 0), np.uint8)  # of each kept clip, its name in the cache
        samples = measure(manifest)
        self.kept, self.dropped = self.limits.sort_out(samples, manifest.texts())
        self.lengths = samples[self.kept]  # at 16 kHz
        if not len(self.kept):
            raise InputError(f"{manifest}: no clip is left to train on: {self.summary()}")

    def summary(self) -> str:
        dropped = "; ".join(f"dropped {count} {reason}" for reason, count in sorted(self.dropped.items()))
        hours = self.lengths.sum() / SAMPLE_RATE / 3600
        return f"{len(self.kept)} clips, {hours:.2f} h" + (f"; {dropped}" if dropped else "")

    def __len__(self) -> int:
        return len(self.kept)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def record(self, index: int) -> Record:
        return self.manifest[self.kept[index]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: dict[str, Any] = tensors(self.prompt.example(self.record(index).txt))
        rng = np.random.default_rng([self.seed, int(self.epoch), index])
        if self.texts:
            draw = np.random.default_rng([self.seed, int(self.epoch), index, 1])
            example["texts"] = [self._text(draw) for _ in range(int(self.texts_per_clip + draw.random()))]
        if self.cache:
            encoded = self.cache.read(self.digests[index].tobytes())
            return example | {"encoded": self.augmentation.encoded(encoded, rng)}
        return example | {"mel": self.log_mel(index, rng)}

    def _text(self, draw: np.random.Generator) -> dict[str, Tensor]:
        for _ in range(1000):
            example = self.prompt.example(self.texts[draw.integers(len(self.texts))])
            if not self.limits.unreadable(example, 0):
                return tensors(example)
        raise InputError(
            "of 1000 lines of --text_data_path none can be used: each is longer than --model_max_length, or has characters "
            "that the CTC has no tokens for"
        )

    def log_mel(self, index: int, rng: np.random.Generator | None = None) -> Tensor:
        """(n_mels, F); augmented if `rng` is given."""
        record = self.record(index)
        try:
            audio, problem = load_audio(*record.part)
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from None
        problem = problem or self.limits.unusable(len(audio), record.txt)
        if problem:
            raise InputError(
                f"{record.where}: {record.wav}: {problem}: mend the file (or the line's times), or remove the line"
            )
        if rng:
            audio = self.augmentation.waveform(audio, rng)
        mel = log_mel(audio, self.settings["encoder"]["n_mels"], self.settings["encoder_padding"])
        return self.augmentation.log_mel(mel, rng) if rng else mel


def measure(manifest: Manifest) -> np.ndarray:
    """(clips,) samples at 16 kHz: by the stated duration, else by the file's header. Raises InputError for what cannot be
    read; of more than CHECKED files with a duration only so many are looked for, and the rest when they are needed."""
    samples = np.rint(np.frombuffer(manifest.durations, np.float64) * SAMPLE_RATE)
    todo = {*manifest.spread(CHECKED), *np.flatnonzero(np.isnan(samples)).tolist()}
    for index in tqdm(sorted(todo), desc=f"measuring {manifest}", unit="clip", delay=5, disable=None):
        record = manifest[index]
        try:
            check_file(record.wav)
            if record.duration is None:
                samples[index] = count_samples(record.wav, record.start)
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from None
    return np.minimum(samples, 1 << 40).astype(np.int64)


def tensors(example: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor(row, dtype=torch.long) for name, row in example.items()}


@dataclass
class SpeechCollator:
    """Examples → one right-padded batch: input_ids, labels, attention_mask (B + R, T); mel_length (B,) in mel frames;
    and mel (B, n_mels, F) or, where the encoder has run before, encoded (B, E, d). The last R rows have no speech.

    Masks come from lengths: the padding value is never looked for.
    """

    def __call__(self, examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        def pad(rows: list[Tensor], value: float) -> Tensor:
            return pad_sequence(rows, batch_first=True, padding_value=value)

        rows = examples + [text for e in examples for text in e.get("texts", ())]
        ids = [row["input_ids"] for row in rows]
        batch = {"input_ids": pad(ids, 0), "attention_mask": pad([torch.ones_like(row) for row in ids], 0)}
        for name in examples[0].keys() & {"labels", "ctc_labels"}:
            batch[name] = pad([row[name] for row in rows], IGNORE_INDEX)
        if "encoded" in examples[0]:
            encoded = pad([e["encoded"] for e in examples], 0.0)  # (B, E, d)
            batch["encoded"] = F.pad(encoded, (0, 0, 0, -encoded.shape[1] % GRID))
            return batch | {"mel_length": torch.tensor([2 * len(e["encoded"]) for e in examples])}
        batch["mel"] = pad([e["mel"].T for e in examples], 0.0).transpose(1, 2)  # (B, n_mels, F)
        return batch | {"mel_length": torch.tensor([e["mel"].shape[-1] for e in examples])}
