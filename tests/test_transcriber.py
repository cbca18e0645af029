"""The Python API: what goes in, and what is known of a transcript: scores, other readings, when each word was said."""

import itertools
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import DATA, RATE, audio, build_system
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from audio import load_audio, log_mel, samples_of, speech_vectors, vector_seconds
from ctc import forced_alignment, greedy_path, log_likelihood
from dataset import SpeechCollator
from decoding import decode
from manifest import read_manifest
from search import Sample
from settings import IGNORE_INDEX, InputError
from transcriber import END_PROB, DecodeArguments, Transcriber
from transcript import Hypothesis, Segment, Word, joined, timed_words


@pytest.fixture(scope="module")
def shipped(real):
    """The checkpoint that comes along, in float32, greedy."""
    return Transcriber.from_checkpoint(device="cpu", dtype="float32", num_beams=1)


@pytest.fixture(scope="module")
def hears(shipped):
    """The same, by its CTC alone."""
    return Transcriber(shipped.model, shipped.prompt, replace(shipped.args, decoder="ctc"))


@pytest.fixture(scope="module")
def prompts():
    """Some short recordings of the test set, each (samples,)."""
    records = [record for record in read_manifest(DATA / "test.jsonl") if 1.2 < record.duration < 1.9][:3]
    return [load_audio(record.wav)[0] for record in records]


@pytest.fixture(scope="module")
def tokens(tiny):
    """A tiny random system that writes different tokens, and texts of all lengths: every third token ends a turn."""
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens")
    with torch.no_grad():
        system.model.ctc.blank_bias.fill_(5.0)
    torch.manual_seed(0)
    for p in system.model.llm.base_model.layers.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    system.model.llm.generation_config.eos_token_id = [*range(0, 256, 3), system.prompt.end_of_turn]
    return system


@pytest.fixture
def as_ids(monkeypatch):
    """Texts that tell the tokens, the padding too."""
    monkeypatch.setattr(Transcriber, "_text", lambda self, ids: str(ids))


def transcriber(system, **options):
    return Transcriber(system.model, system.prompt, DecodeArguments(**{"device": "cpu", "guard": "off"} | options))


# --- alignment


def paths_of(log_probs, classes):
    """(log P, path) of every path of classes and blanks that says `classes`."""
    N, blank = len(log_probs), log_probs.shape[1] - 1
    for path in itertools.product(range(blank + 1), repeat=N):
        if [c for c, _ in itertools.groupby(path) if c != blank] == list(classes):
            yield log_probs[np.arange(N), path].sum(), path


@pytest.mark.parametrize("classes", [[0], [0, 1, 2], [1, 1], [2, 0, 0], []])
@pytest.mark.parametrize("seed", range(4))
def test_alignment_and_likelihood_are_those_of_enumeration(classes, seed):
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)) * 2
    log_probs = logits.log_softmax(-1)
    everything = list(paths_of(log_probs.numpy(), classes))
    _, best = max(everything)
    expected, at = [], 0
    for c, run in itertools.groupby(best):
        length = len(list(run))
        expected += [(at, at + length - 1)] if c != 3 else []
        at += length
    assert forced_alignment(log_probs.numpy(), classes) == expected
    total = np.logaddexp.reduce([score for score, _ in everything])
    assert log_likelihood(log_probs, [classes, [2]])[0] == pytest.approx(total, abs=1e-5)


def test_too_few_frames_have_no_alignment():
    """The same class twice needs a blank between; and whatever the frames, nothing aligns to no text."""
    log_probs = np.log(np.full((2, 4), 0.25))
    assert forced_alignment(log_probs, [0, 1]) == [(0, 0), (1, 1)]
    assert forced_alignment(log_probs, [0, 0]) is None
    assert forced_alignment(log_probs, [0, 1, 2]) is None
    assert forced_alignment(log_probs[:0], [0]) is None
    assert forced_alignment(log_probs, []) == []
    assert log_likelihood(torch.tensor(log_probs), [[0, 0]]) == [-1e10]


# --- scores


