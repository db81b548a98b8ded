"""The memory table counts what a training step keeps."""

import pytest
import torch
from conftest import make_model

from benchmarks.memory import ENGINES, Sizes, sizes_of
from granulon.train.stages import set_trainable


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
