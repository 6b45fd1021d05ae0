#!/usr/bin/env bash
# Trains on the nodes of a SLURM job, one process for each GPU:
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/lora.py --config.data.train=...
#
# Start it in jaxtune's folder, with the environment in .venv, on a file system that all nodes share.
#SBATCH --job-name=jaxtune
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# --wait: the others have a minute to say why they end before SLURM ends them.
srun --kill-on-bad-exit=0 --wait=60 .venv/bin/python -m jaxtune.train "$@"
code=$?
# 75: stopped by SIGTERM (the time limit is near) with the state saved; the job goes on later.
if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
