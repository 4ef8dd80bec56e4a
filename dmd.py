"""Stage 2's losses: distribution matching, and the terms that keep what it would lose.

DMD (arXiv:2311.18828) moves a generator along the difference of two scores: the teacher's, of real data, and the
critic's, of what the generator makes now. DMD2 (arXiv:2405.14867) drops the regression term, lets the critic learn
faster and adds a GAN on the critic's own features. That divergence is a reverse KL: it may leave out modes and motion;
the forward-KL terms (teacher's, HiAR arXiv:2603.08703; real data's) punish exactly that.

Networks enter as callables (x_t, sigma, cond) -> v with x_t [B, C, T, H, W] and sigma [B, T]; a discriminator is one
-> logits [B, T]. `mask` [B, T] is true on the generated frames. The others, a real prefix, are clean context: every
network gets them at sigma 0, and neither a loss nor its normaliser counts them. No mask: all frames are generated.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common import alarm
from control import Condition
from flow import add_noise, draw_sigma, euler, guide, masked_mean, per_sample, schedule, velocity, velocity_to_x0
from qat import imitation


def on_frames(sigma, mask):
    """`sigma` (a number, [B] or [B, T]) per frame [B, T], 0 outside of `mask`."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=mask.device)
    return torch.where(mask, sigma[:, None] if sigma.ndim == 1 else sigma, 0.0)


def everywhere(x, mask):
    return torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device) if mask is None else mask


# ---- Distribution matching -------------------------------------------------------------------------------------------

def dmd_gradient(teacher, critic, x0, cond, null, sigma, guidance, mask, noise):
    """Eq. 7 of DMD in x0-space: (fake - real) / E|x0 - real|, one normaliser per sample (Eq. 8). No graph."""
    x_t = add_noise(x0, noise, sigma)                                                   # [B, C, T, H, W]
    v = guide(teacher(x_t, sigma, cond), teacher(x_t, sigma, null), guidance)
    real = velocity_to_x0(v.float(), x_t, sigma)
    fake = velocity_to_x0(critic(x_t, sigma, cond).float(), x_t, sigma)

    weight = per_sample((x0 - real).abs(), mask)                                        # [B]
    return (fake - real) / weight[:, None, None, None, None] * mask[:, None, :, None, None]


def dmd_loss(teacher, critic, x0, cond, null, sigma, guidance, mask=None):
    """Distribution matching (DMD, Eq. 7 and 8) as a loss on generated x0 [B, C, T, H, W].

    The gradient of the loss with respect to x0 is `dmd_gradient` divided by the number of elements inside a sample's
    `mask` and by B (tests/test_dmd.py holds us to it); none flows into teacher or critic. sigma is [B] or [B, T];
    `guidance` is anchored at the unconditional prediction. Returns the loss and what to log.
    """
    mask = everywhere(x0, mask)
    sigma = on_frames(sigma, mask)
    with torch.no_grad():
        grad = dmd_gradient(teacher, critic, x0.float(), cond, null, sigma, guidance, mask, torch.randn_like(x0))
    loss = 0.5 * masked_mean((x0.float() - (x0.float() - grad).detach()).square(), mask)
    return loss, {"dmd_gradient": masked_mean(grad.abs(), mask)}


def critic_error(critic, x0, cond, sigma, mask=None):
    """Squared error [B, C, T, H, W] of the critic's velocity at generated x0, which gets no gradient."""
    mask = everywhere(x0, mask)
    x0, noise, sigma = x0.detach(), torch.randn_like(x0), on_frames(sigma, mask)
    return (critic(add_noise(x0, noise, sigma), sigma, cond).float() - velocity(x0, noise)).square()


def critic_loss(critic, x0, cond, sigma, mask=None):
    """The critic learns the velocity field of generated x0 [B, C, T, H, W]: flow matching (DMD, Eq. 6; DMD2)."""
    return masked_mean(critic_error(critic, x0, cond, sigma, mask), mask)


# ---- GAN on the critic's features (DMD2, section 4.3) ----------------------------------------------------------------

HEAD_RATE = 1e-3                # learning rate of the discriminator's head, which starts from nothing
GAN_CRITIC = 1e-2               # weight of the discriminator's loss beside the critic's own (DMD2, its SDXL recipe)
R_STEP, R_WEIGHT = 0.1, 1.0     # of the approximate R1 and R2: size h of the step, weight; not swept


class Head(nn.Module):
    """Real or generated? One logit per latent frame [B, T], the mean over its tokens of a small MLP."""

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))

    def forward(self, tokens, frames):                  # [B, T, L, D] or [B, T * L, D]
        return self.mlp(tokens.float()).reshape(tokens.shape[0], frames, -1).mean(-1)


