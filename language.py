"""Frozen text encoders of the official backbones, from transformers: a prompt -> the states that a backbone listens to.

    Wan           UMT5-XXL
    HunyuanVideo  Qwen2.5-VL's language model; ByT5 for words in quotation marks, which are to be drawn
    LTX           Gemma 3, all of its layers, then a connector whose weights are in LTX's own file

An encoder is a callable: prompt -> (text, tokens), a dict of tensors [1, ...] as the backbone's forward takes it, and
how many rows of text["text"] come from the prompt.
"""

import html
import inspect
import math
import re

import torch
from einops import rearrange
from torch import nn

from block import attention
from common import optional
from model import LTXAttention, named, rms_norm
from rotary import rotate_halves
from weights import component, default_source, headers, read, weight_files


def pretrained(kind, folder, part, **options):
    """A model or tokenizer of the transformers class `kind` from folder/part."""
    return getattr(optional("transformers", "encode"), kind).from_pretrained(folder / part, **options)


def network(kind, folder, part, device):
    """A frozen encoder: bf16 on a GPU, as the official runs have it, fp32 on the CPU."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return pretrained(kind, folder, part, dtype=dtype).to(device).eval().requires_grad_(False)


def clean(prompt):
    """Wan's cleaning: broken encodings mended, HTML entities resolved (twice), whitespace collapsed."""
    prompt = html.unescape(html.unescape(optional("ftfy", "encode").fix_text(prompt)))
    return re.sub(r"\s+", " ", prompt).strip()


