#!/bin/bash
#SBATCH --job-name=gpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM two minutes before the time is up, and when the job is preempted. Without `B:` it goes to the processes
# of the step, torchrun among them, which passes it on to the ranks: each finishes its step, a last snapshot is
# taken, and all leave with status 143.
#SBATCH --signal=TERM@120

set -u
export EVERSTEP_REPO="${EVERSTEP_REPO:-s3://bucket/runs/gpt}"
# torchrun's ranks find each other anew at each start, and not those of the start before.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A rank that dies, or a node, is started again by torchrun, three times; the run goes on where it was.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head_node:29400" \
    train.py "$EVERSTEP_REPO"
status=$?

# Anything but 0 asks to be started again. A requeued job goes on with the same command, on other nodes, and on
# another number of them if `--nodes` was changed meanwhile.
if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
