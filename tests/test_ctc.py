"""The token splice: spelling, CTC head, soft tokens, prefix scores, and how it trains and decodes."""

import itertools
import json
import math

import pytest
import torch
from conftest import audio, batch_of, build_system, byte_tokenizer, write_manifest
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from ctc import CTCHead, CTCPrefixScore, borrow, ctc_loss, greedy_path, heard_as
from dataset import SpeechCollator, SpeechDataset
from manifest import TextLines, read_manifest
from model import add_lora
from prompt import Spelling, load_tokenizer
from settings import IGNORE_INDEX, SPEECH_INDEX, InputError
from transcriber import DecodeArguments, Transcriber


def collapse(path, blank):
    return tuple(c for c, _ in itertools.groupby(path) if c != blank)


def by_enumeration(log_probs, labels, whole):
    """P of `labels` (whole), or of all sequences that begin with them, over every path there is."""
    frames, classes = log_probs.shape
    total = 0.0
    for path in itertools.product(range(classes), repeat=frames):
        spelled = collapse(path, classes - 1)
        if spelled == labels if whole else spelled[: len(labels)] == labels:
            total += math.exp(sum(float(log_probs[t, c]) for t, c in enumerate(path)))
    return total


def random_log_probs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)


SPELLED = [(0,), (1,), (2,), (0, 0), (1, 2), (2, 2, 1), ()]  # seven tokens of an LLM in three classes; the last is the end
END = 6


def scorer(log_probs, length, weight=1.0, **options):
    table = torch.tensor([[*s, -1, -1, -1][:3] for s in SPELLED])
    return CTCPrefixScore(log_probs, length, table, [END], weight, candidates=6, **options)


def at_the_start(scorer, scores, **limits):
    """Of one beam of each clip, with nothing written."""
    return scorer.vote(torch.arange(len(scores)), scorer.start, scores, **limits)


def test_prefix_scores_are_those_of_enumeration():
    """Also for a row shorter than the batch, for tokens of several classes, and for a class that repeats the last."""
    log_probs, length = random_log_probs(2, 5, 4), torch.tensor([5, 3])
    score, clips = scorer(log_probs, length), torch.arange(2)
    prefixes, states = [(), ()], score.start
    for step in ([], [3, 4], [2, 1]):
        if step:
            prefixes = [(*p, token) for p, token in zip(prefixes, step, strict=True)]
            states = score.extend(clips, states, torch.tensor(step))
        out = score.vote(clips, states, torch.zeros(2, 7, dtype=torch.float64))
        for b in range(2):
            rows = log_probs[b, : length[b]]
            written = tuple(c for token in prefixes[b] for c in SPELLED[token])
            before = by_enumeration(rows, written, whole=False)
            for token in range(END):
                expected = by_enumeration(rows, written + SPELLED[token], whole=False) / before
                assert out[b, token].exp().item() == pytest.approx(expected, abs=1e-9)
            assert out[b, END].exp().item() == pytest.approx(by_enumeration(rows, written, whole=True) / before, abs=1e-9)


def test_prefix_scores_of_one_step_sum_to_one():
    """Each single-class token and the end: together they are everything that can follow."""
    out = at_the_start(scorer(random_log_probs(1, 6, 4), torch.tensor([6])), torch.zeros(1, 7))
    assert out[0, [0, 1, 2, END]].exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_candidates_are_chosen_by_both():
    """The CTC is sure of a token that the LLM finds unlikely: with two candidates it is among them."""
    log_probs = (8 * torch.nn.functional.one_hot(torch.tensor([[3, 2, 2, 3, 1]]), 4).double()).log_softmax(-1)
    score = scorer(log_probs, torch.tensor([5]))
    score.candidates = 2
    out = at_the_start(score, torch.tensor([[0.0, -0.5, -3.0, -0.2, -0.3, -0.1, -9.0]]))
    assert out[0, 2] == out[0, :END].max()
    assert (out[0, :END] > -torch.inf).sum() == 2


