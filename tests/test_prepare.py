"""Corpora in their real layouts, in miniature, with real speech in them → manifests that can be read."""

import json
import os
import random
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from conftest import DATA, RATE, run_script

import corpora
import prepare
from audio import load_audio
from manifest import read_manifest

CLIPS = sorted((DATA / "clips").glob("*.opus"))
CLIENT = "c4b3f5a9" * 16  # as long as they are


def speech(path, number=0):
    """A real recording, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    audio, rate = soundfile.read(CLIPS[number], dtype="float32")
    soundfile.write(path, audio, rate)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def run(*arguments):
    return prepare.main([str(argument) for argument in arguments])


def rows(out):
    """The lines of a jsonl, once read_manifest has taken them and every clip has been found as long as it is said."""
    for record in read_manifest(out, need_txt=False):
        audio, problem = load_audio(*record.part)
        assert problem == ""
        assert abs(len(audio) / RATE - record.duration) < 0.01
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def librispeech(root):
    chapters = {"84/121123": ["GO DO YOU HEAR", "BUT IN LESS THAN"], "1272/128104": ["MISTER QUILTER IS THE APOSTLE"]}
    for number, (chapter, texts) in enumerate(chapters.items()):
        name = chapter.replace("/", "-")
        lines = [f"{name}-{i:04d} {txt}\n" for i, txt in enumerate(texts)]
        text(root / "dev-clean" / chapter / f"{name}.trans.txt", "".join(lines))
        for i in range(len(texts)):
            speech(root / "dev-clean" / chapter / f"{name}-{i:04d}.flac", number + i)
    text(
        root / "SPEAKERS.TXT",
        "; Some pipe(|) separated metadata about all LibriSpeech speakers\n;\n"
        ";ID  |SEX| SUBSET           |MINUTES| NAME\n84   | F | dev-clean        |  8.02 | Christie Nowak\n"
        "1272 | M | dev-clean        |  8.05 | John Rose\n",
    )
    return root


def test_librispeech(tmp_path, capsys):
    root = librispeech(tmp_path / "LibriSpeech")
    assert run("librispeech", root / "dev-clean", "--out", tmp_path / "m.jsonl") == 0
    found = rows(tmp_path / "m.jsonl")
    assert [row["key"] for row in found] == ["1272-128104-0000", "84-121123-0000", "84-121123-0001"]
    duration = found[1].pop("duration")
    assert found[1] == {
        "key": "84-121123-0000",
        "wav": "LibriSpeech/dev-clean/84/121123/84-121123-0000.flac",
        "txt": "GO DO YOU HEAR",
        "speaker": "84",
        "chapter": "121123",
        "gender": "F",
    }
    assert abs(duration - soundfile.info(CLIPS[0]).duration) < 0.001
    hours = sum(soundfile.info(CLIPS[i]).duration for i in (1, 0, 1)) / 3600
    says = f"{tmp_path}/m.jsonl: 3 clips of 2 speakers, {hours:.2f} h; left out: 0 broken, 0 without a transcript\n"
    assert capsys.readouterr().out == says
    assert not (tmp_path / "m.left_out.txt").exists()
    run("librispeech", root, "--split", "dev-clean", "--out", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "m.jsonl").read_bytes()


def test_aishell(tmp_path, capsys):
    """Its transcripts are in one file for all parts; some hundred of its recordings have none."""
    root = tmp_path / "data_aishell"
    for name in ("train/S0002/BAC009S0002W0122", "train/S0002/BAC009S0002W0123", "dev/S0724/BAC009S0724W0121"):
        speech(root / f"wav/{name}.wav")
    text(
        root / "transcript/aishell_transcript_v0.8.txt",
        "BAC009S0002W0122 而 对 楼市 成交 抑制 作用 最 大 的 限 购\nBAC009S0724W0121 广州市 房地产 中介 协会 分析\n",
    )
    assert run("aishell", root, "--split", "train", "--out", tmp_path / "a" / "train.jsonl") == 0
    (row,) = rows(tmp_path / "a" / "train.jsonl")
    wav = str(root / "wav/train/S0002/BAC009S0002W0122.wav")
    assert (row["key"], row["wav"], row["speaker"]) == ("BAC009S0002W0122", wav, "S0002")  # not within the jsonl's folder
    assert row["txt"] == "而对楼市成交抑制作用最大的限购"
    assert "而对" in (tmp_path / "a" / "train.jsonl").read_text(encoding="utf-8")  # as UTF-8, not escaped
    left = root / "wav/train/S0002/BAC009S0002W0123.wav"
    assert (tmp_path / "a" / "train.left_out.txt").read_text() == f"{left}: no transcript\n"
    assert "0 broken, 1 without a transcript" in capsys.readouterr().out
    assert run("aishell", root, "--split", "train", "--out", tmp_path / "a" / "train.jsonl", "--untranscribed") == 0
    assert ["txt" in row for row in rows(tmp_path / "a" / "train.jsonl")] == [True, False]
    assert not (tmp_path / "a" / "train.left_out.txt").exists()
    with pytest.raises(SystemExit, match=r"data_aishell: give --split, one of dev, train$"):
        run("aishell", root, "--out", tmp_path / "m.jsonl")
    shutil.rmtree(root / "wav/train")
    shutil.rmtree(root / "wav/dev")
    (root / "wav/S0002.tar.gz").touch()  # as it is delivered
    with pytest.raises(SystemExit, match=r"data_aishell: no part in it: is it the right folder, unpacked\?$"):
        run("aishell", root, "--split", "train", "--out", tmp_path / "m.jsonl")


def test_common_voice(tmp_path):
    """A sentence may have a quotation mark that is never closed; without care the rest of the file was one sentence."""
    root = tmp_path / "cv-corpus-24.0-2025-12-05" / "ja"
    columns = "client_id path sentence_id sentence sentence_domain up_votes down_votes age gender accents variant locale"
    lines = [[*columns.split(), "segment"]]
    sentences = ['"もう一度 言って', "はい"]
    for i, txt in enumerate(sentences):
        wav, who = f"common_voice_ja_1848232{i}.mp3", ["twenties", "female_feminine", "", "", "ja", ""]
        lines.append([CLIENT, wav, "5f0c", txt, "", "2", "0", *who])
    text(root / "validated.tsv", "".join("\t".join(line) + "\n" for line in lines))
    text(root / "clip_durations.tsv", "clip\tduration[ms]\ncommon_voice_ja_18482320.mp3\t1000\n")
    for i in range(2):
        speech(root / f"clips/common_voice_ja_1848232{i}.mp3", i)
    assert run("commonvoice", root, "--split", "validated", "--out", tmp_path / "m.jsonl") == 0
    found = rows(tmp_path / "m.jsonl")
    assert [row["txt"] for row in found] == sentences
    assert found[0]["key"] == "common_voice_ja_18482320"
    kept = {"speaker": CLIENT, "age": "twenties", "gender": "female_feminine", "up_votes": "2", "locale": "ja"}
    assert kept.items() <= found[0].items()
    assert not {"accents", "segment", "path", "sentence", "client_id"} & found[0].keys()  # empty, or under our name
    with pytest.raises(SystemExit, match=r"clip_durations.tsv:1: no column client_id, path, sentence: is it a list"):
        run("commonvoice", root, "--split", "clip_durations", "--out", tmp_path / "m.jsonl")
    with (root / "validated.tsv").open("a", encoding="utf-8") as file:
        file.write("cafe\tcommon_voice_ja_1")
    with pytest.raises(SystemExit, match=r"validated.tsv: the row of client_id cafe is cut off: fetch the file again$"):
        run("commonvoice", root, "--split", "validated", "--out", tmp_path / "m.jsonl")


def test_a_folder_with_audio_and_transcriptions(tmp_path):
    for name in ("b/2.ogg", "a/1.wav", "a/with space.flac", "a/._1.wav"):
        speech(tmp_path / "c" / "audio" / name)
    for name, txt in (("b/2", ""), ("a/1", "\ufeffone\n two  \n"), ("a/with space", "three")):
        text(tmp_path / "c" / "transcriptions" / f"{name}.txt", txt)
    assert run("folder", tmp_path / "c", "--out", tmp_path / "c" / "m.jsonl") == 0
    found = [(row["key"], row["wav"], row["txt"]) for row in rows(tmp_path / "c" / "m.jsonl")]
    assert found[0] == ("a/1", "audio/a/1.wav", "one two")
    assert found[1] == ("a/with_space", "audio/a/with space.flac", "three")  # a key has no space: result.txt parts at it
    assert found[2] == ("b/2", "audio/b/2.ogg", "")


def test_a_folder_of_recordings_alone(tmp_path):
    speech(tmp_path / "c" / "1.wav")
    speech(tmp_path / "c" / "2.wav")
    text(tmp_path / "c" / "2.txt", "two")
    assert run("folder", tmp_path / "c", "--out", tmp_path / "m.jsonl") == 0
    assert [row["txt"] for row in rows(tmp_path / "m.jsonl")] == ["two"]
    assert run("folder", tmp_path / "c", "--out", tmp_path / "m.jsonl", "--untranscribed") == 0
    assert [row.get("txt") for row in rows(tmp_path / "m.jsonl")] == [None, "two"]
    speech(tmp_path / "c" / "2.flac")
    with pytest.raises(SystemExit, match=r"c/2.wav and .*c/2.flac have the same key, 2: rename or remove one"):
        run("folder", tmp_path / "c", "--out", tmp_path / "m.jsonl")


def test_a_folder_that_links_lead_to_again_is_read_once(tmp_path):
    """A link to a folder above gave 40 copies of every clip, a/loop/loop/…/1 among their keys."""
    speech(tmp_path / "c" / "a" / "1.wav")
    (tmp_path / "c" / "a" / "loop").symlink_to("..")
    speech(tmp_path / "c" / "b" / "2.wav")
    (tmp_path / "c" / "b" / "a").symlink_to("../a")
    speech(tmp_path / "elsewhere" / "3.wav")
    (tmp_path / "c" / "z").symlink_to(tmp_path / "elsewhere")
    assert run("folder", tmp_path / "c", "--out", tmp_path / "m.jsonl", "--untranscribed") == 0
    assert [row["key"] for row in rows(tmp_path / "m.jsonl")] == ["a/1", "b/2", "z/3"]


# --- Kaldi


def test_kaldi_segments_are_parts(tmp_path, capsys):
    """A segment may end a little behind its recording (Kaldi cuts it there), or say -1 for its end."""
    data, wav = tmp_path / "data/train", speech(tmp_path / "corpus/talk.wav", 3)
    seconds = soundfile.info(wav).duration
    text(data / "wav.scp", f"talk {wav}\n")
    text(data / "text", "ann-1 hello there\nann-2 good  bye\nbob-1 to the end\nbob-2 nothing\n")
    text(data / "utt2spk", "ann-1 ann\nann-2 ann\nbob-1 bob\nbob-2 bob\n")
    text(data / "spk2gender", "ann f\nbob m\n")
    segments = [("ann-1", 0.1, 0.65), ("ann-2", 0.3, seconds + 0.4), ("bob-1", 0.5, -1), ("bob-2", seconds + 1, seconds + 2)]
    text(data / "segments", "".join(f"{key} talk {start:.2f} {end:.2f}\n" for key, start, end in segments))
    assert run("kaldi", data, "--out", tmp_path / "m.jsonl") == 1
    found = rows(tmp_path / "m.jsonl")
    assert found[0] == {
        "key": "ann-1",
        "wav": "corpus/talk.wav",
        "txt": "hello there",
        "duration": 0.55,
        "start": 0.1,
        "end": 0.65,
        "speaker": "ann",
        "gender": "f",
    }
    assert [(row["start"], row["end"]) for row in found[1:]] == [(0.3, round(seconds, 3)), (0.5, round(seconds, 3))]
    out, err = capsys.readouterr()
    assert err.startswith(f"{wav}: its part from {seconds + 1:.2f}")
    assert "3 clips of 2 speakers" in out


def test_a_segment_of_less_than_a_millisecond_is_left_out(tmp_path, capsys):
    """It was written with an end that was its start, and no program took the jsonl."""
    data, wav = tmp_path / "data", speech(tmp_path / "talk.wav", 3)
    text(data / "wav.scp", f"talk {wav}\n")
    text(data / "text", "u1 one\nu2 two\n")
    text(data / "segments", "u1 talk 0.1 0.1004\nu2 talk 0.1 0.5\n")
    assert run("kaldi", data, "--out", tmp_path / "m.jsonl") == 1
    assert [row["key"] for row in rows(tmp_path / "m.jsonl")] == ["u2"]
    assert "talk.wav: its part from 0.1 to 0.1004 s is empty or not in its" in capsys.readouterr().err


def test_a_recording_of_many_segments_is_opened_once(tmp_path, monkeypatch):
    data, wav = tmp_path / "data", speech(tmp_path / "talk.wav", 3)
    text(data / "wav.scp", f"talk {wav}\n")
    text(data / "text", "".join(f"u{i} one\n" for i in range(50)))
    text(data / "segments", "".join(f"u{i} talk 0.{i:02d} 1\n" for i in range(50)))
    opened, real = [], prepare.count_samples
    monkeypatch.setattr(prepare, "count_samples", lambda wav: opened.append(wav) or real(wav))
    assert run("kaldi", data, "--out", tmp_path / "m.jsonl") == 0
    assert len(rows(tmp_path / "m.jsonl")) == 50
    assert opened == [wav]


@pytest.mark.parametrize(
    "command",
    [
        "flac -c -d -s {} |",
        "sph2pipe -f wav {} |",
        "/opt/kaldi/tools/sph2pipe_v2.5/sph2pipe -f wav -p {} |",
        "sox {} -t wav -r 16k -b 16 -e signed - |",
        "sox -G {} -c1 -b16 -r16k -t wav - |",
        "sox '{}' -r 16000 -t wav - |",
    ],
)
def test_a_plain_command_in_wav_scp_stands_for_its_file(tmp_path, command):
    data, wav = tmp_path / "data", speech(tmp_path / "84-121123-0000.flac")
    text(data / "wav.scp", f"84-121123-0000 {command.format(wav)}\n")
    text(data / "text", "84-121123-0000 GO DO YOU HEAR\n")
    assert run("kaldi", data, "--out", tmp_path / "m.jsonl") == 0
    assert [row["wav"] for row in rows(tmp_path / "m.jsonl")] == ["84-121123-0000.flac"]


@pytest.mark.parametrize(
    "command",
    [
        "touch {marker} |",
        "flac -c -d -s $(touch {marker}).flac |",
        "flac -c -d -s {wav} | touch {marker} |",
        "flac -c -d -s {wav};touch {marker} |",
        "sox `touch {marker}` -t wav - |",
        "| touch {marker}",
        "sph2pipe -f wav -p -c 2 {wav} |",  # one of two channels
        "sox {wav} -t wav - speed 0.9 |",  # another sound
        "sox -t raw -r 8000 -e signed -b 16 {wav} -t wav - |",
    ],
)
def test_commands_in_wav_scp_are_never_run_and_any_other_is_refused(tmp_path, command):
    wav, marker = speech(tmp_path / "a.wav"), tmp_path / "marker"
    text(tmp_path / "data/wav.scp", f"a {command.format(wav=wav, marker=marker)}\n")
    with pytest.raises(SystemExit, match=r"^error: .*data/wav.scp: a is what a command prints .*: let it write a file, and"):
        run("kaldi", tmp_path / "data", "--out", tmp_path / "m.jsonl", "--untranscribed")
    assert not marker.exists()
    assert not (tmp_path / "m.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("segments", "u talk 1\n", "segments:1: expected `utterance recording start end`"),
        ("segments", "u talk one two\n", "segments:1: expected `utterance recording start end`"),
        ("segments", "\nu talk 2 1\n", "segments:2: expected 0 ≤ start < end"),
        ("segments", "u walk 0 1\n", "segments:1: the recording walk is not in wav.scp: add it there"),
        ("text", "u one\nu two\n", "text:2: u was seen before"),
        ("wav.scp", "talk raw_wav.1.ark:42\n", r"talk is not a file of its own \(raw_wav.1.ark:42\)"),
        ("wav.scp", None, r"wav.scp: cannot be read \(No such file or directory\): is this the folder of the corpus"),
    ],
)
def test_what_is_wrong_in_a_kaldi_folder_is_told_in_one_line(tmp_path, name, content, why):
    data = tmp_path / "data"
    text(data / "wav.scp", f"talk {speech(tmp_path / 'talk.wav')}\n")
    (data / "wav.scp").unlink() if content is None else text(data / name, content)
    with pytest.raises(SystemExit, match=rf"^error: .*{why}.*$"):
        run("kaldi", data, "--out", tmp_path / "m.jsonl")


# --- Hugging Face


@pytest.mark.parametrize("module", [None, SimpleNamespace(__version__="3.6.0")])
def test_without_the_package_datasets_it_is_named(tmp_path, monkeypatch, module):
    """Before its version 4 a dataset could bring a script, which was run."""
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(SystemExit, match=r"needs the package datasets: pip install 'datasets>=4'$"):
        run("huggingface", "PolyAI/minds14", "--split", "train", "--out", tmp_path / "m.jsonl")


@pytest.fixture(params=["parquet", "splits saved", "one saved"])
def dataset(request, tmp_path):
    """A folder of a Hugging Face dataset: as the hub holds it, or written by save_to_disk."""
    datasets = pytest.importorskip("datasets")
    sounds = [{"path": f"{i}.wav", "bytes": speech(tmp_path / f"{i}.wav", i).read_bytes()} for i in range(3)]
    columns = {"text": ["one", "two", None], "speaker_id": [7, 8, 8], "id": ["a", "b", "c"], "start": [1, 1, 1]}
    data = datasets.Dataset.from_dict({"audio": sounds, **columns}).cast_column("audio", datasets.Audio())
    if request.param == "parquet":
        (tmp_path / "d").mkdir()
        data.to_parquet(tmp_path / "d" / "train-00000-of-00001.parquet")
    else:
        several = datasets.DatasetDict({"train": data, "test": data.select([0])})
        (several if request.param == "splits saved" else data).save_to_disk(tmp_path / "d")
    return tmp_path / "d"


def test_a_hugging_face_dataset_in_a_folder(dataset, tmp_path):
    (tmp_path / "out").mkdir()
    assert run("huggingface", dataset, "--split", "train", "--out", tmp_path / "out" / "hf.jsonl") == 0
    found = rows(tmp_path / "out" / "hf.jsonl")
    assert [(row["key"], row["txt"], row["speaker"], row["id"]) for row in found[:2]] == [
        ("0000000", "one", "7", "a"),
        ("0000001", "two", "8", "b"),
    ]
    assert "start" not in found[0]  # theirs means something else
    for i, row in enumerate(found):
        assert np.array_equal(load_audio(tmp_path / "out" / row["wav"])[0], load_audio(speech(tmp_path / "x.wav", i))[0])
    with pytest.raises(SystemExit, match=r"^error: .*: no column words \(there: audio, text, speaker_id, id, start\)$"):
        run("huggingface", dataset, "--split", "train", "--text_field", "words", "--out", tmp_path / "out" / "hf.jsonl")


# --- what they share


def test_broken_files_are_listed_and_told_and_the_others_written(tmp_path, capsys):
    audio = tmp_path / "c" / "audio"
    speech(audio / "good.wav")
    (audio / "empty.wav").touch()
    (audio / "text.wav").write_text("not audio")
    whole = speech(audio / "cut.wav", 1).read_bytes()
    (audio / "cut.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(audio / "none.wav", np.zeros(0, np.float32), RATE)
    for wav in audio.iterdir():
        text(tmp_path / "c" / "transcriptions" / f"{wav.stem}.txt", "one")
    assert run("folder", tmp_path / "c", "--out", tmp_path / "m.jsonl") == 1
    assert [row["key"] for row in rows(tmp_path / "m.jsonl")] == ["good"]
    out, err = capsys.readouterr()
    assert "1 clips, 0.00 h; left out: 4 broken, 0 without a transcript" in out
    listed = (tmp_path / "m.left_out.txt").read_text()
    assert listed in err
    why = ["truncated: its header promises more", "is empty (0 bytes)", "has no samples", "not audio that libsndfile"]
    names = ["cut", "empty", "none", "text"]
    for line, name, reason in zip(listed.splitlines(), names, why, strict=True):
        assert line.startswith(f"{audio / name}.wav: {reason}")
    (audio / "good.wav").unlink()
    before = (tmp_path / "m.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"m.jsonl is not written: all 4 clips are left out, the first is .*cut.wav: trunc"):
        run("folder", tmp_path / "c", "--out", tmp_path / "m.jsonl")
    assert (tmp_path / "m.jsonl").read_bytes() == before


def test_a_thousand_broken_files_do_not_fill_the_screen(tmp_path, capsys):
    clips = [{"key": f"{i}", "wav": tmp_path / f"{i}.wav", "txt": ""} for i in range(1000)]
    clips.append({"key": "good", "wav": speech(tmp_path / "good.wav"), "txt": ""})
    assert prepare.prepare(clips, tmp_path / "m.jsonl") == 1
    told = capsys.readouterr().err.splitlines()
    assert told[: prepare.TOLD] == [f"{tmp_path}/{i}.wav: no such file" for i in range(prepare.TOLD)]
    assert told[prepare.TOLD :] == [f"980 more: see {tmp_path}/m.left_out.txt"]
    assert len((tmp_path / "m.left_out.txt").read_text().splitlines()) == 1000


def test_the_order_does_not_depend_on_the_disk_s_or_the_threads(tmp_path, monkeypatch):
    root, real = librispeech(tmp_path / "LibriSpeech"), os.walk

    def shuffled(*arguments, **options):
        found = list(real(*arguments, **options))
        for _, _, names in found:
            random.shuffle(names)
        return random.sample(found, len(found))

    run("librispeech", root, "--out", tmp_path / "0.jsonl")
    monkeypatch.setattr(os, "walk", shuffled)
    for seed in (1, 2, 3):
        random.seed(seed)
        run("librispeech", root, "--out", tmp_path / f"{seed}.jsonl")
        assert (tmp_path / f"{seed}.jsonl").read_bytes() == (tmp_path / "0.jsonl").read_bytes()


def test_an_interrupted_run_leaves_what_was_there(tmp_path, monkeypatch):
    root, out = librispeech(tmp_path / "LibriSpeech"), tmp_path / "m.jsonl"
    out.write_text("as before")

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(SystemExit, match=r"error: interrupted: .*m.jsonl is as it was"):
        run("librispeech", root, "--out", out)
    assert out.read_text() == "as before"
    assert {path.name for path in tmp_path.iterdir()} == {"LibriSpeech", "m.jsonl"}


def test_a_field_of_the_corpus_does_not_replace_ours():
    row = {"start": 1, "key": "k", "speaker": "s", "age": "", "up_votes": 2, "path": None, "x": float("nan"), None: ["more"]}
    assert corpora.others(row) == {"up_votes": 2}


def test_not_utf8_names_file_and_line(tmp_path):
    root = librispeech(tmp_path / "LibriSpeech") / "dev-clean"
    (root / "84/121123/84-121123.trans.txt").write_bytes(b"84-121123-0000 GO\n84-121123-0001 CAF\xc9\n")
    with pytest.raises(SystemExit, match=r"84-121123.trans.txt:2: byte 19 is not UTF-8: save the file as UTF-8"):
        run("librispeech", root, "--out", tmp_path / "m.jsonl")


def test_command_line(tmp_path):
    root = librispeech(tmp_path / "LibriSpeech")
    done = run_script("python", "prepare.py", "librispeech", root / "dev-clean", "--out", tmp_path / "m.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/m.jsonl: 3 clips of 2 speakers, 0.00 h; left out: 0 broken")
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}/no: No such file or directory$"):
        run("librispeech", tmp_path / "no", "--out", tmp_path / "m.jsonl")
    assert prepare.CORPORA.keys() == {"librispeech", "aishell", "commonvoice", "folder", "kaldi", "huggingface"}
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=rf"^error: {tmp_path}/file/m.left_out.txt: Not a directory$"):
        run("librispeech", root, "--out", tmp_path / "file" / "m.jsonl")
    with pytest.raises(SystemExit, match=r"--out m.txt: give it a name that ends in .jsonl"):
        run("librispeech", root, "--out", "m.txt")
