"""Decoding: no line is lost, none comes twice, the order is the manifest's, whatever the input."""

import json
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, ROOT, audio, build_system, run_script, write_clip, write_manifest
from test_dataset import bad_audio

import decoding
import recognize
from longform import Piece, cut
from manifest import Record
from settings import InputError, ModelArguments
from transcriber import SPARE_TOKENS, DecodeArguments, Transcriber
from transcript import Hypothesis

UNGUARDED = SimpleNamespace(guard="off")


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    build_system(tiny.qwen2, tiny.whisper).model.save_checkpoint(folder)
    return folder


def options(trained, manifest, result, **more):
    return ModelArguments(checkpoint=str(trained)), DecodeArguments(
        data_path=str(manifest), result_path=[str(result)], num_beams=1, device="cpu", **({"guard": "off"} | more)
    )


@pytest.fixture
def echo(monkeypatch):
    """Texts that say how many seconds were decoded: a random model's own may be empty."""
    said = lambda self, clips: [Hypothesis(f"{len(clip) / RATE:.1f}") for clip in clips]  # noqa: E731
    monkeypatch.setattr(Transcriber, "hypotheses", said)


def lines(path):
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def test_one_line_for_each_record_in_manifest_order(tiny, trained, tmp_path):
    code = recognize.run(*options(trained, tiny.manifest, tmp_path / "sub" / "result.txt", batch_size=2))
    assert code == 0
    assert [line.split(" ")[0] for line in lines(tmp_path / "sub" / "result.txt")] == [c["key"] for c in tiny.clips]
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["result.txt"]


@pytest.mark.parametrize("num_beams", [2, 3])
def test_text_depends_neither_on_batch_size_nor_company(tiny, trained, num_beams):
    transcriber = Transcriber.from_checkpoint(trained, num_beams=num_beams, device="cpu")
    clips = [audio(s, i) for i, s in enumerate((0.5, 2.0, 1.3))]
    together = transcriber.transcribe(clips)
    assert any(together)
    assert together == [transcriber.transcribe([clip])[0] for clip in clips]
    assert together[::-1] == transcriber.transcribe(clips[::-1])


BAD = [
    ("missing", "no such file"),
    ("empty", "is empty"),
    ("text", "not audio"),
    ("directory", "is a directory"),
    ("nan", "NaN or infinite"),
    ("none", "has no samples"),
    ("short", "shorter than one projector window"),
]


def test_bad_clips_get_an_empty_line_a_report_and_exit_code_1(tiny, trained, tmp_path, capsys, echo):
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), RATE)
    write_clip(tmp_path / "short.wav", 0.08)
    items = [{"key": "first", "wav": str(tiny.root / "0.wav")}]
    for kind, _ in BAD:
        path = bad_audio(tmp_path, kind) if kind not in ("none", "short") else tmp_path / f"{kind}.wav"
        items.append({"key": kind, "wav": str(path)})
    items.append({"key": "last", "wav": str(tiny.root / "1.wav")})
    manifest = write_manifest(tmp_path / "m.jsonl", items)
    assert recognize.run(*options(trained, manifest, tmp_path / "r.txt")) == 1
    out, err = capsys.readouterr()
    written = dict(line.split(" ", 1) for line in lines(tmp_path / "r.txt"))
    assert list(written) == [item["key"] for item in items]
    assert f"{len(items)} files, 0.00 h, RTFx " in out
    assert f"{len(BAD)} failed (" in out
    assert all(why in out for _, why in BAD)
    for kind, why in BAD:
        assert written[kind] == ""
        assert any(line.startswith(f"{kind}: ") and why in line for line in err.splitlines()), err
    assert (written["first"], written["last"]) == ("1.0", "1.7")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_truncated_file_is_decoded_as_far_as_it_goes_and_reported(trained, tmp_path, capsys, echo, suffix):
    whole = write_clip(tmp_path / f"w.{suffix}", 3.0).read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
    manifest = write_manifest(tmp_path / "m.jsonl", [{"key": "a", "wav": f"cut.{suffix}"}])
    assert recognize.run(*options(trained, manifest, tmp_path / "r.txt")) == 1
    assert 0.5 < float(lines(tmp_path / "r.txt")[0].removeprefix("a ")) < 2
    assert "truncated" in (err := capsys.readouterr().err) or "corrupt after" in err