def teacher_forced(system, clip, ids):
    """log P_LLM of these tokens, by the loss's own forward pass."""
    example = {
        "input_ids": system.prompt.ids + ids,
        "labels": [IGNORE_INDEX] * len(system.prompt.ids) + ids,
        "ctc_labels": [0],
    }
    example = {name: torch.tensor(row) for name, row in example.items()}
    with torch.no_grad():
        logits = system.model(**SpeechCollator()([example | {"mel": log_mel(clip, 80)}]))["logits"]
    return -cross_entropy(logits, torch.tensor(ids), reduction="sum").item()


KNOBS = [
    {"num_beams": 1},
    {"num_beams": 3, "nbest": 3},
    {"num_beams": 3, "nbest": 2, "length_penalty": 0.3, "no_repeat_ngram_size": 2},
    {"num_beams": 1, "repetition_penalty": 1.3},
    {"num_beams": 1, "temperature": 1.5},
]


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("decoder", ["llm", "joint"])
def test_scores_are_those_of_a_forward_pass(tokens, knobs, decoder, as_ids):
    """Of whole texts, whatever shaped the search: the LLM's part by teacher forcing; the CTC's is compared with enumeration
    above. A text that ran into its limit has no end of turn, and is scored without one."""
    clips, limit = [audio(1.7, 1), audio(0.8, 2)], 6
    found = transcriber(tokens, decoder=decoder, joint_weight=0.7, max_new_tokens=limit, **knobs).hypotheses(clips)
    batch = SpeechCollator()([{"input_ids": torch.tensor([0]), "mel": log_mel(clip, 80)} for clip in clips])
    with torch.no_grad():
        log_probs, length = tokens.model.hear(batch["mel"], batch["mel_length"])
    ended = []
    for hypothesis, clip, row, frames in zip(found, clips, log_probs, length, strict=True):
        assert hypothesis.nbest[0] == (hypothesis.text, hypothesis.score)
        assert len(hypothesis.nbest) == knobs.get("nbest", 1)
        for text, score in hypothesis.nbest:
            ids = json.loads(text)
            ended.append(ids[-1] in tokens.model.llm.generation_config.eos_token_id)
            said = ids[:-1] if ended[-1] else ids
            voted = log_likelihood(row[:frames], [tokens.prompt.spelling(said)])[0] if decoder == "joint" else 0
            assert score == pytest.approx(teacher_forced(tokens, clip, ids) + 0.7 * voted, abs=1e-4)
            if text == hypothesis.text:
                assert (hypothesis.tokens, hypothesis.ended) == (len(ids), ended[-1])
    assert any(ended)


