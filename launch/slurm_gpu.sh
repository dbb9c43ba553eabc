#!/bin/bash
# Slurm, GPUs: one process per GPU. JAX finds the processes by itself.
#
#     sbatch launch/slurm_gpu.sh --config=configs/storm_qwen2_7b.py:stage=sft --workdir=/shared/runs/sft
#
# 120 seconds before the time limit, the training saves and exits with 75, and the job is queued again.
#SBATCH --job-name=storm
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8        # not --gpus-per-task: JAX chooses the GPU of each process itself
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

srun python -u train.py --config.data.num_workers=7 "$@"
status=$?
if [ "$status" = 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
