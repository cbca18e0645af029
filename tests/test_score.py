"""Scoring: counts like sclite's, joins by key, normalisation by name, plain hallucinations, errors in one line."""

import csv
import io
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from importlib.metadata import version
from itertools import product
from pathlib import Path

import jiwer
import numpy as np
import pytest
from conftest import DATA, ROOT, run_script

import align as alignment
import compare
from align import Counts, align, alignments, count
from manifest import read_manifest
from normalize import NORMALIZERS, mixed, normalizer, versioned
from score import main, report
from scoring import Score, Utterance, hallucination, score
from texts import ScoreError, read_texts

SCLITE = Path("/usr/lib/sctk/bin/sclite")
RECORDED = json.loads((Path(__file__).parent / "sclite_counts.json").read_text(encoding="utf-8"))  # by sctk 2.4.10

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
    ("打 开 wi-fi 好 吗", "打 wifi 好 嘛 吗", "Chinese and English mixed"),
    ("テ ス ト を 始 め ま す", "テ ス を 始 め ま す か", "Japanese characters"),
    ("a b c", "d e f", "three substitutions cost what four gaps cost"),
    ("x a b c y", "x c a b y", "a word that moved"),
    ("a a a a b", "a b", "which of the same words is missing"),
    ("thank you", "thank you " * 30, "a loop"),
]


def some_pairs(number: int) -> list[tuple[str, str]]:
    """Pairs over two to five words, many ties among their alignments; a generator of our own, alike in every Python."""
    state, pairs = 1, []

    def below(n: int) -> int:
        nonlocal state
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        return (state >> 12) % n

    for _ in range(number):
        words = "abcde"[: 2 + below(4)]
        ref, other = ([words[below(len(words))] for _ in range(below(15))] for _ in range(2))
        damaged = [word if below(5) else words[below(len(words))] for word in ref if below(5)]
        pairs.append((" ".join(ref), " ".join(damaged if below(3) else other)))
    return pairs


def counts(pairs: list[tuple[str, str]]) -> list[list[int]]:
    found = map(Counts.of, alignments((ref.split(), hyp.split()) for ref, hyp in pairs))
    return [[c.hits, c.substitutions, c.deletions, c.insertions] for c in found]


def sclite(pairs: list[tuple[str, str]], folder: Path) -> list[list[int]]:
    for name, column in (("ref", 0), ("hyp", 1)):
        lines = [f"{' '.join(pair[column].split())} (spk-{i:05d})\n" for i, pair in enumerate(pairs)]
        (folder / f"{name}.trn").write_text("".join(lines), encoding="utf-8")
    command = [SCLITE, "-e", "utf-8", "-r", "ref.trn", "trn", "-h", "hyp.trn", "trn", "-i", "rm", "-o", "pra", "stdout"]
    out = subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout.decode("utf-8", "replace")
    found = re.findall(r"id: \(spk-(\d+)\)\s.*?Scores: \(#C #S #D #I\) (\d+) (\d+) (\d+) (\d+)", out, re.DOTALL)
    assert len(found) == len(pairs)
    return [[int(n) for n in numbers] for _, *numbers in sorted(found)]


def test_edge_cases_and_400_pairs_count_as_sclite_recorded_them():
    assert counts([edge[:2] for edge in EDGES]) == RECORDED["edges"]
    assert counts(some_pairs(400)) == RECORDED["pairs"]


@pytest.mark.skipif(not SCLITE.exists(), reason="sclite (Debian package sctk) is not installed: recorded counts are used")
def test_edge_cases_and_3000_pairs_count_as_sclite_does(tmp_path):
    assert sclite([edge[:2] for edge in EDGES], tmp_path) == RECORDED["edges"]
    pairs = some_pairs(3000)
    found = sclite(pairs, tmp_path)
    assert found[:400] == RECORDED["pairs"]
    assert counts(pairs) == found


def test_batches_and_blocks_of_rows_change_no_alignment(monkeypatch):
    pairs = [(ref.split(), hyp.split()) for ref, hyp in some_pairs(300)]
    apart = [next(alignments([pair])) for pair in pairs]
    assert list(alignments(pairs)) == apart
    monkeypatch.setattr(alignment, "CELLS", 7)  # a row at a time, a pair at a time
    monkeypatch.setattr(alignment, "CHUNK", 10)
    assert list(alignments(pairs)) == apart


