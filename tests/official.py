"""Tiny random stand-ins for the official backbones and their codecs, in the layouts of the hub: nothing is downloaded.

    python tests/official.py train_stage1.py ...        # a command of this project with the presets so small
"""

import runpy
import sys
from dataclasses import replace

import diffusers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import language
import model
import vae

COMMON = {"layers": 2, "heads": 2, "freq_dim": 32, "chunk": 2, "window": 4}
SMALL = {"wan": {**COMMON, "dim": 64, "ffn": 96, "channels": 4, "text_dim": 24, "text_len": 64},
         "hunyuan": {**COMMON, "dim": 64, "ffn": 96, "channels": 4, "text_dim": 24, "text_len": 96, "glyph_dim": 32,
                     "vision_dim": 20, "rope_dims": (8, 12, 12), "refiner": 1},
         "ltx": {**COMMON, "dim": 64, "ffn": 96, "channels": 8, "text_dim": 64, "text_len": 64}}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 0.5, 0.7]}
TINY = {"wan2.1-1.3b": {"base_dim": 8, "z_dim": 4, **STATISTICS},
        "wan2.2-5b": {**vae.WAN22, "base_dim": 8, "decoder_base_dim": 12, "z_dim": 4, **STATISTICS},
        "hunyuan1.5-8b": {"latent_channels": 4, "block_out_channels": (8, 8, 16, 16, 16)},
        "ltx2.3-22b": {**vae.LTX23, "latent_channels": 8, "block_out_channels": (8, 16, 32, 32),
                       "decoder_block_out_channels": (8, 16, 16, 32)}}
CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def randomise(net, seed=0):
    """All parameters random, none zero or one: else half of a network goes untested."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g) * (1.2 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.3) + (p.ndim == 1)
    for name, buffer in net.named_buffers():
        if name in STATISTICS:
            buffer.copy_(torch.rand(buffer.shape, generator=g) + 0.5)
    return net.eval()


def spec_of(name):
    """The preset, small: two latent frames a chunk, four a window, pictures of 32 rows and 64 columns."""
    spec = model.PRESETS[name]
    return replace(spec, **SMALL[spec.arch], size=(1 + 3 * spec.stride[0], 32, 64))


def shrink():
    """Make the presets small in this process."""
    model.PRESETS.update({name: spec_of(name) for name in TINY})


def make_checkpoint(name, folder):
    """A random checkpoint of the small preset in the official layout."""
    spec = spec_of(name)
    net = randomise(model.ARCHITECTURES[spec.arch](spec))
    prefix = "model.diffusion_model." if spec.arch == "ltx" else ""
    file = folder / spec.file.replace("*", "")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + key: p.contiguous() for key, p in net.state_dict().items()}, file)
    return folder


def make_vae(name):
    """A tiny random VAE of diffusers' class."""
    return randomise(getattr(diffusers, vae.CLASSES[spec_of(name).arch].library)(**TINY[name]))


def tokenizer(start=None, end=None, chat=None):
    """A token per byte, with the start and end that the official tokenizer puts around a prompt."""
    extra = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(extra + alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if start or end:
        made.post_processor = processors.TemplateProcessing(
            " ".join(part for part in (start, "$A", end) if part), None,
            [(token, extra.index(token)) for token in (start, end) if token])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>", chat_template=chat,
        additional_special_tokens=extra[3:])


def t5(kind, config, width):
    return getattr(transformers, kind)(getattr(transformers, config)(
        vocab_size=400, d_model=width, d_kv=8, d_ff=48, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.0))


def make_text(name, folder):
    """Tiny random text encoders and tokenizers of a backbone, in the folders of the hub's layout."""
    arch, parts = model.PRESETS[name].arch, {}
    if arch == "wan":
        parts = {"text_encoder": t5("UMT5EncoderModel", "UMT5Config", 24), "tokenizer": tokenizer(end="</s>")}
    elif arch == "hunyuan":
        parts = {"text_encoder": transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(
                     vocab_size=300, hidden_size=24, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
                     num_key_value_heads=2, use_sliding_window=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                     rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 1]})),
                 "tokenizer": tokenizer(chat=CHAT),
                 "text_encoder_2": t5("T5EncoderModel", "T5Config", 32), "tokenizer_2": transformers.ByT5Tokenizer()}
    else:
        text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}
        parts = {"text_encoder": transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
                     text_config=text, vision_config=vision, mm_tokens_per_image=4)),
                 "tokenizer": tokenizer(start="<s>")}
    for part, made in parts.items():
        (randomise(made) if isinstance(made, torch.nn.Module) else made).save_pretrained(folder / part)


def make_connector(folder):
    """The connector's part of LTX's official file, with tensors of other parts that must not disturb."""
    own = randomise(language.Connector(32, 7, 64, 4, 2, 8))
    file = {("text_embedding_projection." if name.startswith("video_aggregate")
             else "model.diffusion_model.video_embeddings_connector.") + name: p for name, p in own.state_dict().items()}
    other = {key.replace("video", "audio"): torch.zeros(2) for key in file}
    save_file({**file, **other, "vocoder.conv.weight": torch.zeros(2)}, folder / model.PRESETS["ltx2.3-22b"].file)
    return own


def make_codec(name, folder):
    """A folder with the codec of backbone `name`: vae, text encoders, tokenizers, for LTX the official file."""
    folder.mkdir(parents=True, exist_ok=True)
    make_vae(name).save_pretrained(folder / "vae")
    make_text(name, folder)
    if model.PRESETS[name].arch == "ltx":
        make_connector(folder)
    return folder


if __name__ == "__main__":
    shrink()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
