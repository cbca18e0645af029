"""What a training tells about itself: dev WER by generation, hearing gap, best checkpoint, log, curve, card, TensorBoard."""

import json
import shutil
import struct
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, RATE, audio, batch_of, build_system, run_script, write_manifest
from safetensors.torch import load_file
from test_train import TOKENS, arguments

import recognize
import score
import train
import watch
from dataset import SpeechDataset
from manifest import read_manifest
from settings import InputError
from transcriber import DecodeArguments, Transcriber
from transcript import Hypothesis

ON = ("--eval_strategy", "steps")
EVERY_STEP = (*ON, "--eval_steps", "1", "--save_steps", "1")
BEST = ("--load_best_model_at_end", "--metric_for_best_model")


def history(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def evaluations(folder):
    return [entry for entry in history(folder) if "eval_loss" in entry]


def decode_and_score(checkpoint, manifest, result, capsys, *models):
    """What recognize.py and score.py print of a checkpoint, decoded greedily: WER and CER in percent."""
    flags = (
        "--checkpoint",
        checkpoint,
        "--data_path",
        manifest,
        "--result_path",
        result,
        "--num_beams",
        1,
        "--guard",
        "off",
        *models,
    )
    assert recognize.main([str(flag) for flag in flags]) == 0
    capsys.readouterr()
    score.main(["--ref", str(manifest), "--hyp", str(result)])
    lines = capsys.readouterr().out.splitlines()
    return [float(line.split()[1]) for line in lines[1:3]]


@pytest.mark.parametrize("splice", [("--splice", "frames"), (*TOKENS, "1", "--lora_r", "2")])
def test_wer_while_training_is_that_of_the_scripts(tiny, tmp_path, capsys, splice):
    """In either splice; with a CTC its best path while aligning, then the joint search, as --decoder auto."""
    items = [clip | {"wav": str(tiny.root / clip["wav"]), "txt": f"t {i}"} for i, clip in enumerate(tiny.clips)]
    manifest = write_manifest(tmp_path / "dev.jsonl", items)
    flags = (
        "--data_path",
        manifest,
        "--eval_data_path",
        manifest,
        *EVERY_STEP,
        "--predict_with_generate",
        "--max_steps",
        "2",
    )
    train.main(arguments(tiny, tmp_path, *map(str, flags), *splice, "--per_device_eval_batch_size", "3"))
    for entry in evaluations(tmp_path):
        step = entry["step"]
        printed = decode_and_score(tmp_path / f"checkpoint-{step}", manifest, tmp_path / f"r{step}.txt", capsys)
        assert [100 * entry["eval_wer"], 100 * entry["eval_cer"]] == pytest.approx(printed, abs=0.006)
        aligning = splice != ("--splice", "frames") and step == 1
        assert ("eval_eot_rate" in entry, "eval_hearing_gap" in entry) == (not aligning, not aligning)
    assert [entry["step"] for entry in evaluations(tmp_path)] == [1, 2]


def test_real_models_hear_while_training_and_the_wer_is_that_of_the_scripts(real, tmp_path, capsys):
    """A step of fine-tuning from the checkpoint that comes along, on a few real prompts."""
    rows = [json.loads(line) for line in (DATA / "test.jsonl").open()]
    rows = [row | {"wav": str(DATA / row["wav"])} for row in rows if 1 < row["duration"] < 2.2][::5][:5]
    manifest = write_manifest(tmp_path / "dev.jsonl", rows)
    models = ("--llm_model_name_or_path", str(real.llm), "--whisper_model_name_or_path", str(real.whisper))
    train.main(
        [
            *(*models, "--checkpoint", str(DATA.parent / "pretrained"), "--output_dir", str(tmp_path), *EVERY_STEP),
            *("--data_path", str(manifest), "--eval_data_path", str(manifest), "--predict_with_generate"),
            *("--max_steps", "1", "--per_device_train_batch_size", "2", "--report_to", "none", "--logging_steps", "1"),
        ]
    )
    (entry,) = evaluations(tmp_path)
    printed = decode_and_score(tmp_path / "checkpoint-1", manifest, tmp_path / "r.txt", capsys, *models)
    assert [100 * entry["eval_wer"], 100 * entry["eval_cer"]] == pytest.approx(printed, abs=0.006)
    assert entry["eval_wer"] < 0.6
    assert entry["eval_eot_rate"] > 0.5
    assert entry["eval_hearing_gap"] > 1  # nats a token; about 4


@pytest.mark.parametrize("zero3", [(), ("--deepspeed", "ds_config_zero3.json")], ids=["ddp", "zero3"])
def test_two_processes_measure_what_the_scripts_print_and_keep_the_best(tiny, tmp_path, capsys, zero3):
    """Each decodes its share, some clip twice as 7 is odd. Untrained, the CTC writes less than the LLM, so that the best by
    CER is of the align phase; the weights in the end are those and say so (`llm_reads`). Under DeepSpeed its optimizer's own
    copy has to be restored: that one is saved."""
    items = [clip | {"wav": str(tiny.root / clip["wav"]), "txt": "ab" * i} for i, clip in enumerate(tiny.clips)]
    items += [item | {"key": f"again{i}", "txt": "c d"} for i, item in enumerate(items[:2])]
    manifest = write_manifest(tmp_path / "dev.jsonl", items)
    same = ("--data_path", manifest, "--eval_data_path", manifest, *EVERY_STEP, "--predict_with_generate", *BEST, "cer")
    same += (*TOKENS, "1", "--max_steps", "2", "--per_device_eval_batch_size", "2")
    command = ("torchrun", "--standalone", "--nproc_per_node=2", "train.py")
    done = run_script(*command, *arguments(tiny, tmp_path, *same), *zero3, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [entry["step"] for entry in evaluations(tmp_path)] == [1, 2]  # written by one process
    for entry in evaluations(tmp_path):
        checkpoint = tmp_path / f"checkpoint-{entry['step']}"
        printed = decode_and_score(checkpoint, manifest, tmp_path / f"r{entry['step']}.txt", capsys)
        assert [100 * entry["eval_wer"], 100 * entry["eval_cer"]] == pytest.approx(printed, abs=0.006)
    last, best, end = (load_file(tmp_path / f / "model.safetensors") for f in ("checkpoint-2", "checkpoint-1", ""))
    assert all(torch.equal(end[name], best[name]) for name in best)
    assert not all(torch.equal(end[name], last[name]) for name in best)
    assert not json.loads((tmp_path / "config.json").read_text())["llm_reads"]
    card = (tmp_path / "README.md").read_text()
    assert f"\n{' '.join(command)} --llm_model_name_or_path {tiny.qwen2} " in card
    assert "| processes | 2 (cpu) |" in card


def scripted(monkeypatch, *wers):
    """Evaluations find these WERs, one after another."""
    found = iter(wers)
    monkeypatch.setattr(train, "dev_metrics", lambda *_: {"wer": next(found), "cer": 0.5})


DEV = ("--predict_with_generate", *BEST, "wer")


def test_the_best_checkpoint_by_wer_is_what_remains(tiny, tmp_path, monkeypatch):
    """transformers would take the greatest WER for the best, and load from no checkpoint of trained tensors alone."""
    scripted(monkeypatch, 0.5, 0.2, 0.4)
    train.main(arguments(tiny, tmp_path, *EVERY_STEP, *DEV, "--eval_data_path", str(tiny.manifest), "--max_steps", "3"))
    last, best, end = (load_file(tmp_path / f / "model.safetensors") for f in ("checkpoint-3", "checkpoint-2", ""))
    assert all(torch.equal(end[name], best[name]) for name in best)
    assert not all(torch.equal(end[name], last[name]) for name in best)
    card = (tmp_path / "README.md").read_text()
    assert "| lowest dev WER | 20.00 % (CER 50.00 %) at step 2;" in card
    assert "in the end those of step 2 (best dev wer of those saved)" in card


def test_early_stopping_counts_on_after_a_resume_and_may_join_then(tiny, tmp_path, monkeypatch):
    """transformers' callback forgets its count on a resume, and a checkpoint without one broke the next save (KeyError)."""
    flags = (*EVERY_STEP, *DEV, "--eval_data_path", str(tiny.manifest), "--early_stopping_patience")
    scripted(monkeypatch, 0.3, 0.4)
    train.main(arguments(tiny, tmp_path / "o", "--max_steps", "2", *flags[:-1]))
    scripted(monkeypatch, 0.4, 0.4)
    train.main(arguments(tiny, tmp_path / "o", "--max_steps", "4", *flags, "3"))
    shutil.rmtree(tmp_path / "o" / "checkpoint-4")
    scripted(monkeypatch, 0.4, 0.4, 0.1)  # at step 3 one without gain, here the second and the third
    train.main(arguments(tiny, tmp_path / "o", "--max_steps", "9", *flags, "3"))
    assert evaluations(tmp_path / "o")[-1]["step"] == 5
    train.main(arguments(tiny, tmp_path / "o", "--max_steps", "9", *flags, "3"))  # it forgot that it had stopped
    assert evaluations(tmp_path / "o")[-1]["step"] == 5


def test_early_stopping_leaves_the_align_phase_alone(tiny, tmp_path, monkeypatch):
    """The CTC's WER jitters while it aligns: five evaluations without gain, and the LLM's part never began."""
    flags = (*EVERY_STEP, *DEV, "--eval_data_path", str(tiny.manifest), "--early_stopping_patience", "1", *TOKENS, "3")
    scripted(monkeypatch, 0.4, 0.5, 0.5, 0.5, 0.1)
    train.main(arguments(tiny, tmp_path, "--max_steps", "9", *flags))
    assert [entry["step"] for entry in evaluations(tmp_path)] == [1, 2, 3, 4]


def test_the_last_checkpoint_stays_beside_the_best(tiny, tmp_path, monkeypatch):
    """With --save_total_limit 1 transformers deleted it at the end, and a second start trained again from the best on."""
    flags = (*EVERY_STEP, *DEV, "--eval_data_path", str(tiny.manifest), "--save_total_limit", "1", "--max_steps", "3")
    scripted(monkeypatch, 0.1, 0.2, 0.2)
    train.main(arguments(tiny, tmp_path, *flags))
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    train.main(arguments(tiny, tmp_path, *flags))
    assert len(evaluations(tmp_path)) == 3


def test_the_log_after_a_kill_and_a_resume_is_that_of_one_run(tiny, tmp_path):
    """Steps that were lost are logged once: not twice, not in a torn line."""
    flags = ("--max_steps", "4", "--eval_data_path", str(tiny.manifest), *ON, "--eval_steps", "1", "--predict_with_generate")
    train.main(arguments(tiny, tmp_path / "whole", *flags))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    log = tmp_path / "cut" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:6])[:-20])  # killed while step 3 was logged
    train.main(arguments(tiny, tmp_path / "cut", *flags))

    def told(folder):
        return [{k: v for k, v in e.items() if "second" not in k and "runtime" not in k} for e in history(folder)[:-1]]

    assert told(tmp_path / "cut") == told(tmp_path / "whole")
    assert [e["step"] for e in told(tmp_path / "whole")] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert history(tmp_path / "whole")[-1]["train_runtime"] > 0


