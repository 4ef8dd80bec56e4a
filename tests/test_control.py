"""Actions and cameras: one truth, and errors that say where."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import control
from control import Control, labels_from_poses, parse_actions, poses_from_labels
from model import build

ALL = torch.arange(81)


def test_published_labels():
    for keys, label in {("w",): 9, ("s",): 18, ("d",): 27, ("a",): 36, ("up",): 1, ("down",): 2, ("right",): 3, ("left",): 4,
                        ("still",): 0, ("w", "right"): 12, ("w", "d"): 45, ("s", "a", "down", "left"): 80}.items():
        assert control.label_from_keys(set(keys)) == label
        assert set(control.keys_from_label(label)) == set(keys) - {"still"}


def test_grammar():
    assert parse_actions("w-8, right-12, s-6").tolist() == [0] + [9] * 8 + [3] * 12 + [18] * 6
    assert parse_actions("w+right*2,38-3 , still-1").tolist() == [0, 12, 12, 38, 38, 38, 0]
    assert parse_actions("80-1").dtype == torch.int64


@given(st.lists(st.integers(0, 80), min_size=1))
def test_an_action_string_parses_back(labels):
    assert parse_actions(control.action_string(labels)).tolist() == [0, *labels]


@pytest.mark.parametrize("text, column, words", [
    ("w-8, rihgt-3", 6, "unknown key 'rihgt'"), ("w-8, w+up+x-3", 11, "unknown key 'x'"), ("w-0", 3, "at least 1"),
    ("w-8,, s-2", 5, "not keys-count"), ("81-2", 1, "outside 0..80"), ("w+s-3", 1, "contradict"), ("", 1, "not keys-count"),
    ("w-8 s-2", 1, "not keys-count"), ("w8", 1, "not keys-count"), ("still+w-3", 1, "cannot be combined"), ("w--3", 1, "not keys-count")])
def test_grammar_errors_name_the_column(text, column, words):
    with pytest.raises(ValueError, match=f"column {column}: .*{words}"):
        parse_actions(text)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="wsad0123456789+-*, uprightl\n\x00é", max_size=40))
def test_the_grammar_either_parses_or_says_where(text):
    try:
        assert parse_actions(text)[0] == 0
    except ValueError as error:
        assert "column" in str(error)


def test_every_motion_reads_back_as_its_label():
    actions = torch.stack([torch.zeros_like(ALL), ALL], 1)                              # [81, 2]
    c2w = poses_from_labels(actions, step=0.2, angle=7.5)
    assert torch.equal(labels_from_poses(c2w, step=0.2), actions)


def test_motions_read_back_from_a_long_jittery_walk():
    g = torch.Generator().manual_seed(0)
    actions = torch.randint(81, (64, 40), generator=g)
    actions[:, 0] = 0
    c2w = poses_from_labels(actions, 0.2, 2.0)
    c2w[..., :3, 3] += 0.002 * torch.randn(64, 40, 3, generator=g)                      # 1 % of the step
    level = (torch.asin(-c2w[..., 1, 2]).abs() < math.radians(30)).all(-1)              # pitch as seen by the camera
    assert level.sum() > 32
    assert torch.equal(labels_from_poses(c2w, step=0.2)[level], actions[level])


def test_signs():
    def forward(label):
        return poses_from_labels(torch.tensor([0, label]), 1.0, 10.0)[1]
    assert forward(9)[2, 3] == 1 and forward(27)[0, 3] == 1                             # w: +z; d: +x
    assert forward(1)[1, 2] < 0 and forward(3)[0, 2] > 0             # up: the view rises (y is down); right: towards +x
    c2w = poses_from_labels(torch.tensor([0, 3, 3, 9]), 1.0, 45.0)
    torch.testing.assert_close(c2w[3, :3, 3], torch.tensor([1.0, 0, 0]).double(), atol=1e-12, rtol=0)  # right, right, w: along +x


def test_bad_cameras_and_actions():
    bad = torch.eye(4).repeat(3, 1, 1)
    bad[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="camera 2 is not finite"):
        labels_from_poses(bad)
    with pytest.raises(ValueError, match="c2w"):
        labels_from_poses(torch.eye(3))
    with pytest.raises(ValueError, match="0..80"):
        control.check_actions([3, 81])
    with pytest.raises(ValueError, match="integer"):
        control.check_actions([0.5])


def test_untrained_control_changes_nothing_and_can_learn():
    torch.manual_seed(0)
    model = build("tiny", layers=2)
    torch.nn.init.normal_(model.head.head.weight)                              # the official init would hide everything
    x, sigma, text = torch.randn(2, 24, 41, 4, 4), torch.rand(2, 41), {"text": torch.randn(2, 5, 64)}
    actions = Control(torch.arange(82).reshape(2, 41) % 81)
    plain = model(x, sigma, text)
    controlled = model(x, sigma, text, actions)
    assert torch.equal(plain, controlled)                                               # bit for bit
    controlled.square().mean().backward()
    for name, p in model.control.named_parameters():
        assert torch.isfinite(p.grad).all() and (p.grad.abs().amax(1) > 0).all(), name  # every row of both tables


def test_no_action_is_the_plain_model_and_differs_from_still():
    model = build("tiny", layers=1)
    torch.nn.init.normal_(model.head.head.weight)
    torch.nn.init.normal_(model.control.translation)
    x, sigma, text = torch.randn(1, 24, 2, 4, 4), torch.rand(1, 2), {"text": torch.randn(1, 5, 64)}
    none = model(x, sigma, text, Control(torch.full((1, 2), control.NO_ACTION)))
    assert torch.equal(none, model(x, sigma, text))
    assert not torch.equal(none, model(x, sigma, text, Control(torch.zeros(1, 2, dtype=torch.long))))