def test_the_score_of_the_ctc_alone_is_that_of_its_text(tokens):
    clips = [audio(1.7, 1), audio(0.8, 2)]
    found = transcriber(tokens, decoder="ctc").hypotheses(clips)
    for clip, hypothesis in zip(clips, found, strict=True):
        with torch.no_grad():
            heard = tokens.model.hear(log_mel(clip, 80)[None], torch.tensor([len(clip) // 160]))
        (path,) = greedy_path(*heard)
        assert hypothesis.score == pytest.approx(log_likelihood(heard[0][0], [path])[0], abs=1e-4)
        assert (hypothesis.tokens, hypothesis.ended) == (len(path), None)
        assert hypothesis.nbest == [(hypothesis.text, hypothesis.score)]
        assert hypothesis.text == hypothesis.ctc_text
    assert any(hypothesis.tokens for hypothesis in found)


# --- knobs


@pytest.mark.parametrize(
    ("decoder", "knobs"),
    [
        ("llm", {"repetition_penalty": 2.0}),
        ("llm", {"no_repeat_ngram_size": 1}),
        ("llm", {"temperature": 2.0}),
        ("joint", {"temperature": 2.0}),
    ],
)
def test_knobs_mean_the_same_in_any_company(tokens, decoder, knobs, monkeypatch):
    """generate's own repetition penalty overlooked as many tokens of a text as its clip had padding on the left: it takes
    the attention mask of a prompt of vectors for one of tokens that it has been given. And a sample hung on the batch."""
    end = tokens.prompt.end_of_turn
    monkeypatch.setattr(tokens.model.llm.generation_config, "eos_token_id", [end])
    monkeypatch.setattr(Transcriber, "_text", lambda self, ids: str([id for id in ids[:12] if id != end]))
    short, long = audio(0.8, 2), audio(2.9, 4)
    one = transcriber(tokens, decoder=decoder, num_beams=1, max_new_tokens=12, **knobs)
    (alone,) = one.hypotheses([short])
    assert alone.text == one.hypotheses([short, long])[0].text == one.hypotheses([long, short])[1].text
    plain = {name: getattr(DecodeArguments, name) for name in knobs}
    assert alone.text != one.hypotheses([short], **plain)[0].text


def test_a_temperature_samples_the_softmax():
    """Four thousand clips of the same scores: as often as their probabilities at that temperature say."""
    scores = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    sample, clip = Sample(0.7, range(4000)), torch.arange(4000)
    best = sample(clip, 3, scores.expand(4000, -1)).argmax(1)
    shares = torch.bincount(best, minlength=4) / len(best)
    torch.testing.assert_close(shares, (scores[0] / 0.7).softmax(0), atol=0.03, rtol=0)


def test_of_no_clips_there_are_no_texts(tokens):
    """An empty batch was a RuntimeError of torch's."""
    assert transcriber(tokens).transcribe([]) == []


def test_search_options_of_one_call_leave_the_next_alone(tokens):
    one = transcriber(tokens, decoder="llm", num_beams=1, max_new_tokens=8)
    clips = [audio(1.0, 1), audio(1.2, 2)]
    before = one.hypotheses(clips)
    assert one.hypotheses(clips, decoder="ctc")[0].ended is None
    assert len(one.hypotheses(clips, num_beams=3, nbest=3)[0].nbest) == 3
    assert one.hypotheses(clips) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "--num_beams must be at least 1"),
        ({"nbest": 11, "decoder": "joint"}, "--nbest 11 needs --num_beams 11 or more, not 10"),
        ({"nbest": 5, "decoder": "llm"}, "--nbest 5 needs --num_beams 5 or more, not 4"),
        ({"repetition_penalty": 0.0}, "--repetition_penalty must be above 0"),
        ({"no_repeat_ngram_size": -1}, "--no_repeat_ngram_size must not be negative"),
        ({"temperature": -0.1}, "--temperature must not be negative"),
        ({"temperature": 0.5}, "--temperature samples one text: give --num_beams 1"),
        ({"beam_threshold": 0.0}, "--beam_threshold must be above 0"),
        ({"length_penalty": float("nan")}, "--length_penalty must be a number"),
        ({"joint_weight": -1.0}, "--joint_weight must not be negative"),
        ({"length_bonus": -1.0}, "--length_bonus must not be negative"),
        ({"batch_seconds": float("nan")}, "--batch_seconds must be at least 1"),
        ({"decoder": "beam"}, "--decoder 'beam' is none of auto, ctc, llm, joint"),  # was a KeyError
        ({"guard": "Off"}, "--guard 'Off' is none of on, off"),  # was taken for off
        ({"vad": "webrtc"}, "--vad 'webrtc' is none of energy, silero, none"),
    ],
)
def test_knobs_that_cannot_be_are_told(tokens, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        transcriber(tokens, **options)
    with pytest.raises(InputError, match=f"^{message}"):
        transcriber(tokens).hypotheses([audio(1.0)], **options)


# --- what goes in


def test_files_arrays_and_tensors_of_any_form_say_the_same(hears, prompts, tmp_path):
    """One in, one out; a list, a list in its order."""
    clip = prompts[0]
    stereo = np.stack([clip, clip])
    soundfile.write(tmp_path / "a.wav", clip, RATE, subtype="FLOAT")
    one = hears(str(tmp_path / "a.wav"))
    assert one.text
    assert one.duration == pytest.approx(len(clip) / RATE)
    forms = [tmp_path / "a.wav", clip, torch.tensor(clip), stereo, torch.tensor(stereo.T), clip.astype(np.float64)]
    assert [found.text for found in hears(forms, sampling_rate=RATE)] == [one.text] * len(forms)
    assert hears(clip, sampling_rate=RATE) == hears([clip], sampling_rate=RATE)[0]
    louder = hears(soxr.resample(clip, RATE, 44100), sampling_rate=44100)
    assert louder.duration == pytest.approx(one.duration, abs=1e-3)
    assert louder.text == one.text
    assert hears([]) == []


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.uint8])
def test_integers_are_scaled_by_their_range(dtype):
    wave = np.sin(np.arange(1600) / 20) * 0.9
    steps = np.iinfo(dtype).max // (2 if dtype == np.uint8 else 1)
    whole = np.round(wave * steps + (128 if dtype == np.uint8 else 0)).astype(dtype)
    for array in (whole, torch.from_numpy(whole), np.stack([whole, whole], 1)):
        np.testing.assert_allclose(samples_of(array, RATE), wave, atol=1.5 / steps + 1e-6)
    assert samples_of(torch.tensor(wave, dtype=torch.bfloat16), RATE).dtype == np.float32


