"""A model on one process or many: replicated or sharded, its gradients averaged, its tensors whole again for a save."""

import logging
import os
import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plaingpt.console import UserError, note, one_line
from plaingpt.cpu import speed_up
from plaingpt.distributed import Distributed


def wrap(
    model: nn.Module,
    dist: Distributed,
    sharding: str = "ddp",
    reduce_dtype: str = "float32",
    recompute: bool = False,
    compiled: bool | None = False,
) -> nn.Module:
    """`model` on the device, its gradients averaged over the processes in `backward`, in `reduce_dtype`. All ranks.

    sharding: `ddp`: every process holds everything. `fsdp`: each holds an equal part of parameters, gradients and
        optimizer state, and gathers a block while it is computed. `hybrid`: fsdp in a node, ddp between nodes.
    recompute: the backward pass computes each block again, in place of keeping what is in it.
    compiled: by torch.compile; None: on CUDA.
    """
    model.recompute = recompute
    speed_up(model)
    reduce_in = getattr(torch, reduce_dtype)
    if dist.world_size > 1 and sharding != "ddp":
        model = _shard(model, dist, sharding, reduce_in)
    else:
        model = _replicate(model.to(dist.device), dist, reduce_in)
    return _compile(model, dist.device) if compiled or (compiled is None and dist.device.type == "cuda") else model


def _replicate(model: nn.Module, dist: Distributed, reduce_in: torch.dtype) -> nn.Module:
    if dist.world_size == 1:
        return model
    # No buffer of the model ever changes: broadcasting them before each forward would be for nothing.
    with warnings.catch_warnings():  # the name is deprecated in torch 2.13; 2.11 knows no other
        warnings.simplefilter("ignore", FutureWarning)
        model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    if reduce_in == torch.bfloat16:
        if dist.device.type != "cuda":
            raise UserError("--reduce_dtype=bfloat16: without CUDA it needs --sharding=fsdp or hybrid")
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        model.register_comm_hook(None, bf16_compress_hook)
    return model


def shards(dist: Distributed, sharding: str) -> int:
    """How many processes share a copy of the model."""
    return {"ddp": 1, "fsdp": dist.world_size, "hybrid": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}[sharding]


def _shard(model: nn.Module, dist: Distributed, sharding: str, reduce_in: torch.dtype) -> nn.Module:
    """Matrices are cast to `dtype` before they are gathered: what autocast would do with them afterwards, at
    half the traffic. The rest (embeddings, LayerNorms) is small, and is gathered in float32, as autocast wants it.
    """
    from torch.distributed.device_mesh import init_device_mesh  # two seconds that nobody else is to wait for
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = shards(dist, sharding)
    fewest, most = dist.max(-size, size)
    if -fewest != most:
        raise UserError(f"--sharding=hybrid takes as many processes on every node: one has {-fewest}, another {most}")
    hybrid = sharding == "hybrid"
    shape, names = ((dist.world_size // size, size), ("nodes", "in_node")) if hybrid else ((size,), ("all",))
    mesh = init_device_mesh(dist.device.type, shape, mesh_dim_names=names)
    precise = MixedPrecisionPolicy(reduce_dtype=reduce_in, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy(dist.dtype, reduce_in, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=precise)
    # The root keeps its parameters whole until a backward pass; without one nobody would put them back.
    model.register_forward_hook(lambda root, *_: None if torch.is_grad_enabled() else root.reshard())
    # torch adds up the micro-steps that are not exchanged between nodes in the precision of the exchange
    model.exchanged_each_time = hybrid and reduce_in != torch.float32
    return model


def _compile(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` through torch.compile. Where that cannot work, for want of a C++ compiler say, one line tells so, and
    it runs as it is. It is tried on next to nothing before: of a model, the backward pass would be the first to fail.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds
        note(f"torch.compile does not work here, going on without it: {_reason(error)}")
        return model
    _go_on_without()
    return torch.compile(model)


def _go_on_without() -> None:
    """What cannot be compiled in spite of the trial runs as it is too, and the first time one line tells so, in place
    of torch's hundreds."""

    def tell(record: logging.LogRecord) -> bool:
        nonlocal told
        if not record.exc_info:
            return True
        if not told:
            note(f"torch.compile failed, going on without it where it does: {_reason(record.exc_info[1])}")
        told = True
        return False

    told = False
    torch._dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(tell)


def _reason(error: BaseException) -> str:
    return one_line(error).split(" Set TORCH")[0]  # advice on how to look inside torch


def exchange_gradients(model: nn.Module, last: bool) -> None:
    """Before a micro-step: whether it is the `last` of its update. Gradients are averaged after that one only; but
    sharded ones each time within the node, so that no process ever holds all of them, and in bfloat16 each time between
    nodes too, so that they are added up in float32.
    """
    model.require_backward_grad_sync = last  # DDP's
    if hasattr(model, "set_requires_all_reduce"):  # FSDP's
        model.set_requires_all_reduce(last or model.exchanged_each_time)


def is_shared(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which other processes hold parts."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """`tensor` with the parts of it that other processes hold. All ranks."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def gather(tensors: dict[str, Tensor], dist: Distributed) -> dict[str, Tensor]:
    """Copies of `tensors` on the CPU, whole, for the main process; for the others none. All ranks."""
    gathered = {}
    for name, tensor in tensors.items():  # one by one: the device never holds more of them whole
        tensor = whole(tensor.detach())
        if dist.is_main:
            gathered[name] = tensor.to("cpu", copy=True).contiguous()
    return gathered


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` into `tensor`, or of them what belongs to this process's part of it. Nobody else takes part."""
    if is_shared(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)
