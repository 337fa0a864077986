import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, child_environment

from plaingpt.console import RunFailed, UserError
from plaingpt.distributed import Distributed, connect

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_one_process_is_main_and_sums_are_its_own():
    dist = connect("cpu", "float32")
    assert (dist.rank, dist.world_size, dist.is_main, dist.device.type) == (0, 1, True, "cpu")
    assert dist.sum(1.5) == 1.5
    assert dist.max(3) == 3
    assert dist.all_equal(3)
    assert dist.peak_flops is None
    dist.synchronize()
    dist.close()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_matrix_products_are_in_the_chosen_precision(name):
    dist = connect("cpu", name)
    model = torch.nn.Linear(2, 2)
    with dist.autocast():
        assert model(torch.ones(1, 2)).dtype == dist.dtype == getattr(torch, name)
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200 NVL", 835),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla V100-SXM2-32GB", 125),
    ]
    + [(name, None) for name in ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 D", "NVIDIA A10G")],
)
def test_the_peak_of_a_gpu_is_found_by_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    dist = Distributed(torch.device("cuda"), torch.bfloat16, world_size=2)
    assert dist.peak_flops == (tflops and 2 * tflops * 1e12)


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="has an accelerator")
def test_auto_is_the_cpu_where_there_is_nothing_else():
    assert connect("auto").device.type == "cpu"


@pytest.mark.skipif(torch.version.cuda is not None, reason="not a build for CPUs")
def test_a_gpu_that_a_build_for_cpus_cannot_use_is_noted(monkeypatch, capsys):
    monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/nvidia0"] if "nvidia" in pattern else [])
    assert connect("auto").device.type != "cuda"
    assert "the NVIDIA GPU is not used: this torch is built for CPUs only" in capsys.readouterr().err
    connect("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    connect("auto")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("cpu", "dtype"),
    [
        (dict(cpu_name="AMD EPYC", avx512_bf16=True), torch.bfloat16),
        (dict(cpu_name="AMD EPYC", avx512_bf16=False), torch.float32),
        (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=False), torch.float32),
        (dict(cpu_name="Intel Xeon", avx512_bf16=True, amx_bf16=True), torch.bfloat16),
        (dict(), torch.float32),  # ARM
    ],
)
def test_a_cpu_trains_in_bfloat16_where_that_is_faster(monkeypatch, cpu, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert connect("cpu").dtype == dtype


@pytest.mark.parametrize("name", ["gpu", "meta", "", "cuda:x", "cuda", "cuda:99", "mps"])
def test_a_device_that_does_not_exist_is_a_user_error(name):
    if (name == "cuda" and torch.cuda.is_available()) or (name == "mps" and torch.backends.mps.is_available()):
        pytest.skip("it exists")
    reason = "no GPU 99" if name == "cuda:99" and torch.cuda.is_available() else ""
    with pytest.raises(UserError, match=f"--device={name}: {reason}.*; use cpu, cuda, cuda:1 or mps"):
        connect(name)


def test_a_rank_without_other_processes_is_a_user_error(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match="RANK=1 and WORLD_SIZE=1 in the environment: start processes with torchrun"):
        connect("cpu")


def test_processes_without_an_address_are_reported_in_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunFailed, match="could not connect at MASTER_ADDR=None MASTER_PORT=None"):
        connect("cpu")


def test_empty_variables_of_torchrun_mean_one_process(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    assert connect("cpu").world_size == 1


def test_processes_that_do_not_meet_are_reported_in_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = str(unused.getsockname()[1])
    here = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    for name, value in (here | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, value)
    message = rf"could not connect at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} \(--timeout=1\): "
    with pytest.raises(RunFailed, match=message):
        connect("cpu", timeout=1)


@needs_cuda
def test_cuda_is_chosen_where_there_is_one():
    dist = connect()
    assert dist.device == torch.device("cuda", 0)
    assert dist.dtype in (torch.bfloat16, torch.float16)
    (there,) = dist.to_device(torch.ones(2))
    assert there.device == dist.device


def test_two_processes_sum_and_average_gradients_and_wait_for_the_work_of_one(tmp_path):
    script = tmp_path / "work.py"
    script.write_text(
        "import os, time, torch\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from plaingpt.console import cores\n"
        "from plaingpt.distributed import connect\n"
        "from plaingpt.parallel import wrap\n"
        "def work(dist):\n"
        "    torch.manual_seed(dist.rank)\n"
        "    model = wrap(torch.nn.Linear(1, 1, bias=False), dist)\n"
        "    model(torch.tensor([[dist.rank + 1.0]])).backward()\n"
        "    gradient = model.module.weight.grad.item()\n"
        "    same = dist.sum(model.module.weight.item()) == 2 * model.module.weight.item()\n"
        f"    saved = rf'{tmp_path}/saved'\n"
        "    def save():\n"
        "        time.sleep(2)\n"
        "        open(saved, 'w').close()\n"
        "    dist.wait(ThreadPoolExecutor(1).submit(save) if dist.is_main else None)\n"
        "    assert os.path.exists(saved)\n"
        "    sums = dist.sum(dist.rank + 1.5), dist.max(dist.rank), dist.all_equal(2), dist.all_equal(-dist.rank)\n"
        "    line = (dist.rank, dist.is_main, dist.world_size, *sums, gradient, same)\n"
        f"    open(rf'{tmp_path}/{{dist.rank}}', 'w').write(repr(line))\n"
        "os.environ['LOCAL_WORLD_SIZE'] = ''\n"  # not every launcher sets it
        "if os.environ['RANK'] == '0':\n"
        "    del os.environ['LOCAL_WORLD_SIZE']\n"
        "torch.set_num_threads(3)\n"
        "dist = connect('cpu', 'float32')\n"
        "assert dist.local_world_size == 2 and torch.get_num_threads() == max(1, cores() // 2)\n"
        "work(dist)\n"
        "dist.close()\n"
    )
    ended = subprocess.run([*TORCHRUN, script], env=child_environment(), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        # gradients 1 and 2 average to 1.5; the weights are rank 0's on both
        expected = (rank, rank == 0, 2, 4.0, 1, True, False, 1.5, True)
        assert (tmp_path / str(rank)).read_text() == repr(expected)


def test_a_mistake_is_what_the_last_lines_of_torchrun_say_and_nothing_is_moved(tmp_path, tiny_flags, train):
    train(tmp_path / "run", max_iters=1)
    flags = tiny_flags(tmp_path / "run", init_from="scratch", gradient_accumulation_steps=3)
    command = [*TORCHRUN, ROOT / "train.py", *flags]
    ended = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True)
    summary = ended.stderr.partition("train.py FAILED")[2]
    assert "Traceback" not in summary
    *_, cause, boundary = summary.strip().splitlines()
    printed = "gradient_accumulation_steps=3 must be a multiple of the number of processes, 2: .* give 4, say, .*"
    assert re.fullmatch(rf"  traceback : train.py( \[rank 1\])?: {printed}", cause) and set(boundary) == {"="}
    assert os.listdir(tmp_path) == ["run"] and "val_loss" not in ended.stderr
