"""Training on tiny models: what it saves, how it resumes, the flags of older transformers, the published commands."""

import json
import os
import shutil

import pytest
import torch
from conftest import BF16, DATA, run_script, write_clip, write_manifest
from jobs import run_job
from safetensors.torch import load_file
from transformers import HfArgumentParser, WhisperConfig, WhisperModel

import train
from settings import InputError


def arguments(tiny, output, *more, llm=None):
    """Flags of a short training, with the frame splice unless `more` says otherwise."""
    frames = () if {"--splice", "--checkpoint", "--projector_model_path"} & set(more) else ("--splice", "frames")
    return [
        *("--llm_model_name_or_path", str(llm or tiny.qwen2), "--whisper_model_name_or_path", str(tiny.whisper)),
        *("--data_path", str(tiny.manifest), "--output_dir", str(output), "--per_device_train_batch_size", "2"),
        *("--learning_rate", "1e-3", "--logging_steps", "1", "--save_steps", "2", "--report_to", "none", "--disable_tqdm"),
        *("True", *frames, *more),
    ]


def losses(folder):
    return [e["loss"] for e in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in e]


def parse(*flags):
    parser = HfArgumentParser((train.TrainingArguments,))
    return parser.parse_args_into_dataclasses(train.current_flags(["--output_dir", "x", *flags]))[0]


