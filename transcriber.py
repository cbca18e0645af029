"""A checkpoint, ready to transcribe: `Transcriber`, and the flags of a decoding.

    file or array ─ decoding.recognize ─ pieces, batches ─ hypotheses ┬─ hear ─ the CTC's text
                                                                      ├─ _write ─ the LLM's readings (not for ctc)
                                                                      └─ scores, words with times

The command line (recognize.py) makes one `from_arguments`, a program `from_checkpoint`.
"""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor
from whisper.audio import N_SAMPLES, SAMPLE_RATE

import inference
from audio import log_mel, speech_lengths, speech_vectors, vector_seconds
from ctc import greedy_path, log_likelihood
from dataset import SpeechCollator
from decoding import ArrayPieces, recognize
from longform import DETECTORS, Pieces
from manifest import Record
from model import SpeechLLM, build_model
from progress import processes
from prompt import Prompt, answer_ids, load_tokenizer
from search import NOTHING, Sample
from settings import InputError, ModelArguments, first_line, resolve_settings
from transcript import Hypothesis, Transcript, timed_words

DEMO = Path(__file__).resolve().parent / "demo"
MAX_TOKENS_PER_SECOND = 12  # fast speech has about 5 words a second; digits and names cost 2 tokens each
SPARE_TOKENS = 8
# the CTC's weight beside the LLM, and what each of its tokens in a text adds to the score
VOTES = {"ctc": (1.0, 0.0), "llm": (0.0, 0.0), "joint": (0.6, 0.0), "fusion": (0.9, 2.5)}
END_PROB = 0.05  # in fusion: an LLM without a prompt does not know that a text ends where the speech does
NO_NUMBERS = InputError("the LLM's scores are not numbers: --dtype float32 or bfloat16 may help")
BEAM_THRESHOLD = 5.0  # of many beams few stay alive: fewer errors than 4 with a threshold of 8, and faster