def test_an_hour_needs_no_memory_for_its_whole_table(monkeypatch):
    """Two texts of 3,000 characters once took two tables of 9 MB; an hour of speech would have taken 5 GB."""
    monkeypatch.setattr(alignment, "CELLS", 200_000)
    rng = random.Random(1)
    reference = "".join(rng.choices("etaoin shrdlu", k=3_000))
    hypothesis = "".join(c for c in reference if rng.random() > 0.1)
    tracemalloc.start()
    found = count(reference, hypothesis)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.deletions, found.errors) == (3_000 - len(hypothesis),) * 2
    assert peak < 2e6


def test_totals_agree_with_jiwer_where_both_minimise_the_same():
    """Few errors: the weighted path has the fewest edits too."""
    rng = random.Random(6)
    references = [" ".join(rng.choice("abcdefgh") for _ in range(12)) for _ in range(200)]
    hypotheses = [" ".join(w if rng.random() > 0.1 else rng.choice("xyz") for w in r.split()) for r in references]
    ours = sum((count(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True)), Counts())
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
        ("chinese", "ＧＰＴ－４ ｍｐ３ 10.0.0.1", "gpt 4 mp3 10 0 0 1"),  # names and addresses keep their digits
        ("chinese", "２０２３年１０月", "二 零 二 三 年 十 月"),
        (
            "chinese",
            "105人、10500 10050 1,234 20 212",
            "一 百 零 五 人 一 万 零 五 百 一 万 零 五 十 一 千 二 百 三 十 四 二 十 二 百 一 十 二",
        ),
        ("chinese", "3.5% 增长 0 007", "百 分 之 三 点 五 增 长 零 零 零 七"),
        ("chinese", "13812345678", "一 三 八 一 二 三 四 五 六 七 八"),
        ("chinese", "两百〇二 幺", "二 百 零 二 一"),
        ("chinese", "《你好》——“世界”！……", "你 好 世 界"),
        ("japanese", "ﾃｽﾄ、です。 ＡＢＣ １２", "テ ス ト で す abc 12"),
        ("japanese", "スーパー・マン～「佐々木」", "ス ー パ ー マ ン 佐 々 木"),
    ],
)
def test_normalizers(name, text, expected):
    assert " ".join(normalizer(name)(text).split()) == expected


# facts from tests/test_normalizer.py of openai/whisper (MIT): what its English normalizer makes of numbers and words
WHISPER_CASES = """
two = 2 | thirty one = 31 | five twenty four = 524 | nineteen ninety nine = 1999 | twenty nineteen = 2019
two point five million = 2500000 | four point two billions = 4200000000s | 200 thousand = 200000
200 thousand dollars = $200000 | $20 million = $20000000 | €52.4 million = €52400000 | £77 thousands = £77000s
two double o eight = 2008 | three thousand twenty nine = 3029 | forty three thousand two hundred sixty = 43260
forty three thousand two hundred and sixty = 43260 | nineteen fifties = 1950s | thirty first = 31st
thirty three thousand and three hundred and thirty third = 33333rd | three billion = 3000000000 | millions = 1000000s
july third twenty twenty = july 3rd 2020 | august twenty sixth twenty twenty one = august 26th 2021 | 3 14 = 3 14
3.14 = 3.14 | 3 point 2 = 3.2 | 3 point 14 = 3.14 | fourteen point 4 = 14.4 | two point two five dollars = $2.25
two hundred million dollars = $200000000 | $20.1 million = $20100000 | ninety percent = 90% | seventy six per cent = 76%
double oh seven = 007 | double zero seven = 007 | nine one one = 911 | nine double one = 911 | one triple oh one = 10001
two thousandth = 2000th | thirty two thousandth = 32000th | minus 500 = -500 | positive twenty thousand = +20000
two dollars and seventy cents = $2.70 | 3 cents = ¢3 | $0.36 = ¢36 | three euros and sixty five cents = €3.65
three and a half million = 3500000 | forty eight and a half dollars = $48.5 | b747 = b 747 | 10 th = 10th | 10th = 10th
mobilisation = mobilization | cancelation = cancellation | Let's = let us | he's like = he is like
she's been like = she has been like | 10km = 10 km | 10mm = 10 mm | RC232 = rc 232
Mr. Park visited Assoc. Prof. Kim Jr. = mister park visited associate professor kim junior
"""


