"""Control: one truth for the actions of a clip, and what a network is told of them.

An action is a label `9 * translation + rotation`, one per latent frame, in the published order of BiWM
(arXiv:2606.10135): pitch before yaw. Label t is the motion from frame t-1 to frame t, so the first label of a clip is
"still". Cameras are in `camera.py`, the ways into a network in `inject.py`.

    python control.py "w-8, w+right-12"          # the labels of an action string
    python control.py poses.npy                  # the labels of a trajectory, and poses.png: the way seen from above
"""

import math
import re
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F

from camera import check_poses, draw, invert, pluecker, pose, read_cameras, relative  # `pluecker` for those outside
from common import digest
from inject import attach                                                             # `attach` too

# id -> (right, forward) and (up, right): what each digit of a label does
TRANSLATIONS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
ROTATIONS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
ACTIONS = 81
NO_ACTION = -1                      # a frame without control: the unconditional branch of guidance, or unknown motion

TRANSLATION_SHARE = 0.2             # a motion shorter than this share of the step is none
MEDIAN_SHARE = 0.05                 # the same when the step is not told: share of the clip's median motion
ROTATION_DEGREES = 0.5              # a turn smaller than this is none
CONE = math.cos(math.radians(60))   # within 60 degrees of an axis is along it; along two is diagonal
# Noted in weights and in shards: another as soon as a label means another motion.
ACTION_SPEC = f"{ACTIONS} actions, " + digest(TRANSLATIONS, ROTATIONS, CONE, TRANSLATION_SHARE, MEDIAN_SHARE,
                                              ROTATION_DEGREES)
KEYS = {"w": (0, 1, 0, 0), "s": (0, -1, 0, 0), "a": (-1, 0, 0, 0), "d": (1, 0, 0, 0), "still": (0, 0, 0, 0),
        "up": (0, 0, 1, 0), "down": (0, 0, -1, 0), "left": (0, 0, 0, -1), "right": (0, 0, 0, 1)}
SEGMENT = re.compile(r"([a-z0-9+]+)\s*[-*]\s*([0-9]+)")
LONGEST = 100_000                   # latent frames an action string may have: four hours


def check_actions(actions):
    """`actions` as int64 labels, or a ValueError that says what is wrong with them."""
    actions = torch.as_tensor(actions)
    if actions.numel() and (actions.is_floating_point() or actions.dtype == torch.bool):
        raise ValueError(f"actions are integer labels 0..{ACTIONS - 1}, got {actions.dtype}")
    if actions.numel() and not 0 <= int(actions.min()) <= int(actions.max()) < ACTIONS:
        raise ValueError(f"actions are labels 0..{ACTIONS - 1}, got {int(actions.min())}..{int(actions.max())}")
    return actions.long()


# ---- Actions ---------------------------------------------------------------------------------------------------------

def label_from_keys(keys):
    """Label of a set of pressed keys, e.g. {"w", "right"} -> 12. Opposite keys are an error."""
    for one, other in (("w", "s"), ("a", "d"), ("up", "down"), ("left", "right")):
        if one in keys and other in keys:
            raise ValueError(f"'{one}' and '{other}' contradict each other")
    if "still" in keys and len(keys) > 1:
        raise ValueError(f"'still' cannot be combined with '{'+'.join(sorted(set(keys) - {'still'}))}'")
    x, z, up, right = (sum(KEYS[k][i] for k in keys) for i in range(4))
    return 9 * TRANSLATIONS.index((x, z)) + ROTATIONS.index((up, right))


