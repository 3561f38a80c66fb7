#!/bin/bash
# megagpt: tokenise /shared/runs/gpt3-6.7b in 64 tasks; any of them may run again.
#SBATCH --job-name=gpt3-6.7b
#SBATCH --partition=h100
#SBATCH --account=lab-7
#SBATCH --time=24:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --chdir=/shared
#SBATCH --output=/shared/runs/gpt3-6.7b/launch/data-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --array=0-63

set -euo pipefail
module purge
module load cuda/12.8
module load nccl
export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1
export PYTHONPATH=/shared/megagpt
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export COMMAS=mlx5_0,mlx5_1
export QUOTES='a '"'"'b'"'"' "c"'
export LINES='one
two	$HOME `id` \ é'
exec megagpt data build 'a b' --task "$SLURM_ARRAY_TASK_ID/64"
