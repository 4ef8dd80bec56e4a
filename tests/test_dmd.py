"""Stage 2's losses: gradients are the equations, each term learns what it is for, no network learns from another's."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

import dmd
from control import Condition, Control
from dmd import (Clip, Discriminator, Head, Networks, Recipe, critic_gradients, critic_loss, dmd_gradient, dmd_loss,
                 gan_critic_loss, gan_student_loss, real_fkl_loss, sft_loss, student_gradients, teacher_fkl_loss)
from flow import add_noise, schedule, velocity_to_x0
from lora import Adapters
from model import build
from rollout import velocity_of

B, C, T, H, W = 2, 3, 4, 2, 3
MASK = torch.tensor([[False, True, True, True], [False, False, True, True]])
x0 = torch.randn(B, C, T, H, W, generator=torch.Generator().manual_seed(0))
sigma = torch.tensor([0.4, 0.8])


def teacher(x, s, cond):
    return 0.3 * x + (0.5 if cond == "cond" else 0.1)


def critic(x, s, cond):
    assert cond == "cond"
    return -0.2 * x.tanh()


def inside_mean(error):
    """Mean over samples of the mean of error [B, C, T, H, W] inside of each one's MASK."""
    return torch.stack([one.transpose(0, 1)[m].mean() for one, m in zip(error, MASK)]).mean()


@pytest.mark.parametrize("mask", [None, MASK], ids=["all frames", "behind a prefix"])
def test_autograd_gives_equation_7(mask):
    x = x0.clone().requires_grad_(True)
    torch.manual_seed(3)
    loss, _ = dmd_loss(teacher, critic, x, "cond", "null", sigma, 5.0, mask)
    loss.backward()

    torch.manual_seed(3)
    noise, m = torch.randn_like(x0), torch.ones(B, T, dtype=torch.bool) if mask is None else mask
    for i in range(B):                                                                  # the equation, sample by sample
        s = torch.where(m[i], sigma[i], 0.0)[None]
        x_t = add_noise(x0[i:i + 1], noise[i:i + 1], s)
        v = 0.3 * x_t + 0.1 + 5.0 * (0.5 - 0.1)                                         # uncond + 5 (cond - uncond)
        real, fake = velocity_to_x0(v, x_t, s), velocity_to_x0(-0.2 * x_t.tanh(), x_t, s)
        inside = m[i]
        weight = (x0[i:i + 1] - real)[:, :, inside].abs().mean()
        grad = (fake - real) / weight
        grad[:, :, ~inside] = 0
        torch.testing.assert_close(x.grad[i:i + 1], grad / (B * inside.sum() * C * H * W))


def test_guidance_five_is_not_six():
    def constant(x, s, cond):
        return torch.full_like(x, 2.0 if cond == "cond" else 1.0)

    torch.manual_seed(0)
    x = x0.clone().requires_grad_(True)
    fake = lambda x, s, cond: torch.full_like(x, 6.0)                        # equals 1 + 5 (2 - 1): no gradient is left
    dmd_loss(constant, fake, x, "cond", "null", sigma, 5.0)[0].backward()
    assert x.grad.abs().max() < 1e-6


def test_prefix_reaches_the_networks_clean_and_at_sigma_zero():
    seen = []

    def spy(x, s, cond):
        seen.append((x, s))
        return torch.zeros_like(x)
    def judge(x, s, cond):
        return spy(x, s, cond).mean((1, 3, 4))
    dmd_loss(spy, lambda x, s, c: spy(x, s, c) + 1, x0, "cond", "null", sigma, 2.0, MASK)
    critic_loss(spy, x0, "cond", sigma, MASK)
    real_fkl_loss(spy, x0, "cond", sigma, MASK)
    gan_student_loss(judge, x0, "cond", sigma, MASK)
    gan_critic_loss(judge, x0, x0, "cond", sigma, MASK)                                 # the step of R1 and R2 as well
    assert len(seen) == 3 + 1 + 1 + 1 + 4
    for x, s in seen:
        assert torch.equal(s, torch.tensor([[0, 0.4, 0.4, 0.4], [0, 0, 0.8, 0.8]]))
        assert torch.equal(x.transpose(1, 2)[~MASK], x0.transpose(1, 2)[~MASK])


