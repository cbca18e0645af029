"""The token splice: speech in the LLM's own vocabulary, by CTC.

    projector vectors (B, N, D) ─ CTCHead ─ log-probabilities (B, N, V + 1) ┬─ ctc_loss
                                                                           ├─ soft_tokens (B, S, D): what the LLM reads
                                                                           ├─ greedy_path: a transcript without any LLM
                                                                           ├─ forced_alignment: when each token was said
                                                                           └─ CTCPrefixScore: the CTC votes in a beam search

V of the LLM's tokens and one blank, which is the last class. CTC posteriors as weights on an LLM's embeddings: LegoSLM
(arXiv 2505.11352); dropping blanks before a decoder-only model: CJST (arXiv 2411.07607).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

NEVER = -1e10  # a log-probability: finite, so that differences stay numbers


class CTCHead(nn.Module):
    """Logits by cosine between a projector vector and the centred embedding of each token; trained: blank and scale."""

    def __init__(self, embeddings: Tensor) -> None:
        """embeddings (V, D): those of the CTC's tokens in the LLM's table, which stay as they are."""
        super().__init__()
        embeddings = embeddings.detach().float()
        centred = F.normalize(embeddings - embeddings.mean(0), dim=-1)
        self.register_buffer("embeddings", embeddings, persistent=False)  # (V, D)
        self.register_buffer("directions", centred, persistent=False)  # (V, D)
        self.blank = nn.Parameter(-F.normalize(embeddings.mean(0), dim=-1))  # (D,)
        self.blank_bias = nn.Parameter(torch.zeros(1))
        self.log_scale = nn.Parameter(torch.full((1,), math.log(20.0)))

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors (B, N, D) → log-probabilities (B, N, V + 1) in float32."""
        directions = torch.cat([self.directions, F.normalize(self.blank, dim=0)[None]]).float()  # (V + 1, D)
        with torch.autocast(vectors.device.type, enabled=False):
            cosine = F.normalize(vectors.float(), dim=-1) @ directions.T  # (B, N, V + 1)
        bias = F.pad(self.blank_bias, (len(self.directions), 0))  # (V + 1,)
        return (cosine * self.log_scale.exp() + bias).log_softmax(-1)

    def soft(self, log_probs: Tensor, row: Tensor, frame: Tensor) -> Tensor:
        """The mean embedding under the posterior of each of these frames (K, D).

        The LLM's gradient ends here, the projector learns by CTC alone: where it is sure little gradient is left, which
        Adam blows up to whole steps, and training the LLM wore the CTC off.
        """
        return log_probs[row, frame, :-1].detach().softmax(-1) @ self.embeddings.float()

    def soft_tokens(self, log_probs: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """What the LLM reads: per frame the mean embedding under the posterior, blanks dropped, runs of a token averaged.

        log_probs (B, N, V + 1), length (B,) → (B, S, D) and how many of each row are real (B,).
        """
        path = _best_path(log_probs, length)  # (B, N)
        speaks = path != log_probs.shape[-1] - 1
        first = _first_of_run(path) & speaks
        count = first.sum(1)  # (B,)
        B, S = len(count), int(count.max())
        row, frame = speaks.nonzero(as_tuple=True)  # (K,) frames that speak
        token = row * S + (first.cumsum(1) - 1)[row, frame]  # (K,) where each goes in (B * S)
        soft = self.soft(log_probs, row, frame)  # (K, D)
        total = soft.new_zeros(B * S, soft.shape[-1]).index_add(0, token, soft)
        frames = torch.bincount(token, minlength=B * S).clamp(min=1)
        return (total / frames[:, None]).view(B, S, soft.shape[-1]), count


def ctc_loss(log_probs: Tensor, length: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """−log P(labels | speech) summed over the batch (Graves et al. 2006).

    log_probs (B, N, V + 1), length (B,), labels (B, L) padded with `ignore_index`.
    """
    targets = labels != ignore_index
    return F.ctc_loss(
        log_probs.transpose(0, 1),
        labels[targets],
        length,
        targets.sum(1),
        blank=log_probs.shape[-1] - 1,
        reduction="sum",
        zero_infinity=True,
    )


def log_likelihood(log_probs: Tensor, texts: Sequence[Sequence[int]]) -> list[float]:
    """log P(text | speech), of all paths, for each of some texts as classes; NEVER for one that the frames are too few for.

    log_probs (N, V + 1): of the clip's own frames.
    """
    blank, texts_count = log_probs.shape[1] - 1, len(texts)
    size = torch.tensor([len(text) for text in texts])
    targets = torch.tensor([c for text in texts for c in text], dtype=torch.long)
    many = log_probs[:, None].expand(-1, texts_count, -1)  # (N, texts, V + 1)
    length = torch.full_like(size, len(log_probs))
    loss = F.ctc_loss(many, targets, length, size, blank, reduction="none")  # (texts,)
    return (-loss).clamp(min=NEVER).tolist()


def forced_alignment(log_probs: np.ndarray, classes: Sequence[int]) -> list[tuple[int, int]] | None:
    """(first, last) frame of each of `classes` on the likeliest path that says them (Viterbi); None: the frames are too few.

    log_probs (N, V + 1): of the clip's own frames.
    """
    N, blank = len(log_probs), log_probs.shape[1] - 1
    if not classes or not N:
        return None if classes else []
    states = np.full(2 * len(classes) + 1, blank)  # (S,): blank, class, blank, class, …, blank
    states[1::2] = classes
    emission = log_probs[:, states]  # (N, S)
    jump = np.zeros(len(states), bool)  # over the blank between two different classes
    jump[3::2] = states[3::2] != states[1:-2:2]
    score = np.where(np.arange(len(states)) < 2, emission[0], -np.inf)  # (S,)
    came_from = np.zeros((N, len(states)), np.int8)  # so many states before
    for t in range(1, N):
        options = np.full((3, len(states)), -np.inf)
        options[0], options[1, 1:], options[2, 2:] = score, score[:-1], np.where(jump[2:], score[:-2], -np.inf)
        came_from[t] = options.argmax(0)
        score = options.max(0) + emission[t]
    state = len(states) - 2 + int(score[-1] > score[-2])
    if np.isneginf(score[state]):
        return None
    frames = np.zeros(N, int)
    for t in reversed(range(N)):
        frames[t] = state
        state -= int(came_from[t, state])
    first = np.searchsorted(frames, range(1, len(states), 2))  # states only ever grow along a path
    last = np.searchsorted(frames, range(1, len(states), 2), side="right") - 1
    return list(zip(first.tolist(), last.tolist(), strict=True))


def _best_path(log_probs: Tensor, length: Tensor) -> Tensor:
    """The likeliest class of each frame (B, N); blank past a row's end."""
    inside = torch.arange(log_probs.shape[1], device=length.device) < length[:, None]
    return log_probs.argmax(-1).masked_fill(~inside, log_probs.shape[-1] - 1)


def _first_of_run(path: Tensor) -> Tensor:
    return F.pad(path[:, 1:] != path[:, :-1], (1, 0), value=True)


def greedy_path(log_probs: Tensor, length: Tensor) -> list[list[int]]:
    """The tokens of the best path, runs merged, blanks dropped: a list of classes for each row."""
    path = _best_path(log_probs, length)
    kept = _first_of_run(path) & (path != log_probs.shape[-1] - 1)
    return [row[keep].tolist() for row, keep in zip(path, kept, strict=True)]


def heard_as(labels: Sequence[int], path: Sequence[int]) -> list[range]:
    """For each of `labels` the places in `path`, the CTC's tokens, where it stands: none, one, or with what was added
    behind it several; by the fewest edits."""
    spans = [range(0)] * len(labels)
    for edit, at, end, start, stop in Levenshtein.opcodes(labels, path):
        if edit == "insert":
            if at:
                spans[at - 1] = range(spans[at - 1].start if spans[at - 1] else start, stop)
        elif edit != "delete":
            spans[at:end] = [range(i, i + 1) for i in range(start, stop)]
    return spans


def borrow(
    soft: Tensor,
    paths: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    own: Tensor,
) -> tuple[Tensor, Tensor]:
    """Text as if it had been heard: each token as the CTC heard that token somewhere in these clips, errors and all.

    soft (B, S, D): the soft tokens of clips, `paths` their classes, `labels` what was said; `texts`: classes of other
    texts, one for each row of the result (R, S', D), whose lengths come with it (R,). A token that no clip has is heard
    well: own (V, D). Simulated posteriors to train on text alone: TASU (arXiv 2511.03310).
    """
    heard: dict[int, list[tuple[int, range]]] = {}
    for row, (said, path) in enumerate(zip(labels, paths, strict=True)):
        for token, span in zip(said, heard_as(said, path), strict=True):
            heard.setdefault(token, []).append((row, span))
    rows = []
    for text in texts:
        vectors = [own[:0]]
        for token, choice in zip(text, torch.rand(len(text)).tolist(), strict=True):
            options = heard.get(token)
            if options:
                row, span = options[int(choice * len(options))]
                vectors.append(soft[row, span.start : span.stop])
            else:
                vectors.append(own[token][None])
        rows.append(torch.cat(vectors))
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows], device=soft.device)


