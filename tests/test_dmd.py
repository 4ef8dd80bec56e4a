"""Stage 2's losses: the gradient is the equation."""

import pytest
import torch

from dmd import critic_loss, dmd_loss
from flow import add_noise, velocity_to_x0

B, C, T, H, W = 2, 3, 4, 2, 3
MASK = torch.tensor([[False, True, True, True], [False, False, True, True]])
x0 = torch.randn(B, C, T, H, W, generator=torch.Generator().manual_seed(0))
sigma = torch.tensor([0.4, 0.8])


def teacher(x, s, cond):
    return 0.3 * x + (0.5 if cond == "cond" else 0.1)


def critic(x, s, cond):
    assert cond == "cond"
    return -0.2 * x.tanh()


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
        torch.testing.assert_close(x.grad[i:i + 1], grad / (m.sum() * C * H * W))


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
    dmd_loss(spy, lambda x, s, c: spy(x, s, c) + 1, x0, "cond", "null", sigma, 2.0, MASK)
    critic_loss(spy, x0, "cond", sigma, MASK)
    assert len(seen) == 4
    for x, s in seen:
        assert (s[~MASK] == 0).all() and torch.equal(s[0, 1:], torch.full((3,), 0.4)) and torch.equal(s[1, 2:], torch.full((2,), 0.8))
        assert torch.equal(x.transpose(1, 2)[~MASK], x0.transpose(1, 2)[~MASK])


def test_gradient_reaches_only_the_student():
    t, c = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    x = x0.clone().requires_grad_(True)
    dmd_loss(lambda x, s, cond: t * x, lambda x, s, cond: c * x.tanh(), x, "cond", "null", sigma, 2.0, MASK)[0].backward()
    assert t.grad is None and c.grad is None and x.grad.abs().sum() > 0
    x = x0.clone().requires_grad_(True)
    critic_loss(lambda x, s, cond: c * x.tanh(), x, "cond", sigma, MASK).backward()
    assert x.grad is None and c.grad != 0


def test_non_finite_gradient_is_an_error_that_names_the_noise():
    with pytest.raises(FloatingPointError, match="noise levels .*0.8"):
        dmd_loss(lambda x, s, c: x * torch.nan, critic, x0, "cond", "null", sigma, 2.0)


def test_toy_the_student_reaches_the_teachers_gaussian():
    """Data N(2, 0.5^2) with its exact velocity as teacher, the critic fitted to the student's Gaussian in closed form."""
    def exact(mean, std):
        def velocity(x, s, cond):                                                    # E[noise - x0 | x_s] of a Gaussian
            s = s[:, None, :, None, None]
            variance = (1 - s) ** 2 * std ** 2 + s ** 2
            return -mean + (s - (1 - s) * std ** 2) * (x - (1 - s) * mean) / variance
        return velocity
    torch.manual_seed(0)
    mean, log_std = torch.tensor(-1.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    optimizer = torch.optim.Adam([mean, log_std], 0.05, betas=(0.0, 0.99))
    for _ in range(300):
        x = mean + log_std.exp() * torch.randn(256, 1, 1, 1, 1)
        critic = exact(mean.detach(), log_std.exp().detach())
        loss, _ = dmd_loss(exact(2.0, 0.5), critic, x, "cond", "cond", torch.rand(256) * 0.96 + 0.02, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(mean.item() - 2.0) < 0.1 and abs(log_std.exp().item() - 0.5) < 0.1


def test_the_critic_regresses_the_velocity_of_generated_frames():
    torch.manual_seed(5)
    loss = critic_loss(lambda x, s, cond: 0.7 * x, x0, "cond", sigma, MASK)
    torch.manual_seed(5)
    noise, s = torch.randn_like(x0), torch.where(MASK, sigma[:, None], 0.0)
    error = (0.7 * add_noise(x0, noise, s) - (noise - x0)).square().transpose(1, 2)[MASK]
    torch.testing.assert_close(loss, error.mean())
