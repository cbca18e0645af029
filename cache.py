"""What the frozen encoder says of each clip, kept on disk: a training that runs it once instead of every epoch.

One file a clip, named by the content of its audio (a part by the whole file's and its times), in a folder named by the
encoder: numpy's .npy, read through a memory map, and a checksum behind it. Whoever writes, writes elsewhere and renames, so
any number of trainings may share a folder, and one that was killed goes on where it stopped.
"""

import os
import tempfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from settings import InputError, first_line

if TYPE_CHECKING:
    from dataset import SpeechDataset

Encoder = Callable[[Tensor, Tensor], Tensor]  # mel (1, n_mels, F), mel_length (1,) → (1, E, d)

DIGEST = 16  # bytes
CHECKSUM = 4  # bytes behind the array


class EncoderCache:
    """Outputs of a frozen encoder, float16 (E, d), by the digest of the audio file."""

    def __init__(self, folder: str | Path, settings: dict, dtype: torch.dtype = torch.float32) -> None:
        """A folder within `folder` for this encoder, the layers that it has left, this padding and its precision."""
        parts = settings["encoder"]["fingerprint"], settings["projector_layers"], settings["encoder_padding"]
        parts += (str(dtype).removeprefix("torch."),)
        self.folder = Path(folder, "-".join(map(str, parts)))
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def digest(wav: Path) -> bytes:
        with wav.open("rb") as file:
            digest = sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.digest()[:DIGEST]

    @staticmethod
    def part(digest: bytes, start: float | None, end: float | None) -> bytes:
        """The digest of a part of the file of that digest."""
        if not start and end is None:
            return digest
        times = f"{start or 0:.6f} {'end' if end is None else format(end, '.6f')}"
        return sha256(digest + times.encode()).digest()[:DIGEST]

    def file(self, digest: bytes) -> Path:
        return self.folder / digest.hex()[:2] / f"{digest.hex()}.npy"

    def has(self, digest: bytes) -> bool:
        """Whether the clip is there, and whole."""
        return self._read(self.file(digest)) is not None

    def read(self, digest: bytes) -> Tensor:
        """(E, d) float16. Raises InputError if it is not whole."""
        array = self._read(self.file(digest))
        if array is None:
            raise InputError(f"{self.file(digest)}: missing or corrupt: start again, and the clip will be encoded anew")
        return torch.from_numpy(array)

    @staticmethod
    def _read(file: Path) -> np.ndarray | None:
        try:
            array = np.load(file, mmap_mode="c")
            with file.open("rb") as stream:
                stream.seek(array.offset + array.nbytes)
                checksum = stream.read()
        except (OSError, ValueError, EOFError):
            return None
        return array if checksum == zlib.crc32(array).to_bytes(CHECKSUM, "big") else None

    def write(self, digest: bytes, encoder: Encoder, mel: Tensor) -> None:
        """mel (n_mels, F)."""
        encoded = encoder(mel[None], torch.tensor([mel.shape[-1]]))[0]  # (E, d)
        array, file = np.ascontiguousarray(encoded.to("cpu", torch.float16).numpy()), self.file(digest)
        file.parent.mkdir(exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".partial")
        try:
            with open(handle, "wb") as stream:
                np.save(stream, array)
                stream.write(zlib.crc32(array).to_bytes(CHECKSUM, "big"))
            os.chmod(partial, 0o644)
            os.replace(partial, file)
        except BaseException:  # a full disk, Ctrl-C
            Path(partial).unlink(missing_ok=True)
            raise

    def fill(self, dataset: "SpeechDataset", encoder: Encoder, rank: int = 0, ranks: int = 1) -> None:
        """Put in what is lacking of the dataset's clips, and tell the dataset: each process hashes, checks and encodes its
        share, then all learn the names of all."""
        share = range(rank, len(dataset), ranks)
        digest_of = lru_cache(10_000)(self.digest)  # parts of one file do not read it again and again
        digests = np.zeros((len(share), DIGEST), np.uint8)
        for row, index in enumerate(tqdm(share, desc="encoding", unit="clip", disable=None if rank == 0 else True)):
            record = dataset.record(index)
            try:
                digest = self.part(digest_of(record.wav), record.start, record.end)
            except OSError as error:
                raise InputError(f"{record.where}: {record.wav}: {error.strerror}: mend or remove the line") from None
            if not self.has(digest):
                mel = dataset.log_mel(index)
                try:
                    self.write(digest, encoder, mel)
                except OSError as error:  # numpy's has no name of the file
                    raise InputError(f"{self.folder}: {first_line(error)}: is the disk of --cache_dir full?") from None
            digests[row] = np.frombuffer(digest, np.uint8)
        shares: list[Any] = [digests] * ranks
        if ranks > 1:
            torch.distributed.all_gather_object(shares, digests)
        names = np.zeros((len(dataset), DIGEST), np.uint8)
        for process, part in enumerate(shares):
            names[process::ranks] = part
        dataset.cache, dataset.digests = self, names
