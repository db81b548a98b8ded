"""The memory table counts what a training step keeps."""

import pytest
import torch
from conftest import make_model

from benchmarks.memory import ENGINES, LEVELS, PATCHES, Sizes, packed_length, sizes_of, worst_case
from granulon.train.stages import set_trainable
from modeling_granulon.image_tokens import HIDDEN_ROLE, PIXEL, SEMANTIC
from modeling_granulon.joint_views import PartialView, pack_views


def test_states_are_what_a_step_keeps_in_memory():
    model = make_model(tie_word_embeddings=True)
    set_trainable(model, "sft")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [moment for state in optimizer.state.values() for moment in state.values() if moment.dim()]
    counts = (model.num_parameters(), model.num_parameters(only_trainable=True))
    assert Sizes(*counts, root=0).states("one GPU", 1) == sum(t.nbytes for t in held)


def test_the_table_has_the_sizes_of_the_real_models():
    sizes = sizes_of("Qwen2.5-1.5B", "sft", 64)
    assert sizes.trained == pytest.approx(1.5437e9 + 4.4e6, rel=1e-3)  # 1.54 B as its card says, and the new parts
    assert sizes.total - sizes.trained == pytest.approx(303e6, rel=5e-3)  # ViT-L
    states = [sizes.states(engine, 8) for engine in ENGINES]
    assert states[3] < states[2] < states[0] < states[1]


def test_the_worst_row_is_as_long_as_it_is_packed():
    slots, tokens = LEVELS[-1]["keep"], 300
    role_BT = torch.tensor([[0] + [1] * PATCHES + [2] * slots + [0] * (tokens - 1 - PATCHES - slots)])
    seen = [slice(1 + PATCHES + level["keep"], 1 + PATCHES + slots) for level in LEVELS]
    views = [PartialView(HIDDEN_ROLE[PIXEL], torch.ones_like(role_BT))]
    for unused in seen:
        mask_BT = torch.ones_like(role_BT)
        mask_BT[:, unused] = 0
        views.append(PartialView(HIDDEN_ROLE[SEMANTIC], mask_BT))
    assert pack_views(role_BT, torch.ones_like(role_BT), views).source_BP.shape[1] == packed_length(tokens, LEVELS)


def test_four_bits_save_three_quarters_of_the_layers():
    lora, qlora = (float(worst_case(f"{name}-qwen2.5-1.5b")[4].split()[0]) for name in ("lora", "qlora"))
    layers = 28 * (1536 * (2 * 1536 + 2 * 256) + 3 * 1536 * 8960)
    assert lora - qlora == pytest.approx(layers * (2 - 0.5 - 1 / 64) / 1e9, abs=0.11)