class WanText:
    """text [1, 512, 4096]: zeros after the end of the prompt, which the model attends to, so they matter."""

    parts = "text_encoder", "tokenizer"

    def __init__(self, source, spec, device):
        folder = component(source, *self.parts)
        self.tokenizer, self.spec, self.device = pretrained("AutoTokenizer", folder, "tokenizer"), spec, device
        self.net = network("UMT5EncoderModel", folder, "text_encoder", device)

    def __call__(self, prompt):
        tokens = self.tokenizer([clean(prompt)], padding="max_length", max_length=self.spec.text_len, truncation=True,
                                return_tensors="pt").to(self.device)
        states = self.net(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
        return {"text": states * tokens.attention_mask[..., None]}, int(tokens.attention_mask.sum())


class HunyuanText:
    """text [1, 1000, 3584] and glyph [1, 256, 1472] with masks, zero where those are false.

    The prompt is the user's turn of a chat whose system message asks to describe a video; what precedes its first word
    is cut off. An empty one is a single space, so that the unconditional branch has tokens too: those that end a turn.
    """

    parts = "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"
    HEADER, SKIP, GLYPHS = "<|im_start|>user\n", 2, 256         # last layers that are not used; rows of glyph states

    def __init__(self, source, spec, device):
        folder = component(source, *self.parts)
        self.tokenizer = pretrained("AutoTokenizer", folder, "tokenizer", padding_side="right")
        self.net = network("Qwen2_5_VLTextModel", folder, "text_encoder", device)
        self.bytes = pretrained("ByT5Tokenizer", folder, "tokenizer_2")
        self.draw = network("T5EncoderModel", folder, "text_encoder_2", device)
        pipeline = optional("diffusers", "encode").HunyuanVideo15Pipeline._get_mllm_prompt_embeds
        self.system = inspect.signature(pipeline).parameters["system_message"].default
        self.spec, self.device = spec, device

    def __call__(self, prompt):
        chat = [{"role": "system", "content": self.system}, {"role": "user", "content": prompt or " "}]
        chat = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        before = chat[:chat.index(self.HEADER) + len(self.HEADER)]
        start = len(self.tokenizer(before).input_ids)           # 108 with the official tokenizer
        tokens = self.tokenizer([chat], padding="max_length", max_length=start + self.spec.text_len, truncation=True,
                                return_tensors="pt").to(self.device)
        states = self.net(tokens.input_ids, tokens.attention_mask, output_hidden_states=True).hidden_states
        states, mask = states[-1 - self.SKIP][:, start:].float(), tokens.attention_mask[:, start:].bool()
        glyph, glyph_mask = self.glyphs(prompt)
        return {"text": states * mask[..., None], "text_mask": mask, "glyph": glyph, "glyph_mask": glyph_mask}, \
            int(mask.sum())

    def glyphs(self, prompt):
        """States [1, 256, 1472] of what stands in quotation marks, each span once, and their mask."""
        spans = dict.fromkeys(a or b for a, b in re.findall(r'"(.*?)"|“(.*?)”', prompt))
        if not spans:
            nothing = torch.zeros(1, self.GLYPHS, self.draw.config.d_model, device=self.device)
            return nothing, nothing[..., 0].bool()
        tokens = self.bytes(["".join(f'Text "{span}". ' for span in spans)], padding="max_length", truncation=True,
                            max_length=self.GLYPHS, return_tensors="pt").to(self.device)
        states = self.draw(tokens.input_ids, tokens.attention_mask.float()).last_hidden_state.float()
        return states * tokens.attention_mask[..., None], tokens.attention_mask.bool()


# ---- LTX -------------------------------------------------------------------------------------------------------------

class ConnectorBlock(nn.Module):
    """Pre-norm self-attention and MLP, without weights in the norms."""

    def __init__(self, dim, heads, eps=1e-6):
        super().__init__()
        self.attn1, self.eps = LTXAttention(dim, heads, eps), eps
        self.ff = named(net=nn.Sequential(named(proj=nn.Linear(dim, 4 * dim)), nn.GELU("tanh"),
                                          nn.Linear(4 * dim, dim)))

    def forward(self, x, rope):                         # [B, S, D]
        h = rms_norm(x, self.eps)
        q, k, v = self.attn1.asks(h)                    # each [B, heads, S, d]
        y = attention(rotate_halves(q, rope).to(v.dtype), rotate_halves(k, rope).to(v.dtype), v)
        x = x + self.attn1.out(rearrange(y, "b h n d -> b n (h d)"), self.attn1.gate(h))
        return x + self.ff(rms_norm(x, self.eps))


class Connector(nn.Module):
    """LTX-2.3's way from the states of a language model to its text [B, S, dim] (LTX-2, arXiv:2601.03233).

    All layers of each token, normalised, become one feature; the prompt moves to the front; learnt registers take the
    place of the padding, and a small bidirectional transformer thinks it over. Keys as in the official file.
    """

    SPAN = 4096                                         # positions run from -1 to 1 over so many tokens
    KEYS = re.compile(r"(model\.diffusion_model\.video_embeddings_connector|text_embedding_projection)\.")

    def __init__(self, width, states, dim, heads, layers, registers):
        """For `states` hidden states of `width`, embedding and last one included."""
        super().__init__()
        self.width, self.heads = width, heads
        self.video_aggregate_embed = nn.Linear(width * states, dim)
        self.learnable_registers = nn.Parameter(torch.randn(registers, dim))
        self.transformer_1d_blocks = nn.ModuleList(ConnectorBlock(dim, heads) for _ in range(layers))

    @classmethod
    def official(cls, key):
        """Our name of a tensor of the official file; None for all but those of this connector."""
        return cls.KEYS.sub("", key) if cls.KEYS.match(key) and "audio" not in key else None

    @classmethod
    def load(cls, files, spec, width, device, dtype):
        """The connector of the official `files`, which tell its size, for a language model of `width`."""
        stored = headers(files, spec, cls.official)
        try:
            (dim, features), (registers, _) = (stored[key][2] for key in ("video_aggregate_embed.weight",
                                                                         "learnable_registers"))
            heads = stored["transformer_1d_blocks.0.attn1.to_gate_logits.weight"][2][0]
        except KeyError as key:
            raise ValueError(f"{files[0]} has no {key}: it is not the whole official file of {spec.name}") from None
        if features % width:
            raise ValueError(f"the connector in {files[0]} takes {features} features, no multiple of the {width} of "
                             "the text encoder")
        layers = 1 + max(int(key.split(".")[1]) for key in stored if key.startswith("transformer_1d_blocks."))
        with torch.device("meta"):
            self = cls(width, features // width, dim, heads, layers, registers)
        state = {name: part[...].to(device, dtype) for name, part in read(stored)}
        self.load_state_dict(state, assign=True)
        return self.eval().requires_grad_(False)

    def rope(self, S, device):
        """cos and sin [heads, S, d / 2]: one ladder of frequencies through all heads, as in `model.ltx_rope`."""
        D = self.learnable_registers.shape[1]
        omega = 10000 ** torch.linspace(0, 1, D // 2, dtype=torch.float64, device=device) * math.pi / 2
        position = torch.arange(S, dtype=torch.float32, device=device) / self.SPAN * 2 - 1
        angle = rearrange(position[:, None] * omega.float(), "s (h d) -> h s d", h=self.heads)
        return angle.cos(), angle.sin()

    def forward(self, states, mask):
        """`states`: tensors [B, S, width] of all layers; `mask` bool [B, S], true at tokens -> [B, S, dim]."""
        x = torch.stack([rms_norm(h, 1e-6) for h in states], -1).flatten(2)             # [B, S, width * states]
        x = torch.where(mask[..., None], x, 0) * math.sqrt(len(self.video_aggregate_embed.weight) / self.width)
        x = self.video_aggregate_embed(x.to(self.video_aggregate_embed.weight.dtype))   # [B, S, dim]

        order = mask.int().argsort(dim=1, descending=True, stable=True)                     # the prompt first
        x, S = x.gather(1, order[..., None].expand_as(x)), x.shape[1]
        if S % len(self.learnable_registers):
            raise ValueError(f"{len(self.learnable_registers)} registers do not fill {S} positions evenly")
        registers = self.learnable_registers.repeat(S // len(self.learnable_registers), 1)          # [S, dim]
        x = torch.where(torch.arange(S, device=x.device)[:, None] < mask.sum(1)[:, None, None], x, registers)

        rope = self.rope(S, x.device)
        for block in self.transformer_1d_blocks:
            x = block(x, rope)
        return rms_norm(x, 1e-6)


class LTXText:
    """text [1, 1024, 4096]: prompt and registers, all of it valid. The official file is looked for in `source`, which
    may be a folder that holds it beside the encoder, and else where the backbone's weights come from."""

    parts = "text_encoder", "tokenizer"

    def __init__(self, source, spec, device):
        folder = component(source, *self.parts)
        self.tokenizer = pretrained("AutoTokenizer", folder, "tokenizer", padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.net = network("Gemma3ForConditionalGeneration", folder, "text_encoder", device).model.language_model
        files = weight_files(source if (folder / spec.file).exists() else default_source(spec), spec)
        self.connector = Connector.load(files, spec, self.net.config.hidden_size, device, self.net.dtype)
        self.spec, self.device = spec, device

    def __call__(self, prompt):
        tokens = self.tokenizer([prompt.strip()], padding="max_length", max_length=self.spec.text_len, truncation=True,
                                return_tensors="pt").to(self.device)
        mask = tokens.attention_mask
        states = self.net(tokens.input_ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return {"text": self.connector(states, mask.bool()).float()}, int(mask.sum())


ENCODERS = {"wan": WanText, "hunyuan": HunyuanText, "ltx": LTXText}
