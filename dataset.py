"""A jsonl line → token ids, labels, log-mel; a list of them → a batch.

Each line of a manifest is a JSON object:

    {"wav": "clips/0001.flac", "txt": "hello world", "key": "0001"}

`wav` may be relative to the manifest's own folder; `key` defaults to `wav`; `duration` in seconds, where given, spares
reading the file's header. Raises InputError, naming file and line, for whatever cannot be used.
"""

import json
import math
import os
import re
import shutil
import subprocess
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
import whisper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from whisper.audio import N_FFT, N_SAMPLES, SAMPLE_RATE

from model import IGNORE_INDEX, REMEDY, SPEECH_INDEX, InputError, cannot_load, speech_lengths

BLOCK = 4096  # frames read at a time from a corrupt file
GRID = 64  # encoder frames: on a CPU every new shape costs memory that is kept (oneDNN's kernels), so there are few
UNKNOWN_FRAMES = 1 << 48  # libsndfile's answer for a FLAC written to a pipe is 2 ** 63 - 1
OPEN_ENDED_BYTES = (1 << 31) - (1 << 16)  # a wav written to a pipe says 2 ** 32 - 1 or thereabouts
SLOT = "{speech}"
DEFAULT_PROMPT = {
    "frames": f"Speech: {SLOT}\nWrite down the words that were spoken.",
    "tokens": f"Here are the words:{SLOT}\nWrite down the exact words that were spoken above.",
}


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


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a file with something in it."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'is a directory' if os.path.isdir(path) else 'no such file'}")
    if not path.stat().st_size:
        raise InputError(f"{path}: is empty (0 bytes)")


def truncation(libsndfile_log: str) -> str:
    """What libsndfile's log says of a header that promises more than there is; a streamed wav's open-ended size is fine."""
    promised = re.search(r"data : (\d+) \(should be", libsndfile_log)
    truncated = promised and int(promised[1]) < OPEN_ENDED_BYTES
    return "truncated: its header promises more than the file holds" if truncated else ""


