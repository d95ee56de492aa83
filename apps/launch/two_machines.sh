#!/bin/bash
# Two machines without a scheduler: start this on both, with rank 0 on the machine at ADDRESS.
#   bash apps/launch/two_machines.sh RANK ADDRESS GPUS --recipe stageinteractor_r50_1x --data DATA
# Without a shared disk add: --set train.save_on_each_node=true
set -euo pipefail

rank=$1 address=$2 gpus=$3
shift 3
exec uv run accelerate launch --multi_gpu --num_machines 2 --num_processes $((2 * gpus)) \
  --machine_rank "$rank" --main_process_ip "$address" --main_process_port 29500 \
  --mixed_precision no --dynamo_backend no apps/train.py "$@"