def test_curve_and_card_tell_of_the_training(tiny, tmp_path):
    flags = ("--max_steps", "2", "--eval_data_path", str(tiny.manifest), *EVERY_STEP, *TOKENS, "1", "--hub_token", "hush")
    folder = tmp_path / "my run"
    train.main(arguments(tiny, folder, *flags))
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text()
    assert f"python train.py --llm_model_name_or_path {tiny.qwen2} " in card
    assert f"--output_dir '{folder}'" in card
    assert "--hub_token ..." in card
    assert "hush" not in card
    assert f"| training data | `{tiny.manifest}`: 4 clips, 0.00 h; dropped 1 with more text than its" in card
    assert "| steps | 2 of 2 (1.00 epochs) |" in card
    assert f"torch {torch.__version__}" in card
    assert f"| dev loss | {evaluations(folder)[-1]['eval_loss']:.3f} at step 2 |" in card
    assert "hearing gap" in card
    assert not list(folder.glob("*.partial*"))
    train.main(arguments(tiny, folder, *flags, "--max_steps", "3"))
    assert "| steps | 3 of 3 " in (folder / "README.md").read_text()


def test_every_point_of_the_curve_is_within_its_axes():
    """A lower end set before all lines were drawn froze the upper one: a loss that rose left the picture."""
    log = [
        {"loss": 1.0, "step": 1},
        {"eval_loss": 4.0, "eval_wer": 0.5, "step": 0},
        {"eval_loss": 2.0, "eval_wer": 1.5, "step": 9},
    ]
    figure = watch.curve(log, "")
    for side in figure.axes:
        for line in side.lines:
            assert all(0 <= y < side.get_ylim()[1] for y in line.get_ydata())
            assert all(side.get_xlim()[0] < x < side.get_xlim()[1] for x in line.get_xdata())
    assert [list(line.get_ydata()) for side in figure.axes for line in side.lines] == [[1.0], [4.0, 2.0], [50.0, 150.0]]
    assert watch.curve([], "").axes


