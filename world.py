"""The embedded world: exact cameras, exact re-rendering of any action sequence.

Four maps of rooms seen by a pinhole camera; picture, camera and label are functions of one state, so control and drift
are measured, not judged. Lengths are in cells, angles in degrees; x is right, y down, z forward; eyes at y = 0, floors
at 0.5, tops of walls at -0.5. `python world.py --out sheet.png` draws a plan and six views of each map.
"""

import argparse
from functools import cache
from itertools import accumulate, product
from types import SimpleNamespace

import torch

import control

FRAME, FPS = (64, 96), 8        # H, W in pixels; one action is one frame
FOCAL = 0.6                     # focal length in picture widths, 79.6 degrees; pixels are square
K = torch.tensor([[FOCAL, 0, 0.5], [0, FOCAL * FRAME[1] / FRAME[0], 0.5], [0, 0, 1]])   # image-normalised
STEP, ANGLE, PITCH = 0.2, 7.5, 22.5     # cells and degrees a frame; the camera tilts no further than PITCH
BODY, SHORT = 0.3, 0.9          # half the side of the walker; a move of less than SHORT * STEP counts as blocked
# # is a wall, * a wall with an emblem, a..d a cell of that room, A..D the cell where the room's landmark stands
N, PLANS = 11, """
    ####*####   #####*#####   ######*##   ###*######
    #aaa#bbb#   #aaaa#bbbb*   *aaaa#bb#   #aaaa#bbb*
    *aAabbBb#   *aAaabbbBb#   #aAaabbB*   #aAaabbBb#
    #aaa#bbb*   #aaaa#bbbb#   #aaaa#bb#   #aaaa#bbb#
    ##a###b##   ###a###b###   ##a####b#   ##a####d##
    #ccc#ddd#   #cccc#dddd#   #ccc#ddd#   #ccc#dddd#
    #cCcddDd#   *cCccddddd*   #cCc#dDd*   *cCc#ddDd*
    *ccc#ddd#   #cccc#ddDd#   *cccdddd#   #cccddddd#
    ######*##   ##*####*###   #####*###   ##*###*###"""
MAPS = (        # caption; ceiling or sky; rooms a..d: wall, accent (of plinth, emblem and landmark), floor
    ("a red brick castle with a wooden floor under a blue sky", "sky pale azure",
     "brick red gold disc ball planks wood", "stone grey blue cross column planks wood",
     "brick sand green diamond egg tiles grey", "planks brown white bars ball planks brown"),
    ("a white palace with a blue tile floor and a gold ceiling", "tiles gold",
     "panel white red diamond column tiles blue", "panel pink purple disc egg tiles blue",
     "stone white green bars ball tiles teal", "stone yellow blue cross egg tiles blue"),
    ("a green hedge garden with a grass floor under an orange sky", "sky peach violet",
     "hedge green red disc ball hedge grass", "hedge dark yellow diamond egg stone sand",
     "stone sand purple cross column hedge grass", "hedge grass white bars egg hedge green"),
    ("a dark steel station with a grey metal floor under white lamps", "panel steel white bars",
     "panel steel orange bars column tiles grey", "panel teal yellow disc ball tiles grey",
     "panel purple pink diamond egg tiles steel", "panel red white cross ball tiles steel"))
CAPTIONS = tuple(caption for caption, *_ in MAPS)
WORDS = tuple(sorted({word for caption in CAPTIONS for word in caption.split()}))
COLOURS = {name: torch.tensor(list(rgb.to_bytes(3))).float() for name, rgb in {
    "red": 0xba4636, "brown": 0x78523a, "wood": 0xb07e4e, "sand": 0xd0b684, "gold": 0xe0b85c, "yellow": 0xe8d068,
    "green": 0x4e8c42, "grass": 0x7aa44e, "dark": 0x2e5c48, "teal": 0x388e92, "blue": 0x446cb8, "purple": 0x7c54a8,
    "white": 0xe2e0d8, "pink": 0xde94a8, "orange": 0xe87c2c, "grey": 0x8e8e94, "steel": 0x626e80, "pale": 0xc4dcee,
    "azure": 0x5c94dc, "peach": 0xf6b478, "violet": 0x786096}.items()}
