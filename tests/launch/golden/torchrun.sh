#!/bin/bash
# megagpt: gpt3-6.7b, 16 ranks = data 2 x pipeline 1 x tensor 8.
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
: "${MASTER_ADDR:?the address of node 0}" "${NODE_RANK:?0 on the first node, 1 on the next}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec /venv/bin/python -m torch.distributed.run --nnodes=2 --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port=20000 --nproc-per-node=8 --max-restarts=8 -m megagpt.cli train /shared/run.toml --out /shared/runs/gpt3-6.7b
