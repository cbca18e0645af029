"""The prompt before the speech, alike in every row, is read once for the batch: loss and gradients stay what they were."""

import pytest
import torch
from conftest import audio, batch_of, build_system
from torch import nn

FORMS = {
    "frames": {"splice": "frames"},
    "soft prompt": {"splice": "frames", "soft_prompt": True},
    "tokens": {"splice": "tokens"},
    "LoRA": {"splice": "frames", "lora_r": 4},
}


def loss_and_gradients(model, batch: dict, shared: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.share_prompt = shared
    model.zero_grad()
    loss = model(**batch)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.trainable().items()}


def positions_read(model) -> list[tuple[int, int]]:
    """(rows, positions) of each pass through the LLM's first layer from now on."""
    read: list[tuple[int, int]] = []
    model.llm.base_model.layers[0].register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape[:2])))
    return read


@pytest.fixture(params=["qwen2", "llama"])
def family(tiny, request):
    return getattr(tiny, request.param)


def clips(system) -> dict:
    return batch_of(system, [audio(1.0), audio(1.7, 1), audio(0.6, 2)], ["a", "a much longer text", "mid size"])


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_whole_rows(tiny, family, form):
    model = (system := build_system(family, tiny.whisper, **FORMS[form])).model
    for name, p in model.llm.named_parameters():  # the tiny LLM's own weights hardly tell positions apart
        if p.dim() == 2 and "embed" not in name and "lm_head" not in name:
            nn.init.normal_(p, std=0.3)
    batch, read = clips(system), positions_read(model.train())
    plain, plain_gradients = loss_and_gradients(model, batch, shared=False)
    loss, gradients = loss_and_gradients(model, batch, shared=True)
    before = system.prompt.ids.index(-200)
    (whole,) = read[:1]
    assert read == [whole, (1, before), (3, whole[1] - before)]
    torch.testing.assert_close(loss, plain)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    if form in ("soft prompt", "tokens"):
        assert gradients["soft_prompt.weight"][: before - 1].abs().sum() > 0


def test_an_untrained_prompt_costs_no_backward(tiny, family):
    """Spliced with the speech it had a gradient to pass on, and half of what sharing saves was lost again."""
    model = (system := build_system(family, tiny.whisper)).model
    passed = []
    model.llm.base_model.layers[0].register_forward_hook(lambda _, __, out: passed.append(out.requires_grad))
    loss_and_gradients(model.train(), clips(system), shared=True)
    assert passed == [False, True]


def test_rows_that_begin_differently_are_read_whole(tiny, family):
    """Padding on the left, or another prompt in one row, must not be taken for the same beginning."""
    model = (system := build_system(family, tiny.whisper)).model
    batch, read = clips(system), positions_read(model)
    model.share_prompt = True
    batch["input_ids"][1, 0] += 1
    model(**batch)
    assert [rows for rows, _ in read] == [3]
    ids, mask = batch["input_ids"].roll(1, 1), batch["attention_mask"].roll(1, 1)
    ids[:, 0], mask[:, 0] = 0, 0
    model(**batch | {"input_ids": ids, "attention_mask": mask})
    assert [rows for rows, _ in read] == [3, 3]


def test_activation_checkpointing_reads_whole_rows(tiny, family):
    """A checkpointed layer recomputes its pass, and what it puts in a cache would stand there twice."""
    model = (system := build_system(family, tiny.whisper)).model
    plain, _ = loss_and_gradients(model.train(), clips(system), shared=False)
    model.activation_checkpointing_enable()
    read = positions_read(model)
    loss, _ = loss_and_gradients(model, clips(system), shared=True)
    assert {rows for rows, _ in read} == {3}
    torch.testing.assert_close(loss, plain)
