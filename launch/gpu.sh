#!/usr/bin/env bash
# Runs a command on one host with its GPUs, on several hosts over ssh, or in processes on this host's CPU. See --help.
set -u

usage() {
  cat <<'EOF'
launch/gpu.sh [options] -- --config=configs/mine.py --workdir=runs/mine

  --gpus=N          the number of GPUs that every host must have; another number is an error
  --hosts=a,b       the hosts, reached over ssh; process 0 runs on the first. Each needs the checkout in --dir
  --per_gpu         start one process per GPU instead of one per host
  --cpu_devices=N   use N CPU devices per process on this host, and no GPUs
  --processes=P     the number of processes with --cpu_devices (default 1)
  --verb=train      the command to run, as in python -m mice_jax.train
  --python=FILE     the Python interpreter (default .venv/bin/python)
  --dir=DIR         the folder of the checkout (default this folder)
  --port=PORT       the port of the coordinator (default 8476, or a free port if all processes are on this host)
  --logs=DIR        the folder for the output of all processes but process 0 (default a new folder)

The output of process 0 is shown. Signals TERM, INT and USR1 are sent to every process. The exit code is 75 (preempted),
2 (wrong input) or 3 (stopped by a rule) if a process ended with it, else the code of the first process that failed.
If a process fails, the others are ended.
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
    *) fail "gpu.sh has no option $1. Put the flags of the command after --. See --help." ;;
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
  [[ -z $hosts && -z $gpus && $per_gpu == 0 ]] || fail "--cpu_devices runs on this host only: leave out --hosts, --gpus and --per_gpu."
  for ((i = 0; i < processes; i++)); do
    host_of+=("") environment_of+=("JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$cpu_devices")
  done
  devices=$((cpu_devices * processes))
else
  [[ $processes == 1 ]] || fail "--processes needs --cpu_devices. With GPUs, there is one process per host, or one per GPU with --per_gpu."
  for host in "${host_list[@]}"; do
    listed=$(run_on "$host" nvidia-smi -L 2>/dev/null)
    found=$(grep -c '^GPU ' <<<"$listed")
    ((found)) || fail "nvidia-smi -L lists no GPU on ${host:-this host}."
    [[ -z $gpus || $found == "$gpus" ]] || fail "--gpus=$gpus, but ${host:-this host} has $found. Set --gpus=$found, or check the host."
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
    fail "$python does not run. Set --python=FILE, or run make install, which creates .venv."
fi
coordinator=${host_list[0]#*@}
logs=${logs:-$(mktemp -d "${TMPDIR:-/tmp}/mice_jax.XXXXXX")}
mkdir -p "$logs" || exit 2

# ---- Start ----------------------------------------------------------------------------------------------------
pids=() codes=() pid_file="/tmp/mice_jax.$$.$RANDOM"
start() { # NUMBER: replaces this subshell by the process with this number
  local i=$1 host=${host_of[$1]} line
  local command=(env)
  # shellcheck disable=SC2206  # the NAME=VALUE words contain no spaces
  command+=(${environment_of[$i]})
  command+=("$python" -m "mice_jax.$verb")
  [[ $verb == train ]] && command+=("--expect_devices=$devices")
  ((count > 1)) && command+=("--coordinator_address=${coordinator:-127.0.0.1}:$port" "--num_processes=$count" "--process_id=$i")
  command+=("${given[@]}")
  line="cd $(printf %q "$dir") && echo \$\$ >$pid_file.$i && exec $(printf '%q ' "${command[@]}")"
  if [[ -n $host ]]; then
    exec ssh -o BatchMode=yes "$host" "bash -c $(printf %q "$line")"
  else
    exec bash -c "$line"
  fi
}
given=("$@")
set -m # each process gets its own process group, so that signals of the terminal reach it only through this script
for ((i = 0; i < count; i++)); do
  if ((i == 0)); then start 0 </dev/null & else start "$i" </dev/null >"$logs/$i.log" 2>&1 & fi
  pids[i]=$! codes[i]=""
  echo "gpu.sh: process $i, pid ${pids[i]} on ${host_of[i]:-this host}$( ((i)) && echo ", log $logs/$i.log")" >&2
done
set +m

# ---- Watch ----------------------------------------------------------------------------------------------------
send_signal() { # SIGNAL: sends the signal to every process that still runs
  local i
  for ((i = 0; i < count; i++)); do
    [[ -n ${codes[i]} ]] && continue
    if [[ -n ${host_of[i]} ]]; then
      # shellcheck disable=SC2029  # the name of the file is known here
      ssh -o BatchMode=yes "${host_of[i]}" "kill -$1 \$(cat $pid_file.$i)" 2>/dev/null
      [[ $1 == KILL ]] && kill -KILL "${pids[i]}" 2>/dev/null
    else
      kill "-$1" "${pids[i]}" 2>/dev/null
    fi
  done
}
trap 'send_signal TERM' TERM
trap 'send_signal INT' INT
trap 'send_signal USR1' USR1

first_failure="" failed_at=0 signals_sent=0 own_codes=""
running=$count
while ((running)); do
  sleep 0.3
  for ((i = 0; i < count; i++)); do
    [[ -n ${codes[i]} ]] && continue
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}" 2>/dev/null
    codes[i]=$? running=$((running - 1))
    ((codes[i] == 0)) && continue
    ((signals_sent == 0)) && case ${codes[i]} in 75 | 2 | 3) own_codes+=" ${codes[i]} " ;; esac
    [[ -n $first_failure ]] && continue
    first_failure=${codes[i]} failed_at=$SECONDS
    echo "gpu.sh: process $i ended with exit code $first_failure" >&2
    ((i)) && tail -n 5 "$logs/$i.log" >&2
  done
  # The other processes notice the loss within a minute, by the heartbeat. They save if they can, and exit with 75 if the
  # run can be resumed. This script ends every process that is still running after that.
  [[ -z $first_failure ]] && continue
  ((signals_sent == 0 && SECONDS - failed_at >= 80)) && { signals_sent=1; send_signal TERM; }
  ((signals_sent == 1 && SECONDS - failed_at >= 100)) && { signals_sent=2; send_signal KILL; }
done
for ((i = 0; i < count; i++)); do
  if [[ -n ${host_of[i]} ]]; then run_on "${host_of[i]}" rm -f "$pid_file.$i" 2>/dev/null; else rm -f "$pid_file.$i"; fi
done
for code in 75 2 3; do
  [[ $own_codes == *" $code "* ]] && exit "$code"
done
exit "${first_failure:-0}"
