#!/usr/bin/env bash
# One command on every host of a Cloud TPU: one VM, a pod slice, or several slices; the TPU is there, or is made.
#
#   launch/tpu_vm.sh my-pod us-east5-a lmjax/.venv/bin/lmjax train lmjax/my.yaml run_dir=gs://bucket/runs/big
#
#   ACCELERATOR=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite SPOT=1 SETUP='python3 -m venv v && v/bin/pip install ...' \
#     launch/tpu_vm.sh my-pod us-east5-a v/bin/lmjax train gs://bucket/my.yaml run_dir=gs://bucket/runs/big
#
# NAME and ZONE are those of the TPU. The command starts in the home directory of every host. The hosts find each
# other by Google's metadata, several slices too if they are of one queued resource. gcloud needs its key in
# ssh-agent: ssh-add ~/.ssh/google_compute_engine.
#
# Variables:
#   ACCELERATOR       type of the TPU, as v5litepod-256. If there is no queued resource NAME, it is made of this type,
#                     and waited for; one that was preempted is deleted and made anew. Not set: the TPU has to be there
#   RUNTIME           version of its software, as v2-alpha-tpuv5-lite (v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e, v4:
#                     tpu-ubuntu2204-base); goes with ACCELERATOR
#   SPOT=1            make it of spot capacity
#   SLICES            how many slices, named NAME-0, NAME-1, ...; not set: one, named NAME
#   PROJECT           Google Cloud project, if not gcloud's own
#   SETUP             shell command that installs lmjax, once on every host that has not yet run it
#   LOGS              directory for what the hosts print: HOST.log for each, and gcloud.log
#   TPU_POLL_SECONDS  time between two looks at the TPU's state (30)
#   DRY_RUN=1         print the commands, as if there were no TPU yet, and run none
#
# When the command ends with 75 (stopped by a signal, state saved), or fails while the TPU is not READY, it is started
# again once the TPU is, which a maintenance event may take a while for; lmjax train then goes on from its newest
# checkpoint. A TPU that is gone and was not made here ends this with 75. Any other exit code is returned.
# TERM, INT or HUP is passed on as TERM to every host, and the command's end waited for; a second one ends this at
# once. Nothing is ever deleted at the end: what is left, and the command that deletes it, is printed.
# Needs bash 4.4.
set -u -m # -m: gcloud has a process group of its own, so that a signal from the terminal reaches this script alone

say() { echo "launch/tpu_vm.sh: $*" >&2; }
refuse() {
  say "$*"
  exit 2
}

