"""What names on the command line stand for, and the keys of what they find."""

import os
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest
import soundfile
from conftest import DATA, RATE, build_system, write_clip, write_manifest

import recognize
from audio import count_samples, load_audio
from settings import InputError
from sources import find, key_of, seconds_of
from transcriber import Transcriber
from transcript import Hypothesis


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A folder with sound, and much else, in it; the working directory is its parent."""
    folder = tmp_path / "calls"
    (folder / "2024").mkdir(parents=True)
    (folder / ".trash").mkdir()
    for name in ("b.wav", "a.MP3", "2024/c d.flac", "._b.wav", ".trash/e.wav", "notes.txt", "list.jsonl", "100%.opus"):
        (folder / name).write_bytes(b"not read here")
    (folder / "2024" / "up").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return folder


def keys(*names):
    return [record.key for record in find(names)]


def test_a_folder_is_searched_through_and_through(calls):
    """By suffix, in the order of names; hidden files (a Mac's `._b.wav`) are no recordings, a link back up is no loop."""
    expected = ["100%25.opus", "a.MP3", "b.wav", "2024/c%20d.flac"]
    assert keys("calls") == keys("calls/") == keys(str(calls)) == expected
    assert [record.wav.name for record in find(["calls"])] == ["100%.opus", "a.MP3", "b.wav", "c d.flac"]
    assert all(record.wav.exists() for record in find(["calls"]))


def test_keys_have_no_white_space_and_can_be_undone():
    """A line `key text` ends its key at the first space; a name that is not UTF-8 could not be written at all."""
    for name in ("my talk.wav", "a\tb\n.wav", "100%20.wav", "全角\u3000.wav", os.fsdecode(b"caf\xe9.wav")):
        key = key_of(name)
        assert key.split() == [key]
        assert key.encode("utf-8")
        assert unquote(key, errors="surrogateescape") == name
    assert key_of("plain/ä.wav") == "plain/ä.wav"


def test_files_patterns_and_folders_together_keep_their_paths(calls):
    """In the order given; what two names find is recognized once."""
    (calls / "2024" / "up").unlink()
    assert keys("calls/b.wav", "calls/*.MP3", "calls/2024") == ["calls/b.wav", "calls/a.MP3", "calls/2024/c%20d.flac"]
    assert keys("calls/*.wav", "calls/b.wav", "calls/b.wav") == ["calls/b.wav"]
    assert keys("calls/20*/*.flac") == ["calls/2024/c%20d.flac"]
    assert keys("**/*.MP3")[0] == "calls/a.MP3"
    (calls / "a[1].wav").write_bytes(b"")
    assert keys("calls/a[1].wav") == ["calls/a[1].wav"]  # a file's own name is no pattern


def test_a_folder_that_cannot_be_read_is_told(calls, monkeypatch):
    """Its files were left out without a word."""
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("2024"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(InputError, match=r"calls/2024: cannot read this folder \(Permission denied\)"):
        keys("calls")


def test_a_manifest_is_one_of_the_names(tiny, calls):
    manifest = tiny.manifest
    assert keys(str(manifest)) == [clip["key"] for clip in tiny.clips]
    assert keys(str(manifest), "calls/b.wav")[-2:] == ["clip4", "calls/b.wav"]
    same = write_manifest(calls / "same.jsonl", [{"key": "clip0", "wav": "b.wav"}])
    with pytest.raises(InputError, match=r"key 'clip0' is of .*train\.jsonl:1 and of .*same\.jsonl:1: recognize them sep"):
        find([str(manifest), str(same)])


def test_a_name_that_is_not_utf_8_is_a_files_name(tmp_path):
    """Names from old archives: soundfile took them for text, and one of them ended a whole run with a traceback."""
    path = tmp_path / os.fsdecode(b"caf\xe9.wav")
    write_clip(tmp_path / "plain.wav", 0.5).rename(path)
    assert len(load_audio(path)[0]) == count_samples(path) == RATE // 2
    (record,) = find([str(tmp_path)])
    assert seconds_of(record) == 0.5
    assert seconds_of(record._replace(wav=Path("\ud800.wav"))) == 0  # only JSON can hold such a name


def test_names_that_find_nothing_are_told(calls):
    for name in ("calls/*.m4a", "no?.wav"):
        with pytest.raises(InputError, match="no file has such a name"):
            find([name])
    (calls / "empty").mkdir()
    with pytest.raises(InputError, match=r"calls/empty: no audio file in it \(.*\.flac"):
        find(["calls/empty"])


@pytest.fixture
def corpus(tmp_path):
    """Two recordings with a transcription, one without; one text without a recording."""
    for folder in ("audio/x", "transcriptions/x"):
        (tmp_path / "corpus" / folder).mkdir(parents=True)
    for name in ("x/one", "two", "three"):
        write_clip(tmp_path / "corpus" / "audio" / f"{name}.wav", 1.0)
    (tmp_path / "corpus/transcriptions/x/one.txt").write_bytes("\ufeffHello\nworld, again \n".encode())
    (tmp_path / "corpus/transcriptions/two.txt").write_text("good morning")
    return tmp_path / "corpus"


def test_audio_and_transcriptions_are_paired_by_their_stems(corpus):
    assert {r.key: r.txt for r in find([str(corpus)])} == {
        **{"three.wav": None, "two.wav": "good morning", "x/one.wav": "Hello world, again"}
    }
    (corpus / "transcriptions/two.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"two\.txt: byte 4 is not UTF-8: save the file as UTF-8"):
        find([str(corpus)])


@pytest.mark.parametrize("into", [[], ["--result_path", "r.txt"]])
def test_what_has_transcriptions_is_scored(tiny, corpus, tmp_path, monkeypatch, capsys, into):
    """What has no transcription is no insertion."""
    build_system(tiny.qwen2, tiny.whisper).model.save_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(Transcriber, "hypotheses", lambda self, clips: [Hypothesis("hello good world") for _ in clips])
    monkeypatch.chdir(tmp_path)
    assert recognize.main(["corpus", "--checkpoint", "checkpoint", "--device", "cpu", "--guard", "off", *into]) == 0
    said = capsys.readouterr()
    out, report = (said.out, said.out) if into else (said.out, said.err)
    assert "WER: 80.00 % (S 1, D 1, I 2; 5 reference words)" in report
    assert "CER: " in report
    assert "1 of 3 have no transcription and are not scored" in said.err
    text = (tmp_path / "r.txt").read_text() if into else out
    assert text == "".join(f"{key} hello good world\n" for key in ("three.wav", "two.wav", "x/one.wav"))


def test_real_recordings_of_any_format_in_a_folder_are_recognized(real, tmp_path, capsys):
    """mp3 at 44.1 kHz in two channels, an opus and a flac of one prompt yield what the shipped checkpoint hears in them."""
    clip = sorted((DATA / "clips").iterdir())[0]
    sound, rate = soundfile.read(clip)
    soundfile.write(tmp_path / "a b.mp3", sound.repeat(2).reshape(-1, 2), rate)
    soundfile.write(tmp_path / "c.opus", sound, rate, format="OGG", subtype="OPUS")
    shutil.copy(clip, tmp_path / f"d{clip.suffix}")
    assert recognize.main([str(tmp_path), "--decoder", "ctc", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    texts = dict(line.split(" ", 1) for line in said.out.splitlines())
    assert list(texts) == ["a%20b.mp3", "c.opus", f"d{clip.suffix}"]
    assert len(texts["c.opus"].split()) > 0
    assert "3 files, 0.00 h, RTFx " in said.err
    assert said.err.rstrip().endswith("0 failed")
