"""What is dropped: the fast way over a whole manifest gives what the rule says of each clip, tokenizing few texts."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from conftest import DATA, build_system, write_clip, write_manifest

import dataset
import limits
from dataset import SpeechDataset
from limits import Bounds, Limits
from manifest import read_manifest
from prompt import Prompt, Spelling, load_tokenizer
from settings import InputError, ModelArguments, resolve_settings

WORDS = sorted({word for line in (DATA / "train.jsonl").open() for word in json.loads(line)["txt"].split()})
ODD = [
    "",
    " ",
    "the the the",
    "aaaaaaaa",
    "a  b",
    " a\tb ",
    "tab\n two",
    "<|im_end|>",
    "<tool_call>x",
    "é",
    "e\u0301",
    "字字字 字",
    "12 .c",
]


def clips(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Samples of 0 to 33 s, and texts of all kinds that often are about as long as they may be."""
    rng, texts, samples = random.Random(seed), [], []
    for i in range(count):
        words = [rng.choice(ODD if rng.random() < 0.02 * (i % 3) else WORDS) for _ in range(rng.randint(0, 110))]
        texts.append(" ".join(words))
        samples.append(int(16000 * rng.uniform(0, 33) * rng.choice([0.02, 1, 1, 1])))
    return np.array(samples + [16000 * 20] * len(ODD)), texts + ODD


def check(limits_: Limits, count: int) -> float:
    """Compares with the rule; the share of clips that the bounds are sure of, of those that are kept."""
    samples, texts = clips(count, seed=1)
    reasons = [
        limits_.wrong_length(int(n)) or limits_.unwanted(int(n)) or limits_.unusable(int(n), t)
        for n, t in zip(samples, texts, strict=True)
    ]
    kept, dropped = limits_.sort_out(samples, iter(texts))
    assert kept.tolist() == [i for i, reason in enumerate(reasons) if not reason]
    assert dropped == Counter(filter(None, reasons))
    bounds = Bounds(limits_)
    sure = bounds.certain(samples, texts) | [bounds.by_words(int(n), t) for n, t in zip(samples, texts, strict=True)]
    return sure[kept].mean()


@pytest.mark.parametrize("splice", ["tokens", "frames"])
@pytest.mark.parametrize("length", [160, 400])
def test_bounds_agree_with_the_rule_for_a_real_tokenizer(real, splice, length):
    """Many texts are near a limit: every kind of drop occurs, and most that stay are known to without tokenizing them."""
    llm = str(real.llm)
    args = ModelArguments(llm_model_name_or_path=llm, whisper_model_name_or_path="x", splice=splice)
    settings, tokenizer = resolve_settings(args, None), load_tokenizer(llm)
    if splice == "tokens":
        settings["ctc_tokens"] = Spelling.choose(tokenizer, WORDS, 500).tokens
    prompt = Prompt.build(tokenizer, None, settings)
    assert check(Limits(prompt, settings, length, shortest=0.3, longest=28), 400) > 0.85


@pytest.mark.parametrize("splice", ["tokens", "frames"])
def test_bounds_agree_with_the_rule_for_bytes_as_tokens(tiny, splice):
    """One token a byte, and a pre-tokenizer that parts nothing: words are no help, the bound by bytes is exact."""
    system = build_system(tiny.qwen2, tiny.whisper, splice=splice)
    check(Limits(system.prompt, system.settings, 500), 300)


def test_min_and_max_duration_drop_and_count(tiny, tmp_path):
    qwen = build_system(tiny.qwen2, tiny.whisper)
    manifest = read_manifest(tiny.manifest)
    clips = SpeechDataset(manifest, qwen.prompt, qwen.settings, 512, shortest=1.0, longest=2.0)
    assert [manifest[i].key for i in clips.kept] == ["clip0", "clip1", "clip4"]
    assert "dropped 1 longer than --max_duration_in_seconds; dropped 1 shorter than --min_dur" in clips.summary()


def test_of_a_large_manifest_with_durations_some_files_are_looked_for_and_the_rest_when_read(tiny, tmp_path, monkeypatch):
    """A million stats on a network disk take an hour; a folder that is wrong is found at once, one lost file when read."""
    monkeypatch.setattr(dataset, "CHECKED", 3)
    qwen = build_system(tiny.qwen2, tiny.whisper)
    write_clip(tmp_path / "a.wav", 1.0)
    items = [{"key": str(i), "wav": "a.wav", "txt": "a", "duration": 1.0} for i in range(6)]
    items[1]["wav"] = "lost.wav"
    clips = SpeechDataset(read_manifest(write_manifest(tmp_path / "m.jsonl", items)), qwen.prompt, qwen.settings, 512)
    with pytest.raises(InputError, match=r"m.jsonl:2: .*lost.wav: no such file"):
        clips[1]
    items[2]["wav"] = "lost.wav"
    with pytest.raises(InputError, match=r"m.jsonl:3: .*lost.wav: no such file"):
        SpeechDataset(read_manifest(write_manifest(tmp_path / "m.jsonl", items)), qwen.prompt, qwen.settings, 512)


def test_a_word_with_a_special_token_in_it_is_text(tiny):
    """encode() of the tokenizers library takes <|im_end|> for one token: the bound would be too small."""
    system = build_system(tiny.qwen2, tiny.whisper)
    assert limits.WordCosts(system.prompt)["<|im_end|>"] == len(" <|im_end|>")