def test_training_saves_only_the_projector_and_leaves_it_in_output_dir(tiny, tmp_path, capsys):
    train.main(arguments(tiny, tmp_path, "--max_steps", "4"))
    out = capsys.readouterr().out
    assert "projector: 0.10 M (÷ 1024²) parameters" in out
    assert "5 clips, 0.00 h" in out
    final = load_file(tmp_path / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(name.startswith("projector.") for name in final)
    assert all(torch.equal(final[name], last[name]) for name in final)
    assert (tmp_path / "config.json").read_bytes() == (tmp_path / "checkpoint-4" / "config.json").read_bytes()
    assert len(losses(tmp_path)) == 4


TOKENS = ("--splice", "tokens", "--align_steps")


@pytest.mark.parametrize(
    "order",
    [
        (),
        ("--group_by_length",),
        ("--spec_augment", "--speed_perturb", "--noise_snr", "20"),  # cut within an epoch: its augmentation goes on
        (*TOKENS, "5"),  # cut while aligning
        (*TOKENS, "3", "--lora_r", "2", "--spec_augment", "--speed_perturb", "--noise_snr", "20"),  # cut with the LLM
        (*TOKENS, "2", "--text_data_path", "texts.txt", "--projector_dropout", "0.1"),  # which text, borrowed from where
    ],
)
def test_it_resumes_by_itself_from_the_newest_complete_checkpoint(tiny, tmp_path, capsys, order):
    """The interrupted run's losses are the uninterrupted run's; an incomplete checkpoint is passed over.

    transformers' length-grouped sampler forgets its order on a resume: clips came twice or never in that epoch.
    """
    order = [str(tiny.root / flag) if flag == "texts.txt" else flag for flag in order]
    train.main(arguments(tiny, tmp_path / "whole", "--max_steps", "6", *order))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoint-6", "trainer_state.json", "model.safetensors", "config.json"):
        path = tmp_path / "cut" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    torn = tmp_path / "cut" / "checkpoint-6"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 6, "log_')
    capsys.readouterr()
    train.main(arguments(tiny, tmp_path / "cut", "--max_steps", "6", *order))
    assert f"continuing from {tmp_path / 'cut' / 'checkpoint-4'}" in capsys.readouterr().out
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_align_phase_and_llm_phase_are_one_run(tiny, tmp_path):
    """The first steps leave the soft prompt as its words; the later ones teach it."""
    train.main(arguments(tiny, tmp_path, *TOKENS, "2", "--max_steps", "4"))
    start, end = (load_file(tmp_path / f"checkpoint-{n}" / "model.safetensors") for n in (2, 4))
    assert not torch.equal(start["soft_prompt.weight"], end["soft_prompt.weight"])
    settings = json.loads((tmp_path / "config.json").read_text())
    words = train.Prompt.build(train.load_tokenizer(str(tiny.qwen2)), None, settings).word_ids
    table = load_file(tiny.qwen2 / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(start["soft_prompt.weight"], table[words])


def test_by_default_half_of_the_steps_align_and_none_from_a_checkpoint(tiny, tmp_path):
    words = ["--splice", "tokens", "--max_steps", "4"]
    train.main(arguments(tiny, tmp_path / "default", *words))
    train.main(arguments(tiny, tmp_path / "half", *words, "--align_steps", "2"))
    assert losses(tmp_path / "default") == losses(tmp_path / "half")
    assert json.loads((tmp_path / "default" / "config.json").read_text())["llm_reads"]
    more = ["--checkpoint", str(tmp_path / "half"), "--max_steps", "2"]
    train.main(arguments(tiny, tmp_path / "on", *more))
    train.main(arguments(tiny, tmp_path / "none", *more, "--align_steps", "0"))
    train.main(arguments(tiny, tmp_path / "one", *more, "--align_steps", "1"))
    assert losses(tmp_path / "on") == losses(tmp_path / "none") != losses(tmp_path / "one")


def test_each_epoch_is_augmented_anew(tiny, tmp_path, monkeypatch):
    """accelerate tells the epoch to the sampler alone where there are several processes or a resume: all were alike."""
    epochs = []
    monkeypatch.setattr(train.SpeechDataset, "set_epoch", lambda self, epoch: epochs.append(epoch))
    train.main(arguments(tiny, tmp_path, "--max_steps", "4"))
    epochs.clear()
    train.main(arguments(tiny, tmp_path, "--max_steps", "9"))  # goes on within the second epoch
    assert sorted(set(epochs)) == [1, 2]


def test_adapters_and_soft_prompt_meet_a_fresh_optimizer_after_the_align_phase(tiny, tmp_path):
    """Zero gradients while aligning spent Adam's bias correction: the first LLM steps were three times too large."""
    train.main(arguments(tiny, tmp_path, *TOKENS, "2", "--max_steps", "2", "--lora_r", "2", "--bf16", "True"))
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    assert len(state) == len([n for n in load_file(tmp_path / "model.safetensors") if n.startswith(("projector.", "ctc."))])


def test_a_text_that_the_ctc_cannot_spell_is_dropped_and_counted(tiny, tmp_path, capsys):
    """Fine-tuning on CAPITALS once taught a CTC of small letters to hear nothing but spaces."""
    train.main(arguments(tiny, tmp_path / "small", *TOKENS, "1", "--max_steps", "1"))
    items = [
        clip | {"wav": str(tiny.root / clip["wav"]), "txt": txt}
        for clip, txt in zip(tiny.clips[:2], ("TEXT", "text"), strict=True)
    ]
    more = ("--max_steps", "1", "--data_path", str(write_manifest(tmp_path / "m.jsonl", items)))
    train.main(arguments(tiny, tmp_path / "more", *more, "--checkpoint", str(tmp_path / "small")))
    assert "dropped 1 with characters that the CTC has no tokens for" in capsys.readouterr().out


def test_a_cached_encoder_trains_alike_and_runs_once(tiny, tmp_path, monkeypatch):
    """Losses with --cache_dir equal those without, up to the float16 it is kept in."""
    flags = (*TOKENS, "2", "--max_steps", "4")
    train.main(arguments(tiny, tmp_path / "plain", *flags))
    train.main(arguments(tiny, tmp_path / "cached", *flags, "--cache_dir", str(tmp_path / "cache")))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-2)
    files = sorted((tmp_path / "cache").rglob("*.npy"))
    assert files
    monkeypatch.setattr(train.SpeechDataset, "log_mel", lambda *_: pytest.fail("encoded twice"))
    train.main(arguments(tiny, tmp_path / "again", *flags, "--cache_dir", str(tmp_path / "cache")))
    assert losses(tmp_path / "again") == losses(tmp_path / "cached")


def test_overwrite_output_dir_starts_over_as_it_used_to(tiny, tmp_path, capsys):
    train.main(arguments(tiny, tmp_path, "--max_steps", "4"))
    train.main(arguments(tiny, tmp_path, "--max_steps", "2", "--overwrite_output_dir"))
    assert "continuing" not in capsys.readouterr().out
    assert not (tmp_path / "checkpoint-4").exists()
    with pytest.raises(SystemExit, match=r"would delete .*checkpoint-2, which is to be started from"):
        train.main(arguments(tiny, tmp_path, "--overwrite_output_dir", "--checkpoint", str(tmp_path / "checkpoint-2")))


def test_a_resumed_training_keeps_its_prompt_though_the_template_says_another_date(tiny, tmp_path, capsys):
    """Templates such as LLaMA 3.2's render today's date: the day after, the checkpoint was refused."""
    dated = tmp_path / "dated"
    shutil.copytree(tiny.qwen2, dated)
    template = dated / "chat_template.jinja"
    template.write_text("Monday " + template.read_text())
    train.main(arguments(tiny, tmp_path / "o", "--max_steps", "2", llm=dated))
    template.write_text(template.read_text().replace("Monday", "Tuesday"))
    train.main(arguments(tiny, tmp_path / "o", "--max_steps", "3", llm=dated))
    assert f"continuing from {tmp_path / 'o' / 'checkpoint-2'}" in capsys.readouterr().out
    assert "Monday" in (tmp_path / "o" / "config.json").read_text()


def test_a_new_training_starts_from_a_checkpoint(tiny, tmp_path):
    train.main(arguments(tiny, tmp_path / "a", "--max_steps", "2"))
    file = tmp_path / "a" / "model.safetensors"
    flag = ("--projector_model_path", str(file))
    train.main(arguments(tiny, tmp_path / "b", "--max_steps", "1", *flag, "--learning_rate", "0"))
    train.main(
        arguments(tiny, tmp_path / "c", "--max_steps", "1", "--checkpoint", str(tmp_path / "a"), "--learning_rate", "0")
    )
    start = load_file(file)
    for run in ("b", "c"):
        end = load_file(tmp_path / run / "model.safetensors")
        assert all(torch.equal(start[name], end[name]) for name in start)


def test_a_checkpoint_of_other_models_stops_the_training_with_what_differs(tiny, tmp_path):
    train.main(arguments(tiny, tmp_path / "a", "--max_steps", "1"))
    with pytest.raises(SystemExit, match=r"error: .* does not fit these models: llm.fingerprint is"):
        train.main(arguments(tiny, tmp_path / "b", "--checkpoint", str(tmp_path / "a"), llm=tiny.llama))


def test_one_big_batch_and_accumulation_train_alike(tiny, tmp_path):
    """Through the Trainer: the losses of 4 × 1 clips are those of 1 × 4."""
    for name, batch, accumulation in (("big", "4", "1"), ("small", "1", "4")):
        sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        train.main(arguments(tiny, tmp_path / name, "--max_steps", "3", *sizes))
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "big"), rel=1e-4)


