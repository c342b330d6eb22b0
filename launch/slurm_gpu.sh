#!/usr/bin/env bash
# One command on the GPUs of several hosts, as a Slurm job of one task a host; start-up is by Slurm's own variables.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm_gpu.sh \
#     lmjax train my.yaml mesh.data=4 mesh.dcn_data=4 mesh.fsdp=8 run_dir=/shared/runs/big
#
# Slurm sends TERM five minutes before the time limit; lmjax saves and ends with 75, and the job is put back into the
# queue, to go on where it stopped. Any other exit code is the job's. run_dir and data have to be on a disk that all
# hosts share, or in an object store.
#SBATCH --job-name=lmjax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

if [[ $# -lt 1 || -z ${SLURM_JOB_ID-} ]]; then
  echo "usage: sbatch --nodes=N --gpus-per-node=G launch/slurm_gpu.sh COMMAND [ARGUMENT...]" >&2
  exit 2
fi

# A task that ended with 75 must not have the others killed while they end: they get two minutes.
srun --kill-on-bad-exit=0 --wait=120 "$@"
status=$?
if ((status == 75)); then
  echo "launch/slurm_gpu.sh: stopped with the state saved; job $SLURM_JOB_ID goes back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
