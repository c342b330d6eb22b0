#!/usr/bin/env bash
# Start n processes of one command on this machine, joined by jax.distributed over loopback.
#
#   launch/local.sh 2 lmjax train configs/quickstart.yaml run_dir=runs/two
#
# JAX_NUM_CPU_DEVICES=4 JAX_PLATFORMS=cpu before it gives each process four CPU devices.
# The GPUs of the machine, or those of CUDA_VISIBLE_DEVICES, are dealt out: each process sees as many as the others.
# Every line is prefixed with the number of its process. TERM and INT are passed on to all, and so are HUP and USR1, as
# TERM: lmjax saves after it. When a process fails, the others are ended, and its exit code is returned; 75 (stopped by
# a signal, state saved) ends nobody.
# DRY_RUN=1 prints the command of each process and starts none.
# Needs bash 5.1.
set -u -m # -m: each process leads a group of its own, so that a signal from the terminal reaches it once, from here

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh NUM_PROCESSES COMMAND [ARGUMENT...]   (found: ${*:-nothing})" >&2
  exit 2
fi
num_processes=$1 dry_run=${DRY_RUN-}
shift
if [[ ! $dry_run =~ ^[01]?$ ]]; then
  echo "launch/local.sh: DRY_RUN is '$dry_run': set 1, or leave it out" >&2
  exit 2
fi

# Below the range from which the kernel takes ports for outgoing connections.
port=$((20000 + RANDOM % 12000))
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((20000 + RANDOM % 12000)); done
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$num_processes

gpus=()
if [[ $num_processes -gt 1 && ${JAX_PLATFORMS-} != cpu ]]; then
  if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  elif [[ ! -v CUDA_VISIBLE_DEVICES ]] && type -P nvidia-smi >/dev/null; then
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader | grep -x '[0-9]*')
  fi
fi
if ((${#gpus[@]} % num_processes)); then
  echo "launch/local.sh: ${#gpus[@]} GPUs and $num_processes processes: start a number that divides the GPUs," \
    "or name fewer in CUDA_VISIBLE_DEVICES" >&2
  exit 2
fi
share=$((${#gpus[@]} / num_processes))
share_of() { local IFS=,; echo "${gpus[*]:$1*share:share}"; }

if [[ $dry_run == 1 ]]; then
  shared="JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES=$num_processes"
  printf -v command ' %q' "$@"
  for ((number = 0; number < num_processes; number++)); do
    echo "$shared JAX_PROCESS_ID=$number${gpus[*]+ CUDA_VISIBLE_DEVICES=$(share_of "$number")}$command"
  done
  exit
fi

prefix() { # outlives every signal, so that the last lines are shown
  trap '' TERM INT HUP USR1
  sed -u "s/^/[$1] /"
  exec cat >/dev/null # where nobody reads any more, a process that saves must not break its pipe
}

declare -A running=() # pid -> process number
groups=() printers=()
started='' missed=() hung_up=''
forward() { # at once, or when all are there to hear it
  if [[ -z $started ]]; then missed+=("$1"); elif ((${#running[@]})); then kill -s "$1" "${!running[@]}"; fi
}
# A terminal that closes sends two, and a second TERM would end lmjax before it has saved.
# shellcheck disable=SC2329 # a trap invokes it
hang_up() {
  [[ -n $hung_up ]] || forward TERM
  hung_up=1
}
trap 'forward TERM' TERM
trap 'forward INT' INT
trap hang_up HUP USR1

for ((number = 0; number < num_processes; number++)); do
  exec {out}> >(prefix "$number")
  printers+=($!)
  exec {err}> >(prefix "$number" >&2)
  printers+=($!)
  if ((share)); then
    CUDA_VISIBLE_DEVICES=$(share_of "$number")
    export CUDA_VISIBLE_DEVICES
  fi
  JAX_PROCESS_ID=$number "$@" >&"$out" 2>&"$err" {out}>&- {err}>&- &
  running[$!]=$number
  groups+=($!)
  exec {out}>&- {err}>&-
done
started=1
for signal in ${missed[@]+"${missed[@]}"}; do forward "$signal"; done
exec {messages}>&2 2>/dev/null # bash itself would report every process that a signal ended

failed=0 preempted=0 reaper='' tick=''
while ((${#running[@]})); do
  # `wait -n` never returns for a process that bash has heard of too early: so all are looked at, once a second.
  ended=
  for pid in "${!running[@]}"; do kill -0 "$pid" || ended=$pid; done
  if [[ -n $ended ]]; then
    wait "$ended"
    status=$?
  else
    kill -0 "${tick:-none}" || { sleep 1 & tick=$!; }
    wait -n -p ended "${!running[@]}" "$tick"
    status=$?
    [[ -z ${ended-} || $ended == "$tick" ]] && continue # a signal came and was passed on, or a second went by
  fi
  number=${running[$ended]}
  unset "running[$ended]"
  if ((status == 75)); then
    preempted=75
  elif ((status && !failed)); then
    failed=$status
    echo "launch/local.sh: process $number ended with exit code $status; ending the others" >&"$messages"
    if ((${#running[@]})); then
      forward TERM
      (sleep 10 && kill -KILL "${!running[@]}") & # a process that waits for the one that died cannot react
      reaper=$!
    fi
  fi
done
for leader in "${groups[@]}" $reaper $tick; do kill -KILL -- "-$leader"; done # what the processes left behind
wait "${printers[@]}"
((failed)) && exit "$failed"
exit "$preempted"
