"""Manifests: several in one training, the names and the spelling of other projects, memory."""

import json
import tracemalloc

import pytest
from conftest import write_manifest

from manifest import Form, TextLines, read_manifest
from settings import InputError


def two(folder, second="b"):
    a = write_manifest(folder / "a.jsonl", [{"key": "a", "wav": "1.wav", "txt": "one"}, {"wav": "2.wav", "txt": "two"}])
    (folder / "other").mkdir(exist_ok=True)
    (folder / "other" / "3.wav").touch()
    return [a, write_manifest(folder / "other" / "b.jsonl", [{"key": second, "wav": "3.wav", "txt": "three"}])]


def test_several_manifests_are_one_and_each_has_its_own_folder(tmp_path):
    manifest = read_manifest(two(tmp_path))
    assert [record.txt for record in manifest] == list(manifest.texts()) == ["one", "two", "three"]
    assert manifest[2].wav == tmp_path / "other" / "3.wav"
    assert [record.where.rsplit("/")[-1] for record in manifest] == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]
    assert manifest[-1] == manifest[2]
    assert str(manifest) == f"{tmp_path / 'a.jsonl'} {tmp_path / 'other' / 'b.jsonl'}"


def test_a_key_may_stand_in_two_manifests_but_not_twice_in_one(tmp_path):
    paths = two(tmp_path, second="a")
    assert len(read_manifest(paths)) == 3
    paths[1].write_text(2 * paths[1].read_text())
    with pytest.raises(InputError, match=r"b.jsonl:2: key 'a' was seen before, on line 1: give each line its own"):
        read_manifest(paths)


def test_an_error_in_the_second_manifest_names_it(tmp_path):
    paths = two(tmp_path)
    with paths[1].open("a") as file:
        file.write("\n{\n")
    with pytest.raises(InputError, match=r"b.jsonl:3: not JSON at column"):
        read_manifest(paths)
    with pytest.raises(InputError, match=r"none.jsonl: cannot read the manifest"):
        read_manifest([paths[0], tmp_path / "none.jsonl"])


def test_fields_and_spelling_of_other_projects(tmp_path):
    line = {"path": "a.wav", "sentence": "Hello , World! It's ÄTNA.", "id": 3}
    path = write_manifest(tmp_path / "m.jsonl", [line])
    form = Form("path", "sentence", lowercase=True, ignore=",.!")
    manifest = read_manifest(path, form=form)
    assert manifest[0].txt == next(manifest.texts()) == "hello world it's ätna"
    assert manifest[0].key == "a.wav"
    (tmp_path / "t.txt").write_text("Hello , You!\n", encoding="utf-8")
    assert TextLines(tmp_path / "t.txt", form)[0] == "hello you"
    with pytest.raises(InputError, match=r'm.jsonl:1: field "wav" is missing'):
        read_manifest(path)
    with pytest.raises(InputError, match=r'm.jsonl:1: field "text" is missing: it holds the transcript'):
        read_manifest(path, form=Form("path", "text"))


def test_a_line_with_something_behind_its_object_is_refused(tmp_path):
    """The fast scanner stops at the end of the first value, whatever comes behind."""
    (tmp_path / "m.jsonl").write_text('{"wav": "a.wav", "txt": "a"} {"wav": "b.wav", "txt": "b"}\n')
    with pytest.raises(InputError, match=r"m.jsonl:1: not JSON at column 30 \(Extra data\)"):
        read_manifest(tmp_path / "m.jsonl")
    (tmp_path / "m.jsonl").write_text(' \t{"wav": "a.wav", "txt": "a"} \r\n')
    assert read_manifest(tmp_path / "m.jsonl")[0].txt == "a"


def test_lines_of_one_file_may_be_its_parts(tmp_path):
    """The default key was the file's name, so that two parts of one file were refused as the same key twice."""
    times = [{}, {"start": 1.5, "end": 3.25}, {"start": 3.25}, {"end": 2}, {"start": None, "duration": 9}]
    lines = [{"wav": "a.wav", "txt": "a"} | part for part in times]
    lines[-1]["key"] = "own"
    manifest = read_manifest(write_manifest(tmp_path / "m.jsonl", lines))
    assert [r.key for r in manifest] == ["a.wav", "a.wav-1500-3250", "a.wav-3250-end", "a.wav-0-2000", "own"]
    parts = [(None, None), (1.5, 3.25), (3.25, None), (None, 2), (None, None)]
    assert [record.part for record in manifest] == [(manifest[0].wav, *part) for part in parts]
    assert [record.duration for record in manifest] == [None, 1.75, None, 2, 9]
    assert manifest.durations[1] == 1.75  # so no header is read


@pytest.mark.parametrize(
    "part",
    ['"start": -1', '"start": "1"', '"start": 2, "end": 2', '"end": 0', '"end": 1e999', '"start": NaN', '"end": [1]'],
)
def test_a_part_that_is_none_is_refused(tmp_path, part):
    (tmp_path / "m.jsonl").write_text(f'{{"wav": "a.wav", "txt": "a", {part}}}\n')
    with pytest.raises(InputError, match=r'm.jsonl:1: "start" and "end" must be numbers of seconds in the file'):
        read_manifest(tmp_path / "m.jsonl")


def test_a_line_costs_some_forty_bytes_of_memory(tmp_path):
    """A record as a Python object takes 700 bytes: a million lines once were 700 MB, and that in every data worker."""
    path, lines = tmp_path / "m.jsonl", 20_000
    with path.open("w") as file:
        for i in range(lines):
            file.write(json.dumps({"key": f"k{i}", "wav": f"{i}.wav", "txt": "some words " * 5, "duration": 3.5}) + "\n")
    tracemalloc.start()
    manifest = read_manifest(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(manifest) == lines
    assert 20 * lines < kept < 40 * lines
    assert peak < 100 * lines  # while keys are sorted
