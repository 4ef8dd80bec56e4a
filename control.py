"""Control: one truth for actions and cameras, and the module that injects them into a video transformer.

An action is a label `9 * translation + rotation`, one per latent frame; label t is the motion from frame t-1 to frame
t, so the first label of a clip is "still". A camera is c2w, OpenCV axes (x right, y down, z forward). Both tables are
in the published order of BiWM (arXiv:2606.10135): pitch before yaw.

    python control.py "w-8, w+right-12"          # the labels of an action string
"""

import math
import re
import sys
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import nn

# id -> (right, forward) and (up, right): what each digit of a label does
TRANSLATIONS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
ROTATIONS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
TRANSLATION_NAMES = ("none", "forward", "back", "right", "left",
                     "forward+right", "forward+left", "back+right", "back+left")
ROTATION_NAMES = ("none", "up", "down", "right", "left", "up+right", "up+left", "down+right", "down+left")
KEYS = {"w": (0, 1, 0, 0), "s": (0, -1, 0, 0), "d": (1, 0, 0, 0), "a": (-1, 0, 0, 0), "still": (0, 0, 0, 0),
        "up": (0, 0, 1, 0), "down": (0, 0, -1, 0), "right": (0, 0, 0, 1), "left": (0, 0, 0, -1)}
ACTIONS = 81
NO_ACTION = -1                      # a frame without control: the unconditional branch of guidance, or unknown motion

TRANSLATION_SHARE = 0.2             # a motion shorter than this share of the step is none
MEDIAN_SHARE = 0.05                 # the same when the step is not told: share of the clip's median motion
ROTATION_DEGREES = 0.5              # a turn smaller than this is none
CONE = math.cos(math.radians(60))  # within 60 degrees of an axis is along it; along two is diagonal


def label_from_keys(keys):
    """Label of a set of pressed keys, e.g. {"w", "right"} -> 12. Opposite keys are an error."""
    keys = sorted(keys)
    for one, other in (("w", "s"), ("a", "d"), ("up", "down"), ("left", "right")):
        if one in keys and other in keys:
            raise ValueError(f"'{one}' and '{other}' contradict each other")
    if "still" in keys and len(keys) > 1:
        raise ValueError(f"'still' cannot be combined with '{'+'.join(k for k in keys if k != 'still')}'")
    x, z, up, right = (sum(KEYS[k][i] for k in keys) for i in range(4))
    return 9 * TRANSLATIONS.index((x, z)) + ROTATIONS.index((up, right))


