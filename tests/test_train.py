"""What the two training scripts feed their losses."""

import random
from types import SimpleNamespace

import pytest
import torch

import train_stage1 as one
import train_stage2 as two
from control import NO_ACTION, Condition, Control

B, T = 400, 12
SPEC = SimpleNamespace(chunk=4, shift=3.0)
x0 = torch.randn(B, 2, T, 1, 2, generator=torch.Generator().manual_seed(0))
CONDITION = Condition({"text": torch.ones(B, 3, 5)}, Control(torch.full((B, T), 9)))


def test_prefixes_are_clean_at_sigma_zero_and_outside_the_loss():
    torch.manual_seed(0)
    seen = {}

    def velocity(x, sigma, condition):
        seen.update(x=x, sigma=sigma)
        noisy = sigma[:, None, :, None, None] > 0
        exact = (x - x0) / sigma[:, None, :, None, None].clamp_min(1e-9)                # = noise - x0
        return torch.where(noisy, exact, 1e6)                                           # nonsense on the prefix must not count
    loss = one.stage1_loss(velocity, x0, CONDITION, one.Config(), SPEC)
    clean = seen["sigma"] == 0
    assert loss < 1e-4 and torch.equal(seen["x"].transpose(1, 2)[clean], x0.transpose(1, 2)[clean])
    n = clean.sum(1)
    assert (clean == (torch.arange(T) < n[:, None])).all()                              # prefixes, not scattered frames
    assert sorted(n.unique().tolist()) == [0, 4, 8]
    assert abs((n == 0).float().mean() - 0.2) < 0.07 and abs((n == 4).float().mean() - 0.4) < 0.07
    noisy = torch.where(clean, torch.nan, seen["sigma"])
    assert (noisy.nan_to_num(-1).amax(1, keepdim=True) == noisy)[~clean].all()          # one level per clip


def test_stage_1_sees_the_windows_that_rollouts_meet():
    shared, cfg = random.Random(0), one.Config()
    lengths = [one.draw_frames(cfg, 4, shared) for _ in range(4000)]
    assert set(lengths) == {4, 5, 8, 9, 12}
    assert sum(length % 4 for length in lengths) / 4000 == pytest.approx(cfg.i2v, abs=0.03)
    prefixes = {T: set(one.draw_prefix(cfg, 4, 200, T, "cpu").tolist()) for T in set(lengths)}
    assert prefixes == {4: {0}, 5: {1}, 8: {0, 4}, 9: {1, 5}, 12: {0, 4, 8}}


def test_captions_and_actions_are_dropped_together_and_apart():
    torch.manual_seed(0)
    cfg = one.Config(drop=0.2, drop_text=0.1, drop_actions=0.3)
    out = one.drop(CONDITION, {"text": torch.zeros(1, 3, 5)}, cfg)
    no_text, no_actions = (out.text["text"] == 0).all((1, 2)), (out.control.actions == NO_ACTION).all(1)
    assert abs(no_text.float().mean() - 0.3) < 0.07 and abs(no_actions.float().mean() - 0.5) < 0.07
    assert abs((no_text & no_actions).float().mean() - 0.2) < 0.06
    kept = out.control.actions[~no_actions]
    assert (kept[:, 1:] == 9).all() and abs((kept[:, 0] == 0).float().mean() - 0.5) < 0.1
    assert (CONDITION.control.actions == 9).all()                                       # the batch itself is untouched


def test_starts_of_stage_2_are_text_image_and_video_in_whole_chunks():
    shared, cfg = random.Random(0), two.Config()
    starts = [two.draw_start(cfg, 4, shared) for _ in range(2000)]
    assert set(starts) == {(0, 12), (1, 9), (4, 12)}
    assert sum(n == 0 for n, _ in starts) / 2000 == pytest.approx(cfg.t2v, abs=0.03)
    assert sum(n == 1 for n, _ in starts) / 2000 == pytest.approx(cfg.i2v, abs=0.03)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    cfg = one.Config(steps=1000, warmup=100, lr=1e-3)
    rates = [one.learning_rate(s, cfg) for s in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and max(rates) == pytest.approx(1e-3, rel=0.05) and rates[-1] < 1e-8
