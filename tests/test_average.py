"""The mean of checkpoints: what is written, and what cannot be averaged."""

import json

import pytest
import torch
from conftest import build_system
from safetensors import SafetensorError
from safetensors.torch import load_file

import average
from transcriber import Transcriber


@pytest.fixture
def two(tiny, tmp_path):
    """Two checkpoints of one system, the second with other weights."""
    model = build_system(tiny.qwen2, tiny.whisper, splice="tokens").model
    model.save_checkpoint(tmp_path / "a")
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(torch.randn_like(p))
    model.settings["llm_reads"] = True
    model.save_checkpoint(tmp_path / "b")
    return str(tmp_path / "a"), str(tmp_path / "b")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("weights", "share"), [(None, 0.5), ([1, 3], 0.75)])
def test_the_mean_is_a_checkpoint(two, tmp_path, weights, share, order):
    out = tmp_path / "mean"
    average.average(two[::order], weights and weights[::order], out)
    a, b, mean = (load_file(f"{folder}/model.safetensors") for folder in (*two, out))
    for name, value in mean.items():
        torch.testing.assert_close(value, (1 - share) * a[name] + share * b[name])
    found = Transcriber.from_checkpoint(out, device="cpu")
    assert found.decoder == "joint"  # one of them has read
    torch.testing.assert_close(found.model.ctc.blank.detach(), mean["ctc.blank"])


def test_half_the_size(two, tmp_path):
    average.main([*two, "--out", str(tmp_path / "mean"), "--dtype", "bfloat16"])
    assert {value.dtype for value in load_file(tmp_path / "mean/model.safetensors").values()} == {torch.bfloat16}


def test_a_full_disk_is_one_line_and_leaves_no_partial(two, tmp_path, monkeypatch):
    """safetensors tells of it as an error of its own: once a bare traceback."""

    def full(_, path, **__):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(average, "save_file", full)
    with pytest.raises(SystemExit, match=r"error: .*mean: cannot write .*No space left on device"):
        average.main([*two, "--out", str(tmp_path / "mean")])
    assert [file.name for file in (tmp_path / "mean").iterdir()] == ["config.json"]


def test_what_cannot_be_averaged_is_said_in_one_line(two, tiny, tmp_path):
    a, b = two
    build_system(tiny.qwen2, tiny.whisper).model.save_checkpoint(tmp_path / "frames")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.json").write_text((tmp_path / "a/config.json").read_text())
    (torn / "model.safetensors").write_bytes(b"no")
    for arguments, message in [
        ([a, b], "error: give checkpoints, and --out, the folder for their mean"),
        (["--out", "x"], "error: give checkpoints, and --out, the folder for their mean"),
        ([a, b, "--out", b], f"error: --out {b} is one of the checkpoints: it would be overwritten"),
        ([a, b, "--out", "x", "--weights", "1"], "error: --weights: 1 for 2 checkpoints"),
        ([a, b, "--out", "x", "--weights", "1", "-1"], "error: --weights must be numbers with a sum above 0"),
        ([a, f"{tmp_path}/frames", "--out", "x"], f"error: {tmp_path}/frames and {a} are of different systems: "),
        ([a, f"{torn}", "--out", "x"], f"error: {torn}/model.safetensors: not a readable safetensors file"),
        ([a, b, "--out", f"{a}/config.json/x"], f"error: {a}/config.json/x: cannot write ("),
        ([a, "nowhere", "--out", "x"], "error: nowhere is not a checkpoint: no such file or folder"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            average.main(arguments)
        assert stopped.value.code.startswith(message)
        assert "\n" not in stopped.value.code
    assert json.loads((tmp_path / "a/config.json").read_text())["llm_reads"] is False
