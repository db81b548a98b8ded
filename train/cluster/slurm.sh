#!/bin/bash
# Several nodes under Slurm. A copy of this file, with your account and partition, is started by
#
#   RECIPE=sft-llama3.2-3b ENGINE=fsdp2 sbatch --nodes 4 slurm.sh
#
# Ten minutes before the time limit, and at preemption, all processes finish their step, save a checkpoint and stop; the
# job then goes back to the queue. A job that begins resumes from the newest complete checkpoint. A run that fails is not
# repeated; one whose node is lost is, by Slurm (--requeue). The output folder must lie on a disk that all nodes share.
#SBATCH --job-name=granulon
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

export RECIPE=${RECIPE:-sft-qwen2.5-1.5b}
export OUTPUT=${OUTPUT:-runs/$(basename "$RECIPE" .yaml)}
export ENGINE=${ENGINE:-ddp}
export GPUS=${GPUS:-8} # of a node
export PORT=${PORT:-29500}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-} # srun has not taken over --cpus-per-task since Slurm 22.05
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK
export HF_HOME=${HF_HOME:-$PWD/.huggingface} # shared by all nodes: one process fills it, the others read
CLUSTER=$(python -c "import granulon.train as train; print(train.__path__[0] + '/cluster')")
NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${NODES%%$'\n'*} # the first line; a pipe to head would fail now and then, under pipefail
export CLUSTER HEAD

# The launcher must outlive the signal, which the training processes answer.
srun --kill-on-bad-exit=1 bash -c '
  trap "" USR1
  exec accelerate launch --config_file "$CLUSTER/$ENGINE.yaml" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * GPUS))" --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$HEAD" --main_process_port "$PORT" \
    -m granulon.train.sft --config "$RECIPE" --output_dir "$OUTPUT" --resume "$@"
' granulon "$@"

if [ ! -d "$OUTPUT/model" ] && [ ! -d "$OUTPUT/adapter" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
