"""Distribution matching distillation: the losses of stage 2.

DMD (arXiv:2311.18828) moves a generator along the difference of two scores: the teacher's, of real data, and the
critic's, of what the generator makes now. DMD2 (arXiv:2405.14867) drops the regression term and lets the critic learn
faster.
Networks enter as callables (x_t, sigma, cond) -> v with x_t [B, C, T, H, W] and sigma [B, T].

`mask` [B, T] is true on the generated frames. The others, a real prefix, are clean context: teacher and critic get
them at sigma 0, and neither the loss nor its normaliser counts them.
"""

import torch

from flow import add_noise, flow_loss, guide, masked_mean, velocity_to_x0


def on_frames(sigma, mask):
    """`sigma` ([B] or [B, T]) per frame [B, T], 0 outside of `mask`."""
    if sigma.ndim == 1:
        sigma = sigma[:, None].expand(mask.shape)
    return torch.where(mask, sigma, 0.0)


def dmd_gradient(teacher, critic, x0, cond, null, sigma, guidance, mask, noise):
    """Eq. 7 of DMD in x0-space: (fake - real) / E|x0 - real|, one normaliser per sample (Eq. 8). No graph."""
    x_t = add_noise(x0, noise, sigma)                                                   # [B, C, T, H, W]
    v = guide(teacher(x_t, sigma, cond), teacher(x_t, sigma, null), guidance)
    real = velocity_to_x0(v.float(), x_t, sigma)
    fake = velocity_to_x0(critic(x_t, sigma, cond).float(), x_t, sigma)

    weight = torch.stack([masked_mean((x - r)[None].abs(), m[None]) for x, r, m in zip(x0, real, mask)])    # [B]
    grad = (fake - real) / weight[:, None, None, None, None] * mask[:, None, :, None, None]
    if not torch.isfinite(grad).all():
        raise FloatingPointError(f"the DMD gradient is not finite; noise levels {sigma.amax(1).tolist()}, "
                                 f"normalisers {weight.tolist()}")
    return grad


def dmd_loss(teacher, critic, x0, cond, null, sigma, guidance, mask=None):
    """Distribution matching (DMD, Eq. 7 and 8) as a loss on generated x0 [B, C, T, H, W].

    The gradient of the loss with respect to x0 is `dmd_gradient` divided by the number of elements inside `mask`
    (tests/test_dmd.py holds us to it); none flows into teacher or critic. sigma is [B] or [B, T]; `guidance` is
    anchored at the unconditional prediction. Returns the loss and what to log.
    """
    mask = torch.ones(x0.shape[0], x0.shape[2], dtype=torch.bool, device=x0.device) if mask is None else mask
    sigma = on_frames(sigma, mask)
    with torch.no_grad():
        grad = dmd_gradient(teacher, critic, x0.float(), cond, null, sigma, guidance, mask, torch.randn_like(x0))
    loss = 0.5 * masked_mean((x0.float() - (x0.float() - grad).detach()).square(), mask)
    return loss, {"dmd_gradient": masked_mean(grad.abs(), mask)}


def critic_loss(critic, x0, cond, sigma, mask=None):
    """The critic learns the velocity field of generated x0 [B, C, T, H, W]: flow matching (DMD, Eq. 6; DMD2)."""
    mask = torch.ones(x0.shape[0], x0.shape[2], dtype=torch.bool, device=x0.device) if mask is None else mask
    x0, noise, sigma = x0.detach(), torch.randn_like(x0), on_frames(sigma, mask)
    return flow_loss(critic(add_noise(x0, noise, sigma), sigma, cond), x0, noise, mask)
