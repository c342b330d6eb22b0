#!/usr/bin/env bash
# One command on every host of a Cloud TPU (a pod slice, or one VM); the hosts find each other by Google's metadata.
#
#   launch/tpu_vm.sh my-pod us-east5-a lmjax/.venv/bin/lmjax train lmjax/my.yaml run_dir=gs://bucket/runs/big
#
# NAME and ZONE are those of the TPU. lmjax has to be installed on all hosts, at the path that is given; it starts in
# the home directory. When it ends with 75 (stopped by a signal, state saved), it is started again once the TPU is
# READY, which a maintenance event may take a while for. A TPU that is gone has to be made anew. Any other exit code is
# returned.
# TPU_POLL_SECONDS (30) is the time between two looks at its state.
set -u

if [[ $# -lt 3 ]]; then
  echo "usage: launch/tpu_vm.sh NAME ZONE COMMAND [ARGUMENT...]   (found: ${*:-nothing})" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
printf -v command '%q ' "$@"

while true; do
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
  status=$?
  ((status == 75)) || exit "$status"
  while true; do
    state=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)') || exit 75
    case $state in
    READY) break ;;
    PREEMPTED | TERMINATED | STOPPED | DELETING)
      echo "launch/tpu_vm.sh: $name is $state; the state is saved: make the TPU anew and start the same command" >&2
      exit 75
      ;;
    esac
    sleep "${TPU_POLL_SECONDS:-30}"
  done
  echo "launch/tpu_vm.sh: stopped with the state saved; starting again" >&2
done