def test_evaluation_measures_the_loss(tiny, tmp_path, capsys):
    train.main(
        arguments(
            tiny,
            tmp_path,
            "--max_steps",
            "2",
            "--eval_data_path",
            str(tiny.manifest),
            "--eval_strategy",
            "epoch",
            "--num_train_epochs",
            "1",
            "--max_steps",
            "3",
        )
    )
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)
    assert capsys.readouterr().out.count("5 clips, 0.00 h") == 2  # both manifests, with what was dropped


def test_flags_of_older_transformers_mean_what_they_meant(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    args = parse("--evaluation_strategy", "no", "--warmup_ratio=0.01", "--no_cuda", "--per_gpu_train_batch_size", "3")
    assert (str(args.eval_strategy.value), args.warmup_steps, args.use_cpu, args.per_device_train_batch_size) == (
        "no",
        0.01,
        True,
        3,
    )
    assert args.get_warmup_steps(1000) == 10
    assert parse("--warmup_ratio", "0.5", "--warmup_steps", "7").warmup_steps == 7
    args = parse("--group_by_length", "--adafactor", "--logging_dir", "logs", "--gradient_checkpointing", "--bf16", "True")
    assert (args.train_sampling_strategy, args.optim.value, args.activation_checkpointing) == (
        "group_by_length",
        "adafactor",
        True,
    )
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "logs"
    with pytest.raises(InputError, match="checkpoints are always safetensors"):
        parse("--save_safetensors", "False")
    args = parse("--half_precision_backend", "auto", "--use_mps_device", "--per_device_train_batch_size=4")
    assert args.per_device_train_batch_size == 4
    assert "--half_precision_backend has no effect any more: ignored" in capsys.readouterr().err


def test_group_by_length_forms_batches_of_like_clips(tiny, tmp_path):
    """transformers' own sampler would decode every clip to learn its length; ours has measured them."""
    for i in range(40):
        write_clip(tmp_path / f"{i}.wav", 0.5 + 0.05 * i)
    items = [{"wav": f"{i}.wav", "txt": "a"} for i in range(40)]
    manifest = write_manifest(tmp_path / "m.jsonl", items)
    flags = train.current_flags(arguments(tiny, tmp_path / "o", "--group_by_length", "--data_path", str(manifest)))
    parsed = HfArgumentParser((train.ModelArguments, train.DataArguments, train.TrainingArguments))
    model_args, data_args, args = parsed.parse_args_into_dataclasses(flags)
    settings = train.resolve_settings(model_args, None) | {"encoder": {"n_mels": 80}}
    prompt = train.Prompt.build(train.load_tokenizer(str(tiny.qwen2)), None, settings)
    dataset = train.SpeechDataset(train.read_manifest(data_args.data_path), prompt, settings, 512)
    trainer = train.SpeechTrainer(model=torch.nn.Linear(1, 1), args=args, train_dataset=dataset)
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(40))
    spread = [abs(dataset.lengths[a] - dataset.lengths[b]) / 16000 for a, b in zip(order[::2], order[1::2], strict=True)]
    assert sum(spread) / len(spread) < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--align_steps", "3"], "error: --align_steps trains a CTC: it needs --splice tokens"),
        (["--projector_dropout", "1"], "error: --projector_dropout must be"),
        (["--text_data_path", "t.txt"], "error: --text_data_path is text as a CTC would hear it: it needs --splice tokens"),
        (["--splice", "tokens", "--text_data_path", "t.txt"], "error: t.txt: cannot read the texts"),
        (["--text_share", "1"], "error: --text_share must be at least 0 and below 1"),
        (["--cache_dir", "c", "--speed_perturb"], "error: --cache_dir keeps one encoding of each clip"),
        (["--data_path", "no.jsonl"], "error: no.jsonl: cannot read the manifest"),
        (
            ["--llm_model_name_or_path", "./nowhere"],
            "error: cannot load the tokenizer of the LLM './nowhere': no such folder here",
        ),
        (["--prompt", "no slot"], "error: --prompt must hold {speech} exactly once"),
        (["--checkpoint", "./nowhere"], "error: ./nowhere is not a checkpoint: no such file or folder"),
        (["--learning_rte", "1"], "error: unknown flags or values: --learning_rte 1"),
        (["--fp16", "True", "--bf16", "True"], "error: At most one of fp16 and bf16 can be True"),
        (["--output_dir", "/dev/null/x"], "error: /dev/null/x: Not a directory"),
        (["--label_smoothing_factor", "0.1"], "error: --label_smoothing_factor and --neftune_noise_alpha are not"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny, tmp_path, change, message):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(tiny, tmp_path, *change))
    assert str(stop.value).startswith(message)
    assert "\n" not in str(stop.value)


