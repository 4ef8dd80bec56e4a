"""A network launched as CUDA graphs.

A small network spends its time on launching kernels one by one: recorded once, they are launched together.
"""

from dataclasses import is_dataclass, replace

import torch
from torch import nn

from control import Condition, Control


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
    """`function` of trees of CUDA tensors, without gradient, launched as one graph per set of shapes.

    The graph reads the weights where they are, so they may change in place, but not be replaced. What has other leaves
    than tensors, None and yes or no (a history that is compressed as the chunk is made) is called as it is; so is all
    on a CPU.
    """
    if torch.device(device).type == "cpu":
        return function
    graphs = {}

    @torch.no_grad()
    def replay(*args):
        leaves = flatten(args)
        given = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
        if not all(isinstance(leaf, torch.Tensor | bool | None) for leaf in leaves.values()):
            return function(*args)
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


class Tensors(nn.Module):
    """A network whose arguments are tensors alone, as CUDA graphs with gradients want it."""

    def __init__(self, model, velocity):
        super().__init__()
        self.model, self.velocity = model, velocity

    def forward(self, x, sigma, text, *control):
        return self.velocity(x, sigma, Condition({"text": text}, Control(*control)))


def recorded(model, velocity):
    """The callable `velocity` of `model`, with gradients for its weights, as one graph per clip length; for those whose
    text has one entry and whose clips have cameras."""
    graphs = {}

    def replay(x, sigma, condition):
        inputs = x, sigma, condition.text["text"], *vars(condition.control).values()
        if x.shape[2] not in graphs:
            example = tuple(tensor.clone() for tensor in inputs)
            graphs[x.shape[2]] = torch.cuda.make_graphed_callables(Tensors(model, velocity), example)
        return graphs[x.shape[2]](*inputs)
    return replay
