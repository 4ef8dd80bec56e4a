"""Each formula of flow.py against its definition."""

import pytest
import torch

import flow

B, C, T, H, W = 2, 3, 4, 2, 5
x0, noise = torch.randn(2, B, C, T, H, W, generator=torch.Generator().manual_seed(0))
sigma = torch.tensor([[0.0, 0.0, 0.7, 0.7], [0.0, 0.2, 0.5, 1.0]])


def test_noise_is_a_straight_path_per_frame():
    x = flow.add_noise(x0, noise, sigma)
    assert torch.equal(x[:, :, 0], x0[:, :, 0]) and torch.equal(x[1, :, 3], noise[1, :, 3])
    torch.testing.assert_close(x[1, :, 1], 0.8 * x0[1, :, 1] + 0.2 * noise[1, :, 1])


def test_velocity_is_the_derivative_of_the_path():
    a, b = (flow.add_noise(x0.double(), noise.double(), sigma.double() * (1 - h) + h) for h in (0.3, 0.4))
    slope = flow.per_frame((1 - sigma.double()) * 0.1, a)
    torch.testing.assert_close(b - a, flow.velocity(x0, noise).double() * slope)


def test_true_velocity_gives_back_x0_and_euler_stays_on_the_path():
    x, v = flow.add_noise(x0, noise, sigma), flow.velocity(x0, noise)
    torch.testing.assert_close(flow.velocity_to_x0(v, x, sigma), x0)
    torch.testing.assert_close(flow.euler(x, v, sigma, sigma / 2), flow.add_noise(x0, noise, sigma / 2))


@pytest.mark.parametrize("scale, expected", [(0.0, 1.0), (1.0, 2.0), (5.0, 6.0)])
def test_guidance_is_anchored_at_the_unconditional_prediction(scale, expected):
    assert flow.guide(torch.tensor(2.0), torch.tensor(1.0), scale) == expected


@pytest.mark.parametrize("k", [1.0, 3.0, 5.0])
def test_shift_keeps_the_ends_and_has_an_inverse(k):
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    s = flow.shift(u, k)
    assert s[0] == 0 and s[-1] == 1 and (s.diff() > 0).all()
    torch.testing.assert_close(flow.unshift(s, k), u)


def test_the_four_step_schedule_is_the_published_one():
    assert flow.schedule(4, 5.0) == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])     # BiWM: 1, .75, .5, .25 shifted by 5
    with pytest.raises(ValueError, match="at least one step"):
        flow.schedule(0, 5.0)


def test_the_sigma_law_is_truncated_and_has_no_atoms():
    torch.manual_seed(0)
    low, high, k = 0.6, 0.98, 5.0
    s = flow.draw_sigma((100_000,), k, low, high)
    assert low <= s.min() and s.max() <= high
    assert s.unique(return_counts=True)[1].max() < 20                               # clamping puts thousands on a bound
    u = (flow.unshift(s.double(), k) - flow.unshift(low, k)) / (flow.unshift(high, k) - flow.unshift(low, k))
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)
    cdf = (u[:, None] <= grid).double().mean(0)
    torch.testing.assert_close(cdf, grid, atol=0.01, rtol=0)                               # uniform before the shift
    with pytest.raises(ValueError, match="low < high"):
        flow.draw_sigma((1,), k, 0.9, 0.1)


def test_the_loss_counts_only_masked_frames():
    mask = torch.tensor([[False, True, True, False], [False, False, True, True]])
    v = flow.velocity(x0, noise)
    v = torch.where(mask[:, None, :, None, None], v + 2.0, v + 1e6)
    assert flow.flow_loss(v, x0, noise, mask).item() == pytest.approx(4.0, rel=1e-5)
    assert flow.flow_loss(flow.velocity(x0, noise) - 3.0, x0, noise).item() == pytest.approx(9.0, rel=1e-5)


def test_a_batch_is_the_mean_of_its_parts_whatever_their_masks():
    """Hence DDP on two halves and accumulation give the gradient of the whole batch."""
    mask, v = torch.tensor([[False, False, False, True], [True, True, True, True]]), torch.randn_like(x0)
    loss = lambda part: flow.flow_loss(v[part], x0[part], noise[part], mask[part])
    assert loss(slice(0, 1)) != pytest.approx(loss(slice(1, 2)).item(), rel=1e-2)
    assert loss(slice(None)).item() == pytest.approx((loss(slice(0, 1)) + loss(slice(1, 2))).item() / 2, rel=1e-6)