def test_a_whole_word_is_not_crowded_out_by_its_first_piece():
    """The CTC hears classes 1 and 2, the LLM likes the token of both; but its first piece alone has paid for less: " volume"
    fell out of the beam behind " vol", and what was left to write was "um"."""
    log_probs = (8 * torch.nn.functional.one_hot(torch.tensor([[3, 1, 3, 2, 3]]), 4).double()).log_softmax(-1)
    scores = torch.full((1, 7), -9.0)
    scores[0, [1, 4]] = torch.tensor([-1.0, -1.5])  # " vol", " volume"; then "um" would cost 9
    length = torch.tensor([5])
    assert at_the_start(scorer(log_probs, length), scores).argmax() == 1
    assert at_the_start(scorer(log_probs, length, bonus=1.0), scores).argmax() == 4


def test_the_bonus_is_for_each_class_and_none_is_for_the_end():
    log_probs, length = random_log_probs(1, 5, 4), torch.tensor([5])
    scores = torch.randn(1, 7, dtype=torch.float64)
    without, earned = (at_the_start(scorer(log_probs, length, bonus=bonus), scores) for bonus in (0.0, 0.7))
    assert torch.allclose(earned - without, 0.7 * torch.tensor([[float(len(s)) for s in SPELLED]]).double())


def test_where_something_was_said_a_text_has_something():
    """A letter or a rare word alone costs an LLM that hears nothing more than to end at once: "q" came out empty."""
    paths = torch.tensor([[3, 3, 1, 3], [3, 3, 3, 3]])  # the second clip is silent
    log_probs, length = (4 * torch.nn.functional.one_hot(paths, 4).double()).log_softmax(-1), torch.tensor([4, 4])
    scores = torch.tensor([[-20.0, -20, -20, -20, -20, -20, -1]]).repeat(2, 1)
    clips = torch.arange(2)
    assert at_the_start(scorer(log_probs, length), scores).argmax(1).tolist() == [END, END]
    some = scorer(log_probs, length, spoken=torch.tensor([True, False]))
    assert at_the_start(some, scores).argmax(1).tolist() == [1, END]
    near = some.vote(clips, some.start, scores, torch.zeros(2), threshold=1.0)  # that end is no measure of the others
    assert near.argmax(1).tolist() == [1, END]
    then = some.vote(clips, some.extend(clips, some.start, torch.tensor([1, 1])), scores)
    assert then.argmax(1).tolist() == [END, END]


@pytest.mark.parametrize("bonus", [0.0, 0.7])
@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_best_candidates_are_what_they_are_when_all_are_scored(best, bonus):
    """Those of several classes whose bound is too low for them are not scored."""
    for seed in range(20):
        torch.manual_seed(seed)
        log_probs, scores = (3 * torch.randn(1, 5, 4)).double().log_softmax(-1), torch.randn(1, 7).log_softmax(-1).double()
        full, some = (scorer(log_probs, torch.tensor([5]), bonus=bonus) for _ in range(2))
        some.best = best
        expected, got = (at_the_start(one, scores)[:, :END].topk(best) for one in (full, some))
        assert torch.equal(expected.indices, got.indices)
        assert torch.allclose(expected.values, got.values)


@pytest.mark.parametrize("bonus", [0.0, 0.7])
def test_no_token_scores_above_its_bound(bonus):
    """The bound knew nothing of a token's further classes: of those whose first one was heard, some had no chance, and
    where each class earned a bonus they took the places of the best."""
    tighter = 0
    for seed in range(20):
        torch.manual_seed(seed)
        some = scorer((3 * torch.randn(1, 5, 4)).double().log_softmax(-1), torch.tensor([5]), weight=0.6, bonus=bonus)
        exact = at_the_start(some, torch.zeros(1, 7, dtype=torch.float64))[:, :END]
        first = some._next_class(torch.zeros(1).long(), *some.start[:3])[:, some.first[:END]]
        bound = 0.6 * first + some.further[:, :END]
        assert (exact <= bound + 1e-6).all()
        assert torch.allclose(exact[:, :3], bound[:, :3])  # of one class
        tighter += bound[0, 5].item() < 0.6 * first[0, 5].item() + 3 * bonus - 1e-6
    assert tighter > 5


