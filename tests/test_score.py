"""Scoring: counts like sclite's, joins by key, normalisation by name, plain hallucinations, errors in one line."""

import json
import random
import re
import subprocess
from pathlib import Path

import jiwer
import pytest
from conftest import run_script

from manifest import read_manifest
from score import Counts, ScoreError, align, hallucination, normalizer, read_texts, report, score

SCLITE = Path("/usr/lib/sctk/bin/sclite")
RECORDED = Path(__file__).parent / "sclite_counts.json"  # what sclite printed for EDGES (sctk 2.4.10)

EDGES = [
    ("", "", "both empty"),
    ("a b c", "", "empty hypothesis"),
    ("", "a b", "empty reference"),
    ("word", "word", "one word"),
    ("word", "other", "one wrong word"),
    ("a b", "b c", "sclite deletes and inserts where Levenshtein substitutes twice"),
    ("a b c d e f g", "h i j a k l m", "costs that matter"),
    ("tab\tseparated words", "tab separated\twords", "tabs"),
    ("ideographic\u3000space", "ideographic space", "ideographic space"),
    ("今天 天气 很 好", "今天 天 很 好 吗", "Chinese words"),
    ("今 天 天 气 很 好", "今 天 天 汽 好", "Chinese characters"),
    ("hello, world.", "hello world", "punctuation kept by none"),
    ("the cat sat on the mat", "the cat sat sat on mat the", "repeats"),
]


def counts(reference: str, hypothesis: str) -> list[int]:
    c = Counts.of(align(reference.split(), hypothesis.split()))
    return [c.hits, c.substitutions, c.deletions, c.insertions]


def sclite(pairs: list[tuple[str, str]], folder: Path) -> list[list[int]]:
    for name, column in (("ref", 0), ("hyp", 1)):
        lines = [f"{' '.join(pair[column].split())} (spk-{i:05d})\n" for i, pair in enumerate(pairs)]
        (folder / f"{name}.trn").write_text("".join(lines), encoding="utf-8")
    command = [SCLITE, "-e", "utf-8", "-r", "ref.trn", "trn", "-h", "hyp.trn", "trn", "-i", "rm", "-o", "pra", "stdout"]
    out = subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout.decode("utf-8", "replace")
    found = re.findall(r"id: \(spk-(\d+)\)\s.*?Scores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)", out, re.DOTALL)
    assert len(found) == len(pairs)
    return [[int(n) for n in numbers] for _, *numbers in sorted(found)]


def test_edge_cases_count_as_sclite_recorded_them():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert [counts(reference, hypothesis) for reference, hypothesis, _ in EDGES] == recorded


@pytest.mark.skipif(not SCLITE.exists(), reason="sclite (Debian package sctk) is not installed: recorded counts are used")
def test_edge_cases_and_3000_random_pairs_count_as_sclite_does(tmp_path):
    assert sclite([edge[:2] for edge in EDGES], tmp_path) == json.loads(RECORDED.read_text(encoding="utf-8"))
    rng = random.Random(5)

    def sentence() -> list[str]:
        return [rng.choice("abcde"[: rng.choice((2, 3, 5))]) for _ in range(rng.randint(0, 14))]

    pairs = []
    for _ in range(3000):
        reference = sentence()
        damaged = [w for w in reference if rng.random() > 0.2]
        pairs.append((" ".join(reference), " ".join(rng.choice((sentence(), damaged)))))
    assert [counts(*pair) for pair in pairs] == sclite(pairs, tmp_path)


def test_totals_agree_with_jiwer_where_both_minimise_the_same():
    """Few errors: the weighted path has the fewest edits too."""
    rng = random.Random(6)
    references = [" ".join(rng.choice("abcdefgh") for _ in range(12)) for _ in range(200)]
    hypotheses = [" ".join(w if rng.random() > 0.1 else rng.choice("xyz") for w in r.split()) for r in references]
    ours = sum((Counts.of(align(r.split(), h.split())) for r, h in zip(references, hypotheses, strict=True)), Counts())
    assert ours.rate == pytest.approx(jiwer.wer(references, hypotheses))


def test_alignment_pairs_spell_both_texts():
    pairs = align(["the", "cat", "sat"], ["a", "cat", "sat", "down"])
    assert pairs == [("the", "a"), ("cat", "cat"), ("sat", "sat"), (None, "down")]


def test_missing_hypotheses_are_deletions_and_said():
    result = score({"a": "one two", "b": "three"}, {"b": "three"})
    assert (result.words.deletions, result.words.reference_length, result.missing) == (2, 3, ["a"])
    assert "missing hypotheses, counted as deletions: 1 (a)" in report(result, "basic")


def test_unknown_keys_are_an_error():
    with pytest.raises(ScoreError, match="1 keys are not in the reference, the first is 'x'"):
        score({"a": "one"}, {"a": "one", "x": "two"})