def test_a_part_is_decoded_and_one_that_the_file_cuts_off_is_reported(trained, tmp_path, capsys, echo):
    write_clip(tmp_path / "a.wav", 3.0)
    parts = [{"start": 0.5, "end": 1.2}, {"start": 2.0, "end": 4.0}, {"start": 5, "end": 6}, {"start": 1.5}]
    manifest = write_manifest(tmp_path / "m.jsonl", [{"wav": "a.wav"} | part for part in parts])
    assert recognize.run(*options(trained, manifest, tmp_path / "r.txt")) == 1
    keys = ["a.wav-500-1200 0.7", "a.wav-2000-4000 1.0", "a.wav-5000-6000 ", "a.wav-1500-end 1.5"]
    assert lines(tmp_path / "r.txt") == keys
    out, err = capsys.readouterr()
    assert "2 failed" in out
    assert "ends 1.00 s before its part does, at 4 s" in err


def test_the_number_of_new_tokens_is_bounded_by_the_duration(trained):
    """A model that never stops by itself: half a second and three of silence yield exactly what they are allowed."""
    transcriber = Transcriber.from_checkpoint(trained, num_beams=1, device="cpu")
    head = transcriber.model.llm.get_output_embeddings()
    head.register_forward_hook(
        lambda module, inputs, logits: torch.nn.functional.one_hot(torch.tensor(65), 259) + 0 * logits
    )
    texts = transcriber.transcribe([np.zeros(RATE // 2, np.float32), np.zeros(3 * RATE, np.float32)])
    letter = transcriber.prompt.tokenizer.decode([65])
    assert texts == [letter * (6 + SPARE_TOKENS), letter * (36 + SPARE_TOKENS)]


@pytest.mark.parametrize("seconds", [0.05, 31.0])
def test_the_python_interface_refuses_clips_it_cannot_take(trained, seconds):
    with pytest.raises(InputError, match=r"must be one projector window to 30 s long, not (0\.05|31\.00) s"):
        Transcriber.from_checkpoint(trained, device="cpu").transcribe([audio(1.0), audio(seconds)])
    with pytest.raises(InputError, match="must be a list of float arrays"):
        Transcriber.from_checkpoint(trained, device="cpu").transcribe(audio(seconds))


def killed_in_batch(number):
    """A `decode` that is interrupted in the batch of that number, from 1."""
    real, calls = decoding.decode, []

    def decode(transcriber, clips):
        calls.append(len(clips))
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(transcriber, clips)

    return decode


def test_failed_clips_are_tried_again_by_the_next_run(tiny, trained, tmp_path, monkeypatch, echo):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"key": "a", "wav": "a.wav"}, {"key": "b", "wav": "b.wav"}])
    write_clip(tmp_path / "b.wav", 1.0)
    real = decoding.decode
    monkeypatch.setattr(decoding, "decode", killed_in_batch(1))
    with pytest.raises(KeyboardInterrupt):
        recognize.run(*options(trained, manifest, tmp_path / "r.txt", batch_size=1))
    assert "no such file" in (tmp_path / "r.txt.partial").read_text()
    monkeypatch.setattr(decoding, "decode", real)
    write_clip(tmp_path / "a.wav", 1.0)
    assert recognize.run(*options(trained, manifest, tmp_path / "r.txt", batch_size=1)) == 0
    assert lines(tmp_path / "r.txt") == ["a 1.0", "b 1.0"]


def test_a_long_file_is_decoded_in_pieces_and_joined(trained, tmp_path):
    write_clip(tmp_path / "long.wav", 65)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"key": "long", "wav": "long.wav"}])
    assert recognize.run(*options(trained, manifest, tmp_path / "r.txt", batch_size=2, max_new_tokens=5)) == 0
    transcriber = Transcriber.from_checkpoint(trained, num_beams=1, device="cpu", max_new_tokens=5)
    pieces = [piece.audio for piece in cut([soundfile.read(tmp_path / "long.wav", dtype="float32")[0]])]
    assert len(pieces) >= 3
    assert lines(tmp_path / "r.txt") == ["long " + " ".join(filter(None, transcriber.transcribe(pieces)))]


