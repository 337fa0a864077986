"""A model on one process or many: compiled, replicated or sharded, with averaged gradients.

model = wrap(raw_model, dist, sharding="fsdp")     # call it; raw_model has the parameters
"""

import functools
import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plaingpt.console import UserError, note, one_line
from plaingpt.cpu import keep_freed_memory, speed_up
from plaingpt.distributed import Distributed


def wrap(
    model: nn.Module, dist: Distributed, sharding: str = "ddp", recompute: bool = False, compiled: bool = False
) -> nn.Module:
    """`model` on the device, with faster parts, and compiled if wanted; `backward` averages gradients over all
    processes. All ranks.

    sharding: `ddp`: every process has the full model. `fsdp`: each has an equal shard of parameters, gradients and
        optimizer state, and gathers a block while it is computed. `hybrid`: fsdp within a node, ddp between nodes.
    """
    if recompute and model.config.dropout and dist.device.type == "mps":  # the backward pass would draw other masks
        raise UserError("wrong gradients on mps (pytorch issue 127676): use only one of --recompute and --dropout")
    model.recompute = recompute
    speed_up(model)
    if dist.device.type == "cpu":
        keep_freed_memory()
    sharded = dist.world_size > 1 and sharding != "ddp"
    if compiled:
        _compile(model, dist, sharded)
    if sharded:
        return _shard(model, dist, sharding)
    model = model.to(dist.device)
    if dist.world_size == 1:
        return model
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 renamed broadcast_buffers
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def shard_count(dist: Distributed, sharding: str) -> int:
    """Number of processes that hold one copy of the model together."""
    return {"ddp": 1, "fsdp": dist.world_size, "hybrid": dist.local_world_size}[sharding]


def _shard(model: nn.Module, dist: Distributed, sharding: str) -> nn.Module:
    """Matrices are cast to `dist.dtype` before they are gathered: autocast would do it afterwards, at twice the
    traffic. Embeddings and LayerNorms are small; they are gathered in float32, as autocast needs them.
    """
    from torch.distributed.device_mesh import init_device_mesh  # takes two seconds to import
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = shard_count(dist, sharding)
    if not dist.all_equal(size):
        raise UserError(f"--sharding=hybrid needs the same number of processes on every node; one has {size}")
    shape, names = (size,), ("all",)
    if sharding == "hybrid":
        shape, names = (dist.world_size // size, size), ("nodes", "in_node")
    mesh = init_device_mesh(dist.device.type, shape, mesh_dim_names=names)
    precise = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(dist.dtype, torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=precise)
    # The root keeps its parameters gathered until a backward pass; without one, nothing would shard them again.
    model.register_forward_hook(lambda root, *_: None if torch.is_grad_enabled() else root.reshard())
    return model


def _compile(model: nn.Module, dist: Distributed, sharded: bool) -> None:
    """Compile `model` in place, block by block: all blocks use the code of the first, so GPT-2 1.5B compiles in
    seconds, where compiling the model as one graph took minutes and made it no faster.

    FSDP's hooks are Python, which would split a compiled block: there its modules are compiled one by one.
    If nothing compiles on this machine (no C++ compiler, say), one line says so and the model stays as it is.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=dist.device))  # so that it fails here, if at all
    except Exception as error:  # of many kinds
        note(f"torch.compile does not work here, continuing without it: {one_line(error)}")
        return
    torch._dynamo.config.suppress_errors = True  # a part that fails to compile runs uncompiled
    # The keys of torch 2.11's cache leave out autocast's precision: in float16 it would find bfloat16's code.
    torch.compiler.config.cache_key_tag = str(dist.dtype)
    torch._dynamo.config.optimize_ddp = False  # it splits graphs to overlap DDP's communication; blocks are small
    for block in model.transformer.h:
        for module in (block.ln_1, block.attn, block.ln_2, block.mlp) if sharded else (block,):
            module.__class__ = _compiled_class(type(module), "forward")
    model.__class__ = _compiled_class(type(model), "head")


@functools.cache
def _compiled_class(kind: type, method: str) -> type:
    """A subclass whose `method` is compiled, except in inference mode: while sampling, shapes change each time."""
    plain = getattr(kind, method)
    compiled = torch.compile(plain)

    def choose(*arguments):
        return (plain if torch.is_inference_mode_enabled() else compiled)(*arguments)

    return type(kind.__name__, (kind,), {method: choose})


def set_gradient_sync(model: nn.Module, last: bool) -> None:
    """Call before each micro-step. Under DDP, gradients are averaged over all processes after the `last` one of a step.

    Sharded gradients are averaged after each micro-step among the processes that hold one copy of the model, so that
    no process ever has all of them; under `hybrid`, the exchange between nodes waits for the `last`.
    """
    model.require_backward_grad_sync = last  # DDP's
    if hasattr(model, "set_requires_all_reduce"):  # FSDP's
        model.set_requires_all_reduce(last)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each process has a shard."""
    return hasattr(tensor, "device_mesh")


def full(tensor: Tensor) -> Tensor:
    """`tensor` with all its shards. All ranks."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def gather(tensors: dict[str, Tensor], dist: Distributed) -> dict[str, Tensor]:
    """Full copies of `tensors` on the CPU for the main process; an empty dict for the others. All ranks."""
    gathered = {}
    for name, tensor in tensors.items():  # one by one: the device never has more than one full tensor
        tensor = full(tensor.detach())
        if dist.is_main:
            gathered[name] = tensor.to("cpu", copy=True).contiguous()
    return gathered


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` into `tensor`, or this rank's part of them into its shard, without communication."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
