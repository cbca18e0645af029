"""The guard: each rule on texts and on sounds, what is decoded again, and the checkpoint that comes along on silence."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, RATE, ROOT, build_system

from audio import load_audio
from decoding import decode
from guard import broken_rules, disagree, guarded, steady, with_and_without
from manifest import read_manifest
from settings import InputError, ModelArguments
from transcriber import DecodeArguments, Transcriber, use_shipped
from transcript import Hypothesis, joined

sys.path.insert(0, str(ROOT / "benchmarks"))
from invented_words import SOUNDS, coloured, loops, rms, sounds

SPEECH = load_audio(DATA / "clips" / "agent-user.opus")[0]  # 4.9 s: agent login please enter your agent number followed …


@pytest.mark.parametrize(
    ("text", "ctc_text", "rules"),
    [
        ("please enter your number", "pleas ender your number", []),
        ("", "", []),
        ("", "please", []),
        ("thank you", "", ["no_speech"]),
        ("go to to to to to the office", "go to the office", ["loop"]),
        ("one one one one one", "one one one one one", []),  # it was said
        ("I'm sorry, but I can't hear that.", "i'm sorry but i can't hear that", []),
        ("as an ai i have no ears", "agent login please enter your agent number", ["refusal", "disagrees"]),
        ("please hold the line " * 12, "please hold the line", ["loop", "too_fast", "disagrees"]),
        ("the exact words that were spoken above", "enter your agent number", ["disagrees"]),
        ("to", "two", []),
    ],
)
def test_rules_on_texts_with_a_ctc(text, ctc_text, rules):
    assert broken_rules(SPEECH, Hypothesis(text, True, ctc_text=ctc_text)) == rules


@pytest.mark.parametrize(
    ("text", "ended", "rules"),
    [
        ("agent login please enter your agent number followed by the pound key", True, []),
        ("i'm sorry but i can't help with that", True, ["refusal"]),
        ("the the the the", True, ["loop"]),
        (" ".join(f"w{i}" for i in range(41)), True, []),
        (" ".join(f"w{i}" for i in range(42)), True, ["too_fast"]),
        ("人" * 42, True, ["loop", "too_fast"]),
        ("agent login please", False, ["cut_off"]),
    ],
)
def test_rules_on_texts_without_a_ctc(text, ended, rules):
    assert broken_rules(SPEECH, Hypothesis(text, ended)) == rules
    assert "cut_off" not in broken_rules(SPEECH, Hypothesis(text, ended), bounded=False)


@pytest.mark.parametrize(
    ("text", "ctc_text", "disagrees"),
    [
        ("Hello, World!", "hello wor ld", False),  # letters alone
        ("pipe", "piy", False),  # a short word: two edits
        ("close brackets", "close parentices", True),
        ("to exit the mansion", "too exit the meniu", False),
        ("write down the exact words", "roml", True),
    ],
)
def test_disagreement_with_the_ctc(text, ctc_text, disagrees):
    """Texts of dev that the LLM alone and the CTC wrote."""
    assert disagree(text, ctc_text) == disagrees


def test_silence_noise_and_tones_are_steady_and_have_no_text_without_a_ctc():
    """Another seed than that on which the thresholds were chosen, 1 to 20 s."""
    silence, noise = ([clip.audio for clip in sounds(make, 5, 8)] for make in SOUNDS[:2])
    held = np.sin(2 * np.pi * 440 * np.arange(3 * RATE) / RATE)
    for sound in (*silence, *noise, held):
        assert steady(sound)
    assert broken_rules(held, Hypothesis("thank you", True)) == ["no_speech"]
    assert broken_rules(held, Hypothesis("thank you", True, ctc_text="thank you")) == []  # a CTC hears better
    assert not steady(np.zeros(10))  # shorter than one slice: nothing is known


def test_speech_is_not_steady_however_quiet_and_in_noise_as_loud_as_it_is():
    records = list(read_manifest(DATA / "test.jsonl"))[::8]
    rng = np.random.default_rng(5)
    for record in records:
        audio, _ = load_audio(record.wav)
        quiet = np.round(audio * 0.003 * 2**15 + rng.random(len(audio)) - rng.random(len(audio))) / 2**15
        for heard in (audio, quiet, *(audio + rms(audio) * coloured(rng, len(audio), slope) for slope in (0, 1, 2))):
            assert not steady(heard), record.key


class Scripted:
    """A transcriber that writes what it is told, and remembers how it was asked."""

    def __init__(self, *answers: list[Hypothesis], ctc: bool = True, **options):
        self.answers, self.asked = list(answers), []
        self.model, self.args = SimpleNamespace(ctc=ctc, settings={}), DecodeArguments(**{"decoder": "joint"} | options)
        self.decoder = self.args.decoder

    vote = Transcriber.vote

    def hypotheses(self, clips, **search):
        replace(self.args, **search).check()
        self.asked.append((len(clips), search))
        return self.answers.pop(0)


def heard(text: str, ctc_text: str | None = "please hold", ended: bool | None = True, **more) -> Hypothesis:
    return Hypothesis(text, ended, ctc_text=ctc_text, **more)


def test_nothing_suspicious_costs_nothing_and_changes_nothing():
    found = [heard("please hold"), heard("please, hold"), heard("", "")]
    transcriber = Scripted(found, decoder="joint")
    assert guarded(transcriber, [SPEECH] * 3) == found
    assert transcriber.asked == [(3, {})]


def test_text_on_silence_is_dropped_without_another_decoding():
    written = heard("write down the words", "", score=-3.0, tokens=5, nbest=[("write down the words", -3.0)], words=[])
    transcriber = Scripted([written, heard("please hold")], decoder="llm")
    dropped, kept = guarded(transcriber, [SPEECH, SPEECH])
    assert dropped == heard("", "", flags=["no_speech"], unguarded="write down the words", words=[])
    assert (kept.text, kept.flags, kept.unguarded) == ("please hold", [], None)
    assert len(transcriber.asked) == 1


def test_the_suspicious_alone_are_decoded_again_with_more_of_the_ctc_and_at_last_by_it_alone():
    """Of three suspicious texts one is mended by the joint search, one by the CTC, one was right: it says so again."""
    loop = "please " * 9
    first = [heard("please hold"), heard(loop), heard(loop), heard("please hold on", ended=False)]
    second = [heard("please hold"), heard("the exact words"), heard("please hold on")]
    transcriber = Scripted(first, second, [heard("please hold", ended=None)], decoder="llm", num_beams=1, joint_weight=0.5)
    kept = guarded(transcriber, [SPEECH] * 4)
    assert [one.text for one in kept] == ["please hold", "please hold", "please hold", "please hold on"]
    flags = [["loop", "disagrees", "decoded_again"], ["loop", "disagrees", "decoded_again", "ctc_text"]]
    assert [one.flags for one in kept] == [[], *flags, ["cut_off", "decoded_again"]]
    assert [one.unguarded for one in kept] == [None, loop, loop, None]
    search = {"decoder": "joint", "joint_weight": 1.0, "num_beams": 4, "no_repeat_ngram_size": 5, "temperature": 0.0}
    assert transcriber.asked == [(4, {}), (3, search), (1, {"decoder": "ctc"})]


def test_fusion_stays_fusion_with_more_of_the_ctc():
    transcriber = Scripted([heard("please " * 9)], [heard("please hold")], decoder="fusion")
    guarded(transcriber, [SPEECH])
    assert [transcriber.asked[1][1][name] for name in ("decoder", "joint_weight")] == ["fusion", 1.8]


def test_to_write_nothing_is_no_way_out_where_the_ctc_hears_words():
    """An empty text breaks no rule: it was kept, and the CTC's own words were lost."""
    transcriber = Scripted([heard("please " * 9)], [heard("")], [heard("please hold", ended=None)], decoder="joint")
    (kept,) = guarded(transcriber, [SPEECH])
    assert (kept.text, kept.flags) == ("please hold", ["loop", "disagrees", "decoded_again", "ctc_text"])


