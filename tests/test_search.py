"""The beam search against enumeration, with an LLM that is a table: what follows a token depends on that token alone."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from search import beam_search

V, END = 5, 4


def size(ids):
    return len(ids) + (ids[-1] != END)  # an end that is given is a token too


class TableLLM:
    """log P of the next token (V,) by the last one; `rows` tells how many beams each pass had."""

    def __init__(self, seed):
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed)).mul(2).log_softmax(-1)
        self.generation_config = SimpleNamespace(eos_token_id=[END], pad_token_id=END)
        self.rows = []

    def get_input_embeddings(self):
        return torch.nn.Embedding.from_pretrained(torch.eye(V))

    def __call__(self, inputs_embeds, **_):
        self.rows.append(len(inputs_embeds))
        return SimpleNamespace(logits=self.table[inputs_embeds[:, -1:].argmax(-1)])

    def texts(self, first, limit):
        """(ids, log P) of all texts that may follow, the end of turn included where it came."""
        for length in range(1, limit + 1):
            for ids in itertools.product(range(V), repeat=length):
                if END not in ids[:-1] and (ids[-1] == END or length == limit):
                    yield ids, sum(self.table[a, b].item() for a, b in zip((first, *ids), ids, strict=False))

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
    llm.table = torch.tensor([[0, 0.3, 0.2, 0, 0.5], [0, 0, 0, 0, 1.0], [0, 0, 0, 0, 1.0], *[[0.2] * 5] * 2]).log()
    found = llm.search([0], [5], num_beams=3, length_penalty=0.0, threshold=0.7)
    assert [text.ids for text in found[0]] == [[END], [1, END]]
    assert llm.rows == [1, 1]
    (everything,) = llm.search([0], [5], num_beams=3, length_penalty=0.0)
    assert [text.ids for text in everything] == [[END], [1, END], [2, END]]