def test_a_page_of_the_users_own_stays(tiny, tmp_path):
    (tmp_path / "README.md").write_text("# mine\n")
    train.main(arguments(tiny, tmp_path, "--max_steps", "1"))
    assert (tmp_path / "README.md").read_text() == "# mine\n"
    assert len(history(tmp_path)) == 2


def test_clips_are_picked_evenly_and_shared_equally():
    assert watch.even_pick(5, 0, 1) == watch.even_pick(5, 9, 1) == [0, 1, 2, 3, 4]
    pick = watch.even_pick(1000, 10, 3)
    assert [b - a for a, b in pairwise(pick)] == [100] * 9
    assert pick == watch.even_pick(1000, 10, 3) != watch.even_pick(1000, 10, 5)
    for clips, ranks in ((7, 2), (8, 3), (1, 4), (2, 4), (3, 2)):
        shares = [watch.share(range(clips), rank, ranks) for rank in range(ranks)]
        assert len({len(part) for part in shares}) == 1
        assert list(chain(*shares))[:clips] == list(range(clips))
        assert all(len(set(part)) == len(part) >= min(2, clips) for part in shares)
        lengths = [len(watch.batches(part, [1] * clips, 2)) for part in shares]
        assert len(set(lengths)) == 1
    assert watch.batches([0, 1, 2, 3, 4], [5, 1, 4, 2, 3], 2) == [[1, 3], [4, 2, 0]]  # of like lengths, none alone
    assert watch.batches([0, 1], [1, 2], 1) == [[0, 1]]


