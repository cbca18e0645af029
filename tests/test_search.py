"""The beam search against enumeration, with an LLM that is a table: what follows depends on the last token and its place."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, RepetitionPenaltyLogitsProcessor

from search import NOTHING, Sample, beam_search, constant_ends

V, END = 5, 4


def size(ids):
    return len(ids) + (ids[-1] != END)  # an end that is given is a token too


class TableLLM:
    """log P of the next token (V,) by the last one and its position; `rows` tells how many beams each pass had."""

    def __init__(self, seed):
        self.table = torch.randn(60, V, V, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)
        self.generation_config = SimpleNamespace(eos_token_id=[END], pad_token_id=END)
        self.rows = []

    def get_input_embeddings(self):
        return torch.nn.Embedding.from_pretrained(torch.eye(V))

    def __call__(self, inputs_embeds, position_ids, **_):
        self.rows.append(len(inputs_embeds))
        return SimpleNamespace(logits=self.table[position_ids[:, -1:], inputs_embeds[:, -1:].argmax(-1)])

    def texts(self, first, limit):
        """(ids, log P) of all texts that may follow, the end of turn included where it came."""
        for length in range(1, limit + 1):
            for ids in itertools.product(range(V), repeat=length):
                if END not in ids[:-1] and (ids[-1] == END or length == limit):
                    yield (
                        ids,
                        sum(self.table[t, a, b].item() for t, (a, b) in enumerate(zip((first, *ids), ids, strict=False))),
                    )

    def search(self, first, limits, **options):
        embeds = torch.eye(V)[torch.tensor(first)][:, None]
        return beam_search(self, embeds, torch.ones(len(first), 1).long(), DynamicCache(), torch.tensor(limits), **options)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_of_all_texts(seed, length_penalty):
    """For two clips with limits of their own; a text that its limit ends has no end of turn, which would have been free."""
    llm = TableLLM(seed)
    found = llm.search([0, 2], [4, 3], num_beams=100, length_penalty=length_penalty)
    for first, limit, texts in zip([0, 2], [4, 3], found, strict=True):
        every = dict(llm.texts(first, limit))
        scores = sorted((log_prob / size(ids) ** length_penalty for ids, log_prob in every.items()), reverse=True)
        assert [text.score for text in texts[:10]] == pytest.approx(scores[:10], abs=1e-4)
        for text in texts[:10]:
            assert text.ended == (text.ids[-1] == END)
            assert text.log_prob == pytest.approx(every[tuple(text.ids)], abs=1e-4)


def test_clips_that_are_done_and_beams_that_fell_behind_leave_the_batch():
    llm = TableLLM(1)
    llm.search([0, 2, 3], [1, 9, 9], num_beams=4)
    everything = list(llm.rows)
    assert everything[0] == 3
    assert max(everything) <= 4 * 2 + 4  # one may write a token, and then its turn is ended
    assert all(rows <= 4 * 2 for rows in everything[2:])
    llm.rows.clear()
    found = llm.search([0, 2, 3], [1, 9, 9], num_beams=4, threshold=0.5)
    assert sum(llm.rows) < sum(everything) / 2
    best = llm.search([0, 2, 3], [1, 9, 9], num_beams=4)
    assert all(math.isclose(some[0].score, all_[0].score, abs_tol=0.5) for some, all_ in zip(found, best, strict=True))


def test_a_beam_stays_only_while_it_is_within_the_threshold_of_the_best_finished_text():
    """From token 0: the end with 0.5, token 1 with 0.3, from which the end is sure; 2 with 0.2."""
    llm = TableLLM(0)
    llm.table = (
        torch.tensor([[0, 0.3, 0.2, 0, 0.5], [0, 0, 0, 0, 1.0], [0, 0, 0, 0, 1.0], *[[0.2] * 5] * 2]).log().expand(60, V, V)
    )
    found = llm.search([0], [5], num_beams=3, length_penalty=0.0, threshold=0.7)
    assert [text.ids for text in found[0]] == [[END], [1, END]]
    assert llm.rows == [1, 1]
    (everything,) = llm.search([0], [5], num_beams=3, length_penalty=0.0)
    assert [text.ids for text in everything] == [[END], [1, END], [2, END]]


def reference(llm, first, limit, num_beams, length_penalty, threshold):
    """What the docstring says, for one clip and without tensors: [(ids, score)], the best first."""
    beams, found = [((), 0.0)], []
    for t in range(limit + 1):
        table = llm.table[t].tolist()
        options = [(ids, total, (first, *ids)[-1]) for ids, total in beams]
        if t == limit:
            best = [((*ids, END), total) for ids, total, _ in options]
        else:
            best = [((*ids, k), total + table[last][k]) for ids, total, last in options for k in range(V)]
        best = sorted(best, key=lambda one: -one[1])[: 2 * num_beams]
        rank = (t + 1) ** length_penalty
        found += [(ids[:limit], total / rank) for ids, total in best[:num_beams] if ids[-1] == END]
        found = sorted(found, key=lambda one: -one[1])[:num_beams]
        beams = [one for one in best if one[0][-1] != END][:num_beams]
        if not beams or (len(found) == num_beams and beams[0][1] <= found[-1][1] * rank):
            break
        lead = max([beams[0][1], *(score * rank for _, score in found[:1])])
        beams = [one for one in beams if one[1] >= lead - threshold]
        if not beams:
            break
    return found


@pytest.mark.parametrize("threshold", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_few_beams_find_what_a_plain_search_finds(num_beams, length_penalty, threshold):
    options = {"num_beams": num_beams, "length_penalty": length_penalty, "threshold": threshold}
    for seed in range(40):
        llm = TableLLM(seed)
        for first, limit, texts in zip([0, 2, 1], [6, 2, 5], llm.search([0, 2, 1], [6, 2, 5], **options), strict=True):
            expected = reference(llm, first, limit, **options)
            assert [text.score for text in texts] == pytest.approx([score for _, score in expected], abs=1e-4), seed
            assert [tuple(text.ids) for text in texts] == [ids for ids, _ in expected], seed


def test_a_clip_whose_best_beam_is_no_better_than_its_finished_texts_leaves():
    """The end is all but sure after every token: two texts are finished after two passes, the limit is far away."""
    llm = TableLLM(0)
    llm.table = torch.tensor([[0.04, 0.02, 0.02, 0.02, 0.9]] * 5).log().expand(60, V, V)
    llm.search([0], [50], num_beams=2, length_penalty=0.0)
    assert len(llm.rows) <= 3


def test_scores_that_are_not_finite_lose_no_clip():
    """Of float16 that overflowed, and of a temperature near 0, whose scores no threshold can tell apart."""
    llm = TableLLM(0)
    llm.table[:, 2] = torch.nan
    found = llm.search([0, 2], [3, 3], num_beams=2)
    assert found[0][0].ids
    assert found[1] == [NOTHING]
    for seed in range(5):
        sampled = TableLLM(seed).search([0], [4], threshold=8.0, sample=Sample(1e-6, [seed]))
        assert sampled[0][0].ids


def test_an_end_of_constant_probability_leaves_the_others_their_shares():
    logits, ends = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 7])
    probs = constant_ends(logits, ends, 0.2).softmax(-1)
    torch.testing.assert_close(probs[..., ends], torch.full((2, 3, 2), 0.1))
    others = [i for i in range(9) if i not in (2, 7)]
    torch.testing.assert_close(probs[..., others], 0.8 * logits[..., others].softmax(-1))
    assert constant_ends(logits, ends, None) is logits


def test_a_repetition_penalty_of_greedy_search_shapes_logits():
    """As transformers' does: of log-probabilities near 0 it would shape nothing."""
    llm = TableLLM(0)
    llm.table = torch.tensor([[20.0, 15, 1, 1, 1], [1, 1, 1, 1, 20.0], *[[0.0] * 5] * 3]).expand(60, V, V)
    plain, shaped = (llm.search([0], [4], processors=p) for p in ([], [RepetitionPenaltyLogitsProcessor(1.5)]))
    assert plain[0][0].ids == [0, 0, 0, 0]
    assert shaped[0][0].ids == [0, 1, END]
