"""Alignment as NIST sclite's: the cheapest path when a substitution costs 4, a deletion or insertion 3.

An alignment is a text of sclite's letters, one a step: C correct, S substitution, D deletion, I insertion. Many pairs are
aligned at once, in numpy: batches of like lengths, each row of their tables in one go.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

SUBSTITUTION, GAP = 4, 3  # sclite's costs
CELLS = 2_000_000  # of the tables held at a time; a byte each
CHUNK = 4096  # pairs looked at together

Tokens = Sequence[str]  # words, or a text: its characters
LETTERS = np.frombuffer(b"\0CSDI", dtype=np.uint8)
WAIT, HIT, SUB, DEL, INS = range(5)
BACK_I, BACK_J = np.array([0, 1, 1, 1, 0]), np.array([0, 1, 1, 0, 1])  # how far a step goes in reference and hypothesis


@dataclass(frozen=True, slots=True)
class Counts:
    """Alignment counts; they add up."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @classmethod
    def of(cls, steps: str) -> "Counts":
        return cls(*map(steps.count, "CSDI"))

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )

    @property
    def reference_length(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float | None:
        """Errors for each reference token; None where there is no reference token to divide by."""
        return self.errors / self.reference_length if self.reference_length else None

    @property
    def percent(self) -> str:
        return "n/a (no reference)" if self.rate is None else f"{100 * self.rate:.2f} %"


def alignments(pairs: Iterable[tuple[Tokens, Tokens]]) -> Iterator[str]:
    """The steps of each pair (reference, hypothesis), in their order; only CHUNK pairs are held at a time."""
    pairs = iter(pairs)
    while chunk := list(islice(pairs, CHUNK)):
        steps = ["C" * len(ref) if ref == hyp else "" for ref, hyp in chunk]
        todo = [k for k, (ref, hyp) in enumerate(chunk) if ref != hyp]
        todo.sort(key=lambda k: (len(chunk[k][0]), len(chunk[k][1])))
        while todo:
            longest, size = max(len(chunk[todo[-1]][0]), 1), 1
            width = len(chunk[todo[-1]][1]) + 1
            while size < len(todo):
                width = max(width, len(chunk[todo[-1 - size]][1]) + 1)
                if (size + 1) * longest * width > CELLS:
                    break
                size += 1
            batch, todo = todo[-size:], todo[:-size]
            for k, found in zip(batch, _align([chunk[k] for k in batch]), strict=True):
                steps[k] = found
        yield from steps


def _align(pairs: list[tuple[Tokens, Tokens]]) -> Iterator[str]:
    """The steps of a batch. Tables above CELLS are made in blocks of rows: the costs forwards, the moves backwards."""
    ids: dict[str, int] = {}
    ref, n = _padded([pair[0] for pair in pairs], ids)  # (B, N), (B,)
    hyp, m = _padded([pair[1] for pair in pairs], ids)  # (B, M), (B,)
    block = max(1, CELLS // (len(pairs) * (hyp.shape[1] + 1)))
    starts = range(0, max(ref.shape[1], 1), block)
    ramp = GAP * np.arange(hyp.shape[1] + 1, dtype=np.int32)
    costs = [np.broadcast_to(ramp, (len(pairs), len(ramp)))]  # each (B, M + 1): of the row before a block
    for start in starts[:-1]:
        costs.append(_rows(ref[:, start : start + block], hyp, costs[-1], ramp, None))
    i, j, rows, path = n.copy(), m.copy(), np.arange(len(pairs)), []
    for start in reversed(starts):
        here = ref[:, start : start + block]
        moves = np.empty((here.shape[1], len(pairs), len(ramp)), dtype=np.uint8)  # (block, B, M + 1)
        _rows(here, hyp, costs.pop(), ramp, moves)
        while (i > start).any():
            path.append(np.where(i > start, moves[np.maximum(i - start, 1) - 1, rows, j], WAIT))
            i, j = i - BACK_I[path[-1]], j - BACK_J[path[-1]]
    letters = LETTERS[np.array(path[::-1], dtype=np.uint8).reshape(-1, len(pairs)).T]  # (B, steps)
    for first, row in zip(j.tolist(), letters, strict=True):
        yield "I" * first + row.tobytes().replace(b"\0", b"").decode()


def _padded(texts: list[Tokens], ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (B, longest), new tokens joining `ids`, and lengths (B,); what stands in the padding is never looked at."""
    lengths = np.array([len(text) for text in texts])
    padded = np.zeros((len(texts), lengths.max()), dtype=np.int32)
    if isinstance(texts[0], str):  # as below, sooner
        flat = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.int32)
    else:
        flat = [ids.setdefault(token, len(ids)) for text in texts for token in text]
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = flat
    return padded, lengths


def _rows(ref: np.ndarray, hyp: np.ndarray, cost: np.ndarray, ramp: np.ndarray, moves: np.ndarray | None) -> np.ndarray:
    """The costs (B, M + 1) after the rows of ref (B, rows), from those before; into moves (rows, B, M + 1) the last steps.

    Where several paths cost the same, sclite's choice: diagonal, then insertion.
    """
    for row in range(ref.shape[1]):
        differs = hyp != ref[:, row, None]  # (B, M)
        across = cost[:, :-1] + SUBSTITUTION * differs
        cost = cost + GAP
        np.minimum(cost[:, 1:], across, out=cost[:, 1:])
        cost -= ramp
        np.minimum.accumulate(cost, axis=1, out=cost)  # insertions, left to right
        cost += ramp
        if moves is not None:
            moves[row, :, 0] = DEL
            inserted = np.where(cost[:, 1:] == cost[:, :-1] + GAP, np.uint8(INS), np.uint8(DEL))
            moves[row, :, 1:] = np.where(cost[:, 1:] == across, np.uint8(HIT) + differs, inserted)
    return cost


def align(reference: Tokens, hypothesis: Tokens) -> list[tuple[str | None, str | None]]:
    """Aligned pairs (reference, hypothesis), None for a gap."""
    (steps,) = alignments([(reference, hypothesis)])
    return paired(reference, hypothesis, steps)


def count(reference: Tokens, hypothesis: Tokens) -> Counts:
    (steps,) = alignments([(reference, hypothesis)])
    return Counts.of(steps)


def paired(reference: Tokens, hypothesis: Tokens, steps: str) -> list[tuple[str | None, str | None]]:
    """The pairs that `steps` tell, None for a gap."""
    ref, hyp = iter(reference), iter(hypothesis)
    return [(None if step == "I" else next(ref), None if step == "D" else next(hyp)) for step in steps]