def test_decoding_again_is_no_less_strict_than_asked():
    """It allowed four tokens twice where the user had forbidden three."""
    transcriber = Scripted([heard("please " * 9)], [heard("please hold")], no_repeat_ngram_size=3, num_beams=6)
    guarded(transcriber, [SPEECH])
    assert [transcriber.asked[1][1][name] for name in ("no_repeat_ngram_size", "num_beams")] == [3, 6]


def test_without_a_ctc_the_one_that_breaks_the_fewest_rules_is_kept_and_then_the_shortest():
    def kept(again: Hypothesis) -> Hypothesis:
        transcriber = Scripted([heard("go " * 60, None, False)], [again], ctc=False, decoder="llm", num_beams=6)
        (one,) = guarded(transcriber, [SPEECH])
        assert transcriber.asked[1] == (1, {"num_beams": 6, "no_repeat_ngram_size": 5, "temperature": 0.0})
        return one

    rules = ["loop", "too_fast", "cut_off"]
    assert kept(heard("go home", None)) == heard("go home", None, flags=[*rules, "decoded_again"], unguarded="go " * 60)
    better = kept(heard("go go go go", None))
    assert (better.text, better.flags) == ("go go go go", [*rules, "decoded_again", "doubtful"])
    assert kept(heard("no " * 70, None, False)).unguarded is None


def test_the_ctc_decoder_has_nothing_more_cautious():
    (one,) = guarded(Scripted([heard("w " * 99, "w " * 99, None)], decoder="ctc"), [SPEECH])
    assert (one.text, one.flags, one.unguarded) == ("w " * 99, ["too_fast", "doubtful"], None)


def test_a_limit_that_the_user_set_is_no_suspicion():
    transcriber = Scripted([heard("please ho", ended=False)], decoder="llm", max_new_tokens=2)
    assert guarded(transcriber, [SPEECH])[0].flags == []


