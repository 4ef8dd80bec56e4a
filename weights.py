"""Files of weights: where a checkpoint is (file, folder, hub repository), what is in it, reading and writing it.

Reading goes through the headers first and then tensor by tensor from the mapped file: nothing is held twice.
"""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common import on_host, put, rank, sha256

ASSETS = Path(__file__).parent / "assets"


def listed(names):
    """All of `names` in a line; if they are many, * stands for any number of a block."""
    names = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names) if len(names) > 8 else names
    return ", ".join(f"'{name}'" for name in names)


def default_source(spec):
    """The official repository of a preset, or the file this project ships for it."""
    return ASSETS / spec.source if spec.source.endswith(".safetensors") else spec.source


def fetched(source, *patterns):
    """`source` as a path: one that is local as it is, of a hub repository the files that match `patterns`."""
    path = Path(source)
    if path.exists() or path.suffix == ".safetensors" or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    try:
        return Path(snapshot_download(str(source), allow_patterns=[*patterns]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OSError(f"{source} is no local folder and could not be fetched from the hub: {error}") from None


def weight_files(source, spec):
    """The safetensors files of a checkpoint: a file, or a folder or hub repository in the official layout or bare."""
    path = fetched(source, spec.file, f"{spec.file}.index.json")
    if path.is_file():
        return [path]
    if not path.exists():
        raise OSError(f"checkpoint {source} does not exist; give a safetensors file, a folder or a hub repository id")
    official = path / spec.file
    folder = official.parent if official.parent.is_dir() else path
    files = sorted(folder.glob(official.name)) or sorted(folder.glob("*.safetensors"))
    index = sorted(folder.glob("*.safetensors.index.json"))
    if len(index) == 1:
        try:
            files = sorted({folder / name for name in json.loads(index[0].read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OSError(f"{index[0]} is not an index of safetensors files; fetch it again") from None
    elif len(files) != 1:
        raise OSError(f"{folder} has {len(files)} safetensors files and {len(index)} indices, not {spec.file} of "
                      f"{spec.name}; give the file itself")
    return files


def fingerprint(source, spec):
    """sha256 of a checkpoint: of its file, or of the hashes of its files in their order."""
    hashes = [sha256(file) for file in weight_files(source, spec)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def component(source, *parts):
    """The folder with `parts` ("vae", "tokenizer", ...) of a model in diffusers' layout: a local one, or that of a hub
    repository, of which only they are fetched."""
    path = fetched(source, *(f"{part}/*" for part in parts))
    if absent := [part for part in parts if not (path / part).is_dir()]:
        raise OSError(f"{source} has no folder {' and no '.join(absent)}; codecs are read from a folder in diffusers' "
                      "layout or a hub repository, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    return path


def headers(files, spec, official):
    """{our name: (file, key in it, shape)} from the headers alone; `official` gives our name of a key, None if unused.

    Refuses files of another preset, and a tensor that is there twice.
    """
    stored, base = {}, {}
    for file in files:
        try:
            with safe_open(file, "numpy") as reader:        # unlike "pt" it needs no address space of the file's size
                notes = reader.metadata() or {}
                if (made_for := notes.get("backbone", spec.name)) != spec.name:
                    raise ValueError(f"{file} was made for the backbone {made_for}, not {spec.name}; "
                                     f"give --backbone {made_for}")
                if "base" in notes:                         # this file holds what was trained, the rest is there
                    base |= headers(weight_files(notes["base"], spec), spec, official)
                for key in reader.keys():
                    if (name := official(key)) in stored and name is not None:
                        raise ValueError(f"'{name}' is there twice, in {stored[name][0]} and as '{key}' in {file}; "
                                         "leave one of them in the folder")
                    stored[name] = file, key, reader.get_slice(key).get_shape()
        except FileNotFoundError:
            raise OSError(f"checkpoint {file} does not exist, though its index names it; fetch it again") from None
        except SafetensorError as error:
            raise OSError(f"{file} is not a complete safetensors file ({error}); fetch it again, or convert it if it "
                          "is of another format") from None
    return {name: where for name, where in (base | stored).items() if name is not None}


def header(source, spec):
    """Notes for a file of the weights of `source` in another form: what it says of itself, and its sha256."""
    with safe_open(weight_files(source, spec)[0], "numpy") as reader:
        notes = {name: note for name, note in (reader.metadata() or {}).items() if name not in ("base", "format")}
    return {"backbone": spec.name, **notes, "made_from": fingerprint(source, spec)}


def note(files, name):
    """The note `name` in the headers of `files`; None if there is none."""
    for file in files:
        with safe_open(file, "numpy") as reader:
            if name in (notes := reader.metadata() or {}):
                return notes[name]
    return None


def read(stored):
    """(name, slice) of each tensor in `stored`; slice[...] is the tensor, a view of the mapped file, and slice[a:b] the
    rows that a rank of a sharded model needs. One file is open at a time."""
    for file in dict.fromkeys(file for file, *_ in stored.values()):
        with safe_open(file, "pt") as reader:
            for name, (home, key, _) in stored.items():
                if home == file:
                    yield name, reader.get_slice(key)


def save(model, path, dtype=torch.bfloat16, weights=None, **notes):
    """Write `weights` (default: the model's) as one safetensors file; `notes` go into its header.

    Every rank calls it, to gather what is sharded, one tensor at a time; rank 0 writes.
    """
    weights = weights or model.state_dict()
    path, partial = Path(path), Path(f"{path}.partial")
    notes |= {} if model.compress is None else {"history": model.compress.settings}
    header = {"backbone": model.spec.name, **{k: str(v) for k, v in notes.items()}}
    weights = {k: on_host(v, dtype).contiguous() for k, v in weights.items()}
    if rank() > 0:
        return
    try:
        save_file(weights, partial, metadata=header)
    except SafetensorError as error:                        # a full disk, a folder that has gone
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from None
    put(partial, path)
