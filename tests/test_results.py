"""Files by their names' endings: what stands in them, and what cannot be written."""

import json
import math
import time
from itertools import pairwise

import numpy as np
import pytest
from conftest import build_system, write_clip, write_manifest

import recognize
import results
from manifest import Record
from results import Outcome
from settings import InputError
from transcriber import Transcriber
from transcript import Hypothesis, Word, joined


def hypothesis(text, score=-2.0, **more):
    return Hypothesis(text, score=score, tokens=4, nbest=[(text, score), (f"{text}!", score - 1)], **more)


def outcome(key, pieces, duration=2.0, error=""):
    return Outcome(key, f"{key}.wav", joined(pieces, duration, error), 0.5).as_dict()


@pytest.fixture
def outcomes():
    words = [Word("hello", 0.5, 0.9, 0.8), Word("world", 1.0, 1.5, 0.6)]
    two = [(0.0, 2.0, hypothesis("hello world", words=words, flags=["loop"])), (2.0, 1.5, hypothesis("<again>", -1.0))]
    return [outcome("a", two, 3.5), outcome("b", [], 0.0, "no such\tfile"), outcome("c", [(0.0, 2.0, Hypothesis(""))])]


def written(tmp_path, name, outcomes):
    results.write(tmp_path / name, iter(outcomes))
    return (tmp_path / name).read_text(encoding="utf-8")


def test_pieces_are_joined():
    """Texts and scores add up, words and segments move to their piece's place, the likeliest readings are of all pieces."""
    first = hypothesis("a", words=[Word("a", 0.1, 0.2, 0.9)], flags=["loop"], unguarded="a a a")
    whole = joined([(0.0, 20.0, first), (20.0, 5.0, hypothesis("", 0.0)), (25.0, 5.0, hypothesis("b", -1.5))], 31.0)
    assert (whole.text, whole.score, whole.tokens, whole.duration) == ("a b", -3.5, 12, 31.0)
    assert (whole.flags, whole.unguarded) == (["loop"], "a a a b")
    assert [(s.start, s.end, s.text) for s in whole.segments] == [(0.0, 20.0, "a"), (25.0, 30.0, "b")]
    second = joined([(20.0, 5.0, first)], 25.0)
    assert [(word.text, word.start, word.end) for word in second.words] == [("a", 20.1, 20.2)]
    assert whole.nbest[0] == ("a b", -3.5)
    assert [score for _, score in whole.nbest] == sorted((score for _, score in whole.nbest), reverse=True)
    nothing = joined([], 0.0, "no such file")
    assert (nothing.text, nothing.nbest, nothing.words, nothing.segments, nothing.tokens) == ("", [], None, [], 0)
    assert joined([(0.0, 1.0, Hypothesis("x")), (1.0, 1.0, Hypothesis("y"))], 2.0).nbest == [("x y", 0.0)]


def test_text_jsonl_and_table(tmp_path, outcomes):
    assert written(tmp_path, "r.txt", outcomes) == "a hello world <again>\nb \nc \n"
    lines = [json.loads(line) for line in written(tmp_path, "r.jsonl", outcomes).splitlines()]
    assert [line["key"] for line in lines] == ["a", "b", "c"]
    assert lines == json.loads(json.dumps(outcomes))
    first = lines[0]
    assert first["confidence"] == pytest.approx(np.mean([word["confidence"] for word in first["words"]]))
    assert first["words"][1] == {"text": "world", "start": 1.0, "end": 1.5, "confidence": 0.6}
    assert first["segments"][1] == {"start": 2.0, "end": 3.5, "text": "<again>"}
    assert first["nbest"][0] == ["hello world <again>", -3.0]
    assert (first["flags"], first["duration"], first["seconds"], first["wav"]) == (["loop"], 3.5, 0.5, "a.wav")
    assert (lines[1]["error"], lines[1]["confidence"]) == ("no such\tfile", None)
    assert "unguarded" not in first
    rows = [line.split("\t") for line in written(tmp_path, "r.tsv", outcomes).splitlines()]
    assert rows[0] == ["key", "duration", "confidence", "flags", "error", "text"]
    assert rows[1] == ["a", "3.500", f"{first['confidence']:.4f}", "loop", "", "hello world <again>"]
    assert rows[2] == ["b", "0.000", "", "", "no such file", ""]
    assert not list(tmp_path.glob("*.new"))


def test_subtitles(tmp_path, outcomes):
    """Times of words where they are known, else a piece's time shared out over its letters; long texts in several cues."""
    cue = "1\n00:00:00,500 --> 00:00:03,312\nhello world <again>\n\n"  # seven of eight letters of the second piece
    assert written(tmp_path, "a.srt", outcomes[:1]) == cue
    assert written(tmp_path, "a.vtt", outcomes[:1]).startswith("WEBVTT\n\n00:00:00.500 --> ")
    assert "hello world &lt;again&gt;" in (tmp_path / "a.vtt").read_text()
    long = outcome("l", [(3590.0, 30.0, Hypothesis(" ".join(["word"] * 60)))], 3620.0)
    cues = list(results.cues(long))
    assert " ".join(text for _, _, text in cues).split() == ["word"] * 60
    assert all(end - start <= 7 and len(text) <= 85 and text.count("\n") <= 1 for start, end, text in cues)
    assert all(later[0] >= earlier[1] for earlier, later in pairwise(cues))
    assert "\n01:00:0" in written(tmp_path, "l.srt", [long])


