"""The CTC's draft, verified by the LLM: what is written is what plain greedy search writes, token by token."""

from types import SimpleNamespace

import pytest
import torch
from conftest import DATA, MODELS, ROOT, audio, build_system

import draft
from audio import load_audio
from manifest import read_manifest
from prompt import answer_ids
from recognize import DecodeArguments, Transcriber
from settings import ModelArguments


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