def test_gradient_reaches_only_the_student():
    t, c = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    x = x0.clone().requires_grad_(True)
    real, fake = (lambda x, s, cond: t * x), (lambda x, s, cond: c * x.tanh())
    dmd_loss(real, fake, x, "cond", "null", sigma, 2.0, MASK)[0].backward()
    assert t.grad is None and c.grad is None and x.grad.abs().sum() > 0
    x = x0.clone().requires_grad_(True)
    critic_loss(lambda x, s, cond: c * x.tanh(), x, "cond", sigma, MASK).backward()
    assert x.grad is None and c.grad != 0


def test_a_non_finite_gradient_is_not_hidden_and_stays_in_its_sample():
    nan, x = torch.tensor([0.0, torch.nan])[:, None, None, None, None], x0.clone().requires_grad_()
    loss, _ = dmd_loss(lambda x, s, c: x + nan, critic, x, "cond", "null", sigma, 2.0)
    gradient, = torch.autograd.grad(loss, x)
    assert loss.isnan() and gradient[0].isfinite().all() and gradient[1].isnan().all()


def test_the_critic_regresses_the_velocity_of_generated_frames():
    torch.manual_seed(5)
    loss = critic_loss(lambda x, s, cond: 0.7 * x, x0, "cond", sigma, MASK)
    torch.manual_seed(5)
    noise, s = torch.randn_like(x0), torch.where(MASK, sigma[:, None], 0.0)
    torch.testing.assert_close(loss, inside_mean((0.7 * add_noise(x0, noise, s) - (noise - x0)).square()))


# ---- The other terms, one equation each ------------------------------------------------------------------------------

def test_the_teachers_forward_kl_is_the_secant_of_its_ode():
    """v = c x with c = 0.5 and no guidance is solvable: each Euler step multiplies x by 1 + c (sigma' - sigma)."""
    levels = schedule(12, 3.0)[:4]                                                      # 1, .971, .938, .9
    torch.manual_seed(1)
    loss = teacher_fkl_loss(lambda x, s, cond: 0.2 * x, lambda x, s, cond: 0.5 * x, x0, "c", "n", levels, 7.0, MASK)
    torch.manual_seed(1)
    x_a = torch.randn_like(x0)                                                          # sigma_a = 1: pure noise
    x_b = x_a.double()
    for a, b in zip(levels[:-1], levels[1:]):
        x_b = x_b * (1 + 0.5 * (b - a))
    target = x_a.double() - (x_b - x_a.double()) / (levels[-1] - 1)
    error = inside_mean((0.8 * x_a - target).square())                                  # student: x_a - 1 * 0.2 x_a
    torch.testing.assert_close(loss.double(), error, rtol=1e-6, atol=0)


def test_the_teachers_path_is_walked_in_double_precision_behind_a_clean_history():
    """A constant velocity is its own secant: the student that has it is perfect to the last digits of fp32."""
    v, seen = torch.randn(B, C, T, H, W, generator=torch.Generator().manual_seed(4)), []

    def walker(x, s, cond):
        seen.append((x, s))
        return v
    loss = teacher_fkl_loss(lambda x, s, cond: v, walker, x0, "c", "n", [1.0, 0.9999, 0.9998], 1.0, MASK)
    assert loss < 1e-12                                                                 # in fp32: 1e-6
    assert len(seen) == 4                                                               # two steps, two branches each
    for x, s in seen:
        assert torch.equal(x.transpose(1, 2)[~MASK], x0.transpose(1, 2)[~MASK]) and (s[~MASK] == 0).all()
    assert (seen[2][1][MASK] == torch.tensor(0.9999)).all()                             # each frame at the step's level


