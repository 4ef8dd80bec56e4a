"""Quantization-aware training: a network learns with the rounding that it will be run with (see quant.py).

    nvfp4        4-bit weights, what `packed` computes on any machine
    nvfp4-w4a4   4-bit weights and activations, what `te` computes on Blackwell
    fp8          8-bit matmuls forward and backward, on Hopper and later

In stage 2 the student alone is rounded; teacher and critic are what the losses compare it with, and stay exact. Beside
these losses it imitates itself without rounding (quantization-aware distillation, arXiv:2601.20088). The optimizer, the
averages and the files hold full weights: `python quant.py student.safetensors --mode packed` packs them.
"""

from contextlib import contextmanager, nullcontext

import torch

from flow import add_noise
from lora import Adapters
from quant import full_precision, quantize_model, self_distillation, softmax_distillation

ROUNDING = {"nvfp4": ("emulate", {}), "nvfp4-w4a4": ("emulate", {"activations": True}), "fp8": ("fp8", {})}


def check(quant, allowed=ROUNDING):
    """ValueError unless `quant` is none or one of `allowed`."""
    if quant not in ("none", *allowed):
        raise ValueError(f"--quant is none or {' or '.join(allowed)}, got '{quant}'")


def apply(model, quant):
    """`model`, which from now on computes with the rounding `quant`, a name above or a mode of `quantize_model`. Before
    adapters, compilation and sharding; none changes nothing. Errors: those of `quantize_model`."""
    if quant != "none":
        mode, options = ROUNDING.get(quant, (quant, {}))
        quantize_model(model, mode, **options)
    return model


def exactly(model, velocity):
    """The callable `velocity` of the rounded `model`, without the rounding."""
    def exact(x, sigma, condition):
        with full_precision(model):
            return velocity(x, sigma, condition)
    return exact


class RoundedAdapters(Adapters):
    """Adapters on a rounded base, whose rounding is the student's: all others are exact, in backward passes too."""

    @contextmanager
    def using(self, name):
        with super().using(name), nullcontext() if name == "student" else full_precision(self.model):
            yield


def imitation(student, exact, x0, cond, sigma, mask, log, softmax=False):
    """`self_distillation` at noised x0 [B, C, T, H, W]; sigma [B, T] is 0 on clean frames, `mask` [B, T] has the loss.

    `student` and `exact` are one network with and without rounding, as callables (x_t, sigma, cond) -> v. `softmax`:
    the form of BiWM's code, for comparison: it does not see a tint. The dict `log` gets `quant_snr` in dB either way.
    """
    x_t = add_noise(x0, torch.randn_like(x0), sigma)
    with torch.no_grad():
        v_exact = exact(x_t, sigma, cond)
    v = student(x_t, sigma, cond)
    loss, stats = self_distillation(v, v_exact, sigma, mask=mask)
    log["quant_snr"] = stats["quant_snr"]
    return softmax_distillation(v, v_exact, x_t, sigma, mask=mask)[0] if softmax else loss