@dataclass
class DecodeArguments:
    data_path: str | None = field(default=None, metadata={"help": "What to recognize: manifest (jsonl), folder, file."})
    result_path: list[str] | None = field(
        default=None,
        metadata={"help": "Files to write: .txt .jsonl .tsv .srt .vtt; of a --data_path result.txt, else the screen."},
    )
    decoder: Literal["auto", "ctc", "llm", "joint", "fusion"] = field(
        default="auto",
        metadata={
            "help": "ctc: no LLM runs; llm: it alone; joint: both vote; fusion: so too, but the LLM hears nothing and is "
            "as it was before it was trained. auto: the checkpoint's, or as it was trained."
        },
    )
    joint_weight: float | None = field(
        default=None, metadata={"help": "Of the CTC's log-probability beside the LLM's; 0.6, in fusion 0.9."}
    )
    length_bonus: float | None = field(
        default=None,
        metadata={"help": "For each of the CTC's tokens in a text; in fusion 2.5, in joint the checkpoint's, or 0."},
    )
    num_beams: int | None = field(default=None, metadata={"help": "At most so many, 1 is greedy; 10, in llm 4."})
    beam_threshold: float | None = field(
        default=None,
        metadata={"help": "A beam that scores so much less than the best of its clip is given up; 5, but inf for --nbest."},
    )
    batch_size: int = field(default=32, metadata={"help": "At most so many clips are decoded together …"})
    batch_seconds: float = field(default=240.0, metadata={"help": "… and at most so many seconds, padding included."})
    nbest: int = field(default=1, metadata={"help": "So many texts a clip with their scores; at most --num_beams."})
    length_penalty: float | None = field(
        default=None,
        metadata={
            "help": "Beams are ranked by score / tokens ** this. By default 1 for llm; 0 for the others: the sum itself."
        },
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1 makes tokens that were written less likely."})
    no_repeat_ngram_size: int = field(default=0, metadata={"help": "No so many tokens twice in a text; 0: off."})
    temperature: float = field(
        default=0.0, metadata={"help": "Above 0: sample instead of searching, by a seed that the clip's samples give."}
    )
    guard: Literal["on", "off"] = field(default="on", metadata={"help": "Against loops, refusals and text on silence."})
    draft: bool = field(default=True, metadata={"help": "Greedy search verifies the CTC's text: fewer passes, same result."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Bounded by the clip's duration unless given."})
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, mps, cpu; the first that is there."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the frozen weights; auto is bfloat16 on a GPU, float32 elsewhere."}
    )
    vad: Literal["energy", "silero", "none"] = field(
        default="energy", metadata={"help": "What finds the pauses of audio longer than 30 s; none: the quietest places."}
    )

    def check(self) -> None:
        """Raises InputError for values that cannot be."""
        for own in fields(self):  # the command line checks these itself, Python does not
            value, choices = getattr(self, own.name), get_args(own.type) if get_origin(own.type) is Literal else ()
            if choices and value not in choices:
                raise InputError(f"--{own.name} {value!r} is none of {', '.join(choices)}")
        for name in ("num_beams", "nbest", "batch_size", "batch_seconds", "max_new_tokens"):
            if getattr(self, name) is not None and not getattr(self, name) >= 1:
                raise InputError(f"--{name} must be at least 1")
        if self.joint_weight is not None and not 0 <= self.joint_weight < math.inf:
            raise InputError("--joint_weight must not be negative (0: the LLM alone)")
        if self.length_bonus is not None and not 0 <= self.length_bonus < math.inf:
            raise InputError("--length_bonus must not be negative (0: off)")
        if self.beam_threshold is not None and not self.beam_threshold > 0:
            raise InputError("--beam_threshold must be above 0 (inf: off)")
        if self.length_penalty is not None and not math.isfinite(self.length_penalty):
            raise InputError("--length_penalty must be a number")
        if not self.repetition_penalty > 0:
            raise InputError("--repetition_penalty must be above 0 (1: off)")
        if self.no_repeat_ngram_size < 0:
            raise InputError("--no_repeat_ngram_size must not be negative (0: off)")
        if not 0 <= self.temperature < math.inf:
            raise InputError("--temperature must not be negative (0: off)")
        if self.temperature and self.num_beams != 1:
            raise InputError("--temperature samples one text: give --num_beams 1")


def beams(decoder: str, args: DecodeArguments) -> int:
    """How many a search has: an LLM alone invents more with many."""
    return args.num_beams or (4 if decoder == "llm" else 10)


def as_trained(model: SpeechLLM) -> str:
    """The decoder in which all that was trained has its part."""
    return "llm" if not model.ctc else "joint" if model.settings["llm_reads"] else "ctc"


class Reading(NamedTuple):
    """A text that a search came to."""

    text: str
    ids: list[int]  # without the end of turn
    ended: bool | None
    score: float


class Transcriber:
    """A model ready to transcribe. Threads may share it: they take turns, a batch at a time."""

    def __init__(self, model: SpeechLLM, prompt: Prompt, args: DecodeArguments) -> None:
        """Raises InputError for a decoder that needs a CTC where the checkpoint has none."""
        self.model, self.prompt, self.args = model, prompt, args
        self.decoder = self._decoder(args)
        DETECTORS[args.vad]()  # a missing package is told before the first file
        self.device = next(model.parameters()).device

    def _decoder(self, args: DecodeArguments) -> str:
        args.check()
        auto = self.model.settings.get("decoder") or as_trained(self.model)
        decoder = auto if args.decoder == "auto" else args.decoder
        if decoder not in list(VOTES):
            raise InputError(f"config.json of the checkpoint: decoder {decoder!r} is none of {', '.join(VOTES)}")
        bonus = self.model.settings.get("length_bonus", 0.0)
        if type(bonus) not in (int, float) or bonus < 0:
            raise InputError(f"config.json of the checkpoint: length_bonus {bonus!r} is no number from 0 on")
        if args.nbest > beams(decoder, args):
            raise InputError(f"--nbest {args.nbest} needs --num_beams {args.nbest} or more, not {beams(decoder, args)}")
        if decoder != "llm" and not self.model.ctc:
            raise InputError(f"--decoder {decoder} needs a checkpoint trained with --splice tokens")
        if decoder == "fusion" and args.joint_weight == 0:
            raise InputError("--decoder fusion needs a --joint_weight above 0: its LLM hears nothing")
        return decoder

    def vote(self, decoder: str, args: DecodeArguments) -> tuple[float, float]:
        """The CTC's weight beside the LLM, and what each of its tokens in a text adds to the score."""
        weight, bonus = VOTES[decoder]
        if decoder == "joint":
            bonus = self.model.settings.get("length_bonus", bonus)
        if decoder in ("joint", "fusion"):
            weight = weight if args.joint_weight is None else args.joint_weight
            bonus = bonus if args.length_bonus is None else args.length_bonus
        return weight, bonus

    @cached_property
    def spelling(self) -> Tensor:
        return self.prompt.spelling.table(len(self.prompt.tokenizer)).to(self.device)  # (vocabulary, P)

    @classmethod
    def from_arguments(cls, model_args: ModelArguments, args: DecodeArguments) -> "Transcriber":
        """Rebuild exactly the system of the checkpoint that `model_args` name, or raise InputError."""
        args.check()
        checkpoint = model_args.start()
        if not checkpoint:
            raise InputError("give --checkpoint DIR or --projector_model_path …/model.safetensors")
        device = usable_device(args.device)
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        settings = resolve_settings(model_args, checkpoint)
        prompt = Prompt.build(load_tokenizer(settings["llm"]["name"]), model_args.prompt, settings)
        dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
        model = build_model(settings, prompt.word_ids, prompt.end_of_turn, dtype, checkpoint)
        return cls(model.to(device).for_decoding(), prompt, args)

    @classmethod
    def from_checkpoint(cls, folder: str | Path | None = None, **options: Any) -> "Transcriber":
        """`Transcriber.from_checkpoint("exp", num_beams=1, device="cpu")`; options are DecodeArguments' fields. Without a
        folder the checkpoint that comes along."""
        model_args = ModelArguments(checkpoint=None if folder is None else str(folder))
        if folder is None:
            use_shipped(model_args)
        return cls.from_arguments(model_args, DecodeArguments(**options))

    def __call__(self, audio: Any, sampling_rate: float | None = None) -> Transcript | list[Transcript]:
        """The transcript of a file (its path) or of an array or tensor of samples (see `samples_of`); of a list, a list.

        Recordings of any length; arrays need their sampling_rate. In a list, one that cannot be decoded has an empty text
        and says why in `error`; alone it raises that InputError.
        """
        several = isinstance(audio, list | tuple)
        inputs = audio if several else [audio]
        for one in inputs:
            if not isinstance(one, str | Path | np.ndarray | Tensor):
                raise InputError(f"{type(one).__name__} is not audio: give a file's path, or an array or tensor of samples")

        def pieces_of(record: Record) -> Pieces | ArrayPieces:
            file = isinstance(record.wav, str | Path)
            vad = self.args.vad
            return Pieces(record.wav, vad=vad) if file else ArrayPieces(record.wav, sampling_rate, vad)

        records = [Record(str(i), one, None, None, "") for i, one in enumerate(inputs)]
        sizes = self.args.batch_size, self.args.batch_seconds
        outcomes = {o.key: o for o in recognize(self, records, *sizes, pieces_of=pieces_of)}
        found = []
        for record in records:
            transcript = outcomes[record.key].transcript
            if transcript.error and isinstance(record.wav, str | Path):
                transcript.error = f"{record.wav}: {transcript.error}"
            found.append(transcript)
        if several:
            return found
        if found[0].error and not found[0].segments:
            raise InputError(found[0].error)
        return found[0]

    def usable(self, audio: np.ndarray) -> bool:
        """At least one projector window long and at most 30 s."""
        return speech_vectors(len(audio), self.model.settings) > 0 and len(audio) <= N_SAMPLES

    def transcribe(self, clips: Sequence[np.ndarray]) -> list[str]:
        """One text for each clip, float32 (samples,) at 16 kHz. Raises InputError unless every clip is `usable`."""
        texts = []
        for hypothesis in self.hypotheses(clips):
            if isinstance(hypothesis, InputError):
                raise hypothesis
            texts.append(hypothesis.text)
        return texts

    def hypotheses(self, clips: Sequence[np.ndarray], **search: Any) -> list[Hypothesis | InputError]:
        """As `transcribe`, with all that is known of each text; an InputError for a clip that the LLM scores by no numbers.
        `search`: DecodeArguments' fields for this call alone."""
        args = replace(self.args, **search)
        decoder = self._decoder(args)
        if not all(isinstance(clip, np.ndarray) and clip.ndim == 1 and clip.dtype.kind == "f" for clip in clips):
            raise InputError("clips must be a list of float arrays (samples,) at 16 kHz, as load_audio gives them")
        wrong = [f"{len(clip) / SAMPLE_RATE:.2f} s" for clip in clips if not self.usable(clip)]
        if wrong:
            raise InputError(f"clips must be one projector window to 30 s long, not {', '.join(wrong)}: longform.cut helps")
        with self.model.turn, inference.no_gradients(self.model):
            return self._decode(clips, args, decoder) if clips else []

    def _decode(self, clips: Sequence[np.ndarray], args: DecodeArguments, decoder: str) -> list[Hypothesis | InputError]:
        settings, spelling = self.model.settings, self.prompt.spelling
        n_mels, padding = settings["encoder"]["n_mels"], settings["encoder_padding"]
        ids = torch.tensor(self.prompt.ids)
        on = self.device if self.device.type == "cuda" else "cpu"  # many processors took 55 ms a clip beside an H100
        mels = [log_mel(clip, n_mels, padding, on) for clip in clips]
        batch = SpeechCollator()([{"input_ids": ids, "mel": mel} for mel in mels])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if not self.model.ctc:
            written = self._write(batch, clips, args, decoder, None, None)
            return [_hypothesis(readings) if readings else NO_NUMBERS for readings in written]
        heard = self.model.hear(batch["mel"], batch["mel_length"])
        paths = [[spelling.tokens[c] for c in path] for path in greedy_path(*heard)]
        texts = list(map(self._text, paths))  # the CTC's own
        if decoder == "ctc":
            written = [[Reading(text, path, None, 0.0)] for text, path in zip(texts, paths, strict=True)]
        else:
            drafts = [answer_ids(self.prompt.tokenizer, text, spoken=True) for text in texts] if args.draft else None
            written = self._write(batch, clips, args, decoder, heard, drafts, texts)
        weight, _ = self.vote(decoder, args)
        hypotheses = []
        for readings, clip, text, log_probs, length in zip(
            written, clips, texts, *(part.cpu() for part in heard), strict=True
        ):
            if not readings:
                hypotheses.append(NO_NUMBERS)
                continue
            frames = log_probs[:length]  # (N, V + 1)
            if weight:
                votes = log_likelihood(frames, [spelling(reading.ids) for reading in readings])
                readings = [r._replace(score=r.score + weight * vote) for r, vote in zip(readings, votes, strict=True)]
            seconds = vector_seconds(settings["projector_stride"])
            said = frames[: speech_lengths(len(clip), settings["projector_stride"]).speech]  # without padding to 30 s
            words = timed_words(readings[0].ids, spelling, said.numpy(), seconds, len(clip) / SAMPLE_RATE)
            hypotheses.append(replace(_hypothesis(readings), words=words, ctc_text=text))
        return hypotheses

    def _write(
        self,
        batch: dict[str, Tensor],
        clips: Sequence[np.ndarray],
        args: DecodeArguments,
        decoder: str,
        heard: Any,
        drafts: Any,
        ctc_texts: Sequence[str] = (),
    ) -> list[list[Reading]]:
        """The LLM's readings of each clip, those that the search likes best first, with its log-probabilities; none where
        these are no numbers."""
        seconds = torch.tensor([len(clip) / SAMPLE_RATE for clip in clips])
        allowed = (seconds * MAX_TOKENS_PER_SECOND).long() + SPARE_TOKENS  # (B,)
        if args.max_new_tokens is not None:
            allowed = torch.full_like(allowed, args.max_new_tokens)
        threshold = BEAM_THRESHOLD if args.nbest == 1 else math.inf
        threshold = threshold if args.beam_threshold is None else args.beam_threshold
        search: dict[str, Any] = {"num_beams": beams(decoder, args), "threshold": threshold}
        default = 1.0 if decoder == "llm" else 0.0  # the joint score is a sum: no average over its length
        search["length_penalty"] = default if args.length_penalty is None else args.length_penalty
        if decoder != "llm":
            weight, bonus = self.vote(decoder, args)
            search |= {"joint_weight": weight, "length_bonus": bonus, "spelling": self.spelling}
        if decoder == "fusion":
            # a letter alone costs an LLM that hears nothing more than to end at once
            spoken = torch.tensor([bool(text) for text in ctc_texts], device=self.device)  # (B,)
            context = torch.tensor(self.prompt.context, device=self.device)
            search |= {"context": context, "spoken": spoken, "end_prob": END_PROB}
        processors: list[LogitsProcessor] = []
        processors += [RepetitionPenaltyLogitsProcessor(args.repetition_penalty)] if args.repetition_penalty != 1 else []
        processors += [NoRepeatNGramLogitsProcessor(args.no_repeat_ngram_size)] if args.no_repeat_ngram_size else []
        sample = Sample(args.temperature, [crc32(clip.tobytes()) for clip in clips]) if args.temperature else None
        search |= {"processors": processors, "sample": sample}
        found = self.model.generate(**batch, max_new_tokens=allowed.to(self.device), heard=heard, drafts=drafts, **search)
        readings: list[list[Reading]] = []
        for texts in found:
            several: dict[str, Reading] = {}  # some are the same text in other tokens
            for one in texts if texts != [NOTHING] else ():
                text = self._text(one.ids)
                ids = one.ids[:-1] if one.ended else one.ids
                several.setdefault(text, Reading(text, ids, one.ended, one.log_prob))
            readings.append([*several.values()][: args.nbest])
        return readings

    def _text(self, ids: list[int]) -> str:
        ends = self.model.llm.generation_config.eos_token_id
        length = next((i for i, id in enumerate(ids) if id in ends), len(ids))
        text = self.prompt.tokenizer.decode(ids[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return " ".join(text.split())


def _hypothesis(readings: Sequence[Reading]) -> Hypothesis:
    best = readings[0]
    nbest = [(reading.text, reading.score) for reading in readings]
    return Hypothesis(best.text, best.ended, best.score, len(best.ids) + bool(best.ended), nbest)


def usable_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is; raises InputError for one that is not there."""
    own = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(torch.cuda.device_count(), 1)}"  # of each process another
    best = own if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name or best)
        return torch.device(name or best)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {first_line(error)}") from None


def use_shipped(model_args: ModelArguments) -> None:
    """Without a checkpoint: the one in demo/pretrained, with its two small models, which are fetched on first use."""
    small = {"llm_model_name_or_path": "SmolLM2-135M-Instruct", "whisper_model_name_or_path": "whisper-tiny.en.pt"}
    for flag, name in small.items():
        path = DEMO / "models" / name
        if not getattr(model_args, flag):
            setattr(model_args, flag, str(path))
            if not path.exists():
                if processes()[1] > 1:
                    raise InputError("fetch the two small models first: python demo/fetch_models.py")
                print("fetching two small models for the checkpoint that comes along (164 MB, once)", file=sys.stderr)
                if subprocess.run([sys.executable, DEMO / "fetch_models.py"], stdout=sys.stderr).returncode:
                    raise InputError("the models could not be fetched: see above, or give --checkpoint")
    model_args.checkpoint = str(DEMO / "pretrained")
