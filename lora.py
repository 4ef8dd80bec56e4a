"""Low-rank adapters (LoRA, arXiv:2106.09685): y = W x + (alpha / r) B A x, several sets over one frozen base.

A set is a module of its own: optimizer, EMA and checkpoint take it like any network, and the base keeps its parameters
and their names. Which set acts is switched at any time; with none the base is itself, bit for bit. So stage 2 holds one
network instead of three: adapters off it is the teacher, with one set the student, with the other the critic.
On a base that emulates 4 bits the sum of W and update is rounded, what gets merged and packed: an update beside a
rounded W would learn to undo errors that merged weights do not have.
"""

import contextlib
import math
import re
from functools import partial

import torch
from torch import nn

from common import gathered, on_host
from nvfp4 import EmulatedLinear

# Attention projections and MLPs of Wan, HunyuanVideo and LTX, by their official names.
TARGETS = (r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02]|(img|txt)_(attn_(q|k|v|proj)|mlp\.fc[12])"
           r"|attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))$")


class Adapter(nn.Module):
    """One set: `NAME.lora_A.weight` [r, in] and `NAME.lora_B.weight` [out, r] for each linear NAME of the base."""

    def __init__(self, linears, rank, alpha):
        super().__init__()
        self.scale, self.names = alpha / rank, [*linears]
        for name, linear in linears.items():
            place = self
            for part in name.split("."):                        # the base's tree of names, for the usual keys on disk
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            with torch.device(linear.weight.device):
                place.lora_A = nn.Linear(linear.in_features, rank, bias=False)
                place.lora_B = nn.Linear(rank, linear.out_features, bias=False)
            nn.init.kaiming_uniform_(place.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(place.lora_B.weight)                 # changes nothing at first, but has gradient


class Adapters:
    """Named sets of adapters on the linears of `model` whose names match `targets`; at most one set acts at a time."""

    def __init__(self, model, names, rank, alpha=None, targets=TARGETS):
        linears = {name: module for name, module in model.named_modules()
                   if isinstance(module, nn.Linear) and re.search(targets, name)}
        if not linears:
            raise ValueError(f"no linear of {type(model).__name__} has a name that matches '{targets}'")
        self.model, self.active = model.requires_grad_(False), None
        self.sets = {name: Adapter(linears, rank, rank if alpha is None else alpha) for name in names}
        for name, linear in linears.items():
            pairs = {k: s.get_submodule(name) for k, s in self.sets.items()}
            linear.register_forward_hook(partial(self.add, pairs))
            if isinstance(linear, EmulatedLinear):
                linear.update = partial(self.fold, pairs)

    def add(self, pairs, linear, inputs, output):
        if self.active is None or isinstance(linear, EmulatedLinear) and linear.quantized:
            return output
        pair = pairs[self.active]
        return output + self.sets[self.active].scale * pair.lora_B(pair.lora_A(inputs[0]))

    def fold(self, pairs, weight):                              # as `merged` does
        if self.active is None:
            return weight
        pair, scale = pairs[self.active], self.sets[self.active].scale
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight.float(), pair.lora_B.weight, pair.lora_A.weight, alpha=scale).to(weight.dtype)

    @contextlib.contextmanager
    def using(self, name):
        """Within it the set `name` acts (None: the base alone), also in a backward pass that recomputes."""
        before, self.active = self.active, name
        try:
            yield
        finally:
            self.active = before

    def velocity(self, velocity, name):
        """The callable `velocity` of the base, with the set `name` at work."""
        return self.using(name)(velocity)

    @torch.no_grad()
    def merged(self, name, weights=None):
        """Full weights {name: tensor} of the base with the set `name` folded in, W + (alpha / r) B A.

        `weights` replaces the set's own values, such as by their average. Changed tensors are on the host of rank 0: a
        GPU that just holds the base has no room for a second one. Every rank calls it.
        """
        full, low = dict(self.model.state_dict()), weights or self.sets[name].state_dict()
        for linear in self.sets[name].names:
            base, update = full[f"{linear}.weight"], low[f"{linear}.lora_B.weight"] @ low[f"{linear}.lora_A.weight"]
            full[f"{linear}.weight"] = on_host(gathered(base).float() + self.sets[name].scale * update, base.dtype)
        return full
