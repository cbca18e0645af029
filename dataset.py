"""A jsonl line → token ids, labels, log-mel; a list of them → a batch.

Each line of a manifest is a JSON object:

    {"wav": "clips/0001.flac", "txt": "hello world", "key": "0001"}

`wav` may be relative to the manifest's own folder; `key` defaults to `wav`; `duration` in seconds, where given, spares
reading the file's header. Raises InputError, naming file and line, for whatever cannot be used.
"""

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from audio import UNCHANGED, Augmentation, check_file, count_samples, load_audio, log_mel, speech_vectors
from prompt import Prompt
from settings import IGNORE_INDEX, InputError

GRID = 64  # encoder frames: on a CPU every new shape costs memory that is kept (oneDNN's kernels), so there are few

Encoder = Callable[[Tensor, Tensor], Tensor]  # mel (1, n_mels, F), mel_length (1,) → (1, E, d)


class Record(NamedTuple):
    key: str
    wav: Path
    txt: str | None
    duration: float | None
    where: str  # "manifest:line", for messages


class Manifest(Sequence):
    """The records of a jsonl file, held as byte offsets: a line is parsed when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offsets, self.lines = array("q"), array("q")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> Record:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            record = parse_line(file.readline(), self.path, self.lines[index])
        beside = self.path.parent / record.wav
        return record._replace(wav=beside) if os.path.exists(beside) else record  # False also for a name too long


def parse_line(line: bytes, path: Path, number: int) -> Record:
    """One manifest line as a Record; raises InputError naming `path:number`."""
    where = f"{path}:{number}"
    try:
        item = json.loads(line.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON at column {error.colno} ({error.msg})") from None
    if not isinstance(item, dict):
        raise InputError(f'{where}: expected an object like {{"wav": …, "txt": …}}, found {type(item).__name__}')
    wav = item.get("wav")
    if not isinstance(wav, str) or not wav:
        raise InputError(f'{where}: field "wav" is missing or not a text: it names the audio file')
    key, txt, duration = item.get("key", wav), item.get("txt"), item.get("duration")
    if not isinstance(key, str) or not key or key.split() != [key]:
        raise InputError(f'{where}: key {key!r} must be a text without spaces: give the line a "key"')
    if txt is not None and not isinstance(txt, str):
        raise InputError(f'{where}: field "txt" is not a text')
    if duration is not None and not (isinstance(duration, int | float) and math.isfinite(duration) and duration >= 0):
        raise InputError(f'{where}: field "duration" is not a number of seconds')
    return Record(key, Path(wav), txt, duration, where)


def read_manifest(path: str | Path, need_txt: bool = True) -> Manifest:
    """Check a jsonl file in one pass and return its records; blank lines and a BOM are skipped.

    Raises InputError at the first line that is not a usable record: bad JSON, a missing field (`txt` if `need_txt`), not
    UTF-8, a key seen before.
    """
    manifest, first_line = Manifest(Path(path)), {}
    try:
        with manifest.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                bom = len(b"\xef\xbb\xbf") if number == 1 and line.startswith(b"\xef\xbb\xbf") else 0
                if line[bom:].strip():
                    record = parse_line(line[bom:], manifest.path, number)
                    if need_txt and record.txt is None:
                        raise InputError(f'{record.where}: field "txt" is missing: it holds the transcript')
                    earlier = first_line.setdefault(hash(record.key), number)
                    if earlier != number:
                        raise InputError(
                            f"{record.where}: key {record.key!r} was seen before, on line {earlier}: "
                            'give each line its own "key"'
                        )
                    manifest.offsets.append(offset + bom)
                    manifest.lines.append(number)
                offset += len(line)
    except OSError as error:
        raise InputError(f"{path}: cannot read the manifest ({error.strerror})") from None
    if not len(manifest):
        raise InputError(f"{path}: no line in it")
    return manifest


class TextLines(Sequence):
    """The lines of a text file that are not blank, held as byte offsets."""

    def __init__(self, path: str | Path) -> None:
        """Raises InputError for a file that cannot be read, is not UTF-8, or has no line."""
        self.path, self.offsets, offset = Path(path), array("q"), 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    try:
                        self.offsets.extend([offset] if line.decode("utf-8-sig").strip() else [])
                    except UnicodeDecodeError as error:
                        where = f"{path}:{number}: byte {error.start + 1}"
                        raise InputError(f"{where} is not UTF-8: save the file as UTF-8") from None
                    offset += len(line)
        except OSError as error:
            raise InputError(f"{path}: cannot read the texts ({error.strerror})") from None
        if not self.offsets:
            raise InputError(f"{path}: no line in it")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: int) -> str:
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return file.readline().decode("utf-8-sig").strip()


class EncoderCache:
    """Outputs of a frozen encoder, float16 (E, d): one file a clip, named by the content of its audio."""

    def __init__(self, folder: str | Path, settings: dict) -> None:
        """A folder within `folder` for this encoder, the layers that it has left, and this padding."""
        parts = settings["encoder"]["fingerprint"], settings["projector_layers"], settings["encoder_padding"]
        self.folder = Path(folder, "-".join(map(str, parts)))
        self.folder.mkdir(parents=True, exist_ok=True)

    def file(self, wav: Path) -> Path:
        return self.folder / f"{sha256(wav.read_bytes()).hexdigest()[:32]}.npy"

    def write(self, file: Path, encoder: Encoder, mel: Tensor) -> None:
        """mel (n_mels, F)."""
        encoded = encoder(mel[None], torch.tensor([mel.shape[-1]]))[0]  # (E, d)
        partial = file.with_suffix(f".{os.getpid()}")
        with partial.open("wb") as stream:
            np.save(stream, encoded.to("cpu", torch.float16).numpy())
        os.replace(partial, file)


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
    ) -> None:
        """`texts` are read without speech: drawn anew in each epoch, they are `text_share` of the examples."""
        self.manifest, self.prompt, self.settings, self.max_length = manifest, prompt, settings, max_length
        self.texts, self.texts_per_clip = texts, text_share / (1 - text_share) if texts else 0.0
        self.augmentation, self.seed = augmentation, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # a data worker that persists must hear of it
        self.cache: list[Path] = []  # of each kept clip, the encoder's output
        self.kept, self.lengths, self.dropped = array("q"), array("l"), Counter()  # lengths in samples
        for index, record in enumerate(manifest):
            samples = self._measure(record)
            reason = self.unusable(samples, record.txt)
            self.dropped.update([reason] if reason else [])
            if not reason:
                self.kept.append(index)
                self.lengths.append(samples)
        if not self.kept:
            raise InputError(f"{manifest.path}: no clip is left to train on: {self.summary()}")

    def _measure(self, record: Record) -> int:
        try:
            check_file(record.wav)
            return round(record.duration * SAMPLE_RATE) if record.duration is not None else count_samples(record.wav)
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from None

    def unusable(self, samples: int, txt: str) -> str:
        """Why a clip of `samples` at 16 kHz with this transcript is left out ("" if it is not)."""
        vectors = speech_vectors(samples, self.settings)
        if samples > N_SAMPLES:
            return "longer than 30 s"
        if not vectors:
            return "shorter than one projector window"
        example = self.prompt.example(txt)
        spoken = example.get("ctc_labels", [])
        needed = len(spoken) + sum(a == b for a, b in pairwise(spoken))  # a blank parts equal neighbours
        crowded = "with more text than its speech has room for" if spoken and needed > vectors else ""
        return self.unreadable(example, vectors) or crowded

    def unreadable(self, example: dict[str, list[int]], vectors: int) -> str:
        """Why the LLM cannot be given this example of so many projector vectors ("" if it can)."""
        spoken = example.get("ctc_labels")
        # the marker is one of the ids and makes room for the speech; of a CTC's frames the blanks are dropped
        if len(example["input_ids"]) - 1 + (vectors if spoken is None else len(spoken)) > self.max_length:
            return "longer than --model_max_length"
        answer = [id for id in example["labels"][:-1] if id != IGNORE_INDEX]
        if self.prompt.spelling and not self.prompt.spelling.whole(answer):
            return "with characters that the CTC has no tokens for"
        return ""

    def summary(self) -> str:
        dropped = "; ".join(f"dropped {count} {reason}" for reason, count in sorted(self.dropped.items()))
        hours = sum(self.lengths) / SAMPLE_RATE / 3600
        return f"{len(self.kept)} clips, {hours:.2f} h" + (f"; {dropped}" if dropped else "")

    def __len__(self) -> int:
        return len(self.kept)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def encode_once(self, encoder: Encoder, cache: EncoderCache, rank: int = 0, ranks: int = 1) -> None:
        """Put the frozen encoder's output of this process's share of the clips into `cache`, unless it is there."""
        self.cache = [cache.file(self.manifest[i].wav) for i in self.kept]
        todo = [i for i in range(rank, len(self), ranks) if not self.cache[i].exists()]
        for i in tqdm(todo, desc="encoding", unit="clip", disable=None):
            cache.write(self.cache[i], encoder, self._log_mel(i))

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: dict[str, Any] = tensors(self.prompt.example(self.manifest[self.kept[index]].txt))
        rng = np.random.default_rng([self.seed, int(self.epoch), index])
        if self.texts:
            draw = np.random.default_rng([self.seed, int(self.epoch), index, 1])
            example["texts"] = [self._text(draw) for _ in range(int(self.texts_per_clip + draw.random()))]
        if self.cache:
            return example | {"encoded": self.augmentation.encoded(torch.from_numpy(np.load(self.cache[index])), rng)}
        return example | {"mel": self._log_mel(index, rng)}

    def _text(self, draw: np.random.Generator) -> dict[str, Tensor]:
        for _ in range(1000):
            example = self.prompt.example(self.texts[draw.integers(len(self.texts))])
            if not self.unreadable(example, 0):
                return tensors(example)
        raise InputError(
            "of 1000 lines of --text_data_path none can be used: each is longer than --model_max_length, or has characters "
            "that the CTC has no tokens for"
        )

    def _log_mel(self, index: int, rng: np.random.Generator | None = None) -> Tensor:
        """Augmented if `rng` is given."""
        record = self.manifest[self.kept[index]]
        try:
            audio, problem = load_audio(record.wav)
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from None
        problem = problem or self.unusable(len(audio), record.txt)
        if problem:
            raise InputError(
                f'{record.where}: {record.wav}: {problem}: mend the file (or its "duration"), or remove the line'
            )
        if rng:
            audio = self.augmentation.waveform(audio, rng)
        mel = log_mel(audio, self.settings["encoder"]["n_mels"], self.settings["encoder_padding"])
        return self.augmentation.log_mel(mel, rng) if rng else mel


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
