"""Why a clip is left out of a training: one rule, and a way to apply it to a million clips in seconds.

Most texts need not be tokenized to know that they fit: a byte-level tokenizer never makes more tokens of a text than it
has bytes. Of the others the words are counted, each word tokenized once; what is still in doubt is tokenized.
"""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice, pairwise

import numpy as np
from tqdm import tqdm
from transformers.convert_slow_tokenizer import bytes_to_unicode
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from audio import speech_vectors
from prompt import Prompt, answer_ids
from settings import IGNORE_INDEX

CHUNK = 4096  # texts looked at together
MOST_WORDS = 300_000  # remembered
NEEDED, UNSPELLED = 1 << 24, 1 << 52  # places of a word's numbers in one integer


class Limits:
    """What an example may be, under a prompt, a checkpoint's settings and the flags."""

    def __init__(
        self, prompt: Prompt, settings: dict, max_length: int, shortest: float | None = None, longest: float | None = None
    ) -> None:
        """max_length in tokens; shortest, longest in seconds."""
        self.prompt, self.settings, self.max_length = prompt, settings, max_length
        self.shortest, self.longest = shortest, longest

    def unusable(self, samples: int, txt: str) -> str:
        """Why a clip of `samples` at 16 kHz with this transcript is left out ("" if it is not)."""
        reason = self.wrong_length(samples)
        if reason:
            return reason
        vectors, example = speech_vectors(samples, self.settings), self.prompt.example(txt)
        crowded = "with more text than its speech has room for"
        return self.unreadable(example, vectors) or (crowded if frames_needed(example) > vectors else "")

    def wrong_length(self, samples: int) -> str:
        if samples > N_SAMPLES:
            return "longer than 30 s"
        if not speech_vectors(samples, self.settings):
            return "shorter than one projector window"
        return ""

    def unwanted(self, samples: int) -> str:
        """Why the flags leave out a clip that could be used (by its stated length: a sample more is no mistake)."""
        if self.shortest is not None and samples < self.shortest * SAMPLE_RATE:
            return "shorter than --min_duration_in_seconds"
        if self.longest is not None and samples > self.longest * SAMPLE_RATE:
            return "longer than --max_duration_in_seconds"
        return ""

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

    def sort_out(self, samples: np.ndarray, texts: Iterator[str]) -> tuple[np.ndarray, Counter]:
        """The indices of the clips to keep, and how many are dropped by reason; samples (clips,), a text each."""
        bounds, kept, dropped = Bounds(self), np.zeros(len(samples), bool), Counter()
        for start in tqdm(range(0, len(samples), CHUNK), desc="what fits", delay=5, disable=None):
            some, chunk = samples[start : start + CHUNK], list(islice(texts, CHUNK))
            certain = bounds.certain(some, chunk)
            for i in np.flatnonzero(~certain):
                reason = self.wrong_length(int(some[i])) or self.unwanted(int(some[i]))
                if not reason and not bounds.by_words(int(some[i]), chunk[i]):
                    reason = self.unusable(int(some[i]), chunk[i])
                certain[i] = not reason
                dropped.update([reason] if reason else [])
            kept[start : start + CHUNK] = certain
        return np.flatnonzero(kept), dropped


def frames_needed(example: dict[str, list[int]]) -> int:
    """The fewest frames in which a CTC can say this text: a blank parts equal neighbours. 0 without a CTC."""
    spoken = example.get("ctc_labels", [])
    return len(spoken) + sum(a == b for a, b in pairwise(spoken))


