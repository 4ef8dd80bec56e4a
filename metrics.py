"""What is measured of generated video against the exact world: pure functions of video, truth and trajectories.

Videos are uint8 [N, T, H, W, 3] and begin with START real frames; truth is what should be seen, through the codec as
everything that the networks see and make. Figures are {name: [value, low, high]}, with 95 % bootstrap intervals over
the N sequences. PSNR and SSIM to the truth prefer blur: they are sanity bounds; the Frechet distance orders samplers as
the eye does; sharpness and motion need each other, for flicker moves and blur is calm.
"""

import math

import torch
import torch.nn.functional as F

import world
from control import keys_from_label, motion
from model import PRESETS

CONTROL = ("translation", "rotation", "both")
CHUNK, SECOND = PRESETS["tiny"].chunk, world.FPS
START, TEN = CHUNK, 10 * SECOND                 # real frames a sequence begins with; frames of ten seconds
HORIZONS = (0.5, 1, 2, 4, 10, 20, 30, 60)       # seconds after the start at which the truth is looked at
TURNS = 6                                       # commands after the start that are told apart; later ones count as last
FIELD = 2 * math.degrees(math.atan(0.5 / world.FOCAL))                                  # of view in degrees, horizontal


# ---- One number per frame --------------------------------------------------------------------------------------------

def psnr(a, b):
    """[N, T] peak signal-to-noise ratio in dB of uint8 videos."""
    error = (a.double() - b.double()).square().mean((2, 3, 4)).clamp_min(1e-3)
    return 10 * torch.log10(255 ** 2 / error)


def ssim(a, b):
    """[N, T] structural similarity of the luma of uint8 videos (Wang et al. 2004): Gaussian window of 11, sigma 1.5."""
    shape, x = a.shape[:2], torch.arange(11.0, device=a.device) - 5
    g = torch.exp(-x ** 2 / (2 * 1.5 ** 2))
    window = (g[:, None] * g / g.sum() ** 2)[None, None]                                # [1, 1, 11, 11]
    luma = torch.tensor([0.299, 0.587, 0.114], device=a.device)
    a, b = ((v.float() @ luma).flatten(0, 1)[:, None] for v in (a, b))                  # each [N*T, 1, H, W]
    mean = lambda y: F.conv2d(y, window)
    ma, mb, c1, c2 = mean(a), mean(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    score = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))
    return score.mean((1, 2, 3)).view(shape)


def gradient(video):
    """[N, T] mean absolute spatial gradient: sharpness."""
    return sum(video.float().diff(dim=axis).abs().mean((2, 3, 4)) for axis in (2, 3))


def change(video):
    """[N, T-1] mean absolute difference of successive frames: motion."""
    return video.float().diff(dim=1).abs().mean((2, 3, 4))


def saturation(video):
    """[N, T] mean difference of the largest and smallest of the three colours: over-exposure changes it."""
    return (video.amax(-1).float() - video.amin(-1).float()).mean((2, 3))


def each(metric, device, *videos):
    """`metric` of videos, 32 sequences at a time on `device`, where it is fast; the result comes back."""
    return torch.cat([metric(*(part.to(device) for part in parts)).cpu()
                      for parts in zip(*(v.split(32) for v in videos))])


# ---- Distances and intervals -----------------------------------------------------------------------------------------

def frechet(a, b):
    """Frechet distance of Gaussian fits to features [n, d] (FID, arXiv:1706.08500); only equal n compare."""
    (ma, ca), (mb, cb) = ((x.mean(0), torch.cov(x.T)) for x in (a, b))
    values, vectors = torch.linalg.eigh(ca)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T                             # symmetric square root of ca
    cross = torch.linalg.eigvalsh(root @ cb @ root).clamp_min(0).sqrt().sum()
    return float((ma - mb).square().sum() + ca.trace() + cb.trace() - 2 * cross)


def bootstrap(figure, count, draws=200):
    """`figure(index)` of all `count` sequences, and 1.96 standard deviations over resampled ones: [value, low, high].
    Percentiles would be biased for the Frechet distance, which grows when sequences repeat."""
    g = torch.Generator().manual_seed(0)
    values = torch.tensor([figure(torch.randint(count, (count,), generator=g)) for _ in range(draws)]).double()
    value, half = figure(torch.arange(count)), 1.96 * float(values.std())
    return [value, value - half, value + half]


