"""A model made ready to decode with is faster, and writes what it wrote before."""

import platform
import sys

import pytest
import torch
from conftest import audio, build_system
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import inference
from audio import log_mel
from decoding import Part, batches
from draft import ON_A_CPU, lookahead
from longform import Piece
from transcriber import DecodeArguments, Transcriber

CLIPS = [audio(2.7, 1), audio(0.8, 2), audio(1.6, 3)]


@pytest.fixture(params=["frames", "tokens"])
def adapted(tiny, request):
    """A system whose LoRA changes what the LLM writes."""
    system = build_system(tiny.qwen2, tiny.whisper, splice=request.param, lora_r=4)
    for name, p in system.model.llm.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(p, std=0.5)
    return system


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_prepared_model_writes_what_it_wrote(adapted, num_beams):
    args = DecodeArguments(device="cpu", decoder="llm", num_beams=num_beams)
    before = [(h.text, h.score) for h in Transcriber(adapted.model, adapted.prompt, args).hypotheses(CLIPS)]
    model = adapted.model.for_decoding()
    assert not any("lora_" in name for name, _ in model.named_modules())
    assert not any(p.requires_grad for p in model.parameters())
    after = [(h.text, h.score) for h in Transcriber(model, adapted.prompt, args).hypotheses(CLIPS)]
    assert [text for text, _ in after] == [text for text, _ in before]
    assert [score for _, score in after] == pytest.approx([score for _, score in before], abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (2, 3, 24), (0, 24)])
def test_packed_weights_give_the_same_products(dtype, bias, shape):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias).to(dtype)
    x = torch.randn(shape).to(dtype)
    packed = inference.PackedLinear(linear)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), linear(x), atol=0.02 if dtype == torch.bfloat16 else 1e-6, rtol=0)
        wide = torch.randn(2, 3, 48).to(dtype)
        torch.testing.assert_close(packed(wide[..., ::2]), packed(wide[..., ::2].contiguous()))


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="oneDNN elsewhere: not known")
def test_weights_are_packed_and_counted(tiny):
    """torch does not document the name of its packed product: without it all were silently slow."""
    model = build_system(tiny.qwen2, tiny.whisper, splice="tokens").model
    before = sum(p.numel() for p in model.parameters())
    model.for_decoding()
    assert not any(type(module) is nn.Linear for module in model.modules())
    tied = model.llm.get_output_embeddings().weight.numel()
    assert sum(p.numel() for p in model.parameters()) == before + tied


def test_precisions_that_a_processor_cannot_pack_stay_as_they_are(monkeypatch):
    """Half of them raised `fp16 path needs the cpu support …` at the first clip."""
    linear = nn.Linear(4, 4).half()
    assert inference.packed(linear)(torch.ones(1, 4).half()).shape == (1, 4)
    monkeypatch.setattr(inference, "PackedLinear", lambda _: (_ for _ in ()).throw(RuntimeError("cannot")))
    assert inference.packed(linear) is linear


def test_where_torch_has_no_packed_product_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(inference, "PACKS", False)
    model = nn.Sequential(nn.Linear(2, 3))
    inference.prepare(model, keep_plain=False)
    assert type(model[0]) is nn.Linear
    assert not model[0].weight.requires_grad


