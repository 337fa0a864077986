"""Workarounds for torch 2.13. Each says why it exists, and can go once torch changes."""

import os
from datetime import timedelta

import torch.distributed as torch_dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.overrides import TorchFunctionMode

from plaingpt.console import RunFailed, note, one_line


def rendezvous_store(timeout: timedelta) -> torch_dist.Store:
    """The store in which processes exchange addresses, with separate keys for each restart of the workers.

    torchrun's store outlives workers that fail and keeps their addresses, and torch adds no prefix: restarted workers
    would connect to the dead ones. TORCHELASTIC_RESTART_COUNT is a good prefix on one node only, because every node
    counts for itself. With several nodes, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each restart a store of its own.
    """
    try:
        store, *_ = next(rendezvous("env://", timeout=timeout))
    except (torch_dist.DistError, ValueError, OSError) as error:
        where = " ".join(f"{name}={os.environ.get(name)}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RunFailed(
            f"the processes could not connect at {where} (--timeout={timeout.total_seconds():g}): {one_line(error)}"
        ) from error
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if int(os.environ["GROUP_WORLD_SIZE"]) == 1:
        return torch_dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
        note("on several nodes, restarts need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/distributed.md)")
    return store


class SkipNormalInit(TorchFunctionMode):
    """Skips drawing normal numbers: on the meta device that would import torch's compiler, over a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))
