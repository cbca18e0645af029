"""The model: sizes, lengths, splice, gradients, loss, batches against single clips, checkpoints."""

import json

import pytest
import torch
import torch.nn.functional as F
import whisper
from conftest import audio, batch_of, build_system, run_script, save_tiny_llm, save_tiny_whisper
from transformers import WhisperConfig, WhisperModel

from audio import log_mel, speech_lengths
from encoder import SpeechEncoder
from model import build_model
from projector import Conv1dProjector
from settings import IGNORE_INDEX, SPEECH_INDEX, InputError, ModelArguments, resolve_settings


@pytest.mark.parametrize(
    ("encoder", "llm", "size"),
    [
        (384, 4096, "9.46"),
        (768, 4096, "12.32"),
        (1280, 4096, "18.32"),
        (1280, 896, "12.07"),
        (1280, 1536, "13.32"),
        (1280, 3584, "17.32"),
        (384, 1536, "4.46"),
        (768, 1536, "7.32"),
    ],
)
def test_projector_sizes_are_the_published_ones(encoder, llm, size):
    assert Conv1dProjector(encoder, llm).size() == f"{size} M"


@pytest.mark.parametrize("samples", [1440, 1599, 1600, 16000, 47999, 480000])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_length_rule_is_what_the_modules_yield(tiny, samples, stride):
    """Every length that is computed is one that a module produced, odd numbers of mel frames included."""
    clip = audio(31)[:samples]
    mel = log_mel(clip, 80)[None]
    encoder = SpeechEncoder.from_pretrained(str(tiny.whisper), torch.float32)
    lengths = speech_lengths(samples, stride)
    encoded = encoder(mel, torch.tensor([mel.shape[-1]]))
    projected = Conv1dProjector(16, 32, stride)(encoded, torch.tensor([lengths.encoder]))
    assert (mel.shape[-1], encoded.shape[1], projected.shape[1]) == tuple(lengths)


@pytest.mark.parametrize("n_mels", [80, 128])
def test_encoder_on_30_seconds_is_openai_whispers(tmp_path, n_mels):
    """Our masks, slices and renamed weights change nothing where Whisper itself can be asked."""
    path = save_tiny_whisper(tmp_path / "w.pt", n_mels)
    theirs = whisper.load_model(str(path), device="cpu").eval()
    ours = SpeechEncoder.from_pretrained(str(path), torch.float32)
    mel = log_mel(audio(30), n_mels)[None]
    assert ours.n_mels == n_mels
    with torch.no_grad():
        torch.testing.assert_close(ours(mel, torch.tensor([3000])), theirs.encoder(mel), atol=1e-4, rtol=1e-4)


def test_hugging_face_folder_is_loaded_and_its_decoder_dropped(tmp_path):
    config = WhisperConfig(d_model=16, encoder_layers=2, decoder_layers=1, num_mel_bins=128, encoder_attention_heads=2)
    config.decoder_attention_heads = 2
    model = WhisperModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    encoder = SpeechEncoder.from_pretrained(str(tmp_path / "hf"), torch.float32)
    mel = log_mel(audio(30), 128)[None]
    with torch.no_grad():
        expected = model.get_encoder()(mel).last_hidden_state
        torch.testing.assert_close(encoder(mel, torch.tensor([3000])), expected, atol=1e-4, rtol=1e-4)
    assert not any("decoder" in name for name, _ in encoder.named_modules())


def test_unknown_whisper_is_one_clear_error():
    with pytest.raises(InputError, match=r"neither one of .*large-v3.*nor a .pt file, nor a Hugging Face"):
        SpeechEncoder.from_pretrained("./no-such-model", torch.float32)
    with pytest.raises(InputError, match=r"cannot load Whisper 'no\.pt'"):
        SpeechEncoder.from_pretrained("no.pt", torch.float32)


