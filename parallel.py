"""Many processes, one run: copies or shards of the weights, tokens of a clip spread out; passes over finished blocks.

    torchrun --nproc_per_node 2 train_stage1.py                                 # a copy each, gradients averaged
    torchrun --nproc_per_node 8 train_stage1.py --shard fsdp --recompute        # one copy, its rows spread over 8
    torchrun --nproc_per_node 8 train_stage1.py --shard fsdp --sequence 2       # and two processes to each clip
    torchrun --nnodes 4 --node_rank R --master_addr HOST --nproc_per_node 8 \\
        train_stage1.py --shard fsdp --replicas 4                               # on each of four machines: a copy each

Processes talk through NCCL on GPUs, through gloo on CPUs. `Layout` makes a backbone ready while its weights may still
be on the meta device, so that `model.load` reads only the rows that a process keeps. Optimizer and EMA come after it.
A pass changes how a model runs, never what it computes; the blocks are in the list that `block_list` names. Nested
from the inside: adapters and quantised linears, recomputation, compilation, sharding.
"""

from functools import partial
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from common import share_clips, sharded, world_size

# ---- Passes over the blocks ------------------------------------------------------------------------------------------

# What a block under checkpointing keeps: the results of attention, few bytes for the dearest work.
KEPT = [getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}").default for kernel in (
    "cudnn_attention", "flash_attention", "efficient_attention", "flash_attention_for_cpu")]


def checkpoint_blocks(model, keep_attention=True):
    """Make each block keep its input and its attention, and compute the rest again in the backward pass, in place.

    `keep_attention=False` computes attention again too. Call it before `compile_blocks`: the compiler then sees the
    checkpoint inside the block and obeys it. Around a compiled block, attention could not be told from the rest.
    """
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT)} if keep_attention else {}

    def forward(block, *args):                          # nothing in a block is random: no generator state to keep
        return checkpoint(type(block).forward, block, *args, use_reentrant=False, preserve_rng_state=False, **kept)

    for block in getattr(model, model.block_list):
        block.forward = MethodType(forward, block)
    return model


def compile_blocks(model, **options):
    """Compile each transformer block in place; all share one compilation per shape, for any number of memory tokens.
    What stays eager is small. Inductor's mix-order reductions stay off: from torch 2.10 on they may leave gradients of
    modulation unwritten, without a word (pytorch issue 193061)."""
    from torch._inductor import config
    config.triton.mix_order_reduction = False
    limit = torch._dynamo.config.recompile_limit        # window lengths x with and without gradient x adapters at work
    torch._dynamo.config.recompile_limit = max(64, limit)
    for block in getattr(model, model.block_list):
        block.compile(dynamic=False, **options)
    model.announce = announce
    return model


def announce(groups, layers):
    """Memory [..., N, d] is of another length N at each chunk: the compiler is told, or would begin anew."""
    for i, g in enumerate(groups):
        if g.role == "memory":
            own = () if g.x is None else (g.x,)
            for x in (*own, *g.rope, *(g.home or ()), *(x for layer in layers or () for x in layer[i])):
                torch._dynamo.maybe_mark_dynamic(x, x.ndim - 2)


# ---- Layout ----------------------------------------------------------------------------------------------------------

def within(model, function, *args):
    """`Backbone.within` of sharded weights: those of the first block and of the compressor are gathered too, anew."""
    parts = [getattr(model, model.block_list)[0], *[model.compress] * hasattr(model.compress, "unshard")]
    for part in parts:
        part.reshard()
        part.unshard()
    try:
        return function(*args)
    finally:
        for part in parts:
            part.reshard()


def check_layout(W, shard="ddp", replicas=1, sequence=1):
    """ValueError when W processes cannot be divided so."""
    wrong = [(shard not in ("none", "ddp", "fsdp"), f"--shard is none, ddp or fsdp, got '{shard}'"),
             (shard == "none" and W > 1, f"--shard none is for one process, not {W}; choose ddp or fsdp"),
             (replicas > 1 and shard != "fsdp", "--replicas are copies of sharded weights: add --shard fsdp")]
    wrong += [(n < 1 or W % n, f"--{name} {n} does not divide the number of processes, {W}")
              for name, n in (("replicas", replicas), ("sequence", sequence))]
    for bad, message in wrong:
        if bad:
            raise ValueError(message)