def test_real_data_terms_are_zero_for_who_knows_the_data_and_weigh_as_their_equations():
    def knows(x, s, cond):                                                              # the exact velocity towards x0
        s = s[:, None, :, None, None]
        return torch.where(s > 0, (x - x0) / s.clamp_min(1e-9), 0.0)

    def off_by_one(x, s, cond):
        return knows(x, s, cond) + 1
    assert real_fkl_loss(knows, x0, "c", sigma, MASK) < 1e-10 and sft_loss(knows, x0, "c", sigma, MASK) < 1e-9
    torch.testing.assert_close(real_fkl_loss(off_by_one, x0, "c", sigma, MASK), (sigma ** 2).mean())            # in x0
    torch.testing.assert_close(sft_loss(off_by_one, x0, "c", sigma, MASK), torch.tensor(1.0))                   # in v


def test_gan_losses_are_the_logistic_ones():
    x, m = x0.clone().requires_grad_(True), MASK.float()
    judge = lambda x, s, cond: x.mean((1, 3, 4)) + 0.3                                  # [B, T]
    torch.manual_seed(2)
    loss = gan_student_loss(judge, x, "c", sigma, MASK)
    torch.manual_seed(2)
    d = judge(add_noise(x0, torch.randn_like(x0), MASK * sigma[:, None]), None, None)
    torch.testing.assert_close(loss, -((torch.sigmoid(d).log() * m).sum(1) / m.sum(1)).mean())
    loss.backward()
    grad = x.grad.transpose(1, 2)
    assert (grad[MASK] < 0).all() and (grad[~MASK] == 0).all()                          # towards larger logits

    x = x0.clone().requires_grad_(True)
    bias = torch.tensor(0.5, requires_grad=True)
    flat = lambda x, s, cond: bias + 0 * x.mean((1, 3, 4))                              # flat: no slope to punish
    loss, stats = gan_critic_loss(flat, x0, x, "c", sigma, MASK)
    torch.testing.assert_close(loss, -(torch.sigmoid(bias).log() + torch.sigmoid(-bias).log()))
    assert stats["gan_gap"] == 0
    loss.backward()
    assert x.grad is None and bias.grad != 0                                            # generated data are data here


def test_finite_differences_give_the_squared_gradient():
    """R1 and R2 of a linear discriminator: |grad D|^2 = |w|^2, whatever the data; the mean over many draws finds it."""
    w = torch.tensor([0.5, -1.0, 0.25])
    many = torch.zeros(4000, 3, 1, 1, 1)
    linear = lambda x, s, cond: torch.einsum("bcthw,c->bt", x, w) * 1.0
    torch.manual_seed(0)
    loss, _ = gan_critic_loss(linear, many, many, "c", torch.full((4000,), 1e-6))
    slopes = (loss - 2 * torch.tensor(2.0).log()) / dmd.R_WEIGHT                        # both logits are 0: 2 log 2
    torch.testing.assert_close(slopes, 2 * w.square().sum(), rtol=0.05, atol=0)


def test_noise_laws_have_no_atoms_and_bounds_are_on_the_shifted_sigma():
    recipe = Recipe(1.0, 5.0, 0.02, 0.98, 4, 0, 0, 0, 0)
    torch.manual_seed(0)
    for low, high in ((None, None), dmd.REAL_BAND, dmd.SFT_BAND):
        s = recipe.draw(torch.empty(100_000), low, high)
        low, high = low or 0.02, high or 0.98
        assert low <= s.min() < low + 0.01 and high - 0.01 < s.max() <= high
        assert s.unique(return_counts=True)[1].max() <= 5                               # fp32 is coarse near 1
        counts = torch.histc(s, 50, low, high) / len(s)
        edges = torch.linspace(low, high, 51)
        u = edges / (5 - 4 * edges)
        torch.testing.assert_close(counts, u.diff() / (u[-1] - u[0]), atol=0.004, rtol=0)   # the shifted uniform law