def load_audio(path: str | Path) -> tuple[np.ndarray, str]:
    """Read any audio file as float32 mono at 16 kHz (samples,), and what is wrong with it ("" if nothing).

    A truncated or corrupt file yields what stands before the damage. wav, flac, ogg, opus and mp3 are read by
    libsndfile, the rest by the `ffmpeg` program where it is installed. Raises InputError when nothing can be read, or
    when samples are NaN or infinite.
    """
    path = Path(path)
    check_file(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, problem = file.samplerate, truncation(file.extra_info)
            if file.frames < UNKNOWN_FRAMES:
                try:
                    audio = file.read(dtype="float32", always_2d=True).mean(1)
                except soundfile.LibsndfileError as error:
                    audio = _in_blocks(path)
                    problem = f"corrupt after {len(audio) / rate:.2f} s ({error.error_string})"
            else:
                audio = _in_blocks(path)
    except soundfile.LibsndfileError as error:
        rate, (audio, problem) = SAMPLE_RATE, _ffmpeg(path, error.error_string)
    if problem and not len(audio):
        raise InputError(f"{path}: {problem}")
    if not np.isfinite(audio).all():
        raise InputError(f"{path}: has NaN or infinite samples")
    if rate != SAMPLE_RATE:
        audio = soxr.resample(audio, rate, SAMPLE_RATE)
    return audio, problem


def _in_blocks(path: Path) -> np.ndarray:
    """A file whose length is unknown, or that is corrupt: soundfile seeks between blocks, which would garble mp3."""
    blocks, done, size = [np.zeros(0, np.float32)], 0, BLOCK
    while size:
        with soundfile.SoundFile(path) as file, suppress(soundfile.LibsndfileError):
            file.seek(done)
            while len(block := file.read(size, dtype="float32", always_2d=True).mean(1)):
                blocks.append(block)
                done += len(block)
        size //= 2  # the end or the damage lies within the next block: come closer
    return np.concatenate(blocks)


def _ffmpeg(path: Path, why: str) -> tuple[np.ndarray, str]:
    if not shutil.which("ffmpeg"):
        raise InputError(f"{path}: not audio that libsndfile reads ({why}); the ffmpeg program, not installed, reads more")
    command = ["ffmpeg", "-v", "error", "-nostdin", "-protocol_whitelist", "file,pipe", "-i", f"file:{path.resolve()}"]
    command += ["-vn", "-f", "f32le", "-ac", "1", "-ar", str(SAMPLE_RATE), "-"]
    done = subprocess.run(command, capture_output=True)
    if not done.stdout:
        raise InputError(f"{path}: not audio that libsndfile or ffmpeg reads ({why})")
    complaint = done.stderr.decode("utf-8", "replace").strip().splitlines() if done.returncode else []
    return np.frombuffer(done.stdout, np.float32).copy(), f"corrupt ({complaint[0]})" if complaint else ""


def count_samples(path: Path) -> int:
    """Samples at 16 kHz by the file's header alone where it says; raises InputError for a file that is not whole."""
    try:
        with soundfile.SoundFile(path) as file:
            frames, rate, problem = file.frames, file.samplerate, truncation(file.extra_info)
        if frames < UNKNOWN_FRAMES and not problem:
            return math.ceil(frames * SAMPLE_RATE / rate)
    except soundfile.LibsndfileError:
        pass
    audio, problem = load_audio(path)
    if problem:
        raise InputError(f"{path}: {problem}: mend the file or remove the line")
    return len(audio)


def speech_vectors(samples: int, settings: dict) -> int:
    """How many projector vectors `samples` at 16 kHz yield under a checkpoint's settings; 0 when they are too few."""
    if samples <= N_FFT // 2:  # the spectrogram reflects half a window at each end
        return 0
    padded = N_SAMPLES if settings["encoder_padding"] == "30s" else samples
    return speech_lengths(padded, settings["projector_stride"]).speech


def log_mel(audio: np.ndarray, n_mels: int, encoder_padding: str = "none") -> Tensor:
    """audio (samples,) at 16 kHz → Whisper's log-mel (n_mels, frames), of this clip alone."""
    if encoder_padding == "30s":
        audio = whisper.pad_or_trim(audio)
    return whisper.log_mel_spectrogram(torch.from_numpy(np.ascontiguousarray(audio, np.float32)), n_mels)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise cannot_load("tokenizer of the LLM", "--llm_model_name_or_path", name, error) from None


@dataclass(frozen=True)
class PromptText:
    """The rendered prompt, as the checkpoint keeps it: text before and after the speech, and the end-of-turn token."""

    before: str
    after: str
    end_of_turn: str


class Spelling:
    """The LLM's tokens in those of the CTC, which are some of the LLM's: any other is split into the two that it was
    merged from, and those in turn, down to single bytes. So few CTC tokens, all well trained, spell every word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> None:
        """tokens: ids of the LLM; the place in the list is the CTC's class."""
        self.tokenizer = tokenizer
        self.tokens, self.classes = list(tokens), {id: i for i, id in enumerate(tokens)}
        self.parents = {merged: pair for merged, *pair in merges(tokenizer)}
        self.known: dict[int, list[int]] = {}

    @classmethod
    def choose(cls, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], most_merges: int) -> "Spelling":
        """The tokens that spell `texts` with the tokenizer's first `most_merges` merges, and all smaller parts of them."""
        rules, ids = merges(tokenizer), set(tokenizer.get_vocab().values())
        early = {merged for merged, *_ in rules[:most_merges]}
        atoms = ids - {merged for merged, *_ in rules}
        by_merges, by_atoms = cls(tokenizer, sorted(atoms | early)), cls(tokenizer, sorted(atoms))
        used = {by_merges.tokens[c] for text in texts for c in by_merges(answer_ids(tokenizer, text, spoken=True))}
        used |= {by_atoms.tokens[c] for id in used for c in by_atoms.of_token(id)}
        return cls(tokenizer, sorted(used))

    def of_token(self, id: int) -> list[int]:
        """Classes of one token of the LLM; [] for what the CTC cannot spell."""
        if id not in self.known:
            if id in self.classes:
                self.known[id] = [self.classes[id]]
            else:
                self.known[id] = [c for part in self.parents.get(id, ()) for c in self.of_token(part)]
        return self.known[id]

    def __call__(self, ids: Sequence[int]) -> list[int]:
        return [c for id in ids for c in self.of_token(id)]

    def whole(self, ids: Sequence[int]) -> bool:
        """Whether the CTC can spell these tokens without leaving out a character."""
        name = self.tokenizer.convert_ids_to_tokens
        return all("".join(name([self.tokens[c] for c in self.of_token(id)])) == name(id) for id in ids)

    def table(self, vocabulary: int, longest: int = 16) -> Tensor:
        """(vocabulary, longest): the classes of every token of the LLM, padded with −1; −1 only where they are more (rows
        of dashes) or do not spell the whole token (an umlaut, after English)."""
        table = torch.full((vocabulary, longest), -1)
        for id in range(vocabulary):
            spelled = self.of_token(id)
            if len(spelled) <= longest and self.whole([id]):
                table[id, : len(spelled)] = torch.tensor(spelled, dtype=torch.long)
        return table


