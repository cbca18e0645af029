"""What is said of the data before the first step, and the flags that change what is read."""

import pytest
from conftest import build_system, write_clip, write_manifest
from test_train import TOKENS, arguments

import preflight
import train
from dataset import SpeechDataset
from manifest import read_manifest
from preflight import describe, overlap


def dataset(tiny, manifest, splice="tokens"):
    system = build_system(tiny.qwen2, tiny.whisper, splice=splice)
    return SpeechDataset(read_manifest(manifest), system.prompt, system.settings, 512)


@pytest.fixture
def manifest(tmp_path):
    """Clips of 1 and 2 s; the CTC of the tests has the letters of "text one two three"."""
    write_clip(tmp_path / "1.wav", 1.0)
    write_clip(tmp_path / "2.wav", 2.0)
    write_clip(tmp_path / "31.wav", 31.0)
    rows = [("1", "one two"), ("2", "three"), ("1", "blöd"), ("2", "zwölf"), ("31", "one"), ("1", "t" * 30)]
    items = [{"key": str(i), "wav": f"{wav}.wav", "txt": txt} for i, (wav, txt) in enumerate(rows)]
    return write_manifest(tmp_path / "m.jsonl", items)


def test_it_tells_counts_lengths_drops_rates_and_letters(tiny, manifest):
    summary, lengths, rates, needs, letters = describe(dataset(tiny, manifest))
    assert summary.startswith(f"{manifest}: 2 clips, 0.00 h; dropped 1 longer than 30 s; ")
    assert "dropped 2 with characters that the CTC has no tokens for" in summary
    assert "dropped 1 with more text than its speech has room for" in summary
    assert lengths == "  clips of 1.0 to 2.0 s, on average 1.5 s"
    # " one two" and " three" are 8 and 6 bytes, a token each, in 1 and 2 s; 25 and 50 vectors; "ee" needs a blank
    assert rates == "  tokens a second of speech: 4.7, at most 8.0; vectors of the projector: 25.0"
    assert needs == "  the CTC needs 20% of the projector's vectors, in the fastest clip 32%"
    assert letters.startswith("  characters that the CTC has no tokens for: 'ö' in 2, 'l' in 2, 'z' in 1, 'f' in 1")


def test_with_frames_nothing_is_said_of_a_ctc(tiny, manifest):
    assert not any("CTC" in line for line in describe(dataset(tiny, manifest, "frames")))


def test_of_many_texts_a_sample_is_tokenized_and_said_so(tiny, manifest, monkeypatch):
    monkeypatch.setattr(preflight, "SAMPLE", 3)
    lines = describe(dataset(tiny, manifest))
    assert lines[-1].endswith("(in 3 of 6 texts, evenly spaced)")
    monkeypatch.setattr(preflight, "SAMPLE", 1)
    assert describe(dataset(tiny, manifest))[2].endswith("(in 1 of 2 clips, evenly spaced)")


def test_texts_that_stand_in_both_sets_are_counted_whatever_their_case_and_spaces(tiny, manifest, tmp_path):
    items = [{"key": str(i), "wav": "1.wav", "txt": txt} for i, txt in enumerate(["One  two", "one one", "two"])]
    other = write_manifest(tmp_path / "eval.jsonl", items)
    sets = dataset(tiny, manifest, "frames"), dataset(tiny, other, "frames")
    assert overlap(*sets) == ["  1 of its 3 texts stand in the training set too: the evaluation will look better than it is"]
    assert overlap(sets[1], sets[1])[0].startswith("  3 of its 3 texts")


def test_preflight_only_stops_before_the_first_step_without_an_error(tiny, tmp_path, capsys):
    """It takes no lock: a training may be writing the folder."""
    train.main(arguments(tiny, tmp_path / "o", "--preflight_only", "--eval_data_path", str(tiny.manifest)))
    out = capsys.readouterr().out
    assert "vectors of the projector: 9.9" in out
    assert "5 of its 5 texts stand in the training set too" in out
    assert not (tmp_path / "o").exists()


def test_the_flags_of_other_projects_change_training_and_evaluation_data_alike(tiny, tmp_path, capsys, monkeypatch):
    """Fields by other names, capitals and punctuation that no CTC of small letters knows, clips by their length."""
    sets = []
    real = train.preflight
    monkeypatch.setattr(train, "preflight", lambda *both: (sets.extend(both), real(*both)))
    for name in ("a", "b"):
        rows = [{"path": str(tiny.root / f"{i}.wav"), "sentence": f"Text, {name}!"} for i in range(5)]
        write_manifest(tmp_path / f"{name}.jsonl", rows)
    flags = arguments(tiny, tmp_path / "o", *TOKENS, "1", "--max_steps", "1", "--preflight_only")
    at = flags.index("--data_path")
    flags[at + 1 : at + 2] = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    flags += ["--eval_data_path", str(tmp_path / "b.jsonl"), "--audio_column_name", "path", "--text_column_name", "sentence"]
    flags += ["--text_lowercase", "--chars_to_ignore", ",", "!", "--min_duration_in_seconds", "1"]
    train.main([*flags, "--max_duration_in_seconds", "2"])
    train_set, eval_set = sets
    assert [train_set.record(i).txt for i in range(len(train_set))] == ["text a"] * 3 + ["text b"] * 3
    assert [eval_set.record(i).txt for i in range(len(eval_set))] == ["text b"] * 3
    for clips, times in ((train_set, 2), (eval_set, 1)):
        shorter, longer = "shorter than --min_duration_in_seconds", "longer than --max_duration_in_seconds"
        assert clips.dropped == {shorter: times, longer: times}


def test_durations_that_leave_nothing_are_refused(tiny, tmp_path):
    flags = arguments(tiny, tmp_path, "--min_duration_in_seconds", "3", "--max_duration_in_seconds", "2")
    with pytest.raises(SystemExit, match="error: --min_duration_in_seconds must be at least 0 and less than --max_"):
        train.main(flags)
    with pytest.raises(SystemExit, match=r"no clip is left to train on: .*dropped 5 longer than --max_duration"):
        train.main([*arguments(tiny, tmp_path), "--max_duration_in_seconds", "0.5"])
