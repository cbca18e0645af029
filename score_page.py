"""Scored clips as one page to look at: score_page.html with the data in it. It opens from disk and asks no network.

What stands in manifests and results reaches the page as JSON and is shown as text, never as HTML.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from align import alignments
from compare import ScoredSet, seconds

TEMPLATE = Path(__file__).with_name("score_page.html")
PLACE = '{"data": null}'  # in the template


def clips(test: ScoredSet, page: Path, by: str | None) -> Iterator[dict[str, Any]]:
    """What the page needs of each clip of a set."""
    results = [result.utterances for result in test.results.values()]
    steps = [alignments((u.reference.split(), u.hypothesis.split()) for u in utterances) for utterances in results]
    for utterances, found in zip(zip(*results, strict=True), zip(*steps, strict=True), strict=True):
        values = {field: known.get(utterances[0].key) for field, known in test.fields.items()}
        group = values.get(by)
        yield {
            "key": utterances[0].key,
            "set": test.name,
            "group": "" if group is None else str(group),
            "seconds": seconds(values["duration"]),
            "audio": audio_address(values, test.path, page),
            "ref": utterances[0].reference,
            "hyps": [[u.hypothesis, path, u.hallucination] for u, path in zip(utterances, found, strict=True)],
        }


def audio_address(values: dict[str, Any], manifest: Path, page: Path) -> str | None:
    """Of a clip from the page's folder, its part of the file as #t=START,END; None where the file is not found."""
    if not isinstance(values["wav"], str):
        return None
    here = [file for file in (manifest.parent / values["wav"], Path(values["wav"])) if os.path.isfile(file)]
    if not here:
        return None
    start, end = values["start"], values["end"]
    part = "" if start is None and end is None else f"#t={start or 0}" + ("" if end is None else f",{end}")
    return "./" + quote(Path(os.path.relpath(here[0], page.parent)).as_posix()) + part


def write_page(page: Path, tests: Sequence[ScoredSet], rows: list[dict], normalizer: str, by: str | None) -> None:
    """Write the page; rows are the table's, one for each system and set. Raises OSError."""
    data = {
        "systems": list(tests[0].results),
        "sets": [test.name for test in tests],
        "normalizer": normalizer,
        "rows": rows,
        "clips": [clip for test in tests for clip in clips(test, page, by)],
    }
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    page.write_text(before + json.dumps(data).replace("<", "\\u003c") + after, encoding="utf-8")
