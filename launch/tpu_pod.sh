#!/usr/bin/env bash
# Runs training on every worker of a Cloud TPU VM, and creates the VM if it does not exist. See --help.
set -u

usage() {
  cat <<'EOF'
launch/tpu_pod.sh --name=mice --zone=us-east5-a --type=v5p-16 --version=v2-alpha-tpuv5 [options] -- --config=... --workdir=/shared/runs/mine

  --project=P          the project (default that of gcloud)
  --spot               create a spot VM
  --queued             create the VM as a queued resource, and wait for it
  --autocheckpoint     make Cloud TPU send SIGTERM before maintenance and wait for the save (v2 to v4, v5e)
  --keep               do not delete the VM at the end, even if this script has created it
  --retries=N          the number of times that a preempted run is started again (default 3)
  --expect_devices=N   the number of devices, for a type that this script does not know

The output of worker 0 is shown. Each other worker writes its output to ~/mice_jax.log.
EOF
}

fail() { echo "error: $*" >&2; exit 2; }

name="" zone="" type="" version="" project="" spot="" autocheckpoint="" queued=0 keep=0 retries=3 devices=""
while (($#)); do
  case $1 in
    --name=* | --zone=* | --type=* | --version=* | --project=* | --retries=*)
      key=${1%%=*}; printf -v "${key#--}" %s "${1#*=}" ;;
    --expect_devices=*) devices=${1#*=} ;;
    --spot) spot=--spot ;;
    --autocheckpoint) autocheckpoint=--autocheckpoint-enabled ;;
    --queued) queued=1 ;;
    --keep) keep=1 ;;
    -h | --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "tpu_pod.sh has no option $1. Put the flags of mice train after --. See --help." ;;
  esac
  shift
done
for key in name zone type version; do [[ -n ${!key} ]] || fail "--$key is missing. See --help."; done
size=${type##*-}
[[ -n $devices ]] || case $type in
  v5litepod-* | v6e-* | v2-* | v3-*) devices=$size ;; # v2 and v3 have two devices per chip
  v4-* | v5p-*) devices=$((size / 2)) ;;              # their names count cores, two of which are one device
  *) fail "the number of devices of $type is not known: set --expect_devices=N." ;;
esac
gcloud_flags=("--zone=$zone" --quiet)
[[ -n $project ]] && gcloud_flags+=("--project=$project")
vm() { local verb=$1; shift; gcloud compute tpus tpu-vm "$verb" "$name" "${gcloud_flags[@]}" "$@"; }
queue() { local verb=$1; shift; gcloud compute tpus queued-resources "$verb" "$name" "${gcloud_flags[@]}" "$@"; }
state() { vm describe '--format=value(state)' 2>/dev/null; }

created=0
delete() {
  ((created && !keep)) || return 0
  if ((queued)); then queue delete --force; else vm delete; fi && created=0
}
create() {
  created=1
  if ((queued)); then
    queue create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$version" ${spot:+"$spot"} ${autocheckpoint:+"$autocheckpoint"} || return
    until [[ $(queue describe '--format=value(state.state)') =~ ^(ACTIVE|FAILED|SUSPENDED)$ ]]; do sleep 30; done
    [[ $(state) == READY ]]
  else
    vm create "--accelerator-type=$type" "--version=$version" ${spot:+"$spot"} ${autocheckpoint:+"$autocheckpoint"}
  fi
}
packed=""
trap 'delete; [[ -z $packed ]] || rm -r "$packed"' EXIT
# shellcheck disable=SC2064  # the trap must use the current value of `signal`
for signal in TERM INT USR1; do
  trap "vm ssh --worker=all '--command=kill -$signal \$(cat mice_jax.pid)'" "$signal"
done

packed=$(mktemp -d "${TMPDIR:-/tmp}/mice_jax.XXXXXX")
tar=$packed/mice_jax.tar
# The archive holds the checkout with uncommitted and untracked changes, but without ignored or deleted files.
if ! { git ls-files -z --cached --others --exclude-standard --deduplicate >"$packed/files" &&
  tar --create --file="$tar" --null --files-from="$packed/files" --ignore-failed-read; } 2>"$packed/errors"; then
  fail "the checkout cannot be packed: run this script in the root of the checkout. $(cat "$packed/errors")"
fi
commit=$(git rev-parse HEAD)$(git diff --quiet HEAD || echo " and changes")
# shellcheck disable=SC2016  # each worker expands it to its own number
id='$(curl -sf -H Metadata-Flavor:Google http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)'
for ((attempt = 0; attempt <= retries; attempt++)); do
  if [[ -z $(state) ]]; then
    create || fail "gcloud could not create $type as $name in $zone: its error message is above."
  fi
  mapfile -t ips < <(vm describe '--format=value[delimiter="\n"](networkEndpoints[].ipAddress)')
  gcloud compute tpus tpu-vm scp "$tar" "$name:" --worker=all "${gcloud_flags[@]}" || fail "the checkout could not be copied to $name."
  vm ssh --worker=all '--command=mkdir -p mice_jax && tar xf mice_jax.tar -C mice_jax && cd mice_jax && python3 -m venv .venv && .venv/bin/pip install -q ".[tpu,gcs]"' ||
    fail "mice_jax could not be installed on $name."
  joined="--coordinator_address=${ips[0]}:8476 --num_processes=${#ips[@]} --process_id=$id"
  vm ssh --worker=all "--command=cd mice_jax; [ $id = 0 ] || exec >~/mice_jax.log 2>&1; MICE_JAX_COMMIT=$(printf %q "$commit") .venv/bin/python -m mice_jax.train --expect_devices=$devices $joined $(printf '%q ' "$@")& echo \$! >~/mice_jax.pid; wait \$!" &
  run=$!
  wait "$run"; code=$?
  while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done
  [[ $code == 75 || $(state) != READY ]] || break
  echo "tpu_pod.sh: preempted, attempt $((attempt + 1)) of $((retries + 1))" >&2
  code=75
  [[ $(state) == READY ]] || delete
done
exit "$code"
