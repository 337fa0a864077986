"""One process, two that hold everything, two or four that share the model: the same run, from any one's checkpoint."""

import json
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, child_environment
from safetensors.torch import load_file
from test_distributed import TORCHRUN

from plaingpt.checkpoint import load_model
from plaingpt.metrics import read_metrics

# Neither the 3 blocks nor the 45, 15 and 60 rows of their matrices can be shared out evenly.
SHAPE = dict(n_layer=3, n_head=3, n_embd=15, gradient_accumulation_steps=4, batch_size=2, eval_iters=3)
PLAN = SHAPE | dict(max_iters=8, eval_interval=4, keep_every=4, warmup_iters=2, timeout=60, dropout=0.1)
MODES = {"ddp": dict(sharding="ddp"), "fsdp": dict(sharding="fsdp")}
STARTS = ("one", *MODES)
OTHERS = {  # at most so far from one process
    "compiled-ddp": (dict(compile=True, dropout=0), 1e-5),  # compiled dropout has masks of its own
    "compiled-fsdp": (dict(compile=True, dropout=0, recompute=True, sharding="fsdp"), 1e-5),
    "bfloat16-ddp": (dict(dtype="bfloat16"), 2e-2),
    "bfloat16-fsdp": (dict(dtype="bfloat16", recompute=True, sharding="fsdp"), 2e-2),
    "float16-fsdp": (dict(dtype="float16", sharding="fsdp"), 2e-2),
    "adamw-fsdp": (dict(optimizer="adamw", sharding="fsdp", recompute=True), 1e-5),
}

# Each job is {"flags"} or {"flags", "of_rank_1"}, with the error in "refused" if there is one, and with what torch says
# of each rank's CPU in "processors"; {"copy": [from, to]}, a run's folder in which another is to go on; or {"script"}.
WORKER = """
import functools, json, os, runpy, shutil, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")  # graphs alone: the C++ code takes a minute
import plaingpt.budget
import train
from plaingpt.console import UserError, run_script
from torch.distributed.elastic.multiprocessing.errors import record

def work():
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # each run meets under keys of its own
        os.environ |= {{"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(int(os.environ["RANK"]) % 2)}}  # two on a node
        if "copy" in job:
            source, target = map(Path, job["copy"])
            if os.environ["RANK"] == "0":
                shutil.copytree(source, target.with_suffix(".new"))
                target.with_suffix(".new").rename(target)
            while not target.exists():
                time.sleep(0.05)
        elif "script" in job:
            runpy.run_path(job["script"])
        else:
            flags = job["flags"] + (job.get("of_rank_1", []) if os.environ["RANK"] == "1" else [])
            if "processors" in job:
                torch.cpu.get_capabilities = functools.partial(dict, job["processors"][int(os.environ["RANK"])])
            plaingpt.budget.STARTED = time.monotonic()
            argv, sys.argv = sys.argv, ["train.py", *flags]
            try:
                assert train.main() == 0 and "refused" not in job
            except UserError as error:
                if job.get("refused", "never") not in str(error):
                    raise
                torch.distributed.destroy_process_group()
            sys.argv = argv
            if "--compile=True" in flags:
                from torch._dynamo.utils import counters
                assert counters["stats"] and not counters["graph_break"], counters
    return 0

run_script(record(work))
"""


