"""Real speech of some sixty actors: two adventure games that Debian has in its free section, labelled by Whisper.

    (mkdir games && cd games && apt-get download flight-of-the-amazon-queen beneath-a-steel-sky)
    for deb in games/*.deb; do dpkg-deb -x $deb games; done
    python demo/real_speech.py --games games --out demo/exp/games       # train.jsonl, dev.jsonl and wav/ in it

Neighbouring lines of a game (a few seconds each, 11 kHz) are joined to clips of 1 to 15 s; Whisper writes what it hears, and
a clip is kept if it was sure of it. One clip in fifty goes to dev.jsonl, the others are written at three speeds (Ko et al.
2015: slower and lower, faster and higher; almost another voice each time). The games are © 1994 Revolution Software and ©
1995 John Passfield and Steven Stamatiadis, free to use, change and pass on; nothing of them is in this repository.
"""

import argparse
import io
import json
import struct
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
import whisper
from make_speech import RATE, words_of
from tqdm import tqdm
from whisper.audio import N_SAMPLES_PER_TOKEN

QUEEN = "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
SKY = "usr/share/scummvm/beneath-a-steel-sky/sky"
SKY_RATE, SKY_HEADER, SKY_SPEECH = 11025, 22, range(50000, 55300)


def queen_lines(file: Path) -> Iterator[np.ndarray]:
    """Lines of Flight of the Amazon Queen, float32 (samples,) at 16 kHz: MP3s within one file, in a table of contents."""
    data = file.read_bytes()
    (count,) = struct.unpack_from(">H", data, 13)
    for name, _, offset, size in struct.iter_unpack(">12sBII", data[15 : 15 + 21 * count]):
        if name.rstrip(b"\0").endswith(b".SB"):
            audio, rate = soundfile.read(io.BytesIO(data[offset : offset + size]), dtype="float32")
            yield soxr.resample(audio, rate, RATE)


def sky_lines(stem: Path) -> Iterator[np.ndarray]:
    """Lines of Beneath a Steel Sky, float32 (samples,) at 16 kHz: packed 8-bit samples at 11 kHz."""
    index, data = stem.with_suffix(".dnr").read_bytes(), stem.with_suffix(".dsk").read_bytes()
    for entry in (index[i : i + 8] for i in range(4, len(index), 8)):
        number, offset, flags = (int.from_bytes(entry[a:b], "little") for a, b in ((0, 2), (2, 5), (5, 8)))
        offset = (offset & 0x7FFFFF) << (4 if offset >> 23 else 0)
        packed = data[offset + SKY_HEADER : offset + (flags & 0x3FFFFF)]
        if number in SKY_SPEECH and packed.startswith(b"RNC\x01"):
            samples = np.frombuffer(unpack_rnc(packed), np.uint8).astype(np.float32) / 128 - 1
            yield soxr.resample(samples - samples.mean(), SKY_RATE, RATE)