BLOCKS = {                      # rows, columns, shift of odd rows, width of the joints, contrast
    "brick": (4, 2, 0.5, 0.045, 0.1), "stone": (2, 2, 0.3, 0.04, 0.1), "planks": (4, 1, 0.5, 0.03, 0.1),
    "tiles": (2, 2, 0, 0, 0.09), "panel": (1, 2, 0, 0.04, 0.04), "hedge": (6, 4, 0.5, 0, 0.12)}
LANDMARKS = {"ball": (0.3, 1, 0.2), "egg": (0.22, 0.24, 0.05), "column": (0.2, 0.04, 0.1)}    # radius, squash, centre y
FAR = ((50, -28, 30, 7, 1, 999, 960, 500), (-10, 4, 75, 40, 5, 80, 120, 80),           # sun and hills: see `marks`
       (70, 4, -20, 36, 4, 60, 110, 120), (-60, 4, -35, 24, 1.2, 120, 110, 80))
SHADE = (0.92, 0.78, 1.0, 0.7, 0.95, 0.9)       # light on faces seen looking along +x, -x, +z, -z; on floor and ceiling
TEXELS, LEVELS = 64, 5          # texels a cell; level k of a texture is blurred by 2^k texels, at full resolution
SHARP, FOG, AIR = 1.0, 0.09, 12     # level bias, below 1 is crisper; haze grows with (FOG * depth)^2, up to depth AIR


def texture(pattern, colour, accent=None, figure=None):
    """[LEVELS, TEXELS, TEXELS, 3] in 0..255, one cell; v (rows) runs down. With an accent: wall, plinth and emblem."""
    v, u = torch.meshgrid(*[(torch.arange(TEXELS) + 0.5) / TEXELS] * 2, indexing="ij")
    if pattern == "sky":                                                                # rows: sine of elevation
        return COLOURS[colour].lerp(COLOURS[accent], (1.4 * v[..., None]).clamp(max=1)).expand(LEVELS, -1, -1, -1)
    rows, columns, shift, joint, contrast = BLOCKS[pattern]
    row, along = (v * rows).floor(), u * columns + shift * ((v * rows).floor() % 2)
    tint = torch.sin(7 * row + 4 * (along.floor() % columns) + 1) if joint else (row + along.floor()) % 2 * 2 - 1
    gap = torch.minimum(v - row / rows, along % 1 / columns) < joint
    image = COLOURS[colour] * (1 + contrast * tint - 0.28 * gap)[..., None]
    a, b = (u - 0.5).abs(), (v - 0.5).abs()
    inside = {"disc": a * a + b * b < 0.07, "diamond": a + b < 0.34, "bars": (a - 0.2).abs() < 0.08, None: a > 1,
              "cross": (torch.minimum(a, b) < 0.1) & (torch.maximum(a, b) < 0.3)}[figure]
    image = torch.where(inside[..., None], COLOURS[accent or colour], image)
    if accent:
        image = torch.where((v > 0.88)[..., None], 0.8 * COLOURS[accent], image * (1 - 0.3 * (v < 0.06))[..., None])
    levels = [image]
    for k in range(LEVELS - 1):
        for axis, shift in product((0, 1), (2 ** k, -(2 ** k))):                        # [1 2 1] / 4 at spacing 2^k
            image = (image + image.roll(shift, axis)) / 2
        levels.append(image)
    return torch.stack(levels)


