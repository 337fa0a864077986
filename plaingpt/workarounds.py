"""What torch 2.13 does not do by itself. Each part says why it exists; it can go once torch changes."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta

import torch
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
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        raise RunFailed(f"the processes did not meet at {where} within {timeout}: {one_line(error)}") from error
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if int(os.environ["GROUP_WORLD_SIZE"]) == 1:
        return torch_dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
        note("several nodes: restarts need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for every torchrun (docs/scaling.md)")
    return store


class SkipNormalInit(TorchFunctionMode):
    """Within it no normal numbers are drawn: on the meta device that would import torch's compiler, over a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def fall_back_to_eager(reason: Callable[[BaseException], str]) -> None:
    """Code that fails to compile runs uncompiled. torch prints hundreds of lines each time; print one, once."""

    def first_line(record: logging.LogRecord) -> bool:
        if record.exc_info and not reported:
            note(f"torch.compile failed, continuing without it where it does: {reason(record.exc_info[1])}")
            reported.append(True)
        return not record.exc_info

    reported = []
    torch._dynamo.config.suppress_errors = True
    logging.getLogger("torch._dynamo.convert_frame").addFilter(first_line)