def says_lengths(batches):
    """A transcriber whose texts are lengths in samples; it notes its batches."""

    def hypotheses(clips):
        batches.append([len(clip) for clip in clips])
        return [Hypothesis(str(len(clip))) for clip in clips]

    args = SimpleNamespace(guard="off", vad="none")
    return SimpleNamespace(hypotheses=hypotheses, usable=lambda audio: len(audio) > 0, args=args)


def in_seconds(monkeypatch, lengths):
    """Records of which each is pieces of so many seconds; and a list of those that were read."""
    read = []

    def pieces_of(key):
        read.append(key)
        ends = np.cumsum(lengths[int(key)])
        starts = [0, *ends[:-1]]
        sounds = [Piece(float(s), np.zeros(int((e - s) * RATE), np.float32)) for s, e in zip(starts, ends, strict=True)]

        class Pieces(list):
            problem, seconds = "", float(ends[-1])

        return Pieces(sounds)

    monkeypatch.setattr(decoding, "Pieces", lambda wav, *part, vad: pieces_of(wav))
    return (Record(str(i), str(i), None, None, "") for i in range(len(lengths))), read


def test_like_lengths_stand_together_in_batches_of_bounded_duration(monkeypatch):
    """At most so many clips, and so many seconds with their padding; a clip longer than that stands alone."""
    records, _ = in_seconds(monkeypatch, [[1], [9], [2], [1], [9], [30], [2], [1]])
    batches = []
    list(decoding.recognize(says_lengths(batches), records, batch_size=3, batch_seconds=20, window_batches=9))
    assert [[length // RATE for length in batch] for batch in batches] == [[30], [9, 9], [2, 2, 1], [1, 1]]
    parts = [decoding.Part(None, Piece(0.0, np.zeros(RATE)))] * 5
    assert [len(batch) for batch in decoding.batches(parts, 3, float("inf"))] == [3, 2]  # was an OverflowError


def test_a_recording_longer_than_what_is_read_ahead_is_joined_in_order(monkeypatch):
    """Its pieces are decoded longest first, in windows of 20 s; short ones beside it do not wait for its end."""
    lengths = [[3], [1, 5, 2, 9, 8, 4, 7, 6], [2]]
    records, _ = in_seconds(monkeypatch, lengths)
    found = list(decoding.recognize(says_lengths([]), records, batch_size=2, batch_seconds=10, window_batches=2))
    assert [outcome.key for outcome in found] == ["0", "1", "2"]
    whole = found[1].transcript
    assert whole.text == " ".join(str(length * RATE) for length in lengths[1])
    assert [segment.start for segment in whole.segments] == [0, 1, 6, 8, 17, 25, 29, 36]
    assert whole.duration == 42


def test_no_more_is_read_than_two_windows(monkeypatch):
    """However many records there are: one window is decoded, the next is read meanwhile. They were all held in memory."""
    records, read = in_seconds(monkeypatch, [[5]] * 1000)
    found = decoding.recognize(says_lengths([]), records, batch_size=4, batch_seconds=20, window_batches=2)
    for done in range(1, 101):
        next(found)
        assert len(read) <= done + 2 * 9
    found.close()


def test_of_a_long_recording_no_more_is_held_than_two_windows():
    """What was decoded of it was kept, audio and all, until its end: memory grew with its length."""
    made = []

    class Pieces:
        problem, seconds = "", 400.0

        def __iter__(self):
            for start in range(0, 400, 2):
                piece = Piece(float(start), np.zeros(2 * RATE, np.float32))
                made.append(weakref.ref(piece.audio))
                yield piece

    transcriber, held = says_lengths([]), []
    transcriber.hypotheses = lambda clips: (
        held.append(sum(ref() is not None for ref in made)) or [Hypothesis("a") for _ in clips]
    )
    record = Record("0", "0", None, None, "")
    found = decoding.recognize(transcriber, [record], 4, 8, window_batches=1, pieces_of=lambda record: Pieces())
    (outcome,) = found
    assert len(outcome.transcript.segments) == 200
    assert max(held) <= 2 * 4 + 2 * 4


def test_a_long_file_of_nothing_but_silence_has_an_empty_text_and_no_problem(trained, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(65 * RATE, np.float32), RATE)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"key": "a", "wav": "silence.wav"}])
    assert recognize.run(*options(trained, manifest, tmp_path / "r.txt")) == 0
    assert lines(tmp_path / "r.txt") == ["a "]


