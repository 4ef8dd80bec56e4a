"""One who walks through Doom, with the pictures and poses of an exact pinhole camera (ViZDoom, arXiv:1605.02097).

The game's engine is older than the pinhole camera in games. What stands in the way, and what is done:

- It draws heights 1.2 times too tall for its pixels (fy = 1.2 fx). Heights are multiplied by 1.2: square pixels.
- Looking up or down only shifts its picture. So it never does: a wide level view is projected onto the turned camera.
  Both have one centre, so a homography is exact; the view is wide enough for PITCH.
- The view bobs: switched off. Monsters, lifts and lights: frozen, so that what is seen depends on where one stands.
- A walker has inertia: a thrust brings it to the wanted speed within one tic of the game and stops it in one. Walls,
  stairs and things still do what they like with it, so labels come from poses and never from keys.
"""

import math
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import world
from camera import pose
from common import generator
from control import motion

TICS, UNITS = 4, 16                 # a frame is 4 tics of the game; a step is 16 of its units, 0.4 of the eyes' height
TALL = 1.2                          # heights are drawn so many times larger than widths
FOV, PITCH = 106, 15                # degrees: of the level view; the camera tilts no further, two turns
SCREEN, FINE = (384, 512), 4        # rows and columns of the level view; samples a pixel, each way
FRICTION, THRUST, STRONGEST = 0.90625, 32, 127      # of the engine: speed kept a tic, button a unit of speed, its limit
LOST = 1.6                          # a motion of so many steps is a fall or a teleporter


class Lost(Exception):
    """The walker fell, was teleported or has left the map."""


class Walker:
    """One who walks through a map. `begin(seed)` and `step(label)` -> (view uint8 [H, W, 3], c2w float64 [4, 4])."""

    def __init__(self, name):
        try:
            import vizdoom
        except ImportError:
            raise ValueError('Doom needs ViZDoom: pip install "biwm[doom]"') from None
        self.game, folder, button = vizdoom.DoomGame(), Path(vizdoom.__file__).parent, vizdoom.Button
        game, scenario = self.game, folder / "scenarios" / name
        game.set_doom_game_path(str(folder / "freedoom2.wad"))
        if name.endswith(".wad"):
            if not scenario.exists():
                raise ValueError(f"ViZDoom has no scenario {name}; it has "
                                 + ", ".join(sorted(path.name for path in scenario.parent.glob("*.wad"))))
            game.set_doom_scenario_path(str(scenario))
        game.set_doom_map("map01" if name.endswith(".wad") else name)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_512X384)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for part in ("hud", "weapon", "crosshair", "decals", "particles", "messages", "screen_flashes", "corpses"):
            getattr(game, f"set_render_{part}")(False)
        game.set_window_visible(False)
        self.folder = TemporaryDirectory()                                              # for settings that it writes
        game.set_doom_config_path(f"{self.folder.name}/settings.ini")
        game.set_sectors_info_enabled(True)
        game.set_episode_timeout(0)
        game.set_available_buttons([button.MOVE_FORWARD_BACKWARD_DELTA, button.MOVE_LEFT_RIGHT_DELTA,
                                    button.TURN_LEFT_RIGHT_DELTA])
        game.set_available_game_variables([getattr(vizdoom.GameVariable, variable) for variable in (
            "POSITION_X", "POSITION_Y", "CAMERA_POSITION_Z", "ANGLE", "VELOCITY_X", "VELOCITY_Y")])
        game.add_game_args("-nomonsters +turbo 255 +movebob 0 +stillbob 0 +sv_cheats 1")
        game.init()

    def begin(self, seed):
        """Stand at a place drawn from `seed`, free for three steps all around, if 200 darts find one."""
        g = generator(seed, "doom")
        self.game.set_seed(seed % 2 ** 31)
        self.game.new_episode()
        self.game.send_game_command(f"fov {FOV}")
        self.game.send_game_command("god")
        self.act(0, 0, 0, 5 * TICS)                                                     # until all have settled
        self.game.send_game_command("freeze")
        rooms = [np.array([(line.x1, line.y1, line.x2, line.y2, line.is_blocking) for line in sector.lines])
                 for sector in self.game.get_state().sectors]
        lines = np.concatenate(rooms)
        low, high = lines[:, :2].min(0), lines[:, :2].max(0)
        for _ in range(200):
            at = low + (high - low) * torch.rand(2, generator=g).numpy()
            if any(inside(at, room) for room in rooms) and distance(at, lines[lines[:, 4] > 0]) > 3 * UNITS:
                self.game.send_game_command(f"warp {at[0]:.0f} {at[1]:.0f}")
                break
        self.act(0, 0, world.ANGLE * int(torch.randint(48, (1,), generator=g)), TICS)
        self.pitch, self.last = 0.0, None
        return self.look()

    def act(self, forward, right, turn, tics):
        """Hold the buttons for so many tics: thrusts as button values, a turn to the right in degrees a tic."""
        self.game.set_action([forward, right, turn])
        self.game.advance_action(tics)
        if self.game.is_episode_finished():
            raise Lost

    def step(self, label):
        """A step along the heading, then the turn, as in the tiny world."""
        angle, *velocity = self.game.get_state().game_variables[3:]
        move, turn = (part.numpy() for part in motion(torch.tensor(label)))             # (right, ahead), (up, right)
        wanted = move * UNITS / TICS                                                    # speed in units a tic
        turned = world.ANGLE * turn[1]
        self.thrust(wanted - axes(angle) @ velocity, 0, 1)
        self.thrust(wanted * (1 - FRICTION), 0, TICS - 2)
        self.thrust(axes(angle - turned) @ axes(angle).T @ wanted * (1 - FRICTION), turned, 1)
        self.pitch = float(np.clip(self.pitch + world.ANGLE * turn[0], -PITCH, PITCH))
        return self.look()

    def thrust(self, speed, turn, tics):
        """Change the speed (right, ahead) by so much in every tic."""
        right, ahead = np.clip(np.round(speed * THRUST), -STRONGEST, STRONGEST)
        self.act(ahead, right, turn, tics)

    def look(self):
        """The view and its camera."""
        state = self.game.get_state()
        x, y, height, angle, *_ = state.game_variables
        place = torch.tensor([-y, -TALL * height, x], dtype=torch.float64) * (world.STEP / UNITS)   # x right, z ahead
        if self.last is not None and (place - self.last).norm() > LOST * world.STEP:
            raise Lost
        self.last = place
        yaw, pitch = torch.tensor([-angle, self.pitch], dtype=torch.float64).deg2rad()
        rows, columns = pixels_seen(self.pitch)
        H, W = world.FRAME
        fine = state.screen_buffer[rows, columns].reshape(H, FINE, W, FINE, 3)
        return fine.mean((1, 3)).round().astype(np.uint8), pose(place, yaw, pitch)