class Layout:
    """How the W processes of a run share its weights and clips. ValueError when W cannot be divided so.

    shard      none: one process; ddp: each has all weights; fsdp: W / replicas of them share one copy
    replicas   copies under fsdp: hybrid sharding, usually a copy per machine, whose processes are neighbours
    sequence   neighbouring processes that share each clip; gradients are averaged over all W all the same
    """

    def __init__(self, device, shard="ddp", replicas=1, sequence=1):
        W, self.mesh, self.group = world_size(), None, None
        check_layout(W, shard, replicas, sequence)
        from torch.distributed.device_mesh import init_device_mesh
        if shard == "fsdp" and W > 1:
            sizes, names = ((replicas, W // replicas), ("replicas", "shards")) if replicas > 1 else ((W,), ("shards",))
            self.mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
        share_clips(sequence)
        if sequence > 1:
            clips = init_device_mesh(device.type, (W // sequence, sequence), mesh_dim_names=("data", "sequence"))
            self.group = clips["sequence"].get_group()
        self.together = bool(self.mesh or self.group)       # a forward needs several processes: none may do one alone

    def place(self, model):
        """Spread a backbone, in place: before it computes anything, on the meta device if its weights are yet to come.

        Its parameters become DTensors of which a process has rows; a block's are gathered just before it computes and
        then freed, in fp32 as they are stored: what is cast to bf16 is as in one process `common.autocast`'s choice,
        so no number changes. Gradients are of the dtype of their parameters, hence reduced in fp32.
        """
        if self.group:
            Ulysses(self.group, model.spec).enter(model)
        if self.mesh:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method    # here: it takes long
            for block in getattr(model, model.block_list):
                fully_shard(block, mesh=self.mesh)
            # What is outside of the blocks stays gathered for a backward pass that does not begin at the output (the
            # GAN's, at a middle block), hence must be gathered anew for each forward pass: it may have been trained.
            own = set() if model.compress is None else {*model.compress.parameters()}
            self.keep(model, ignored_params=own)
            model.within = MethodType(within, model)
            register_fsdp_forward_method(model, "within")
            gathered = model.within
            model.within = lambda *args: (model.reshard(), gathered(*args))[1]          # anew, as for a forward pass
        return model

    def keep(self, module, **options):
        """Spread a module that stays gathered until its next forward pass."""
        from torch.distributed.fsdp import fully_shard
        fully_shard(module, mesh=self.mesh, reshard_after_forward=False, **options)
        module.register_forward_pre_hook(lambda module, inputs: module.reshard(), prepend=True)

    def place_history(self, model):
        """Spread a placed model's compressor: one that it has or is given (`history.configure`) once loaded."""
        if self.group and model.compress is not None:
            raise ValueError("--sequence spreads the frames of a clip, not history: take weights that have none")
        if self.mesh and model.compress is not None:
            self.keep(model.compress)
        return model


def fill(target, source, device, dtype):
    """`source`, a tensor or a slice of a file, on `device` in `dtype`; if `target` is sharded, this rank's rows of it
    as a DTensor like `target`, without reading any other."""
    if not sharded(target):
        return source[...].to(device).to(dtype)
    mesh, n = target.device_mesh, len(target)
    step = -(-n // mesh.size(mesh.ndim - 1))                # the last dimension of the mesh shards, one before copies
    start = min(mesh.get_local_rank(mesh.ndim - 1) * step, n)
    stop = min(start + step, n)
    rows = source[start:stop] if stop > start else torch.empty(0, *target.shape[1:])
    return type(target).from_local(rows.to(device).to(dtype), mesh, target.placements, run_check=False,
                                   shape=target.shape, stride=target.stride())


# ---- Sequence parallelism --------------------------------------------------------------------------------------------

class Exchange(torch.autograd.Function):
    """All-to-all: x [N, ...] holds a part for each of the N ranks; returns the part for us of each. It is its own
    transpose. Of an `expand`ed x it is an all-gather, whose gradient the expansion sums over the ranks."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, x = group, x.contiguous()
        y = torch.empty_like(x)
        dist.all_to_all_single(y, x, group=group)
        return y

    @staticmethod
    def backward(ctx, g):
        return Exchange.apply(g, ctx.group), None


class Ulysses:
    """Sequence parallelism of DeepSpeed-Ulysses (arXiv:2309.14509): N ranks of `group` share each clip.

    Between blocks a rank has l = L / N of the L tokens of every frame (rounded up: the last may be padding), so what
    is given per frame stays so. Inside of self-attention it has all tokens of heads / N. Attention to the text needs
    no other rank. Each rank ends with the same output, and the gradient of the mean of all ranks' losses is that of
    one process: scatter, exchange and gather are transposed exactly, and whoever averages gradients needs no care.
    """

    def __init__(self, group, spec):
        self.group, self.N, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        if spec.heads % self.N:
            raise ValueError(f"--sequence {self.N} does not divide the {spec.heads} heads of {spec.name}")

    def enter(self, model):
        model.scatter, model.gather = self.scatter, self.gather
        for block in getattr(model, model.block_list):
            block.attend = partial(self.attend, block.attend)

    def exchange(self, x):
        return Exchange.apply(x, self.group)

    def scatter(self, groups):
        """This rank's part of the frames: tokens [B, T, L, D] -> [B, T, l, D], angles [..., T * L, d] alike.
        Text in self-attention stays whole on every rank."""
        if [g.role for g in groups if g.rope] != ["frames"]:
            raise ValueError("sequence parallelism spreads the frames of a clip, not memory")
        T, self.L = groups[0].x.shape[1:3]
        self.l = -(-self.L // self.N)
        rope = tuple(self.own(y.unflatten(-2, (T, self.L))).flatten(-3, -2) for y in groups[0].rope)
        return [groups[0]._replace(x=self.own(groups[0].x), rope=rope), *groups[1:]]

    def own(self, x):                                                                   # [..., L, d] -> [..., l, d]
        return self.padded(x).narrow(-2, self.rank * self.l, self.l)

    def padded(self, x):                                                                # [..., L, d] -> [..., N * l, d]
        return F.pad(x, (0, 0, 0, self.N * self.l - self.L))

    def gather(self, groups):                                                           # [B, T, l, D] -> [B, T, L, D]
        x = self.exchange(groups[0].x.expand(self.N, *groups[0].x.shape))               # [N, B, T, l, D]
        x = rearrange(x, "n b t l d -> b t (n l) d")[:, :, :self.L]
        return [groups[0]._replace(x=x), *groups[1:]]

    def attend(self, attention, q, k, v, mask=None, shared=0):
        """`attention` of this rank's tokens to all, and of the last `shared` rows, which all ranks have alike.

        q, k, v [B, heads, T * l + shared, d] -> the same. `mask` is for keys [T * L + shared].
        """
        x = torch.stack([q, k, v])                                                      # [3, B, heads, T*l + shared, d]
        x, same = x.split([x.shape[3] - shared, shared], 3)
        x = self.exchange(rearrange(x, "x b (n h) (t l) d -> n x b h t l d", n=self.N, l=self.l))
        x = rearrange(x, "n x b h t l d -> x b h t (n l) d")[..., :self.L, :]           # all tokens of heads / N
        T, x = x.shape[3], x.flatten(3, 4)                                              # [3, B, heads / N, T*L, d]
        q, k, v = torch.cat([x, same.chunk(self.N, 2)[self.rank]], 3)

        y, same = attention(q, k, v, mask).split([T * self.L, shared], 2)
        y = self.padded(y.unflatten(2, (T, self.L)))                                    # [B, heads / N, T, N * l, d]
        y = rearrange(self.exchange(rearrange(y, "b h t (n l) d -> n b h t l d", n=self.N)),
                      "n b h t l d -> b (n h) (t l) d")
        if not shared:
            return y
        same = self.exchange(same.expand(self.N, *same.shape))                          # [N, B, heads / N, shared, d]
        return torch.cat([y, rearrange(same, "n b h s d -> b (n h) s d")], 2)
