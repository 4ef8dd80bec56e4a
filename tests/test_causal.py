"""The causal baseline: cache and mask are the same function, time has one direction, forcing is every chunk's loss."""

import json
import random

import pytest
import torch

import causal
import checkpoint
import common
import evaluate
import train_causal
from causal import Causal, blocks, forcing_mask
from control import Condition, Control
from encode import TinyCodec
from flow import flow_loss, schedule
from model import build
from rollout import few_step
from selfforcing import draw_plan

K, PAST = 4, 8                                                              # chunk and history of tiny


@pytest.fixture(scope="module", params=["adaln", "prope", "adaln+prope"])
def net(request):
    torch.manual_seed(0)
    model = build("tiny", request.param, dim=24, heads=2, ffn=32, layers=2)
    for p in model.parameters():
        p.data.normal_(std=0.2)                                             # a fresh model is deaf to everything
    return Causal(model)


def clip(frames, B=2):
    torch.manual_seed(1)
    x0, text, actions = torch.randn(B, 24, frames, 4, 6), torch.randn(B, 3, 64), torch.randint(81, (B, frames))
    return x0, Condition({"text": text}, Control(actions, *TinyCodec("cpu").cameras(actions)))


def test_blocks_are_chunks_behind_the_odd_first_frames():
    assert blocks(9, 4) == [(0, 1), (1, 5), (5, 9)] and blocks(8, 4) == [(0, 4), (4, 8)] and blocks(0, 4) == []
    assert forcing_mask(2, 1, 1).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]
    far = forcing_mask(16, K, PAST)
    assert not far[12, :4].any() and far[12, 4:16].all()                    # clean: a window of history and itself
    assert far[28, 4:12].all() and not far[28, 12:28].any() and far[28, 28:].all()


@pytest.mark.parametrize("frames", [9, 16])                                 # an odd first frame; past the window
@torch.no_grad()
def test_the_cached_rollout_is_the_masked_forward(net, frames):
    """One denoising step of every chunk behind true history, from the cache and by one masked forward over all."""
    x0, told = clip(frames)
    noise, sigma = torch.randn_like(x0), torch.rand(2, frames)
    for s, e in blocks(frames, K):
        sigma[:, s:e] = sigma[:, s:s + 1]
    masked = net.forced(x0, noise, sigma, told)
    net.reset(PAST)
    for s, e in blocks(frames, K):
        v = net(noise[:, :, s:e], sigma[:, s:e], causal.told(told, s, e))
        assert (v - masked[:, :, s:e]).abs().max() < 1e-5 < v.abs().max()
        net.remember(x0[:, :, s:e], causal.told(told, s, e))
    assert net.cache[0][0][0].shape[2] == min(frames, PAST) * 6             # no more than the window is kept


