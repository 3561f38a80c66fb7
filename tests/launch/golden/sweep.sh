#!/bin/bash
# megagpt: a sweep of 2 runs, each of 16 ranks = data 2 x pipeline 1 x tensor 8.
#SBATCH --job-name=sweep
#SBATCH --partition=h100
#SBATCH --account=lab-7
#SBATCH --time=24:00:00
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --chdir=/shared
#SBATCH --output=/shared/sweep/launch/slurm-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=h100:8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --array=0-1

set -euo pipefail
module purge
module load cuda/12.8
module load nccl
launches=(
    /shared/sweep/optim.lr=1e-4/launch/launch.json
    /shared/sweep/optim.lr=2e-4/launch/launch.json
)
exec env PYTHONPATH=/shared/megagpt /venv/bin/python -m megagpt.launch.supervise "${launches[$SLURM_ARRAY_TASK_ID]}"
