#!/usr/bin/env bash
# Runs a command on one host with its GPUs, on several hosts over ssh, or in processes on this host's CPU. See --help.
set -u

usage() {
  cat <<'EOF'
launch/gpu.sh [options] -- --config=configs/mine.py --workdir=runs/mine

  --gpus=N          GPUs that every host must have; a host that has others is an error
  --hosts=a,b       hosts to run on, over ssh; the first leads. The checkout lies in --dir on each
  --per_gpu         one process a GPU instead of one a host
  --cpu_devices=N   no GPUs: N CPU devices a process, on this host
  --processes=P     ... in P processes (1)
  --verb=train      what to run: python -m mice_jax.VERB
  --python=FILE     the interpreter (.venv/bin/python)
  --dir=DIR         the checkout (this folder)
  --port=PORT       at which the processes find each other (8476; on one host a free one)
  --logs=DIR        where the output of all but the lead goes (a new folder)

The lead's output is shown. Signals TERM, INT and USR1 go to every process. Exit codes are the run's: 75 preempted,
2 wrong input, 3 stopped by a rule, else that of the first process that failed. When one fails, the others are ended.
EOF
}

fail() { echo "error: $*" >&2; exit 2; }

gpus="" hosts="" per_gpu=0 cpu_devices="" processes=1 verb=train python=.venv/bin/python dir=$PWD port="" logs=""
while (($#)); do
  case $1 in
    --gpus=*) gpus=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --per_gpu) per_gpu=1 ;;
    --cpu_devices=*) cpu_devices=${1#*=} ;;
    --processes=*) processes=${1#*=} ;;
    --verb=*) verb=${1#*=} ;;
    --python=*) python=${1#*=} ;;
    --dir=*) dir=${1#*=} ;;
    --port=*) port=${1#*=} ;;
    --logs=*) logs=${1#*=} ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "$1 is no option of gpu.sh; what the verb takes comes after --. See --help." ;;
  esac
  shift
done

# ---- Processes: the host of each ("" is this one), its environment, and the number of devices of the run ----
run_on() { # HOST COMMAND...: runs the command here or over ssh
  local host=$1; shift
  if [[ -z $host ]]; then "$@"; else ssh -o BatchMode=yes "$host" "$(printf '%q ' "$@")"; fi
}

host_of=() environment_of=() devices=0
IFS=, read -r -a host_list <<<"$hosts"
((${#host_list[@]})) || host_list=("")
if [[ -n $cpu_devices ]]; then
  [[ -z $hosts && -z $gpus && $per_gpu == 0 ]] || fail "--cpu_devices is for this host alone: leave GPUs and hosts out."
  for ((i = 0; i < processes; i++)); do
    host_of+=("") environment_of+=("JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$cpu_devices")
  done
  devices=$((cpu_devices * processes))
else
  [[ $processes == 1 ]] || fail "--processes goes with --cpu_devices; on GPUs it is one a host, or --per_gpu."
  for host in "${host_list[@]}"; do
    listed=$(run_on "$host" nvidia-smi -L 2>/dev/null)
    found=$(grep -c '^GPU ' <<<"$listed")
    ((found)) || fail "nvidia-smi -L lists no GPU on ${host:-this host}."
    [[ -z $gpus || $found == "$gpus" ]] || fail "--gpus=$gpus, but ${host:-this host} has $found. Mend it, or give $found."
    devices=$((devices + found))
    for ((i = 0; i < (per_gpu ? found : 1); i++)); do
      host_of+=("$host") environment_of+=("$( ((per_gpu)) && echo "CUDA_VISIBLE_DEVICES=$i")")
    done
  done
fi
count=${#host_of[@]}
[[ $verb == train || $count == 1 ]] || fail "only train runs in several processes; $verb runs in one."

if [[ -z $port ]]; then
  port=8476
  [[ -n $hosts ]] || port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])') ||
    fail "$python does not run. Give --python=FILE, or make test, which sets .venv up."
fi
lead=${host_list[0]#*@}
logs=${logs:-$(mktemp -d "${TMPDIR:-/tmp}/mice_jax.XXXXXX")}
mkdir -p "$logs" || exit 2

# ---- Start ----------------------------------------------------------------------------------------------------
pids=() codes=() mark="/tmp/mice_jax.$$.$RANDOM"
start() { # NUMBER
  local i=$1 host=${host_of[$1]} line
  local command=(env)
  # shellcheck disable=SC2206  # the NAME=VALUE words contain no blanks
  command+=(${environment_of[$i]})
  command+=("$python" -m "mice_jax.$verb")
  [[ $verb == train ]] && command+=("--expect_devices=$devices")
  ((count > 1)) && command+=("--coordinator_address=${lead:-127.0.0.1}:$port" "--num_processes=$count" "--process_id=$i")
  command+=("${given[@]}")
  line="cd $(printf %q "$dir") && echo \$\$ >$mark.$i && exec $(printf '%q ' "${command[@]}")"
  if [[ -n $host ]]; then
    exec ssh -o BatchMode=yes "$host" "bash -c $(printf %q "$line")"
  else
    exec bash -c "$line"
  fi
}
given=("$@")
set -m # each process has its own process group, so that a signal of the terminal reaches it only through this script
for ((i = 0; i < count; i++)); do
  if ((i == 0)); then start 0 </dev/null & else start "$i" </dev/null >"$logs/$i.log" 2>&1 & fi
  pids[i]=$! codes[i]=""
  echo "gpu.sh: process $i, pid ${pids[i]} on ${host_of[i]:-this host}$( ((i)) && echo ", log $logs/$i.log")" >&2
done
set +m

# ---- Watch ----------------------------------------------------------------------------------------------------
tell() { # SIGNAL: sends the signal to every process that still runs
  local i
  for ((i = 0; i < count; i++)); do
    [[ -n ${codes[i]} ]] && continue
    if [[ -n ${host_of[i]} ]]; then
      # shellcheck disable=SC2029  # the name of the file is known here
      ssh -o BatchMode=yes "${host_of[i]}" "kill -$1 \$(cat $mark.$i)" 2>/dev/null
      [[ $1 == KILL ]] && kill -KILL "${pids[i]}" 2>/dev/null
    else
      kill "-$1" "${pids[i]}" 2>/dev/null
    fi
  done
}
trap 'tell TERM' TERM
trap 'tell INT' INT
trap 'tell USR1' USR1

first="" first_at=0 told=0 orderly=""
running=$count
while ((running)); do
  sleep 0.3
  for ((i = 0; i < count; i++)); do
    [[ -n ${codes[i]} ]] && continue
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}" 2>/dev/null
    codes[i]=$? running=$((running - 1))
    ((codes[i] == 0)) && continue
    ((told == 0)) && case ${codes[i]} in 75 | 2 | 3) orderly+=" ${codes[i]} " ;; esac
    [[ -n $first ]] && continue
    first=${codes[i]} first_at=$SECONDS
    echo "gpu.sh: process $i ended with $first" >&2
    ((i)) && tail -n 5 "$logs/$i.log" >&2
  done
  # The other processes notice the loss within a minute (the heartbeat), save if they can, and exit with 75 if the run
  # can be resumed. A process that does not end by itself is ended.
  [[ -z $first ]] && continue
  ((told == 0 && SECONDS - first_at >= 80)) && { told=1; tell TERM; }
  ((told == 1 && SECONDS - first_at >= 100)) && { told=2; tell KILL; }
done
for ((i = 0; i < count; i++)); do
  if [[ -n ${host_of[i]} ]]; then run_on "${host_of[i]}" rm -f "$mark.$i" 2>/dev/null; else rm -f "$mark.$i"; fi
done
for code in 75 2 3; do
  [[ $orderly == *" $code "* ]] && exit "$code"
done
exit "${first:-0}"
