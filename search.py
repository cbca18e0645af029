"""What a search is told beside the LLM's scores, as processors of transformers' generate: where a clip's text must end, what
the LLM alone thinks of it, a sample instead of the best. The CTC's vote is another (ctc.py)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor


class ForceEndOfTurn(LogitsProcessor):
    """Row i may write `max_new_tokens[i]` tokens, whoever shares its batch; after that only the end-of-turn token."""

    def __init__(self, max_new_tokens: Tensor, end_of_turn: int) -> None:
        self.max_new_tokens, self.end_of_turn = max_new_tokens, end_of_turn

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beams = scores.shape[0] // len(self.max_new_tokens)
        over = input_ids.shape[1] >= self.max_new_tokens.repeat_interleave(beams)  # (B * beams,)
        end = torch.full_like(scores, -torch.inf)
        end[:, self.end_of_turn] = 0
        return torch.where(over[:, None], end, scores)


class LogLikelihood(LogitsProcessor):
    """Keeps log P_LLM of all that a search writes, and changes nothing. It must stand before every other processor:
    transformers' own scores are what those have made of it (and hold the whole vocabulary of every step)."""

    def __init__(self, clips: int, ends: list[int]) -> None:
        """`ends`: the tokens that end a transcript."""
        self.clips, self.ends = clips, ends
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []  # what each beam had written, log P of it, that of each end
        self.last = (torch.empty(0), torch.empty(0))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (R, t): the tokens so far; scores (R, vocabulary), R = clips · beams."""
        total = scores.new_zeros(len(scores))  # (R,)
        if self.steps:
            clip = torch.arange(len(scores), device=scores.device) // (len(scores) // self.clips)
            written, before, _ = self.steps[-1]
            same = (written == input_ids[:, None, :-1]).all(-1) & (clip == clip[:, None])  # (R, R)
            parent, token = same.long().argmax(1), input_ids[:, -1]  # (R,): beams change places
            scored, norm = self.last
            total = before[parent] + scored[parent, token] - norm[parent]
        self.last = (scores, scores.logsumexp(-1))
        self.steps.append((input_ids, total, scores[:, self.ends] - self.last[1][:, None]))
        return scores

    def of(self, clip: int, ids: Sequence[int], end: int | None) -> float:
        """Of tokens that the search has written for a clip, with the end of turn behind them if that is given."""
        beams = len(self.steps[0][0]) // self.clips
        written, total, ends = (part[clip * beams : (clip + 1) * beams] for part in self.steps[len(ids)])
        row = (written == torch.tensor(ids, device=written.device)).all(-1).nonzero()[0, 0]
        return (total[row] + (0 if end is None else ends[row, self.ends.index(end)])).item()


class Sample(LogitsProcessor):
    """The best of these scores is a sample at `temperature`: Gumbel noise is added (Maddison et al. 2014), by a seed for
    each clip, so that a clip's text does not depend on its company in a batch."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature, self.seeds = temperature, seeds

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rngs = (np.random.default_rng((seed, input_ids.shape[1])) for seed in self.seeds)
        noise = np.stack([rng.gumbel(size=scores.shape[1]) for rng in rngs])  # (R, vocabulary)
        return scores / self.temperature + torch.from_numpy(noise).to(scores)