# ---- Toy truth: mixtures whose scores are known ----------------------------------------------------------------------
# A sample is W independent draws side by side, [B, d, 1, 1, W], of a mixture of Gaussians on the line (d = 1) or in the
# plane (d = 2). Its density under noise is again a mixture, so teacher and critic are formulas, not networks.

class Mixture:
    def __init__(self, means, std):
        self.means, self.std = torch.tensor(means), std                                 # [k, d], each equally likely

    def sample(self, B, W):
        at = torch.randint(len(self.means), (B, W))
        x = self.means[at] + self.std * torch.randn(B, W, self.means.shape[1])          # [B, W, d]
        return x.mT[:, :, None, None]

    def log_density(self, x, s):
        """Of draws x [n, d] noised to level s, up to a constant."""
        variance = (1 - s) ** 2 * self.std ** 2 + s ** 2
        return (-(x[:, None] - (1 - s) * self.means).square().sum(-1) / (2 * variance)).logsumexp(1)

    def velocity(self, x, sigma, cond=None):
        """E[noise - x0 | x_s]: linear regression in each mode; the modes are weighed by how likely they are."""
        y, s = x[:, :, 0, 0].mT[:, :, None], sigma[:, 0, None, None, None]              # [B, W, 1, d]
        variance = (1 - s) ** 2 * self.std ** 2 + s ** 2
        away = y - (1 - s) * self.means                                                 # [B, W, k, d]
        likely = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(2)     # [B, W, k, 1]
        x0 = (likely * (self.means + (1 - s) * self.std ** 2 / variance * away)).sum(2)
        return (x - x0.mT[:, :, None, None]) / s[..., None]


class TwoPiles(nn.Module):
    """A one-step generator of two equal piles per axis, at m - h and m + h with spread b, from one normal number z.

    The sign of z picks the pile, its size the place within. As a velocity, like any student: x0 = z - 1 v(z).
    """

    def __init__(self, m, h, b):                                                        # [d], [d], one
        super().__init__()
        self.m, self.h, self.b = (nn.Parameter(torch.tensor(value)) for value in (m, h, b))

    def forward(self, z, sigma=None, cond=None):
        normal = torch.distributions.Normal(0.0, 1.0)
        size = normal.icdf((2 * normal.cdf(z.abs()) - 1).clamp(1e-6, 1 - 1e-6))         # |z|, spread to a normal again
        axis = lambda p: p.reshape(-1, 1, 1, 1)
        return z - (axis(self.m) + axis(self.h) * z.sign() + self.b * size)

    def mixture(self):
        """What it generates, exactly."""
        ends = torch.stack([self.m - self.h, self.m + self.h]).detach().T               # [d, 2]
        return Mixture(torch.cartesian_prod(*ends).reshape(-1, len(ends)).tolist(), abs(self.b.item()))


def distil(student, data, updates=300, gan=0.0, teacher_fkl=0.0, B=8, W=32):
    """Stage 2 in 15 lines: exact critic, exact teacher; the discriminator alone has to be learnt."""
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    logits = lambda x, s, cond: judge(torch.stack([x[:, 0, 0, 0], s.expand(B, W)], -1)).mean(1)     # [B, 1]
    optimizer, judge_optimizer = (torch.optim.Adam(module.parameters(), lr, betas=(0.0, 0.99))
                                  for module, lr in ((student, 0.05), (judge, 3e-3)))
    recipe = Recipe(1.0, 1.0, 0.02, 0.98, 1, gan, teacher_fkl, 0.0, 0.0)                # one step: from 1 to 0
    for _ in range(updates):
        z = torch.randn(B, len(student.m), 1, 1, W)
        nets = Networks(data.velocity, student, student.mixture().velocity, logits, lambda name: nullcontext())
        clip = Clip(z - student(z), data.sample(B, W), Condition({}), Condition({}), torch.ones(B, 1, dtype=torch.bool))
        optimizer.zero_grad()
        student_gradients(nets, recipe, clip, 1, 1)
        optimizer.step()
        for _ in range(2 if gan else 0):
            judge_optimizer.zero_grad()
            gan_critic_loss(logits, clip.real, clip.x0, None, recipe.draw(z))[0].backward()
            judge_optimizer.step()
    return student