class Discriminator:
    """(x_t, sigma, cond) -> logits [B, T]: the critic's `velocity`, listened to at the middle block of its `model`.

    The hook is set once and before any compilation, and keeps nothing but the tokens of the call that asks for them.
    """

    def __init__(self, model, velocity, head):
        self.velocity, self.head, self.gather, self.listening = velocity, head, model.gather, False
        blocks = getattr(model, model.block_list)
        blocks[len(blocks) // 2].register_forward_hook(torch.compiler.disable(self.keep))

    def keep(self, block, inputs, output):
        if self.listening:
            self.heard = [group._replace(x=x) for group, x in zip(inputs[0], output[0]) if group.frames]

    def __call__(self, x_t, sigma, cond):
        self.listening = True
        self.velocity(x_t, sigma, cond)
        groups, self.listening, self.heard = self.gather(self.heard), False, None
        return self.head(torch.cat([group.x for group in groups], 1), x_t.shape[2])             # [B, T, L, D] of frames


def frame_mean(y, mask):
    """Mean over samples of that of y [B, T] over the frames of `mask`."""
    return ((y * mask).sum(1) / mask.sum(1)).mean()


def gan_student_loss(logits, x0, cond, sigma, mask=None):
    """Non-saturating generator loss (arXiv:1406.2661) on noised x0: E[-log D(x_t)] with D the sigmoid of `logits`.

    Noise lets real and generated overlap, so that the discriminator never separates them for good (DMD2).
    """
    mask = everywhere(x0, mask)
    sigma = on_frames(sigma, mask)
    x_t = add_noise(x0, torch.randn_like(x0), sigma)
    return frame_mean(F.softplus(-logits(x_t, sigma, cond)), mask)


def gan_critic_loss(logits, real, fake, cond, sigma, mask=None, told=None):
    """The discriminator's loss, E[-log D(real_t)] + E[-log(1 - D(fake_t))], and what keeps its slope finite.

    R1 and R2, E|grad D|^2 on real and on generated data (R3GAN, arXiv:2501.05441), by finite differences as in APT
    (arXiv:2501.08316): the mean of ((D(x + h n) - D(x)) / h)^2 over normal n is |grad D|^2, without a second backward.
    `told`: the condition of the real clip, if it is another. Returns the loss and what to log.
    """
    mask, loss, gap = everywhere(real, mask), 0.0, 0.0
    sigma, m = on_frames(sigma, mask), mask[:, None, :, None, None]
    for x, sign, cond in ((real, -1, told or cond), (fake.detach(), 1, cond)):
        x_t = add_noise(x, torch.randn_like(x), sigma)                                  # [B, C, T, H, W]
        d, moved = logits(x_t, sigma, cond), logits(x_t + R_STEP * torch.randn_like(x) * m, sigma, cond)    # [B, T]
        slope = frame_mean(((moved - d) / R_STEP).square(), mask)
        loss, gap = loss + frame_mean(F.softplus(sign * d), mask) + R_WEIGHT * slope, gap - sign * frame_mean(d, mask)
    return loss, {"gan_critic": loss.detach(), "gan_gap": gap.detach()}


# ---- Forward KL: what the data has, the student must have ------------------------------------------------------------

# Bounds on the shifted sigma. BiWM's code has 0.25..0.65 and 0.02..0.5 before a shift of 5: really 0.62..0.90 and
# 0.09..0.83, the second far from the low noise that it speaks of.
REAL_BAND, SFT_BAND = (0.6, 0.9), (0.02, 0.4)
TEACHER_STEPS = 3               # of the teacher's ODE within the student's first step (BiWM: 12 in all, 3 in that one)


def teacher_fkl_loss(student, teacher, x0, cond, null, levels, guidance, mask=None):
    """The student's first step imitates the teacher's path from the same noise (HiAR's forward-KL regulariser).

    `levels` are the noise levels of a short Euler ODE of the guided teacher, from sigma_a = 1 to sigma_b, where the
    student's first step ends. The secant through both ends, prolonged to sigma 0, is the target of the student's x0:

        x0_T = x_a - sigma_a (x_b - x_a) / (sigma_b - sigma_a),        in fp64, for it divides a small difference

    Of x0 only the clean frames outside of `mask` are used. DMD must leave this step alone: it pulls elsewhere.
    """
    mask, (a, b) = everywhere(x0, mask), (levels[0], levels[-1])
    m, sigma_a = mask[:, None, :, None, None], on_frames(a, mask)
    x_a = add_noise(x0, torch.randn_like(x0), sigma_a)                                  # [B, C, T, H, W]
    with torch.no_grad():
        x = x_a.double()
        for sigma, sigma_next in zip(levels[:-1], levels[1:]):
            s = on_frames(sigma, mask)
            v = guide(teacher(x.float(), s, cond), teacher(x.float(), s, null), guidance)
            x = euler(x, v.double() * m, sigma, sigma_next)                             # clean frames stay
        target = x_a.double() - a * (x - x_a.double()) / (b - a)
    predicted = velocity_to_x0(student(x_a, sigma_a, cond).float(), x_a, sigma_a)
    return masked_mean((predicted - target.float()).square(), mask)


def real_fkl_loss(student, x0, cond, sigma, mask=None):
    """The student's x0 from noised real data, at high noise: E|x0(x_t) - x0|^2. Bounds are those of sigma itself."""
    mask = everywhere(x0, mask)
    sigma = on_frames(sigma, mask)
    x_t = add_noise(x0, torch.randn_like(x0), sigma)
    return masked_mean((velocity_to_x0(student(x_t, sigma, cond).float(), x_t, sigma) - x0).square(), mask)


def sft_loss(student, x0, cond, sigma, mask=None):
    """The anchor: stage 1's flow matching on real data at low noise, where it holds textures and moves no mode."""
    return critic_loss(student, x0, cond, sigma, mask)


# ---- One update: the terms together ----------------------------------------------------------------------------------

class Networks(NamedTuple):
    """Callables (x_t, sigma, cond) -> v; `discriminator` -> logits, or None. Student and critic may be adapters on the
    teacher: `using(name)` is the context in which one's adapters act, for backward passes that recompute."""
    teacher: Callable
    student: Callable
    critic: Callable
    discriminator: Callable | None
    using: Callable
    exact: Callable | None = None   # of a student that computes with rounding (qat.py): itself without


class Recipe(NamedTuple):
    """How the terms are weighed (0: off), and the noise levels they see."""
    guidance: float
    shift: float
    low: float                      # bounds of sigma for DMD, critic and GAN
    high: float
    denoise: int                    # steps of the student
    gan: float
    teacher_fkl: float
    real_fkl: float
    sft: float
    quant: float = 0.0
    quant_softmax: bool = False

    def draw(self, x, low=None, high=None):
        """Noise levels [B] of the truncated shifted law."""
        return draw_sigma(len(x), self.shift, low or self.low, high or self.high, x.device)


class Clip(NamedTuple):
    """The loss window of a micro-batch: frames that the student made behind a real start, and what really happened."""
    x0: torch.Tensor                # [B, C, T, H, W] generated, with its graph
    real: torch.Tensor              # [B, C, T, H, W] the same start, the same actions
    cond: Condition
    null: Condition
    mask: torch.Tensor              # [B, T] true on generated frames
    past: object = None             # what lies before `real`; before x0 it is in cond and null


def student_gradients(nets, recipe, clip, stop, chunk, share=1.0):
    """Add `share` of the gradients of the student's terms on one micro-batch; returns what to log.

    Terms on generated frames meet at x0, and their gradient there goes on through the rollout: nothing of it can stay
    in the critic or the head. Real data supervise the student as it is used: on the `chunk` of frames before `stop`,
    behind what really came before.
    """
    x0 = clip.x0.detach().requires_grad_()
    loss, stats = dmd_loss(nets.teacher, nets.critic, x0, clip.cond, clip.null, recipe.draw(x0), recipe.guidance,
                           clip.mask)
    stats["dmd"] = loss
    if recipe.gan:
        stats["gan"] = gan_student_loss(nets.discriminator, x0, clip.cond, recipe.draw(x0), clip.mask)
        loss = loss + recipe.gan * stats["gan"]
    with nets.using("critic"):
        gradient, = torch.autograd.grad(loss, x0)
    with nets.using("student"):
        clip.x0.backward(share * alarm(loss) * gradient)

    made, dreamt = x0.detach()[:, :, :stop], clip.cond.frames(0, stop)
    x0, cond, null = clip.real[:, :, :stop], replace(dreamt, past=clip.past), replace(clip.null, past=clip.past)
    mask = clip.mask[:, :stop] & (torch.arange(stop, device=x0.device) >= stop - chunk)
    levels = schedule(recipe.denoise * TEACHER_STEPS, recipe.shift)[:TEACHER_STEPS + 1]     # the student's first step
    terms = {"teacher_fkl": lambda: teacher_fkl_loss(nets.student, nets.teacher, x0, cond, null, levels,
                                                     recipe.guidance, mask),
             "real_fkl": lambda: real_fkl_loss(nets.student, x0, cond, recipe.draw(x0, *REAL_BAND), mask),
             "sft": lambda: sft_loss(nets.student, x0, cond, recipe.draw(x0, *SFT_BAND), mask),
             "quant": lambda: imitation(nets.student, nets.exact, made, dreamt, on_frames(recipe.draw(x0), mask), mask,
                                        stats, recipe.quant_softmax)}
    for name, term in terms.items():
        if weight := getattr(recipe, name):
            stats[name] = term()
            with nets.using("student"):
                (share * weight * stats[name]).backward(alarm(stats[name]))
    return {name: value.detach() for name, value in stats.items()}


def critic_gradients(nets, recipe, clip, share=1.0):
    """Add `share` of the gradients of critic and head; returns what to log, and (critic's error, sigma) [B] each."""
    sigma, stats = recipe.draw(clip.x0), {}
    error = critic_error(nets.critic, clip.x0, clip.cond, sigma, clip.mask)
    loss = critic = masked_mean(error, clip.mask)
    if recipe.gan:
        gan, stats = gan_critic_loss(nets.discriminator, clip.real, clip.x0, clip.cond, recipe.draw(clip.x0), clip.mask,
                                     replace(clip.cond, past=clip.past))
        loss = loss + GAN_CRITIC * gan
    with nets.using("critic"):
        (share * loss).backward(alarm(loss))
    return {"critic": critic.detach(), **stats}, (per_sample(error.detach(), clip.mask), sigma)
