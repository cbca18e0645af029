"""Make demo/data/ from the Debian package asterisk-core-sounds-en-g722: how the checked transcripts came about.

    apt-get install asterisk-core-sounds-en-g722 ffmpeg
    python demo/fetch_models.py whisper-tiny.en whisper-base
    python demo/make_data.py draft      # both recognisers, beam 5 → demo/exp/drafts.jsonl (20 minutes on 2 cores)
    python demo/make_data.py disagree   # what a person has to decide → demo/data/decisions.tsv, by hand
    python demo/make_data.py build      # clips, train.jsonl, test.jsonl, README.md

A draft is accepted when both recognisers agree; decisions.tsv (key, text or "-" to leave the prompt out, why) decides all
the others, and those where both agree but the words in the file name show that both are wrong.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA, DRAFTS = HERE / "data", HERE / "exp" / "drafts.jsonl"
SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
RECOGNISERS = ("tiny.en", "base")
SHORTEST, LONGEST = 0.5, 30.0  # seconds
TEST_SHARE = 0.14
BITRATE = "24k"

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
ONES = f"{ONES} eighteen nineteen".split()
TENS = {20: "twenty", 30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety"}
CARDINALS = dict(enumerate(ONES)) | TENS | {100: "hundred"}
IRREGULAR = {"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth"}
IRREGULAR |= {"twelve": "twelfth"}


def spoken(text: str) -> str:
    """Lower case, no punctuation but apostrophes, numbers as words: the one way all transcripts are written."""

    def number(match: re.Match) -> str:
        word = CARDINALS[int(match[1])]
        if not match[2]:
            return word
        return IRREGULAR.get(word) or (f"{word[:-1]}ieth" if word.endswith("y") else f"{word}th")

    text = re.sub(r"\b(\d+)(st|nd|rd|th)?\b", number, text.lower().replace("’", "'"))
    return " ".join(re.sub(r"[^\w' ]", " ", text).split())


def draft() -> None:
    """Transcribe every prompt with both recognisers; continues where it stopped."""
    import whisper

    DRAFTS.parent.mkdir(exist_ok=True)
    done = {item["key"] for item in _lines(DRAFTS)} if DRAFTS.exists() else set()
    models = [whisper.load_model(str(HERE / "models" / f"whisper-{name}.pt"), device="cpu") for name in RECOGNISERS]
    with DRAFTS.open("a", encoding="utf-8") as out:
        for path in sorted(SOUNDS.rglob("*.g722")):
            key = path.relative_to(SOUNDS).with_suffix("").as_posix()
            if key in done or key.startswith("silence/"):
                continue
            audio = whisper.load_audio(str(path))
            item = {"key": key, "seconds": round(len(audio) / whisper.audio.SAMPLE_RATE, 2)}
            if SHORTEST <= item["seconds"] <= LONGEST:
                for name, model in zip(RECOGNISERS, models, strict=True):
                    found = model.transcribe(audio, beam_size=5, language="en", fp16=False)
                    item[name] = found["text"].strip()
            print(json.dumps(item), file=out, flush=True)


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _drafts() -> list[dict]:
    return [item for item in _lines(DRAFTS) if item.get(RECOGNISERS[0]) is not None]


def _agreed(item: dict) -> str | None:
    try:
        texts = {spoken(item[name]) for name in RECOGNISERS}
    except KeyError:  # a number outside the table: for a person
        return None
    return texts.pop() if len(texts) == 1 else None


def _decisions() -> dict[str, tuple[str, str]]:
    rows = (line.split("\t") for line in (DATA / "decisions.tsv").read_text(encoding="utf-8").splitlines())
    return {key: (text, why) for key, text, why in rows}


def disagree() -> None:
    """Print what is not decided yet."""
    decided = _decisions() if (DATA / "decisions.tsv").exists() else {}
    for item in _drafts():
        if _agreed(item) is None and item["key"] not in decided:
            print(item["key"], *(item[name] for name in RECOGNISERS), sep="\t")


def build() -> None:
    """Encode the accepted prompts, split them by text, write the manifests and README.md."""
    decisions, texts, seconds = _decisions(), {}, {}
    for item in _drafts():
        text = decisions.get(item["key"], (_agreed(item),))[0]
        if text is None:
            sys.exit(f"error: {item['key']} is not decided: add it to demo/data/decisions.tsv")
        if text != "-":
            texts[item["key"]], seconds[item["key"]] = text, item["seconds"]
    shutil.rmtree(DATA / "clips", ignore_errors=True)
    (DATA / "clips").mkdir()
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for key, text in texts.items():
        name = key.replace("/", "-")
        target = DATA / "clips" / f"{name}.opus"
        command = ["ffmpeg", "-v", "error", "-i", SOUNDS / f"{key}.g722", "-c:a", "libopus", "-b:a", BITRATE]
        subprocess.run([*command, "-map_metadata", "-1", "-fflags", "+bitexact", target], check=True)
        share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8  # by text: none is in both splits
        line = json.dumps({"key": name, "wav": f"clips/{target.name}", "txt": text, "duration": seconds[key]})
        splits["test" if share < TEST_SHARE else "train"].append(line)
    for split, lines in splits.items():
        (DATA / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(split, len(lines), f"{sum(json.loads(line)['duration'] for line in lines) / 60:.1f} minutes")
    rows = [
        f"| {item['key']} | {item[RECOGNISERS[0]]} | {item[RECOGNISERS[1]]} | {' | '.join(decisions[item['key']])} |"
        for item in _drafts()
        if item["key"] in decisions
    ]
    head = (DATA / "README.head.md").read_text(encoding="utf-8")
    table = f"| prompt | Whisper {RECOGNISERS[0]} | Whisper {RECOGNISERS[1]} | decided | why |\n|---|---|---|---|---|\n"
    (DATA / "README.md").write_text(head + table + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    steps = {"draft": draft, "disagree": disagree, "build": build}
    if len(sys.argv) != 2 or sys.argv[1] not in steps:
        sys.exit(f"usage: python demo/make_data.py {'|'.join(steps)}")
    steps[sys.argv[1]]()
