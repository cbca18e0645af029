"""What is made of texts before words are compared, by name. Results depend on it: each has a version, which is printed.

none       as it is written
basic      NFKC (full-width letters and digits become plain ones), lower case, no punctuation but apostrophes in words
english    that of the Whisper paper; its version is that of openai-whisper
chinese    basic; numbers in digits are spelled out, 两 〇 幺 are 二 零 一; each Chinese character a word of its own
japanese   basic, each character a word of its own; CER leaves spaces out, so it is that of NFKC without punctuation
"""

import re
import unicodedata
from collections.abc import Callable
from importlib.metadata import version

# scripts written without spaces: Han and kana
CJK = r"[\u3005\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003134f]"
HAS_CJK = re.compile(CJK)
NUMERALS = "零一二三四五六七八九"
SAME_NUMERAL = str.maketrans("两〇幺", "二零一")
# not within a name like mp3 or gpt-4, nor an address like 10.0.0.1
NUMBER = re.compile(r"(?<![a-z\d])(?<!\d\.)(?<![a-z]-)(\d+)(?:\.(\d+))?(?![a-z\d]|\.\d)([%‰年]?)", re.ASCII)
LONGEST_NUMBER = 6  # digits; more are read one by one, as telephone numbers are


class _Spaces(dict):
    """Character → a space for punctuation and symbols but apostrophes, else itself; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        c = chr(code)
        self[code] = " " if c != "'" and unicodedata.category(c)[0] in "PS" else c
        return self[code]


_SPACES = _Spaces()


def none(text: str) -> str:
    return text


def basic(text: str) -> str:
    """NFKC, lower case; punctuation and symbols become spaces, but for apostrophes inside words."""
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    text = re.sub(r"(?<!\w)'|'(?!\w)", " ", text)
    return text.translate(_SPACES)


def mixed(text: str) -> str:
    """Every Han character and kana a word of its own; words in other scripts stay words."""
    return re.sub(f"({CJK})", r" \1 ", text)


def chinese(text: str) -> str:
    """As it would be read: 2023年 is 二零二三年, 105 一百零五, 3.5% 百分之三点五."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return mixed(basic(NUMBER.sub(_spoken, text).translate(SAME_NUMERAL)))


def japanese(text: str) -> str:
    return mixed(basic(text))


def _spoken(number: re.Match) -> str:
    whole, fraction, after = number.groups()
    year = after == "年" and len(whole) == 4 and not fraction
    one_by_one = year or len(whole) > LONGEST_NUMBER or (len(whole) > 1 and whole[0] == "0")
    said = _digits(whole) if one_by_one else _cardinal(whole)
    said += f"点{_digits(fraction)}" if fraction else ""
    return {"%": "百分之", "‰": "千分之"}.get(after, "") + said + after.strip("%‰")


def _digits(number: str) -> str:
    return "".join(NUMERALS[int(digit)] for digit in number)


def _cardinal(number: str) -> str:
    """105 → 一百零五; below 10⁸."""
    said, zero = "", False
    for place, digit in zip(range(len(number) - 1, -1, -1), number, strict=True):
        if digit != "0":
            said += "零" * (zero and said != "") + NUMERALS[int(digit)] + ("", "十", "百", "千")[place % 4]
        zero = digit == "0"
        if place == 4:
            said, zero = said + "万", False
    return re.sub("^一十", "十", said) or "零"


FUNCTIONS = {"none": (none, 1), "basic": (basic, 1), "chinese": (chinese, 2), "japanese": (japanese, 1)}  # and version
NORMALIZERS = (*FUNCTIONS, "english")


def normalizer(name: str) -> Callable[[str], str]:
    """The function of that name; `english` is imported only when asked for, since it brings all of Whisper."""
    if name == "english":
        from whisper.normalizers import EnglishTextNormalizer

        return EnglishTextNormalizer()
    return FUNCTIONS[name][0]


def versioned(name: str) -> str:
    """As "basic@1", to be printed beside every number."""
    return f"{name}@{version('openai-whisper') if name == 'english' else FUNCTIONS[name][1]}"