class Bounds:
    """Texts that certainly fit, without tokenizing them. Exact in this: what is certain here is usable by the rule."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.prompt = limits, limits.prompt
        self.normal, self.usable = None, False
        if backend := getattr(self.prompt.tokenizer, "backend_tokenizer", None):
            parts = json.loads(backend.to_str())
            steps = parts["pre_tokenizer"] or {}
            steps = [step["type"] for step in steps.get("pretokenizers", [steps]) if step]
            self.normal = (parts["normalizer"] or {"type": None})["type"]
            self.usable = parts["model"]["type"] == "BPE" and "ByteLevel" in steps and self.normal in (None, "NFC")
        self.words = WordCosts(self.prompt) if self.usable and _parts_at_spaces(self.prompt) else None
        self.fixed = len(self.prompt.ids)  # prompt, marker aside, and end of turn
        self.strange = np.zeros(256, bool)  # bytes that the CTC cannot spell
        if self.usable and self.prompt.spelling:
            self.strange = _strange_bytes(self.prompt)

    def certain(self, samples: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """(texts,) bool."""
        limits = self.limits
        if not self.usable:
            return np.zeros(len(texts), bool)
        joined = "".join(texts)
        data = np.frombuffer(joined.encode("utf-8"), np.uint8)
        plain = joined.isascii()
        size = np.array([len(text) if plain else len(text.encode("utf-8")) for text in texts], np.int64)
        end = np.cumsum(size)
        per_text = lambda flags: np.diff(np.cumsum(flags, dtype=np.int64)[end - 1] * (end > 0), prepend=0)  # noqa: E731
        vectors = speech_vectors(samples, limits.settings)
        good = (vectors > 0) & (samples <= N_SAMPLES)
        good &= samples >= (limits.shortest or 0) * SAMPLE_RATE
        good &= samples <= SAMPLE_RATE * (N_SAMPLES if limits.longest is None else limits.longest)
        size = size + 1  # at most so many tokens, with the space in front
        if self.prompt.spelling and len(data):
            repeats = per_text(np.append(data[1:] == data[:-1], False)) + 1  # none is missed: see WordCosts
            good &= (size + repeats <= vectors) & (per_text(self.strange[data]) == 0)
            vectors = size
        good &= self.fixed + vectors + size <= limits.max_length
        if self.normal and not plain:  # a text that changes under NFC may grow
            good &= np.array([unicodedata.is_normalized("NFC", text) for text in texts])
        return good

    def by_words(self, samples: int, txt: str) -> bool:
        if self.words is None or (self.normal and not unicodedata.is_normalized("NFC", txt)):
            return False
        spoken = self.prompt.spelling is not None  # then `tokens` are the LLM's and the CTC's
        first, *words = txt.strip().split(" ") if spoken else txt.split(" ")
        cost = self.words[first] if spoken else len(first.encode("utf-8"))  # it has no space in front
        unspelled, rest = divmod(cost + sum(map(self.words.__getitem__, words)), UNSPELLED)
        needed, tokens = divmod(rest, NEEDED)
        vectors = speech_vectors(samples, self.limits.settings)
        long = self.fixed + tokens + (0 if spoken else vectors) > self.limits.max_length
        return not (unspelled or long or needed > vectors)


class WordCosts(dict):
    """Of a word after a space, in one integer: its tokens (with a CTC those of both), NEEDED × the CTC's frames that it
    needs, and UNSPELLED if some are not in the CTC's alphabet.

    Over the words of a text the numbers are never too small: a class that stands on both sides of a space holds the whole
    word after it, and a word of one class counts as repeated. (Over bytes alike: of two equal classes of l bytes, l ≥ 2,
    the second needs one blank, and its bytes are counted as l frames.)
    """

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.backend, self.spelling = prompt.tokenizer.backend_tokenizer, prompt.spelling
        self.backend.encode_special_tokens = True  # a special token in a transcript is text
        self.whole = cache(lambda id: self.spelling.whole([id]))

    def __missing__(self, word: str) -> int:
        ids = self.backend.encode(f" {word}", add_special_tokens=False).ids
        cost = len(ids)
        if self.spelling:
            classes = self.spelling(ids)
            needed = frames_needed({"ctc_labels": classes}) + (len(classes) == 1)
            cost += len(classes) + NEEDED * needed + (0 if all(map(self.whole, ids)) else UNSPELLED)
        if not word.isprintable():  # line breaks and the like are split by their neighbours: tokenize the whole text
            cost += UNSPELLED
        if len(self) < MOST_WORDS:
            self[word] = cost
        return cost


def _parts_at_spaces(prompt: Prompt) -> bool:
    """Whether the tokenizer parts a text before every space, so that its words can be tokenized one by one."""
    probe = "a b 12 .c 'd \u5b57 \u00e9 e  f"
    tokens = lambda text: answer_ids(prompt.tokenizer, text, spoken=True)  # noqa: E731
    after_space = lambda word: answer_ids(prompt.tokenizer, f" {word}", spoken=False)  # noqa: E731
    return tokens(probe) == [id for word in probe.split(" ") for id in after_space(word)]


def _strange_bytes(prompt: Prompt) -> np.ndarray:
    """(256,) bool: a text with none of these bytes has only tokens that the CTC can spell."""
    spelling, tokenizer = prompt.spelling, prompt.tokenizer
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    strange, vocabulary = np.zeros(256, bool), tokenizer.get_vocab()
    strange[[byte for letter, byte in byte_of.items() if letter not in vocabulary]] = True
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    for token, id in vocabulary.items():
        if id not in spelling.classes and id not in spelling.parents and token not in special:
            # a letter, or an added token, of which the first letter puts a text in doubt
            strange[[byte_of.get(token[0], 0), token.encode()[0] if len(token) > 1 else 0]] = True
    return strange
