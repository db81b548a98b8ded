"""What FSDP2 and DeepSpeed need to know about the model: which layers are sharded, and what a gradient's norm is."""

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


def set_up_sharding(state, granulon):
    """
    Complete the plug-ins of accelerate's state, for what their configuration files cannot say.

    FSDP2 shards the decoder's layers. The tower runs only where there are images: layers of it that gather weights
    would wait for processes without any. Gradients are added in float32 and outputs keep their type; accelerate sets
    both to that of the layers, bfloat16. DeepSpeed looks at gradients before it takes a step.
    """
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if fsdp is not None:
        if fsdp.transformer_cls_names_to_wrap is None:
            fsdp.transformer_cls_names_to_wrap = sorted(granulon.language_model._no_split_modules)
        if fsdp.mixed_precision_policy is not None:
            fsdp.mixed_precision_policy = replace(
                fsdp.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )
    if deepspeed is not None:
        deepspeed.deepspeed_config.setdefault("bf16", {})["check_grad_overflow"] = True


class GatherInStep(TrainerCallback):
    """Gathers FSDP2's sharded weights in the same order in every process, whatever its rows hold.

    Embeddings and the layers that read questions run again for the questions, where there are images: once gathered,
    they stay whole until the backward pass. A head of its own is read by TRL without being called, and would not be
    gathered at all: its gradient would be that of each process's own rows.
    """

    def __init__(self, model):
        self.model = model

    def on_train_begin(self, args, state, control, **kwargs):
        decoder, config = self.model.model.language_model, self.model.config
        for module in (decoder.embed_tokens, *decoder.layers[: config.controller_layers]):
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(False)
        head = self.model.lm_head
        if isinstance(head, FSDPModule) and head.weight is not decoder.embed_tokens.weight:
            self.model.register_forward_pre_hook(lambda *_: head.unshard())


@contextmanager
def whole_weights(fsdp):
    """Within the block FSDP's plug-in, if there is one, saves whole weights instead of shards."""
    kind = getattr(fsdp, "state_dict_type", None)
    if fsdp is not None:
        fsdp.set_state_dict_type("FULL_STATE_DICT")
    yield
    if fsdp is not None:
        fsdp.set_state_dict_type(kind)


def gradient_norms(groups: dict[str, list], deepspeed=None) -> dict[str, torch.Tensor]:
    """
    The norm of the gradients of each group of parameters, without groups that have none.

    DeepSpeed has taken the step and dropped the gradients: its norm is that of all parameters, and infinite if it took
    no step because of gradients that are not finite.
    """
    if deepspeed is not None:
        return {"the model": torch.tensor(float(deepspeed.get_global_grad_norm()))}
    norms = {}
    for name, parameters in groups.items():
        if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
            norm = torch.nn.utils.get_total_norm(gradients)
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms
