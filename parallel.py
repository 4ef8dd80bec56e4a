"""Passes over a finished backbone: activation checkpointing and compilation of its blocks.

A pass changes how a model runs, never what it computes; the blocks are in the list that `block_list` names.
"""

from functools import partial
from types import MethodType

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# What a block under checkpointing keeps: the results of attention, few bytes for the dearest work.
KEPT = [getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in (
    "cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")]


def checkpoint_blocks(model, keep_attention=True):
    """Make each block keep its input and its attention, and compute the rest again in the backward pass, in place.

    `keep_attention=False` computes attention again too. Call it before `compile_blocks`: the compiler then sees the
    checkpoint inside the block and obeys it. Around a compiled block, attention could not be told from the rest.
    """
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT)} if keep_attention else {}

    def forward(block, *args):                          # nothing in a block is random: no generator state to keep
        return checkpoint(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False, **kept)

    for block in getattr(model, model.block_list):
        block.forward = MethodType(forward, block)
    return model


def compile_blocks(model, **options):
    """Compile each transformer block in place; all share one compilation per shape. What stays eager is small."""
    torch._dynamo.config.recompile_limit = 64           # window lengths x with and without gradient x adapters at work
    for block in getattr(model, model.block_list):
        block.compile(dynamic=False, **options)
    return model