def test_a_cue_has_at_most_two_lines():
    """84 letters were let in, which may take three lines of 42: a line ends before the word that does not fit."""
    text = "please press one to mute or unmute yourself two to lock or unlock the conference " * 3
    cues = list(results.cues(outcome("a", [(0.0, 12.0, Hypothesis(text))], 12.0)))
    assert " ".join(words for _, _, words in cues).split() == text.split()
    assert max(words.count("\n") for _, _, words in cues) == 1


def records(*keys):
    return [Record(key, key, None, None, key) for key in keys]


def test_results_that_cannot_be_written_are_refused_before_any_decoding(tmp_path):
    with pytest.raises(InputError, match=r"r\.csv: a result ends in \.txt \.jsonl \.tsv \.srt \.vtt"):
        results.check([tmp_path / "r.csv"], records("a"))
    with pytest.raises(InputError, match=r"a\.srt is of one recording, and there are 2: give '.*/\{key\}\.srt'"):
        results.check([tmp_path / "r.txt", tmp_path / "a.srt"], records("a", "b"))
    results.check([tmp_path / "a.srt", tmp_path / "r.tsv"], records("a"))
    with pytest.raises(InputError, match=r"\{key\}\.srt: .*/a\.srt would be of 2 files"):
        results.check([tmp_path / "{key}.srt"], records("a.wav", "b.wav", "a.mp3"))


def test_a_key_names_a_file_within_the_folder(tmp_path):
    """A manifest's key is no way out of it; a file's name is as it was."""
    names = ["x/a.wav", "/etc/b", "../../c.d", "my%20talk.mp3", "%2e%2e/%2Fd\0"]
    files = [results.file_of(tmp_path / "{key}.srt", key) for key in names]
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        *("x/a.srt", "etc/b.srt", "c.d.srt", "my talk.srt", "d.srt")
    ]


def test_one_run_writes_all_kinds_and_a_resumed_one_carries_all_fields(tiny, tmp_path, monkeypatch):
    """The fields of what an earlier run did come from its partial file."""
    build_system(tiny.qwen2, tiny.whisper).model.save_checkpoint(tmp_path / "checkpoint")
    for name, seconds in (("a", 2.0), ("b", 1.0)):
        write_clip(tmp_path / f"{name}.wav", seconds)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"key": k, "wav": f"{k}.wav"} for k in "ba"])

    def says(self, clips):
        if len(clips[0]) < 20_000 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        time.sleep(0.002)
        return [hypothesis("hello world", words=[Word("hello", 0.1, 0.2, 0.5), Word("world", 0.3, 0.4, 0.5)])]

    monkeypatch.setattr(Transcriber, "hypotheses", says)
    flags = [
        "--checkpoint",
        tmp_path / "checkpoint",
        "--data_path",
        manifest,
        "--batch_size",
        1,
        "--device",
        "cpu",
        "--guard",
        "off",
    ]
    flags += [
        "--result_path",
        *(tmp_path / "out" / name for name in ("r.txt", "r.jsonl", "r.tsv", "{key}.srt", "{key}.vtt")),
    ]
    with pytest.raises(SystemExit, match="interrupted: with a --result_path the same command continues"):
        recognize.main([str(flag) for flag in flags])
    (tmp_path / "again").touch()
    assert recognize.main([str(flag) for flag in flags]) == 0
    names = ["a.srt", "a.vtt", "b.srt", "b.vtt", "r.jsonl", "r.tsv", "r.txt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    b, a = (json.loads(line) for line in (tmp_path / "out" / "r.jsonl").read_text().splitlines())
    assert {**a, "seconds": 0} == {**b, "key": "a", "wav": str(tmp_path / "a.wav"), "duration": 2.0, "seconds": 0} | {
        "segments": [{"start": 0.0, "end": 2.0, "text": "hello world"}]
    }
    assert a["seconds"] >= 0.002
    assert "hello world" in (tmp_path / "out" / "a.srt").read_text()


def test_without_words_the_score_tells_how_sure_a_text_is():
    """The joint score is the LLM's and the CTC's together: a nearly right text had a confidence of 0.21 by it."""
    sure = joined([(0.0, 1.0, Hypothesis("a b", score=-3.0, tokens=8))], 1.0)
    assert Outcome("k", "k.wav", sure, 0.1).as_dict()["confidence"] == pytest.approx(math.exp(-3.0 / 8))
    words = [Word("a", 0.1, 0.2, 0.9), Word("b", 0.3, 0.4, 0.5)]
    heard = joined([(0.0, 1.0, Hypothesis("a b", score=-3.0, tokens=8, words=words))], 1.0)
    assert Outcome("k", "k.wav", heard, 0.1).as_dict()["confidence"] == pytest.approx(0.7)