@pytest.mark.parametrize(
    ("array", "rate", "message"),
    [
        (np.zeros(RATE), None, "an array needs sampling_rate"),
        (np.zeros(RATE), 0, "an array needs sampling_rate"),
        (np.zeros((16, RATE)), RATE, "give several clips as a list"),
        (np.zeros((2, 8)), RATE, "neither .samples,. nor one clip"),
        (np.zeros((1, 2, RATE)), RATE, "neither .samples,. nor one clip"),
        (np.zeros(RATE, np.int64), RATE, "samples of int64: what is full scale"),
        (np.zeros(RATE, bool), RATE, "samples of bool"),
        (np.full(RATE, 12345.0), RATE, "floats up to 12345: .*divide those of int16 by 32768"),
        (np.array([0.0, np.nan] * RATE), RATE, "has NaN or infinite samples"),
        (np.zeros(0), RATE, "has no samples"),
        (np.zeros(200), RATE, "shorter than one projector window"),
        ("no.wav", None, "no.wav: no such file"),
        (0.5, RATE, "float is not audio"),
        (None, RATE, "NoneType is not audio"),
    ],
)
def test_what_cannot_be_decoded_alone_raises(tokens, array, rate, message):
    with pytest.raises(InputError, match=message):
        transcriber(tokens)(array, sampling_rate=rate)


def test_what_cannot_be_decoded_does_not_stop_a_list(tokens, tmp_path):
    one = transcriber(tokens, batch_size=2)
    found = one([audio(1.0), "no.wav", audio(0.01), audio(0.9, 2)], sampling_rate=RATE)
    assert [bool(f.error) for f in found] == [False, True, True, False]
    assert (found[1].text, found[1].duration, found[1].segments) == ("", 0.0, [])
    assert found[3].text == one(audio(0.9, 2), sampling_rate=RATE).text


def test_a_long_array_is_cut_like_a_file(tokens, tmp_path, monkeypatch):
    """Seventy seconds: every piece in its place, in order, its words moved by where it begins."""
    clip = audio(70)
    soundfile.write(tmp_path / "long.wav", clip, RATE, subtype="FLOAT")

    def hypotheses(self, clips, **search):
        return [Hypothesis(f"{len(c) / RATE:.3f}", words=[Word("x", 0.5, 1.0, 0.9)], score=-1.0, tokens=2) for c in clips]

    monkeypatch.setattr(Transcriber, "hypotheses", hypotheses)
    one = transcriber(tokens, batch_size=2)
    found = one(clip, sampling_rate=RATE)
    assert found == one(tmp_path / "long.wav")
    assert len(found.segments) >= 3
    lengths = [float(text) for text in found.text.split()]
    assert sum(lengths) == pytest.approx(70, abs=0.01) == found.duration
    starts = [segment.start for segment in found.segments]
    assert starts == pytest.approx([sum(lengths[:i]) for i in range(len(lengths))], abs=0.01)
    assert [word.start for word in found.words] == [start + 0.5 for start in starts]
    assert (found.score, found.tokens) == (-len(lengths), 2 * len(lengths))


def test_pieces_are_joined():
    """Readings by the highest sums; what the guard has replaced; flags once; no words only where no piece has any."""
    word = Word("b", 1.0, 1.5, 0.5)
    first = Hypothesis("a", score=-1.0, tokens=2, nbest=[("a", -1.0), ("A", -1.5)], flags=["loop"], unguarded="a a a")
    second = Hypothesis("b", score=-2.0, tokens=3, nbest=[("b", -2.0), ("", -4.0)], words=[word], flags=["loop", "x"])
    found = joined([(0.0, 2.0, first), (2.5, 3.0, second)], 5.5)
    assert (found.text, found.score, found.tokens, found.flags) == ("a b", -3.0, 5, ["loop", "x"])
    assert found.nbest == [("a b", -3.0), ("A b", -3.5)]
    assert found.segments == [Segment(0.0, 2.0, "a"), Segment(2.5, 5.5, "b")]
    assert found.words == [Word("b", 3.5, 4.0, 0.5)]
    assert found.unguarded == "a a a b"
    assert joined([(0.0, 2.0, replace(first, unguarded=None))], 2.0).words is None
    assert joined([(0.0, 2.0, Hypothesis("a", score=-1.0)), (2.0, 2.0, second)], 4.0).nbest[0] == ("a b", -3.0)
    nothing = joined([], 0.3, "why")
    assert (nothing.text, nothing.nbest, nothing.words, nothing.error) == ("", [], None, "why")