def test_a_bad_file_met_by_a_data_worker_is_one_line_too(tiny, tmp_path):
    """The worker's exception comes wrapped in its traceback; the user still reads file, line and reason alone."""
    whole = (tiny.root / "3.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    manifest = write_manifest(tmp_path / "m.jsonl", [{"wav": "cut.wav", "txt": "a", "duration": 2.5}] * 1)
    flags = ("--data_path", manifest, "--dataloader_num_workers", "1", "--max_steps", "1")
    done = run_script("python", "train.py", *arguments(tiny, tmp_path / "o", *flags))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {manifest}:1: {tmp_path / 'cut.wav'}: truncated")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("splice", [(), (*TOKENS, "2", "--lora_r", "2")])
def test_two_processes_train_as_one_with_the_same_global_batch(tiny, tmp_path, splice):
    """Plain DDP on a CPU: the loss of 2 × 2 clips is that of 1 × 4 (tolerance 1e-4); with a CTC in both phases."""
    items = [clip | {"wav": str(tiny.root / clip["wav"]), "txt": f"t{i}"} for i, clip in enumerate(tiny.clips[:4])]
    common = ("--max_steps", "3", "--data_path", write_manifest(tmp_path / "four.jsonl", items), *splice)
    train.main(arguments(tiny, tmp_path / "one", *map(str, common), "--per_device_train_batch_size", "4"))
    run_job(arguments(tiny, tmp_path / "two", *common), tmp_path / "logs")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in ("two", "one"))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=2e-4, rtol=0)  # a fifth of one Adam step at this rate