@pytest.mark.parametrize("means", [[[-1.0], [2.0]], [[-1.0, 0.0], [2.0, 1.0], [0.0, -2.0]]], ids=["line", "plane"])
def test_toy_the_dmd_gradient_is_the_gap_between_the_scores(means):
    """fake - real = s^2 / (1 - s) (grad log q_s - grad log p_s), with both scores from autograd of the densities."""
    data, made = Mixture(means, 0.5), Mixture([[0.3] * len(means[0])], 0.9)
    x, s = made.sample(2, 6), torch.tensor([0.3, 0.7])
    noise, mask = torch.randn_like(x), torch.ones(2, 1, dtype=torch.bool)
    grad = dmd_gradient(data.velocity, made.velocity, x, None, None, s[:, None], 1.0, mask, noise)
    for i in range(2):
        draws = add_noise(x, noise, s)[i, :, 0, 0].T.requires_grad_(True)               # [W, d]
        fake, real = (torch.autograd.grad(m.log_density(draws, s[i]).sum(), draws)[0] for m in (made, data))
        gap = s[i] ** 2 / (1 - s[i]) * (fake - real)
        x0_real = (draws + s[i] ** 2 * real) / (1 - s[i])                               # Tweedie's formula
        weight = (x[i, :, 0, 0].T - x0_real).abs().mean()
        torch.testing.assert_close(grad[i, :, 0, 0].T, (gap / weight).detach(), atol=1e-4, rtol=1e-4)


def test_toy_the_distilled_generator_matches_the_mixture():
    """Four modes in the plane, from a start with one pile: Kolmogorov and Smirnov see no difference on either axis."""
    data = Mixture([[-2.0, -1.5], [-2.0, 1.5], [2.0, -1.5], [2.0, 1.5]], 0.4)
    student = distil(TwoPiles([0.5, -0.5], [0.1, 0.1], 1.0), data, 400)
    n = 4000
    z = torch.randn(1, 2, 1, 1, n)
    x = (z - student(z)).detach()[0, :, 0, 0].sort().values                             # [2, n]
    for axis, mode in enumerate((2.0, 1.5)):
        normal = torch.distributions.Normal(torch.tensor([-mode, mode]), 0.4)
        exact = normal.cdf(x[axis][:, None]).mean(1)
        distance = (exact - torch.arange(1, n + 1) / n).abs().max()
        assert distance < 1.63 / n ** 0.5                                               # the 1 % quantile


FAR = Mixture([[-3.0], [3.0]], 0.3)


def lost(student):
    """Share of the generator's draws missing from the rarer mode, of the half that belong there."""
    z = torch.randn(1, 1, 1, 1, 4000)
    x = (z - student(z)).detach()
    return 1 - 2 * min(float(((x - mode).abs() < 1).float().mean()) for mode in (-3, 3))


def test_toy_reverse_kl_alone_loses_a_mode():
    assert lost(distil(TwoPiles([-3.0], [0.01], 0.3), FAR)) > 0.95


@pytest.mark.parametrize("term", [{"teacher_fkl": 0.2}, {"gan": 1.0}], ids=["forward KL", "GAN"])
def test_toy_forward_kl_and_gan_keep_it(term, monkeypatch):
    monkeypatch.setattr(dmd, "TEACHER_STEPS", 12)                                       # the first step is all of it
    assert lost(distil(TwoPiles([-3.0], [0.01], 0.3), FAR, **term)) < 0.1


# ---- Who learns from what --------------------------------------------------------------------------------------------