HELD = """
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import torch
from plaingpt.console import UserError
from plaingpt.tokens import Tokens
from plaingpt.distributed import connect
from plaingpt.checkpoint import model_with
from plaingpt.evaluate import sample_text
from model import GPT, GPTConfig
from plaingpt.parallel import full, gather, wrap
from plaingpt.optimizer import apply_gradients, make_optimizers, return_share, take_share

def split(dist):
    # of three matrices each process takes two, the second process one of them again; both get all
    stack = torch.arange(24.0).view(3, 2, 4)
    share = take_share(stack, stack[0])
    assert share[:, 0, 0].tolist() == [[0.0, 8.0], [16.0, 0.0]][dist.rank], share
    found = return_share(1.001 * share, 3, stack[0], torch.bfloat16)
    assert found.dtype == torch.float32 and torch.equal(found, (1.001 * stack).bfloat16().float())

def work(dist):
    model = GPT(GPTConfig(16, 65, 2, 2, 16))
    parameters = sum(p.numel() for p in model.parameters())
    wrap(model, dist, "fsdp")
    optimizers = make_optimizers(model, "muon", 1e-2, 0.1, (0.9, 0.95))
    idx = torch.zeros(1, 8, dtype=torch.long)
    with dist.autocast():
        model(idx, idx, need_logits=False)[1].backward()
    apply_gradients(list(model.parameters()), optimizers, torch.amp.GradScaler("cpu", enabled=False), 1e-2, 1.0)
    held = sum(p.to_local().numel() for p in model.parameters())
    moments = [t.to_local().numel() for o in optimizers for s in o.state.values() for t in s.values() if t.dim()]
    of_muon = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2)
    assert held <= 0.51 * parameters, (held, parameters)
    assert sum(moments) <= 0.51 * (2 * parameters - of_muon), sum(moments)
    with torch.no_grad(), dist.autocast():
        model(idx)
    assert sum(p.to_local().numel() for p in model.parameters()) == held  # also after a pass without gradients
    assert not full(model.transformer.wte.weight)[65:].any()
    tokenizer = SimpleNamespace(end_of_text=None, decode=str)
    data = SimpleNamespace(val=Tokens([np.ones(1, np.uint16)]), tokenizer=tokenizer)
    text, weights = sample_text(model, data, 9, dist, seed=3), gather(model.weights(), dist)
    alone = replace(dist, world_size=1)
    whole = model_with(model.config, weights).bfloat16() if weights else None
    assert text == (sample_text(whole, data, 9, alone, seed=3) if weights else "")

def uneven(dist):
    try:
        wrap(GPT(GPTConfig(16, 65, 1, 2, 16)), replace(dist, local_world_size=1 + dist.rank), "hybrid")
    except UserError as error:
        assert "the same number of processes on every node" in str(error)
    else:
        raise AssertionError("not refused")

dist = connect("cpu", "bfloat16")
split(dist)
work(dist)
uneven(dist)
open({done!r} + str(dist.rank), "w").close()
dist.close()
"""


