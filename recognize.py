"""Speech → text with a trained projector: one line `key text` for each file, or line of a manifest, in its order.

    python recognize.py speech.wav more.mp3 folder/    # with the small checkpoint that comes along
    python recognize.py --checkpoint exp --data_path test.jsonl --result_path result.txt result.jsonl
    torchrun --nproc_per_node 8 recognize.py --checkpoint exp --data_path test.jsonl --result_path result.txt
    python recognize.py --llm_model_name_or_path Qwen/Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny \\
        --projector_model_path exp/checkpoint-600/model.safetensors --data_path test.jsonl --result_path result.txt

The way of one clip, from file to line:

    sources.find               names → records with keys
    longform.Pieces            a record's audio → pieces of at most 30 s
    decoding.recognize         pieces, read ahead → batches of like length
    guard.guarded              a batch → hypotheses by the transcriber; suspicious ones are decoded again
    transcriber.Transcriber    a batch → log-mel → model.SpeechLLM → hypotheses: texts, scores, words with times
    decoding.complete          a record's hypotheses → its outcome
    progress.Progress          outcomes → disk, until all are there
    results.write              outcomes → lines, in the records' order

A file that cannot be decoded gets an empty line, is reported on stderr and in the last line, and makes the exit code 1.
An interrupted run continues when started again: finished files wait in `RESULT_PATH.partial`.
"""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from decoding import recognize
from manifest import Record
from progress import AGAIN, Progress, at_work, identity, processes
from results import Outcome, Summary, write
from results import check as check_results
from settings import InputError, ModelArguments, one_line_errors, parse, weights_file
from sources import find, has_transcriptions, shares, transcriptions
from transcriber import DecodeArguments, Transcriber, use_shipped

NO_MATTER = ("data_path", "result_path", "batch_size", "batch_seconds", "device")  # to an outcome


def run(model_args: ModelArguments, args: DecodeArguments, files: Sequence[str] = ()) -> int:
    """Decode onto the screen, or into args.result_path; returns the exit code.

    Raises InputError for what stops everything.
    """
    names = [*files, *([args.data_path] if args.data_path else [])]
    if not names:
        raise InputError("give audio files, folders or a manifest (jsonl) to recognize, or --data_path")
    args.check()
    records = find(names)
    paths = [Path(path) for path in args.result_path or (["result.txt"] if args.data_path else [])]
    check_results(paths, records)
    for path in paths:
        if any(os.path.exists(name) and path.exists() and path.samefile(name) for name in names):
            raise InputError(f"--result_path {path} is what is to be recognized: it would be overwritten")
        if any(has_transcriptions(n) and Path(n, "transcriptions").resolve() in path.resolve().parents for n in names):
            raise InputError(f"--result_path {path} lies among the transcriptions: they would be overwritten")
    if processes()[1] > 1 and not paths:
        raise InputError("several processes need a --result_path")
    if not model_args.start():
        use_shipped(model_args)
    references = transcriptions(names, records)
    if not paths:
        return onto_the_screen(Transcriber.from_arguments(model_args, args), records, Summary(references))
    with one_line_os_errors(paths[0]):
        desk = at_work(paths[0])
    transcriber = Transcriber.from_arguments(model_args, args)
    with one_line_os_errors(paths[0]):
        options = {name: value for name, value in asdict(args).items() if name not in NO_MATTER}
        options["decoder"] = decoder = transcriber.decoder  # the checkpoint's defaults, which its weights do not tell
        options["joint_weight"], options["length_bonus"] = transcriber.vote(decoder, args)
        progress = Progress(paths[0], desk, identity(records, weights_file(model_args.start()), options), len(records))
        return into_files(transcriber, records, progress, Summary(references), paths)


@contextmanager
def one_line_os_errors(result: Path) -> Iterator[None]:
    """Bad files are reported one by one: what is left is the result's own folder."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or result}: cannot write the result ({error.strerror})") from None


def onto_the_screen(transcriber: Transcriber, records: Sequence[Record], summary: Summary) -> int:
    """Print `key text` for each, in order."""
    began, args = time.monotonic(), transcriber.args
    outcomes = recognize(transcriber, records, args.batch_size, args.batch_seconds, window_batches=1)
    waiting: dict[str, Outcome] = {}
    for record in records:
        while record.key not in waiting:
            outcome = next(outcomes)
            waiting[outcome.key] = outcome
        outcome = waiting.pop(record.key)
        print(f"{outcome.key} {outcome.text}", flush=True)
        summary.add(outcome.as_dict())
    return summary.tell(summary.audio, time.monotonic() - began, sys.stderr)


def into_files(
    transcriber: Transcriber, records: Sequence[Record], progress: Progress, summary: Summary, paths: Sequence[Path]
) -> int:
    """Decode this process's share of what earlier runs have left; the last process writes `paths`, in the records' order."""
    began, args = time.monotonic(), transcriber.args
    share = shares(records, progress.processes)[progress.process]
    todo = [int(place) for place in share if not progress.before[place]]
    if progress.before.any() and not progress.process:
        print(f"continuing: {progress.before.sum()} of {len(records)} are done", file=sys.stderr)
    places: dict[str, int] = {}  # of the records that are being read or decoded

    def reading() -> Iterator[Record]:
        for place in todo:
            record = records[place]
            places[record.key] = place
            yield record

    try:
        with tqdm(total=len(todo), unit="file", disable=True if progress.process else None) as bar:
            for outcome in recognize(transcriber, reading(), args.batch_size, args.batch_seconds):
                progress.add(places.pop(outcome.key), outcome.as_dict())
                bar.update()
    except RuntimeError:  # a CUDA error, say: its traceback follows
        print(f"process {progress.process} failed, what it had done is kept: {AGAIN}", file=sys.stderr)
        raise
    if not progress.finish():
        who = f"process {progress.process}"
        print(f"{who}: its {len(share)} files are done; the last process writes the result", file=sys.stderr)
        return 0
    if progress.lacking():
        raise InputError(progress.lacking())
    for path in paths:
        write(path, progress)
    audio = 0.0  # of this run
    for outcome, before in zip(progress, progress.before, strict=True):
        summary.add(outcome)
        audio += 0 if before else outcome["duration"]
    progress.remove()
    return summary.tell(audio, time.monotonic() - began, sys.stdout, paths)


def main(argv: Sequence[str] | None = None) -> int:
    transformers_logging.disable_progress_bar()
    with one_line_errors():
        try:
            *arguments, files = parse((ModelArguments, DecodeArguments), argv, files=True)
            return run(*arguments, files)
        except KeyboardInterrupt:
            raise InputError("interrupted: with a --result_path the same command continues where it stopped") from None
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes out the rest at its end
            return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a screen may lack letters
    sys.exit(main())
