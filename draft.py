"""Greedy search in a few passes of the LLM: the CTC's transcript is a draft, of which one pass verifies many tokens.

    draft    the cat sat on a mat            pass 1: "the cat sat on" is what the LLM writes too, and then "the"
    written  the cat sat on the              pass 2: "mat" and the end of turn

Speculative decoding (Leviathan et al. 2023) with a draft that costs nothing. What is written is what the LLM alone, or with
the CTC's vote, would write token by token.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.integrations import is_deepspeed_zero3_enabled

from ctc import CTCPrefixScore
from inference import whole
from search import NOTHING, Found, constant_ends

LOOKAHEAD = 16  # tokens of a draft that one pass verifies, at most: logits of a whole transcript might not fit
ON_A_CPU = 16  # of all drafts together: there a token takes its time, also one that is rejected


class Written(NamedTuple):
    texts: list[Found]  # of each row
    passes: int  # of the LLM
    accepted: list[int]  # of each row, how many tokens were the draft's


class Draft:
    """A draft, and after each token that is written the edits that make its first j tokens of what is written, for all j."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.edits = list(ids), list(range(len(ids) + 1))

    def rest(self, written: Sequence[int]) -> list[int]:
        """What may follow, after `written` more tokens: the draft from where the fewest edits lead, the last such place."""
        for token in written:
            above, self.edits = self.edits, [self.edits[0] + 1]
            for j, id in enumerate(self.ids):
                self.edits.append(min(above[j] + (id != token), above[j + 1] + 1, self.edits[j] + 1))
        return self.ids[max(range(len(self.edits)), key=lambda j: (-self.edits[j], j)) :]


def lookahead(rows: int, device: torch.device) -> int:
    """How many tokens of each of so many drafts one pass verifies; of many on a CPU none."""
    return LOOKAHEAD if device.type != "cpu" else min(ON_A_CPU // rows, LOOKAHEAD)


def applies(cache: DynamicCache) -> bool:
    """Whether this LLM's cache may have gaps: where a layer sees a window of positions, or sums them up, it may not. Under
    ZeRO-3 all processes need equally many passes."""
    return whole(cache) and not is_deepspeed_zero3_enabled()


def verify(
    llm: nn.Module,
    embeds: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    drafts: Sequence[Sequence[int]],
    limits: Sequence[int],
    vote: CTCPrefixScore | None = None,
    end_prob: float | None = None,
) -> Written:
    """What greedy search writes after prompts embeds (B, T, D), mask (B, T), of which `cache` holds the first positions.

    Row i may write limits[i] tokens, then its turn is ended. Rows that have ended leave the batch. Positions that were
    rejected stay in the cache, masked, until every row is without them.
    """
    config, embed = llm.generation_config, llm.get_input_embeddings()
    device = embeds.device
    ends = torch.tensor(config.eos_token_id, device=device)
    drafts = [Draft(ids) for ids in drafts]
    rows = torch.arange(len(embeds), device=device)  # (L,) that still write
    texts: list[list[int]] = [[] for _ in drafts]
    log_probs, accepted = [0.0] * len(drafts), [0] * len(drafts)
    guesses = [draft.rest([])[: lookahead(len(drafts), device)] for draft in drafts]
    states = vote.start if vote else None
    pending, passes = embeds[:, cache.get_seq_length() :], 0
    while len(rows):
        room = [limits[i] - len(texts[i]) for i in rows.tolist()]
        guesses = [torch.tensor(ids[:n], dtype=torch.long) for ids, n in zip(guesses, room, strict=True)]
        guess = pad_sequence(guesses, batch_first=True, padding_value=-1).to(device)  # (L, W)
        W = guess.shape[1]
        mask = torch.cat([mask, (guess >= 0).to(mask.dtype)], 1)
        x = torch.cat([pending, embed(guess.clamp(min=0)).to(pending.dtype)], 1)  # (L, new, D)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        output = llm(
            inputs_embeds=x,
            attention_mask=mask,
            position_ids=position,
            cache=cache,
            use_cache=True,
            logits_to_keep=W + 1,
        )
        scores, passes = constant_ends(output.logits.float(), ends, end_prob), passes + 1  # (L, W + 1, vocabulary)
        if vote:
            along = [states]  # after each token of the guess
            for token in guess.clamp(min=0).T:
                along.append(vote.extend(rows, along[-1], token))
            along = [torch.stack(part, 1).flatten(0, 1) for part in zip(*along, strict=True)]  # (L * (W + 1), …)
            voted = vote.vote(rows.repeat_interleave(W + 1), along, scores.flatten(0, 1))
            choice = voted.argmax(-1).view(len(rows), W + 1)
        else:
            choice = scores.argmax(-1)  # (L, W + 1)
        over = torch.arange(W + 1, device=device) >= torch.tensor(room, device=device)[:, None]
        choice = choice.masked_fill(over, config.pad_token_id)
        agreed = (choice[:, :-1] == guess).long().cumprod(1).sum(1)  # (L,)
        own = choice.gather(1, agreed[:, None])  # (L, 1): the LLM's token behind them

        new = [line[: n + 1] for line, n in zip(choice.tolist(), agreed.tolist(), strict=True)]
        gains = (scores.gather(2, choice[..., None])[..., 0] - scores.logsumexp(-1)).tolist()  # (L, W + 1)
        for i, tokens, gain, most in zip(rows.tolist(), new, gains, room, strict=True):
            texts[i] += tokens
            log_probs[i] += sum(gain[: min(len(tokens), most)])  # not of an end that the limit sets
            accepted[i] += len(tokens) - 1

        mask[:, mask.shape[1] - W :] *= torch.arange(W, device=device) < agreed[:, None]
        unused = W - int(agreed.max())
        if unused:
            cache.crop(-unused)
        mask = mask[:, : mask.shape[1] - unused]
        going = (~torch.isin(own[:, 0], ends)).nonzero().squeeze(1)  # (L',)
        if vote:
            states = vote.extend(rows[going], along, own[going, 0], going * (W + 1) + agreed[going])
        if len(going) < len(rows):
            cache.batch_select_indices(going)
        rows, mask = rows[going], torch.cat([mask[going], mask.new_ones(len(going), 1)], 1)
        pending = embed(own[going]).to(pending.dtype)  # (L', 1, D)
        guesses = []
        for i, k in zip(rows.tolist(), going.tolist(), strict=True):  # a draft that was wrong is trusted less far
            guesses.append(drafts[i].rest(new[k])[: min(max(2 * len(new[k]), 4), lookahead(len(rows), device))])
    found = []
    for text, most, log_prob in zip(texts, limits, log_probs, strict=True):
        ended = len(text) <= most
        found.append(NOTHING if math.isnan(log_prob) else Found(text if ended else text[:-1], ended, log_prob, log_prob))
    return Written(found, passes, accepted)