def test_empty_references_add_insertions_and_no_rate_is_invented():
    result = score({"a": "", "b": "one two"}, {"a": "noise", "b": "one two"})
    assert (result.words.insertions, result.words.rate) == (1, 0.5)
    alone = score({"a": ""}, {"a": "noise"})
    assert alone.words.rate is None
    assert "WER: n/a (no reference)" in report(alone, "basic")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none", "Hello,  World!", "Hello, World!"),
        ("basic", "“Hello”,  don’t  'quote' – WORLD!", "hello don't quote world"),
        ("basic", "ＦＵＬＬ\u3000width ①", "full width 1"),
        ("basic", "नमस्ते दुनिया।", "नमस्ते दुनिया"),  # vowel signs are marks, not symbols
        ("english", "Mr. Smith doesn't pay twenty-five dollars, uh, colour", "mister smith does not pay $25 color"),
        ("chinese", "今天，GPT-4 很好。", "今 天 gpt 4 很 好"),
    ],
)
def test_normalizers(name, text, expected):
    assert " ".join(normalizer(name)(text).split()) == expected


def test_cer_leaves_spaces_out_as_sclite_does():
    result = score({"a": "ab cd"}, {"a": "abcd"})
    assert result.characters.errors == 0
    assert result.characters.reference_length == 4


@pytest.mark.parametrize(
    ("reference", "hypothesis", "kind"),
    [
        ("press one", "I'm sorry, but I can't transcribe audio.", "refusal"),
        ("press one", "As an AI language model, I have no ears", "refusal"),
        ("打开灯", "抱歉，我无法听取音频", "refusal"),
        ("i'm sorry that is not a valid extension", "I'm sorry, that is not a valid extension", ""),
        ("i cannot hear you", "I cannot hear you", ""),
        ("thank you", "thank you thank you thank you thank you", "loop"),
        ("好的", "好的好的好的好的", "loop"),
        ("a", "one two three four five " * 4, "loop"),
        ("no no no no", "no no no no", ""),
        ("one one one one one", "one one one one", ""),
        ("a", "one two three four five one two three four five one two three", ""),
    ],
)
def test_plain_hallucinations(reference, hypothesis, kind):
    assert hallucination(reference, hypothesis) == kind


def test_wer_with_and_without_hallucinations():
    result = score({"a": "one two", "b": "three four"}, {"a": "sorry, I can't help", "b": "three for"})
    assert result.words.errors == 5
    assert (result.faithful.errors, result.faithful.reference_length) == (1, 2)
    assert "left out: 1 refusals, 0 loops" in report(result, "basic")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("r.txt", b"a one\na two\n", r"r.txt:2: key 'a' was seen before"),
        ("r.txt", b"a caf\xe9\n", r"r.txt:1: byte 6 is not UTF-8"),
        ("r.jsonl", b'{"key": "a", "txt": "x"}\n{"key"', r"r.jsonl:2: not a JSON object"),
        ("r.jsonl", b'{"key": "a"}\n', r'r.jsonl:1: needs the fields "key"'),
        ("r.jsonl", b"[]\n", r"r.jsonl:1: not a JSON object"),
    ],
)
def test_bad_files_name_line_and_remedy(tmp_path, name, data, message):
    with pytest.raises(ScoreError, match=message):
        read_texts(write(tmp_path / name, data))
    with pytest.raises(ScoreError, match="cannot read"):
        read_texts(tmp_path / "missing.txt")


def test_parts_of_a_file_have_the_manifest_s_keys(tmp_path):
    lines = [b'{"wav": "a.wav", "txt": "one", "start": 1.5, "end": 3.25}', b'{"wav": "a.wav", "txt": "two", "start": 4}']
    path = write(tmp_path / "m.jsonl", b"\n".join(lines))
    assert list(read_texts(path)) == [record.key for record in read_manifest(path)] == ["a.wav-1500-3250", "a.wav-4000-end"]


def test_command_line(tmp_path):
    reference = b'\xef\xbb\xbf{"key": "a", "txt": "One, two."}\n\n{"wav": "b.wav", "txt": "three"}\n'
    ref = write(tmp_path / "t.jsonl", reference)
    hyp = write(tmp_path / "r.txt", b"a one too\nb.wav \n")
    done = run_script("python", "score.py", "--ref", ref, "--hyp", hyp, "--per_utterance")
    assert done.returncode == 0, done.stderr
    assert "normalizer: basic; 2 utterances" in done.stdout
    assert "WER: 66.67 % (S 1, D 1, I 0; 3 reference words)" in done.stdout
    assert "a: 50.00 %, 1 errors\n  REF: one TWO\n  HYP: one TOO" in done.stdout
    assert done.stdout.index("b.wav: 100.00 %") < done.stdout.index("a: 50.00 %")  # worst first
    bad = run_script("python", "score.py", "--ref", ref, "--hyp", write(tmp_path / "x.txt", b"zz one\n"))
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: 1 keys are not in the reference")
    assert bad.stderr.count("\n") == 1