if [[ $# -lt 3 ]]; then
  echo "usage: launch/tpu_vm.sh NAME ZONE COMMAND [ARGUMENT...]   (found: ${*:-nothing})" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
printf -v command ' %q' "$@"
accelerator=${ACCELERATOR-} runtime=${RUNTIME-} spot=${SPOT-} slices=${SLICES:-1} project=${PROJECT-} setup=${SETUP-}
logs=${LOGS-} poll=${TPU_POLL_SECONDS:-30} dry_run=${DRY_RUN-}

label='^[a-z]([-a-z0-9]*[a-z0-9])?$'
[[ $name =~ $label ]] || refuse "NAME is '$name': lower-case letters, digits and -, such as my-pod"
[[ $zone =~ $label ]] || refuse "ZONE is '$zone': lower-case letters, digits and -, such as us-east5-a"
[[ $slices =~ ^[1-9][0-9]*$ ]] || refuse "SLICES is '$slices': how many slices, from 1 on"
[[ $poll =~ ^[0-9]+$ ]] || refuse "TPU_POLL_SECONDS is '$poll': whole seconds, such as 30"
[[ $spot =~ ^[01]?$ ]] || refuse "SPOT is '$spot': set 1, or leave it out"
[[ $dry_run =~ ^[01]?$ ]] || refuse "DRY_RUN is '$dry_run': set 1, or leave it out"
if [[ -n $accelerator && -z $runtime ]]; then
  refuse "ACCELERATOR without RUNTIME: set RUNTIME to a software version, such as v2-alpha-tpuv5-lite for v5litepod"
elif [[ -z $accelerator && (-n $runtime || $spot == 1) ]]; then
  refuse "RUNTIME and SPOT are for a TPU that is to be made: set ACCELERATOR to its type, such as v5litepod-256"
fi
if [[ $dry_run != 1 ]]; then
  type -P gcloud >/dev/null || refuse "gcloud is not on PATH: install the Google Cloud CLI, cloud.google.com/sdk"
  [[ -z $logs ]] || mkdir -p "$logs" || refuse "LOGS is '$logs': choose a directory that can be written to"
fi

nodes=("$name")
made_of=(--node-id="$name")
if ((slices > 1)); then
  # By MultisliceParams of the Cloud TPU API, nodes are named by the prefix and a number. A queued resource gives each
  # host MEGASCALE_* in its metadata (tpu-env), where JAX reads them (cloud_tpu_cluster.py): none is set here.
  nodes=()
  for ((number = 0; number < slices; number++)); do nodes+=("$name-$number"); done
  made_of=(--node-count="$slices" --node-prefix="$name")
fi
place=("--zone=$zone" ${project:+"--project=$project"})
made_of+=("--accelerator-type=$accelerator" "--runtime-version=$runtime")
[[ $spot != 1 ]] || made_of+=(--spot)

# What a host runs. Its lines are told apart by a prefix, as gcloud 528 loses the path of --output-directory. The
# command is a child of the shell: if a signal ended what ssh itself started, ssh would end with 255, after which gcloud
# starts it again.
# What an earlier start left running, when the connection to it was lost, is stopped first: it holds the TPU.
# A stop may come at any time of a start. It leaves a mark, which the start looks for before the command and again when
# the command's number is written down: whoever of the two finds both sends TERM, and once, as a second one would end
# the command before its state is saved.
printf -v mark '.lmjax-stop-%(%s)T-%s' -1 "$$"
# shellcheck disable=SC2016 # for the host's shell
{
  stop="touch $mark; { read -r pid ending <.lmjax-launch && [[ -z \$ending ]] && mkdir $mark.sent && "
  stop+='kill -TERM "$pid"; } 2>/dev/null'
  prefixed='2>&1 | sed -u "s/^/[$HOSTNAME] /"; exit "${PIPESTATUS[0]}"'
  start='{ read -r pid ending <.lmjax-launch && { [[ -n $ending ]] || '
  start+='{ echo "$pid ending" >.lmjax-launch; kill -TERM "$pid"; }; }; } 2>/dev/null && '
  start+='while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done; '
  start+="rm -f .lmjax-launch; [[ ! -e $mark ]] || exit 75;$command & echo \$! >.lmjax-launch; "
  start+="[[ ! -e $mark ]] || { mkdir $mark.sent && kill -TERM \$!; } 2>/dev/null; "
  start+="wait \$!; code=\$?; rm -rf .lmjax-launch $mark $mark.sent; exit \$code"
}
printf -v quoted '%q' "$setup"
setup="[[ \$(cat .lmjax-setup 2>/dev/null) == $quoted ]] || { bash -c $quoted && printf %s $quoted >.lmjax-setup; }"

call() { # a command that is printed in a dry run
  local word line=
  if [[ $dry_run != 1 ]]; then
    "$@"
    return
  fi
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }" >&3
}
[[ $dry_run != 1 ]] || exec 3>&1 # so that it is shown where an answer is captured, too

jobs=()    # process groups of what runs here
on_hosts=0 # the command may be running on the hosts
stopping=0 # a signal has been passed on
exists=0   # there is a queued resource
patience=1 # how often gcloud may fail in a row to tell a state
errors=$(mktemp) || exit 1

leave() {
  rm -f "$errors"
  ((exists)) && [[ $dry_run != 1 ]] || return
  say "the queued resource $name still exists, and its TPUs cost money while they do. To delete it:"
  echo "gcloud compute tpus queued-resources delete $name ${place[*]} --force --quiet" >&2
}
trap leave EXIT

on_signal() { # NAME NUMBER
  local node job
  if ((on_hosts && !stopping)); then
    stopping=1
    say "$1: passed on to all hosts as TERM; waiting for the command to save and end. A second signal ends this at once"
    for node in "${nodes[@]}"; do
      gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all "--command=$stop" </dev/null >&2 &
    done
    return
  fi
  ((!on_hosts)) || say "$1 again: the command may still be running on the hosts of $name"
  for job in ${jobs[@]+"${jobs[@]}"}; do kill -TERM -- "-$job"; done 2>/dev/null
  exit $((128 + $2))
}
trap 'on_signal HUP 1' HUP
trap 'on_signal INT 2' INT
trap 'on_signal TERM 15' TERM

finished() { # PID: its exit code, once it has ended
  local code
  while true; do
    wait "$1"
    code=$?
    ((code > 128)) && kill -0 "$1" 2>/dev/null && continue # only a signal that this script got
    return "$code"
  done
}

in_background() { # a command that a signal need not wait for
  "$@" </dev/null &
  jobs=($!)
  finished $!
}

gather() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s\n' "$line"
    if [[ -z $logs ]]; then
      continue
    elif [[ $line =~ ^\[([A-Za-z0-9._-]+)\]\ (.*)$ ]]; then
      printf '%s\n' "${BASH_REMATCH[2]}" >>"$logs/${BASH_REMATCH[1]}.log"
    else
      printf '%s\n' "$line" >>"$logs/gcloud.log"
    fi
  done
}