@torch.no_grad()
def test_a_rollout_is_denoising_behind_its_own_chunks(net):
    """`causal.rollout` against few_step with, instead of a cache, masked forwards over everything generated."""
    x0, told = clip(16)
    draws = lambda: (lambda shape, g=torch.Generator().manual_seed(3): torch.randn(shape, generator=g))
    made = causal.rollout(net, told, x0[:, :, :4], 16, schedule(2, 3.0), K, PAST + K, draws())
    clean, noise = x0[:, :, :4], draws()
    for n in (4, 8, 12):
        def velocity(x, sigma, condition):                                  # of the chunk, the last block of a clip
            whole, levels = torch.cat([clean, x], 2), torch.cat([torch.zeros(2, n), sigma], 1)
            return net.forced(whole, whole, levels, told.frames(0, n + K))[:, :, n:]
        sample, _ = few_step(velocity, x0[:, :, :0], (2, 24, K, 4, 6), schedule(2, 3.0), told, noise)
        clean = torch.cat([clean, sample], 2)
    assert torch.equal(made[:, :, :4], x0[:, :, :4])
    torch.testing.assert_close(made, clean, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_later_chunks_cannot_influence_earlier_ones(net):
    x0, told = clip(12)
    x, y, sigma = torch.randn_like(x0), x0.clone(), torch.full((2, 12), 0.5)
    y[:, :, 8:] += 1                                                        # another ending,
    keys = torch.where(torch.arange(12) < 8, told.control.actions, 7)                   # other keys
    other = Condition(told.text, Control(keys, *TinyCodec("cpu").cameras(keys)))
    a, b = net.forced(x0, x, sigma, told), net.forced(y, x, sigma, other)
    torch.testing.assert_close(a[:, :, :8], b[:, :, :8], atol=0, rtol=0)
    assert (a[:, :, 8:] - b[:, :, 8:]).abs().max() > 1e-3
    y = x0.clone()
    y[:, :, :4] += 1
    assert (a - net.forced(y, x, sigma, told))[:, :, 4:8].abs().max() > 1e-3            # earlier ones do


@torch.no_grad()
def test_the_forcing_loss_is_the_mean_of_every_chunks_own(net, monkeypatch):
    x0, told = clip(12)
    seen = {}
    forced = net.forced
    monkeypatch.setattr(net, "forced", lambda x0, x_t, sigma, cond: seen.update(x_t=x_t, sigma=sigma) or
                        forced(x0, x_t, sigma, cond))
    torch.manual_seed(5)
    loss = causal.forcing_loss(net, x0, told)
    sigma, losses = seen["sigma"], []
    noise = (seen["x_t"] - (1 - sigma[:, None, :, None, None]) * x0) / sigma[:, None, :, None, None]
    net.reset(PAST)
    for s, e in blocks(12, K):
        assert len(sigma[0, s:e].unique()) == 1                             # one level a block
        v = net(seen["x_t"][:, :, s:e], sigma[:, s:e], causal.told(told, s, e))
        losses.append(flow_loss(v, x0[:, :, s:e], noise[:, :, s:e]))
        net.remember(x0[:, :, s:e], causal.told(told, s, e))
    assert len(sigma.unique()) == 6                                         # and one a clip
    assert float(loss) == pytest.approx(float(sum(losses)) / 3, rel=1e-4)


def test_distillation_has_gradient_through_one_step_and_none_through_history(net):
    x0, told = clip(12)
    plan = draw_plan(random.Random(0), net.spec, 12, 0.0, 0.0)
    samples, finished = causal.self_rollout(net, told, x0[:, :, :plan.start], plan, net.spec, schedule(2, 3.0),
                                            torch.randn, 0)
    assert not finished.requires_grad and samples.shape == finished.shape == (2, 24, plan.frames, 4, 6)
    assert not any(kept.requires_grad for layer in net.cache for cache in layer for kept in cache)
    samples[:, :, plan.start:].sum().backward()
    assert net.model.blocks[0].self_attn.q.weight.grad.abs().sum() > 0
    net.model.zero_grad()


@torch.no_grad()
def test_what_is_remembered_in_training_is_what_playing_would_have_made(net):
    """Not the early x0 of the step with a gradient, which is what the loss sees."""
    x0, told = clip(12)
    plan = draw_plan(random.Random(0), net.spec, 12, 0.0, 0.0)
    noise = lambda: (lambda shape, g=torch.Generator().manual_seed(3): torch.randn(shape, generator=g))
    start, levels, spec = x0[:, :, :plan.start], schedule(2, 3.0), net.spec
    samples, finished = causal.self_rollout(net, told, start, plan, spec, levels, noise(), 0)
    played = causal.rollout(net, told, start, plan.frames, levels, spec.chunk, spec.window, noise())
    assert torch.equal(finished, played) and not torch.equal(samples, finished)


def test_the_learning_rate_falls_in_a_line_to_that_of_distillation():
    cfg = train_causal.Config(forcing=10, forcing_lr=3e-4, lr=1e-4)
    rates = [train_causal.learning_rate(step, cfg) for step in (0, 5, 10, 40)]
    assert rates == pytest.approx([3e-4, 2e-4, 1e-4, 1e-4])
    assert train_causal.learning_rate(0, train_causal.Config(forcing=0)) == pytest.approx(train_causal.Config.forcing_lr)


def test_it_refuses_what_it_cannot_cache():
    with pytest.raises(ValueError, match="control adaln or prope.*has plucker"):
        Causal(build("tiny", "plucker", dim=24, heads=2, ffn=32, layers=1))


def test_its_command_trains_resumes_and_can_be_evaluated(tmp_path, monkeypatch):
    def small(*a):
        torch.manual_seed(0)
        model = build("tiny", dim=24, heads=2, ffn=32, layers=1)
        for p in model.parameters():
            p.data.normal_(std=0.1)
        return model
    for module in (train_causal, evaluate):
        monkeypatch.setattr(module, "load", small)
    flags = ("--forcing 1 --steps 1 --critic_warmup 0 --forcing_batch 2 --batch 1 --pool 4 --critic_steps 1 --frames 8 "
             "--save_every 1 --log_every 1 --out").split() + [str(tmp_path)]
    log = checkpoint.Run.log

    def dying(self, step, **metrics):
        if step == 1:
            raise KeyboardInterrupt
        log(self, step, **metrics)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Run, "log", dying)
        train_causal.main(common.parse(train_causal.Config, flags))
    train_causal.main(common.parse(train_causal.Config, flags))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and "loss" in lines[0] and lines[1]["dmd"] > 0
    rows, files = evaluate.rows_of(evaluate.Config(causal=str(tmp_path / "student.safetensors"), student="none",
                                                   references=False), torch.device("cpu"))
    assert [row.name for row in rows] == ["causal, 4 steps"] and files[-1] == str(tmp_path / "student.safetensors")
    trips = evaluate.held_out(2, 5, 6)
    truth = trips.video()
    video = evaluate.dream(rows[0], evaluate.codec("tiny"), trips, truth, 0)
    assert video.shape == truth.shape and (video[:, :4].float() - truth[:, :4].float()).abs().mean() < 12
