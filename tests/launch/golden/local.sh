#!/bin/bash
# megagpt: gpt3-6.7b, 8 ranks = data 2 x pipeline 1 x tensor 8.
set -euo pipefail
cd /shared
export PYTHONUNBUFFERED=1
export PYTHONFAULTHANDLER=1
export PYTHONPATH=/shared/megagpt
export NCCL_SOCKET_IFNAME=ib0
export GLOO_SOCKET_IFNAME=ib0
export COMMAS=mlx5_0,mlx5_1
export QUOTES='a '"'"'b'"'"' "c"'
export LINES='one
two	$HOME `id` \ é'
exec /venv/bin/python -m megagpt.cli train /shared/run.toml --out /shared/runs/gpt3-6.7b