everywhere() { # COMMAND: on all hosts at once; the first failure, or else 75 if a slice ended so
  local node job code failed=0 saved=0
  local ssh=()
  jobs=()
  for node in "${nodes[@]}"; do
    # Not `queued-resources ssh --node=all`: that starts 64 hosts and waits for their end before it starts the next.
    ssh=(gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all "--command={ $1; } $prefixed")
    if [[ $dry_run == 1 ]]; then
      call "${ssh[@]}"
      continue
    fi
    (
      "${ssh[@]}" </dev/null 2>&1 | gather
      exit "${PIPESTATUS[0]}"
    ) &
    jobs+=($!)
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do
    finished "$job"
    code=$?
    if ((code == 75)); then
      saved=75
    elif ((code && !failed)); then
      failed=$code
    fi
  done
  return $((failed ? failed : saved))
}

state_of() { # RESOURCE NAME FIELD: state, or ABSENT; fails where gcloud does not tell
  local state code failures=0
  set -- gcloud compute tpus "$1" describe "$2" "${place[@]}" "--format=value($3)"
  if [[ $dry_run == 1 ]]; then
    call "$@"
    if ((exists)); then echo ACTIVE; else echo ABSENT; fi
    return
  fi
  while true; do
    state=$("$@" 2>"$errors")
    code=$?
    if ((code == 0)); then
      echo "$state"
      return
    elif grep -q NOT_FOUND "$errors"; then
      echo ABSENT
      return
    fi
    cat "$errors" >&2
    ((++failures < patience)) || return "$code"
    sleep "$poll"
  done
}

pause() { # its output is not this script's, which it would hold open should a signal come before it is among the jobs
  sleep "$poll" >/dev/null 2>&1 &
  jobs=($!)
  finished $!
}

create() {
  [[ $dry_run == 1 ]] || say "making the queued resource $name: $slices x $accelerator"
  exists=1
  in_background call gcloud compute tpus queued-resources create "$name" "${place[@]}" "${made_of[@]}" --quiet || {
    local code=$?
    # gcloud may have failed when the request was through: then it exists, and so it does if nobody tells.
    if [[ $(state_of queued-resources "$name" state.state) == ABSENT ]]; then
      exists=0
      say "the queued resource $name could not be made"
    else
      say "gcloud failed while it made the queued resource $name, which is taken to be there"
    fi
    exit "$code"
  }
}

delete() {
  in_background call gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet || exit
  exists=0
}

deleted() {
  exists=0
  say "somebody has deleted $name, so it is not made anew; the same command makes it, and goes on"
  exit 75
}

get_ready() { # the queued resource is there, and ACTIVE
  local state seen=
  while true; do
    state=$(state_of queued-resources "$name" state.state) || exit
    patience=5
    case $state in
    ABSENT) if ((exists)); then deleted; else create; fi ;;
    ACTIVE)
      exists=1
      return
      ;;
    SUSPENDED)
      exists=1
      say "$name was preempted (SUSPENDED): it is deleted and made anew"
      delete
      create
      ;;
    FAILED)
      exists=1
      say "the queued resource $name is FAILED. To see why: gcloud compute tpus queued-resources describe $name" \
        "${place[*]}"
      exit 1
      ;;
    *)
      [[ $state == DELETING ]] || exists=1
      [[ $state == "$seen" ]] || say "the queued resource $name is $state"
      seen=$state
      pause
      ;;
    esac
  done
}

look_again() { # STATUS: returns once the command may start again; ends with STATUS if it is the command's own
  local node state status=$1 ready
  patience=5
  while true; do
    if [[ -n $accelerator ]]; then
      state=$(state_of queued-resources "$name" state.state) || exit "$status"
      case $state in
      ABSENT | DELETING) deleted ;;
      ACTIVE) ;;
      *) # preempted, and perhaps not all of it gone yet
        get_ready
        return
        ;;
      esac
    fi
    ready=1
    for node in "${nodes[@]}"; do
      state=$(state_of tpu-vm "$node" state) || exit "$status"
      case $state in
      READY) ;;
      PREEMPTED | TERMINATED | STOPPED | DELETING | ABSENT)
        if [[ -z $accelerator ]]; then
          say "$node is $state: make the TPU anew and start the same command, which goes on from its newest checkpoint"
          exit 75
        fi
        say "$node is $state: the queued resource $name is deleted and made anew"
        delete
        create
        get_ready
        return
        ;;
      *) ready=0 ;;
      esac
    done
    if ((ready)); then
      ((status == 75)) || exit "$status"
      return
    fi
    status=75 # the TPU was not well, which is why the command failed
    pause
  done
}

[[ -z $accelerator ]] || get_ready
while true; do
  status=0
  [[ -z ${SETUP-} ]] || everywhere "$setup" || {
    status=$?
    say "SETUP ended with exit code $status"
  }
  if ((status == 0)); then
    on_hosts=1
    everywhere "$start"
    status=$?
    on_hosts=0
  fi
  ((status && !stopping)) || exit "$status"
  look_again "$status"
  say "starting the command again"
done