def work(folder: Path, processes: int, jobs: list[dict]) -> subprocess.CompletedProcess:
    script, listed = folder / f"work{processes}.py", folder / f"jobs{processes}.json"
    script.write_text(WORKER.format(root=str(ROOT)))
    listed.write_text(json.dumps(jobs))
    command = [*TORCHRUN[:-1], f"--nproc_per_node={processes}", script, listed]
    return subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train, resume, tiny_flags) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder of all runs, and how torchrun ended: its last job fails, on the second process alone."""
    folder = tmp_path_factory.mktemp("sharding")
    train(folder / "one", **PLAN)
    may_differ = ["--timeout=61", "--wandb_run_name=x"]
    jobs = [{"flags": tiny_flags(folder / n, **PLAN | mode), "of_rank_1": may_differ} for n, mode in MODES.items()]
    for start in STARTS:
        for name, mode in MODES.items():
            again = tiny_flags(folder / f"{start}-{name}", **PLAN | mode | {"init_from": "resume:step-000004"})
            jobs += [{"copy": [str(folder / start), str(folder / f"{start}-{name}")]}, {"flags": again}]
    jobs += [{"flags": tiny_flags(folder / name, **PLAN | changes)} for name, (changes, _) in OTHERS.items()]
    timed = tiny_flags(folder / "timed", **PLAN | dict(minutes=0.08, sample_tokens=0))
    jobs.append({"flags": [flag for flag in timed if not flag.startswith(("--max_iters", "--warmup_iters"))]})
    # As on two nodes without a common disk: before the state of a sharded model is read, which takes both.
    flags = tiny_flags(folder / "fsdp", **PLAN | MODES["fsdp"] | {"init_from": "auto"})
    refused = "differs between processes: it must be on a disk that all nodes share"
    jobs.append({"flags": flags, "of_rank_1": [f"--out_dir={folder / 'nothing'}"], "refused": refused})
    flags, refused = tiny_flags(folder / "other", **PLAN), "processes have different values of grad_clip, dataset: "
    jobs.append({"flags": flags, "of_rank_1": ["--grad_clip=2", "--dataset=other"], "refused": refused})
    processors, refused = [{}, {"amx_bf16": True}], "processes have different values of dtype: "
    jobs.append({"flags": [*flags, "--dtype=auto"], "processors": processors, "refused": refused})
    (folder / "held.py").write_text(HELD.format(done=str(folder / "held")))
    jobs.append({"script": str(folder / "held.py")})
    jobs.append({"flags": tiny_flags(folder / "fails", **PLAN), "of_rank_1": [f"--data_dir={folder / 'nowhere'}"]})
    ended = work(folder, 2, jobs)
    return folder, ended


def losses(out_dir: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(out_dir / "metrics.jsonl") if name in line}


def apart(left: Path, right: Path) -> float:
    """The largest difference of two runs: losses at every step, weights, optimizer state."""
    found = []
    for name in ("train_loss", "val_loss"):
        a, b = losses(left, name), losses(right, name)
        assert a.keys() == b.keys()
        found += [abs(a[step] - b[step]) for step in a]
    for name in ("last/model.safetensors", "best/model.safetensors", "last/optimizer.safetensors"):
        a, b = load_file(left / name), load_file(right / name)
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
        found += [(a[n] - b[n]).abs().max().item() for n in a]
    return max(found)


@pytest.mark.parametrize("name", MODES)
def test_two_processes_make_the_run_of_one(runs, name):
    folder, ended = runs
    assert len(losses(folder / "one", "train_loss")) == 8
    assert losses(folder / "one", "grad_norm") == pytest.approx(losses(folder / name, "grad_norm"), rel=1e-3)
    assert apart(folder / "one", folder / name) < 1e-5, ended.stderr


@pytest.mark.parametrize("goes_on", STARTS)
@pytest.mark.parametrize("start", STARTS)
def test_any_goes_on_with_the_run_of_any(runs, resume, start, goes_on):
    folder, ended = runs
    out_dir = folder / f"{start}-{goes_on}"
    if goes_on == "one":
        subprocess.run(["cp", "-r", folder / start, out_dir], check=True)
        resume(out_dir, init_from="resume:step-000004")
    assert "resumed_from" in (out_dir / "metrics.jsonl").read_text(), ended.stderr
    assert apart(folder / "one", out_dir) < 1e-5


def test_two_processes_agree_on_the_steps_that_fit_into_a_time(runs):
    folder, ended = runs
    recipe, state = folder / "timed" / "recipe.py", json.loads((folder / "timed/last/training.json").read_text())
    assert state["step"] == state["settings"]["max_iters"] == runpy.run_path(recipe)["max_iters"], ended.stderr


def test_a_shared_model_is_saved_as_any_other(runs):
    folder, _ = runs
    model, tokenizer = load_model(folder / "fsdp" / "best")
    other, _ = load_model(folder / "one" / "best")
    idx = torch.arange(9)[None] % tokenizer.vocab_size
    assert torch.allclose(model(idx)[0], other(idx)[0], atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_precision_and_recomputation_under_sharding(runs, train, tmp_path, name):
    """fp16 skips its first steps, until the loss scale fits, on all processes alike."""
    folder, ended = runs
    changes, tolerance = OTHERS[name]
    alone = {key: value for key, value in changes.items() if key not in ("sharding", "recompute", "compile")}
    train(tmp_path / "one", **PLAN | alone)
    found, expected = losses(folder / name, "train_loss"), losses(tmp_path / "one", "train_loss")
    assert found == pytest.approx(expected, abs=tolerance), ended.stderr
    assert losses(folder / name, "skipped") == losses(tmp_path / "one", "skipped")


def test_an_error_of_one_process_ends_all_with_its_line(runs):
    folder, ended = runs
    assert ended.returncode != 0
    line = f"train.py [rank 1]: {folder / 'nowhere' / 'tiny'}: no such data set"
    assert line in ended.stderr
    root_cause = ended.stderr.partition("Root Cause")[2]
    assert "rank      : 1" in root_cause and "no such data set" in root_cause


def test_four_processes_on_two_nodes_share_within_each(tmp_path, runs, tiny_flags):
    """Only the number of processes on each distinguishes the nodes."""
    folder, _ = runs
    ended = work(tmp_path, 4, [{"flags": tiny_flags(tmp_path / "hybrid", **PLAN | {"sharding": "hybrid"})}])
    assert ended.returncode == 0, ended.stderr
    assert apart(folder / "one", tmp_path / "hybrid") < 1e-5


def test_each_process_holds_its_share_alone(runs):
    folder, ended = runs
    assert (folder / "held0").exists() and (folder / "held1").exists(), ended.stderr
