"""Whisper's encoder, frozen: loaded from wherever its weights come, on clips of any length up to 30 s."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
import whisper
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import WhisperConfig, WhisperModel
from transformers.integrations import deepspeed as zero3
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from whisper.audio import HOP_LENGTH

from audio import speech_lengths
from settings import InputError, first_line


@contextmanager
def whole() -> Iterator[None]:
    """Load without DeepSpeed ZeRO-3's sharding, as openai-whisper's weights are: transformers' Whisper cannot be loaded with
    it (it makes its positions of a placeholder's shape), and layers to train must be there in full."""
    config = zero3._hf_deepspeed_config_weak_ref
    zero3.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        zero3._hf_deepspeed_config_weak_ref = config


def attend(layers: nn.ModuleList, x: Tensor, inside: Tensor, norm: nn.Module) -> Tensor:
    """Layers of Whisper's encoder: x (B, E, dim), of which `inside` (B, E) is speech → (B, E, dim)."""
    for layer in layers:
        x = layer(x, inside[:, None, None])
    return norm(x)


class SpeechEncoder(nn.Module):
    """Whisper's encoder on clips of any length up to 30 s: no padding to 30 s, padding of a batch masked."""

    def __init__(self, whisper_encoder: WhisperEncoder) -> None:
        super().__init__()
        self.whisper = whisper_encoder.requires_grad_(False)
        self.n_mels = whisper_encoder.config.num_mel_bins
        self.dim = whisper_encoder.config.d_model

    def forward(self, mel: Tensor, mel_length: Tensor) -> Tensor:
        """mel (B, n_mels, F), zero-padded at the end; mel_length (B,) → (B, E, dim). Frames past a clip's end are noise."""
        net = self.whisper
        inside = torch.arange(mel.shape[-1], device=mel.device) < mel_length[:, None]  # (B, F)
        x = F.gelu(net.conv1(mel.to(net.conv1.weight.dtype))) * inside[:, None]  # (B, dim, F); no bias leaks past the end
        x = F.gelu(net.conv2(x)).transpose(1, 2)  # (B, E, dim)
        position = torch.arange(x.shape[1], device=x.device)
        x = x + net.embed_positions(position)
        length = speech_lengths(mel_length * HOP_LENGTH, 1).encoder
        return attend(net.layers, x, position < length[:, None], net.layer_norm)

    def hand_over(self, layers: int) -> tuple[nn.ModuleList, nn.Module]:
        """The last `layers` and the norm behind them, which from now on are no longer part of this encoder."""
        net, kept = self.whisper, len(self.whisper.layers) - layers
        if kept < 0:
            raise InputError(f"--projector_layers {layers}: the encoder has only {len(net.layers)}")
        last, norm = net.layers[kept:], net.layer_norm
        net.layers, net.layer_norm = net.layers[:kept], nn.Identity()
        return last, norm

    @classmethod
    def from_pretrained(cls, name: str, dtype: torch.dtype) -> "SpeechEncoder":
        """Load by openai-whisper name, .pt file, or Hugging Face name or folder; the text decoder is dropped."""
        if name in whisper.available_models() or name.endswith(".pt"):
            return cls(_openai_encoder(name).to(dtype))
        try:
            with whole():
                return cls(WhisperModel.from_pretrained(name, dtype=dtype).get_encoder())
        except (OSError, ValueError, SafetensorError) as error:
            names = ", ".join(whisper.available_models())
            raise InputError(
                f"cannot load Whisper {name!r}: neither one of {names}, nor a .pt file, nor a Hugging Face "
                f"name or folder ({first_line(error)})"
            ) from None


# openai-whisper's parameter names → transformers', in the order of replacement
_OPENAI_NAMES = (
    ("blocks.", "layers."),
    ("attn_ln.", "self_attn_layer_norm."),
    ("attn.query.", "self_attn.q_proj."),
    ("attn.key.", "self_attn.k_proj."),
    ("attn.value.", "self_attn.v_proj."),
    ("attn.out.", "self_attn.out_proj."),
    ("mlp_ln.", "final_layer_norm."),
    ("mlp.0.", "fc1."),
    ("mlp.2.", "fc2."),
    ("ln_post.", "layer_norm."),
    ("positional_embedding", "embed_positions.weight"),
)


def _openai_encoder(name: str) -> WhisperEncoder:
    try:
        lock = nullcontext()
        if name in whisper.available_models():  # one process of a job downloads, the others wait
            cache = Path(os.getenv("XDG_CACHE_HOME", Path.home() / ".cache"), "whisper")
            cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(cache / "download.lock")
        with lock:
            model = whisper.load_model(name, device="cpu")
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot load Whisper {name!r}: {first_line(error)}") from None
    except (KeyError, TypeError, EOFError, UnpicklingError):
        raise InputError(f"cannot load Whisper {name!r}: it is no .pt file of openai-whisper") from None
    dims = model.dims
    encoder = WhisperEncoder(
        WhisperConfig(
            num_mel_bins=dims.n_mels,
            d_model=dims.n_audio_state,
            encoder_layers=dims.n_audio_layer,
            encoder_attention_heads=dims.n_audio_head,
            encoder_ffn_dim=4 * dims.n_audio_state,
            max_source_positions=dims.n_audio_ctx,
        )
    )
    state = {}
    for key, value in model.encoder.state_dict().items():
        for theirs, ours in _OPENAI_NAMES:
            key = key.replace(theirs, ours)
        state[key] = value
    encoder.load_state_dict(state, strict=True)
    return encoder
