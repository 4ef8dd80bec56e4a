"""Passes over a finished backbone: activation checkpointing and compilation of its blocks, launching it as CUDA graphs.

A pass changes how a model runs, never what it computes; the blocks are in the list that `block_list` names.
"""

from dataclasses import is_dataclass, replace
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


def flatten(tree, path=""):
    """{path: leaf} of a tree of dataclasses, dicts and tuples."""
    parts = tree if isinstance(tree, dict) else vars(tree) if is_dataclass(tree) else \
        dict(enumerate(tree)) if isinstance(tree, tuple) else None
    if parts is None:
        return {path: tree}
    return {where: leaf for name, part in parts.items() for where, leaf in flatten(part, f"{path}.{name}").items()}


def cloned(tree):
    """A copy of such a tree: new tensors, other leaves the same."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, tuple):
        return tuple(cloned(part) for part in tree)
    if isinstance(tree, dict):
        return {name: cloned(part) for name, part in tree.items()}
    return replace(tree, **cloned(vars(tree))) if is_dataclass(tree) else tree


def replayed(function, device):
    """`function` of such trees, without gradient, launched as one CUDA graph per set of shapes; on a CPU, itself.

    A small network spends its time on launching kernels one by one: recorded once, they are launched together. The
    graph reads the weights where they are, so they may change in place, but not be replaced.
    """
    if torch.device(device).type == "cpu":
        return function
    graphs = {}

    @torch.no_grad()
    def replay(*args):
        leaves = flatten(args)
        given = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
        key = tuple((path, given[path].shape if path in given else leaf) for path, leaf in leaves.items())
        if key not in graphs:
            held, graph, side = cloned(args), torch.cuda.CUDAGraph(), torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                function(*held)                                     # once before recording: libraries set themselves up
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                made = function(*held)
            graphs[key] = graph, [flatten(held)[path] for path in given], made
        graph, places, made = graphs[key]
        torch._foreach_copy_(places, list(given.values()))
        graph.replay()
        return made.clone()
    return replay
