"""Statistics of latents whose answer is known; the band of the real data; pictures of all networks."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import evaluate
import health
import metrics
from common import EMA
from encode import codec
from evaluate import Sampler
from health import Health, averaged, critic_by_sigma, curves, figures, side_by_side, statistics
from model import build
from rollout import velocity_of


def test_statistics_of_a_known_clip():
    """Frames that rise by 1, but by 3 into each chunk of four behind two real frames."""
    rise = torch.tensor([0.0, 1, 3, 1, 1, 1, 3, 1, 1, 1])                               # into frames 0..9
    x = rise.cumsum(0)[None, None, :, None, None].expand(2, 3, 10, 4, 5)
    figures = statistics(x, 2, 4)
    assert figures["motion"] == pytest.approx((2 * 3 + 6 * 1) / 8) and figures["seam"] == pytest.approx(3.0)
    new = rise.cumsum(0)[2:]
    assert figures["std"] == pytest.approx(float(new.repeat(120).std()), rel=1e-5)
    assert figures["saturation"] == new.max()                                           # of 8 levels, the top hundredth
    assert "seam" not in statistics(x[:, :, :4], 0, 4)                                  # one chunk, no border
    x = torch.randn(1, 1, 100, 10, 10, generator=torch.Generator().manual_seed(0))
    assert statistics(x, 0, 4)["saturation"] == pytest.approx(2.576, abs=0.1)           # 99 % of |N(0, 1)|


def test_the_critics_error_is_sorted_by_noise_level():
    error, sigma = torch.tensor([[1.0, 2.0], [5.0, 4.0]]), torch.tensor([[0.1, 0.9], [0.2, 1.0]])
    means = critic_by_sigma(list(zip(error, sigma)))
    assert means == {"critic_0.00": 3.0, "critic_0.75": 3.0}                            # empty bins are not made up


def look(made, real):
    return {("made", "std"): made, ("real", "std"): real, ("made", "motion"): 1.0, ("real", "motion"): 1.0}


def test_the_band_is_that_of_the_real_data():
    watch, g = Health(3.0), torch.Generator().manual_seed(0)
    draw = lambda mean: mean + 0.2 * float(torch.randn((), generator=g))
    for _ in range(60):
        ratios = watch.update(look(draw(1.3), draw(1.0)))                               # 1.5 spreads off
    assert watch.outside == 0 and ratios["std"] == pytest.approx(1.3, abs=0.15) and ratios["motion"] == 1
    assert "seam" not in ratios
    steps = 0
    while not watch.outside:
        watch.update(look(draw(2.0), draw(1.0)))                                        # 5 spreads off
        steps += 1
    assert 3 <= steps <= 20 and [c.split()[0] for c in watch.complaints()] == ["std"]
    for _ in range(15):
        watch.update(look(draw(1.0), draw(1.0)))
    assert watch.outside == 0                                                           # only steps in a row count
    watch.update(look(float("nan"), 1.0))
    assert watch.outside == 1


def test_the_first_steps_are_not_judged():
    watch = Health(3.0)
    for step in range(health.MADE_STEPS):
        watch.update(look(50.0, 1.0))
        assert bool(watch.outside) == (step == health.MADE_STEPS - 1)


def test_judgement_and_best_survive_in_the_state():
    watch, again = Health(3.0), Health(3.0)
    for _ in range(12):
        watch.update(look(50.0, 1.0))
    assert watch.improves(2.0) and not watch.improves(3.0) and watch.improves(1.0) and not watch.improves(1.0)
    again.load_state_dict(watch.state_dict())
    assert again.outside == watch.outside == 3 and not again.improves(1.5) and again.complaints() == watch.complaints()


def test_averaged_weights_are_lent_and_given_back():
    layer = nn.Linear(2, 1)
    ema = EMA(layer, 0.5)
    first = layer.weight.detach().clone()
    layer.weight.data.add_(1.0)
    with pytest.raises(KeyError), averaged(layer, ema):
        assert torch.equal(layer.weight, first)
        raise KeyError
    assert torch.equal(layer.weight, first + 1)


@pytest.fixture
def quick(monkeypatch):
    """Intervals are tested elsewhere and cost most of the time."""
    for module in (evaluate, metrics):
        monkeypatch.setattr(module, "bootstrap", lambda figure, count, draws=0: [figure(torch.arange(count))] * 3)


@pytest.fixture(scope="module")
def sampler():
    torch.manual_seed(0)
    return Sampler("student, 1 steps", build("tiny", layers=1, dim=24, heads=2, ffn=32), 1, 1.0, False)


def test_validation_is_the_same_at_every_call(sampler, quick):
    first, again = (figures(sampler, codec("tiny"), 3) for _ in range(2))
    assert first == again and first.keys() == {"val_frechet", "val_sharpness", "val_moving", "val_control"}


def test_truth_teacher_student_and_critic_stand_side_by_side(sampler, tmp_path):
    import imageio.v3 as iio
    teacher = sampler._replace(name="teacher, 1 steps", ode=True)
    at_work = []
    nets = SimpleNamespace(critic=velocity_of(sampler.model), using=lambda who: at_work.append(who) or nullcontext())
    side_by_side(tmp_path / "side.mp4", codec("tiny"), teacher, sampler, nets)
    assert at_work == [None, "student"]
    video = iio.imread(tmp_path / "side.mp4")
    assert video.shape == (36, 64 * 3, 4 * 96 * 3, 3)
    real = video[:3, :, 20:268].astype(float)                                           # all begin with them
    for panel in (1, 2, 3):
        assert abs(video[:3, 60:, 288 * panel + 20:288 * panel + 268] - real[:, 60:]).mean() < 12
    assert abs(video[20, 60:, 288 + 20:556].astype(float) - video[20, 60:, 20:268]).mean() > 12


def test_curves_show_every_logged_figure_once(tmp_path):
    lines = [{"step": 0, "seconds": 1.0, "critic": 2.0, "critic_updates": 5}, {"step": 1, "seconds": 2.0, "dmd": 1.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curves(tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 5_000