def test_what_is_too_far_below_the_best_of_its_clip_is_not_scored():
    """Of two beams of a clip and one of another, the first of which is 2 behind the second."""
    some = scorer(random_log_probs(2, 5, 4), torch.tensor([5, 5]))
    clips, total, scores = torch.tensor([0, 0, 1]), torch.tensor([-2.0, 0.0, -9.0]), torch.randn(3, 7).double()
    states = [part[clips] for part in some.start]
    full = some.vote(clips, states, scores)
    near = some.vote(clips, states, scores, total, threshold=1.0)
    kept, best = near.isfinite(), total[:, None] + full
    assert torch.equal(near[kept], full[kept])
    behind = best - best.new_tensor([best[:2].max(), best[:2].max(), best[2].max()])[:, None]
    assert (behind[~kept] < -1.0).all()
    several = torch.tensor([len(classes) > 1 for classes in SPELLED])
    assert (kept | ~several).all(0)[~several].all()  # of one class their score is had anyway
    assert (~kept[0] & several).sum() > (~kept[1] & several).sum()
    alone = [
        some.vote(clips[i : i + 1], [part[i : i + 1] for part in states], scores[i : i + 1], total[i : i + 1], 1.0)
        for i in (0, 1)
    ]
    assert alone[0].isfinite().sum() > kept[0].sum()  # it is its company that it is behind


def test_where_too_few_tokens_are_allowed_none_that_the_ctc_cannot_spell_takes_their_place():
    """With most tokens forbidden by another processor, the best candidates once were ones without a spelling, and their
    score was that of the empty text."""
    score = scorer(random_log_probs(1, 5, 4), torch.tensor([5]))
    scores = torch.full((1, 9), -torch.inf, dtype=torch.float64)  # the last two are beyond the tokenizer's
    scores[0, [1, 7, 8]] = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)
    out = at_the_start(score, scores)
    assert out.isfinite().nonzero().tolist() == [[0, 1]]


def test_prefix_scores_stay_finite_on_thirty_seconds():
    log_probs, length = random_log_probs(2, 750, 4) * 4, torch.tensor([750, 2])
    score, clips = scorer(log_probs, length), torch.arange(2)
    states = score.start
    for _ in range(40):
        out = score.vote(clips, states, torch.zeros(2, 7))
        assert not out.isnan().any()
        states = score.extend(clips, states, out[0, :END].argmax().expand(2))


def head():
    return CTCHead(torch.eye(3, 4))


def test_soft_tokens_drop_blanks_and_average_runs():
    sure = 20 * torch.nn.functional.one_hot(torch.tensor([[3, 0, 0, 3, 0, 1, 3, 3], [2, 3, 1, 1, 0, 0, 0, 0]]), 4).double()
    speech, count = head().soft_tokens(sure.log_softmax(-1).float(), torch.tensor([8, 4]))
    assert count.tolist() == [3, 2]  # row 0: run of 0, blank, 0 again, 1; row 1: 2, then 1; what follows is padding
    expected = torch.stack([torch.eye(3, 4)[[0, 0, 1]], torch.eye(3, 4)[[2, 1, 1]]])
    expected[1, 2] = 0
    assert torch.allclose(speech, expected, atol=1e-5)


def test_a_run_is_the_mean_of_its_frames():
    log_probs = torch.tensor([[[0.7, 0.2, 0.0001, 0.1], [0.5, 0.4, 0.0001, 0.1]]]).log()
    speech, _ = head().soft_tokens(log_probs, torch.tensor([2]))
    share = torch.tensor([[0.7, 0.2, 0.0001], [0.5, 0.4, 0.0001]])
    assert torch.allclose(speech[0, 0, :3], (share / share.sum(1, keepdim=True)).mean(0), atol=1e-5)


def test_a_clip_of_blanks_alone_is_no_vector():
    blank = torch.tensor([0.0, 0, 0, 9]).repeat(2, 3, 1).log_softmax(-1)
    blank[1, 0] = blank[1, 0].flip(0)
    speech, count = head().soft_tokens(blank, torch.tensor([3, 3]))
    assert count.tolist() == [0, 1]
    assert speech.shape == (2, 1, 4)
    assert greedy_path(blank, torch.tensor([3, 3])) == [[], [0]]


