"""Beam search over a batch of clips of which each has as many beams as are worth it, from as many as were asked for to none.

transformers' own search carries every beam of every clip to the last step of the slowest: here a clip that is done leaves
the batch, and so does a beam that has fallen too far behind. Greedy search is that with one beam; what shapes the scores are
transformers' processors and the CTC's vote (ctc.py).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

import inference
from ctc import NEVER, CTCPrefixScore


class Found(NamedTuple):
    """A text that a search came to."""

    ids: list[int]  # with the end of turn, if it came before the limit did
    ended: bool
    log_prob: float  # the LLM's own, of these
    score: float  # what the search ranks by, but of a draft log_prob


NOTHING = Found([], False, NEVER, NEVER)  # where no token has a score: of logits that are not numbers


def constant_ends(logits: Tensor, ends: Tensor, prob: float | None) -> Tensor:
    """Logits (…, vocabulary) by which a text ends with this probability, whatever it says; None: as they are."""
    if prob is None:
        return logits
    others = logits.index_fill(-1, ends, -torch.inf).logsumexp(-1, keepdim=True)  # (…, 1)
    each = others + math.log(prob / (1 - prob) / len(ends))
    return logits.index_copy(-1, ends, each.expand(*others.shape[:-1], len(ends)))


class Sample:
    """The best of these scores is a sample at `temperature`: Gumbel noise is added (Maddison et al. 2014), by a seed for
    each clip, so that a clip's text does not depend on its company in a batch."""

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature, self.seeds = temperature, seeds

    def __call__(self, clips: Tensor, step: int, scores: Tensor) -> Tensor:
        """scores (R, vocabulary) of the next token of R of the clips (R,)."""
        rngs = (np.random.default_rng((self.seeds[clip], step)) for clip in clips.tolist())
        noise = np.stack([rng.gumbel(size=scores.shape[1]) for rng in rngs])  # (R, vocabulary)
        return scores / self.temperature + torch.from_numpy(noise).to(scores)


