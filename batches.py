"""Which clips stand in a batch, and when: alike on every process, in another order each epoch, the same after a resume."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from whisper.audio import N_SAMPLES, SAMPLE_RATE

from settings import InputError

ALIKE = 0.9  # of the clips that are shuffled together the shortest is at least so long, times the longest …
FEWEST = 4  # … unless they fill fewer batches than this


class LengthSampler(LengthGroupedSampler):
    """Batches of like lengths, another order each epoch, the same after a resume."""

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=np.asarray(lengths).tolist(), generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self.seed + epoch)


def check_longest(lengths: np.ndarray, batch_seconds: float) -> None:
    """lengths (clips,) in samples. Raises InputError for a clip that is longer than a batch."""
    if lengths.max() > batch_seconds * SAMPLE_RATE:
        raise InputError(
            f"--batch_seconds {batch_seconds:g} is less than the longest clip, {lengths.max() / SAMPLE_RATE:.2f} s: "
            "raise it, or leave out long clips by --max_duration_in_seconds"
        )


class DurationSampler(BatchRebalanceSampler):
    """One process's batches, as many clips in each as `batch_seconds` hold with their padding: longest × clips.

    Clips of like lengths are shuffled among each other, then the batches. The number of batches is a multiple of
    `processes × accumulation`, none empty, and the same in every epoch. Process r has every batch whose place, modulo the
    processes, is r: so one process that accumulates N batches sees the global batches of N processes. (transformers knows
    a BatchRebalanceSampler as one that has shared out its batches itself.)
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_seconds: float,
        seed: int,
        process: int = 0,
        processes: int = 1,
        accumulation: int = 1,
    ) -> None:
        """lengths (clips,) in samples. Raises InputError for a clip that is longer than a batch."""
        lengths = np.asarray(lengths)
        check_longest(lengths, batch_seconds)
        self.seed, self.process, self.processes, self.epoch = seed, process, processes, 0
        self.buckets: list[np.ndarray] = []  # indices of clips of like lengths
        self.counts: list[int] = []  # batches that each bucket is dealt to
        order = np.argsort(-lengths, kind="stable")
        descending, start = lengths[order], 0
        while start < len(order):
            size = int(batch_seconds * SAMPLE_RATE // max(descending[start], 1))  # clips in a batch
            alike = np.searchsorted(-descending, -ALIKE * descending[start], side="right")
            end = min(max(int(alike), start + FEWEST * size), len(order))
            self.buckets.append(order[start:end])
            self.counts.append(-(-(end - start) // size))
            start = end
        self._round_up(processes * accumulation)

    def _round_up(self, multiple: int) -> None:
        """Deal the buckets of the largest batches to more of them; with too few clips, some stand in two batches."""
        clips = np.array([len(bucket) for bucket in self.buckets])
        counts, own = np.array(self.counts), clips.copy()
        for extra in range(-counts.sum() % multiple):
            place = int(np.argmax(clips / counts))
            if clips[place] == counts[place]:  # every batch is a single clip: begin again
                place = extra % len(clips)
                bucket = self.buckets[place]
                self.buckets[place] = np.append(bucket, bucket[clips[place] - own[place]])
                clips[place] += 1
            counts[place] += 1
        self.counts = counts.tolist()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of this process."""
        return sum(self.counts) // self.processes

    def batches(self) -> list[np.ndarray]:
        """Those of all processes, of this epoch."""
        rng = np.random.default_rng([self.seed, self.epoch])
        dealt: list[np.ndarray] = []
        for bucket, count in zip(self.buckets, self.counts, strict=True):
            dealt += np.array_split(rng.permutation(bucket), count)
        return [dealt[i] for i in rng.permutation(len(dealt))]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches()[self.process :: self.processes]:
            yield batch.tolist()


class NewEpoch(TrainerCallback):
    """Tells dataset and samplers their epoch: accelerate leaves out the dataset where there are several processes or a
    resume, and after a resume of several processes our samplers too: they began again with the first epoch's order."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        told = train_dataloader
        while told := getattr(told, "batch_sampler", None) or getattr(told, "sampler", None):
            if hasattr(told, "set_epoch"):
                told.set_epoch(int(state.epoch or 0))
        train_dataloader.dataset.set_epoch(int(state.epoch or 0))


class Padding:
    """Counts mel frames: those of clips, and those of the batches they stand in."""

    def __init__(self) -> None:
        self.speech = self.all = torch.tensor(0)

    def add(self, mel_length: Tensor) -> None:
        """mel_length (B,)."""
        self.speech = self.speech.to(mel_length.device) + mel_length.sum()
        self.all = self.all.to(mel_length.device) + mel_length.max() * len(mel_length)

    def share(self) -> float:
        """Of the frames since the last call, those that are padding."""
        share = 1 - (self.speech / self.all.clamp(min=1)).item()
        self.__init__()
        return round(share, 4)


def check_batch_flags(args: TrainingArguments) -> None:
    """Raise InputError for flags that contradict --batch_seconds."""
    if args.batch_seconds is None:
        return
    if args.batch_seconds <= 0:
        raise InputError("--batch_seconds must be more than 0")
    plain = args.per_device_train_batch_size == type(args).per_device_train_batch_size
    for flag, given in {
        "--per_device_train_batch_size": not plain,
        "--group_by_length or --train_sampling_strategy": args.train_sampling_strategy != "random",
        "--auto_find_batch_size": args.auto_find_batch_size,
        "--dataloader_drop_last": args.dataloader_drop_last,
    }.items():
        if given:
            raise InputError(f"--batch_seconds says how batches are made, and so does {flag}: leave one out")


def padded_lengths(dataset: Any) -> np.ndarray:
    """(clips,) samples that each takes in a batch: more under --encoder_padding 30s, and where it may be slowed down."""
    lengths = dataset.lengths
    if dataset.settings["encoder_padding"] == "30s":
        return np.full_like(lengths, N_SAMPLES)
    if dataset.augmentation.speed:  # up to 30 s
        return np.where(lengths < 0.9 * N_SAMPLES, lengths / 0.9, lengths)
    return lengths


class BatchingTrainer(Trainer):
    """A Trainer on a SpeechDataset's lengths; logs the share of padding in what this process has read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.padding = Padding()
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        args, dataset = self.args, train_dataset or self.train_dataset
        if args.batch_seconds is not None:
            return DurationSampler(
                padded_lengths(dataset),
                args.batch_seconds,
                args.seed,
                args.process_index,
                args.world_size,
                args.gradient_accumulation_steps,
            )
        if args.train_sampling_strategy == "group_by_length":
            size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            return LengthSampler(size, dataset.lengths, args.seed)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler:
        """In the manifest's order; transformers' own, for --group_by_length, would decode every clip to learn its length."""
        return SequentialSampler(eval_dataset)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.padding.add(inputs["mel_length"])
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | {"padding": self.padding.share()} if "loss" in logs else logs, *args, **kwargs)
