"""What DeepSpeed must be told so that it trains and saves as one process without it does."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from settings import InputError


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Parameters in full inside the context: DeepSpeed ZeRO-3 leaves placeholders on each process, others nothing to do."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def master_weight(p: nn.Parameter) -> Tensor:
    """A trainable parameter in full, in the precision it is trained in (under DeepSpeed the optimizer's float32 copy)."""
    if hasattr(p, "_z3_optimizer") or hasattr(p, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(p)
    return p.detach()


def check(args: Any) -> None:
    """Raises InputError for a configuration that takes the optimizer out of the command line's hands."""
    config = getattr(args, "hf_deepspeed_config", None)
    if config and config.config.get("optimizer"):
        raise InputError(
            f'{args.deepspeed}: leave "optimizer" out: the command line says what it is (--optim, --learning_rate, …)'
        )


def save_only_trained(engine: Any) -> None:
    """By default every frozen weight would be in the folder global_stepN of each checkpoint."""
    engine.save_checkpoint = partial(type(engine).save_checkpoint, engine, exclude_frozen_parameters=True)


def part_late(optimizer: torch.optim.Optimizer, late: set[nn.Parameter]) -> None:
    """The parameters that an align phase leaves alone in groups of their own: DeepSpeed makes one tensor of a group."""
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if p in late]
        if own and "late" not in group:
            group["params"] = [p for p in group["params"] if p not in late]
            optimizer.add_param_group({**group, "params": own, "late": True})


def begin_late(optimizer: Any) -> None:
    """At the end of the align phase: the optimizer has counted steps of zero gradients for them too, by which it would take
    their first steps three times too large. Without DeepSpeed it never saw those."""
    zero = optimizer.optimizer  # accelerate's hull
    groups = zero.optimizer.param_groups
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        tensors = enumerate(zero.fp32_partitioned_groups_flat)
        pairs = [(groups[zero.sub_group_to_group_id[i]], tensor) for i, tensor in tensors]
    else:
        pairs = [(group, tensor) for group in groups for tensor in group["params"]]
    for group, tensor in pairs:
        state = zero.optimizer.state.get(tensor, {})
        if group.get("late") and "step" in state:
            state["step"] = state["step"] * 0
