"""A model made ready to decode with, as fast as it goes, and the same results: `prepare`, and the cache of a search.

A model that was prepared can be neither trained nor saved, copied or moved.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

PACKS = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # torch's compiler uses it; it is no documented name
ROOM = 32  # positions by which a beam search's cache grows


def prepare(model: nn.Module, keep_plain: bool) -> None:
    """Merge LoRA into the weights beside it, with `keep_plain` beside copies of what they were; on a CPU, have the weights
    in the order that its products want."""
    model.requires_grad_(False)
    replace(model, lambda module: hasattr(module, "lora_A"), Merged if keep_plain else merged)
    if PACKS and next(model.parameters()).device.type == "cpu":
        replace(model, lambda module: type(module) is nn.Linear, packed)


def no_gradients(model: nn.Module) -> AbstractContextManager:
    """In what to decode: torch's inference mode costs less at every operation, but what ZeRO-3 gathers in it could not be
    trained on, and a model in training is not prepared."""
    return torch.inference_mode() if model.prepared else torch.no_grad()


def replace(model: nn.Module, chosen: Callable[[nn.Module], bool], made: Callable[[nn.Module], nn.Module]) -> None:
    """Put made(module) in the place of each chosen module: one after the other, so that only one is held twice."""
    for name in [name for name, module in model.named_modules() if chosen(module)]:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made(model.get_submodule(name)))


def merged(module: nn.Module) -> nn.Module:
    """peft's layer → the layer it adapts, with the adapter added to its weight: the same sum in one product, not three."""
    module.merge()
    return module.get_base_layer()


class Merged(nn.Module):
    """That, and the layer as it was, for `without_adapters`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.plain = copy.deepcopy(module.get_base_layer())
        self.adapted = merged(module)
        self.enabled = True

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled

    @property
    def layer(self) -> nn.Module:
        return self.adapted if self.enabled else self.plain

    @property
    def weight(self) -> Tensor:  # some LLMs look at it
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@contextmanager
def without_adapters(llm: nn.Module) -> Iterator[None]:
    """The LLM as it was before LoRA joined it."""
    layers = [module for module in llm.modules() if isinstance(module, Merged) or hasattr(module, "lora_A")]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def packed(linear: nn.Linear) -> nn.Module:
    """The layer as a PackedLinear, or as it is where the processor cannot compute with its precision so."""
    try:
        made = PackedLinear(linear)
        made(linear.weight.new_zeros(1, linear.in_features))
        return made
    except RuntimeError:
        return linear


class PackedLinear(nn.Module):
    """A linear layer whose weight oneDNN has put in its own order. Of nn.Linear's it makes that order anew at every call,
    which for a few rows takes longer than the product."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in_features) → (…, out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), self.weight, self.bias, "none", [], "")


class BeamLayer(DynamicLayer):
    """Keys and values of a beam search. transformers' layer copies all of them twice a step, to append a position and to
    follow the beams that change places; here a position is written into room that is there, and where no beam comes or
    goes only what the beams wrote themselves follows them: the prompt before it is the same for all beams of a clip."""

    def __init__(self, prompt: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(prompt.keys, prompt.values)
        self.keys, self.values = prompt.keys, prompt.values  # (R, heads, positions, D)
        self.prompt = self.keys.shape[-2]
        self.room: list[Tensor] = [self.keys, self.values]

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        held, new = self.keys.shape[-2], key_states.shape[-2]
        for i, states in enumerate((key_states, value_states)):
            if held + new > self.room[i].shape[-2]:
                R, heads, _, D = states.shape
                self.room[i] = torch.cat([self.room[i][..., :held, :], states.new_empty(R, heads, new + ROOM, D)], -2)
            self.room[i][..., held : held + new, :] = states
        self.keys, self.values = (part[..., : held + new, :] for part in self.room)
        return self.keys, self.values

    def follow(self, parents: Tensor, same_prompts: bool) -> None:
        """Row i becomes what row parents[i] was."""
        parents = parents.to(self.keys.device)
        if same_prompts:
            for part in (self.keys, self.values):
                written = part[..., self.prompt :, :]
                written.copy_(written.index_select(0, parents))
            return
        held = self.keys.shape[-2]
        self.room = [part.index_select(0, parents) for part in self.room]
        self.keys, self.values = (part[..., :held, :] for part in self.room)


def whole(cache: DynamicCache) -> bool:
    """Whether an LLM's cache keeps every position: where a layer sees a window of them, or sums them up, no padding may
    stand between them."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def follow(cache: DynamicCache, parents: Tensor, same_prompts: bool) -> None:
    """The rows of a search's cache become those of its next beams: row i what row parents[i] was. same_prompts: whether
    each row's prompt is what it was."""
    cache.layers = [
        BeamLayer(layer) if type(layer) is DynamicLayer and layer.is_initialized else layer for layer in cache.layers
    ]
    if same_prompts and (parents.diff() == 1).all():  # every beam goes on alone
        return
    for layer in cache.layers:
        if isinstance(layer, BeamLayer):
            layer.follow(parents, same_prompts)
        else:
            layer.reorder_cache(parents)