@cache
def tables(device="cpu"):
    """Everything that is looked up, made on the CPU so that every device has the same numbers; M maps."""
    rows = [row.split() for row in PLANS.split("\n")[:0:-1]] + [["#"] * len(MAPS)] * (N - PLANS.count("\n"))
    cell = torch.tensor([[list(row[m].ljust(N, "#").encode()) for row in rows] for m in range(len(MAPS))])
    solid, emblem, room = cell < ord("A"), cell == ord("*"), (cell | 32) - ord("a")     # [M, N, N]: map, z upwards, x
    tops, rooms = [m[1] for m in MAPS], [words.split() for m in MAPS for words in m[2:]]
    images = [texture(*top.split()) for top in tops]
    marks = torch.tensor(FAR).float().repeat(len(MAPS), 2, 1)                           # [M, 8, 8]: rooms', then FAR
    for i, (wall, colour, accent, figure, shape, *floor) in enumerate(rooms):
        images += [texture(wall, colour, accent), texture(wall, colour, accent, figure), texture(*floor)]
        ((z, x),) = (cell[i // 4] == ord("ABCD"[i % 4])).nonzero().tolist()
        radius, squash, y = LANDMARKS[shape]
        marks[i // 4, i % 4] = torch.tensor([x + 0.5, y, z + 0.5, radius, squash, *COLOURS[accent]])
    m = torch.arange(len(MAPS))[:, None, None].expand_as(cell)
    first = torch.where(solid, 0, len(MAPS) + 3 * (4 * m + room))                       # of the images of a room
    walls = [first + emblem.roll(shift, axis) for axis, shift in ((2, -1), (2, 1), (1, -1), (1, 1))]
    out = dict(solid=solid, marks=marks, shade=torch.tensor(SHADE),     # marks: x, y, z, radius, squash, r, g, b
               barrier=torch.where(torch.stack([solid.mT, solid]), 0, torch.inf).flatten(),  # [map, x, z], [map, z, x]
               face=(torch.stack([*walls, first + 2, m], 1) * LEVELS * TEXELS ** 2).int().flatten(),    # first texel
               texels=torch.stack(images).view(-1, 3), sky=torch.tensor([top.startswith("sky") for top in tops]))
    return SimpleNamespace(**{name: value.to(device) for name, value in out.items()})


# ---- The renderer: elementwise arithmetic only, so the bits of a frame do not depend on the frames beside it -------
def render(c2w, maps, size=FRAME):
    """Frames uint8 [..., H, W, 3] seen by cameras c2w [..., 4, 4] in `maps`, an int or integers [...]."""
    if c2w.shape[-2:] != (4, 4):
        raise ValueError(f"cameras are c2w [..., 4, 4], got {list(c2w.shape)}")
    lead, chunk = c2w.shape[:-2], 32 if c2w.device.type == "cpu" else 1024              # frames at once, for memory
    maps = check_maps(maps, lead, c2w.device).reshape(-1)
    frames = [shoot(*part, size) for part in zip(c2w.reshape(-1, 4, 4).float().split(chunk), maps.split(chunk))]
    return torch.cat(frames).view(*lead, *size, 3)


def shoot(c2w, maps, size):
    """Frames uint8 [F, H, W, 3] of cameras [F, 4, 4] in maps [F]: one ray of depth 1 a pixel, tensors [F, H, W]."""
    t, focal, c = tables(str(c2w.device)), FOCAL * size[1], c2w[:, :3, :, None, None]    # focal length in pixels
    b, a = torch.meshgrid(*[torch.arange(0.5 - k / 2, k / 2, device=c2w.device) / focal for k in size], indexing="ij")
    norm, cell = (a * a + b * b + 1).sqrt(), (maps * N * N).int()[:, None, None]        # length of the ray [H, W]
    d = [(c[:, i, 0] * a + c[:, i, 2]) + c[:, i, 1] * b for i in range(3)]
    dx, dy, dz = d = [torch.where(x.abs() < 1e-6, 1e-6, x) for x in d]
    ox, oy, oz = o = c[:, :, 3].unbind(1)                                               # each [F, 1, 1]
    tx = crossing(ox, dx, oz, dz, cell, t.barrier)
    tz = crossing(oz, dz, ox, dx, cell + len(MAPS) * N * N, t.barrier)
    ty = (torch.where(dy > 0, 0.5, -0.5) - oy) / dy                                     # floor, ceiling or sky
    depth, on_x, on_z = torch.minimum(torch.minimum(tx, tz), ty), (tx < tz) & (tx < ty), (tz <= tx) & (tz < ty)
    face = torch.where(on_x, (dx < 0).int(), torch.where(on_z, (dz < 0).int() + 2, (dy < 0).int() + 4))
    sky = (face == 5) & t.sky[maps][:, None, None]
    x, y, z = (start + depth * ray for start, ray in zip(o, d))
    xc = torch.where(on_x, x - 0.5 * dx.sign(), x).clamp(0, N - 1).int()                # the free cell before the face
    zc = torch.where(on_z, z - 0.5 * dz.sign(), z).clamp(0, N - 1).int()
    slope = torch.where(on_x, dx, torch.where(on_z, dz, dy)).abs() / norm               # cosine to the face
    level = (depth / slope * (SHARP * TEXELS / focal)).frexp()[1].clamp(0, LEVELS - 1)    # texels a pixel covers
    u = torch.where(on_x, z, x) % 1 * TEXELS
    v = torch.where(sky, -dy / norm, torch.where(on_x | on_z, y + 0.5, z)) % 1 * TEXELS
    texel = (level * TEXELS + v.int().clamp(max=TEXELS - 1)) * TEXELS + u.int().clamp(max=TEXELS - 1)
    rgb = t.texels[t.face[((cell * 6 + face * (N * N)) + zc * N) + xc] + texel]
    depth, which, tilt = landmarks(t.marks[maps], d, o, torch.where(sky, torch.inf, depth))
    light = torch.where(which < 0, torch.where(sky, 1, t.shade[face]), 0.75 + 0.5 * tilt)
    clear = torch.where(depth.isinf(), 1, 1 / (1 + (FOG * depth.clamp(max=AIR)).square()))
    rgb = torch.where(which[..., None] < 0, rgb, t.marks[maps[:, None, None], which, 5:]) * (light * clear)[..., None]
    haze = t.texels[maps * LEVELS * TEXELS ** 2][:, None, None] * 0.8                   # of the horizon or the ceiling
    return (rgb + haze * (1 - clear)[..., None] + 0.5).clamp(0, 255).to(torch.uint8)


def crossing(o, d, o2, d2, cell, barrier):
    """Depth at which rays meet the first wall on the grid lines of one axis (`o2`, `d2`: the other axis), or inf."""
    sign, dt, line = d.sign(), 1 / d.abs(), torch.where(d > 0, o.floor() + 1, o.floor())
    t, first = (line - o) / d, torch.full_like(d, torch.inf)
    at, dat = (line + (sign - 1) / 2) * N + (o2 + t * d2), sign * N + dt * d2           # the cell that is entered
    for _ in range(N - 2):                              # beyond the map all is farther than its border: clamp the index
        first = torch.minimum(first, t + barrier.take((at.int() + cell).clamp(0, len(barrier) - 1).long()))
        t, at = t + dt, at + dat
    return first


def landmarks(marks, d, o, depth):
    """Depth once marks [F, 8, 8] stand there, which of them is seen (-1: none) and how it faces the light."""
    which, tilt = torch.full_like(depth, -1, dtype=torch.int32), torch.zeros_like(depth)
    flat, rise = d[0] * d[0] + d[2] * d[2], d[1] * d[1]
    for i in range(marks.shape[1]):                                                     # x^2 + squash y^2 + z^2 = r^2
        x, y, z = (o[j] - marks[:, i, j, None, None] for j in range(3))
        radius, squash = marks[:, i, 3:5, None, None].unbind(1)
        A, B = flat + squash * rise, d[0] * x + d[2] * z + d[1] * (squash * y)
        hit = B * B - A * (x * x + squash * y * y + z * z - radius * radius)
        t = (-B - torch.where(hit > 0, hit, torch.inf).sqrt()) / A                      # -inf: a miss
        light = (0.4 * (x + t * d[0]) - 0.6 * squash * (y + t * d[1]) - 0.2 * (z + t * d[2])) / radius
        near = (t > 0) & (t < depth)
        depth, which, tilt = torch.where(near, t, depth), torch.where(near, i, which), torch.where(near, light, tilt)
    return depth, which, tilt


# ---- Moves: a state is float64 [..., 4]: x, z in cells, yaw to the right and pitch up in degrees -------------------
def pose(state):
    """c2w float32 [..., 4, 4] of states [..., 4]."""
    x, z, yaw, pitch = state.unbind(-1)
    return control.pose(torch.stack([x, torch.zeros_like(x), z], -1), yaw.deg2rad(), pitch.deg2rad()).float()


def free(maps, x, z):
    """Whether a walker may stand at x, z [N] in maps [N]: bool [N]."""
    t = tables(str(x.device))
    apart = (x[:, None] - t.marks[maps, :, 0]) ** 2 + (z[:, None] - t.marks[maps, :, 2]) ** 2       # [N, 8]
    walls = [t.solid[maps, (z + i).long().clamp(0, N - 1), (x + j).long().clamp(0, N - 1)]
             for i, j in product((-BODY, BODY), repeat=2)]
    return (apart > (t.marks[maps, :, 3] + BODY) ** 2).all(-1) & ~torch.stack(walls).any(0)


def move(maps, state, actions):
    """The state after one action [N] from state [N, 4] (a step along the heading, then the turn), and blocked [N]."""
    (x, z, yaw, pitch), (step, turn) = state.unbind(-1), control.motion(actions)
    sin, cos = yaw.deg2rad().sin() * STEP, yaw.deg2rad().cos() * STEP
    x1, z1 = x + step[:, 0] * cos + step[:, 1] * sin, z + step[:, 1] * cos - step[:, 0] * sin
    x1 = torch.where(free(maps, x1, z), x1, x)                                          # each axis by itself: it slides
    z1 = torch.where(free(maps, x1, z1), z1, z)
    tilt = pitch + turn[:, 0] * ANGLE
    blocked = (actions >= 9) & ((x1 - x) ** 2 + (z1 - z) ** 2 < (SHORT * STEP) ** 2) | (tilt.abs() > PITCH)
    return torch.stack([x1, z1, (yaw + turn[:, 1] * ANGLE + 180) % 360 - 180, tilt.clamp(-PITCH, PITCH)], -1), blocked


def walk(maps, state, actions):
    """Obey actions [N, T] from `state` [N, 4] in `maps` (int or [N]): the states [N, T, 4] after each of them, labels
    [N, T] of the motions that happened, and blocked [N, T]. A first action 0 records the start."""
    state, actions = torch.as_tensor(state, dtype=torch.float64), control.check_actions(actions)
    if actions.ndim != 2 or not actions.numel() or (actions < 0).any() or state.shape != (len(actions), 4):
        raise ValueError(f"walk needs state [N, 4] and actions [N, T] in 0..80, not {list(state.shape)} and {actions}")
    maps, actions = check_maps(maps, state.shape[:1], state.device), actions.to(state.device)
    if not (free(maps, state[:, 0], state[:, 1]) & (state[:, 3].abs() <= PITCH)).all():
        raise ValueError(f"a start (x, z, yaw, pitch) is in a wall or tilts beyond {PITCH}: take one from spawn()")
    steps = [*accumulate(actions.unbind(1), lambda last, a: move(maps, last[0], a), initial=(state, None))]
    states, blocked = torch.stack([s for s, _ in steps], 1), torch.stack([b for _, b in steps[1:]], 1)
    labels = control.labels_from_poses(pose(states), step=STEP)[:, 1:]
    return states[:, 1:], labels, blocked | (labels != actions)


def check_maps(maps, shape, device):                                                    # -> int64 of `shape`
    maps = torch.as_tensor(maps, device=device)
    fits = maps.ndim <= len(shape) and all(a in (1, b) for a, b in zip(maps.shape[::-1], shape[::-1]))
    if not fits or not set(maps.unique().tolist()) <= set(range(len(MAPS))):
        raise ValueError(f"maps are integers 0..{len(MAPS) - 1} that broadcast to {list(shape)}, got {maps}")
    return maps.long().expand(shape)


def spawn(maps, generator):
    """Random free states [N, 4] in maps [N], on the CPU; odd multiples of ANGLE / 2 keep slides off 60 degrees."""
    place = torch.rand(len(maps), 99, 2, generator=generator, dtype=torch.float64) * N  # 99 darts each
    hit = free(maps.repeat_interleave(99), *place.flatten(0, 1).unbind(-1)).view(-1, 99)
    yaw, pitch = (torch.randint(k, (len(maps), 1), generator=generator) * ANGLE for k in (48, 7))
    return torch.cat([place[torch.arange(len(maps)), hit.int().argmax(1)], yaw + ANGLE / 2 - 180, pitch - PITCH], -1)


def explore(n, frames, generator, device="cpu"):
    """Random trajectories: maps [n], states [n, frames, 4], then labels, blocked and the actions asked for [n, frames];
    frame 0 is the start. Actions are held for 2 to 8 frames; a blocked one is drawn again, once, but one in eight
    walkers pushes on. All draws are of the CPU's `generator`."""
    start = spawn(maps := torch.randint(len(MAPS), (n,), generator=generator), generator)
    share = torch.outer(torch.tensor([22, 28] + [50 / 7] * 7), torch.tensor([8.0, 1, 1, 3, 3, 1, 1, 1, 1])).flatten()
    draws = torch.multinomial(share, frames * 2 * n, True, generator=generator).view(frames, 2, n).to(device)
    hold, turns = torch.randint(2, 9, (frames, n), generator=generator), torch.rand(n, generator=generator) > 1 / 8
    maps, start, hold, turns = (x.to(device) for x in (maps, start, hold, turns))
    state, left, actions = start, torch.zeros_like(maps), [torch.zeros_like(maps)]
    for t in range(1, frames):
        first, second = torch.where(left > 0, actions[-1], draws[t, 0]), draws[t, 1]    # [n]
        after, blocked = move(maps.repeat(2), state.repeat(2, 1), torch.cat([first, second]))
        left = torch.where((left > 0) & ~(again := blocked[:n] & turns), left, hold[t]) - 1
        state = torch.where(again[:, None], after[n:], after[:n])
        actions.append(torch.where(again, second, first))
    return maps, *walk(maps, start, asked := torch.stack(actions, 1)), asked


class World:
    """One map and a walker in it. Frames are uint8 [F, H, W, 3], the views after each of actions [F]."""

    def __init__(self, map=0, device="cpu", size=FRAME):
        self.maps, self.size = check_maps(map, (1,), device), size
        self.reset()

    def reset(self, state=None, seed=0):
        """Stand at `state` [4], or level at a place drawn from `seed`; returns the view [1, H, W, 3]."""
        place = spawn(self.maps.cpu(), torch.Generator().manual_seed(seed))[0] * torch.tensor([1, 1, 1, 0])
        self.state = place if state is None else torch.as_tensor(state)
        return self.step([0])

    def render(self, c2w):
        """The views of cameras c2w [F, 4, 4]."""
        return render(c2w.to(self.maps.device), self.maps, self.size)

    def frames(self, start, actions):
        """The exact future of any actions from any state [4], without moving the walker."""
        states, _, _ = walk(self.maps, torch.as_tensor(start)[None], torch.as_tensor(actions)[None])
        return self.render(pose(states[0]))

    def step(self, actions):
        """Move on by `actions`."""
        states, _, _ = walk(self.maps, self.state[None], torch.as_tensor(actions)[None])
        self.state = states[0, -1]
        return self.render(pose(states[0]))


if __name__ == "__main__":
    import imageio.v3 as imageio
    parser = argparse.ArgumentParser(description="Contact sheet: a plan and six views of each map.")
    parser.add_argument("--out", default="sheet.png")
    t, sheet = tables(), []
    for m in range(len(MAPS)):
        plan = t.texels[t.face.view(-1, 6, N, N)[m, 4] + (LEVELS - 1) * TEXELS ** 2]    # floors, blurred; [N, N, 3]
        plan[t.solid[m]] = 40
        plan[t.marks[m, :4, 2].int(), t.marks[m, :4, 0].int()] = t.marks[m, :4, 5:]
        plan = plan.flip(0).to(torch.uint8).repeat_interleave(16, 0).repeat_interleave(16, 1)
        views = render(pose(spawn(torch.full((6,), m), torch.Generator().manual_seed(0))), m, (176, 264))
        sheet.append(torch.cat([plan, *views], 1))
    imageio.imwrite(parser.parse_args().out, torch.cat(sheet).numpy())