def test_a_hypothesis_is_one_line(trained):
    transcriber = Transcriber.from_checkpoint(trained, num_beams=1, device="cpu")
    ids = transcriber.prompt.tokenizer("a\tb\n\nc", add_special_tokens=False).input_ids
    assert transcriber._text([*ids, 258, 65, 65]) == "a b c"


def fake(limit: int):
    """A transcriber that runs out of memory on more than `limit` clips, and on a clip of one sample."""

    def hypotheses(clips):
        calls.append(len(clips))
        if len(clips) > limit or any(len(clip) == 1 for clip in clips):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return [Hypothesis(f"text{len(clip)}") for clip in clips]

    calls: list[int] = []
    return SimpleNamespace(hypotheses=hypotheses, calls=calls, args=SimpleNamespace(guard="off"))


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_known_on_every_device(error):
    assert decoding.out_of_memory(error)


def test_out_of_memory_halves_the_batch_and_at_one_reports():
    transcriber = fake(limit=2)
    clips = [np.zeros(n) for n in (5, 6, 1, 7, 8)]
    found = decoding.decode(transcriber, clips)
    assert [f.text for f in found if f is not found[2]] == ["text5", "text6", "text7", "text8"]
    assert isinstance(found[2], InputError)
    assert str(found[2]) == "out of memory on 0.0 s alone"
    assert transcriber.calls[0] == 5


def test_other_errors_are_bugs_and_stay_loud():
    def broken(clips):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        decoding.decode(SimpleNamespace(hypotheses=broken, args=SimpleNamespace(guard="off")), [np.zeros(9)])


def test_a_killed_run_continues_no_line_twice_none_lost(tiny, trained, tmp_path, monkeypatch, capsys):
    result = tmp_path / "r.txt"
    arguments = options(trained, tiny.manifest, result, batch_size=2)
    recognize.run(*arguments)
    expected = lines(result)
    result.unlink()
    real, decoded = decoding.decode, []
    monkeypatch.setattr(decoding, "decode", killed_in_batch(2))
    with pytest.raises(KeyboardInterrupt):
        recognize.run(*arguments)
    partial = tmp_path / "r.txt.partial"
    with partial.open("a") as file:
        file.write('[2, {"key": "clip2", "text": "half a li')  # cut off in the middle of a write
    decoded = []
    monkeypatch.setattr(decoding, "decode", lambda t, clips: decoded.extend(map(len, clips)) or real(t, clips))
    assert not result.exists()
    recognize.run(*arguments)
    assert "continuing: 2 of 5 are done" in capsys.readouterr().err
    assert [round(samples / RATE, 2) for samples in decoded] == [1.23, 1.0, 0.61]  # the longest two were done
    assert lines(result) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["r.txt"]


def test_another_run_does_not_continue_from_a_foreign_partial_file(tiny, trained, tmp_path, capsys):
    (tmp_path / "r.txt.partial").write_text(json.dumps({"weights": "other"}) + '\n["clip0", "stale", "", 1.0]\n')
    recognize.run(*options(trained, tiny.manifest, tmp_path / "r.txt"))
    assert "continuing" not in capsys.readouterr().err
    assert "stale" not in (tmp_path / "r.txt").read_text()


@pytest.mark.parametrize("name", ["{key}.txt", "book/1.txt"])
def test_a_result_never_lies_among_the_transcriptions(tiny, trained, tmp_path, name):
    """`--result_path corpus/transcriptions/{key}.txt` put what was heard in the place of what was said."""
    for part, ending in (("audio", ".wav"), ("transcriptions", ".txt")):
        (tmp_path / part / "book").mkdir(parents=True)
        (tmp_path / part / "book" / f"1{ending}").write_bytes(b"what was said")
    with pytest.raises(InputError, match="lies among the transcriptions: they would be overwritten"):
        recognize.run(*options(trained, tmp_path, tmp_path / "transcriptions" / name))
    assert (tmp_path / "transcriptions" / "book" / "1.txt").read_text() == "what was said"


