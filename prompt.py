"""Words → token ids: the prompt around the speech, the answer after it, and how the CTC spells them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from settings import IGNORE_INDEX, REMEDY, SPEECH_INDEX, InputError, cannot_load

SLOT = "{speech}"
DOCUMENT = "<|endoftext|>"  # so a text begins in the pretraining of SmolLM2 and Qwen; LLaMA's tokenizers add theirs
DEFAULT_PROMPT = {
    "frames": f"Speech: {SLOT}\nWrite down the words that were spoken.",
    "tokens": f"Here are the words:{SLOT}\nWrite down the exact words that were spoken above.",
}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise cannot_load("tokenizer of the LLM", "--llm_model_name_or_path", name, error) from None


@dataclass(frozen=True)
class PromptText:
    """The rendered prompt, as the checkpoint keeps it: text before and after the speech, and the end-of-turn token."""

    before: str
    after: str
    end_of_turn: str


class Spelling:
    """The LLM's tokens in those of the CTC, which are some of the LLM's: any other is split into the two that it was
    merged from, and those in turn, down to single bytes. So few CTC tokens, all well trained, spell every word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> None:
        """tokens: ids of the LLM; the place in the list is the CTC's class."""
        self.tokenizer = tokenizer
        self.tokens, self.classes = list(tokens), {id: i for i, id in enumerate(tokens)}
        self.parents = {merged: pair for merged, *pair in merges(tokenizer)}
        self.known: dict[int, list[int]] = {}

    @classmethod
    def choose(cls, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], most_merges: int) -> "Spelling":
        """The tokens that spell `texts` with the tokenizer's first `most_merges` merges, and all smaller parts of them."""
        rules, ids = merges(tokenizer), set(tokenizer.get_vocab().values())
        early = {merged for merged, *_ in rules[:most_merges]}
        atoms = ids - {merged for merged, *_ in rules}
        by_merges, by_atoms = cls(tokenizer, sorted(atoms | early)), cls(tokenizer, sorted(atoms))
        used = {by_merges.tokens[c] for text in texts for c in by_merges(answer_ids(tokenizer, text, spoken=True))}
        used |= {by_atoms.tokens[c] for id in used for c in by_atoms.of_token(id)}
        return cls(tokenizer, sorted(used))

    def of_token(self, id: int) -> list[int]:
        """Classes of one token of the LLM; [] for what the CTC cannot spell."""
        if id not in self.known:
            if id in self.classes:
                self.known[id] = [self.classes[id]]
            else:
                self.known[id] = [c for part in self.parents.get(id, ()) for c in self.of_token(part)]
        return self.known[id]

    def __call__(self, ids: Sequence[int]) -> list[int]:
        return [c for id in ids for c in self.of_token(id)]

    def whole(self, ids: Sequence[int]) -> bool:
        """Whether the CTC can spell these tokens without leaving out a character."""
        name = self.tokenizer.convert_ids_to_tokens
        return all("".join(name([self.tokens[c] for c in self.of_token(id)])) == name(id) for id in ids)

    def table(self, vocabulary: int, longest: int = 16) -> Tensor:
        """(vocabulary, longest): the classes of every token of the LLM, padded with −1; −1 only where they are more (rows
        of dashes) or do not spell the whole token (an umlaut, after English)."""
        table = torch.full((vocabulary, longest), -1)
        for id in range(vocabulary):
            spelled = self.of_token(id)
            if len(spelled) <= longest and self.whole([id]):
                table[id, : len(spelled)] = torch.tensor(spelled, dtype=torch.long)
        return table