def test_english_agrees_with_whisper_s_published_cases():
    cases = [case.split(" = ") for line in WHISPER_CASES.strip().splitlines() for case in line.split(" | ")]
    assert len(cases) == 60
    english = normalizer("english")
    assert {text: english(text) for text, _ in cases} == dict(cases)


def test_each_normalizer_has_a_version():
    assert versioned("english") == f"english@{version('openai-whisper')}"
    assert [versioned(name) for name in NORMALIZERS if name != "english"] == ["none@1", "basic@1", "chinese@2", "japanese@1"]


def test_mer_counts_characters_of_chinese_and_words_of_the_rest():
    """打|开|my|bluetooth → 打|开|my|blue|tooth: a substitution and an insertion of four; WER has one word wrong of two."""
    result = score({"a": "打开my bluetooth"}, {"a": "打开my blue tooth"})
    assert (result.mixed.substitutions, result.mixed.insertions, result.mixed.reference_length) == (1, 1, 4)
    assert result.words.reference_length == 2
    assert "MER: 50.00 % (S 1, D 0, I 1; 4 reference words and Chinese or Japanese characters)" in report(result, "basic")
    assert mixed("한국어 words").split() == ["한국어", "words"]  # Korean is written with spaces
    assert "MER" not in report(score({"a": "one"}, {"a": "two"}), "basic")


def test_japanese_cer_is_of_nfkc_without_spaces_and_punctuation():
    result = score({"a": "テストを、始めます。"}, {"a": "ﾃｽﾄ を 始めますか"}, normalizer("japanese"))
    assert (result.characters.errors, result.characters.insertions, result.characters.reference_length) == (1, 1, 8)
    assert result.words == result.characters


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
        ("r.jsonl", b"[" * 100_000, r"r.jsonl:1: not a JSON object"),
        ("r.jsonl", b'{"txt": "x", "end": 1}', r'r.jsonl:1: needs the fields "key"'),
        ("r.tsv", b"a\tone\n", r"r.tsv:1: a tsv needs a first line that names its columns, key and text among them"),
        ("r.tsv", b"key\ttext\na\n", r"r.tsv:2: 1 columns, 2 names of columns in the first line"),
    ],
)
def test_bad_files_name_line_and_remedy(tmp_path, name, data, message):
    with pytest.raises(ScoreError, match=message):
        read_texts(write(tmp_path / name, data))
    with pytest.raises(ScoreError, match="cannot read"):
        read_texts(tmp_path / "missing.txt")


def test_command_line(tmp_path):
    reference = b'\xef\xbb\xbf{"key": "a", "txt": "One, two."}\n\n{"wav": "b.wav", "txt": "three"}\n'
    ref = write(tmp_path / "t.jsonl", reference)
    hyp = write(tmp_path / "r.txt", b"a one too\nb.wav \n")
    done = run_script("python", "score.py", "--ref", ref, "--hyp", hyp, "--per_utterance")
    assert done.returncode == 0, done.stderr
    assert "normalizer: basic@1; 2 utterances" in done.stdout
    assert "WER: 66.67 % (S 1, D 1, I 0; 3 reference words)" in done.stdout
    assert "a: 50.00 %, 1 errors\n  REF: one TWO\n  HYP: one TOO" in done.stdout
    assert done.stdout.index("b.wav: 100.00 %") < done.stdout.index("a: 50.00 %")  # worst first
    wrong = write(tmp_path / "x.txt", b"zz one\n")
    bad = run_script("python", "score.py", "--ref", ref, "--hyp", wrong)
    assert bad.returncode == 1
    assert bad.stderr == f"error: {wrong}: 1 keys are not in the reference, the first is 'zz': is it the same set?\n"