def test_out_of_memory_when_decoding_again_keeps_what_was_found():
    """The more cautious search has more beams: for a clip it did not fit, and its first text was lost."""
    suspicious, fine = heard("please " * 9), heard("please hold")
    transcriber = Scripted([suspicious, fine, suspicious], decoder="joint")

    def hypotheses(clips, **search):
        if not search:
            return transcriber.hypotheses(clips)
        if search.get("decoder") == "ctc":
            return [heard("please hold", ended=None)]
        if len(clips) > 1:
            raise MemoryError
        calls.append(len(clips))
        if len(calls) == 1:
            raise MemoryError
        return [heard("please hold")]

    calls: list[int] = []
    halving = {"hypotheses": hypotheses, "vote": transcriber.vote}
    found = decode(SimpleNamespace(**vars(transcriber) | halving), [SPEECH] * 3)
    assert [one.text for one in found] == ["please hold"] * 3
    assert "ctc_text" in found[0].flags
    assert "ctc_text" not in found[2].flags


def test_a_clip_that_never_fits_stays_an_error():
    transcriber = Scripted([InputError("out of memory"), heard("please hold")], decoder="joint")
    error, kept = guarded(transcriber, [SPEECH] * 2)
    assert str(error) == "out of memory"
    assert kept.text == "please hold"


@pytest.mark.parametrize("guard", ["on", "off"])
def test_the_flag(guard):
    transcriber = Scripted([heard("you you you you", "")], guard=guard)
    (found,) = decode(transcriber, [SPEECH])
    assert found.text == {"on": "", "off": "you you you you"}[guard]


def test_a_checkpoint_without_a_ctc_is_guarded(tiny):
    """One that always writes the same letter: on noise nothing is kept; what it writes elsewhere is told, and doubtful."""
    system = build_system(tiny.qwen2, tiny.whisper)
    transcriber = Transcriber(system.model, system.prompt, DecodeArguments(num_beams=1, device="cpu"))
    system.model.llm.get_output_embeddings().register_forward_hook(
        lambda module, inputs, logits: torch.nn.functional.one_hot(torch.tensor(65), 259).float() + 0 * logits
    )
    noise = coloured(np.random.default_rng(0), RATE, 0).astype(np.float32)
    on_noise, on_speech = guarded(transcriber, [noise, SPEECH[:RATE]])
    assert (on_noise.text, on_noise.flags) == ("", ["no_speech"])
    assert on_noise.unguarded == system.prompt.tokenizer.decode([65]) * 20
    assert on_speech.flags == ["cut_off", "decoded_again", "doubtful"]


def test_wer_with_and_without():
    """Of a run's transcripts, long ones too: a piece that the guard left alone stands in both."""
    pieces = [(0.0, 30.0, Hypothesis("a b")), (30.0, 5.0, Hypothesis("", flags=["no_speech"], unguarded="x y z"))]
    found = {"long": joined(pieces, 35.0), "short": Hypothesis("c")}
    kept, first = with_and_without(found, {"long": "a b", "short": "c d"})
    assert (kept.words.errors, first.words.errors) == (1, 4)
    assert kept.words.reference_length == first.words.reference_length == 4


def test_the_benchmark_counts_what_was_invented_in_loops():
    found = {"a": Hypothesis("go", unguarded="go " * 6), "b": Hypothesis("no no"), "c": Hypothesis("x", unguarded="y " * 5)}
    assert loops(*with_and_without(found, {"a": "go", "b": "no", "c": "x y"})) == [0, 5 + 3]
    assert loops(*with_and_without({"b": Hypothesis("no")}, {"b": "no"})) == [0, 0]


def test_the_benchmark_makes_sounds_of_1_to_20_s_by_seed():
    for make in SOUNDS:
        (one,), (again,) = sounds(make, 3, 1), sounds(make, 3, 1)
        assert np.array_equal(one.audio, again.audio)
        assert RATE <= len(one.audio) <= 20 * RATE
        assert np.abs(one.audio).max() < 4


@pytest.fixture(scope="module")
def shipped(real):
    models = ModelArguments()
    use_shipped(models)
    return Transcriber.from_arguments(models, DecodeArguments(decoder="llm", num_beams=1, device="cpu"))


def test_the_llm_alone_invents_on_silence_noise_and_music_and_the_guard_drops_it(shipped):
    made = [sounds(make, 5, 1)[0] for make in SOUNDS]
    found = guarded(shipped, [clip.audio[:RATE].astype(np.float32) for clip in made])
    for clip, one in zip(made, found, strict=True):
        assert (one.text, one.flags) == ("", ["no_speech"]), clip.key
        assert one.unguarded, clip.key


def test_speech_is_kept_in_noise_and_however_quiet(shipped):
    audio = load_audio(DATA / "clips" / "call-fwd-on-busy.opus")[0]
    noise = rms(audio) * coloured(np.random.default_rng(5), len(audio), 1)
    for heard in guarded(shipped, [audio, 0.003 * audio, (audio + 0.5 * noise).astype(np.float32)]):
        assert "call" in heard.text
        assert "no_speech" not in heard.flags