def axes(angle):
    """Rows right and ahead of one who looks along `angle` (degrees, to the left), in the game's x and y."""
    a = math.radians(angle)
    return np.array([[math.sin(a), -math.cos(a)], [math.cos(a), math.sin(a)]])


@cache
def pixels_seen(pitch):
    """Rows and columns of the level view under the samples of a view turned up by `pitch` degrees."""
    (H, W), p = world.FRAME, math.radians(pitch)
    v, u = ((np.arange(n * FINE) + 0.5) / FINE - n / 2 for n in (H, W))
    b, a = np.meshgrid(v / (world.FOCAL * W), u / (world.FOCAL * W), indexing="ij")     # rays (a, b, 1), b down
    down, depth = math.cos(p) * b - math.sin(p), math.sin(p) * b + math.cos(p)          # R_x(pitch) of them
    focal = SCREEN[1] / 2 / math.tan(math.radians(FOV / 2))
    rows, columns = SCREEN[0] / 2 + focal * down / depth, SCREEN[1] / 2 + focal * a / depth
    return rows.astype(int), columns.astype(int)


def inside(at, lines):
    """Whether a point is inside a room of lines [n, 5]: one to its right is crossed an odd number of times."""
    x1, y1, x2, y2 = lines[:, :4].T
    crosses = (y1 > at[1]) != (y2 > at[1])
    x = x1 + (at[1] - y1) / np.where(crosses, y2 - y1, 1) * (x2 - x1)
    return (crosses & (x > at[0])).sum() % 2 == 1


def distance(at, lines):
    """Of a point from the nearest of lines [n, 5]."""
    start, along = lines[:, :2], lines[:, 2:4] - lines[:, :2]
    share = ((at - start) * along).sum(1) / np.maximum((along ** 2).sum(1), 1e-9)
    return np.linalg.norm(at - start - share.clip(0, 1)[:, None] * along, axis=1).min()