def test_hypotheses_as_recognize_writes_them(tmp_path):
    """result.jsonl may hold the reference beside the text; in a manifest that has both, txt is the reference."""
    lines = [{"key": "a", "text": "heard", "txt": "said"}, {"wav": "b.wav", "text": "two"}]
    path = write(tmp_path / "r.jsonl", "\n".join(map(json.dumps, lines)).encode())
    assert read_texts(path, text_field="text") == {"a": "heard", "b.wav": "two"}
    assert read_texts(path)["a"] == "said"
    table = write(tmp_path / "r.tsv", b"key\tduration\ttext\na\t1.5\theard\nb.wav\t2\t\n")
    assert read_texts(table, text_field="text") == {"a": "heard", "b.wav": ""}


def test_a_part_of_a_file_has_the_manifest_s_key_and_duration(tmp_path):
    """The rule stood in two files once, and an end of 1e999 was a traceback, "start": "1" no JSON object."""
    lines = [b'{"wav": "a.wav", "txt": "one", "start": 1.5, "end": 3.25}', b'{"wav": "a.wav", "txt": "two", "start": 4}']
    path, fields = write(tmp_path / "m.jsonl", b"\n".join(lines)), {"duration": {}}
    keys = list(read_texts(path, fields))
    assert keys == [record.key for record in read_manifest(path)] == ["a.wav-1500-3250", "a.wav-4000-end"]
    assert fields == {"duration": {"a.wav-1500-3250": 1.75}}
    for times in (b'"end": 1e999', b'"start": "1"', b'"start": 2, "end": 1', b'"start": NaN'):
        write(path, b'{"wav": "a", "txt": "one", %s}' % times)
        with pytest.raises(ScoreError, match=r'm.jsonl:1: "start" and "end" must be numbers of seconds in the file'):
            read_texts(path)


# --- several systems, several sets


@pytest.fixture
def sets(tmp_path):
    """Two sets with speakers and durations, two systems' results of each: in old/ and new/."""
    rng, words = random.Random(2), ["press", "one", "for", "sales", "two", "for", "service", "or", "wait", "please"]
    for name, clips in (("test", 60), ("dev", 40)):
        lines = []
        for i in range(clips):
            text = " ".join(rng.choices(words, k=rng.randint(2, 8)))
            lines.append({"key": f"{name}{i}", "txt": text.title() + ".", "speaker": "AB|"[i % 3], "duration": i / 2})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for system, wrong in (("old", 0.3), ("new", 0.1)):
            (tmp_path / system).mkdir(exist_ok=True)
            heard = [" ".join(w for w in line["txt"].lower()[:-1].split() if rng.random() > wrong) for line in lines]
            result = "".join(f"{line['key']} {text}\n" for line, text in zip(lines, heard, strict=True))
            (tmp_path / system / f"{name}.txt").write_text(result)
    return tmp_path


def printed(capsys, *argv) -> str:
    capsys.readouterr()
    main([str(arg) for arg in argv])
    return capsys.readouterr().out


def both(folder: Path) -> list[str]:
    refs = [f"{name}={folder}/{name}.jsonl" for name in ("test", "dev")]
    hyps = [f"{system}={folder}/{system}/{name}.txt" for system, name in product(("old", "new"), ("test", "dev"))]
    return ["--ref", *refs, "--hyp", *hyps]


def test_systems_and_sets_are_one_table_as_scored_one_by_one(sets, capsys):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, *both(sets), "--format", "csv"))))
    assert [(row["set"], row["system"]) for row in rows] == list(product(("test", "dev"), ("old", "new")))
    for row in rows:
        texts = read_texts(sets / f"{row['set']}.jsonl"), read_texts(sets / row["system"] / f"{row['set']}.txt")
        alone, raw = score(*texts), score(*texts, normalizer("none"))
        assert float(row["WER"]) == pytest.approx(100 * alone.words.rate, abs=1e-4)
        assert float(row["CER"]) == pytest.approx(100 * alone.characters.rate, abs=1e-4)
        assert float(row["raw WER"]) == pytest.approx(100 * raw.words.rate, abs=1e-4)
        assert int(row["D"]) == alone.words.deletions > 0
        assert float(row["raw WER"]) > float(row["WER"])  # capitals, full stops
    assert json.loads(printed(capsys, *both(sets), "--format", "json"))["rows"][0]["WER"] == float(rows[0]["WER"])
    lines = printed(capsys, *both(sets)).splitlines()
    assert lines[0].startswith("| system | test WER | test CER | test raw WER | test raw CER | dev WER |")
    assert lines[2].startswith(f"| old | {float(rows[0]['WER']):.2f} | {float(rows[0]['CER']):.2f} |")
    assert "normalizer: basic@1" in lines


