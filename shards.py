"""Shards: encoded clips in a folder of safetensors files, with an `index.jsonl` of one line a shard.

    python shards.py FOLDER                      # what is in it; every file is read and its sha256 compared

A file holds, of clip i, `i.x0` [C, T, H, W] in bf16, `i.actions` [T], `i.c2w` [T, 4, 4] and `i.K` [T, 3, 3], and of
caption j the text encoder's states `textj.NAME`. Its line in the index says how they were made: backbone, fps, the
codec's fingerprint, the version of the labels, bytes and sha256 of the file, its captions and, clip by clip, name,
scene, split and latent frames. A line needs no other: folders made alike merge by joining their files and indices.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import digest, one_line_errors, put, sha256, write_text
from control import ACTION_SPEC, check_actions


FORMAT = 1


@dataclass(frozen=True)
class Recording:
    """An encoded clip on its way into a shard: latents x0 [C, T, H, W] and its caption's `text` {name: [L, ...]} as the
    codec gave them, labels [T], cameras c2w [T, 4, 4] and K [T, 3, 3] or None. Splits never share a `scene`."""
    name: str
    scene: str
    caption: str
    x0: torch.Tensor
    text: dict
    actions: torch.Tensor
    c2w: torch.Tensor | None = None
    K: torch.Tensor | None = None


def write_shard(path, header, recordings, refused=()):
    """A file that exists completely or not at all. `header` says how all clips were made (see `ShardStream`), `refused`
    [{name, result, detail}] which others there would have been; both are in the file's metadata, with the clips."""
    tensors, texts, clips = {}, [], []
    for i, r in enumerate(recordings):
        parts = {"x0": r.x0.bfloat16(), "actions": check_actions(r.actions).to(torch.int8)}
        if r.c2w is not None:
            parts |= {"c2w": r.c2w.float(), "K": r.K.float()}
        tensors |= {f"{i}.{key}": part.cpu().clone().contiguous() for key, part in parts.items()}
        captions = [caption for caption, _ in texts]
        if r.caption not in captions:
            lengths = {key: len(states) for key, states in r.text.items()}
            texts.append((r.caption, lengths))
            tensors |= {f"text{len(captions)}.{key}": trim(states) for key, states in r.text.items()}
            captions.append(r.caption)
        clips.append({"name": r.name, "scene": r.scene, "frames": r.x0.shape[1], "text": captions.index(r.caption),
                      "cameras": r.c2w is not None})
    notes = {**header, "format": FORMAT, "actions": ACTION_SPEC, "texts": texts, "clips": clips, "refused": [*refused]}
    partial = path.with_suffix(f".{os.getpid()}.partial")           # of this process: another may make the same shard
    save_file(tensors, partial, {"shard": json.dumps(notes)})   # one entry: the order of several is not defined
    put(partial, path)


def trim(states):
    """[L, ...] without the zeros at its end, which `pad_sequence` gives back; floats in bf16."""
    used = states.flatten(1).any(1) if states.ndim > 1 else states != 0
    length = int(used.nonzero().max()) + 1 if used.any() else 0
    return states[:length].to(torch.bfloat16 if states.is_floating_point() else states.dtype).cpu().clone()


def notes_of(path):
    """What `write_shard` noted in a file."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["shard"])


def write_index(folder, held_out):
    """index.jsonl of all shards in `folder`: their notes, sha256 and the split of each clip. A share `held_out` of the
    scenes, by the order of their digests and at least one if there are two, is for tests."""
    shards = [(path, notes_of(path)) for path in sorted(Path(folder).glob("shard-*.safetensors"))]
    scenes = sorted({clip["scene"] for _, notes in shards for clip in notes["clips"]}, key=digest)
    test = scenes[:max(1, round(held_out * len(scenes)))] if held_out and len(scenes) > 1 else []
    lines = []
    for path, notes in shards:
        clips = [{**clip, "split": "test" if clip["scene"] in test else "train"} for clip in notes.pop("clips")]
        lines.append({"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path), **notes, "clips": clips})
    write_text(Path(folder) / "index.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def read_index(folder):
    """The lines of index.jsonl; ValueError names what is missing, damaged or of another format."""
    path = Path(folder) / "index.jsonl"
    try:
        shards = [json.loads(line) for line in path.read_text().splitlines()]
    except FileNotFoundError:
        raise ValueError(f"{folder} has no index.jsonl: it holds no shards, or encoding has not finished; run "
                         "encode.py or doom.py again") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}; delete it and run encode.py or doom.py again") from None
    for shard in shards:
        if shard["format"] != FORMAT:
            raise ValueError(f"{folder}/{shard['file']} has format {shard['format']}, this code reads {FORMAT}")
        file = Path(folder) / shard["file"]
        if not file.exists() or file.stat().st_size != shard["bytes"]:
            raise ValueError(f"{file} is missing or not of {shard['bytes']} bytes; delete it and make the shards again")
    return shards


def read_shard(folder, line):
    """The tensors of the shard that `line` of the index tells of, mapped where the system can; ValueError if the file
    is not the one that was indexed."""
    path = Path(folder) / line["file"]
    if sha256(path) != line["sha256"]:
        raise ValueError(f"{path} is corrupt: its sha256 is not that of index.jsonl; delete it and make the "
                         "shards again")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def caption_states(tensors, line, number):
    """The text states of caption `number` {name: [L, ...]}, as long as the codec gave them; floats in fp32."""
    states = {key: (tensors[f"text{number}.{key}"], length) for key, length in line["texts"][number][1].items()}
    return {key: torch.cat([s, s.new_zeros(length - len(s), *s.shape[1:])]).to(torch.float32 if s.is_floating_point()
                                                                              else s.dtype)
            for key, (s, length) in states.items()}


def main(folder):
    """Check every shard and say what there is."""
    shards = read_index(folder)
    bad = [s["file"] for s in shards if sha256(Path(folder) / s["file"]) != s["sha256"]]
    clips = [clip for shard in shards for clip in shard["clips"]]
    for split in ("train", "test"):
        part = [clip for clip in clips if clip["split"] == split]
        print(f"{split}: {len(part)} clips, {len({c['scene'] for c in part})} scenes, "
              f"{sum(c['frames'] for c in part)} latent frames")
    if bad:
        raise ValueError(f"corrupt shards in {folder}: {', '.join(bad)}; delete them and make the shards again")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python shards.py FOLDER")
    with one_line_errors():
        main(sys.argv[1])