# --- words


def test_the_bonus_is_the_checkpoints_unless_given(tokens, monkeypatch):
    """1.2 suits the checkpoint that comes along; it made five errors in eight clips that a new one had learned by heart."""
    given, generate = [], tokens.model.generate
    monkeypatch.setattr(tokens.model, "generate", lambda **o: given.append(o["length_bonus"]) or generate(**o))
    for own in ({}, {"length_bonus": 0.4}):
        monkeypatch.setattr(tokens.model, "settings", tokens.model.settings | own)
        for flags in ({}, {"length_bonus": 0.7}, {"length_bonus": 0.0}):
            transcriber(tokens, decoder="joint", num_beams=1, max_new_tokens=3, **flags).transcribe([audio(0.8)])
    assert given == [0.0, 0.7, 0.0, 0.4, 0.7, 0.0]


def test_how_to_decode_goes_along_when_a_checkpoint_is_trained_further(tiny, tmp_path):
    model = build_system(tiny.qwen2, tiny.whisper, splice="tokens").model
    chosen = {"length_bonus": 1.2, "decoder": "fusion"}
    model.settings |= chosen
    model.save_checkpoint(tmp_path / "start")
    further = build_system(tiny.qwen2, tiny.whisper, checkpoint=str(tmp_path / "start"))
    assert transcriber(further).decoder == "fusion"
    assert transcriber(further, decoder="joint").decoder == "joint"
    further.model.save_checkpoint(tmp_path / "end")
    assert chosen.items() <= json.loads((tmp_path / "end/config.json").read_text()).items()
    further.model.settings["length_bonus"] = "1.2"
    with pytest.raises(InputError, match=r"config.json of the checkpoint: length_bonus '1.2' is no number from 0 on"):
        transcriber(further)
    further.model.settings |= {"length_bonus": 1.2, "decoder": "magic"}
    with pytest.raises(InputError, match=r"config.json of the checkpoint: decoder 'magic' is none of ctc, llm"):
        transcriber(further)


def language_model_score(llm, context, ids, ends, end_prob):
    """log P of these tokens behind the context, by one forward pass: the end has `end_prob`, the others share the rest."""
    with torch.no_grad():
        logits = llm(input_ids=torch.tensor([context + ids])).logits[0, len(context) - 1 : -1].double()
    total = 0.0
    for row, id in zip(logits, ids, strict=True):
        row[ends] = -torch.inf
        total += math.log(end_prob) if id in ends else math.log(1 - end_prob) + row.log_softmax(-1)[id].item()
    return total


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_in_fusion_the_llm_hears_nothing_and_is_as_it_was(tiny, num_beams, prepared, as_ids):
    """Texts are scored by the LLM without LoRA, soft prompt or speech, and the CTC; afterwards LoRA is there again."""
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens", lora_r=4)
    for name, p in system.model.llm.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.5)
    clips = [audio(1.7, 1), audio(0.8, 2)]
    joint = partial(transcriber, system, decoder="joint", num_beams=num_beams)
    before = [(h.text, h.score) for h in joint().hypotheses(clips)]
    if prepared:
        system.model.for_decoding()
    one = transcriber(system, decoder="fusion", num_beams=num_beams, joint_weight=0.7)
    llm = AutoModelForCausalLM.from_pretrained(tiny.qwen2)
    ends = system.model.llm.generation_config.eos_token_id
    found = one.hypotheses(clips)
    for hypothesis, clip in zip(found, clips, strict=True):
        ids = json.loads(hypothesis.text)
        mel = log_mel(clip, 80)
        row, frames = system.model.hear(mel[None], torch.tensor([mel.shape[1]]))
        voted = log_likelihood(row[0, :frames], [system.prompt.spelling(ids)])[0]
        own = language_model_score(llm, system.prompt.context, ids, ends, END_PROB)
        assert hypothesis.score == pytest.approx(own + 0.7 * voted, abs=2e-3)
    if num_beams == 1:  # a draft changes nothing
        plain = replace(one.args, draft=False)
        assert [h.text for h in Transcriber(system.model, system.prompt, plain).hypotheses(clips)] == [h.text for h in found]
    after = [(h.text, h.score) for h in joint().hypotheses(clips)]
    adapters = [p for name, p in system.model.named_parameters() if ".lora_" in name]
    assert prepared or (adapters and all(p.requires_grad for p in adapters))  # a training goes on with them
    assert [text for text, _ in after] == [text for text, _ in before]
    assert [score for _, score in after] == pytest.approx([score for _, score in before], abs=2e-3)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_fusion_writes_something_exactly_where_the_ctc_hears_something(tiny, num_beams, monkeypatch):
    """Also where its LLM would rather end at once: of letters said alone nothing was left."""
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens")
    monkeypatch.setattr("transcriber.END_PROB", 1 - 1e-7)
    for bias, speaks in ((-5.0, True), (50.0, False)):
        with torch.no_grad():
            system.model.ctc.blank_bias.fill_(bias)
        one = transcriber(system, decoder="fusion", num_beams=num_beams, joint_weight=0.01)
        for found in one.hypotheses([audio(1.0), audio(0.8)]):
            assert (bool(found.ctc_text), found.tokens > 1) == (speaks, speaks)  # one of them is the end