def test_a_table_by_a_field_adds_up_to_the_whole(sets, capsys):
    argv = ["--ref", sets / "test.jsonl", "--hyp", sets / "old/test.txt", "--format", "json", "--by"]
    for field, groups in (("speaker", ["A", "B", "|", "(all)"]), ("duration", [*compare.BUCKETS[:6], "(all)"])):
        rows = json.loads(printed(capsys, *argv, field))["rows"]
        assert [row[field] for row in rows] == groups
        for number in ("utterances", "S", "D", "I", "words"):
            assert sum(row[number] for row in rows[:-1]) == rows[-1][number]
    assert "| test | \\| |" in printed(capsys, *argv[:4], "--by", "speaker")  # a speaker's name ends no cell


def test_a_tsv_s_durations_are_numbers(sets, capsys):
    """They were texts, each a group of its own."""
    write(sets / "ref.tsv", b"key\tduration\ttext\na\t1.5\tone\nb\t1.7\ttwo\nc\tnan\tthree\n")
    write(sets / "hyp.txt", b"a one\nb two\nc three\n")
    out = printed(capsys, "--ref", sets / "ref.tsv", "--hyp", sets / "hyp.txt", "--errors")
    assert out.splitlines()[-1] == "WER by duration: nan 0.00 %, 1–2 s 0.00 %"


def test_mer_stands_in_every_row_or_in_none(sets, capsys):
    """A group without Chinese had a dash, as if its rate were unknown."""
    lines = ['{"key": "a", "txt": "打开my bluetooth", "s": "x"}', '{"key": "b", "txt": "one two", "s": "y"}']
    write(sets / "ref.jsonl", "\n".join(lines).encode())
    write(sets / "hyp.txt", "a 打开my blue\nb one\n".encode())
    out = printed(capsys, "--ref", sets / "ref.jsonl", "--hyp", sets / "hyp.txt", "--by", "s", "--format", "csv")
    assert [row["MER"] for row in csv.DictReader(io.StringIO(out))] == ["25.0", "50.0", "33.3333"]
    out = printed(capsys, "--ref", sets / "test.jsonl", "--hyp", sets / "old/test.txt", "--by", "speaker")
    assert "MER" not in out


def test_a_reader_that_has_seen_enough_and_a_console_of_few_letters_are_no_errors(sets):
    """`score.py … | head` ended in a traceback, and without the page; so did "→" where the console has no such letter."""
    write(sets / "ref.txt", b"a \xe6\x89\x93 one\n")
    write(sets / "hyp.txt", b"a \xe6\x89\x93 two\n")
    argv = [sys.executable, ROOT / "score.py", "--ref", "ref.txt", "--hyp", "hyp.txt", "--errors", "--html", "page.html"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(argv, cwd=sets, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (sets / "page.html").exists()
    done = subprocess.run(argv, cwd=sets, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=True)
    assert rb"1 \xd7 one \u2192 two" in done.stdout


def test_frequent_errors_worst_clips_and_durations(sets, capsys):
    write(sets / "ref.jsonl", b'{"key": "a", "txt": "y x z", "duration": 1.5}\n{"key": "b", "txt": "x y", "duration": 9}\n')
    write(sets / "hyp.txt", b"a w x\nb now x w\n")
    out = printed(capsys, "--ref", sets / "ref.jsonl", "--hyp", sets / "hyp.txt", "--errors", "1").splitlines()
    assert out[1] == "WER: 80.00 % (S 2, D 1, I 1; 5 reference words)"
    assert out[4:] == [
        "most frequent substitutions: 2 × y → w",
        "most frequent deletions: 1 × z",
        "most frequent insertions: 1 × now",
        "worst clips:",
        "  b: 100.00 %, 2 errors",
        "WER by duration: 1–2 s 66.67 %, 5–10 s 100.00 %",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            "--ref test.jsonl dev.jsonl --hyp old/test.txt",
            r"--hyp: 1 files of result for 2 sets \(test, dev\): give one for each",
        ),
        ("--ref test.jsonl --hyp a=old/test.txt a=new/test.txt", r"--hyp: 2 files of a for 1 sets \(test\)"),
        (
            "--ref test.jsonl test.jsonl --hyp old/test.txt",
            r"--ref: two sets are called test: name one otherwise, as NAME=test.jsonl",
        ),
        ("--ref test.jsonl --hyp old/test.txt --by mood", r'test.jsonl: no line has the field "mood"'),
        ("--ref test.jsonl --hyp old/test.txt --format csv --errors", "--per_utterance and --errors are text"),
        ("--ref test.jsonl --hyp old/test.txt --html none/r.html", r"none/r.html: cannot write \(No such file"),
        ("--ref test.jsonl --hyp old/test.txt --bootstrap -1", r"--bootstrap -1: a number from 0 on"),
        ("--ref test.jsonl --hyp old/test.txt new/test.txt --seed -1", r"--seed -1: a number from 0 on"),  # was a traceback
        ("--ref test.jsonl --hyp old/test.txt --errors -1", r"--errors -1: a number from 0 on"),  # all but the last
        ("--ref empty.txt --hyp old/test.txt", r"empty.txt: no line in it"),
        ("--ref set.jsonl --hyp old/test.txt --by set", r"--by set: the table has a column of that name: call the field"),
    ],
)
def test_mistakes_on_the_command_line(sets, monkeypatch, argv, message):
    monkeypatch.chdir(sets)
    write(sets / "empty.txt", b"\n")
    write(sets / "set.jsonl", (sets / "test.jsonl").read_bytes().replace(b"speaker", b"set"))  # its table had "A WER" …
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main(argv.split())