def test_a_batch_of_blanks_alone_is_no_vector_either():
    """It could not be given a shape: the first LLM step after a short align phase stopped the training."""
    blank = torch.tensor([0.0, 0, 0, 9]).repeat(2, 3, 1).log_softmax(-1)
    speech, count = head().soft_tokens(blank, torch.tensor([3, 3]))
    assert count.tolist() == [0, 0]
    assert speech.shape == (2, 0, 4)


def test_ctc_loss_is_minus_log_of_all_paths():
    log_probs, length = random_log_probs(2, 5, 4), torch.tensor([5, 4])
    labels = torch.tensor([[0, 1, 1], [2, IGNORE_INDEX, IGNORE_INDEX]])
    expected = -sum(
        math.log(by_enumeration(log_probs[b, : length[b]], tuple(labels[b][labels[b] >= 0].tolist()), whole=True))
        for b in range(2)
    )
    assert ctc_loss(log_probs, length, labels, IGNORE_INDEX).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "path", "places"),
    [
        ("abc", "abc", [[0], [1], [2]]),
        ("abc", "ac", [[0], [], [1]]),
        ("abc", "axc", [[0], [1], [2]]),
        ("abc", "abxyc", [[0], [1, 2, 3], [4]]),
        ("abc", "xabc", [[1], [2], [3]]),  # what stands before the first token belongs to none
        ("ab", "", [[], []]),
        ("", "a", []),
    ],
)
def test_where_a_token_was_heard(said, path, places):
    assert [list(span) for span in heard_as([*map(ord, said)], [*map(ord, path)])] == places


def test_text_is_spoken_with_borrowed_soft_tokens():
    """Said 0 1 3, heard 0 2 3; said 2, heard nothing: so 1 is heard as that 2, 2 as nothing, 4 as its own embedding."""
    soft = torch.arange(12.0).view(2, 3, 2)
    own = -torch.arange(10.0).view(5, 2)
    vectors, count = borrow(soft, [[0, 2, 3], []], [[0, 1, 3], [2]], [[1, 0, 2, 4], [2], []], own)
    assert count.tolist() == [3, 0, 0]
    assert torch.equal(vectors[0], torch.stack([soft[0, 1], soft[0, 0], own[4]]))
    assert vectors.shape == (3, 3, 2)


def test_each_hearing_of_a_token_is_borrowed_in_turn():
    soft = torch.tensor([[[1.0], [2.0]]])
    vectors, _ = borrow(soft, [[0, 0]], [[0, 0]], [[0] * 50], torch.zeros(1, 1))
    assert set(vectors.flatten().tolist()) == {1.0, 2.0}


def merged(*rules):
    """A byte-level tokenizer with these merges."""
    tokenizer = byte_tokenizer()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    for left, right in rules:
        model["vocab"][left + right] = 300 + len(model["merges"])
        model["merges"].append([left, right])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    return tokenizer


RULES = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("n", "o"), ("Ġthe", "no")]


def spelled(spelling, tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return [tokenizer.convert_ids_to_tokens(spelling.tokens[c]) for c in spelling(ids)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, ["Ġ", "t", "h", "e", "n", "o"]),
        (1, ["Ġ", "th", "e", "n", "o"]),
        (3, ["Ġthe", "n", "o"]),
        (4, ["Ġthe", "no"]),
        (99, ["Ġtheno"]),
    ],
)
def test_tokens_are_spelled_by_the_first_merges(most, expected):
    tokenizer = merged(*RULES)
    spelling = Spelling.choose(tokenizer, ["theno"], most)
    assert spelled(spelling, tokenizer, " theno") == expected


def test_a_word_the_training_text_had_not_is_spelled_by_smaller_parts():
    tokenizer = merged(*RULES)
    spelling = Spelling.choose(tokenizer, ["the", "on"], 99)
    assert spelled(spelling, tokenizer, " theno") == ["Ġthe", "n", "o"]
    assert spelled(spelling, tokenizer, " the#") == ["Ġthe"]  # a byte it never had is left out