def unpack_rnc(data: bytes) -> bytes:
    """Rob Northen Compression, method 1: Huffman codes for lengths and distances, runs of plain bytes between them.

    Raises ValueError for damaged data. Bits come in little-endian words of 16, the lowest first; plain bytes lie between
    words. `bits` holds `have` bits left of the last word, then the `ahead` bytes from source[at:]; `used` of it are done.
    """
    size, packed, _, _, _, chunks = struct.unpack_from(">IIHHBB", data, 4)
    source, out, ahead = data[18 : 18 + packed], bytearray(), 80
    bits, have, at, used = int.from_bytes(source[:ahead], "little"), 0, 0, 2

    def take(n: int) -> int:
        nonlocal used
        used += n
        return bits >> used - n & (1 << n) - 1

    def table() -> tuple[list[tuple[int, int | None]], int]:
        """(code length, value) by the next bits, and the mask of so many bits."""
        lengths = [take(4) for _ in range(take(5))]
        width, code = max(lengths, default=0), 0
        lookup: list[tuple[int, int | None]] = [(0, None)] * (1 << width)
        for length in range(1, width + 1):
            code <<= 1
            for value in (v for v, n in enumerate(lengths) if n == length):
                first = int(f"{code:0{length}b}"[::-1], 2)
                lookup[first :: 1 << length] = [(length, value)] * (1 << width - length)
                code += 1
        return lookup, (1 << width) - 1

    def number(lookup: list[tuple[int, int | None]], mask: int) -> int:
        """A code tells how many bits a number has, the bits below its highest follow."""
        nonlocal used
        length, value = lookup[bits >> used & mask]
        if value is None:
            raise ValueError("damaged")
        used += length
        return value if value < 2 else 1 << value - 1 | take(value - 1)

    for _ in range(chunks):
        runs, distances, lengths = table(), table(), table()
        for left in range(take(16) - 1, -1, -1):
            run = number(*runs)
            if run or used > 128:
                start = at + ((used - have + 15 >> 4) << 1)
                at, have = start + run, have - used & 15
                out += source[start:at]
                bits = bits >> used & (1 << have) - 1
                bits |= int.from_bytes(source[at : at + ahead], "little") << have
                used = 0
            if left:  # a copy follows each run but the last
                distance, length = number(*distances) + 1, number(*lengths) + 2
                part = out[len(out) - distance :][:length]
                if not part:
                    raise ValueError("damaged")
                out += (part * -(-length // distance))[:length]
    if len(out) != size:
        raise ValueError("damaged")
    return bytes(out)


def clips(lines: Iterator[np.ndarray], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Neighbouring lines joined, short pauses between them, to clips of 1 to 15 s; some stay alone."""

    def finished() -> list[np.ndarray]:
        return [np.concatenate(pieces)] if pieces and 1 <= seconds <= 15 else []

    pieces, seconds, target = [], 0.0, 0.0
    for line in lines:
        loud = np.flatnonzero(np.abs(line) > 0.02)
        if len(loud) < RATE // 10:
            continue
        line = line[loud[0] : loud[-1] + 1] / np.abs(line).max() * 0.7
        if pieces and seconds + len(line) / RATE > target:
            yield from finished()
            pieces, seconds = [], 0.0
        if not pieces:
            target = rng.uniform(1, 14)
        pieces += [np.zeros(int(rng.uniform(0.05, 0.5) * RATE), np.float32), line]
        seconds += (len(line) + len(pieces[-2])) / RATE
    yield from finished()


SPEEDS = {"": 1.0, "-slow": 0.9, "-fast": 1.1}


def write_at_speeds(folder: Path, key: str, clip: np.ndarray, speeds: dict[str, float]) -> Iterator[dict]:
    """FOLDER/wav/KEY….flac at each speed; their manifest lines, but for the words."""
    for suffix, speed in speeds.items():
        changed = clip if speed == 1 else soxr.resample(clip, RATE * speed, RATE)
        soundfile.write(folder / f"wav/{key}{suffix}.flac", changed, RATE)
        yield {"key": key + suffix, "wav": f"wav/{key}{suffix}.flac", "duration": len(changed) / RATE}


SOURCES = {"queen": (queen_lines, QUEEN), "sky": (sky_lines, SKY)}


def label(teacher: whisper.Whisper, positions: torch.Tensor, batch: list[np.ndarray]) -> list[str]:
    """What Whisper hears in each clip as plain words; "" where it is not sure, or where there are figures in it."""
    # not 30 s but what is there, and silence behind it: the same words, several times as fast
    frames = max(len(clip) for clip in batch) // N_SAMPLES_PER_TOKEN + 100
    teacher.encoder.positional_embedding, teacher.dims.n_audio_ctx = positions[:frames], frames
    padded = (whisper.pad_or_trim(clip, frames * N_SAMPLES_PER_TOKEN) for clip in batch)
    mel = [whisper.log_mel_spectrogram(clip, teacher.dims.n_mels) for clip in padded]  # (n_mels, 2 * frames)
    options = whisper.DecodingOptions(language="en", without_timestamps=True, fp16=False)
    texts = []
    for clip, heard in zip(batch, whisper.decode(teacher, torch.stack(mel).to(positions.device), options), strict=True):
        words = words_of(heard.text)
        sure = heard.avg_logprob > -0.5 and heard.no_speech_prob < 0.5 and heard.compression_ratio < 2
        spoken = 6 < len(words) / (len(clip) / RATE) < 25  # letters a second
        texts.append(words if sure and spoken and heard.text.isascii() and not any(map(str.isdigit, heard.text)) else "")
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=Path, default=Path("/"), help="where usr/share/scummvm of the two packages lies")
    parser.add_argument("--teacher", default="demo/models/whisper-tiny.en.pt", help="a Whisper model that labels")
    parser.add_argument("--device", default="cpu", help="cuda: Whisper on a GPU")
    parser.add_argument("--only", choices=list(SOURCES), help="one of the games")
    parser.add_argument("--out", type=Path, default=Path("demo/exp/games"))
    args = parser.parse_args()
    sources = {args.only: SOURCES[args.only]} if args.only else SOURCES
    for _, path in sources.values():
        if not list((args.games / path).parent.glob("*")):
            raise SystemExit(f"error: {args.games / path} is missing: see --help for the two packages")
    teacher = whisper.load_model(args.teacher, device=args.device).float()
    positions = teacher.encoder.positional_embedding
    (args.out / "wav").mkdir(parents=True, exist_ok=True)
    with (args.out / "train.jsonl").open("w") as train, (args.out / "dev.jsonl").open("w") as dev:
        for name, (reader, path) in sources.items():
            found = enumerate(tqdm(clips(reader(args.games / path), np.random.default_rng(0)), desc=name))
            while some := sorted(islice(found, 128), key=lambda numbered: len(numbered[1])):
                for batch in (some[i : i + 16] for i in range(0, len(some), 16)):
                    for (i, clip), txt in zip(batch, label(teacher, positions, [clip for _, clip in batch]), strict=True):
                        if txt:
                            file, speeds = (train, SPEEDS) if i % 50 else (dev, {"": 1.0})
                            for line in write_at_speeds(args.out, f"{name}-{i:05d}", clip, speeds):
                                print(json.dumps(line | {"txt": txt}), file=file, flush=True)


if __name__ == "__main__":
    main()