@pytest.mark.parametrize("splice", ["frames", "tokens"])
def test_the_gap_is_between_a_clips_own_speech_and_anothers(tiny, splice):
    """Row by row, by the LLM's loss alone: with two clips the other speech is that of a batch with the clips exchanged."""
    system = build_system(tiny.qwen2, tiny.whisper, splice=splice)
    clips, texts = [audio(1.4, 1), audio(0.8, 2)], ["one two", "three"]
    own, other = (batch_of(system, order, texts) for order in (clips, clips[::-1]))
    system.model.ctc_weight = 5.0
    rows = watch.hearing(system.model, own)
    system.model.ctc_weight = 0.0
    with torch.no_grad():
        losses = [system.model(**batch, num_items_in_batch=1)["loss"].item() for batch in (own, other)]
    assert [sum(row[i] for row in rows) for i in (0, 1)] == pytest.approx(losses, rel=1e-5)
    assert [row[2] for row in rows] == [
        len(system.prompt.example(text)["labels"]) - len(system.prompt.ids) for text in texts
    ]
    alone = batch_of(system, clips[:1], texts[:1])
    assert rows[0][0] == pytest.approx(system.model(**alone, num_items_in_batch=1)["loss"].item(), rel=1e-4)


def state_of(*gaps):
    log = [{"loss": 1.0, "step": 1}, *({"eval_loss": 1.0, "eval_hearing_gap": gap} for gap in gaps)]
    return SimpleNamespace(log_history=log, is_world_process_zero=True, global_step=7)


@pytest.mark.parametrize(
    ("gaps", "warns"),
    [((0.0, 0.01), 0), ((0.0, 0.01, -0.02), 1), ((0.0,) * 4, 0), ((0.0,) * 6, 1), ((0.0, 0.0, 2.0), 0), ((2.0, 0, 0, 0), 1)],
)
def test_a_gap_that_stays_near_zero_is_told_with_advice(capsys, gaps, warns):
    watch.HearingWarning().on_evaluate(None, state_of(*gaps), None)
    told = capsys.readouterr().err
    assert told.count("warning: step 7: for") == warns
    assert told.count("does each wav belong to its txt?") == warns


def test_a_random_llm_does_not_hear_and_that_is_told_in_its_phase_only(tiny, tmp_path, capsys):
    flags = ("--max_steps", "6", "--eval_data_path", str(tiny.manifest), *EVERY_STEP, *TOKENS, "3")
    train.main(arguments(tiny, tmp_path, *flags))
    assert capsys.readouterr().err.count("it does not hear yet") == 1
    assert [entry["step"] for entry in evaluations(tmp_path) if "eval_hearing_gap" in entry] == [4, 5, 6]


def test_rates_are_those_of_the_scorer():
    """Loops and refusals are those of score.py; where nothing is said there is no WER; a CTC has no end of turn."""
    said = {"a": "one two three", "b": "four", "c": "five six"}
    written = {"a": Hypothesis("one two", True), "b": Hypothesis("no no no no no", False), "c": Hypothesis("", True)}
    measured = watch.rates(said, written)
    assert measured["wer"] == pytest.approx((1 + 5 + 2) / 6)
    assert measured["length_ratio"] == pytest.approx(7 / 6)
    assert (measured["eot_rate"], measured["loop_rate"], measured["refusal_rate"]) == pytest.approx((2 / 3, 1 / 3, 0))
    refused = watch.rates({"a": "hello"}, {"a": Hypothesis("I'm sorry, but I can't do that", None)})
    assert refused["refusal_rate"] == 1
    assert "eot_rate" not in refused
    with pytest.raises(InputError, match="no word in the txt of 1 clips of --eval_data_path"):
        watch.rates({"a": "?"}, {"a": Hypothesis("x", True)})


