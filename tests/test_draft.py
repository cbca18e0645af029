"""The CTC's draft, verified by the LLM: what is written is what plain greedy search writes, token by token."""

import pytest
import torch
from conftest import DATA, audio, batch_of, build_system

import draft
from audio import load_audio
from manifest import read_manifest
from settings import SPEECH_INDEX, ModelArguments
from transcriber import DecodeArguments, Transcriber, use_shipped


@pytest.mark.parametrize(
    ("ids", "written", "rest"),
    [
        ("abcd", ["ab"], "cd"),
        ("abcd", ["ax"], "cd"),  # another in its place, or one more: the later of two places
        ("abcd", ["ac"], "d"),  # one less
        ("abcd", ["abcx", "d"], ""),
        ("abcdefg", ["xa", "bc"], "defg"),
        ("ab", ["abab"], ""),
        ("", ["ab"], ""),
        ("ab", [], "ab"),
    ],
)
def test_a_draft_goes_on_where_it_is_most_like_what_is_written(ids, written, rest):
    guess = draft.Draft([*map(ord, ids)])
    left = guess.rest([])
    for some in written:
        left = guess.rest([*map(ord, some)])
    assert "".join(map(chr, left)) == rest


def both_ways(transcriber, clips, plain):
    """What was found by draft and by plain greedy search; `verify`'s account of its passes."""
    written, verify = [], draft.verify

    def record(*args):
        written.append(verify(*args))
        return written[-1]

    with plain.context() as patch:
        patch.setattr(draft, "verify", record)
        found = {}
        generate = transcriber.model.generate
        for wanted in (True, False):
            patch.setattr(transcriber.args, "draft", wanted)
            patch.setattr(transcriber.model, "generate", lambda **o: found.setdefault(wanted, generate(**o)))  # noqa: B023
            transcriber.hypotheses(clips)
    assert len(written) == 1
    return found[True], found[False], written[0]


def alike(some, others):
    """The same tokens and ends, and all but the same log-probabilities."""
    for one, other in zip(some, others, strict=True):
        assert [text[:2] for text in one] == [text[:2] for text in other]
        assert [text.log_prob for text in one] == pytest.approx([text.log_prob for text in other], abs=2e-3)
    return True


@pytest.fixture
def tokens(tiny):
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens")
    with torch.no_grad():  # few tokens in the draft, and different ones
        system.model.ctc.blank_bias.fill_(6.0)
    return system


def prompts_of(tokens):
    """What generate takes for three clips of different lengths, with limits of their own."""
    ids = torch.tensor([tokens.prompt.ids] * 3)
    batch = batch_of(tokens, [audio(2.7, 1), audio(0.8, 2), audio(1.6, 3)], [""] * 3)
    batch = {name: batch[name] for name in ("mel", "mel_length")}
    return batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": torch.tensor([21, 7, 12])}


@pytest.mark.parametrize("decoder", ["llm", "joint", "fusion"])
@pytest.mark.parametrize("clips", [1, 3])
def test_tiny_models_write_what_plain_greedy_search_writes(tokens, monkeypatch, decoder, clips):
    transcriber = Transcriber(tokens.model, tokens.prompt, DecodeArguments(device="cpu", decoder=decoder, num_beams=1))
    drafted, plain, _ = both_ways(transcriber, [audio(2.7, 1), audio(0.8, 2), audio(1.6, 3)][:clips], monkeypatch)
    assert alike(drafted, plain)


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_drafts_that_are_right_wrong_and_half_right(tokens, offset):
    """Of three rows one has its own result as a draft, one another's, one a part of it; limits of their own end two."""
    model, options = tokens.model, prompts_of(tokens)
    plain = model.generate(**options)
    text = [[id for id in row[0].ids if id != tokens.prompt.end_of_turn] for row in plain]
    drafts = [text[0], text[0][::-1], [*text[2][:offset], *text[2][offset + 1 :]]]
    assert alike(model.generate(**options | {"drafts": drafts}), plain)


def test_beams_are_not_drafted(tokens, monkeypatch):
    monkeypatch.setattr(draft, "verify", lambda *_: pytest.fail("a draft is for greedy search"))
    transcriber = Transcriber(tokens.model, tokens.prompt, DecodeArguments(device="cpu", decoder="llm", num_beams=2))
    assert transcriber.transcribe([audio(1.0)])


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}])
def test_reading_the_prompts_beginning_once_changes_nothing(tokens, options):
    """Rows of different lengths: the padding moves behind the beginning that they share."""
    batch = prompts_of(tokens)
    read, written = [], {}
    tokens.model.llm.base_model.layers[0].register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape[:2])))
    for shared in (True, False):
        tokens.model.share_prompt = shared
        written[shared] = tokens.model.generate(**batch, **options)
        first = read[0]
        assert (first == (1, tokens.prompt.ids.index(SPEECH_INDEX))) == shared
        read.clear()
    assert alike(written[True], written[False])


@pytest.fixture(scope="module")
def shipped(real):
    models = ModelArguments(str(real.llm), str(real.whisper))
    use_shipped(models)
    return Transcriber.from_arguments(models, DecodeArguments(device="cpu", dtype="float32", num_beams=1))


@pytest.mark.parametrize("decoder", ["llm", "joint", "fusion"])
def test_the_shipped_checkpoint_writes_what_plain_greedy_search_writes(shipped, monkeypatch, decoder):
    """Six of the demo's clips, of 0.6 to 10 seconds: rows end at different steps, and the drafts are right in part."""
    clips = sorted((load_audio(record.wav)[0] for record in read_manifest(DATA / "test.jsonl")), key=len)[::12]
    transcriber = Transcriber(shipped.model, shipped.prompt, DecodeArguments(device="cpu", decoder=decoder, num_beams=1))
    drafted, plain, written = both_ways(transcriber, clips, monkeypatch)
    assert alike(drafted, plain)
    assert written.passes < max(len(row[0].ids) for row in plain)
    assert sum(written.accepted) > 0
