"""Codecs of the official backbones against diffusers' own pipelines, with tiny random networks; streams of pixels."""

import json
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from diffusers.video_processor import VideoProcessor
from safetensors import safe_open
from safetensors.torch import save_file

import encode
import language
import model
import official
import play
import train_stage1
import vae
import weights
from control import Condition, Control
from inject import SENTENCES
from rollout import WorldModel, velocity_of
from video import VideoFile, draw_keys, read_picture, read_video, spread

NAMES = list(official.TINY)
PROMPTS = ["A street.", "  Tom &amp;amp;amp; \n\n Jerry ", "", 'A sign says "left" and “right”, "left" again.', "long " * 60]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{backbone: folder of its codec}, each made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = official.make_codec(name, tmp_path_factory.mktemp("codec") / name)
        return made[name]
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_presets():
    before = dict(model.PRESETS)
    official.shrink()
    yield
    model.PRESETS.update(before)


@pytest.fixture(scope="module", params=NAMES)
def ours(request, folders):
    """A codec of each official backbone."""
    return encode.codec(request.param, "cpu", str(folders(request.param)))


def library(coder):
    """The same VAE, as the library alone runs it."""
    kind = getattr(diffusers, vae.CLASSES[coder.spec.arch].library)
    net = kind.from_pretrained(coder.source, subfolder="vae").eval()
    net.use_slicing = True
    return net


def statistics(net):
    """mean and 1 / scale of a VAE, as its pipelines apply them: normalised = (latents - mean) * factor."""
    if isinstance(getattr(net, "_buffers").get("latents_mean"), torch.Tensor):
        mean, std = net.latents_mean, net.latents_std / net.config.scaling_factor
    elif hasattr(net.config, "latents_mean"):
        mean, std = torch.tensor(net.config.latents_mean), torch.tensor(net.config.latents_std)
    else:
        return 0, net.config.scaling_factor
    return mean.view(1, -1, 1, 1, 1), 1 / std.view(1, -1, 1, 1, 1)


def clips(coder, latent_frames, count=1, size=(32, 64)):
    g = torch.Generator().manual_seed(latent_frames)
    frames = 1 + coder.spec.stride[0] * (latent_frames - 1)
    smooth = torch.rand(count, 3, frames, 4, 6, generator=g)
    video = torch.nn.functional.interpolate(smooth, (frames, *size), mode="trilinear")
    return (video.permute(0, 2, 3, 4, 1) * 255).to(torch.uint8)


