"""Several processes, several machines: the loss of one, whoever has which clip; ZeRO-3 shards and saves what is trained."""

import json
import os
import signal
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, ROOT, run_script, write_clip, write_manifest
from jobs import Job, die, free_port
from safetensors.torch import load_file
from test_resume import assert_same, at_step
from test_train import TOKENS, arguments, losses

import resume
import train
import zero3
from settings import InputError

ZERO3 = ("--deepspeed", "ds_config_zero3.json")


def four_clips(tiny, tmp_path):
    items = [clip | {"wav": str(tiny.root / clip["wav"]), "txt": f"t{i}"} for i, clip in enumerate(tiny.clips[:4])]
    return ("--data_path", write_manifest(tmp_path / "four.jsonl", items))


def test_an_optimizer_in_the_deepspeed_config_is_refused():
    """Many published configurations have one; then the Trainer has none of its own, and a traceback came."""
    config = SimpleNamespace(config={"optimizer": {"type": "AdamW"}})
    with pytest.raises(InputError, match=r'^ds\.json: leave "optimizer" out'):
        zero3.check(SimpleNamespace(deepspeed="ds.json", hf_deepspeed_config=config))


def watch(report):
    """Writes what this process holds of the LLM between two steps, and what a step and a save gather."""
    from deepspeed.comm.torch import TorchBackend

    gathered, seen = [0], {}

    def counting(collective):
        def counted(self, *args, **kwargs):
            output = args[0] if args else next(iter(kwargs.values()))
            gathered[0] += sum(t.numel() for t in output) if isinstance(output, list) else output.numel()
            return collective(self, *args, **kwargs)

        return counted

    for name in ("all_gather_into_tensor", "all_gather", "all_gather_coalesced", "broadcast"):
        setattr(TorchBackend, name, counting(getattr(TorchBackend, name)))

    def measured(name, method):
        def measures(self, *args, **kwargs):
            before = gathered[0]
            result = method(self, *args, **kwargs)
            frozen = [p for p in self.model.llm.parameters() if not p.requires_grad]
            seen[name] = gathered[0] - before
            seen["llm"] = sum(p.ds_numel for p in frozen)
            seen["held"] = sum(p.numel() if p.ds_persist else p.numel() + p.ds_tensor.numel() for p in frozen)
            seen["trained"] = sum(p.ds_numel for p in self.model.trainable().values())
            Path(f"{report}.{self.args.process_index}").write_text(json.dumps(seen))
            return result

        return measures

    for name, method in (("step", "training_step"), ("save", "_save_checkpoint")):
        setattr(train.SpeechTrainer, method, measured(name, getattr(train.SpeechTrainer, method)))


def frozen_bytes(tiny):
    """Of each frozen matrix that is not constant the bytes of its first 64 values and of its last."""
    llm = load_file(tiny.qwen2 / "model.safetensors")
    whisper = torch.load(tiny.whisper, weights_only=True)["model_state_dict"]
    encoder = {name: value for name, value in whisper.items() if name.startswith("encoder.conv")}
    for name, value in (llm | encoder).items():
        flat = value.float().flatten()
        if len(flat) >= 128 and flat.min() != flat.max():
            yield name, flat[:64].numpy().tobytes()
            yield name, flat[-64:].numpy().tobytes()


