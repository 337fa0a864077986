"""The files of docs/ that start a run on a cluster: what they call exists and is accepted."""

import re
import shlex
import shutil
import subprocess

import pytest
import yaml
from conftest import ROOT
from torch.distributed.run import get_args_parser

from plaingpt.settings import load_settings
from train import TrainConfig

SLURM = ROOT / "docs" / "slurm.sh"


def accepted(words: list[str]):
    """What torchrun and train.py make of a command line, without their names: an error where they know a word not."""
    options = get_args_parser().parse_args(words)
    assert options.training_script == "train.py"
    arguments = [str(ROOT / word) if word.endswith(".py") else word for word in options.training_script_args]
    config, given = load_settings(TrainConfig, arguments)
    assert "init_from" in given and config.init_from == "auto"  # so that the same command goes on
    assert config.max_iters == 6100
    return options


def slurm_command() -> list[str]:
    """What `srun` runs, for `sbatch docs/slurm.sh config/train_gpt2.py` on two nodes."""
    text = SLURM.read_text().replace("\\\n", " ")
    text = text.replace('"$@"', "config/train_gpt2.py")
    for name, value in (("SLURM_JOB_NUM_NODES", "2"), ("SLURM_JOB_ID", "7"), ("first", "node1")):
        text = text.replace(f"${name}", value)
    words = shlex.split(re.search(r"^srun .*", text, re.MULTILINE).group())
    return words[words.index(".venv/bin/torchrun") + 1 :]


def test_the_slurm_script_starts_a_run():
    options = accepted(slurm_command())
    assert (options.nnodes, options.rdzv_endpoint, options.rdzv_backend) == ("2", "node1:29500", "c10d")
    assert "#SBATCH --ntasks-per-node=1" in SLURM.read_text()  # one torchrun a node


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")
def test_the_slurm_script_is_a_script():
    subprocess.run(["bash", "-n", SLURM], check=True)


def test_the_kubernetes_manifest_starts_a_run():
    job = yaml.safe_load((ROOT / "docs" / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    pod = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    torchrun, *words = container["command"] + container["args"]
    assert torchrun == "torchrun"
    accepted(words)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_both_let_a_host_come_back():
    """Torch's own store does not tell a later host where it is (torch issue 135712)."""
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in SLURM.read_text()
    assert '{ name: TORCH_DISABLE_SHARE_RDZV_TCP_STORE, value: "1" }' in (ROOT / "docs" / "kubernetes.yaml").read_text()
