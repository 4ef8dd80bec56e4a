"""Flow matching: every formula of the noise process, written once in this project.

    x_sigma = (1 - sigma) x0 + sigma noise,      v = noise - x0,      0 = clean, 1 = pure noise

Flow Matching (arXiv:2210.02747), Rectified Flow (arXiv:2209.03003), timestep shift of SD3 (arXiv:2403.03206, Eq. 23).
`sigma` is float32, one value per latent frame [B, T] (clean history frames have 0), per sample [B], or a number.
"""

import torch


def per_frame(sigma, x):
    """`sigma` (a number, [B] or [B, T]) shaped to multiply `x` [B, C, T, ...]."""
    if not torch.is_tensor(sigma) or sigma.ndim == 0:
        return sigma
    if sigma.ndim == 1:
        return sigma.reshape(-1, *[1] * (x.ndim - 1))                                    # [B, 1, 1, ...]
    return sigma.reshape(sigma.shape[0], 1, -1, *[1] * (x.ndim - 3))                     # [B, 1, T, ...]


def add_noise(x0, noise, sigma):
    """x_sigma on the straight path between data and noise."""
    s = per_frame(sigma, x0)
    return (1 - s) * x0 + s * noise


def velocity(x0, noise):
    """The regression target: the derivative of x_sigma with respect to sigma."""
    return noise - x0


def velocity_to_x0(v, x_t, sigma):
    """The clean latents that velocity `v` points to from `x_t`."""
    return x_t - per_frame(sigma, x_t) * v


def guide(cond, uncond, w):
    """Classifier-free guidance (arXiv:2207.12598), anchored at the unconditional prediction; w = 1 switches it off."""
    return uncond + w * (cond - uncond)


def euler(x, v, sigma, sigma_next):
    """One step of the probability-flow ODE from `sigma` to `sigma_next`."""
    return x + (per_frame(sigma_next, x) - per_frame(sigma, x)) * v


def shift(u, k):
    """Move uniform noise levels towards noise: k u / (1 + (k - 1) u)."""
    return k * u / (1 + (k - 1) * u)


def unshift(sigma, k):
    """The inverse of `shift`."""
    return sigma / (k - (k - 1) * sigma)


def schedule(steps, k):
    """`steps` + 1 shifted noise levels from 1 to 0, as floats: the grid of a sampler."""
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
    return [shift(1 - i / steps, k) for i in range(steps + 1)]


def draw_sigma(shape, k, low=0.0, high=1.0, device="cpu"):
    """Noise levels [*shape] of the shifted uniform law, truncated to [low, high].

    The bounds are on the shifted sigma. Truncation draws u between their preimages, so that no level carries an atom
    of probability; clamping a wider law would put most draws on the bound itself.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"sigma bounds need 0 <= low < high <= 1, got [{low}, {high}]")
    u = torch.rand(shape, device=device)
    return shift(unshift(low, k) + (unshift(high, k) - unshift(low, k)) * u, k)


def per_sample(x, mask):
    """Mean of x [B, C, T, H, W] over each sample's own frames of `mask` [B, T]: [B]."""
    m = mask[:, None, :, None, None].to(x.dtype)
    return (x * m).sum((1, 2, 3, 4)) / (m.sum((1, 2, 3, 4)) * x[0, :, 0].numel())


def masked_mean(x, mask=None):
    """Mean over samples of `per_sample`: that of a batch is the mean of those of its parts, whatever their masks."""
    return x.mean() if mask is None else per_sample(x, mask).mean()


def flow_loss(v, x0, noise, mask=None):
    """Conditional flow matching, E |v - (noise - x0)|^2, over the frames of `mask` [B, T]."""
    return masked_mean((v.float() - velocity(x0, noise)).square(), mask)