@pytest.mark.parametrize("splice", [("--splice", "frames"), (*TOKENS, "2", "--lora_r", "2")])
def test_zero3_shards_and_saves_only_what_is_trained(tiny, tmp_path, splice):
    """Loss within 1e-4 of one process with the same global batch, in both phases; the LLM lies in halves, a save gathers
    what is trained and no more, no file of a checkpoint has a frozen weight, recognize.py decodes from it, and a run that
    was killed goes on bit for bit. The zero gradients of the align phase had spent the optimizer's bias correction: the
    first steps of LoRA and soft prompt were not those of one process.
    """
    flags = ("--max_steps", "5", *four_clips(tiny, tmp_path), *splice)
    train.main(arguments(tiny, tmp_path / "one", *map(str, flags), "--per_device_train_batch_size", "4"))
    job = Job(arguments(tiny, tmp_path / "two", *flags, *ZERO3), tmp_path / "logs", 2, partial(watch, tmp_path / "seen"))
    assert job.wait() == [0, 0], job.output()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen.{rank}").read_text())
        assert 0.5 * seen["llm"] <= seen["held"] < 0.52 * seen["llm"]  # norms and biases are held by both
        assert seen["step"] > 0.9 * seen["llm"]  # the count does see the LLM, where it is gathered
        assert seen["save"] < 1.1 * seen["trained"]
    checkpoint = tmp_path / "two" / "checkpoint-4"
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    assert sum(file.name.endswith("_optim_states.pt") for file in files) == 2
    needles = list(frozen_bytes(tiny))
    assert any(needle in (tiny.qwen2 / "model.safetensors").read_bytes() for _, needle in needles)
    for file in files:
        content = file.read_bytes()
        assert not [name for name, needle in needles if needle in content], file
    trained = sum(tensor.numel() for tensor in load_file(checkpoint / "model.safetensors").values())
    assert sum(file.stat().st_size for file in files) < trained * (4 + 3 * 4) * 1.1 + 2e5
    done = run_script(
        *("python", "recognize.py", "--checkpoint", checkpoint, "--data_path", tmp_path / "four.jsonl"),
        *("--result_path", tmp_path / "result.txt", "--max_new_tokens", "4"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split(" ")[0] for line in (tmp_path / "result.txt").read_text().splitlines()] == [
        clip["key"] for clip in tiny.clips[:4]
    ]
    if splice[1] == "tokens":
        argv = arguments(tiny, tmp_path / "cut", *flags, *ZERO3)
        assert -signal.SIGKILL in Job(argv, tmp_path / "logs", 2, partial(at_step, 3, die, 1)).wait()
        job = Job(argv, tmp_path / "logs", 2)
        assert job.wait() == [0, 0], job.output()
        assert f"continuing from {tmp_path / 'cut' / 'checkpoint-2'}" in job.output()
        assert_same(tmp_path / "cut", tmp_path / "two")
    next(checkpoint.glob("global_step4/*rank_1*_optim_states.pt")).unlink()
    assert resume.flaw(checkpoint) == "1 of 2 *_optim_states.pt in global_step4"


def deaf(rank):
    """On this rank every frame is blank."""
    import ctc

    if int(os.environ["RANK"]) != rank:
        return
    log_probs_of, soft_tokens = ctc.CTCHead.forward, ctc.CTCHead.soft_tokens

    def forward(self, vectors):
        log_probs = log_probs_of(self, vectors)
        bump = torch.zeros(log_probs.shape[-1])
        bump[-1] = 1e4
        return (log_probs + bump).log_softmax(-1)

    def counted(self, *args):
        soft, count = soft_tokens(self, *args)
        print(f"{soft.shape[1]} soft tokens", flush=True)
        return soft, count

    ctc.CTCHead.forward, ctc.CTCHead.soft_tokens = forward, counted


@pytest.mark.parametrize("deepspeed", [(), ZERO3])
def test_no_process_waits_for_anothers_data(tiny, tmp_path, deepspeed):
    """One reads half a second, the other 29 s with nothing but blanks, beside texts that one has and the other has not."""
    items = []
    for i, seconds in enumerate((0.5, 29, 0.4, 28)):
        write_clip(tmp_path / f"{i}.wav", seconds, seed=i)
        items.append({"wav": f"{i}.wav", "txt": "ab"})
    flags = ("--data_path", write_manifest(tmp_path / "m.jsonl", items), "--per_device_train_batch_size", "1")
    (tmp_path / "texts.txt").write_text("ab\nba\nabba\n")
    flags += (*TOKENS, "1", "--max_steps", "4", "--text_data_path", tmp_path / "texts.txt", "--text_share", "0.4")
    job = Job(arguments(tiny, tmp_path / "o", *flags, *deepspeed), tmp_path / "logs", 2, partial(deaf, 1))
    assert job.wait() == [0, 0], job.output()
    assert "\n0 soft tokens" in job.logs[1].read_text()
    assert all(0 < loss < 1e5 for loss in losses(tmp_path / "o")), losses(tmp_path / "o")


def test_two_machines_train_as_one(tiny, tmp_path):
    """Two torchrun agents over loopback: the loss of one process (1e-4); what the second machine wrote can be told by its
    umask: of all files in --output_dir, only its own random state.
    """
    flags = ("--max_steps", "3", *four_clips(tiny, tmp_path), *TOKENS, "1")
    train.main(arguments(tiny, tmp_path / "one", *map(str, flags), "--per_device_train_batch_size", "4"))
    command = [Path(sys.executable).with_name("torchrun"), "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "train.py"]
    command += arguments(tiny, tmp_path / "two", *flags)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    machines = []
    for machine, umask in enumerate((0o022, 0o077)):
        with open(tmp_path / f"machine{machine}.log", "w") as log:
            machines.append(
                subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=log, stderr=log, umask=umask, env=env)
            )
    try:
        status = [machine.wait(150) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    logs = [(tmp_path / f"machine{machine}.log").read_text() for machine in range(2)]
    assert status == [0, 0], "\n".join(logs)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert sorted(log.count("parameters\n") for log in logs) == [0, 1]  # one speaks
    files = [path for path in (tmp_path / "two").rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix != ".safetensors"]  # these are private, whatever the umask
    private = {p.relative_to(tmp_path / "two") for p in files if not stat.S_IMODE(p.stat().st_mode) & 0o044}
    open_ = {p.relative_to(tmp_path / "two") for p in files} - private
    own, shared = sorted((private, open_), key=len)  # which agent came first had rank 0
    assert sorted(map(str, own)) == [f"checkpoint-{n}/rng_state_1.pth" for n in (2, 3)]
    assert {"checkpoint-2/rng_state_0.pth", "config.json"} <= set(map(str, shared))


def another_disk(folder):
    if os.environ["RANK"] == "1":
        resume._same_disk = partial(lambda inner, path, owner: inner(folder / path.name, owner, 1), resume._same_disk)


def test_a_machine_that_does_not_share_the_disk_is_told(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    argv = arguments(tiny, tmp_path / "o", "--max_steps", "1")
    job = Job(argv, tmp_path / "logs", 2, partial(another_disk, tmp_path / "mine"))
    assert job.wait() == [1, 1]
    assert "is not that of the first process: --output_dir must be on a disk that all machines share" in job.output()


def test_real_models_lose_alike_on_one_process_and_two(real, tmp_path):
    """Whisper tiny.en and SmolLM2-135M in float32, a step of each phase: DDP and ZeRO-3 within 1e-5 of one process."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").open()]
    rows = [row | {"wav": str(DATA / row["wav"])} for row in rows if 1 < row["duration"] < 1.4][:4]
    flags = [
        *("--llm_model_name_or_path", real.llm, "--whisper_model_name_or_path", real.whisper, "--align_steps", "1"),
        *("--data_path", write_manifest(tmp_path / "four.jsonl", rows), "--max_steps", "2", "--logging_steps", "1"),
        *("--learning_rate", "3e-4", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True"),
    ]
    found = {}
    for name, ranks, more in (("one", 1, ()), ("ddp", 2, ()), ("zero3", 2, ZERO3)):
        batch = ("--per_device_train_batch_size", 4 // ranks, "--output_dir", tmp_path / name)
        job = Job([*flags, *batch, *more], tmp_path / "logs", ranks)
        assert job.wait(300) == [0] * ranks, job.output()
        found[name] = losses(tmp_path / name)
    assert len(found["one"]) == 2
    assert found["ddp"] == pytest.approx(found["one"], rel=1e-5)
    assert found["zero3"] == pytest.approx(found["one"], rel=1e-5)