def test_a_token_that_the_ctc_can_spell_only_in_part_is_none_of_its_candidates():
    """With an English CTC " audição" scored as "audio"."""
    tokenizer = merged(*RULES)
    table = Spelling.choose(tokenizer, ["the on"], 2).table(len(tokenizer) + 50)
    ids = tokenizer.get_vocab()
    assert (table[ids["Ġthe"]] >= 0).sum() == 2
    assert (table[ids["Ġtheno"]] >= 0).sum() == 4
    unspelled = Spelling.choose(tokenizer, ["the"], 2).table(len(tokenizer) + 50)
    assert (unspelled[ids["Ġtheno"]] >= 0).sum() == 0


def test_spelling_of_the_real_tokenizer_is_its_own_with_fewer_merges(real):
    """Splitting the LLM's tokens equals running its BPE with the first merges only: both learn them in the same order."""
    tokenizer = load_tokenizer(str(real.llm))
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    data["model"]["merges"] = data["model"]["merges"][:1000]
    fewer = Tokenizer.from_str(json.dumps(data))
    texts = ["the intestinal dysbiosis of nineteen elephants", "please press the pound key now", "o'clock isn't it"]
    spelling = Spelling.choose(tokenizer, texts, 1000)
    for text in texts:
        ids = tokenizer(" " + text, add_special_tokens=False).input_ids
        assert [spelling.tokens[c] for c in spelling(ids)] == fewer.encode(" " + text, add_special_tokens=False).ids
    table = spelling.table(len(tokenizer))
    assert table[ids[0]].tolist() == [*spelling.of_token(ids[0]), *[-1] * 16][:16]
    assert table[tokenizer.eos_token_id].tolist() == [-1] * 16


TEXTS = ["one two", "text", ""]


@pytest.fixture
def tokens(tiny):
    return build_system(tiny.qwen2, tiny.whisper, splice="tokens")


@pytest.fixture
def batch(tokens):
    return batch_of(tokens, [audio(1.7), audio(0.9), audio(1.2)], TEXTS)


def test_the_answer_is_spoken_text_and_its_ctc_labels_spell_it(tokens):
    example = tokens.prompt.example(" one ")
    answer = example["input_ids"][len(tokens.prompt.ids) : -1]
    assert tokens.prompt.tokenizer.decode(answer) == " one"
    assert [tokens.prompt.spelling.tokens[c] for c in example["ctc_labels"]] == answer
    assert tokens.prompt.example("")["ctc_labels"] == []


def test_align_phase_is_ctc_alone(tokens, batch):
    model = tokens.model
    model.aligning = True
    out = model(**batch, num_items_in_batch=7)
    log_probs, length = model.hear(batch["mel"], batch["mel_length"])
    expected = ctc_loss(log_probs, length, batch["ctc_labels"], IGNORE_INDEX) / 7
    assert out["loss"].item() == pytest.approx(expected.item())
    out["loss"].backward()
    moved = {name for name, p in model.trainable().items() if p.grad.abs().max() > 0}
    assert {name.split(".")[0] for name in moved} == {"projector", "ctc"}
    assert all(p.grad is not None for p in model.trainable().values()), "DDP waits for every gradient"


def test_llm_phase_adds_the_weighted_ctc(tokens, batch):
    model = tokens.model
    model.ctc_weight = 0.0
    alone = model(**batch)
    model.ctc_weight = 0.4
    both = model(**batch)
    model.aligning = True
    assert both["loss"].item() == pytest.approx(alone["loss"].item() + 0.4 * model(**batch)["loss"].item(), rel=1e-5)


def test_llm_phase_teaches_everything_that_is_trained(tokens, batch):
    tokens.model.ctc_weight = 0.4
    tokens.model(**batch)["loss"].backward()
    still = [name for name, p in tokens.model.trainable().items() if not p.grad.abs().max() > 0]
    assert not still
    assert all(p.grad is None for p in tokens.model.llm.parameters())


def test_the_llm_does_not_teach_the_projector(tokens, batch):
    """Its gradient, small where the CTC is sure, was blown up by Adam: eight prompts that the CTC knew by heart (loss 2e-4)
    were lost again in the steps with the LLM."""
    tokens.model.ctc_weight = 0.0
    tokens.model(**batch)["loss"].backward()
    taught = {name.split(".")[0] for name, p in tokens.model.trainable().items() if p.grad.abs().max() > 0}
    assert taught == {"soft_prompt"}
    assert all(p.grad is not None for p in tokens.model.trainable().values()), "DDP waits for every gradient"


