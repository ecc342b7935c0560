#!/bin/sh
# Fills the table for one NVIDIA GPU, in one command, on a machine that has Python 3.12 or 3.11, jax[cuda] and torch for
# its driver: correctness of the attention kernels, the training step at the shape of Llama-3.2-3B, attention alone, and
# the training step at the shape of Mistral-7B.
#
#   bench/gpu.sh                       # an hour or so on an H200; PYTHON=/path/to/python for another than python3
#   bench/gpu.sh --tiny                # toy shapes, on a CPU too: shows that it runs
#
# It installs other packages that it needs into the given interpreter if they are missing (set PIP_FIND_LINKS and
# PIP_NO_INDEX if the machine is offline); jax and torch are not changed. The output is stored in bench/gpu/, one file
# per benchmark, whose last line is JSON. Liger's kernels are measured if liger-kernel can be installed.
set -eu

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=bench/gpu
tiny=
case "${1-}" in
--tiny) tiny=1 out=$(mktemp -d) ;;
'') ;;
*)
  sed -n '2,10p' "$0" >&2
  exit 2
  ;;
esac

mkdir -p "$out"
if [ -z "$tiny" ]; then
  "$python" -c 'import jax, sys, torch
gpus = [d.device_kind for d in jax.devices() if d.platform == "gpu"]
if not gpus or not torch.cuda.is_available():
    sys.exit(f"error: jax sees {jax.devices()} and torch {torch.cuda.is_available()=}: both must see the GPU")
print(f"{gpus[0]}, jax {jax.__version__}, torch {torch.__version__}")' || exit 2
  "$python" -c 'import flax, grain, mice_jax, numba, optax, pytest, transformers' 2>/dev/null || {
    "$python" -c 'import importlib.metadata as m
print("\n".join(f"{p}=={m.version(p)}" for p in ("jax", "jaxlib", "torch")))' >"$out/kept.txt"
    "$python" -m pip install -e ".[test]" accelerate -c "$out/kept.txt"
  }
  "$python" -m pip install --no-deps liger-kernel || echo 'liger-kernel cannot be had: left out'
fi

failed=0
run() { # run NAME COMMAND...
  name=$1
  shift
  echo "== $name: $*"
  if "$@" >"$out/$name.txt" 2>"$out/$name.err"; then
    sed '$d' "$out/$name.txt"
  else
    failed=1
    tail -n 20 "$out/$name.err"
    echo "$name failed; all of its error output is in $out/$name.err"
  fi
}

# The most valuable first, in case the machine is taken away: whether the kernels compute what the reference does, through
# the train step; then the step paired with torch; then attention alone.
if [ -n "$tiny" ]; then
  run correctness "$python" -m pytest -q -m 'not slow' tests/test_attention_gpu.py -k step
  run tiny "$python" bench/step.py --size=tiny --parts=peers,start --rows=2 --slots=256 --steps=1 --rounds=1
  run attention "$python" bench/attention.py --rows=1 --slots=256 --heads=4 --kv-heads=2 --head-dim=16 --rounds=1
else
  run correctness env JAX_PLATFORMS=cuda,cpu "$python" -m pytest -q -m gpu tests/test_attention_gpu.py
  run llama-3b "$python" bench/step.py --size=llama-3b --parts=peers,start --rows=2 --slots=4096 --microbatches=4 --rounds=3
  run attention "$python" bench/attention.py
  run mistral-7b "$python" bench/step.py --size=mistral-7b --parts=peers --rows=1 --slots=4096 --microbatches=8 \
    --remat=full --rounds=3
fi
echo "kept in $out"
exit "$failed"
