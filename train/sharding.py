"""What FSDP2 needs to know of a model whose batches may have no image, and what its classes are called when saved."""

from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin


def shard_decoder_layers(plugin: FullyShardedDataParallelPlugin, decoder: torch.nn.Module):
    """
    Wrap the decoder's layers alone, and add gradients up in float32.

    A wrapped module gathers its weights from all processes when it runs. The decoder's layers run in every process
    and as often in each; the tower's run only where there are images, and the others would wait for ever.
    """
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in decoder.layers})
    if plugin.mixed_precision_policy is not None:  # accelerate adds up in the precision of the weights
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


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