def test_texts_teach_the_llm_alone(tokens, batch):
    """Their loss joins that of the clips, whose own is as without them; no gradient of theirs reaches the projector."""
    model, texts = tokens.model, batch_of(tokens, [audio(1.0)] * 2, ["two", "no one"])
    rows = {name: [*batch[name], *texts[name]] for name in ("input_ids", "attention_mask", "labels", "ctc_labels")}
    fill = {"labels": IGNORE_INDEX, "ctc_labels": IGNORE_INDEX}
    joined = {name: torch.nn.utils.rnn.pad_sequence(r, True, fill.get(name, 0)) for name, r in rows.items()}
    both = {name: batch[name] for name in ("mel", "mel_length")} | joined

    def losses_and_gradients(batch):
        model.zero_grad()
        out = model(**batch, num_items_in_batch=5)
        out["loss"].backward()
        return out, {name: p.grad.clone() for name, p in model.trainable().items()}

    model.ctc_weight = 0.4
    without, gradients = losses_and_gradients(batch)
    out, with_texts = losses_and_gradients(both)
    supervised = texts["labels"][texts["labels"] != IGNORE_INDEX]
    added = cross_entropy(out["logits"][-len(supervised) :], supervised, reduction="sum") / 5
    assert out["loss"].item() == pytest.approx((without["loss"] + added).item(), rel=1e-4)
    for name, gradient in with_texts.items():
        same = torch.allclose(gradient, gradients[name], atol=1e-6)
        assert same == (name != "soft_prompt.weight"), name


def test_texts_join_a_batch_by_their_share(tokens, tiny, tmp_path):
    """Anew in each epoch, the same when asked again; lines that cannot be used are passed over."""
    file = tmp_path / "texts.txt"
    file.write_text("one\n\nno way\n" + "two " * 400 + "\ntwo\n", encoding="utf-8")  # "a", "y": unknown to the CTC
    lines = TextLines(file)
    assert [line[:8] for line in lines] == ["one", "no way", "two two ", "two"]
    clips = [{"wav": str(tiny.root / clip["wav"]), "txt": "one"} for clip in tiny.clips]
    manifest = read_manifest(write_manifest(tmp_path / "train.jsonl", clips))
    data = SpeechDataset(manifest, tokens.prompt, tokens.settings, 512, texts=lines, text_share=0.75)

    def drawn():
        return [tokens.prompt.tokenizer.decode(t["labels"][t["labels"] >= 0][:-1]) for e in data for t in e["texts"]]

    first = drawn()
    assert len(first) == 3 * len(data)
    assert set(first) == {" one", " two"}
    assert drawn() == first
    data.set_epoch(1)
    assert drawn() != first
    batch = SpeechCollator()([data[0], data[1]])
    assert len(batch["mel_length"]) == 2
    assert {len(batch[name]) for name in ("input_ids", "labels", "attention_mask", "ctc_labels")} == {8}
    assert tokens.model(**batch)["loss"] > 0
    file.write_text("way\n", encoding="utf-8")
    hopeless = SpeechDataset(manifest, tokens.prompt, tokens.settings, 512, texts=TextLines(file))
    with pytest.raises(InputError, match="of 1000 lines of --text_data_path none can be used"):
        hopeless[0]


