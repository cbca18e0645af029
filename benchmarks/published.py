"""The shape of a training step as WeSR published it, to measure against: not a part of the system.

github.com/wenet-e2e/wesr (WeST), first version, in our words: every clip padded to 30 s (3000 log-mel frames, 1500 encoder
frames, 300 vectors), every text padded until both together are model_max_length long, every position through the LLM's
output layer, padding masked out of the loss by its token id. The LLM as stored, autocast to bfloat16. In favour of it,
activation checkpointing is off, which its command has on.
"""

import torch
import torch.nn.functional as F
import whisper
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from whisper.audio import HOP_LENGTH, N_SAMPLES

from audio import load_audio
from manifest import Record
from settings import IGNORE_INDEX

STRIDE, HIDDEN = 5, 2048  # of its projector


class PublishedData(torch.utils.data.Dataset):
    """A record → input_ids, labels, attention_mask (max_length,), mel (n_mels, 3000)."""

    def __init__(
        self, records: list[Record], tokenizer: PreTrainedTokenizerBase, max_length: int = 512, n_mels: int = 80
    ) -> None:
        self.records, self.tokenizer, self.n_mels = records, tokenizer, n_mels
        self.vectors = N_SAMPLES // HOP_LENGTH // 2 // STRIDE
        self.text_length = max_length - self.vectors

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        record = self.records[index]
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(load_audio(*record.part)[0]), self.n_mels)  # (n_mels, 3000)
        chat = [{"role": "user", "content": "Transcribe the speech"}, {"role": "assistant", "content": record.txt}]
        text = self.tokenizer.apply_chat_template(
            chat, padding="max_length", max_length=self.text_length, truncation=True, return_dict=False
        )
        input_ids = torch.tensor([0] * self.vectors + text)  # (max_length,)
        labels = torch.tensor([IGNORE_INDEX] * self.vectors + text)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": input_ids,
            "labels": labels.masked_fill(labels == pad, IGNORE_INDEX),
            "attention_mask": input_ids != pad,
            "mel": mel,
        }


class PublishedModel(nn.Module):
    """Frozen Whisper encoder, trained projector, frozen LLM; forward returns the loss ()."""

    def __init__(self, encoder: whisper.Whisper, llm: AutoModelForCausalLM) -> None:
        super().__init__()
        self.encoder, self.llm = encoder.requires_grad_(False), llm.requires_grad_(False)
        dim = encoder.dims.n_audio_state
        self.conv = nn.Conv1d(dim, dim, kernel_size=STRIDE, stride=STRIDE)
        self.linears = nn.Sequential(nn.Linear(dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, llm.config.hidden_size))

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor, mel: Tensor) -> Tensor:
        encoded = self.encoder.embed_audio(mel)  # (B, 1500, d)
        speech = self.linears(F.relu(self.conv(encoded.transpose(1, 2)).transpose(1, 2)))  # (B, 300, D)
        text = self.llm.get_input_embeddings()(input_ids)[:, speech.shape[1] :]  # (B, T - 300, D)
        embeds = torch.cat([speech, text], dim=1)
        return self.llm(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, use_cache=False).loss