def merges(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int, int]]:
    """(merged, left, right) ids of a BPE tokenizer's merges, first learned first. Raises InputError for another kind."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise InputError(f"--splice tokens needs an LLM with a BPE tokenizer, {tokenizer.name_or_path} has {model['type']}")
    ids, rules, seen = model["vocab"], [], set()
    for pair in model["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        merged = ids.get(left + right)
        if merged is not None and merged not in seen:  # the first rule that makes a token is how it is split
            seen.add(merged)
            rules.append((merged, ids[left], ids[right]))
    return rules


def answer_ids(tokenizer: PreTrainedTokenizerBase, txt: str, spoken: bool) -> list[int]:
    """Ids of a transcript; a special token written in it stays text. `spoken`: as within a text, after a space, so that
    the first word has the token it has anywhere (what a CTC hears has no beginning of a turn)."""
    if spoken:
        txt = f" {txt.strip()}" if txt.strip() else ""
    return tokenizer(txt, add_special_tokens=False, split_special_tokens=True).input_ids


class Prompt:
    """Grows ids and labels together: prompt (not supervised), answer and end-of-turn token (supervised).

    `word_ids` are the LLM's ids of the prompt's words, `ids` what goes into a batch: those ids, or the rows of a soft
    prompt (SPEECH_INDEX − 1 − row), around the speech marker. `spelling` is None unless the splice is by CTC.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: PromptText, settings: dict) -> None:
        self.tokenizer, self.text = tokenizer, text
        before, after = (tokenizer(part, add_special_tokens=False).input_ids for part in (text.before, text.after))
        self.word_ids = [*before, *after]
        words = [SPEECH_INDEX - 1 - row for row in range(len(self.word_ids))] if settings["soft_prompt"] else self.word_ids
        self.ids = [*words[: len(before)], SPEECH_INDEX, *words[len(before) :]]
        self.end_of_turn: int = tokenizer.convert_tokens_to_ids(text.end_of_turn)
        line = [id for id in tokenizer("\n").input_ids if id != tokenizer.eos_token_id]
        start = tokenizer.added_tokens_encoder.get(DOCUMENT) if line[:1] != [tokenizer.bos_token_id] else None
        # what an LLM that hears nothing continues; decoding was best with both
        self.context: list[int] = ([] if start is None else [start]) + line or [self.end_of_turn]
        self.spelling = Spelling(tokenizer, settings["ctc_tokens"]) if settings["splice"] == "tokens" else None

    @classmethod
    def build(cls, tokenizer: PreTrainedTokenizerBase, words: str | None, settings: dict) -> "Prompt":
        """The prompt of `settings` (a checkpoint's), else that of `words`; what was built is put into `settings`.

        Raises InputError when `words` were given and the checkpoint was trained with others.
        """
        stored = settings.get("prompt")
        text = (
            render(tokenizer, words or DEFAULT_PROMPT[settings["splice"]]) if words or not stored else PromptText(**stored)
        )
        if stored and asdict(text) != stored:
            raise InputError(f"--prompt is not what the checkpoint was trained with: {REMEDY}")
        settings["prompt"] = asdict(text)
        return cls(tokenizer, text, settings)

    def example(self, txt: str) -> dict[str, list[int]]:
        """input_ids and labels of one training example, equally long; with a CTC also ctc_labels, its classes."""
        answer = answer_ids(self.tokenizer, txt, spoken=self.spelling is not None)
        supervised = [*answer, self.end_of_turn]
        ids = {"input_ids": self.ids + supervised, "labels": [IGNORE_INDEX] * len(self.ids) + supervised}
        return ids | ({"ctc_labels": self.spelling(answer)} if self.spelling else {})


def render(tokenizer: PreTrainedTokenizerBase, words: str) -> PromptText:
    """The user's `words` in the tokenizer's own chat template, split at {speech}.

    A tokenizer without a template gets `USER: … \\nASSISTANT:` between its beginning- and end-of-text tokens.
    Raises InputError unless `words` hold {speech} exactly once.
    """
    if words.count(SLOT) != 1:
        raise InputError(f"--prompt must hold {SLOT} exactly once, where the speech stands: {words!r}")
    user = [{"role": "user", "content": words}]
    if tokenizer.chat_template:
        options = {"tokenize": False, "enable_thinking": False}  # the latter for Qwen3, ignored by others
        prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, **options)
        turn = tokenizer.apply_chat_template([*user, {"role": "assistant", "content": "{answer}"}], **options)
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        rest = tokenizer(turn.partition("{answer}")[2], add_special_tokens=False).input_ids
        end = next((id for id in rest if id in special), tokenizer.eos_token_id)
    else:
        prompt, end = f"{tokenizer.bos_token or ''}USER: {words}\nASSISTANT:", tokenizer.eos_token_id
    if end is None:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-turn or end-of-text token")
    before, _, after = prompt.partition(SLOT)
    return PromptText(before, after, tokenizer.convert_ids_to_tokens(end))