def keys_from_label(label):
    """The keys that make a label, e.g. 12 -> ["w", "right"]; [] for still and for NO_ACTION."""
    if label < 0:
        return []
    (x, z), (up, right) = TRANSLATIONS[label // 9], ROTATIONS[label % 9]
    pressed = [("w", z > 0), ("s", z < 0), ("d", x > 0), ("a", x < 0),
               ("up", up > 0), ("down", up < 0), ("right", right > 0), ("left", right < 0)]
    return [key for key, down in pressed if down]


def parse_actions(text):
    """Labels int64 [T] of an action string; T = 1 + the sum of the counts, the first label is 0 (the start view).

    segment := keys ('-' | '*') count, keys := name ('+' name)* | label 0..80; segments are separated by commas. Counts
    are latent frames: "w-8, w+right-12, 38-4". Errors name the column (1 is the first character).
    """
    labels, column = [0], 1
    for part in text.split(","):
        start = column + len(part) - len(part.lstrip())
        labels += _segment(part.strip(), start)
        column += len(part) + 1
    return torch.tensor(labels)


def _segment(segment, column):
    """The labels of one `keys-count` segment that starts at `column`."""
    def fail(offset, message):
        raise ValueError(f"action string, column {column + offset}: {message}")

    match = re.fullmatch(r"([a-z0-9+]+)\s*[-*]\s*(\d{1,6})", segment)
    if not match:
        fail(0, f"'{segment[:40]}' is not keys-count, such as w-8, w+right-12 or 38-4")
    keys, count = match[1], int(match[2])
    if count < 1:
        fail(match.start(2), "a count is at least 1")
    if keys.isdigit():
        if int(keys) >= ACTIONS:
            fail(0, f"label {keys[:20]} is outside 0..{ACTIONS - 1}")
        return [int(keys)] * count
    offset = 0
    for name in keys.split("+"):
        if name not in KEYS:
            fail(offset, f"unknown key '{name[:20]}'; the keys are {', '.join(KEYS)} or a label 0..80")
        offset += len(name) + 1
    try:
        return [label_from_keys(set(keys.split("+")))] * count
    except ValueError as error:
        fail(0, str(error))


def action_string(labels):
    """The inverse of `parse_actions`, except that it is given no first label: the action string of `labels` [T]."""
    runs = [("+".join(keys_from_label(label)) or "still", len([*run])) for label, run in groupby(labels)]
    return ", ".join(f"{keys}-{count}" for keys, count in runs)


def check_actions(actions):
    """`actions` as int64 labels, or a ValueError that says what is wrong with them."""
    actions = torch.as_tensor(actions)
    if actions.numel() and (actions.is_floating_point() or actions.dtype == torch.bool):
        raise ValueError(f"actions are integer labels 0..{ACTIONS - 1}, got {actions.dtype}")
    if actions.numel() and not 0 <= int(actions.min()) <= int(actions.max()) < ACTIONS:
        raise ValueError(f"actions are labels 0..{ACTIONS - 1}, got {int(actions.min())}..{int(actions.max())}")
    return actions.long()


# ---- Cameras ---------------------------------------------------------------------------------------------------------

def pose(position, yaw, pitch):
    """c2w [..., 4, 4] of a camera at `position` [..., 3], turned right by `yaw` and up by `pitch` [...] (radians)."""
    cy, sy, cp, sp = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)
    rows = [cy, sy * sp, sy * cp, position[..., 0],                                     # R_y(yaw) R_x(pitch), y is down
            zero, cp, -sp, position[..., 1],
            -sy, cy * sp, cy * cp, position[..., 2],
            zero, zero, zero, one]
    return torch.stack(rows, -1).unflatten(-1, (4, 4))