def ratio(part, whole, scale=1.0):
    """`scale` * sum of part / sum of whole, both [N], with an interval over the sequences that have any of it."""
    part, whole = part[whole > 0].double(), whole[whole > 0].double()
    return bootstrap(lambda i: scale * float(part[i].sum() / whole[i].sum()), len(whole))


def where(value, use, scale=1.0):
    """Mean of value [N, T] where use [N, T], with an interval: [] when it is nowhere."""
    return [ratio((value * use).sum(1), use.sum(1), scale)] if use.any() else []


# ---- Control: does the dream move as it was told? --------------------------------------------------------------------

def obedience(read, trips):
    """Share of obeyed commands and error of the motion, from the classes `read` [N, T-1, 2] in each pair of frames.

    "all" are unblocked frames, "with blocked" every one; a command is obeyed when the motion read is the label of what
    happened. Errors are those of the relative pose from one frame to the next: cells and degrees.
    """
    read, wanted, free = read[:, START - 1:], trips.actions[:, START:], ~trips.blocked[:, START:]       # [N, t]
    right = torch.stack([read[..., 0] == wanted // 9, read[..., 1] == wanted % 9], -1).double()
    asked, done = motion(wanted), motion(9 * read[..., 0] + read[..., 1])
    error = [size * (a - b).norm(dim=-1) for size, a, b in zip((world.STEP, world.ANGLE), asked, done)]
    turn = 1 + (wanted.diff(dim=1, prepend=wanted[:, :1]) != 0).cumsum(1)              # which command since the start
    uses = {"1s": free & (torch.arange(free.shape[1]) < SECOND), "all": free, "with blocked": free | True}
    uses |= {f"turn {k}": free & (turn.clamp(max=TURNS) == k) for k in range(1, TURNS + 1)}
    rows = {f"{axis} {name}": where(ok, use, 100) for name, use in uses.items()
            for axis, ok in zip(CONTROL, (right[..., 0], right[..., 1], right.prod(-1)))}
    for name, use in uses.items():
        rows |= {f"{unit} off {name}": where(e, use) for unit, e in zip(("cells", "degrees"), error)}
    for axis, (kind, digit) in enumerate((("move", wanted // 9), ("turn", wanted % 9))):
        for i in range(9):
            name = f"{kind}: {'+'.join(keys_from_label((9, 1)[axis] * i)) or 'none'}"
            rows |= {name: where(right[..., axis], free & (digit == i), 100),
                     f"{name}, {('cells', 'degrees')[axis]} off": where(error[axis], free & (digit == i))}
    return {name: row[0] for name, row in rows.items() if row}


def travel(labels, state):
    """State [N, 4] of a walker in free space after labels [N, S] from `state` [N, 4] = x, z, yaw, pitch (degrees)."""
    step, turn = motion(labels)                                                         # right, forward; up, right
    yaw = (state[:, None, 2] + world.ANGLE * (turn[..., 1].cumsum(1) - turn[..., 1])).deg2rad()
    x = world.STEP * (step[..., 0] * yaw.cos() + step[..., 1] * yaw.sin()).sum(1)
    z = world.STEP * (step[..., 1] * yaw.cos() - step[..., 0] * yaw.sin()).sum(1)
    pitch, right = (world.ANGLE * turn.sum(1)).unbind(-1)
    return state + torch.stack([x, z, right, pitch], 1)


def pose_error(read, trips, seconds=1):
    """Relative pose error over each whole `seconds` without a wall: {"cells off in 1s", "degrees off in 1s"}."""
    S, errors, uses = seconds * SECOND, [], []
    for t in range(START - 1, read.shape[1] - S + 1, S):
        end = travel(9 * read[:, t:t + S, 0] + read[:, t:t + S, 1], trips.states[:, t])
        off = end - trips.states[:, t + S]
        off[:, 2] = (off[:, 2] + 180) % 360 - 180
        errors.append(torch.stack([off[:, :2].norm(dim=1), off[:, 2:].norm(dim=1)], 1))
        uses.append(~trips.blocked[:, t + 1:t + S + 1].any(1))
    if not errors:
        return {}
    errors, use = torch.stack(errors, 1), torch.stack(uses, 1)                          # [N, windows, 2]
    names = f"cells off in {seconds}s", f"degrees off in {seconds}s"
    return {name: row for i, name in enumerate(names) for row in where(errors[..., i], use)}


# ---- Everything about one rollout ------------------------------------------------------------------------------------

def measure(video, truth, trips, probe, seen=None):
    """Figures of generated `video` against `truth`, both uint8 [N, START + T, H, W, 3]; `seen`: what the probe reads in
    them, if that is known."""
    N, T, device = *video.shape[:2], probe.head.weight.device
    (read, features), (_, real) = seen or (probe.read(video), probe.read(truth))
    figures = obedience(read, trips) | pose_error(read, trips)

    near = slice(START - 1 + SECOND // 2, START - 1 + SECOND)                           # 0.5 to 1 s after the start
    a, b = features[:, near], real[:, near]
    figures["frechet"] = bootstrap(lambda i: frechet(a[i].flatten(0, 1), b[i].flatten(0, 1)), N)
    new, early = T - START, max(1, round(0.15 * (T - START)))
    for name, look in (("sharpness", gradient), ("motion", change), ("saturation", saturation)):
        made, true = (each(look, device, v)[:, -new:].double() for v in (video, truth))                # [N, new]
        figures[name] = ratio(made.sum(1), true.sum(1))
        part = lambda i, k, x=made, y=true: float(x[i][:, k].mean() / y[i][:, k].mean())
        figures[f"drift of {name}"] = bootstrap(                                        # FramePack's, relative to real
            lambda i, part=part: abs(part(i, slice(-early, None)) - part(i, slice(early))), N)
        if name == "motion" and made.any():                                             # a frozen picture has no seam
            border = torch.arange(new) % CHUNK == 0                                     # into a chunk's first frame
            figures["seam"] = bootstrap(lambda i, part=part: part(i, border) / part(i, ~border), N)
    at = {s: START - 1 + int(s * SECOND) for s in HORIZONS if START - 1 + int(s * SECOND) < T}
    for name, look in (("psnr", psnr), ("ssim", ssim)):
        value = each(look, device, video[:, [*at.values()]], truth[:, [*at.values()]])  # [N, horizons]
        figures |= {f"{name} {s:g}s": where(value[:, k:k + 1], torch.ones(N, 1))[0] for k, s in enumerate(at)}
    return figures


def drift(video, truth, trips, probe, seen=None):
    """{"a-b s": figures} of each ten seconds of `video` against the same ten of `truth`; Frechet over all of them.
    `seen` as for `measure`."""
    rows, seen = {}, seen or (probe.read(video), probe.read(truth))
    for a in range(0, video.shape[1] - START, TEN):
        part = slice(a, a + START + TEN)                                                # measure() skips START frames
        made, real = video[:, part], truth[:, part]
        pairs = [[x[:, a:a + START + TEN - 1] for x in both] for both in seen]          # of successive frames
        ours, theirs = (features[:, START - 1:] for _, features in pairs)               # [N, TEN, 128]
        rows[f"{a // SECOND}-{(a + made.shape[1] - START) // SECOND} s"] = {
            **measure(made, real, trips.frames(a, a + START + TEN), probe, pairs),
            "frechet": bootstrap(lambda i: frechet(ours[i].flatten(0, 1), theirs[i].flatten(0, 1)), len(made), 50)}
    return rows


# ---- Memory and diversity --------------------------------------------------------------------------------------------

def revisits(states, gap=SECOND):
    """[N, T] the first frame seen from the pose of each one and at least `gap` before it; -1 where there is none."""
    apart = (states[:, :, None] - states[:, None]).abs()                                # [N, T, T, 4]
    apart[..., 2] = torch.minimum(apart[..., 2], 360 - apart[..., 2])
    t = torch.arange(states.shape[1])
    same = (apart < 1e-6).all(-1) & (t[:, None] - t >= gap) & (t[:, None] >= START)
    return torch.where(same.any(2), same.int().argmax(2), -1)


def alike(states, degrees=30.0, cells=0.5):
    """[N, T, T] pairs of frames of a trajectory that show about the same view."""
    apart = states[:, :, None] - states[:, None]
    turned = (apart[..., 2] + 180) % 360 - 180
    return (turned.abs() < degrees) & (apart[..., :2].norm(dim=-1) < cells)


def consistency(video, truth, states, device="cpu"):
    """Where a walk returns to an earlier pose: PSNR and SSIM of the dream to its own earlier frame, and to the truth.

    "recognised": the share of these frames whose nearest view (mean squared error of pictures of 8x8 blocks), among
    the exact views of all of the walk, is one from about that place and heading. Chance is the share of such views.
    """
    back = revisits(states)                                                             # [N, T]
    use, own = back >= 0, video[torch.arange(len(video))[:, None], back.clamp_min(0)]
    figures = {f"{name} to {whom}": row for name, look in (("psnr", psnr), ("ssim", ssim))
               for whom, other in (("itself", own), ("truth", truth))
               for row in where(each(look, device, video, other), use)}
    small = lambda v: F.avg_pool3d(v.float().permute(0, 4, 1, 2, 3), (1, 8, 8)).transpose(1, 2).flatten(2)
    view = torch.cdist(*(each(small, device, v) for v in (video, truth))).argmin(2, keepdim=True)       # [N, T, 1]
    close = alike(states)
    seen = close.gather(2, view)[..., 0].double()
    return figures | {name: row for name, x in (("recognised", seen), ("recognised by chance", close.double().mean(2)))
                      for row in where(x, use, 100)}


def unseen(yaw, width):
    """[N, T, W] the columns of a picture that look past what the START frames showed, for headings `yaw` [N, T]."""
    ray = torch.rad2deg(torch.atan(((torch.arange(width) + 0.5) / width - 0.5) / world.FOCAL))
    turned = yaw[:, :, None, None] - yaw[:, None, :START, None] + ray                   # [N, T, START, W]
    return (((turned + 180) % 360 - 180).abs() > FIELD / 2).all(2)


def spread(dreams, yaw, device="cpu"):
    """Diversity: standard deviation over dreams [S, N, T, H, W, 3] of one start, where that shows nothing of the view;
    with an interval, as `where`: [] when it shows all there is."""
    hidden = unseen(yaw, dreams.shape[4])                                               # [N, T, W]
    deviation = each(lambda *v: torch.stack(v).float().std(0).mean((2, 4)), device, *dreams) * hidden
    return [ratio(deviation.sum((1, 2)), hidden.sum((1, 2)))] if hidden.any() else []


# ---- Tables ----------------------------------------------------------------------------------------------------------

def over_seeds(seeds):
    """Several seeds' {row: {figure: [value, low, high]}} as one: means, with the interval of a mean of independents."""
    def mean(figures):
        value, half = sum(f[0] for f in figures) / len(figures), sum(((f[2] - f[1]) / 2) ** 2 for f in figures) ** 0.5
        return [value, value - half / len(figures), value + half / len(figures)]
    return {row: {name: mean([seed[row][name] for seed in seeds if name in seed[row]]) for name in figures}
            for row, figures in seeds[0].items()}


def table(results, columns, what="sampler"):
    """Markdown: a row per sampler, value and half-width of the 95 % interval."""
    def cell(figure):
        value, low, high = figure
        return f"{value:.3g} ±{(high - low) / 2:.2g}" if high > low else f"{value:.3g}"
    rows = [" | ".join([name, *(cell(row[c]) if c in row else "-" for c in columns)]) for name, row in results.items()]
    return "\n".join([f"| {what} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|",
                      *(f"| {row} |" for row in rows)])


def sweep(report):
    """Markdown of results that were made by hand, with the commands that made them."""
    rows = report["rows"]
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    return (f"**{report['title']}**\n\n{table(rows, [*columns], 'row')}\n\n`{report['train']}`, "
            f"`{report['evaluate']}`: {report['sequences']}; {report['device']}, torch {report['torch']}, "
            f"commit {report['commit']}.")
