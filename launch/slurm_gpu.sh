#!/usr/bin/env bash
# One command on the GPUs of several hosts, as a Slurm job of one task a host; start-up is by Slurm's own variables.
#
#   VENV=/shared/lmjax/.venv sbatch --nodes=4 --gpus-per-node=8 --exclusive --mem=0 --time=24:00:00 \
#     launch/slurm_gpu.sh lmjax train my.yaml mesh.data=4 mesh.dcn_data=4 mesh.fsdp=8 run_dir=/shared/runs/big
#
# Without --exclusive (all of a host) or --cpus-per-task Slurm may give a task one CPU for all GPUs of its host; fewer
# CPUs than GPUs are refused.
#
# Slurm sends TERM five minutes before the time limit; lmjax saves and ends with 75, and the job is put back into the
# queue, to go on where it stopped. Any other exit code is the job's. run_dir and data have to be on a disk that all
# hosts share, or in an object store.
#
# Variables, which sbatch hands on:
#   VENV              virtual environment, whose bin/ comes first on the command's PATH
#   CONTAINER         image with lmjax that the command runs in instead, by pyxis, as /shared/lmjax.sqsh or HOST#NAME
#   CONTAINER_MOUNTS  what of the hosts it sees, as /shared:/shared,/data:/data:ro
#   DRY_RUN=1         print the command that the job would run, here, and run nothing
#SBATCH --job-name=lmjax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

refuse() {
  echo "launch/slurm_gpu.sh: $*" >&2
  exit 2
}
venv=${VENV-} container=${CONTAINER-} mounts=${CONTAINER_MOUNTS-} dry_run=${DRY_RUN-}

[[ $dry_run =~ ^[01]?$ ]] || refuse "DRY_RUN is '$dry_run': set 1, or leave it out"
if [[ $# -lt 1 || ($dry_run != 1 && -z ${SLURM_JOB_ID-}) ]]; then
  echo "usage: sbatch --nodes=N --gpus-per-node=G launch/slurm_gpu.sh COMMAND [ARGUMENT...]" >&2
  exit 2
fi
[[ -z $venv || -z $container ]] || refuse "VENV and CONTAINER are both set, but a container has its own: unset one"
[[ -z $mounts || -n $container ]] || refuse "CONTAINER_MOUNTS without CONTAINER: set CONTAINER to an image, or unset it"
[[ -z $venv || -d $venv/bin ]] || refuse "VENV is '$venv', which has no bin/: give a virtual environment"
if [[ ${SLURM_CPUS_ON_NODE-} =~ ^[0-9]+$ && ${SLURM_GPUS_ON_NODE-} =~ ^[0-9]+$ ]]; then
  ((SLURM_CPUS_ON_NODE >= SLURM_GPUS_ON_NODE)) ||
    refuse "a host of this job has $SLURM_CPUS_ON_NODE CPUs for $SLURM_GPUS_ON_NODE GPUs: give sbatch --exclusive," \
      "or more CPUs by --cpus-per-task"
fi

# A task that ended with 75 must not have the others killed while they end: they get two minutes.
step=(srun --kill-on-bad-exit=0 --wait=120)
[[ -z ${SLURM_CPUS_PER_TASK-} ]] || step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK") # srun does not take it from sbatch
if [[ -n $container ]]; then
  step+=("--container-image=$container" ${mounts:+"--container-mounts=$mounts"})
elif [[ -n $venv ]]; then
  step+=(env "VIRTUAL_ENV=$venv" "PATH=$venv/bin:$PATH")
fi
step+=("$@")

if [[ $dry_run == 1 ]]; then
  printf -v line ' %q' "${step[@]}"
  echo "${line# }"
  exit
fi
for program in srun scontrol; do
  type -P "$program" >/dev/null || refuse "$program is not on PATH: start this by sbatch on a Slurm cluster"
done

"${step[@]}"
status=$?
if ((status == 75)); then
  echo "launch/slurm_gpu.sh: stopped with the state saved; job $SLURM_JOB_ID goes back into the queue" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