@pytest.mark.parametrize(("decoder", "num_beams"), [("llm", 1), ("llm", 3), ("fusion", 1), ("fusion", 3)])
def test_scores_that_are_no_numbers_are_told(tiny, decoder, num_beams):
    """Of float16 that overflowed: a search wrote nothing, a draft the token 0 again and again, and neither said why."""
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens")
    one = transcriber(system, decoder=decoder, num_beams=num_beams)
    system.model.llm.get_output_embeddings().register_forward_hook(lambda _, __, out: out.fill_(torch.nan))
    clips = [audio(1.0), audio(0.8)]
    assert [str(found)[:34] for found in one.hypotheses(clips)] == ["the LLM's scores are not numbers: "] * 2
    assert all(isinstance(found, InputError) for found in decode(one, clips))
    with pytest.raises(InputError, match="the LLM's scores are not numbers"):
        one.transcribe(clips)


def test_fusion_needs_the_vote_of_a_ctc(tokens, tiny):
    with pytest.raises(InputError, match="--decoder fusion needs a --joint_weight above 0"):
        transcriber(tokens, decoder="fusion", joint_weight=0.0)
    with pytest.raises(InputError, match="--decoder fusion needs a checkpoint trained with --splice tokens"):
        transcriber(build_system(tiny.qwen2, tiny.whisper), decoder="fusion")


def test_the_first_of_the_nbest_of_a_long_recording_is_its_text():
    """A search with a bonus or a penalty may like best what has not the highest score."""
    pieces = [Hypothesis(text, score=-2.0, nbest=[(text, -2.0), (text.upper(), -1.5)]) for text in "ab"]
    found = joined([(0.0, 2.0, pieces[0]), (2.0, 2.0, pieces[1])], 4.0)
    assert found.nbest == [("a b", -4.0), ("A B", -3.0)]
    assert found.nbest[0] == (found.text, found.score)


