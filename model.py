"""Frozen Whisper encoder → trainable Conv1d projector → spliced into the prompt of a frozen LLM.

The way of one batch through `SpeechLLM.forward`:

    mel (B, n_mels, F) ─ SpeechEncoder ─ (B, E, d) ─ Conv1dProjector ─ (B, N, D) ─ [CTCHead ─ (B, S, D)] ┐
    input_ids (B, T), one SPEECH_INDEX a row ─ embedding table ─ (B, T, D) ───────────────────────splice ┴─ LLM ─ loss

The LLM reads the projector's vectors as they are (`--splice frames`, as published), or the soft tokens that a CTC makes of
them (`--splice tokens`, see ctc.py).

Only what has `requires_grad` is trained, and only that is saved (`model.safetensors`), with all that a decoder must agree
on beside it (`config.json`).
"""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from whisper.audio import HOP_LENGTH

import draft
import inference
from audio import speech_lengths
from ctc import CTCHead, CTCPrefixScore, borrow, ctc_loss, greedy_path
from encoder import SpeechEncoder
from projector import Conv1dProjector
from search import Found, beam_search
from settings import (
    IGNORE_INDEX,
    SPEECH_INDEX,
    InputError,
    cannot_load,
    differences,
    read_settings,
    read_weights,
    weights_file,
)
from zero3 import gathered, master_weight


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that tell one frozen model from another wherever it lies: the first values of every parameter.

    Taken in bfloat16, so that it is the same for weights loaded in float32 and in bfloat16.
    """
    digest = hashlib.sha256()
    for weight in model.parameters():
        with gathered([weight]):
            values = weight.detach().flatten()[:64].to("cpu", torch.bfloat16)
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


class SpeechLLM(nn.Module):
    """Encoder, projector and LLM as one model for the Trainer. `settings` is what config.json will say."""

    accepts_loss_kwargs = True  # forward honours num_items_in_batch: accumulation gives the loss of one big batch

    def __init__(
        self,
        encoder: SpeechEncoder,
        projector: Conv1dProjector,
        llm: nn.Module,
        settings: dict,
        ctc: CTCHead | None = None,
        soft_prompt: nn.Embedding | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector.float()
        self.ctc, self.soft_prompt = ctc, soft_prompt
        self.llm = llm
        self.settings = settings
        self.aligning = False  # train by CTC alone, without the LLM
        self.ctc_weight = 0.0  # of the CTC beside the LLM's cross-entropy
        # while training; a GPU's cost is launches: not measured there
        self.share_prompt = not torch.accelerator.is_available()
        self.prepared = False  # to decode: its weights no longer change
        self.turn = Lock()  # of threads that decode with it
        self.begun: tuple[Tensor, DynamicCache] | None = None
        self.train(False)

    @property
    def config(self) -> Any:
        return self.llm.config  # the Trainer's DeepSpeed "auto" sizes and its callbacks look here

    def train(self, mode: bool = True) -> "SpeechLLM":
        """Frozen modules stay in eval(); of the LLM only the flag that turns activation checkpointing on follows `mode`."""
        super().train(mode)
        self.encoder.eval()
        self.llm.eval()
        for module in self.llm.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        self.llm.activation_checkpointing_enable(**options)

    def embed_speech(self, mel: Tensor | None, mel_length: Tensor, encoded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mel (B, n_mels, F), or the encoder's output (B, E, d), → projector vectors (B, N, D) and how many of each row
        are real (B,)."""
        _, frames, length = speech_lengths(mel_length * HOP_LENGTH, self.projector.stride)
        with torch.no_grad():
            if encoded is None:
                encoded = self.encoder(mel, mel_length)  # (B, E, d)
        return self.projector(encoded, frames), length

    def listen(self, mel: Tensor, mel_length: Tensor) -> tuple[Tensor, Tensor]:
        """As `embed_speech`, to decode. On a CPU one clip after the other: it has no launches to save, and padding costs it
        as much as speech."""
        if mel.device.type != "cpu" or is_deepspeed_zero3_enabled():  # its ranks need equally many passes
            return self.embed_speech(mel, mel_length)
        clips = zip(mel[:, None], mel_length.tolist(), mel_length[:, None], strict=True)
        vectors, length = zip(*(self.embed_speech(clip[..., :end], n) for clip, end, n in clips), strict=True)
        return pad_sequence([row[0] for row in vectors], batch_first=True), torch.cat(length)

    def hear(self, mel: Tensor, mel_length: Tensor) -> tuple[Tensor, Tensor]:
        """The CTC's log-probabilities (B, N, V + 1) and how many frames of each row are real (B,)."""
        vectors, length = self.listen(mel, mel_length)
        return self.ctc(vectors), length

    def splice(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        speech: Tensor,
        speech_length: Tensor,
        labels: Tensor | None = None,
        padding_side: Literal["left", "right"] = "right",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put speech[i, :speech_length[i]] in the place of row i's one SPEECH_INDEX.

        input_ids, attention_mask, labels (B, T), padded on either side; speech (B, N, D); speech_length (B,).
        Returns embeddings (B, T', D), attention mask (B, T') and labels (B, T'), padded on `padding_side`.
        Raises InputError when a row has not exactly one marker.
        """
        marker = input_ids == SPEECH_INDEX  # (B, T)
        count = marker.sum(1)
        if (count != 1).any():
            raise InputError(f"each row needs exactly one speech marker, found {count.tolist()}")
        real = attention_mask.bool()
        width = real.sum(1) - 1 + speech_length  # (B,)
        B, T = len(width), int(width.max())
        start = T - width if padding_side == "left" else torch.zeros_like(width)
        after = marker.cumsum(1) - marker.long()  # (B, T): 1 past the marker
        position = start[:, None] + real.cumsum(1) - 1 + after * (speech_length - 1)[:, None]  # (B, T)

        text = real & ~marker
        row, column = text.nonzero(as_tuple=True)
        embeds = self.llm.get_input_embeddings()(input_ids.clamp(min=0))  # (B, T, D)
        if self.soft_prompt:
            soft = SPEECH_INDEX - 1 - input_ids  # (B, T): the row of the soft prompt, where not negative
            embeds = torch.where((soft >= 0)[..., None], self.soft_prompt(soft.clamp(min=0)).to(embeds.dtype), embeds)
        spliced = embeds.new_zeros(B, T, embeds.shape[-1])
        spliced[row, position[row, column]] = embeds[row, column]
        new_labels = input_ids.new_full((B, T), IGNORE_INDEX)
        if labels is not None:
            new_labels[row, position[row, column]] = labels[row, column]

        n = torch.arange(speech.shape[1], device=speech.device)
        row, column = (n < speech_length[:, None]).nonzero(as_tuple=True)
        spliced[row, position[marker][row] + column] = speech[row, column].to(spliced.dtype)
        t = torch.arange(T, device=width.device)
        mask = (t >= start[:, None]) & (t < (start + width)[:, None])
        return spliced, mask.long(), new_labels

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mel_length: Tensor,
        labels: Tensor,
        mel: Tensor | None = None,
        encoded: Tensor | None = None,
        ctc_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Cross-entropy over the supervised tokens only, their sum divided by `num_items_in_batch` (their mean without).

        input_ids, attention_mask, labels (B, T); mel (B, n_mels, F) or encoded (B, E, d); mel_length (B,); ctc_labels
        (B, L), padded with IGNORE_INDEX. With a CTC its loss is added (times ctc_weight); while `aligning` it is all.
        Rows past those of mel_length are text alone: the LLM reads them as the CTC might have heard them (`borrow`).
        Returns loss () and, but while aligning, logits (supervised tokens of the batch, vocabulary) in row order.
        """
        items = (labels[:, 1:] != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        speech, length = self.embed_speech(mel, mel_length, encoded)  # (B, N, D), (B,)
        loss = 0.0
        if self.ctc:
            log_probs = self.ctc(speech)  # (B, N, V + 1)
            loss = ctc_loss(log_probs, length, ctc_labels[: len(length)], IGNORE_INDEX) / items
            if self.aligning:  # DDP waits for a gradient of whatever is trained
                return {"loss": loss + sum(0.0 * p.sum() for p in self.late() if not hasattr(p, "ds_id"))}
            loss = self.ctc_weight * loss
            self.settings["llm_reads"] |= self.training
            speech, length = self._read(log_probs, length, ctc_labels)  # (B + R, S, D)
        embeds, mask, labels = self.splice(input_ids, attention_mask, speech, length, labels)  # (B, T', D), (B, T')
        shared = self._shared(input_ids, attention_mask)
        hidden, labels = self._think(embeds, mask, shared), labels[:, shared:]  # (B, T' - shared, D)
        target = labels[:, 1:]
        supervised = target != IGNORE_INDEX  # (B, T' - 1)
        logits = self.llm.get_output_embeddings()(hidden[:, :-1][supervised]).float()  # (supervised, V)
        total = F.cross_entropy(logits, target[supervised], reduction="sum")
        return {"loss": total / items + loss, "logits": logits}

    def _shared(self, input_ids: Tensor, attention_mask: Tensor) -> int:
        """With how many tokens every row begins (the prompt before the speech), where it pays to read them once for all:
        a model prepared to decode reads them once for all batches."""
        sharded = hasattr(next(self.llm.parameters()), "ds_id")  # ranks gather equally often, whatever their batches
        pays = self.share_prompt and len(input_ids) > 1 and not self.llm.is_activation_checkpointing
        if sharded or not (pays or self.prepared) or not inference.whole(DynamicCache(config=self.llm.config)):
            return 0
        alike = (input_ids == input_ids[0]) & (input_ids != SPEECH_INDEX) & attention_mask.bool()  # (B, T)
        return int(alike.all(0).cumprod(0).sum())

    def _beginning(self, ids: Tensor, embeds: Tensor) -> DynamicCache:
        """A cache that has read ids (shared,), embeds (1, shared, D). Weights that no longer change read them only once."""
        begun = self.begun  # other threads may replace it
        if begun is None or not torch.equal(begun[0], ids):
            begun = ids, DynamicCache(config=self.llm.config)
            self.llm.base_model(inputs_embeds=embeds, cache=begun[1], use_cache=True)
            self.begun = begun if self.prepared else None
        return copy.deepcopy(begun[1])

    def _think(self, embeds: Tensor, mask: Tensor, shared: int) -> Tensor:
        """The LLM's last hidden states (B, T - shared, D). The first `shared` positions, alike in every row, are read once:
        attention is causal, so that what follows finds the same keys and values."""
        llm = self.llm.base_model
        cache = DynamicCache(config=self.llm.config) if shared else None
        if shared:
            trained = self.soft_prompt is not None or any(p.requires_grad for p in self.llm.parameters())
            first = embeds[:1, :shared] if trained else embeds[:1, :shared].detach()
            llm(inputs_embeds=first, cache=cache, use_cache=True)
            cache.batch_repeat_interleave(len(embeds))
        rest = embeds[:, shared:]
        return llm(inputs_embeds=rest, attention_mask=mask, cache=cache, use_cache=bool(shared)).last_hidden_state

    def _read(self, log_probs: Tensor, length: Tensor, ctc_labels: Tensor) -> tuple[Tensor, Tensor]:
        """Soft tokens of B clips (B, N, V + 1), and of the texts that ctc_labels (B + R, L) has beyond them."""
        soft, count = self.ctc.soft_tokens(log_probs, length)  # (B, S, D)
        if len(ctc_labels) == len(length):
            return soft, count
        paths = greedy_path(log_probs, length)
        labels = [row[row != IGNORE_INDEX].tolist() for row in ctc_labels]
        said, texts = labels[: len(length)], labels[len(length) :]
        read, read_count = borrow(soft, paths, said, texts, self.ctc.embeddings.float())  # (R, S', D)
        both = [*soft.unbind(), *read.unbind()]
        S = max(len(row) for row in both)
        return torch.stack([F.pad(row, (0, 0, 0, S - len(row))) for row in both]), torch.cat([count, read_count])

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        mel: Tensor,
        mel_length: Tensor,
        max_new_tokens: Tensor,
        joint_weight: float = 0.0,
        length_bonus: float = 0.0,
        spelling: Tensor | None = None,
        heard: tuple[Tensor, Tensor] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
        context: Tensor | None = None,
        spoken: Tensor | None = None,
        end_prob: float | None = None,
        **search: Any,
    ) -> list[list[Found]]:
        """Of each clip the texts that a search found, best first; max_new_tokens (B,); `search`: see beam_search.

        With `joint_weight` the CTC votes with that weight, and each of its classes in a text adds `length_bonus` to its
        score; spelling (vocabulary, P) is each token in these classes. heard: what `hear` gave, if it was asked. With
        `drafts`, the ids of a guess for each row, a greedy search that nothing else shapes takes a few passes of the LLM
        (see draft.py) and its result is the same. With `context`, ids (T,), the LLM reads these instead of the prompt, and
        no speech: as the language model that it was before LoRA joined it. spoken (B,): where a voted text has some token.
        `end_prob`: see search.constant_ends.
        """
        alone = nullcontext() if context is None else inference.without_adapters(self.llm)
        with inference.no_gradients(self), alone:
            beams, vote = search.get("num_beams", 1), None
            if self.ctc:
                log_probs, frames = heard or self.hear(mel, mel_length)
                if joint_weight:
                    ends = self.llm.generation_config.eos_token_id
                    best = None if search.get("sample") else beams + len(ends)  # that the search looks at
                    vote = CTCPrefixScore(
                        *(log_probs, frames, spelling, ends, joint_weight), best=best, bonus=length_bonus, spoken=spoken
                    )
            cache = DynamicCache(config=self.llm.config)
            if context is None:
                speech, length = self.ctc.soft_tokens(log_probs, frames) if self.ctc else self.listen(mel, mel_length)
                embeds, mask, _ = self.splice(input_ids, attention_mask, speech, length, padding_side="left")
                shared = self._shared(input_ids, attention_mask)
            else:
                embeds = self.llm.get_input_embeddings()(context.expand(len(input_ids), -1))  # (B, T, D)
                mask, shared = torch.ones_like(embeds[..., 0], dtype=torch.long), 0
            if shared:  # the padding goes behind the prompt's beginning, which is read once for all
                padding = (mask == 0).sum(1, keepdim=True)  # (B, 1)
                t = torch.arange(mask.shape[1], device=mask.device)
                mask = ((t < shared) | (t >= shared + padding)).long()
                embeds[:, :shared] = embeds[padding.argmin(), :shared].clone()
                cache = self._beginning(input_ids[0, :shared], embeds[:1, :shared])
                cache.batch_repeat_interleave(len(embeds))
            plain = beams == 1 and not search.get("processors") and not search.get("sample")
            if drafts is not None and plain and draft.applies(cache):
                written = draft.verify(self.llm, embeds, mask, cache, drafts, max_new_tokens.tolist(), vote, end_prob)
                return [[text] for text in written.texts]
            return beam_search(self.llm, embeds, mask, cache, max_new_tokens, vote=vote, end_prob=end_prob, **search)

    def for_decoding(self) -> "SpeechLLM":
        """As fast as it goes (see inference.py), the projector in the encoder's precision."""
        self.projector.to(next(self.encoder.parameters()).dtype)
        inference.prepare(self, keep_plain=self.ctc is not None)
        self.prepared = True
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def late(self) -> list[nn.Parameter]:
        """What an align phase leaves alone: the soft prompt, LoRA."""
        return [p for name, p in self.trainable().items() if not name.startswith(("projector.", "ctc."))]

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False) -> Any:
        """Frozen weights come from their own models, never from here; load_checkpoint is strict over the others."""
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def save_checkpoint(self, folder: str | Path, write: bool = True) -> None:
        """Write model.safetensors (trainable tensors, float32) and config.json. Every process calls it, one has `write`."""
        state = {}
        for name, p in self.trainable().items():
            value = master_weight(p)  # every process: it may be a collective
            if write:
                state[name] = value.to("cpu", torch.float32, copy=True).contiguous()
        if write:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            lines = (f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.settings.items())
            (folder / "config.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            partial = folder / "model.safetensors.partial"
            save_file(state, partial, metadata={"format": "pt"})
            os.replace(partial, folder / "model.safetensors")  # last, and whole: where it stands, a checkpoint does

    def load_checkpoint(self, path: str | Path) -> None:
        """Load what save_checkpoint wrote (the folder or its model.safetensors), or raise InputError with what differs."""
        stored = read_settings(path)
        own = self.trainable()
        if not stored["lora_r"]:  # LoRA may join later: at first it changes nothing
            own = {name: p for name, p in own.items() if ".lora_" not in name}
            stored["lora_r"] = self.settings["lora_r"]
        differing = differences(stored, self.settings)
        if differing:
            trained = f"{stored['encoder'].get('name')} and {stored['llm'].get('name')}"
            raise InputError(f"{path} does not fit these models: {'; '.join(differing)} (trained with {trained})")
        file = weights_file(path)
        state = read_weights(path)
        shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own.keys() & state.keys()}
        wrong = [f"{name} {theirs}, expected {ours}" for name, (theirs, ours) in shapes.items() if theirs != ours]
        wrong += [f"{name} is missing" for name in sorted(own.keys() - state.keys())]
        wrong += [f"{name} is unknown" for name in sorted(state.keys() - own.keys())]
        if wrong:
            raise InputError(f"{file} does not fit these models: " + "; ".join(wrong))
        self.load_state_dict(state)
        self.settings["llm_reads"] = bool(stored.get("llm_reads"))


def add_lora(llm: nn.Module, r: int) -> nn.Module:
    """Low-rank adapters (Hu et al. 2021), trained in float32, where peft puts them by default: in most families of LLMs
    beside the queries and values of attention; where it has no default, beside every linear layer but the output."""
    try:
        import peft
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_LAYERS
    except ImportError:
        raise InputError("--lora_r needs the package peft: pip install peft") from None
    layers = DEFAULT_LAYERS.get(llm.config.model_type, "all-linear")
    llm = peft.inject_adapter_in_model(peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=layers), llm)
    for p in llm.parameters():
        p.data = p.data.float() if p.requires_grad else p.data  # peft gives them the frozen weights' bfloat16
    return llm