def merges(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int, int]]:
    """(merged, left, right) ids of a BPE tokenizer's merges, first learned first. Raises InputError for another kind."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise InputError(f"--splice tokens needs an LLM with a BPE tokenizer, {tokenizer.name_or_path} has {model['type']}")
    ids, rules, seen = model["vocab"], [], set()
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        merged = ids.get(left + right)
        if merged is not None and merged not in seen:  # the first rule that makes a token is how it is split
            seen.add(merged)
            rules.append((merged, ids[left], ids[right]))
    return rules


def answer_ids(tokenizer: PreTrainedTokenizerBase, txt: str, spoken: bool) -> list[int]:
    """Ids of a transcript; a special token written in it stays text. `spoken`: as within a text, after a space, so that
    the first word has the token it has anywhere (what a CTC hears has no beginning of a turn)."""
    if spoken:
        txt = f" {txt.strip()}" if txt.strip() else ""
    return tokenizer(txt, add_special_tokens=False, split_special_tokens=True).input_ids


class Prompt:
    """Grows ids and labels together: prompt (not supervised), answer and end-of-turn token (supervised).

    `word_ids` are the LLM's ids of the prompt's words, `ids` what goes into a batch: those ids, or the rows of a soft
    prompt (SPEECH_INDEX − 1 − row), around the speech marker. `spelling` is None unless the splice is by CTC.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: PromptText, settings: dict) -> None:
        self.tokenizer, self.text = tokenizer, text
        before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (text.before, text.after))
        self.word_ids = [*before, *after]
        words = [SPEECH_INDEX - 1 - row for row in range(len(self.word_ids))] if settings["soft_prompt"] else self.word_ids
        self.ids = [*words[: len(before)], SPEECH_INDEX, *words[len(before) :]]
        self.end_of_turn: int = tokenizer.convert_tokens_to_ids(text.end_of_turn)
        self.spelling = Spelling(tokenizer, settings["ctc_tokens"]) if settings["splice"] == "tokens" else None

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, words: str | None, settings: dict) -> "Prompt":
        """The prompt of `settings` (a checkpoint's), else that of `words`; what was built is put into `settings`.

        Raises InputError when `words` were given and the checkpoint was trained with others.
        """
        stored = settings.get("prompt")
        text = (
            render(tokenizer, words or DEFAULT_PROMPT[settings["splice"]]) if words or not stored else PromptText(**stored)
        )
        if stored and asdict(text) != stored:
            raise InputError(f"--prompt is not what the checkpoint was trained with: {REMEDY}")
        settings["prompt"] = asdict(text)
        return cls(tokenizer, text, settings)

    def example(self, txt: str) -> dict[str, list[int]]:
        """input_ids and labels of one training example, equally long; with a CTC also ctc_labels, its classes."""
        answer = answer_ids(self.tokenizer, txt, spoken=self.spelling is not None)
        supervised = [*answer, self.end_of_turn]
        ids = {"input_ids": self.ids + supervised, "labels": [IGNORE_INDEX] * len(self.ids) + supervised}
        return ids | ({"ctc_labels": self.spelling(answer)} if self.spelling else {})


def render(tokenizer: PreTrainedTokenizerBase, words: str) -> PromptText:
    """The user's `words` in the tokenizer's own chat template, split at {speech}.

    A tokenizer without a template gets `USER: … \\nASSISTANT:` between its beginning- and end-of-text tokens.
    Raises InputError unless `words` hold {speech} exactly once.
    """
    if words.count(SLOT) != 1:
        raise InputError(f"--prompt must hold {SLOT} exactly once, where the speech stands: {words!r}")
    user = [{"role": "user", "content": words}]
    if tokenizer.chat_template:
        options = {"tokenize": False, "enable_thinking": False}  # the latter for Qwen3, ignored by others
        prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, **options)
        turn = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": "{answer}"}], **options)
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        rest = tokenizer(turn.partition("{answer}")[2], add_special_tokens=False).input_ids
        end = next((id for id in rest if id in special), tokenizer.eos_token_id)
    else:
        prompt, end = f"{tokenizer.bos_token or ''}USER: {words}\nASSISTANT:", tokenizer.eos_token_id
    if end is None:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-turn or end-of-text token")
    before, _, after = prompt.partition(SLOT)
    return PromptText(before, after, tokenizer.convert_ids_to_tokens(end))