def test_a_set_s_files_without_names_are_one_system(sets, capsys, monkeypatch):
    monkeypatch.chdir(sets)
    out = printed(capsys, "--ref", "test.jsonl", "dev.jsonl", "--hyp", "old/test.txt", "old/dev.txt")
    assert out.splitlines()[2].startswith("| result | ")
    write(sets / "a=b.txt", (sets / "old/test.txt").read_bytes())  # a file of that name is no NAME=FILE
    assert "| a=b |" in printed(capsys, "--ref", "test.jsonl", "--hyp", "a=b.txt", "old/test.txt")


# --- is it better?


def test_resampled_rates_are_those_of_drawing_utterances():
    """The multinomial over kinds of utterances gives what drawing them one by one gives: mean, spread and correlation."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, 80)
    errors = np.column_stack([rng.binomial(lengths, 0.2), rng.binomial(lengths, 0.25)])
    fast = compare.resampled_rates(errors, lengths, 20_000, seed=1)
    drawn = rng.integers(0, 80, (20_000, 80))
    slow = errors[drawn].sum(1) / lengths[drawn].sum(1, keepdims=True)
    assert fast.mean(0) == pytest.approx(slow.mean(0), rel=0.005)
    assert np.cov(fast.T).ravel() == pytest.approx(np.cov(slow.T).ravel(), abs=2e-5)  # five deviations of what is drawn
    assert (
        compare.resampled_rates(errors, lengths, 50, seed=1) == compare.resampled_rates(errors, lengths, 50, seed=1)
    ).all()


def made_up(errors: list[int]) -> Score:
    """Of so many errors in utterances of ten words."""
    none = Counts()
    return Score([Utterance("", "", "", Counts(10 - wrong, wrong), none, none, "") for wrong in errors], [])


def test_differences_intervals_and_p_values():
    """Of two systems that err alike by chance p is below 0.05 in about a twentieth of the cases."""
    first, better = made_up([4, 5, 3, 6, 4, 5] * 5), made_up([2, 3, 2, 3, 1, 3] * 5)
    found = compare.compared(better, first, 1000, seed=0)
    assert found["difference"] == pytest.approx(100 * (better.words.rate - first.words.rate), abs=1e-4)
    assert found["difference low"] < found["difference"] < found["difference high"] < 0
    assert found["WER low"] < 100 * better.words.rate < found["WER high"]
    assert found["p"] == pytest.approx(2 / 1001)
    back = compare.compared(first, better, 1000, seed=0)
    assert back["difference low"] == pytest.approx(-found["difference high"], abs=1)
    assert compare.compared(first, first, 1000, seed=0)["p"] == 1
    rng = np.random.default_rng(3)
    alike = [compare.compared(made_up(a), made_up(b), 400, 0)["p"] for a, b in rng.binomial(10, 0.3, (200, 2, 40)).tolist()]
    assert 0.01 <= np.mean(np.array(alike) < 0.05) <= 0.11


def test_the_second_system_is_said_to_be_better_or_not(sets, capsys):
    argv = [*both(sets), "--bootstrap", "500", "--seed", "1"]
    out = printed(capsys, *argv)
    assert re.search(
        r"^new against old on test: WER -\d+\.\d\d points \(95 %: -.* to -.*\), p = 0\.0040: better$", out, re.M
    )
    assert "(paired bootstrap over utterances: 500 resamples, seed 1)" in out
    assert printed(capsys, *argv) == out
    assert printed(capsys, *argv[:-1], "2") != out
    alone = printed(capsys, "--ref", sets / "test.jsonl", "--hyp", sets / "old/test.txt", "--bootstrap", "500")
    assert re.search(r"^WER of 95 % of the resamples: \d+\.\d\d to \d+\.\d\d %$", alone, re.M)
    assert "resamples" not in printed(capsys, "--ref", sets / "test.jsonl", "--hyp", sets / "old/test.txt")


# --- for sclite


def test_trn_files_hold_the_normalised_words(sets, capsys):
    printed(capsys, "--ref", sets / "test.jsonl", "--hyp", sets / "old/test.txt", "--trn", sets / "trn")
    texts = read_texts(sets / "test.jsonl")
    expected = [f"{normalizer('basic')(text).strip()} ({key})" for key, text in texts.items()]
    assert (sets / "trn/ref.trn").read_text().splitlines() == expected
    assert len((sets / "trn/hyp.trn").read_text().splitlines()) == 60
    printed(capsys, *both(sets), "--trn", sets / "many")
    assert (sets / "many/old.test/hyp.trn").read_text() == (sets / "trn/hyp.trn").read_text()
    write(sets / "half.jsonl", rb'{"key": "a", "txt": "one \ud800"}')  # was a traceback
    printed(capsys, "--ref", sets / "half.jsonl", "--hyp", sets / "half.jsonl", "--trn", sets / "half")
    assert (sets / "half/ref.trn").read_text() == "one ? (a)\n"
    write(sets / "ref.txt", b"a {one / two}\n")
    argv = ["--ref", str(sets / "ref.txt"), "--hyp", str(sets / "ref.txt"), "--normalizer", "none", "--trn", str(sets)]
    with pytest.raises(SystemExit, match=r"ref.trn: [{}] means something to sclite, in a: "):
        main(argv)


@pytest.mark.skipif(not SCLITE.exists(), reason="sclite (Debian package sctk) is not installed")
@pytest.mark.parametrize("normalize", ["basic", "none"])
def test_sclite_counts_the_trn_files_alike(tmp_path, capsys, normalize):
    """Real transcripts, with keys that have neither speakers nor dashes; by the command that docs/scoring.md gives."""
    references = read_texts(DATA / "test.jsonl")
    heard = {key: text.replace("the", "a").replace("please ", "").upper() for key, text in references.items()}
    write(tmp_path / "r.txt", "".join(f"{key} {text}\n" for key, text in heard.items()).encode())
    argv = ["--ref", DATA / "test.jsonl", "--hyp", tmp_path / "r.txt", "--normalizer", normalize, "--trn", tmp_path]
    ours = re.search(r"WER: .* \(S (\d+), D (\d+), I (\d+); (\d+) reference", printed(capsys, *argv)).groups()
    command = [
        SCLITE,
        "-s",
        "-e",
        "utf-8",
        "-i",
        "sp",
        "-r",
        "ref.trn",
        "trn",
        "-h",
        "hyp.trn",
        "trn",
        "-o",
        "rsum",
        "stdout",
    ]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout.decode()
    total = re.search(r"\| Sum +\| +\d+ +(\d+) \| +\d+ +(\d+) +(\d+) +(\d+) ", out).groups()
    assert ours == (*total[1:], total[0])


def test_the_benchmark_of_scale_prints_every_row():
    done = run_script(sys.executable, ROOT / "benchmarks/score_scale.py", "--lines", "50")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^\| .* \| \d+\.\d \| \d+ \|$", done.stdout, re.M)) == 5
