#!/bin/bash
# Two nodes of eight GPUs. Run this in the root of the repository, on a disk that both nodes share, with .venv installed:
#   sbatch docs/slurm.sh config/train_gpt2.py
# Submit the same command again to continue where a job ended. If a node fails, Slurm requeues the job.
# The recipe has to train a new model: --init_from=auto replaces its init_from.
#SBATCH --job-name=plaingpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 \
  .venv/bin/torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node=auto --max_restarts=3 \
  --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first:29500" \
  train.py "$@" --init_from=auto