def motion(actions):
    """What labels [...] ask for: unit displacement (right, forward) [..., 2] and turn signs (up, right) [..., 2]."""
    move = torch.tensor(TRANSLATIONS, dtype=torch.float64, device=actions.device)[actions // 9]
    turn = torch.tensor(ROTATIONS, dtype=torch.float64, device=actions.device)[actions % 9]
    return move / move.norm(dim=-1, keepdim=True).clamp_min(1), turn


def poses_from_labels(actions, step, angle):
    """c2w float64 [..., T, 4, 4] of a camera that obeys `actions` [..., T] in free space, relative to frame 0.

    It moves `step` along its heading on the ground plane and then turns by `angle` degrees about each active axis.
    """
    move, turn = motion(check_actions(actions))
    turned = turn.cumsum(-2) * math.radians(angle)                                      # after each label
    pitch, yaw = turned[..., 0], turned[..., 1]
    before = yaw - turn[..., 1] * math.radians(angle)                                   # heading while it moves
    right, ahead = move[..., 0] * step, move[..., 1] * step
    x = (right * before.cos() + ahead * before.sin()).cumsum(-1)
    z = (ahead * before.cos() - right * before.sin()).cumsum(-1)
    return relative(pose(torch.stack([x, torch.zeros_like(x), z], -1), yaw, pitch))


def invert(c2w):
    """Inverse of rigid transforms [..., 4, 4]: (R, t) -> (R^T, -R^T t)."""
    rotation = c2w[..., :3, :3].mT
    top = torch.cat([rotation, -rotation @ c2w[..., :3, 3:]], -1)
    return torch.cat([top, c2w[..., 3:, :]], -2)


def relative(c2w):
    """Cameras [..., T, 4, 4] expressed in the axes of their first frame."""
    return invert(c2w[..., :1, :, :]) @ c2w


def labels_from_poses(c2w, step=None):
    """Labels int64 [..., T] of the motions between successive cameras c2w [..., T, 4, 4]; the first label is 0.

    A motion counts as along an axis when it lies within 60 degrees of it, and as none below a fifth of `step`; without
    `step`, below 5 % of the clip's median motion, so a clip that never clearly moves has no scale: tell the step.
    """
    c2w = torch.as_tensor(c2w).double()
    if c2w.shape[-2:] != (4, 4) or c2w.ndim < 3:
        raise ValueError(f"cameras are c2w [..., T, 4, 4], got {list(c2w.shape)}")
    if not torch.isfinite(c2w).all():
        raise ValueError(f"camera {int((~c2w.isfinite()).flatten(-2).any(-1).nonzero()[0, -1])} is not finite")
    between = invert(c2w[..., :-1, :, :]) @ c2w[..., 1:, :, :]                          # E_i [..., T-1, 4, 4]
    t = between[..., :3, 3]
    distance = t.norm(dim=-1)
    if step is None:
        threshold = (MEDIAN_SHARE * distance.median(-1, keepdim=True).values).clamp_min(1e-6)
    else:
        threshold = TRANSLATION_SHARE * step
    cosine = t / distance.clamp_min(1e-12)[..., None]
    moved = distance > threshold
    x = torch.where(moved, (cosine[..., 0] > CONE).long() - (cosine[..., 0] < -CONE).long(), 0)
    z = torch.where(moved, (cosine[..., 2] > CONE).long() - (cosine[..., 2] < -CONE).long(), 0)

    r, tau = between[..., :3, :3], math.radians(ROTATION_DEGREES)
    rx = torch.atan2(r[..., 2, 1], r[..., 2, 2])                                        # R = R_z R_y R_x; + looks up
    ry = torch.asin((-r[..., 2, 0]).clamp(-1, 1))                                       # + looks right
    up, right = (rx > tau).long() - (rx < -tau).long(), (ry > tau).long() - (ry < -tau).long()

    labels = 9 * _index(TRANSLATIONS, x, z) + _index(ROTATIONS, up, right)
    return torch.cat([torch.zeros_like(labels[..., :1]), labels], -1)


def _index(table, first, second):
    """Position in `table` of the pairs (first, second) of signs."""
    grid = torch.zeros(3, 3, dtype=torch.long, device=first.device)
    for i, (a, b) in enumerate(table):
        grid[a + 1, b + 1] = i
    return grid[first + 1, second + 1]


# ---- Injection -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Control:
    """Control of a clip, one entry per latent frame. `actions` int64 [B, T], NO_ACTION where there is none."""
    actions: torch.Tensor


@dataclass(frozen=True)
class Condition:
    """What a velocity network is told besides noise: `text` (see `model.Spec`), `control` of the same T frames."""
    text: dict
    control: Control | None = None

    def frames(self, start, stop):
        """The condition of frames start..stop-1."""
        if self.control is None:
            return self
        if not 0 <= start < stop <= self.control.actions.shape[1]:
            raise ValueError(f"actions reach {self.control.actions.shape[1]} frames, not frames {start}..{stop - 1}")
        return replace(self, control=Control(self.control.actions[:, start:stop]))

    def null(self, text):
        """The unconditional branch of guidance: the negative `text` and no control at all."""
        return Condition(text, None)


class ActionEmbedding(nn.Module):
    """`adaln`: two learned tables, translation and rotation, added to each frame's time embedding.

    BiWM embeds the label as one number; two tables let unseen combinations compose. Both start at zero, so an
    untrained control changes nothing, and both receive gradient from the first step.
    """

    def __init__(self, dim):
        super().__init__()
        self.translation = nn.Parameter(torch.zeros(9, dim))
        self.rotation = nn.Parameter(torch.zeros(9, dim))

    def forward(self, control):                                                         # -> [B, T, D]
        a, digits = control.actions[..., None], torch.arange(9, device=control.actions.device)
        move, turn = (a // 9 == digits) & (a >= 0), (a % 9 == digits) & (a >= 0)  # one-hot [B, T, 9]; no action, no row
        return move.float() @ self.translation + turn.float() @ self.rotation


def attach(backbone, kind="adaln"):
    """Give `backbone` the parameters of a control kind, zero-initialised, under the name `control`."""
    if kind != "adaln":
        raise ValueError(f"unknown control '{kind}'; choose adaln")
    backbone.control = ActionEmbedding(backbone.spec.dim).to(next(backbone.parameters()).device)
    return backbone


if __name__ == "__main__":
    try:
        print(*parse_actions(" ".join(sys.argv[1:])).tolist())
    except ValueError as error:
        sys.exit(f"control.py: {error}")