def keys_from_label(label):
    """The keys that make a label, e.g. 12 -> ["w", "right"]; [] for still and for NO_ACTION."""
    if label < 0:
        return []
    does = (*TRANSLATIONS[label // 9], *ROTATIONS[label % 9])
    return [key for key, effect in KEYS.items() if any(e and e == d for e, d in zip(effect, does))]


def parse_actions(text):
    """Labels int64 [T] of an action string; T = 1 + the sum of the counts, the first label is 0 (the start view).

    segment := keys ('-' | '*') count, keys := name ('+' name)* | label 0..80; segments are separated by commas. Counts
    are latent frames: "w-8, w+right-12, 38-4". Errors name the column (1 is the first character).
    """
    labels, counts, column, total = [0], [1], 1, 1
    for part in text.split(","):
        try:
            label, count = parse_segment(part.strip())
            if (total := total + count) > LONGEST:
                raise ValueError(0, f"with this there are {total} frames, the most are {LONGEST}")
        except ValueError as error:
            offset, message = error.args
            start = column + len(part) - len(part.lstrip())
            raise ValueError(f"action string, column {start + offset}: {message}") from None
        labels.append(label)
        counts.append(count)
        column += len(part) + 1
    return torch.tensor(labels).repeat_interleave(torch.tensor(counts))


@lru_cache(512)                     # a long string repeats itself
def parse_segment(segment):
    """(label, count) of one `keys-count` segment; ValueError(offset, message) says where it is wrong."""
    match = SEGMENT.fullmatch(segment)
    if not match:
        raise ValueError(0, f"'{segment[:40]}' is not keys-count, such as w-8, w+right-12 or 38-4")
    name, count = match.groups()
    if len(count) > 6 or int(count) < 1:
        raise ValueError(match.start(2), "a count is at least 1 and has at most 6 digits")
    if name.isdigit():
        if name != str(int(name[:3])) or int(name) >= ACTIONS:
            raise ValueError(0, f"label {name[:20]} is outside 0..{ACTIONS - 1}")
        return int(name), int(count)
    keys, offset = name.split("+"), 0
    for i, key in enumerate(keys):
        if key not in KEYS:
            raise ValueError(offset, f"unknown key '{key[:20]}'; the keys are {', '.join(KEYS)} or a label 0..80")
        if key in keys[:i]:
            raise ValueError(offset, f"'{key}' is pressed already")
        offset += len(key) + 1
    try:
        return label_from_keys({*keys}), int(count)
    except ValueError as error:
        raise ValueError(0, str(error)) from None


def format_actions(labels):
    """The action string of labels [T] (the first, of the start view, included): what `parse_actions` reads back."""
    return ", ".join(f"{'+'.join(keys_from_label(label)) or 'still'}-{len([*run])}"
                     for label, run in groupby(torch.as_tensor(labels)[1:].tolist()))


def yaw_first(actions):
    """Labels of our order in the one that puts yaw before pitch (HY-WorldPlay's), or back: the same permutation."""
    actions = check_actions(actions)
    return actions - actions % 9 + torch.tensor((0, 3, 4, 1, 2, 5, 7, 6, 8), device=actions.device)[actions % 9]


def flip_actions(actions):
    """Labels, or NO_ACTION, of the mirrored video: left and right change places in both digits."""
    mirror = torch.tensor((0, 1, 2, 4, 3, 6, 5, 8, 7), device=actions.device)
    return torch.where(actions < 0, actions, 9 * mirror[actions // 9] + mirror[actions % 9])


# ---- Poses and labels ------------------------------------------------------------------------------------------------

def motion(actions):
    """What labels [...] ask for: unit displacement (right, forward) [..., 2] and turn signs (up, right) [..., 2]."""
    move = torch.tensor(TRANSLATIONS, dtype=torch.float64, device=actions.device)[actions // 9]
    turn = torch.tensor(ROTATIONS, dtype=torch.float64, device=actions.device)[actions % 9]
    return move / move.norm(dim=-1, keepdim=True).clamp_min(1), turn


def poses_from_labels(actions, step, angle, tilt=0.0):
    """c2w float64 [..., T, 4, 4] of a camera that obeys `actions` [..., T] in free space, relative to frame 0.

    It moves `step` along its heading on the ground plane and then turns by `angle` degrees about each active axis.
    Before the first action it looks up by `tilt` degrees (a number or [...]).
    """
    move, turn = motion(check_actions(actions))
    turned = turn.cumsum(-2) * math.radians(angle)                                      # after each label
    pitch = turned[..., 0] + torch.as_tensor(tilt, dtype=turned.dtype).deg2rad()[..., None]
    yaw = turned[..., 1]
    before = yaw - turn[..., 1] * math.radians(angle)                                   # heading while it moves
    right, ahead = move[..., 0] * step, move[..., 1] * step
    x = (right * before.cos() + ahead * before.sin()).cumsum(-1)
    z = (ahead * before.cos() - right * before.sin()).cumsum(-1)
    return relative(pose(torch.stack([x, torch.zeros_like(x), z], -1), yaw, pitch))


def labels_from_poses(c2w, step=None, smooth=False):
    """Labels int64 [..., T] of the motions between successive cameras c2w [..., T, 4, 4]; the first label is 0.

    A motion counts as along an axis when it lies within 60 degrees of it, and as none below a fifth of `step`; without
    `step`, below 5 % of the clip's median motion, so a clip that never clearly moves has no scale and its jitter counts
    as motion: tell the step. `smooth` takes the majority of three frames, for estimated poses; a motion of a single
    frame, as in a walk of exact poses, would be lost.
    """
    c2w = check_poses(c2w)
    motions = invert(c2w[..., :-1, :, :]) @ c2w[..., 1:, :, :]                          # E_i [..., T-1, 4, 4]
    r, t = motions[..., :3, :3], motions[..., :3, 3]
    distance = t.norm(dim=-1)                                                           # [..., T-1]
    if step is not None or not distance.numel():
        threshold = TRANSLATION_SHARE * (step or 0)
    else:
        threshold = (MEDIAN_SHARE * distance.median(-1, keepdim=True).values).clamp_min(1e-6)
    cosine = t / distance.clamp_min(1e-12)[..., None]
    x, z = (torch.where(distance > threshold, sign(cosine[..., i], CONE), 0) for i in (0, 2))
    tau = math.radians(ROTATION_DEGREES)
    up = sign(torch.atan2(r[..., 2, 1], r[..., 2, 2]), tau)                             # R = R_z R_y R_x; + looks up
    right = sign(torch.asin((-r[..., 2, 0]).clamp(-1, 1)), tau)                         # + looks right

    digits = [lookup(TRANSLATIONS, x, z), lookup(ROTATIONS, up, right)]                 # each [..., T-1]
    if smooth:                                                  # two equal neighbours outvote what is between them
        for d in digits:
            before, after = d[..., :-2].clone(), d[..., 2:]
            d[..., 1:-1] = torch.where(before == after, before, d[..., 1:-1])
    return F.pad(9 * digits[0] + digits[1], (1, 0))


def sign(x, threshold):
    return (x > threshold).long() - (x < -threshold).long()


def lookup(table, first, second):
    """Position in `table` of the pairs (first, second) of signs."""
    grid = torch.zeros(3, 3, dtype=torch.long, device=first.device)
    for i, (a, b) in enumerate(table):
        grid[a + 1, b + 1] = i
    return grid[first + 1, second + 1]


def resample(actions, stride, new):
    """Labels [T] of latent frames of `stride` pixel frames each -> labels of latent frames of `new`, by pixel time.

    Where several labels fall into one frame, its label is that of the net motion: half w, half right is w+right.
    """
    pixels = check_actions(actions)[1:].repeat_interleave(stride)                       # one label a pixel frame
    if len(pixels) % new:
        raise ValueError(f"1 + {len(pixels)} pixel frames are no whole number of latent frames of {new}")
    pixels = pixels.reshape(-1, new)
    walks = poses_from_labels(F.pad(pixels, (1, 0)), 1.0, ROTATION_DEGREES / TRANSLATION_SHARE / new)
    return torch.cat([actions[:1], labels_from_poses(walks[:, [0, -1]], step=new)[:, 1]])


# ---- What a clip is told ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Control:
    """Control of a clip, one entry per latent frame; what is not known is None.

    `actions` int64 [B, T], NO_ACTION where a frame has no control at all, its camera included. `c2w` [B, T, 4, 4],
    relative to the first frame, and `K` [B, T, 3, 3], image-normalised, both float32.
    """
    actions: torch.Tensor | None = None
    c2w: torch.Tensor | None = None
    K: torch.Tensor | None = None

    def frames(self, start, stop):
        """Control of frames start..stop-1, cameras relative to the first of them."""
        parts = {name: part for name, part in vars(self).items() if part is not None}
        for name, part in parts.items():
            if not 0 <= start < stop <= part.shape[1]:
                raise ValueError(f"{name} reach {part.shape[1]} frames, not frames {start}..{stop - 1}")
            parts[name] = relative(part[:, start:stop]) if name == "c2w" else part[:, start:stop]
        return Control(**parts)

    def flip(self):
        """Control of the mirrored video (mirror the pixels before they are encoded)."""
        actions = None if self.actions is None else flip_actions(self.actions)
        if self.c2w is None:
            return Control(actions)
        mirror, K = self.c2w.new_tensor([-1, 1, 1, 1]), self.K.clone()
        K[..., 0, 2] = 1 - K[..., 0, 2]                                                 # the principal point
        return Control(actions, mirror[:, None] * self.c2w * mirror, K)

    def given(self):
        """1 on frames that have control, 0 on the others: [B, T, 1, 1]."""
        given = self.c2w[..., 3, 3] if self.actions is None else (self.actions >= 0).float()
        return given[..., None, None]


@dataclass(frozen=True)
class Condition:
    """What a velocity network is told besides noise: `text` (see `model.Spec`), `control` of the same T frames, the
    `past` before them (see `compress.Past`), and whether the first of them `begins` the video."""
    text: dict
    control: Control | None = None
    past: object | None = None
    begins: bool = True

    def frames(self, start, stop):
        """The condition of frames start..stop-1."""
        if start and self.past is not None:
            raise ValueError(f"the past of this condition ends before its frame 0, not before frame {start}")
        control = self.control and self.control.frames(start, stop)
        return replace(self, control=control, begins=self.begins and start == 0)

    def null(self, text):
        """The unconditional branch of guidance: the negative `text`, for every clip, and no control at all, behind the
        same past. A picture that the clips begin with is no part of the text: both branches see it."""
        B = max(map(len, self.text.values()), default=1)
        picture = {key: self.text[key] for key in ("vision", "vision_mask", "image") if key in self.text}
        text = {key: x.expand(B, *x.shape[1:]) for key, x in text.items()} | picture
        return replace(self, text=text, control=None)


def main(given, step=None, smooth=False):
    if not given.endswith((".npy", ".txt", ".json")):
        return print(*parse_actions(given).tolist())
    c2w, picture = read_cameras(given, size=(1, 1)).c2w, Path(given).with_suffix(".png")      # labels need no K
    labels = labels_from_poses(c2w, step, smooth)
    draw(c2w, [format_actions([0, label]).rpartition("-")[0] for label in labels.tolist()], picture)
    print(*labels.tolist())
    print(f"{format_actions(labels)}\nwrote {picture}")


if __name__ == "__main__":
    parser = ArgumentParser(description="The labels of an action string, or of a file of cameras, and its picture.")
    parser.add_argument("given", nargs="+", help="such as w-8, w+right-12, or a .npy, .txt or .json of cameras")
    parser.add_argument("--step", type=float, help="of the walker, in the file's unit; default: by the clip's median")
    parser.add_argument("--smooth", action="store_true", help="for estimated poses: no motion of a single frame")
    args = parser.parse_args()
    try:
        main(" ".join(args.given), args.step, args.smooth)
    except (ValueError, OSError) as error:
        sys.exit(f"control.py: {error}")
