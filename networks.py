"""Teacher, student and critic of stage 2: three networks, or two sets of adapters on the first."""

from contextlib import nullcontext

import torch

import qat
from common import reseed
from dmd import Discriminator, Head, Networks
from history import configure
from lora import Adapters
from model import PRESETS, build_on, load
from parallel import checkpoint_blocks, compile_blocks
from rollout import velocity_of


def networks(cfg, layout, device):
    """The callables; teacher, student and critic as backbones; the modules that learn; their values -> full weights.

    All start from one checkpoint. What learns has fp32 weights; on a GPU the frozen teacher is bf16.
    """
    def network(dtype, quant="none"):
        reseed(cfg.seed, "initialisation")
        place = lambda model: layout.place(qat.apply(model, quant))
        if cfg.teacher == "random":
            model = place(build_on(device, dtype, cfg.backbone, control=PRESETS[cfg.backbone].control))
        else:
            model = load(cfg.backbone, cfg.teacher, device, dtype, prepare=place)
        return layout.place_history(configure(model, cfg.history, cfg.attention, cfg.recent, cfg.choose))

    teacher = network(torch.bfloat16 if device.type == "cuda" else torch.float32,
                      cfg.quant if cfg.tune == "lora" else "none").requires_grad_(False).eval()
    if teacher.control is None:
        raise ValueError(f"{cfg.teacher} has no control parameters; stage 2 distils a stage-1 teacher")
    if cfg.tune == "lora":
        kind = Adapters if cfg.quant == "none" else qat.RoundedAdapters
        adapters = kind(teacher, ("student", "critic"), cfg.rank)
        models, learning, using = [teacher] * 3, dict(adapters.sets), adapters.using
        velocities = [adapters.velocity(velocity_of(teacher), name) for name in (None, "student", "critic")]
        weights = lambda values: adapters.merged("student", values)
    else:
        learning = {"student": network(torch.float32, cfg.quant), "critic": network(torch.float32)}
        models, using, weights = [teacher, *learning.values()], lambda name: nullcontext(), lambda values: values
        velocities = [velocity_of(model) for model in models]
    exact = None if cfg.quant == "none" else qat.exactly(models[1], velocities[1])
    discriminator = None
    if cfg.gan:                                 # its hook must be there before anything is compiled
        learning["head"] = Head(teacher.spec.dim).to(device)
        discriminator = Discriminator(models[2], velocities[2], learning["head"])
    for model in set(models):
        model = checkpoint_blocks(model) if cfg.recompute else model
        model = compile_blocks(model) if cfg.compile else model
    return Networks(*velocities, discriminator, using, exact), models, learning, weights
