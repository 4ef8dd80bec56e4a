"""Cameras: poses and rays, what networks see of them, and the files they come in.

A camera is c2w, OpenCV axes (x right, y down, z forward), relative to the first frame of its clip. K is
image-normalised: it maps to 0..1 across the picture, so resizing leaves it alone and only a crop changes it (`crop_K`).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

RIGID = 1e-3                        # how far R^T R may be from the identity: files are rounded


# ---- Poses -----------------------------------------------------------------------------------------------------------

def pose(position, yaw, pitch):
    """c2w [..., 4, 4] of a camera at `position` [..., 3], turned right by `yaw` and up by `pitch` [...] (radians)."""
    cy, sy, cp, sp = yaw.cos(), yaw.sin(), pitch.cos(), pitch.sin()
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)
    rows = [cy, sy * sp, sy * cp, position[..., 0],                                     # R_y(yaw) R_x(pitch), y is down
            zero, cp, -sp, position[..., 1],
            -sy, cy * sp, cy * cp, position[..., 2],
            zero, zero, zero, one]
    return torch.stack(rows, -1).unflatten(-1, (4, 4))


def invert(c2w):
    """Inverse of rigid transforms [..., 4, 4]: (R, t) -> (R^T, -R^T t)."""
    rotation = c2w[..., :3, :3].mT
    top = torch.cat([rotation, -rotation @ c2w[..., :3, 3:]], -1)
    return torch.cat([top, c2w[..., 3:, :]], -2)


def relative(c2w):
    """Cameras [..., T, 4, 4] expressed in the axes of their first frame."""
    return invert(c2w[..., :1, :, :]) @ c2w


def between(c2w, stride):
    """Cameras of the 1 + stride (T - 1) pixel frames from those of T latent frames [..., T, 4, 4]: straight lines, with
    axes that are blended and made orthonormal again (Gram-Schmidt)."""
    a = torch.arange(1, stride + 1, device=c2w.device, dtype=c2w.dtype)[:, None, None] / stride
    steps = torch.lerp(c2w[..., :-1, None, :, :], c2w[..., 1:, None, :, :], a).flatten(-4, -3)
    z, x, position = steps[..., :3, 2], steps[..., :3, 0], steps[..., 3]    # of [..., stride (T-1), 4, 4]; position [4]
    z = F.normalize(z, dim=-1)
    x = F.normalize(x - (x * z).sum(-1, keepdim=True) * z, dim=-1)
    axes = F.pad(torch.stack([x, torch.linalg.cross(z, x), z], -1), (0, 0, 0, 1))       # [..., 4, 3]
    return torch.cat([c2w[..., :1, :, :], torch.cat([axes, position[..., None]], -1)], -3)


def check_poses(c2w, frames=None):
    """c2w float64 [..., T, 4, 4], or a ValueError that names the frame: only rigid transforms, `frames` of them."""
    c2w = torch.as_tensor(c2w).double()
    if c2w.ndim < 3 or c2w.shape[-2:] != (4, 4) or not c2w.shape[-3]:
        raise ValueError(f"cameras are c2w [..., T, 4, 4], got {list(c2w.shape)}")
    if frames is not None and c2w.shape[-3] != frames:
        raise ValueError(f"there are {c2w.shape[-3]} cameras for {frames} frames")
    R, last = c2w[..., :3, :3], torch.tensor([0.0, 0, 0, 1], dtype=torch.float64, device=c2w.device)
    eye = torch.eye(3, dtype=torch.float64, device=c2w.device)
    for wrong, what in ((~c2w.isfinite().flatten(-2).all(-1), "is not finite"),
                        ((c2w[..., 3, :] != last).any(-1), "has a last row that is not 0 0 0 1"),
                        (torch.linalg.det(R) < 0, "is a reflection: its axes are left-handed"),
                        ((R.mT @ R - eye).abs().flatten(-2).amax(-1) > RIGID, "has axes that are not orthonormal")):
        if wrong.any():
            raise ValueError(f"camera {int(wrong.nonzero()[0, -1])} {what}")
    return c2w


def check_direction(c2w):
    """Refuse w2c cameras [T, 4, 4] passed as c2w, where it shows: inverted, they travel less than half as far (a turn
    swings the world's origin around), or do not roll while as given they do. Walks that only turn about one axis and
    begin at the origin look right either way."""
    w2c = invert(c2w)
    steps, other = (c[:, :3, 3].diff(dim=0).norm(dim=-1) for c in (c2w, w2c))
    roll, others = (torch.linalg.svdvals(c[:, :3, 0])[2:].sum() / len(c) ** 0.5 for c in (c2w, w2c))    # 0: right axes
    if steps.sum() > 2 * other.sum() + 1e-6 or (roll > 0.02 and others < 0.001):                    # keep to a plane
        raise ValueError(f"the cameras look like w2c, not c2w (as c2w they jump at camera {int(steps.argmax()) + 1}); "
                         "invert them, or if they orbit the origin make them relative to the first")


# ---- What networks see of cameras ------------------------------------------------------------------------------------

def pluecker(K, c2w, H, W):
    """Plücker coordinates [..., T, 6, H, W] of the rays through all pixel centres: moment o x d, then unit direction d
    (CameraCtrl, arXiv:2404.02101). K [..., T, 3, 3] image-normalised, c2w [..., T, 4, 4]."""
    v, u = torch.meshgrid(*((torch.arange(n, device=K.device) + 0.5) / n for n in (H, W)), indexing="ij")
    x = (u.flatten() - K[..., 0, 2, None]) / K[..., 0, 0, None]                         # [..., T, H*W]
    y = (v.flatten() - K[..., 1, 2, None]) / K[..., 1, 1, None]
    with torch.autocast(K.device.type, enabled=False):
        d = c2w[..., :3, :3] @ F.normalize(torch.stack([x, y, torch.ones_like(x)], -2), dim=-2)     # [..., T, 3, H*W]
    moment = torch.linalg.cross(c2w[..., :3, 3:].expand_as(d), d, dim=-2)
    return torch.cat([moment, d], -2).unflatten(-1, (H, W))


def projections(K, c2w):
    """P = diag(fx, fy, 1, 1) w2c of PRoPE (arXiv:2507.10496) and its inverse, [..., T, 4, 4]; without the centre."""
    f = F.pad(torch.stack([K[..., 0, 0], K[..., 1, 1]], -1), (0, 2), value=1.0)         # [..., T, 4]
    with torch.autocast(K.device.type, enabled=False):                                  # never below fp32
        return f[..., :, None] * invert(c2w), c2w / f[..., None, :]


def crop_K(K, left, top, width, height):
    """K [..., 3, 3] of a picture's part; the box is in shares of the picture's width and height."""
    scale = K.new_tensor([[1 / width, 0, -left / width], [0, 1 / height, -top / height], [0, 0, 1]])
    return scale @ K


# ---- Files and pictures ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cameras:
    """Cameras of a clip: c2w float64 [T, 4, 4] relative to frame 0, K float64 [T, 3, 3] or None if the file has none.
    Translations times `scale` are in the file's units."""
    c2w: torch.Tensor
    K: torch.Tensor | None
    scale: float = 1.0

    def normalised(self):
        """The same with the farthest camera at distance 1 from the first; a clip that stays put keeps its scale."""
        far = float(self.c2w[:, :3, 3].norm(dim=-1).max()) or 1.0
        c2w = torch.cat([self.c2w[..., :3], self.c2w[..., 3:] / self.c2w.new_tensor([[far], [far], [far], [1]])], -1)
        return replace(self, c2w=c2w, scale=self.scale * far)


def read_cameras(path, frames=None, size=None):
    """Cameras of a file: .txt as RealEstate10K has it, .npy (c2w [T, 4, 4] or [T, 3, 4], intrinsics.npy beside it) or
    .json {"0": {"extrinsic": c2w, "K": in pixels}, ...} as HY-WorldPlay and its relatives have it.

    `frames` is the number expected, `size` (H, W) that of the pictures if intrinsics.npy is in pixels. ValueError names
    the file and the frame.
    """
    path, readers = Path(path), {".txt": read_realestate, ".npy": read_numpy, ".json": read_json}
    if path.suffix not in readers:
        raise ValueError(f"{path}: cameras are read from {', '.join(readers)}")
    try:
        c2w, K = readers[path.suffix](path)
        check_direction(c2w := check_poses(c2w, frames))
        return Cameras(relative(c2w), None if K is None else intrinsics(K, len(c2w), size))
    except (ValueError, OverflowError, MemoryError) as error:                           # a header may claim any size
        raise ValueError(f"{path}: {error}") from None


def read_realestate(path):
    """RealEstate10K: rows of time, fx fy cx cy (image-normalised), two zeros, w2c [3, 4]; a first line may be a URL."""
    rows = [line.split() for line in path.read_text().splitlines()]
    rows = rows[1:] if rows and len(rows[0]) == 1 else rows
    data = torch.zeros(len(rows), 19, dtype=torch.float64)
    for i, row in enumerate(rows):
        try:
            data[i] = torch.tensor([float(x) for x in row], dtype=torch.float64).view(19)
        except (ValueError, RuntimeError):
            raise ValueError(f"camera {i} is not the 19 numbers of a RealEstate10K row") from None
    return invert(check_poses(square(data[:, 7:].unflatten(1, (3, 4))))), data[:, 1:5]


def read_numpy(path):
    arrays = []
    for file in (path, path.with_name("intrinsics.npy")):
        if file.exists() or file == path:
            with open(file, "rb") as stream:
                values = np.lib.format.read_array(stream, allow_pickle=False)
            if values.dtype.kind not in "fiu":
                raise ValueError(f"{file.name} holds {values.dtype}, not numbers")
            arrays.append(torch.from_numpy(values.astype(np.float64)))
    return square(arrays[0]), arrays[1] if len(arrays) == 2 else None


def read_json(path):
    c2w, K, i = [], [], 0
    try:
        data = json.loads(path.read_text())
        for i in range(len(data)):
            for name, part, n in (("extrinsic", c2w, 4), ("K", K, 3)):
                part.append(torch.tensor(data[str(i)][name], dtype=torch.float64).view(n, n))
        c2w, K = torch.stack(c2w), torch.stack(K)
    except (ValueError, LookupError, TypeError, RuntimeError, OverflowError):
        raise ValueError(f'camera {i} is not "{i}": {{"extrinsic": 4x4 numbers, "K": 3x3 numbers}}') from None
    return c2w, K / F.pad(2 * K[:, :2, 2:], (0, 0, 0, 1), value=1.0)            # its pictures are twice their centre


def square(c2w):
    """[T, 4, 4] of [T, 3, 4]; anything else as it is, for `check_poses` to judge."""
    if c2w.shape[1:] != (3, 4):
        return c2w
    return torch.cat([c2w, c2w.new_tensor([0, 0, 0, 1]).expand(len(c2w), 1, 4)], 1)


def intrinsics(values, frames, size=None):
    """K [frames, 3, 3], image-normalised, of such matrices or rows fx fy cx cy, one a frame or one for all; if they are
    in pixels, those of pictures of `size` (H, W)."""
    values = values[..., [0, 1, 0, 1], [0, 1, 2, 2]] if values.shape[-2:] == (3, 3) else values
    if values.shape[-1:] != (4,) or values.numel() not in (4, 4 * frames):
        raise ValueError(f"intrinsics of {frames} cameras are [{frames}, 3, 3] or [{frames}, 4], not {[*values.shape]}")
    values = values.reshape(-1, 4).expand(frames, 4)
    wrong = ~values.isfinite().all(1) | (values[:, :2] <= 0).any(1)
    if wrong.any():
        raise ValueError(f"camera {int(wrong.nonzero()[0])} has intrinsics {values[wrong][0].tolist()}")
    if (values[:, 2:] > 2).any():                                                       # no centre is so far out
        if size is None:
            raise ValueError("intrinsics are in pixels: tell the size (H, W) of the pictures")
        values = values / values.new_tensor([size[1], size[0], size[1], size[0]])
    K = torch.eye(3, dtype=torch.float64).repeat(frames, 1, 1)
    K[:, [0, 1, 0, 1], [0, 1, 2, 2]] = values
    return K


def draw(c2w, names, path):
    """PNG of a trajectory [T, 4, 4] seen from above: where the camera was, where it looked, `names` of its motions."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 7), layout="constrained")
    axis = figure.subplots()
    x, z, dx, dz = (c2w[:, i, j].numpy() for i, j in ((0, 3), (2, 3), (0, 2), (2, 2)))
    axis.plot(x, z, color="0.7", zorder=1)
    axis.quiver(x, z, dx, dz, angles="xy", width=0.003, scale=18, color="0.4", zorder=2)
    points = axis.scatter(x, z, c=range(len(x)), s=14, zorder=3)
    for turn, i in enumerate(i for i in range(1, len(x)) if names[i] != names[i - 1]):
        axis.annotate(names[i], (x[i], z[i]), (6, -10 + 14 * (turn % 2)), textcoords="offset points", fontsize=8)
    axis.set(xlabel="x, to the right of the first camera", ylabel="z, in front of it", title=f"{len(x)} cameras")
    axis.axis("equal")
    axis.grid(alpha=0.3)
    figure.colorbar(points, label="frame", shrink=0.7)
    figure.savefig(path, dpi=110)