def test_a_text_has_ended_if_its_end_of_turn_came_before_the_limit(tiny, monkeypatch):
    """After the limit every row gets an end-of-turn token; that one does not count."""
    system = build_system(tiny.qwen2, tiny.whisper)
    end, a = system.prompt.end_of_turn, system.prompt.tokenizer("a").input_ids[0]
    write = iter([[a, a, a], [end, a, a], [a, end], [a]])  # of each clip the next token; one that is done is gone
    llm = system.model.llm
    forward = llm.forward

    def planned(**inputs):
        output, tokens = forward(**inputs), next(write)
        assert len(output.logits) == len(tokens)
        output.logits = 50.0 * torch.nn.functional.one_hot(torch.tensor(tokens), output.logits.shape[-1])[:, None]
        return output

    monkeypatch.setattr(llm, "forward", planned)
    transcriber = Transcriber(system.model, system.prompt, DecodeArguments(max_new_tokens=3, num_beams=1))
    found = transcriber.hypotheses([audio(1.0, i) for i in range(3)])
    assert [(h.text, h.ended) for h in found] == [("a", True), ("aaa", False), ("aa", True)]


def test_of_a_part_of_a_file_only_the_part_is_decoded(tiny, tmp_path, monkeypatch):
    system, heard = build_system(tiny.qwen2, tiny.whisper), []
    line = {"wav": str(tiny.root / "3.wav"), "start": 0.4, "end": 1.2, "txt": "a"}
    manifest = read_manifest(write_manifest(tmp_path / "dev.jsonl", [line]))
    dataset = SpeechDataset(manifest, system.prompt, system.settings, 512)
    written = [Hypothesis("a", True)]
    monkeypatch.setattr(Transcriber, "hypotheses", lambda self, clips: heard.extend(map(len, clips)) or written)
    flags = {"eval_clips": 0, "seed": 0, "process_index": 0, "world_size": 1, "per_device_eval_batch_size": 1}
    trainer = SimpleNamespace(args=SimpleNamespace(predict_with_generate=True, **flags), model=system.model)
    assert watch.dev_metrics(trainer, dataset)["wer"] == 0
    assert heard == [0.8 * RATE]


def test_tensorboard_gets_every_loss(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    flags = ("--eval_data_path", str(tiny.manifest), *EVERY_STEP, "--predict_with_generate", "--report_to", "tensorboard")
    train.main(arguments(tiny, tmp_path / "o", "--max_steps", "2", *flags))
    (file,) = (tmp_path / "tb").glob("events.*")
    data, found = file.read_bytes(), {}
    while data:  # records: length, its checksum, an event, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + length :]
    for entry in history(tmp_path / "o"):
        for name, tag in (("loss", "train/loss"), ("eval_loss", "eval/loss"), ("eval_wer", "eval/wer")):
            if name in entry:
                assert found[tag, entry["step"]] == pytest.approx(entry[name], rel=1e-6)
    assert sum(tag == "eval/wer" for tag, _ in found) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--predict_with_generate",), "error: --predict_with_generate decodes at evaluations: give --eval_strategy steps"),
        ((*ON, "--metric_for_best_model", "wer"), "error: --metric_for_best_model wer: there is loss; --predict_with_gen"),
        (
            (*ON, "--predict_with_generate", "--metric_for_best_model", "bleu"),
            "error: --metric_for_best_model bleu: there is",
        ),
        ((*ON, "--early_stopping_patience", "2"), "error: --early_stopping_patience needs --metric_for_best_model"),
        ((*ON, "--early_stopping_patience", "0"), "error: --early_stopping_patience must be at least 1"),
        (("--eval_clips", "-1"), "error: --eval_clips must not be negative"),
        (("--report_to", "tensorboard"), "error: --report_to tensorboard needs the package tensorboard: pip install"),
        ((*ON, "--predict_with_generate"), "error: You have set `args.eval_strategy` to "),
    ],
)
def test_mistakes_are_told_in_one_line(tiny, tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(tiny, tmp_path, *flags))
    assert str(stop.value).startswith(message)
    assert "\n" not in str(stop.value)