# ---- Video -----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_encoding_and_decoding_are_the_librarys(ours):
    net, video = library(ours), clips(ours, 4, 2)
    mean, factor = statistics(net)
    want = (net.encode(video.permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist.mode() - mean) * factor
    z = ours.encode(video)
    t, h, w = ours.spec.stride
    assert z.shape == (2, ours.spec.channels, 4, 32 // h, 64 // w) and z.dtype == torch.float32
    assert (z - want).abs().max() < 1e-5 * want.abs().max() and want.std() > 0.05
    assert torch.equal(z[1:], ours.encode(video[1:]))
    with torch.autocast("cpu", torch.bfloat16):                                         # encoding is always fp32
        assert torch.equal(z, ours.encode(video))

    decoded = net.decode(want / factor + mean).sample
    assert (ours.part("vae").pixels(want, {}) - decoded).abs().max() < 1e-5 * decoded.abs().max()
    pictures = torch.tensor(VideoProcessor().postprocess_video(decoded, "np"))          # [B, F, H, W, 3] in 0..1
    seen = ours.decode(want)
    assert seen.dtype == torch.uint8 and seen.shape == video.shape and (seen / 255 - pictures).abs().max() < 0.51 / 255


def streamed(autoencoder, z, *cuts):
    """Pixels of `z`, decoded in pieces, and the state afterwards."""
    state, pieces = {}, []
    for start, stop in zip((0, *cuts), (*cuts, z.shape[2])):
        pieces.append(autoencoder.pixels(z[:, :, start:stop], state))
    return torch.cat(pieces, 2), state


@torch.no_grad()
def test_a_stream_of_pieces_is_a_whole_decode(ours):
    autoencoder, z = ours.part("vae"), torch.randn(2, ours.spec.channels, 7, 2, 3)
    whole = autoencoder.pixels(z, {})
    assert whole.shape[2] == 1 + 6 * ours.spec.stride[0]
    for cuts in ((1, 3, 4), (4,), (2, 6)):
        pieces, state = streamed(autoencoder, z, *cuts)
        assert pieces.shape == whole.shape
        if ours.spec.arch == "wan":
            assert torch.equal(pieces, whole)
        elif ours.spec.arch == "hunyuan":
            assert (pieces - whole).abs().max() < 1e-5 * whole.abs().max()
    if ours.spec.arch == "ltx":         # each piece is the end of a decode of all so far: overlap and it hold all of that
        for n in range(1, 6):
            pieces, _ = streamed(autoencoder, z[:, :, :n], max(1, n - 2))
            end = autoencoder.pixels(z[:, :, :n], {})[:, :, -8 * min(2, n - 1) or None:]
            assert (pieces[:, :, -end.shape[2]:] - end).abs().max() < 1e-5


@torch.no_grad()
def test_hunyuanvideo_remembers_a_bounded_history_and_is_exact_up_to_it(folders):
    coder = encode.codec("hunyuan1.5-8b", "cpu", str(folders("hunyuan1.5-8b")))
    net, z = library(coder), torch.randn(1, 4, 9, 2, 3)
    want = net.decode(z / net.config.scaling_factor).sample
    error = {}
    for history in (3, 6, 9):
        autoencoder = vae.HunyuanVideo(library(coder), coder.spec, history)
        got, state = streamed(autoencoder, z, 2, 4, 6, 8)
        keys = [part for part in state["cache"] if isinstance(part, tuple)]
        assert keys and all(k.shape[1] == v.shape[1] == history for k, v in keys)       # no more than `history` frames
        upto = 1 + 4 * (history - 1)
        assert (got[:, :, :upto] - want[:, :, :upto]).abs().max() < 1e-5 * want.abs().max()
        other, _ = streamed(autoencoder, z, 1, 4, 8)
        assert (got - other).abs().max() < 1e-5 * want.abs().max()                      # wherever the pieces end
        error[history] = (got - want).square().mean().sqrt() / want.std()
    assert 0.3 > error[3] > error[6] > 100 * error[9]


@torch.no_grad()
def test_what_ltx_misses_of_the_future_is_stated_and_the_past_is_in_the_overlap(folders):
    coder = encode.codec("ltx2.3-22b", "cpu", str(folders("ltx2.3-22b")))
    z, errors = torch.randn(1, 8, 9, 2, 3), {}
    whole = coder.part("vae").pixels(z, {})
    for overlap in (1, 4, 7):
        got, _ = streamed(vae.LTX(library(coder), coder.spec, overlap), z, 3, 5, 7)
        far = (got - whole).square().mean((0, 1, 3, 4)).sqrt() / whole.std()            # of each pixel frame
        errors[overlap] = far.mean()
        assert far[-1] < far[16]                        # the last piece has nothing after it, that of frame 16 has
    assert errors[1] > errors[4] > errors[7] > 0


@torch.no_grad()
def test_a_copy_of_the_state_is_a_way_back(ours):
    z, state = torch.randn(1, ours.spec.channels, 6, 2, 3), {}
    ours.decode(z[:, :, :2], state)
    here = dict(state)
    one = ours.decode(z[:, :, 2:4], state)
    other = ours.decode(z[:, :, 4:], dict(here))
    assert torch.equal(ours.decode(z[:, :, 2:4], here), one) and not torch.equal(one, other)
    assert one.shape[1] == 2 * ours.spec.stride[0]


def test_what_does_not_fit_the_strides_is_refused_not_cropped(ours):
    t, h, w = ours.spec.stride
    with pytest.raises(ValueError, match=f"1 \\+ {t} k frames, got {t}: give 1 or {t + 1}"):
        ours.encode(torch.zeros(1, t, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="got 0: give .*1$"):
        ours.encode(torch.zeros(1, 0, 64, 64, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="divisible by .* got 64x72"):
        ours.encode(torch.zeros(1, 1, 64, 72, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8 video"):
        ours.encode(torch.zeros(1, 1, 64, 64, 3))


@pytest.mark.parametrize("name, parameters", [("wan2.1-1.3b", 126_892_531), ("wan2.2-5b", 704_688_668),
                                              ("hunyuan1.5-8b", 1_260_634_115), ("ltx2.3-22b", 726_106_225 - 2 * 128)])
def test_speed_is_measured_on_vaes_of_the_official_sizes(name, parameters):
    with torch.device("meta"):
        net = getattr(diffusers, vae.CLASSES[model.PRESETS[name].arch].library)(**vae.OFFICIAL[name])
    assert sum(p.numel() for p in net.parameters()) == parameters


def test_the_measurement_says_what_it_measured(monkeypatch):
    monkeypatch.setitem(vae.OFFICIAL, "wan2.1-1.3b", official.TINY["wan2.1-1.3b"])
    line = vae.measure("wan2.1-1.3b", torch.device("cpu"), (25, 32, 64))
    assert "25 frames of 32x64: encode" in line and "a chunk of 2 latent frames, 8 pixel frames" in line
    assert float(re.search(r"relative error ([\d.e+-]+);", line)[1]) == 0


# ---- Text ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_wan_text_is_the_librarys(folders):
    pytest.importorskip("ftfy")
    coder = encode.codec("wan2.1-1.3b", "cpu", str(folders("wan2.1-1.3b")))
    ours, prompts = coder.part("language"), [*PROMPTS, "cafÃ© â€” déjà"]
    pipeline = SimpleNamespace(tokenizer=ours.tokenizer, text_encoder=ours.net)
    want = diffusers.WanPipeline._get_t5_prompt_embeds(pipeline, prompts, max_sequence_length=64, device="cpu")
    text = coder.text(prompts)["text"]
    assert text.shape == (6, 64, 24) and (text - want).abs().max() < 1e-5
    cleaned = ["A street.", "Tom & Jerry", "", 'A sign says "left" and "right", "left" again.', PROMPTS[4], "café — déjà"]
    assert [int((row != 0).any(-1).sum()) for row in text] == [min(64, len(p.encode()) + 1) for p in cleaned]
    assert torch.equal(text[:1], coder.text(prompts[:1])["text"])
    assert language.clean("cafÃ© &lt;b&gt;\t x ") == "café <b> x" and language.clean("1 < 2 &amp;amp; 3") == "1 < 2 & 3"


@torch.no_grad()
def test_hunyuanvideo_text_is_the_librarys(folders):
    coder = encode.codec("hunyuan1.5-8b", "cpu", str(folders("hunyuan1.5-8b")))
    ours, text, pipeline = coder.part("language"), coder.text(PROMPTS), diffusers.HunyuanVideo15Pipeline
    before = len(ours.tokenizer(f"<|im_start|>system\n{ours.system}<|im_end|>\n<|im_start|>user\n").input_ids)
    want, mask = pipeline._get_mllm_prompt_embeds(ours.net, ours.tokenizer, PROMPTS, "cpu", 96, crop_start=before)
    assert torch.equal(text["text_mask"], mask.bool())
    assert (text["text"] - want * mask[..., None]).abs().max() < 1e-5
    tail = len("\n") + len("assistant\n") + 2                                       # <|im_end|> and <|im_start|>
    assert text["text_mask"].sum(1).tolist() == [min(96, len((p or " ").encode()) + tail) for p in PROMPTS]

    want, mask = pipeline._get_byt5_prompt_embeds(ours.bytes, ours.draw, PROMPTS, "cpu")
    assert torch.equal(text["glyph_mask"], mask.bool()) and mask.sum(1).tolist() == [0, 0, 0, 28, 0]
    assert (text["glyph"] - want * mask[..., None]).abs().max() < 1e-5
    assert len(ours.system) == 477                                                      # spaces count


@torch.no_grad()
def test_ltx_text_is_the_librarys(folders):
    coder = encode.codec("ltx2.3-22b", "cpu", str(folders("ltx2.3-22b")))
    ours, names = coder.part("language"), {"video_aggregate_embed": "video_text_proj_in", "q_norm": "norm_q",
                                           "k_norm": "norm_k", "transformer_1d_blocks": "transformer_blocks"}
    heads = {f"{kind}_connector_{what}": n for kind in ("video", "audio")
             for what, n in (("num_attention_heads", 4), ("attention_head_dim", 16), ("num_layers", 2),
                             ("num_learnable_registers", 8))}
    theirs = diffusers.pipelines.ltx2.connectors.LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=7, rope_type="split", per_modality_projections=True, proj_bias=True,
        video_hidden_dim=64, audio_hidden_dim=64, video_gated_attn=True, audio_gated_attn=True, **heads).eval()
    state = {}
    for key, p in ours.connector.state_dict().items():
        for own, other in names.items():
            key = key.replace(own, other)
        state[key if key.startswith("video_text") else f"video_connector.{key}"] = p
    missing, surplus = theirs.load_state_dict(state, strict=False)
    assert not surplus and all("audio" in key for key in missing)

    pipeline = SimpleNamespace(tokenizer=ours.tokenizer, text_encoder=ours.net)
    states, mask = diffusers.LTX2Pipeline._get_gemma_prompt_embeds(pipeline, PROMPTS, max_sequence_length=64, device="cpu")
    want, _, valid = theirs(states, mask)
    text = coder.text(PROMPTS)["text"]
    assert valid.all() and text.shape == (5, 64, 64) and (text - want).abs().max() < 1e-5
    assert (text.square().mean(-1).sqrt() - 1).abs().max() < 1e-3
    assert (coder.text(["other"])["text"] - text[:1]).abs().max() > 0.1
    both = ours.connector([s for s in states.unflatten(2, (32, 7)).unbind(-1)], mask.bool())    # several at once
    assert (both - want).abs().max() < 1e-5


def test_sentences_end_where_their_tokens_end(ours):
    if ours.spec.arch == "wan":
        pytest.importorskip("ftfy")
    states = ours.sentences()
    extra = {"wan": 1, "hunyuan": 13, "ltx": 1}[ours.spec.arch]                         # start, end, end of turn
    lengths = [min(len(sentence) + extra, ours.spec.text_len) for sentence in SENTENCES]
    assert states.shape == (81, max(lengths), ours.spec.text_dim)
    assert (states != 0).any(-1).sum(1).tolist() == lengths


# ---- One interface ---------------------------------------------------------------------------------------------------

def test_networks_are_loaded_when_needed_and_given_back(folders):
    coder = encode.OfficialCodec(official.spec_of("hunyuan1.5-8b"), "cpu", folders("hunyuan1.5-8b"))
    assert not coder.loaded and coder.fingerprint() and not coder.loaded
    first = coder.text(["A street."])
    assert list(coder.loaded) == ["language"]
    z = coder.encode(clips(coder, 1))
    coder.release("language")
    assert list(coder.loaded) == ["vae"]
    assert torch.equal(coder.text(["A street."])["text"], first["text"]) and list(coder.loaded) == ["vae"]  # remembered
    coder.text(["Another."])
    coder.release()
    assert not coder.loaded and torch.equal(coder.encode(clips(coder, 1)), z)
    assert encode.codec("tiny") is encode.codec("tiny") and encode.codec("tiny").release() is None


def test_a_fingerprint_is_that_of_weights_settings_and_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SAMPLE", 16)                                           # real files are large
    name, spec = "ltx2.3-22b", official.spec_of("ltx2.3-22b")
    folder = official.make_codec(name, tmp_path)
    print_of = lambda: encode.OfficialCodec(spec, "cpu", folder).fingerprint()
    seen = [print_of()]
    assert print_of() == seen[0] and seen[0].startswith(f"{name} ")

    def change(file, edit):
        before = file.read_bytes()
        edit(file)
        seen.append(print_of())
        file.write_bytes(before)
        assert print_of() == seen[0]

    config, weights = folder / "vae" / "config.json", folder / "vae" / "diffusion_pytorch_model.safetensors"
    edit = lambda **fields: lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    change(config, edit(scaling_factor=2.0))
    change(config, edit(_diffusers_version="0.0"))
    assert seen.pop() == seen[0]                                                        # says nothing of the latents
    def shift(*names):
        """Add 1 to tensors (all, or `names`) of a file whose size stays the same."""
        def edit(file):
            with safe_open(file, "pt") as reader:
                notes, tensors = reader.metadata(), {key: reader.get_tensor(key) for key in reader.keys()}
            size = file.stat().st_size
            save_file({key: x + (key in (names or tensors)) for key, x in tensors.items()}, file, notes)
            assert file.stat().st_size == size
        return edit

    for part in (weights, folder / "text_encoder" / "model.safetensors", folder / spec.file):
        change(part, shift())
    change(weights, shift("latents_mean"))
    change(folder / "tokenizer" / "tokenizer.json", lambda file: file.write_text(file.read_text() + " "))
    assert len({*seen}) == len(seen) == 7


def test_wrong_sources_are_named(folders, tmp_path, monkeypatch):
    wan = official.spec_of("wan2.1-1.3b")
    with pytest.raises(OSError, match="has no folder vae"):
        encode.OfficialCodec(wan, "cpu", tmp_path).decode(torch.zeros(1, 4, 1, 2, 2))
    with pytest.raises(ValueError, match="4 latent channels, wan2.1-1.3b needs 16"):
        encode.OfficialCodec(replace(wan, channels=16), "cpu", folders("wan2.1-1.3b")).part("vae")
    with pytest.raises(ValueError, match="no VAE of hunyuan1.5-8b"):
        encode.OfficialCodec(official.spec_of("hunyuan1.5-8b"), "cpu", folders("wan2.1-1.3b")).part("vae")
    with pytest.raises(ValueError, match="computed, not read"):
        encode.codec("tiny", "cpu", str(tmp_path))
    (tmp_path / "other").mkdir()
    for part in language.LTXText.parts:
        (tmp_path / "other" / part).symlink_to(folders("ltx2.3-22b") / part)
    save_file({"vocoder.x": torch.zeros(1)}, tmp_path / "other" / model.PRESETS["ltx2.3-22b"].file)
    with pytest.raises(ValueError, match="has no 'video_aggregate_embed.weight'"):
        encode.OfficialCodec(official.spec_of("ltx2.3-22b"), "cpu", tmp_path / "other").text([""])
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(OSError, match=r'ftfy is not installed; pip install "biwm\[encode\]"'):
        language.clean("x")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(OSError, match=r'diffusers is not installed; pip install "biwm\[encode\]"'):
        encode.OfficialCodec(wan, "cpu", folders("wan2.1-1.3b")).part("vae")


def test_cameras_of_keys_walk_and_turn_under_a_lens(folders):
    coder = encode.codec("wan2.1-1.3b", "cpu", str(folders("wan2.1-1.3b")))
    c2w, K = coder.cameras(torch.tensor([[0, 9, 3]]))
    assert c2w.shape == (1, 3, 4, 4) and c2w[0, 1:, 2, 3].tolist() == pytest.approx([coder.STEP] * 2)
    assert K.shape == (1, 3, 3, 3) and float(K[0, 0, 1, 1] / K[0, 0, 0, 0]) == pytest.approx(64 / 32)  # square pixels


# ---- Rolled out ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def worlds(folders):
    """A world model of each official backbone, with random weights."""
    made = {}

    def world(name, **options):
        if name not in made:
            torch.manual_seed(0)
            made[name] = official.randomise(model.build(name))
        return WorldModel(made[name], steps=2, source=str(folders(name)), **options)
    return world


@pytest.mark.parametrize("name", NAMES)
def test_a_dream_starts_with_one_pixel_frame_and_goes_on_without_seams(worlds, name):
    dream, t = worlds(name), model.PRESETS[name].stride[0]
    assert worlds(name).codec is dream.codec                                            # one for all sessions
    assert dream.reset("A street.", seed=1).shape == (1 + t, 32, 64, 3) and list(dream.codec.loaded) == ["vae"]
    frames, latents = [], [dream.history.latents]
    for actions in ([9, 9], [12], [3, 0]):
        here = dream.state()
        frames.append(dream.step(actions))
        latents.append(dream.history.latents[:, :, -len(actions):])
        dream.restore(here)
        assert torch.equal(dream.step(actions), frames[-1])                             # also the codec goes back
    assert [len(f) for f in frames] == [2 * t, t, 2 * t] and dream.history.latents.shape[2] == 2 < dream.history.n
    if name != "ltx2.3-22b":
        whole = dream.codec.decode(torch.cat(latents, 2))[0]
        assert (torch.cat(frames).int() - whole[1 + t:].int()).abs().max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_starts_are_encoded_and_the_guided_teacher_is_told_of_them_twice(worlds, name):
    dream, t = worlds(name, guidance=3.0, use_ode=True), model.PRESETS[name].stride[0]
    for count in (1, 2):
        first = torch.randint(256, (1 + t * (count - 1), 32, 64, 3), dtype=torch.uint8)
        assert dream.reset("A street.", first, actions=[0] * count).shape == first.shape
        assert torch.equal(dream.history.latents, dream.codec.encode(first[None])) and len(dream.step([9, 9])) == 2 * t
    before = dream.state()
    for refused, message in ((first[:-1], "frames"), (first.tile(1, 2, 1, 1), "32x64"), (first[:, :, :50], "divisible")):
        with pytest.raises(ValueError, match=message):
            dream.reset("Other.", refused)
    assert torch.equal(dream.history.latents, before["history"].latents) and dream.text is before["text"]


class Spy(torch.nn.Module):
    """A backbone that notes the positions it is told."""

    def __init__(self, spec):
        super().__init__()
        self.spec, self.weight, self.told = spec, torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, x, sigma, text, control=None, memory=None, frames=None):
        self.told.append(frames)
        return x


def test_only_a_videos_first_latent_frame_stands_at_position_zero():
    x, control = torch.zeros(1, 8, 3, 2, 2), Control(torch.zeros(1, 9, dtype=torch.long))
    for name, later in (("ltx2.3-22b", [1, 2, 3]), ("tiny", None)):                     # tiny: all frames are alike
        spy = Spy(model.PRESETS[name])
        condition = Condition({"text": torch.zeros(1, 2, 4)}, control)
        for start in (0, 2, 5):
            velocity_of(spy)(x, torch.zeros(1, 3), condition.frames(start, start + 3))
        velocity_of(spy)(x, torch.zeros(1, 3), condition.frames(2, 8).frames(0, 3).null(condition.text))
        assert [frames if frames is None else frames.tolist() for frames in spy.told] == [None, later, later, later]


def test_guidance_without_words_still_sees_the_picture():
    text = {"text": torch.ones(2, 3, 4), "text_mask": torch.ones(2, 3, dtype=torch.bool), "vision": torch.ones(2, 5, 6),
            "image": torch.ones(2, 4, 1, 2, 2)}
    empty = {"text": torch.zeros(1, 3, 4), "text_mask": torch.zeros(1, 3, dtype=torch.bool)}
    null = Condition(text, Control(torch.zeros(2, 1)), begins=False).null(empty)
    assert null.control is None and not null.begins and {*null.text} == {*text}
    assert null.text["vision"] is text["vision"] and null.text["image"] is text["image"]
    assert null.text["text"].shape == (2, 3, 4) and not null.text["text"].any() and null.text["text_mask"].shape == (2, 3)


def test_withheld_words_take_their_masks_along_and_leave_the_picture():
    B, cfg = 64, train_stage1.Config(drop=0.3, drop_text=0.2)
    text = {"text": torch.ones(B, 3, 4), "text_mask": torch.ones(B, 3, dtype=torch.bool), "vision": torch.ones(B, 5, 6)}
    empty = {"text": torch.zeros(1, 3, 4), "text_mask": torch.tensor([[True, False, False]])}
    told = train_stage1.drop(Condition(text, Control(torch.full((B, 2), 9)), begins=False), empty, cfg)
    without = (told.text["text"] == 0).flatten(1).all(1)
    assert 0.3 * B < without.sum() < 0.7 * B and torch.equal(told.text["text_mask"].sum(1), torch.where(without, 1, 3))
    assert told.text["vision"].all() and not told.begins


def test_the_page_plays_an_official_backbone(folders, tmp_path):
    network = official.randomise(model.build("wan2.1-1.3b"))
    weights.save(network, tmp_path / "student.safetensors")
    server = play.Server(play.Config(backbone="wan2.1-1.3b", codec=str(folders("wan2.1-1.3b")), port=0, steps=1,
                                     weights=str(tmp_path / "student.safetensors"), out=str(tmp_path)), torch.device("cpu"))
    session = play.Session(server)
    assert not session.greeting["truth"] and len(session.greeting["pictures"]) == 5 and session.greeting["maps"] == []
    session.understand({"record": True})()
    reply = session.understand({"step": [["w"], ["w", "right"]]})()
    assert reply["labels"] == [9] * 4 + [12] * 4 and len(reply["pictures"]) == 8
    assert "--codec" in session.cut()["command"] and len(iio.imread(session.path)) == 5 + 8
    server.server_close()


# ---- Pictures in, pictures out ---------------------------------------------------------------------------------------

def test_a_picture_of_any_size_covers_the_frame_without_being_stretched(tmp_path):
    spec = model.PRESETS["wan2.1-1.3b"]
    picture = np.zeros((90, 200, 3), np.uint8)
    picture[:, 100:] = 255                                                              # the edge is in the middle
    Image.fromarray(picture).save(tmp_path / "wide.png")
    wide = read_picture(tmp_path / "wide.png", spec)
    assert wide.shape == (1, 32, 64, 3) and wide[0, :, :30].max() < 9 and wide[0, :, 34:].min() > 246
    picture = Image.fromarray(picture)
    picture.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=bytes.fromhex(
        "45786966000049492a0008000000010012010300010000000600000000000000"))              # orientation 6: a phone's
    assert (read_picture(tmp_path / "turned.jpg", spec).int() - wide.int()).abs().float().mean() < 5


def test_a_video_start_is_its_end_at_the_models_rate(tmp_path):
    pytest.importorskip("av")
    spec = replace(model.PRESETS["wan2.1-1.3b"], fps=16, chunk=2)                       # five pixel frames
    shades = np.arange(40, 240, 5, dtype=np.uint8)                                      # 40 frames, 32 a second
    iio.imwrite(tmp_path / "x.mp4", np.tile(shades[:, None, None, None], (1, 48, 96, 3)), fps=32, codec="libx264")
    start = read_video(tmp_path / "x.mp4", spec)
    steps = start.float().mean((1, 2, 3)).diff()
    assert start.shape == (5, 32, 64, 3) and ((steps - 10).abs() < 3).all() and start[-1].float().mean() > 220
    with pytest.raises(ValueError, match="x.mp4 is too short: [56] frames at 4 a second, a start has 25"):
        read_video(tmp_path / "x.mp4", replace(spec, fps=4, chunk=7))
    (tmp_path / "no.mp4").write_bytes(b"no video")
    for name, what in (("no.mp4", "unreadable"), ("absent.mp4", "missing")):
        with pytest.raises(ValueError, match=f"{name} is {what}"):
            read_video(tmp_path / name, spec)


def test_labels_are_spread_over_pixel_frames():
    assert spread([3, 9], 5, 4) == [3, 9, 9, 9, 9] and spread([9, 12], 8, 4) == [9] * 4 + [12] * 4
    assert spread(torch.tensor([0, 1, 2]), 3, 1) == [0, 1, 2]


def test_keys_are_drawn_as_large_on_any_screen_and_only_small_ones_are_enlarged():
    small, large = torch.zeros(2, 64, 96, 3, dtype=torch.uint8), torch.zeros(2, 480, 832, 3, dtype=torch.uint8)
    small, large = draw_keys(small, [9, 0]), draw_keys(large, [9, 0])
    assert small.shape == (2, 256, 384, 3) and large.shape == (2, 480, 832, 3)
    bright = [np.argwhere(frames[0].max(-1) > 200) for frames in (small, large)]        # W is pressed
    assert bright[0].min(0) / 256 == pytest.approx(bright[1].min(0) / 480, abs=0.02)


def test_a_file_is_written_while_its_frames_are_made(tmp_path):
    for name in ("walk.mp4", "walk.gif"):
        file = VideoFile(tmp_path / name, 8)
        for shade in (0, 100, 200):
            file.add(np.stack([np.full((64, 96, 3), shade + i, np.uint8) for i in (0, 9)]))
        file.close()
        frames = iio.imread(tmp_path / name)
        assert file.frames == len(frames) == 6 and frames[4].mean() == pytest.approx(200, abs=4)