def build_model(
    settings: dict,
    prompt_ids: Sequence[int],
    end_of_turn: int,
    dtype: torch.dtype = torch.float32,
    checkpoint: str | Path | None = None,
) -> SpeechLLM:
    """Load encoder and LLM by the names in `settings`, make what is trained, load `checkpoint` into it if given.

    `prompt_ids`: the words of the prompt, from which a soft prompt starts. `settings` is completed with sizes and
    fingerprints. `dtype` is that of the frozen weights. Raises InputError.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length: half of a step on an H100
    # float16 loses bits that the fingerprint needs: cast after it is taken
    loaded = torch.float32 if dtype == torch.float16 else dtype
    encoder = SpeechEncoder.from_pretrained(settings["encoder"]["name"], loaded)
    name = settings["llm"]["name"]
    try:
        llm = AutoModelForCausalLM.from_pretrained(name, dtype=loaded)
    except (OSError, ValueError, SafetensorError) as error:
        raise cannot_load("LLM", "--llm_model_name_or_path", name, error) from None
    table = llm.get_input_embeddings()
    ends = llm.generation_config.eos_token_id if llm.generation_config else None
    ends = {end_of_turn, *(ends if isinstance(ends, list) else [ends])} - {None}
    # a fresh one: chat models ship sampling and repetition penalties, which harm a transcript
    llm.generation_config = GenerationConfig(eos_token_id=sorted(ends), pad_token_id=end_of_turn)

    settings["encoder"] |= {"n_mels": encoder.n_mels, "dim": encoder.dim, "fingerprint": fingerprint(encoder)}
    llm_dim = table.embedding_dim
    settings["llm"] |= {"dim": llm_dim, "vocabulary": table.num_embeddings, "fingerprint": fingerprint(llm)}
    settings["llm_reads"] = settings["splice"] == "frames"
    libraries = ("torch", "transformers", "openai-whisper")
    settings["versions"] = {library: version(library) for library in libraries}

    if dtype != loaded and not is_deepspeed_zero3_enabled():  # DeepSpeed casts by its own configuration
        encoder, llm = encoder.to(dtype), llm.to(dtype)

    encoder.requires_grad_(False)
    llm.requires_grad_(False)
    # generate slices the last position out of a batch; of a slice in bfloat16 a CPU takes 150 times as long
    llm.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    projector = Conv1dProjector(encoder.dim, llm_dim, settings["projector_stride"], settings["projector_kernel"])
    projector.calibrate(table)
    if settings["projector_layers"]:
        projector.layers, projector.layer_norm = encoder.hand_over(settings["projector_layers"])
        projector.requires_grad_(True)
    ctc = soft_prompt = None
    with gathered([table.weight]), torch.no_grad():
        if settings["splice"] == "tokens":
            ctc = CTCHead(table.weight[settings["ctc_tokens"]])
        if settings["soft_prompt"]:
            soft_prompt = nn.Embedding.from_pretrained(table.weight[list(prompt_ids)].float(), freeze=False)
    if settings["lora_r"]:
        llm = add_lora(llm, settings["lora_r"])
    model = SpeechLLM(encoder, projector, llm, settings, ctc, soft_prompt)
    if checkpoint is not None:
        model.load_checkpoint(checkpoint)
    return model