def test_a_result_never_takes_the_place_of_its_manifest(tiny, trained, tmp_path, monkeypatch):
    """`--data_path test.jsonl --result_path test.jsonl` put the result there, references lost."""
    manifest = tmp_path / "m.jsonl"
    manifest.write_bytes(tiny.manifest.read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is what is to be recognized: it would be overwritten"):
        recognize.run(*options(trained, manifest, "m.jsonl"))
    assert manifest.read_bytes() == tiny.manifest.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "no-such-folder", "--data_path", "MANIFEST"], "error: no-such-folder is not a checkpoint"),
        (["--checkpoint", "TRAINED"], "error: give audio files, folders or a manifest"),
        (
            ["--checkpoint", "TRAINED", "--data_path", "MANIFEST", "--beams", "3"],
            "error: unknown flags or values: --beams 3",
        ),
        (["--checkpoint", "TRAINED", "--data_path", "MANIFEST", "--device", "gpu"], "error: --device gpu cannot be used"),
        (
            ["--checkpoint", "TRAINED", "--data_path", "MANIFEST", "--llm_model_name_or_path", "LLAMA"],
            "error: TRAINED does not fit these models: llm.fingerprint",
        ),
        (["--checkpoint", "TRAINED", "--data_path", "MANIFEST", "--result_path", "/dev/null/r.txt"], "error: /dev/null"),
        (["--checkpoint", "TRAINED", "--data_path", "no.jsonl"], "error: no.jsonl: cannot read the manifest"),
        (["--checkpoint", "TRAINED", "--data_path", "MANIFEST", "--num_beams", "0"], "error: --num_beams must be"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny, trained, arguments, message):
    names = {"TRAINED": str(trained), "MANIFEST": str(tiny.manifest), "x.jsonl": str(tiny.manifest)}
    names["LLAMA"] = str(tiny.llama)
    with pytest.raises(SystemExit) as stop:
        recognize.main([names.get(a, a) for a in arguments])
    assert str(stop.value).startswith(message.replace("TRAINED", str(trained)))
    assert "\n" not in str(stop.value)


def test_a_mistake_leaves_one_line_on_stderr_and_exit_code_1():
    done = run_script("python", "recognize.py", "--checkpoint", "no-such-folder", "--data_path", "no.jsonl")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: no.jsonl: cannot read the manifest")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_enough_leaves_no_traceback(tiny, trained):
    """`recognize.py … | head -1` ended with a BrokenPipeError."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "recognize.py", "--checkpoint", trained, "--device", "cpu", tiny.root / "0.wav"]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "BrokenPipe" not in run.stderr


def test_a_screen_may_lack_letters(tiny, trained, tmp_path):
    """A name or text that the terminal's encoding does not have ended the run with a UnicodeEncodeError."""
    path = write_clip(tmp_path / "grüße.wav", 0.5)
    command = (sys.executable, "recognize.py", "--checkpoint", trained, "--num_beams", "1", path)
    run = run_script(*command, PYTHONIOENCODING="ascii")
    assert run.returncode == 0, run.stderr
    assert "gr\\xfc\\xdfe.wav" in run.stdout


def test_programs_import_what_they_need_from_here():
    """As the README does; it lives in other rooms."""
    assert recognize.Transcriber is Transcriber
    assert recognize.DecodeArguments is DecodeArguments
    assert recognize.recognize is decoding.recognize
    assert recognize.use_shipped


def test_files_on_the_command_line_are_recognized_onto_the_screen(tiny, trained, tmp_path, capsys, echo):
    """One line a file, in the order given; a bad one is reported and makes the exit code 1."""
    files = [str(tiny.root / "1.wav"), str(tmp_path / "no.wav"), str(tiny.root / "0.wav")]
    assert recognize.main([*files, "--checkpoint", str(trained), "--guard", "off", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"{files[0]} 1.7", f"{files[1]} ", f"{files[2]} 1.0"]
    assert f"{files[1]}: no such file" in said.err
