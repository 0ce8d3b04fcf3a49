#!/bin/bash
# Trains under SLURM, one process a GPU, on any number of nodes:
#
#   sbatch --nodes=2 experiments/launch/slurm.sh /shared/runs/first --ranks 8 --data-devices 2
#
# The first argument is the run's folder, on a file system that all nodes share; the others are flags
# of the training script. Submit it in the root of the checkout, which all nodes share, too.
# $PYTHON and $MODULE name another Python and another script.

#SBATCH --job-name=train_lm
#SBATCH --nodes=1
# One task a GPU. JAX gives the task number i of a node that node's GPU number i, so every task has to
# see all GPUs of its node: --gpus-per-task and --gpu-bind would hide them.
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
# SIGTERM comes 120 s before the time is over, up to 60 s sooner, and has to leave time for one step
# and one checkpoint. Without "B:" it goes to the tasks and not to this shell.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
folder=${1:?usage: sbatch slurm.sh FOLDER [FLAGS...]}
shift
python=${PYTHON:-.venv/bin/python}
module=${MODULE:-experiments.train_lm.train_lm}

# A job that goes on compiles nothing again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(dirname "$folder")/jax_cache}"
# srun does not take it from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# Processes would look for each other through a proxy (see jax.distributed.initialize).
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY

# Were a task to end the others, they could not say why they ended. JAX ends them in --heartbeat
# seconds if one is lost.
srun --kill-on-bad-exit=0 "$python" -m "$module" --output "$folder" --stopped-code 75 "$@"
code=$?

# 75: stopped early, and saved. The same job, with the same arguments, waits for its turn again and
# goes on. scancel ends this shell, too, before it comes here.
if [ "$code" -eq 75 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