FIELDS = dict(layers=3, dim=24, heads=2, ffn=32)
TEXT = {"text": torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))}
ACTIONS = torch.tensor([[0, 9, 9, 9, 3, 3], [0, 0, 4, 4, 18, 18]])
ALL = Recipe(2.0, 3.0, 0.02, 0.98, 4, gan=0.3, teacher_fkl=0.2, real_fkl=0.2, sft=0.2)
WHERE = torch.tensor([[False, False, True, True, True, True]] * 2)


def randomised():
    """A small network in which nothing is zero: zeros hide gradients that should not be there."""
    model = build("tiny", **FIELDS)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def cast(tune):
    """Networks, {student, critic, head: module}, and the teacher's module."""
    torch.manual_seed(0)
    teacher, head = randomised().requires_grad_(False), Head(FIELDS["dim"])
    if tune == "lora":
        adapters = Adapters(teacher, ("student", "critic"), 4)
        for p in [p for s in adapters.sets.values() for p in s.parameters()]:
            nn.init.normal_(p, std=0.1)
        v = [adapters.velocity(velocity_of(teacher), name) for name in (None, "student", "critic")]
        nets = Networks(*v, Discriminator(teacher, v[2], head), adapters.using)
        return nets, {**adapters.sets, "head": head}, teacher
    student, critic = randomised(), randomised()
    v = [velocity_of(net) for net in (teacher, student, critic)]
    nets = Networks(*v, Discriminator(critic, v[2], head), lambda name: nullcontext())
    return nets, {"student": student, "critic": critic, "head": head}, teacher


def clip_of(nets, rows=slice(None)):
    """A clip as a rollout leaves it: x0 hangs on the student's weights."""
    g = torch.Generator().manual_seed(7)
    real, noise = (torch.randn(2, 24, 6, 4, 6, generator=g)[rows] for _ in range(2))
    cond = Condition({"text": TEXT["text"][rows]}, Control(ACTIONS[rows]))
    made = nets.student(noise, torch.ones(len(noise), 6), cond)
    x0 = torch.where(WHERE[rows][:, None, :, None, None], made, real)
    return Clip(x0, real, cond, cond.null({"text": torch.zeros(len(real), 3, 64)}), WHERE[rows])


def test_what_was_dreamt_stands_behind_the_dreamt_past_and_what_was_real_behind_the_real_one(monkeypatch):
    nets, *_ = cast("full")
    clip, pasts = clip_of(nets), {}
    clip = clip._replace(cond=replace(clip.cond, past="dreamt"), null=replace(clip.null, past="dreamt"), past="real")

    def watch(name, at):
        def loss(*args):
            pasts[name] = [args[i].past for i in at]
            return next(args[0].module.parameters()).sum()
        monkeypatch.setattr(dmd, name, loss)
    watched = lambda module: type("V", (), {"module": module, "__call__": lambda self, *args: None})()
    nets = nets._replace(student=watched(nn.Linear(1, 1)), exact=watched(nn.Linear(1, 1)))
    monkeypatch.setattr(dmd, "dmd_loss", lambda t, c, x0, cond, *rest: (
        pasts.update(dmd_loss=[cond.past, rest[0].past]) or x0.sum(), {}))
    for name, at in (("teacher_fkl_loss", (3, 4)), ("real_fkl_loss", (2,)), ("sft_loss", (2,)), ("imitation", (3,))):
        watch(name, at)
    student_gradients(nets, ALL._replace(gan=0.0, quant=1.0), clip, 4, 2)
    assert pasts == {"dmd_loss": ["dreamt"] * 2, "teacher_fkl_loss": ["real"] * 2, "real_fkl_loss": ["real"],
                     "sft_loss": ["real"], "imitation": ["dreamt"]}


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_each_update_moves_its_own_networks_and_leaves_the_others_bit_for_bit(tune):
    nets, modules, teacher = cast(tune)
    everything = {**modules, "teacher": teacher}
    before = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in everything.items()}

    def changed():
        return {name for name, module in everything.items()
                if not all(torch.equal(v, before[name][k]) for k, v in module.state_dict().items())}

    def learners():
        return {name for name, module in everything.items() if any(p.grad is not None for p in module.parameters())}
    clip = clip_of(nets)
    stats = student_gradients(nets, ALL, clip, 4, 2)
    assert stats.keys() == {"dmd", "dmd_gradient", "gan", "teacher_fkl", "real_fkl", "sft"}
    assert learners() == {"student"}
    assert all(p.grad.abs().sum() > 0 for n, p in modules["student"].named_parameters() if "norm_k.bias" not in n)
    torch.optim.SGD(modules["student"].parameters(), 0.1).step()
    assert changed() == {"student"}
    modules["student"].zero_grad(set_to_none=True)
    before["student"] = {k: v.clone() for k, v in modules["student"].state_dict().items()}

    critic_gradients(nets, ALL, clip)
    assert learners() == {"critic", "head"}
    for name in ("critic", "head"):
        torch.optim.SGD(modules[name].parameters(), 0.1).step()
    assert changed() == {"critic", "head"}


