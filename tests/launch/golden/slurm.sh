#!/bin/bash
# megagpt: gpt3-6.7b, 16 ranks = data 2 x pipeline 1 x tensor 8, on 2 nodes and 1 spare.
#SBATCH --job-name=gpt3-6.7b
#SBATCH --partition=h100
#SBATCH --account=lab-7
#SBATCH --time=24:00:00
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --chdir=/shared
#SBATCH --output=/shared/runs/gpt3-6.7b/launch/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --gpus-per-node=h100:8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill

set -euo pipefail
module purge
module load cuda/12.8
module load nccl
exec env PYTHONPATH=/shared/megagpt /venv/bin/python -m megagpt.launch.supervise /shared/runs/gpt3-6.7b/launch/launch.json