def test_clip_alone_and_in_a_padded_batch_encode_alike(tiny):
    """Tolerance 1e-5 in float32. An odd number of mel frames once let conv1's bias leak past the clip's end."""
    encoder = SpeechEncoder.from_pretrained(str(tiny.whisper), torch.float32)
    clips = [audio(s, i) for i, s in enumerate((0.61, 1.73, 3.01))]
    mels = [log_mel(clip, 80) for clip in clips]
    assert any(mel.shape[-1] % 2 for mel in mels)
    longest = max(mel.shape[-1] for mel in mels)
    batch = torch.stack([F.pad(mel, (0, longest - mel.shape[-1])) for mel in mels])
    together = encoder(batch, torch.tensor([mel.shape[-1] for mel in mels]))
    for clip, mel, row in zip(clips, mels, together, strict=True):
        alone = encoder(mel[None], torch.tensor([mel.shape[-1]]))[0]
        assert len(alone) == speech_lengths(len(clip), 1).encoder
        torch.testing.assert_close(row[: len(alone)], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("input_side", ["left", "right"])
def test_splice_puts_every_vector_where_it_belongs(system, padding_side, input_side):
    S, x = SPEECH_INDEX, 0
    rows = [[5, S, 6, 7], [8, 9, S, 10, 11, 12]]
    T = max(map(len, rows))
    pads = [[0] * (T - len(row)) for row in rows]
    ids = [pad + row if input_side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = [
        [0] * len(p) + [1] * len(r) if input_side == "left" else [1] * len(r) + [0] * len(p)
        for r, p in zip(rows, pads, strict=True)
    ]
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    labels = torch.where((ids > 6) & mask.bool(), ids, IGNORE_INDEX)
    dim = system.settings["llm"]["dim"]
    speech, length = torch.randn(2, 3, dim), torch.tensor([3, 1])
    embeds, out_mask, out_labels = system.model.splice(ids, mask, speech, length, labels, padding_side)

    table = system.model.llm.get_input_embeddings().weight
    I = IGNORE_INDEX  # noqa: E741
    expected = [
        [table[5], *speech[0], table[6], table[7]],
        [table[8], table[9], speech[1, 0], table[10], table[11], table[12]],
    ]
    expected_labels = [[I, I, I, I, I, 7], [8, 9, I, 10, 11, 12]]
    assert embeds.shape == (2, 6, dim)
    for row, (vectors, row_labels) in enumerate(zip(expected, expected_labels, strict=True)):
        assert out_mask[row].tolist() == [1] * 6
        torch.testing.assert_close(embeds[row], torch.stack(vectors))
        assert out_labels[row].tolist() == row_labels
    # a shorter row: two vectors fewer, so two places of padding on the side asked for
    embeds, out_mask, out_labels = system.model.splice(ids, mask, speech, torch.tensor([1, 1]), labels, padding_side)
    assert out_mask[0].tolist() == ([0, 0, 1, 1, 1, 1] if padding_side == "left" else [1, 1, 1, 1, 0, 0])
    assert out_labels[0][out_mask[0].bool()].tolist() == [I, I, I, 7]
    assert embeds[0][~out_mask[0].bool()].eq(x).all()


@pytest.mark.parametrize("markers", [0, 2])
def test_a_row_without_exactly_one_marker_raises_with_the_counts(system, markers):
    ids = torch.tensor([[SPEECH_INDEX, 5, 6], [SPEECH_INDEX] * markers + [7] * (3 - markers)])
    with pytest.raises(InputError, match=rf"exactly one speech marker, found \[1, {markers}\]"):
        system.model.splice(ids, torch.ones_like(ids), torch.zeros(2, 1, 32), torch.tensor([1, 1]))


def test_only_the_projector_has_gradients(system):
    batch = batch_of(system, [audio(1.0), audio(1.5, 1)], ["one", "two words"])
    system.model.train()
    system.model(**batch)["loss"].backward()
    with_gradient = {name for name, p in system.model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in system.model.named_parameters() if name.startswith("projector.")}
    assert all(p.grad.abs().sum() > 0 for p in system.model.projector.parameters())


def test_frozen_modules_stay_in_eval(system):
    system.model.train()
    assert system.model.projector.training
    assert not system.model.encoder.whisper.training
    assert not any(module.training for module in system.model.llm.modules() if "Attention" in type(module).__name__)


def test_activation_checkpointing_works_though_the_llm_is_in_eval(system):
    """transformers checks `training` before it checkpoints: a frozen LLM in eval() ignored the flag without a word."""
    batch = batch_of(system, [audio(1.0)], ["one"])
    system.model.train()
    calls = []
    system.model.llm.base_model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = torch.autograd.grad(system.model(**batch)["loss"], system.model.projector.linear2.weight)[0]
    assert len(calls) == 1
    system.model.activation_checkpointing_enable()
    again = torch.autograd.grad(system.model(**batch)["loss"], system.model.projector.linear2.weight)[0]
    assert len(calls) == 3  # forward, and once more in backward
    torch.testing.assert_close(again, plain)


def test_loss_is_cross_entropy_of_the_answer_under_the_whole_model(system):
    """Logits only where there is a label: the same number as the LLM's own loss over every position."""
    batch = batch_of(system, [audio(1.0), audio(2.0, 1)], ["one", "two words"])
    model = system.model
    speech, length = model.embed_speech(batch["mel"], batch["mel_length"])
    embeds, mask, labels = model.splice(batch["input_ids"], batch["attention_mask"], speech, length, batch["labels"])
    expected = model.llm(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    found = model(**batch)
    torch.testing.assert_close(found["loss"], expected)
    assert len(found["logits"]) == (batch["labels"] != IGNORE_INDEX).sum() == len("one") + len("two words") + 2


def test_gradient_accumulation_equals_one_big_batch(system):
    """With num_items_in_batch; the mean of means would weigh a short answer as much as a long one."""
    clips, texts = [audio(1.0), audio(1.7, 1), audio(0.6, 2)], ["a", "a much longer text", "mid size"]
    items = sum(len(text) + 1 for text in texts)
    weight = system.model.projector.conv.weight
    whole = torch.autograd.grad(system.model(**batch_of(system, clips, texts))["loss"], weight)[0]
    parts = [
        torch.autograd.grad(system.model(**batch_of(system, [c], [t]), num_items_in_batch=items)["loss"], weight)[0]
        for c, t in zip(clips, texts, strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-4)


def test_the_llm_hears(system):
    """Another clip under the same text gives other logits; the same clip the same."""
    first, second, again = (system.model(**batch_of(system, [audio(1.0, seed)], ["one"]))["logits"] for seed in (1, 2, 1))
    assert not torch.allclose(first, second, atol=1e-6, rtol=0)
    assert torch.equal(first, again)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_batch_of_mixed_lengths_decodes_as_one_by_one(system, num_beams):
    clips = [audio(s, i) for i, s in enumerate((0.5, 2.6, 1.21, 1.77))]

    def decode(chosen, allowed):
        batch = batch_of(system, chosen, [""] * len(chosen))
        ids = torch.tensor(system.prompt.ids).expand(len(chosen), -1)
        batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        del batch["labels"]
        found = system.model.generate(**batch, max_new_tokens=torch.tensor(allowed), num_beams=num_beams)
        return [[id for id in texts[0].ids if id != 258] for texts in found]

    allowed = [4, 12, 7, 9]
    together = decode(clips, allowed)
    assert together == [decode([clip], [n])[0] for clip, n in zip(clips, allowed, strict=True)]
    assert all(0 < len(row) <= n for row, n in zip(together, allowed, strict=True))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_search_finds_what_transformers_own_finds(system, num_beams):
    """Rows of different lengths, padded on the left: the prompt's positions must go on where they ended.

    With the tiny LLM's own weights, which hardly tell positions apart, this once could not fail."""
    for p in system.model.llm.base_model.layers.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.tensor(system.prompt.ids).expand(2, -1)
    batch = batch_of(system, [audio(0.6), audio(2.4, 1)], ["", ""])
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    speech, length = system.model.embed_speech(batch["mel"], batch["mel_length"])
    embeds, mask, _ = system.model.splice(ids, batch["attention_mask"], speech, length, padding_side="left")
    options = {"num_beams": num_beams, "num_return_sequences": num_beams, "do_sample": False}
    plain = system.model.llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=10, **options)
    del batch["labels"]
    ours = system.model.generate(**batch, max_new_tokens=torch.tensor([10, 10]), num_beams=num_beams)
    end = system.prompt.end_of_turn
    written = [text.ids for texts in ours for text in texts]
    assert [[id for id in row if id != end] for row in written] == [
        [id for id in row if id != end] for row in plain.tolist()
    ]


def test_save_load_gives_equal_logits_and_holds_only_the_projector(system, tiny, tmp_path):
    batch = batch_of(system, [audio(1.0)], ["one"])
    torch.nn.init.normal_(system.model.projector.linear2.weight)
    system.model.save_checkpoint(tmp_path)
    other = build_system(system.settings["llm"]["name"], tiny.whisper, checkpoint=str(tmp_path))
    by_file = build_system(
        system.settings["llm"]["name"], tiny.whisper, projector_model_path=str(tmp_path / "model.safetensors")
    )
    expected = system.model(**batch)["logits"]
    assert torch.equal(other.model(**batch)["logits"], expected)
    assert torch.equal(by_file.model(**batch)["logits"], expected)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.json"}
    trained = sum(p.numel() for p in system.model.projector.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * trained + 2000


def test_a_checkpoint_for_other_models_is_refused_with_what_differs(system, tiny, tmp_path):
    system.model.save_checkpoint(tmp_path / "saved")
    bigger = save_tiny_llm(tmp_path / "bigger", "qwen2", dim=48)
    with pytest.raises(InputError, match=r"does not fit these models: llm.dim is 32 in the checkpoint, 48 here"):
        build_system(bigger, tiny.whisper, checkpoint=str(tmp_path / "saved"))
    other_mels = save_tiny_whisper(tmp_path / "w128.pt", 128)
    with pytest.raises(InputError, match=r"encoder.n_mels is 80 in the checkpoint, 128 here"):
        build_system(system.settings["llm"]["name"], other_mels, checkpoint=str(tmp_path / "saved"))


def test_fine_tuned_weights_under_the_same_shapes_are_told_apart(tiny, tmp_path):
    """Shapes agree, names may too: only the fingerprint sees that it is not the LLM the projector was trained with."""
    one = build_system(tiny.qwen2, tiny.whisper)
    one.model.save_checkpoint(tmp_path / "saved")
    other = one.model.llm
    with torch.no_grad():
        other.base_model.layers[1].self_attn.q_proj.weight.mul_(1.1)  # as a merged LoRA would
    other.save_pretrained(tmp_path / "tuned")
    one.prompt.tokenizer.save_pretrained(tmp_path / "tuned")
    with pytest.raises(InputError, match=r"llm.fingerprint is '\w{16}' in the checkpoint, '\w{16}' here"):
        build_system(tmp_path / "tuned", tiny.whisper, checkpoint=str(tmp_path / "saved"))


@pytest.mark.parametrize(("stride", "kernel", "frames"), [(5, 5, 23), (2, 8, 21), (3, 4, 30)])
def test_the_projector_is_a_convolution(stride, kernel, frames):
    """It is computed as a matrix product, which must be the same; a wider kernel is centred and keeps the length."""
    torch.manual_seed(0)
    projector = Conv1dProjector(6, 8, stride, kernel, hidden=16)
    x = torch.randn(2, frames, 6)
    padded = torch.nn.functional.pad(x.transpose(1, 2), ((kernel - stride) // 2, -(-(kernel - stride) // 2)))
    conv = projector.conv(padded).relu().transpose(1, 2)
    expected = projector.norm(projector.linear2(projector.linear1(conv).relu()))
    out = projector(x, torch.full((2,), frames))
    assert out.shape == (2, frames // stride, 8)
    torch.testing.assert_close(out, expected)


def test_layers_handed_over_change_nothing_at_first(tiny):
    """The encoder's last layers, run by the projector, give what the whole encoder gave; they alone are trained."""
    whole = build_system(tiny.qwen2, tiny.whisper, projector_layers=0).model
    split = build_system(tiny.qwen2, tiny.whisper, projector_layers=1).model
    split.projector.load_state_dict(whole.projector.state_dict(), strict=False)
    batch = batch_of(build_system(tiny.qwen2, tiny.whisper), [audio(1.0), audio(2.1, 1)], ["a", "b"])
    expected, length = whole.embed_speech(batch["mel"], batch["mel_length"])
    out, _ = split.embed_speech(batch["mel"], batch["mel_length"])
    for row, n in enumerate(length):
        torch.testing.assert_close(out[row, :n], expected[row, :n])
    assert (len(whole.encoder.whisper.layers), len(split.encoder.whisper.layers), len(split.projector.layers)) == (2, 1, 1)
    assert not any(p.requires_grad for p in split.encoder.parameters())
    assert all(p.requires_grad for p in split.projector.parameters())
    assert whole.settings["encoder"] == split.settings["encoder"]  # the same encoder, wherever its layers stand


def test_layers_of_the_projector_do_not_see_the_padding(tiny):
    projector = build_system(tiny.qwen2, tiny.whisper, projector_layers=2).model.projector
    x = torch.randn(1, 20, 16)
    alone = projector(x, torch.tensor([20]))
    padded = projector(torch.cat([x, torch.randn(1, 30, 16)], 1), torch.tensor([20]))
    torch.testing.assert_close(padded[:, :4], alone)


def test_more_layers_than_the_encoder_has_are_refused(tiny):
    with pytest.raises(InputError, match="--projector_layers 3: the encoder has only 2"):
        build_system(tiny.qwen2, tiny.whisper, projector_layers=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_loads_in_any_dtype(system, tiny, tmp_path, dtype):
    """The fingerprint was once taken after the cast: float16 loses bits, and the right models were refused."""
    system.model.save_checkpoint(tmp_path)
    settings = resolve_settings(ModelArguments(), tmp_path)
    model = build_model(settings, system.prompt.word_ids, 258, dtype, tmp_path)
    assert next(model.llm.parameters()).dtype == dtype
    assert next(model.projector.parameters()).dtype == torch.float32


def test_damaged_checkpoints_are_one_clear_error(system, tiny, tmp_path):
    llm, folder = system.settings["llm"]["name"], tmp_path / "saved"
    system.model.save_checkpoint(folder)
    (tmp_path / "bare").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "bare" / "other.safetensors")
    with pytest.raises(InputError, match=r"config.json missing in .* \(there: .*other.safetensors"):
        build_system(llm, tiny.whisper, projector_model_path=str(tmp_path / "bare" / "other.safetensors"))
    with pytest.raises(InputError, match=r"model.safetensors missing"):
        build_system(llm, tiny.whisper, checkpoint=str(folder))
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        build_system(llm, tiny.whisper, checkpoint=str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json: not JSON"):
        build_system(llm, tiny.whisper, checkpoint=str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        build_system(llm, tiny.whisper, checkpoint=str(folder))


def test_missing_and_unknown_tensors_are_named(system, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    system.model.save_checkpoint(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["projector.extra"] = state.pop("projector.linear1.bias")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"projector.linear1.bias is missing; projector.extra is unknown"):
        build_system(system.settings["llm"]["name"], tiny.whisper, checkpoint=str(tmp_path))


def test_flags_that_contradict_the_checkpoint_are_refused(tiny, tmp_path):
    build_system(tiny.qwen2, tiny.whisper, encoder_padding="30s", projector_stride=4).model.save_checkpoint(tmp_path)
    settings = resolve_settings(ModelArguments(), tmp_path)
    assert (settings["encoder_padding"], settings["projector_stride"]) == ("30s", 4)
    assert settings["llm"]["name"] == str(tiny.qwen2)
    with pytest.raises(InputError, match=r"--projector_stride 5 differs from .*projector_stride 4\): leave the flag out"):
        resolve_settings(ModelArguments(projector_stride=5), tmp_path)
    with pytest.raises(InputError, match="give --llm_model_name_or_path"):
        resolve_settings(ModelArguments(whisper_model_name_or_path="tiny"), None)
    with pytest.raises(InputError, match="give one of them"):
        ModelArguments(checkpoint="a", projector_model_path="b").start()


def test_30s_padding_gives_the_published_300_vectors(tiny):
    system = build_system(tiny.qwen2, tiny.whisper, encoder_padding="30s")
    mel = log_mel(audio(1.0), 80, "30s")[None]
    vectors, length = system.model.embed_speech(mel, torch.tensor([mel.shape[-1]]))
    assert vectors.shape[1] == length.item() == 300


def test_projector_speaks_as_loud_as_the_embedding_table(system):
    table = system.model.llm.get_input_embeddings().weight
    out = system.model.projector(torch.randn(2, 50, 16), torch.full((2,), 50))
    torch.testing.assert_close(out.square().mean().sqrt(), table.square().mean().sqrt(), rtol=0.05, atol=0)


def test_lint_and_format():
    for check in (("check",), ("format", "--check")):
        done = run_script("ruff", *check, ".")
        assert done.returncode == 0, done.stdout + done.stderr