def test_without_a_gan_the_critic_hears_nothing_of_real_data():
    nets, modules, _ = cast("full")
    grads = []
    for real in (0.0, 1.0):
        torch.manual_seed(3)
        critic_gradients(nets, ALL._replace(gan=0.0), clip_of(nets)._replace(real=torch.full((2, 24, 6, 4, 6), real)))
        grads.append([p.grad.clone() for p in modules["critic"].parameters()])
        modules["critic"].zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and modules["head"].mlp[1].weight.grad is None


def test_the_discriminator_listens_to_the_middle_block_and_reaches_no_later_one():
    nets, modules, _ = cast("full")
    logits = nets.discriminator(torch.randn(2, 24, 6, 4, 6), torch.full((2, 6), 0.5), clip_of(nets).cond)
    assert logits.shape == (2, 6) and nets.discriminator.heard is None
    logits.sum().backward()
    reached = [any(p.grad is not None for p in block.parameters()) for block in modules["critic"].blocks]
    assert reached == [True, True, False]


def share_noise(monkeypatch):
    """Noise as a function of the data and levels of the sample alone: the same in any batch."""
    monkeypatch.setattr(torch, "randn_like", lambda x: (5 * x.detach() + 1).sin() * 1.4)
    monkeypatch.setattr(Recipe, "draw", lambda self, x, low=0.02, high=0.98:
                        low + (high - low) * x.detach()[:, 0, 0, 0, 0].sin().abs())


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_accumulated_gradients_are_those_of_the_larger_batch(tune, monkeypatch):
    share_noise(monkeypatch)
    nets, modules, _ = cast(tune)
    grads = []
    for parts in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        for rows in parts:
            clip = clip_of(nets, rows)
            student_gradients(nets, ALL, clip, 4, 2, 1 / len(parts))
            critic_gradients(nets, ALL, clip, 1 / len(parts))
        grads.append({(m, k): p.grad for m, module in modules.items() for k, p in module.named_parameters()})
        for module in modules.values():
            module.zero_grad(set_to_none=True)
    for key, one in grads[0].items():
        assert (one - grads[1][key]).norm() <= 1e-6 * max(1, one.norm()), key


def test_recomputing_activations_changes_no_gradient():
    """With adapters too: the backward pass must recompute with those that were at work."""
    from parallel import checkpoint_blocks
    grads = []
    for recompute in (False, True):
        nets, modules, teacher = cast("lora")
        if recompute:
            checkpoint_blocks(teacher)
        torch.manual_seed(5)
        clip = clip_of(nets)
        student_gradients(nets, ALL, clip, 4, 2)
        critic_gradients(nets, ALL, clip)
        grads.append([p.grad for module in modules.values() for p in module.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
