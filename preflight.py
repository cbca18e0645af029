"""What is known of the data before the first step: what is there, what was dropped, and what will go wrong."""

from collections import Counter

import numpy as np
from whisper.audio import SAMPLE_RATE

from audio import speech_vectors
from dataset import SpeechDataset
from limits import frames_needed
from prompt import Prompt, answer_ids

SAMPLE = 5_000  # texts that are tokenized, evenly spaced
SHOWN = 20  # characters


def preflight(train_set: SpeechDataset, eval_set: SpeechDataset | None) -> None:
    for line in describe(train_set):
        print(line)
    for line in [*describe(eval_set), *overlap(train_set, eval_set)] if eval_set else ["no evaluation set"]:
        print(line)


def describe(dataset: SpeechDataset) -> list[str]:
    """Lines about the clips of a set, the first of them its summary."""
    seconds = dataset.lengths / SAMPLE_RATE
    clips = f"clips of {seconds.min():.1f} to {seconds.max():.1f} s, on average {seconds.mean():.1f} s"
    return [f"{dataset.manifest}: {dataset.summary()}", f"  {clips}", *_rates(dataset), *_alphabet(dataset)]


def _rates(dataset: SpeechDataset) -> list[str]:
    """How many tokens there are, beside how many vectors the projector makes."""
    some = range(0, len(dataset), -(-len(dataset) // SAMPLE))
    samples = dataset.lengths[some]
    vectors, seconds = speech_vectors(samples, dataset.settings), samples / SAMPLE_RATE
    examples = [dataset.prompt.example(dataset.record(i).txt) for i in some]
    tokens = np.array([len(example["input_ids"]) for example in examples]) - len(dataset.prompt.ids) - 1
    rate = vectors.sum() / seconds.sum()
    lines = [
        f"  tokens a second of speech: {tokens.sum() / seconds.sum():.1f}, at most {(tokens / seconds).max():.1f}; "
        f"vectors of the projector: {rate:.1f}{_of(len(some), len(dataset), 'clips')}"
    ]
    if dataset.prompt.spelling:
        needed = np.array([frames_needed(example) for example in examples])
        share = needed / vectors
        mean = needed.sum() / vectors.sum()
        lines.append(f"  the CTC needs {mean:.0%} of the projector's vectors, in the fastest clip {share.max():.0%}")
        if np.quantile(share, 0.95) > 0.8:
            lines.append("  that is tight: a smaller --projector_stride gives the CTC more vectors")
    return lines


def _alphabet(dataset: SpeechDataset) -> list[str]:
    """Characters, of dropped clips too, that the CTC or the tokenizer has no tokens for."""
    texts, total = Counter(), len(dataset.manifest)
    for text in dataset.manifest.some_texts(SAMPLE):
        texts.update(set(text))
    lacking = [(count, letter) for letter, count in texts.items() if not letter.isspace() and _lacks(dataset.prompt, letter)]
    if not lacking:
        return []
    whose = "CTC" if dataset.prompt.spelling else "tokenizer"
    shown = ", ".join(f"{letter!r} in {count}" for count, letter in sorted(lacking, reverse=True)[:SHOWN])
    more = f" and {len(lacking) - SHOWN} more" if len(lacking) > SHOWN else ""
    looked = len(dataset.manifest.spread(SAMPLE))
    return [f"  characters that the {whose} has no tokens for: {shown} texts{more}{_of(looked, total, 'texts')}"]


def _lacks(prompt: Prompt, letter: str) -> bool:
    ids = answer_ids(prompt.tokenizer, letter, spoken=False)
    if prompt.spelling:
        return not prompt.spelling.whole(ids)
    return prompt.tokenizer.unk_token_id in ids


def _of(looked: int, total: int, what: str) -> str:
    return f" (in {looked} of {total} {what}, evenly spaced)" if looked < total else ""


def overlap(train_set: SpeechDataset, eval_set: SpeechDataset) -> list[str]:
    """How many of the evaluation's texts stand in the training set too, by one pass over its manifest."""
    plain = lambda text: " ".join(text.lower().split())  # noqa: E731
    heard = Counter(hash(plain(text)) for text in eval_set.manifest.texts())
    seen = {key for text in train_set.manifest.texts() if (key := hash(plain(text))) in heard}
    both, total = sum(heard[key] for key in seen), heard.total()
    line = f"  {both} of its {total} texts stand in the training set too"
    return [line + (": the evaluation will look better than it is" if both > 0.1 * total else "")]
