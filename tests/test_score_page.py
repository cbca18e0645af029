"""score.py --html: what stands in the file, and where chromium is installed, what a person sees of it."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import DATA, write_manifest

from score import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & <b>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two systems on six clips: a real recording, a part of one, a name with signs, a loop, HTML, Chinese."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "odd #1 ü").mkdir()
    clip = next((DATA / "clips").glob("*.opus"))
    shutil.copy(clip, folder / "odd #1 ü" / "50%?.opus")
    write_manifest(
        folder / "ref.jsonl",
        [
            {"key": "real", "wav": str(clip), "txt": "press one please", "duration": 2.0, "speaker": "Ann"},
            {"key": "part", "wav": str(clip), "txt": "press two", "start": 0.5, "end": 1.25, "speaker": "Bob"},
            {"key": "odd", "wav": "odd #1 ü/50%?.opus", "txt": "press three and wait", "duration": 1.0, "speaker": "Bob"},
            {"key": "loop", "wav": "gone.wav", "txt": "thank you", "duration": 9.0},
            {"key": "html", "wav": "javascript:alert(1)", "txt": EVIL, "speaker": EVIL},
            {"key": "zh", "wav": "zh.wav", "txt": "打开 bluetooth", "duration": float("nan")},  # in JSON it blanked the page
        ],
    )
    texts = {"real": "press one please", "part": "press two", "odd": "press and wait here", "zh": "打开 blue tooth"}
    for name, loop, real in (("old", "thank you " * 8, "press on please"), ("new", "thank you", "press one please")):
        found = texts | {"loop": loop, "html": EVIL + name, "real": real}
        (folder / f"{name}.txt").write_text("".join(f"{key} {text}\n" for key, text in found.items()), encoding="utf-8")
    argv = [
        "--ref",
        "ref.jsonl",
        "--hyp",
        "old.txt",
        "new.txt",
        "--by",
        "speaker",
        "--bootstrap",
        "0",
        "--normalizer",
        "none",
    ]
    main([*[str(folder / arg) if Path(arg).suffix else arg for arg in argv], "--html", str(folder / "report.html")])
    return folder / "report.html"


class Tags(HTMLParser):
    """Every tag with its attributes, and what stands in script elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data


def test_the_page_is_one_file_that_asks_for_no_other(page):
    found = Tags(page.read_text(encoding="utf-8"))
    assert not [
        attributes for _, attributes in found.tags if {"src", "href", "srcset", "onerror", "onclick"} & set(attributes)
    ]
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ")
    assert len(found.scripts) == 2  # the data and the program: texts of manifests made none
    assert not re.search(r"https?:|innerHTML|document\.write|eval\(|@import|url\(", found.scripts[1])


def test_the_page_holds_alignments_totals_and_addresses(page):
    data = json.loads(Tags(page.read_text(encoding="utf-8")).scripts[0])
    assert (data["systems"], data["sets"], data["normalizer"]) == (["old", "new"], ["ref"], "none@1")
    assert [row["system"] for row in data["rows"]] == ["old", "new"]  # without the rows by speaker
    clips = {clip["key"]: clip for clip in data["clips"]}
    assert list(clips) == ["real", "part", "odd", "loop", "html", "zh"]
    odd, loop = clips["odd"], clips["loop"]
    assert odd["hyps"][0] == ["press and wait here", "CDCCI", ""]
    assert [hyp[2] for hyp in loop["hyps"]] == ["loop", ""]
    assert clips["html"]["ref"] == " ".join(EVIL.split())
    assert (odd["group"], odd["seconds"], clips["part"]["seconds"]) == ("Bob", 1.0, 0.75)
    assert (loop["audio"], clips["html"]["audio"]) == (None, None)  # no such files
    assert clips["part"]["audio"].endswith("#t=0.5,1.25")
    for key in ("real", "part", "odd"):
        address = urlsplit(clips[key]["audio"])
        assert not address.scheme
        assert (page.parent / unquote(address.path)).is_file()


# --- in a browser


