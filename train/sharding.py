"""What FSDP2 and DeepSpeed need to know of a model whose batches may have no image; names and norms under them."""

from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor


def shard_decoder_layers(plugin: FullyShardedDataParallelPlugin, decoder: torch.nn.Module):
    """
    Wrap the decoder's layers alone, add gradients up in float32, and leave the scores in float32.

    A wrapped module gathers its weights from all processes when it runs. The decoder's layers run in every process
    and as often in each; the tower's run only where there are images, and the others would wait for ever. For sums
    and outputs accelerate takes the precision of the weights.
    """
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in decoder.layers})
    if policy := plugin.mixed_precision_policy:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def gradient_norms(groups: dict[str, list], deepspeed=None) -> dict[str, torch.Tensor]:
    """
    The norm of the gradients of each group of parameters, without groups that have none.

    DeepSpeed's engine has taken its step and dropped the gradients by now. Its norm is that of all of them, and
    infinite if it took no step because of gradients that are not finite.
    """
    if deepspeed is not None:
        return {"the model": torch.tensor(float(deepspeed.get_global_grad_norm()))}
    norms = {}
    for name, parameters in groups.items():
        if gradients := [parameter.grad for parameter in parameters if parameter.grad is not None]:
            norm = torch.nn.utils.get_total_norm(gradients)
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


@contextmanager
def own_name(model: torch.nn.Module):
    """The name and module of the model's own class while it is saved, for that of the class that FSDP2 made of it:
    the saved folder's code and `auto_map` follow from them."""
    made = type(model)
    own = next((kind for kind in made.__mro__ if "_auto_class" in vars(kind)), made)
    before = made.__name__, made.__module__
    made.__name__, made.__module__ = own.__name__, own.__module__
    try:
        yield
    finally:
        made.__name__, made.__module__ = before