def test_the_published_commands_run_unchanged(real, tmp_path):
    """Models, data and process count swapped, all else as published (bf16 where the processor has it), then the decoder."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").open()]
    rows = [row | {"wav": str(DATA / row["wav"])} for row in rows if 1 < row["duration"] < 2][:8]
    write_manifest(tmp_path / "train.jsonl", rows)
    write_manifest(tmp_path / "test.jsonl", rows[:3])
    output = tmp_path / "SmolLM2-135M-Instruct-whisper-tiny.en"
    command = (
        "torchrun --standalone --nnodes=1 --nproc_per_node=2 train.py --llm_model_name_or_path LLM "
        "--whisper_model_name_or_path WHISPER --data_path TRAIN --bf16 BF16 --output_dir OUTPUT --num_train_epochs 5 "
        "--per_device_train_batch_size 8 --per_device_eval_batch_size 1 --gradient_accumulation_steps 8 "
        "--evaluation_strategy no --save_strategy steps --save_steps 100 --save_total_limit 10 --learning_rate 3e-4 "
        "--weight_decay 0.01 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 "
        "--report_to none --model_max_length 512 --gradient_checkpointing --dataloader_num_workers 4 "
        "--dataloader_prefetch_factor 10 --deepspeed ds_config_zero3.json"
    )
    names = {"LLM": real.llm, "WHISPER": real.whisper, "TRAIN": tmp_path / "train.jsonl", "OUTPUT": output, "BF16": BF16}
    # five epochs of one step are five steps; a checkpoint at each instead of every hundredth
    words = ["1" if word == "100" else str(names.get(word, word)) for word in command.split()]
    done = run_script(*words)
    assert done.returncode == 0, done.stderr[-4000:]
    *ctc, first, second, third = losses(output)  # two steps of CTC alone, then the LLM beside it
    assert len(ctc) == 2
    assert all(3 < loss - 0.3 * ctc[-1] < 9 for loss in (first, second, third))
    for folder in (output / "checkpoint-4", output / "checkpoint-5"):
        shutil.copytree(folder, tmp_path / "cut" / folder.name)
    (tmp_path / "cut" / "checkpoint-5" / "trainer_state.json").unlink()  # killed while it was written
    argv = words[words.index("train.py") + 1 :]
    said = run_job([str(tmp_path / "cut") if word == str(output) else word for word in argv], tmp_path / "logs")
    assert f"continuing from {tmp_path / 'cut' / 'checkpoint-4'}" in said
    assert losses(tmp_path / "cut") == pytest.approx(losses(output), rel=1e-3)
    checkpoint = output / "checkpoint-5"
    trained = sum(tensor.numel() for tensor in load_file(checkpoint / "model.safetensors").values())
    on_disk = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert on_disk < trained * (4 + 3 * 4) * 1.1 + 2e6  # weights, master copy, two moments: no frozen weight anywhere
    done = run_script(
        *("python", "recognize.py", "--llm_model_name_or_path", real.llm, "--whisper_model_name_or_path", real.whisper),
        *("--projector_model_path", checkpoint / "model.safetensors", "--data_path", tmp_path / "test.jsonl"),
        *("--result_path", tmp_path / "result.txt"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    keys = [line.split(" ")[0] for line in (tmp_path / "result.txt").read_text().splitlines()]
    assert keys == [row["key"] for row in rows[:3]]


def test_deepspeed_needs_no_torchrun_on_one_process(tiny, tmp_path):
    flags = ("--max_steps", "2", "--deepspeed", "ds_config_zero3.json")
    done = run_script("python", "train.py", *arguments(tiny, tmp_path, *flags), MASTER_PORT="29512")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(("bf16", "tolerance"), [("False", 1e-2), ("True", 1e-1)])
def test_deepspeed_trains_the_token_splice_in_both_phases(tiny, tmp_path, bf16, tolerance):
    """ZeRO-3 on two processes: the losses are those of one process without it. A parameter without a dimension, or a buffer
    that DeepSpeed has cast, once ended it; so did a Whisper in Hugging Face's form, which transformers cannot load sharded.
    """
    items = [clip | {"wav": str(tiny.root / clip["wav"]), "txt": f"t{i}"} for i, clip in enumerate(tiny.clips[:4])]
    flags = (*TOKENS, "2", "--max_steps", "4", "--data_path", str(write_manifest(tmp_path / "four.jsonl", items)))
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(d_model=16, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, **heads)
    WhisperModel(config).save_pretrained(tmp_path / "whisper")
    flags += ("--bf16", bf16, "--whisper_model_name_or_path", str(tmp_path / "whisper"))
    train.main(arguments(tiny, tmp_path / "one", *flags, "--per_device_train_batch_size", "4"))
    argv = arguments(tiny, tmp_path / "two", *flags, "--deepspeed", "ds_config_zero3.json")
    run_job(argv, tmp_path / "logs")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in ("two", "one"))
    assert {name: p.shape for name, p in ours.items()} == {name: p.shape for name, p in theirs.items()}
    assert not torch.equal(
        ours["soft_prompt.weight"], load_file(tmp_path / "two" / "checkpoint-2" / "model.safetensors")["soft_prompt.weight"]
    )
    before = losses(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    assert "continuing from" in run_job(argv, tmp_path / "logs")
    assert losses(tmp_path / "two") == pytest.approx(before, rel=tolerance)


def test_eight_real_clips_are_learned_by_heart_and_decoded_without_error(real, tmp_path):
    """The loop learns, decodes and stops: real speech, real models, WER 0 by beam search through the three scripts."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").open()]
    rows = [row for row in rows if 1.4 < row["duration"] < 3 and len(row["txt"].split()) >= 3][::12][:8]
    manifest = write_manifest(tmp_path / "eight.jsonl", [row | {"wav": str(DATA / row["wav"])} for row in rows])
    done = run_script(
        *("python", "train.py", "--llm_model_name_or_path", real.llm, "--whisper_model_name_or_path", real.whisper),
        *("--data_path", manifest, "--output_dir", tmp_path / "exp", "--max_steps", "80", "--bf16", BF16),
        *("--learning_rate", "3e-4", "--lr_scheduler_type", "constant_with_warmup", "--warmup_ratio", "0.05"),
        *("--save_strategy", "no", "--report_to", "none", "--logging_steps", "10"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    done = run_script(
        "python",
        "recognize.py",
        "--checkpoint",
        tmp_path / "exp",
        "--data_path",
        manifest,
        "--result_path",
        tmp_path / "r.txt",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    done = run_script("python", "score.py", "--ref", manifest, "--hyp", tmp_path / "r.txt", "--normalizer", "none")
    assert "WER: 0.00 %" in done.stdout, done.stdout