def test_texts_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot read the texts"):
        TextLines(tmp_path / "missing.txt")
    (tmp_path / "a.txt").write_bytes(b"one\ntw\xff\n")
    with pytest.raises(InputError, match=r"a.txt:2: byte 3 is not UTF-8"):
        TextLines(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\n \n")
    with pytest.raises(InputError, match=r"b.txt: no line in it"):
        TextLines(tmp_path / "b.txt")


def test_soft_tokens_stand_where_the_marker_was(tokens, batch):
    """The row that is all blank has a prompt without any speech."""
    model = tokens.model
    speech = torch.randn(3, 4, 32)
    count = torch.tensor([4, 0, 2])
    embeds, mask, labels = model.splice(batch["input_ids"], batch["attention_mask"], speech, count, batch["labels"])
    at = tokens.prompt.ids.index(SPEECH_INDEX)
    words = model.llm.get_input_embeddings()(torch.tensor(tokens.prompt.word_ids))
    for row, n in enumerate(count.tolist()):
        expected = torch.cat([words[:at], speech[row, :n], words[at:]])
        assert torch.allclose(embeds[row, : len(expected)], expected), "the soft prompt starts as the prompt's words"
        width = len(expected) + len(tokens.prompt.example(TEXTS[row])["input_ids"]) - len(tokens.prompt.ids)
        assert mask[row].sum() == width
        assert (labels[row] != IGNORE_INDEX).sum() == width - len(expected)


def test_company_in_a_batch_changes_nothing(tiny):
    """A kernel wider than its stride once saw the noise past the end of the shorter clip."""
    system = build_system(tiny.qwen2, tiny.whisper, splice="tokens", projector_kernel=9)
    clips = [audio(1.7, 1), audio(0.8, 2)]
    both = batch_of(system, clips, ["a", "b"])
    log_probs, length = system.model.hear(both["mel"], both["mel_length"])
    for i, clip in enumerate(clips):
        alone = batch_of(system, [clip], ["a"])
        single, n = system.model.hear(alone["mel"], alone["mel_length"])
        assert n[0] == length[i]
        assert torch.allclose(log_probs[i, : length[i]], single[0], atol=1e-5)


@pytest.mark.parametrize("flags", [{"lora_r": 4}, {"lora_r": 4, "splice": "frames"}, {"soft_prompt": False}])
def test_checkpoints_hold_all_that_is_trained(tiny, tmp_path, flags):
    one = build_system(tiny.llama, tiny.whisper, **{"splice": "tokens"} | flags)
    with torch.no_grad():
        for p in one.model.trainable().values():
            p.add_(torch.randn_like(p))
    one.model.save_checkpoint(tmp_path)
    again = build_system(tiny.llama, tiny.whisper, checkpoint=str(tmp_path))
    assert again.settings == one.settings
    names = one.model.trainable().keys()
    assert any("lora" in name for name in names) == ("lora_r" in flags)
    assert any("soft_prompt" in name for name in names) == ("soft_prompt" not in flags and flags.get("splice") != "frames")
    batch = batch_of(one, [audio(1.0)], ["text"])
    assert torch.equal(one.model(**batch)["logits"], again.model(**batch)["logits"])


def test_lora_starts_as_the_frozen_llm(tiny):
    plain, lora = (build_system(tiny.qwen2, tiny.whisper, splice="frames", lora_r=r) for r in (0, 4))
    batch = batch_of(plain, [audio(1.0)], ["text"])
    assert torch.equal(plain.model(**batch)["logits"], lora.model(**batch)["logits"])


@pytest.mark.parametrize(("family", "layers"), [("qwen2", {"q_proj", "v_proj"}), ("unheard of", {"q_proj", "gate_proj"})])
def test_lora_stands_where_peft_puts_it_or_else_everywhere(tiny, family, layers):
    llm = build_system(tiny.llama, tiny.whisper).model.llm
    llm.config.model_type = family
    adapted = {name.split(".")[-4] for name, p in add_lora(llm, 2).named_parameters() if p.requires_grad}
    assert adapted >= layers
    assert "lm_head" not in adapted
    assert ("gate_proj" in adapted) == (family == "unheard of")


def test_lora_may_join_a_checkpoint_without_but_not_leave_one(tiny, tmp_path):
    plain = build_system(tiny.qwen2, tiny.whisper, splice="tokens")
    plain.model.save_checkpoint(tmp_path / "plain")
    lora = build_system(tiny.qwen2, tiny.whisper, checkpoint=str(tmp_path / "plain"), lora_r=4)
    batch = batch_of(plain, [audio(1.0)], ["text"])
    assert torch.equal(plain.model(**batch)["logits"], lora.model(**batch)["logits"])
    lora.model.save_checkpoint(tmp_path / "lora")
    assert build_system(tiny.qwen2, tiny.whisper, checkpoint=str(tmp_path / "lora")).settings["lora_r"] == 4
    with pytest.raises(InputError, match=r"--lora_r 0 differs from .*lora_r 4"):
        build_system(tiny.qwen2, tiny.whisper, checkpoint=str(tmp_path / "lora"), lora_r=0)


def test_another_kind_of_tokenizer_is_named(tiny):
    tokenizer = byte_tokenizer()
    data = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"model": data}))
    with pytest.raises(InputError, match="--splice tokens needs an LLM with a BPE tokenizer"):
        Spelling.choose(tokenizer, ["a"], 10)