@dataclass(frozen=True)
class Augmentation:
    """What training does to a clip, anew in each epoch."""

    speed: bool = False  # 0.9, 1 or 1.1 times as fast (Ko et al. 2015), where it lasts 1 to 30 s
    noise_snr: float | None = None  # white noise, so many dB below the speech
    spectrum: bool = False  # SpecAugment (Park et al. 2019): two bands of at most 27 of 80 bins, two spans of 5 %;
    # where the encoder has run before, spans of its output instead

    def waveform(self, audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """audio (samples,) → (about as many samples,), at most 30 s."""
        factor = rng.choice([0.9, 1.0, 1.1]) if self.speed else 1.0
        if factor != 1 and SAMPLE_RATE < len(audio) / factor < N_SAMPLES:
            audio = soxr.resample(audio, SAMPLE_RATE * factor, SAMPLE_RATE)
        if self.noise_snr is not None:
            loudness = np.sqrt(np.mean(np.square(audio)) / 10 ** (self.noise_snr / 10))
            audio = audio + loudness * rng.standard_normal(len(audio), dtype=np.float32)
        return audio

    def log_mel(self, mel: Tensor, rng: np.random.Generator) -> Tensor:
        """mel (n_mels, F) → the same with bands and spans at its mean."""
        mel, mean = mel.clone(), mel.mean()
        for masked, widest in ((mel, 27 * len(mel) // 80), (mel.T, mel.shape[1] // 20)):
            for width in rng.integers(widest + 1, size=2) if self.spectrum else ():
                start = rng.integers(len(masked) - width + 1)
                masked[start : start + width] = mean
        return mel

    def encoded(self, encoded: Tensor, rng: np.random.Generator) -> Tensor:
        """The encoder's output (E, d) → the same with spans of at most 0.3 s at zero, one in two seconds."""
        encoded = encoded.clone()
        for width in rng.integers(15 + 1, size=len(encoded) // 100 + 1) if self.spectrum else ():
            start = rng.integers(max(len(encoded) - width, 0) + 1)
            encoded[start : start + width] = 0
        return encoded


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
        augmentation: Augmentation = Augmentation(),
        seed: int = 0,
        texts: Sequence[str] = (),
        text_share: float = 0.5,
    ) -> None:
        """`texts` are read without speech: drawn anew in each epoch, they are `text_share` of the examples."""
        self.manifest, self.prompt, self.settings, self.max_length = manifest, prompt, settings, max_length
        self.texts, self.texts_per_clip = texts, text_share / (1 - text_share) if texts else 0.0
        self.augmentation, self.seed, self.epoch = augmentation, seed, 0
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
        self.epoch = epoch

    def encode_once(self, encoder: torch.nn.Module, folder: Path, rank: int = 0, ranks: int = 1) -> None:
        """Write the frozen encoder's output of this process's share of the clips under `folder`, unless it is there.

        float16 (E, d), one file a clip, named by the content of its audio. `encoder` maps mel (1, n_mels, F) and
        mel_length (1,) to (1, E, d).
        """
        self.cache = [folder / f"{sha256(self.manifest[i].wav.read_bytes()).hexdigest()[:32]}.npy" for i in self.kept]
        todo = [i for i in range(rank, len(self), ranks) if not self.cache[i].exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for i in tqdm(todo, desc="encoding", unit="clip", disable=None):
            mel = self._log_mel(i)
            encoded = encoder(mel[None], torch.tensor([mel.shape[-1]]))[0]  # (E, d)
            partial = self.cache[i].with_suffix(f".{os.getpid()}")
            with partial.open("wb") as file:
                np.save(file, encoded.to("cpu", torch.float16).numpy())
            os.replace(partial, self.cache[i])

    def __getitem__(self, index: int) -> dict[str, Any]:
        example: dict[str, Any] = tensors(self.prompt.example(self.manifest[self.kept[index]].txt))
        rng = np.random.default_rng([self.seed, self.epoch, index])
        if self.texts:
            draw = np.random.default_rng([self.seed, self.epoch, index, 1])
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