def test_words_of_a_recording_have_times_and_confidence(hears, prompts):
    """In order, within the clip, none before the last has ended; half a second of silence in front moves them by that."""
    found = hears(prompts, sampling_rate=RATE)
    moved = hears([np.append(np.zeros(RATE // 2, np.float32), clip) for clip in prompts], sampling_rate=RATE)
    compared = 0
    for clip, early, late in zip(prompts, found, moved, strict=True):
        assert [word.text for word in early.words] == early.text.split() != []
        edges = [edge for word in early.words for edge in (word.start, word.end)]
        assert edges == sorted(edges)
        assert 0 <= edges[0] < edges[-1] <= len(clip) / RATE
        assert all(0 < word.confidence <= 1 for word in early.words)
        if late.text == early.text:
            shifts = [b.start - a.start for a, b in zip(early.words, late.words, strict=True)]
            assert shifts == pytest.approx([0.5] * len(shifts), abs=0.09)  # two vectors of 40 ms
            compared += 1
    assert compared


def test_a_frame_lasts_as_long_as_the_length_rule_says(shipped):
    """Nine frames of blank, then a word of one token: it starts with the tenth vector, whose samples begin at 0.36 s."""
    spelling = shipped.prompt.spelling
    (c,) = spelling(spelling.tokenizer(" the").input_ids)
    log_probs = np.full((12, len(spelling.tokens) + 1), -9.0)
    log_probs[:, -1] = np.log(0.9)
    log_probs[9:11, c] = np.log([0.8, 0.2])
    log_probs[9:11, -1] = -5.0
    stride = shipped.model.settings["projector_stride"]
    (word,) = timed_words(spelling.tokenizer(" the").input_ids, spelling, log_probs, vector_seconds(stride), 0.43)
    assert speech_vectors(round(0.36 * RATE), shipped.model.settings) == 9
    assert (word.text, word.start) == ("the", pytest.approx(0.36))
    assert word.end == pytest.approx(0.43)  # the clip's own end
    assert word.confidence == pytest.approx(0.4)  # the root of 0.8 · 0.2


def test_words_lie_within_the_clip_where_it_was_padded_to_30_s(tiny, monkeypatch):
    """One that the CTC heard in the padding began after it had ended."""
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens", encoder_padding="30s")
    tokens, decode = system.prompt.spelling.tokens, system.prompt.tokenizer.decode
    heard = torch.full((1, 750, len(tokens) + 1), -9.0)
    heard[..., -1] = -0.1
    word = next(c for c, id in enumerate(tokens) if decode([id]).isalpha())
    heard[0, 100, word] = 0.0  # after 4 s
    monkeypatch.setattr(system.model, "hear", lambda *_: (heard, torch.tensor([750])))
    (found,) = transcriber(system, decoder="ctc").hypotheses([audio(1.0)])
    (one,) = found.words
    assert 0 <= one.start < one.end <= 1.0


def test_what_the_ctc_cannot_spell_has_no_words(shipped):
    spelling = shipped.prompt.spelling
    log_probs = np.log(np.full((40, len(spelling.tokens) + 1), 1 / (len(spelling.tokens) + 1)))
    ids = spelling.tokenizer(" naïve text").input_ids
    assert not spelling.whole(ids)
    assert timed_words(ids, spelling, log_probs, 0.04, 1.6) is None
    ids = spelling.tokenizer(" a long text in few frames").input_ids
    assert timed_words(ids, spelling, log_probs[:3], 0.04, 0.1) is None
    assert len(timed_words(ids, spelling, log_probs, 0.04, 1.6)) == 6
    assert timed_words([], spelling, log_probs, 0.04, 1.6) == []


# --- company


@pytest.mark.parametrize(("decoder", "num_beams"), [("ctc", 1), ("llm", 1), ("joint", 2), ("fusion", 3)])
def test_size_order_and_company_of_a_batch_never_change_a_text(shipped, prompts, decoder, num_beams):
    """With the real models, in float32; in bfloat16 benchmarks/decoders.py --invariance counts."""
    one = partial(shipped.hypotheses, decoder=decoder, num_beams=num_beams)
    expected = one(prompts)
    assert all(hypothesis.text for hypothesis in expected)
    for company in ([0], [2, 0], [2, 1]):
        for hypothesis, i in zip(one([prompts[i] for i in company]), company, strict=True):
            assert hypothesis.text == expected[i].text
            assert hypothesis.score == pytest.approx(expected[i].score, abs=1e-3)


def test_threads_take_turns(tokens, monkeypatch):
    """Four threads share a transcriber: no two are within the model at a time, and each gets what it would get alone."""
    one = transcriber(tokens, decoder="llm", num_beams=1, max_new_tokens=6)
    clips = [audio(0.8 + i / 4, i) for i in range(4)]
    expected = [one([clip], RATE) for clip in clips]
    real, inside, most = tokens.model.hear, [], []

    def hear(*args):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        found = real(*args)
        inside.pop()
        return found

    monkeypatch.setattr(tokens.model, "hear", hear)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda clip: one([clip], RATE), clips)) == expected
    assert max(most) == 1