def transcriber(tokens, **options):
    return Transcriber(tokens.model, tokens.prompt, DecodeArguments(device="cpu", **options))


@pytest.mark.parametrize(("num_beams", "bonus"), [(1, 0.0), (3, 0.0), (3, 0.4)])
def test_the_joint_score_is_the_sum_of_both_log_probabilities(tokens, num_beams, bonus):
    """Of whole hypotheses: the LLM's by a forward pass, the CTC's by torch's own CTC loss; and the bonus of its tokens."""
    weight, clips = 0.7, [audio(1.7, 1), audio(0.8, 2)]
    with torch.no_grad():
        tokens.model.ctc.blank_bias.fill_(9.0)  # few tokens: else the bound ends every hypothesis
    joint = transcriber(tokens, decoder="joint", num_beams=num_beams, joint_weight=weight)
    batch = batch_of(tokens, clips, ["", ""])
    ids = torch.tensor([tokens.prompt.ids] * 2)
    options = {"joint_weight": weight, "spelling": joint.spelling, "num_beams": num_beams, "length_penalty": 0.0}
    options |= {"length_bonus": bonus}
    out = tokens.model.generate(
        ids, torch.ones_like(ids), batch["mel"], batch["mel_length"], torch.tensor([12, 9]), **options
    )
    log_probs, length = tokens.model.hear(batch["mel"], batch["mel_length"])
    end = tokens.prompt.end_of_turn
    compared = 0
    for row, (best, *_) in enumerate(out):
        answer = best.ids[:-1] if best.ended else best.ids
        spelled = torch.tensor([tokens.prompt.spelling(answer)])
        ctc = -ctc_loss(log_probs[row : row + 1], length[row : row + 1], spelled, IGNORE_INDEX)
        supervised = [*answer, end]
        one = SpeechCollator()([{
            "input_ids": torch.tensor(tokens.prompt.ids + supervised),
            "labels": torch.tensor([IGNORE_INDEX] * len(tokens.prompt.ids) + supervised),
            "ctc_labels": spelled[0],
            "mel": batch["mel"][row, :, : batch["mel_length"][row]],
        }])  # fmt: skip
        logits = tokens.model(**one)["logits"]
        llm = -cross_entropy(logits, torch.tensor(supervised), reduction="sum")
        assert best.ended == (len(answer) < [12, 9][row])  # else the bound ends it: that end is given, not scored
        if best.ended:
            expected = llm + weight * ctc + bonus * len(spelled[0])
            assert best.score == pytest.approx(expected.item(), rel=1e-4)
            assert best.log_prob == pytest.approx(llm.item(), rel=1e-4)
            compared += 1
    assert compared
    assert joint.transcribe(clips) == [joint.transcribe([clip])[0] for clip in clips]


def test_decoders(tokens, tiny):
    clips = [audio(1.7, 1), audio(0.8, 2)]
    batch = batch_of(tokens, clips, ["", ""])
    paths = greedy_path(*tokens.model.hear(batch["mel"], batch["mel_length"]))
    texts = [tokens.prompt.tokenizer.decode([tokens.prompt.spelling.tokens[c] for c in path]) for path in paths]
    assert transcriber(tokens, decoder="ctc").transcribe(clips) == [" ".join(text.split()) for text in texts]
    assert transcriber(tokens).decoder == "ctc"
    tokens.model.train()(**batch_of(tokens, clips, ["a", "b"]))
    tokens.model.eval()
    assert transcriber(tokens).decoder == "joint"
    frames = build_system(tiny.qwen2, tiny.whisper, splice="frames")
    assert transcriber(frames).decoder == "llm"
    with pytest.raises(InputError, match="--decoder ctc needs a checkpoint trained with --splice tokens"):
        transcriber(frames, decoder="ctc")