class CTCPrefixScore:
    """Adds `weight` · log P_CTC(next token | tokens so far) to the scores of a search, for its best `candidates`.

    Those are chosen by both: a token cannot score better than the LLM's score, the CTC's of the token's first class, which
    a product of matrices gives for all classes, and of each further class how often the clip has it in all.

    The CTC prefix probability of Watanabe et al. 2017 ("Hybrid CTC/Attention Architecture"): the probability of all
    label sequences that begin with a prefix. A token of the LLM is spelled in one or several of the CTC's. All frames at
    once: the recursion over frames is linear, so it is a cumulative log-sum-exp. Of a candidate only its probability is
    computed; the state that what follows needs, once the search has taken it.

    A search compares beams of equally many tokens, which may have said unequally much: those that spell a word in pieces
    have paid for less of it, and crowd out the whole word. So each of the CTC's classes in a text earns a `bonus`.
    """

    def __init__(
        self,
        log_probs: Tensor,
        length: Tensor,
        spelling: Tensor,
        ends: list[int],
        weight: float,
        candidates: int = 24,
        best: int | None = None,
        bonus: float = 0.0,
        spoken: Tensor | None = None,
    ) -> None:
        """log_probs (B, N, V + 1), length (B,); spelling (vocabulary, P): the CTC classes of each of the LLM's tokens,
        padded with −1; `ends`: the tokens that end a transcript. Of the candidates the search needs the `best`: others
        need not be scored. spoken (B,): where a text of no tokens is none."""
        B, N, classes = log_probs.shape
        if length.device.type == "mps":  # has no float64
            log_probs, length, spelling = log_probs.cpu(), length.cpu(), spelling.cpu()
        inside = torch.arange(N, device=length.device) < length[:, None]  # past the end: blank for certain
        outside = torch.full((classes,), NEVER, dtype=torch.float64, device=length.device)
        outside[-1] = 0
        log_probs = torch.where(inside[..., None], log_probs.double(), outside).clamp(min=NEVER)
        self.spoken = (torch.zeros_like(length) if spoken is None else spoken).bool().to(length.device)  # (B,)
        self.log_probs = log_probs.transpose(1, 2).contiguous()  # (B, V + 1, N)
        self.probs = self.log_probs[:, :-1].exp().transpose(1, 2)  # (B, N, V)
        self.blanks = self.log_probs[:, -1].cumsum(-1)  # (B, N)
        self.spelling = spelling
        self.first = spelling[:, 0].masked_fill(spelling[:, 0] < 0, classes - 1)  # (vocabulary,); V: never a candidate
        self.first[ends] = classes - 1
        self.ends, self.weight = ends, weight
        self.candidates = min(candidates, int((self.first < classes - 1).sum()))
        self.best = best or self.candidates
        bonus = bonus * (spelling >= 0).sum(1)  # (vocabulary,)
        bonus[ends] = 0
        heard = self.probs.sum(1).log().clamp(min=NEVER, max=0)  # (B, V): P of a class behind any others is at most this
        token, i = (spelling[:, 1:] >= 0).nonzero(as_tuple=True)
        self.bonus = bonus.float()
        self.further = self.bonus.repeat(B, 1)  # (B, vocabulary): of all but the first class at most this
        self.further.index_add_(1, token, (weight * heard[:, spelling[token, i + 1]]).float())
        # a state: last class, log P of ending at each time 0 … N in a token and in a blank, log P of all that begin so
        never = torch.full((B, N + 1), NEVER, dtype=torch.float64, device=length.device)
        self.start = (length.new_full((B,), -1), never, F.pad(self.blanks, (1, 0)), never.new_zeros(B))

    def extend(self, clips: Tensor, states: Sequence[Tensor], tokens: Tensor, parents: Tensor | None = None) -> list[Tensor]:
        """The states of R beams of the clips (R,): of the beams `parents` (R,) before, or as many, with one of the LLM's
        tokens (R,) behind each."""
        clips, tokens = clips.to(self.blanks.device), tokens.to(self.blanks.device)
        states = [part.clone() if parents is None else part[parents.to(part.device)] for part in states]
        for pieces in self.spelling[tokens].T:  # (R,)
            at = (pieces >= 0).nonzero().squeeze(1)  # (A,) those that go on
            if not len(at):
                break
            longer = self._extend(clips[at], *(part[at] for part in states), pieces[at])
            for part, new in zip(states, longer, strict=True):
                part[at] = new
        return states

    def vote(
        self,
        clips: Tensor,
        states: Sequence[Tensor],
        scores: Tensor,
        total: Tensor | None = None,
        threshold: float = float("inf"),
    ) -> Tensor:
        """scores (R, vocabulary) with the CTC's and the bonus added, −∞ for what is no candidate: of R beams, those of a
        clip side by side, their clips (R,) and states.

        With the score of each beam, total (R,), a token of several classes that would be more than `threshold` below the
        best of its clip is none.
        """
        device, scores, clips = scores.device, scores.to(self.blanks.device), clips.to(self.blanks.device)
        last, token, blank, before = states
        first = self._next_class(clips, last, token, blank)  # (R, V)
        extra = scores.shape[-1] - len(self.first)  # an output layer may be longer than the tokenizer
        bound = F.pad(self.weight * (first - before[:, None]), (0, 1), value=-torch.inf).to(scores.dtype)  # (R, V + 1)
        bound = bound[:, F.pad(self.first, (0, extra), value=first.shape[-1])]  # (R, vocabulary)
        bounds, best = (scores + bound + F.pad(self.further, (0, extra))[clips]).topk(self.candidates)  # (R, K)
        ended = torch.logaddexp(token[:, -1], blank[:, -1]) - before  # (R,)
        ended = scores[:, self.ends] + (self.weight * ended)[:, None].to(scores.dtype)  # (R, ends)
        ended = ended.masked_fill(((last < 0) & self.spoken[clips])[:, None], -torch.inf)
        several = (self.spelling[best.clamp(max=len(self.spelling) - 1), 1:] >= 0).any(-1)  # of others the bound is exact
        exact = bounds.masked_fill(several, -torch.inf).topk(min(self.best, self.candidates)).values  # (R, best)
        enough = exact[:, -1]
        if total is not None:
            total = total.to(scores)
            leading = scores.new_full((len(self.blanks),), -torch.inf)  # (B,)
            leading.scatter_reduce_(0, clips, total + torch.cat([exact[:, :1], ended], 1).amax(1), "amax")
            enough = torch.maximum(enough, leading[clips] - threshold - total)
        bounds = bounds.masked_fill(several & (bounds < enough[:, None]), -torch.inf)
        gain = self._begin_with(clips, states, first, best, several & ~bounds.isneginf()) - before[:, None]  # (R, K)
        both = scores.gather(1, best) + F.pad(self.bonus, (0, extra))[best] + (self.weight * gain).to(scores.dtype)
        voted = torch.full_like(scores, -torch.inf)
        voted.scatter_(1, best, both.masked_fill(bounds.isneginf(), -torch.inf))
        voted[:, self.ends] = ended
        return voted.to(device)

    def _next_class(self, clips: Tensor, last: Tensor, token: Tensor, blank: Tensor) -> Tensor:
        """log P of all that begins with a prefix and a class, for R prefixes and every class but the blank: (R, V)."""
        before = torch.logaddexp(blank, token)[:, :-1]  # (R, N)
        loudest = before.amax(1, keepdim=True)
        left, row, count = clips.unique_consecutive(return_inverse=True, return_counts=True)  # (C,), (R,), (C,)
        place = torch.arange(len(clips), device=clips.device) - (count.cumsum(0) - count)[row]  # (R,) among its clip's
        share = before.new_zeros(len(left), int(count.max()), before.shape[1])  # (C, most, N)
        share[row, place] = (before - loudest).exp()
        probs = self.probs if len(left) == len(self.probs) else self.probs[left]  # (C, N, V)
        scores = (share @ probs)[row, place].log().clamp(min=NEVER) + loudest  # (R, V)
        again = last.clamp(min=0)  # the last class anew: only after a blank
        repeated = (blank[:, :-1] + self.log_probs[clips, again]).logsumexp(-1)
        at = (last >= 0).nonzero().squeeze(1)
        scores[at, again[at]] = repeated[at]
        return scores

    def _begin_with(self, rows: Tensor, states: Sequence[Tensor], first: Tensor, tokens: Tensor, several: Tensor) -> Tensor:
        """log P of all that begins with a prefix and each of its candidates, tokens (R, K), or but for `several` (R, K)
        with the first class of each: (R, K)."""
        pieces = self.spelling[tokens.flatten().clamp(max=len(self.spelling) - 1)]  # (R * K, P)
        pieces[:, 1:].masked_fill_(~several.view(-1, 1), -1)
        total = first.gather(1, pieces[:, 0].view_as(tokens).clamp(min=0)).flatten()  # (R * K,): of their first pieces
        parent = torch.arange(len(rows), device=rows.device).repeat_interleave(tokens.shape[1])  # (R * K,)
        for i in range(1, pieces.shape[1]):
            at = (pieces[:, i] >= 0).nonzero().squeeze(1)  # (A,) candidates with one more piece
            if not len(at):
                break
            # candidates that begin alike share a state (U,)
            alike, place = (parent[at] * first.shape[1] + pieces[at, i - 1]).unique(return_inverse=True)
            source, piece = alike // first.shape[1], alike % first.shape[1]
            rows = rows[source]
            states = self._extend(rows, *(part[source] for part in states), piece)
            parent = parent.index_copy(0, at, place)
            total[at] = self._starts(rows[place], *(part[place] for part in states[:3]), pieces[at, i]).logsumexp(-1)
        return total.view_as(tokens)

    def _starts(self, rows: Tensor, last: Tensor, token: Tensor, blank: Tensor, piece: Tensor) -> Tensor:
        """log P of the piece's first frame being this one (A, N), after A prefixes."""
        again = (piece == last)[:, None]  # the same class anew only after a blank
        return torch.logaddexp(blank, torch.where(again, NEVER, token))[:, :-1] + self.log_probs[rows, piece]

    def _extend(
        self, rows: Tensor, last: Tensor, token: Tensor, blank: Tensor, _: Tensor, piece: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States of A prefixes, each extended by one class, piece (A,)."""
        starts = self._starts(rows, last, token, blank, piece)  # (A, N)
        y_sum, blanks = self.log_probs[rows, piece].cumsum(-1), self.blanks[rows]  # (A, N)
        token = _later(y_sum + (starts - y_sum).logcumsumexp(-1))  # (A, N + 1)
        blank = blanks + (token[:, :-1] - F.pad(blanks, (1, 0))[:, :-1]).logcumsumexp(-1)
        return piece, token, _later(blank), starts.logsumexp(-1)


def _later(log_p: Tensor) -> Tensor:
    """(A, N) for the times 1 … N → (A, N + 1): nothing has been written at time 0."""
    return F.pad(log_p.clamp(min=NEVER), (1, 0), value=NEVER)