def seen(page: Path, fragment: str = "", script: str = "") -> tuple[str, str]:
    """The list of clips and the title, after the page's own program and another, that types and clicks, have run."""
    driven = page.with_name("driven.html")
    text = page.read_text(encoding="utf-8")
    driven.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", f"{driven.as_uri()}#{fragment}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = html.unescape(re.search(r"<title>(.*?)</title>", dom).group(1))
    return re.search(r'<main id="list">(.*?)</main>', dom, re.DOTALL).group(1), title


HELP = """
const keys = () => [...document.querySelectorAll("article b")].map(element => element.textContent);
const here = () => document.activeElement;
const press = key => here().dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const type = text => { at("filter").value = text; at("filter").dispatchEvent(new Event("input")); };
const tell = value => { document.title = JSON.stringify(value); };
"""


@browser
def test_the_page_shows_texts_as_text_and_errors_in_their_places(page):
    shown, title = seen(page)
    keys = re.findall(r'<article.*?<div class="top"><b>(.*?)</b>', shown, re.DOTALL)
    assert keys == ["loop", "odd", "zh", "real", "html", "part"]  # most errors first, then as given
    assert title == "Word errors"
    assert "<img" not in shown
    assert "&lt;/script&gt;&lt;script&gt;" in shown
    assert '<span class="pair S" dir="auto"><span>one</span><span>on</span></span>' in shown
    assert '<span class="pair D" dir="auto"><span>three</span><span></span></span>' in shown
    assert '<span class="pair I" dir="auto"><span></span><span>here</span></span>' in shown
    assert shown.count("<audio") == 3
    assert shown.count("<section") == 12  # both systems, side by side


@browser
def test_the_address_says_what_is_shown(page):
    expected = {
        "filter=THREE": ["odd"],
        "filter=loop": ["loop"],
        "filter=bob+press": ["odd", "part"],
        "show=differ&sort=gain": ["loop", "real", "html"],
        "show=hallucination": ["loop"],
        "show=D": ["odd"],
        "sort=longest&filter=press": ["real", "odd", "part"],
        "sort=given&left=1&right=1&show=wrong": ["odd", "html", "zh"],
        "sort=constructor&show=toString&left=7&filter=real": ["real"],  # what is no choice is as if it were not there
    }
    visit = f"""{HELP} const told = {{}};
        for (const fragment of {json.dumps(list(expected))}) {{
            history.replaceState(null, "", "#" + fragment); read(); told[fragment] = keys(); }}
        tell(told);"""
    assert json.loads(seen(page, script=visit)[1]) == expected
    assert json.loads(seen(page, "filter=bob+press", f"{HELP} tell(keys())")[1]) == expected["filter=bob+press"]


@browser
def test_typing_filters_and_keys_move_sort_and_turn_dark(page):
    drive = f"""{HELP} const told = {{}};
        type("blue"); told.typed = [keys(), at("count").textContent, location.hash]; type("");
        set("sort", "given"); press("j"); press("j"); press("k"); told.moved = here().querySelector("b").textContent;
        press("/"); press("s"); told.typing = [here().id, location.hash]; at("filter").blur();
        press("t"); press("s"); press("e"); told.keys = [location.hash, getComputedStyle(document.body).colorScheme];
        press("?"); told.help = at("help").open;
        tell(told);"""
    assert json.loads(seen(page, "theme=light", drive)[1]) == {
        "typed": [["zh"], "1 of 6 clips", "#filter=blue&theme=light"],
        "moved": "real",
        "typing": ["filter", "#sort=given&theme=light"],
        "keys": ["#show=wrong&theme=dark", "dark"],
        "help": True,
    }


@browser
def test_clips_play_from_disk(page):
    """Beside a policy that forbids every other request: names with signs in them, too, and the part of a file."""
    load = f"""{HELP} const told = [];
        for (const audio of document.querySelectorAll("audio")) {{
            audio.preload = "auto"; audio.load();
            audio.addEventListener("loadedmetadata", () => {{ told.push(audio.duration > 0.3); tell(told); }});
            audio.addEventListener("error", () => {{ told.push(audio.src); tell(told); }}); }}"""
    assert json.loads(seen(page, script=load)[1]) == [True, True, True]