def going(rows: int, device: torch.device) -> bool:
    """Whether any process still has rows: under ZeRO-3 all of them run the LLM equally often."""
    if not is_deepspeed_zero3_enabled():
        return rows > 0
    most = torch.tensor(rows, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return bool(most)


def best_of_clips(
    clip: Tensor, score: Tensor, scores: Tensor, num_beams: int, ends: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The beams of a clip together: clip, score (R,) of each, scores (R, vocabulary) of their next tokens → the C clips;
    of each the M best totals, sure to have `num_beams` that go on, with their beams and tokens (C, M)."""
    gain, token = scores.topk(min(num_beams + ends, scores.shape[1]))  # (R, K)
    clips, count = clip.unique_consecutive(return_counts=True)  # (C,)
    first = count.cumsum(0) - count
    row = torch.arange(len(clips), device=clip.device).repeat_interleave(count)  # (R,)
    place = torch.arange(len(clip), device=clip.device) - first[row]
    total = gain.new_full((len(clips), num_beams, gain.shape[1]), -torch.inf)
    total[row, place] = score[:, None] + gain
    best, at = total.flatten(1).topk(min(num_beams * (1 + ends), total[0].numel()))
    parent = (first[:, None] + at // gain.shape[1]).clamp(max=len(clip) - 1)  # one that is not there scores −∞
    return clips, best, parent, token[parent, at % gain.shape[1]]


def beam_search(
    llm: nn.Module,
    embeds: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    limits: Tensor,
    num_beams: int = 1,
    threshold: float = float("inf"),
    length_penalty: float = 1.0,
    vote: CTCPrefixScore | None = None,
    processors: Sequence[LogitsProcessor] = (),
    sample: Sample | None = None,
    end_prob: float | None = None,
) -> list[list[Found]]:
    """For each prompt embeds (B, T, D), mask (B, T), of which `cache` holds the first positions, up to `num_beams` texts,
    the best first; row i may write limits[i] tokens.

    A text's score is the sum of its tokens' after `processors` and `vote`, and texts are ranked by score / tokens **
    length_penalty. A beam stays while it is among the `num_beams` best of its clip and at most `threshold` below the best
    of them and of the finished texts; all of a clip end when the best of them is no better than the worst of `num_beams`
    finished texts. What a finished text is worth to them is what they would have to score to rank alike. `end_prob`: see
    constant_ends.
    """
    config, embed, device = llm.generation_config, llm.get_input_embeddings(), embeds.device
    ends = torch.tensor(config.eos_token_id, device=device)
    found: list[list[Found]] = [[] for _ in embeds]
    threshold = float("inf") if sample else threshold  # its scores are no log-probabilities
    clip = torch.arange(len(embeds), device=device)  # (R,): of each beam, in this order
    written = clip.new_empty(len(clip), 0)  # (R, t)
    score = log_prob = embeds.new_zeros(len(clip), dtype=torch.float32)  # (R,)
    states = vote.start if vote else ()
    x = embeds[:, cache.get_seq_length() :]
    while going(len(clip), device):
        if not len(clip):  # as the others do
            llm(inputs_embeds=embeds.new_zeros(1, 1, embeds.shape[-1]))
            embed(ends)
            continue
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        output = llm(
            inputs_embeds=x, attention_mask=mask, position_ids=position, cache=cache, use_cache=True, logits_to_keep=1
        )
        logits = constant_ends(output.logits[:, -1].float(), ends, end_prob)  # (R, vocabulary)
        scores = own = logits.log_softmax(-1)
        if processors:  # transformers' greedy search has them shape logits, its beam search log-probabilities
            scores = own if num_beams > 1 else logits
            for processor in processors:
                scores = processor(written, scores)
            scores = scores if num_beams > 1 else scores.log_softmax(-1)
        if vote:
            scores = vote.vote(clip, states, scores, None if sample else score, threshold)
        if sample:
            scores = sample(clip, written.shape[1], scores)
        over = written.shape[1] >= limits[clip]  # (R,)
        if over.any():
            scores = scores.masked_fill(over[:, None], -torch.inf)
            scores[over, config.pad_token_id] = 0.0
        clips, best, parent, token = best_of_clips(clip, score, scores, num_beams, len(ends))
        ending = torch.isin(token, ends)  # (C, M)
        chosen = ~ending & (ending.logical_not().cumsum(1) <= num_beams)

        tokens = written.shape[1] + 1
        rank = tokens**length_penalty
        for c, m in (ending[:, :num_beams] & best[:, :num_beams].isfinite()).nonzero().tolist():
            i = int(parent[c, m])
            ended = not bool(over[i])
            end = token[c, m : m + 1] if ended else token[c, :0]
            ids, gain = torch.cat([written[i], end]).tolist(), own[i, end].sum()
            of_clip = found[int(clips[c])]
            of_clip.append(Found(ids, ended, (log_prob[i] + gain).item(), (best[c, m] / rank).item()))
            of_clip.sort(key=lambda one: -one.score)
            del of_clip[num_beams:]
        done = [found[i] for i in clips.tolist()]
        goal = best.new_tensor([texts[0].score if texts else -torch.inf for texts in done]) * rank  # (C,)
        least = best.new_tensor([texts[-1].score if len(texts) == num_beams else -torch.inf for texts in done]) * rank
        leading = best.masked_fill(~chosen, -torch.inf).amax(1)
        floor = (torch.maximum(leading, goal) - threshold).masked_fill(leading <= least, torch.inf)
        chosen &= best.isfinite() & (best >= floor[:, None])
        c, m = chosen.nonzero(as_tuple=True)  # (R',) in the order of the clips
        parent, token = parent[c, m], token[c, m]
        score, log_prob = best[c, m], log_prob[parent] + own[parent, token]
        written = torch.cat([written[parent], token[:, None]], 1)
        mask = torch.cat([mask[parent], mask.new_ones(len(c), 1)], 1)
        if vote:
            states = vote.extend(clips[c], states, token, parent)
        inference.follow(cache, parent, torch.equal(clips[c], clip))
        clip = clips[c]
        x = embed(token[:, None]).to(embeds.dtype)  # (R', 1, D)
    return [texts or [NOTHING] for texts in found]