def test_a_beam_searchs_cache_holds_what_transformers_own_does():
    """Positions appended one by one, several at once and past the room made for them, while beams change places, come and
    go."""
    torch.manual_seed(0)
    theirs, ours = DynamicCache(), DynamicCache()
    prompt = torch.randn(2, 2, 5, 4)
    for cache in (theirs, ours):
        cache.update(prompt, -prompt, 0)
    clips = torch.arange(2)
    for step in range(inference.ROOM + 3):
        kept = torch.tensor([0, 1]).repeat_interleave(3)[: 6 - step % 3 // 2]  # the same clips' twice, then one fewer
        beams = torch.stack([torch.randint(3, ()) + (0 if clip == 0 else int((clips == 0).sum())) for clip in kept])
        beams = beams.clamp(max=len(clips) - 1) if step else kept
        beams = torch.arange(len(clips)) if step % 5 == 4 else beams  # each goes on alone
        theirs.reorder_cache(beams)
        inference.follow(ours, beams, torch.equal(clips[beams], clips))
        clips = clips[beams]
        assert isinstance(ours.layers[0], inference.BeamLayer)
        new = torch.randn(len(clips), 2, 1 + step % 2, 4)
        for expected, got in zip(theirs.update(new, -new, 0), ours.update(new, -new, 0), strict=True):
            assert torch.equal(expected, got)
        assert theirs.get_seq_length() == ours.get_seq_length()


OTHER_CACHES = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "head_dim": 8},
}


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", OTHER_CACHES)
def test_llms_whose_caches_keep_no_positions_write_what_they_wrote(tiny, tmp_path, family, num_beams):
    """Padding behind the prompt's beginning stood in Gemma's window, and LFM2's convolutions cannot be repeated."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny.qwen2)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(family, **sizes, **OTHER_CACHES[family], pad_token_id=tokenizer.pad_token_id)
    llm = AutoModelForCausalLM.from_config(config)
    for name, p in llm.named_parameters():
        if p.dim() == 2 and "embed" not in name and "lm_head" not in name:
            nn.init.normal_(p, std=0.3)
    llm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    system = build_system(tmp_path, tiny.whisper, splice="tokens")
    args = DecodeArguments(device="cpu", decoder="llm", num_beams=num_beams)
    system.model.share_prompt = False
    plain = [(h.text, h.score) for h in Transcriber(system.model, system.prompt, args).hypotheses(CLIPS)]
    prepared = Transcriber(system.model.for_decoding(), system.prompt, args).hypotheses(CLIPS)
    assert [h.text for h in prepared] == [text for text, _ in plain]
    assert [h.score for h in prepared] == pytest.approx([score for _, score in plain], abs=1e-2)


def test_the_prompts_beginning_is_read_once_for_all_batches(tiny):
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens")
    model, read = system.model.for_decoding(), []
    transcriber = Transcriber(model, system.prompt, DecodeArguments(device="cpu", decoder="llm", num_beams=1, draft=False))
    model.llm.base_model.layers[0].register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape[:2])))
    first = transcriber.transcribe(CLIPS)
    before = (1, system.prompt.ids.index(-200))
    assert read[0] == before
    assert transcriber.transcribe(CLIPS) == first
    assert transcriber.transcribe(CLIPS[:1]) == first[:1]
    assert read.count(before) == 1


def test_on_a_cpu_a_clip_is_heard_alone(tiny):
    """Exactly what it is alone, in any precision: no padding, no company."""
    model = build_system(tiny.qwen2, tiny.whisper, splice="tokens").model.for_decoding()
    mels = [log_mel(clip, 80) for clip in CLIPS]
    together = torch.zeros(3, 80, max(mel.shape[1] for mel in mels))
    for row, mel in zip(together, mels, strict=True):
        row[:, : mel.shape[1]] = mel
    log_probs, length = model.hear(together, torch.tensor([mel.shape[1] for mel in mels]))
    for row, n, mel in zip(log_probs, length, mels, strict=True):
        alone, own = model.hear(mel[None], torch.tensor([mel.shape[1]]))
        assert own == n
        assert torch.equal(row[:n], alone[0])


def test_a_batch_holds_clips_of_like_length():
    """One long clip made a batch of short ones take as long as itself for each of them."""
    parts = [Part(None, Piece(0.0, audio(s))) for s in (1.0, 20.0, 0.9, 11.0, 0.4, 2.1)]
    found = [[len(part.piece.audio) / 16000 for part in batch] for batch in batches(parts, 8, float("inf"))]
    assert found == [[20.0, 11.0], [2.1], [1.0, 0.9], [0.4]]


@pytest.mark.parametrize(("rows", "tokens"), [(1, 16), (4, 4), (100, 0)])
def test_on_a_cpu_many_drafts_are_verified_by_fewer_tokens_each(rows, tokens):
    assert lookahead(rows, torch.device("cpu")) == tokens <= ON_A_CPU / rows
    assert lookahead(rows, torch.device("cuda")) == 16
