"""The launchers: gpu.sh really runs processes on CPU, the others are asked what they would run."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from absl import flags

from helpers.runs import ENVIRONMENT, REPOSITORY, lines_of, read_metrics, setting
from mice_jax.cli.flags import define_train

LAUNCH = REPOSITORY / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]


def gpu(*arguments: str | Path, first_on_path: Path | None = None) -> subprocess.Popen[str]:
    path = f"{first_on_path}:{os.environ['PATH']}" if first_on_path else os.environ["PATH"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [LAUNCH / "gpu.sh", f"--python={sys.executable}", *map(str, arguments)],
        cwd=REPOSITORY, env=os.environ | ENVIRONMENT | {"PATH": path, "MICE_JAX_HEARTBEAT_S": "10"},
        stdout=pipe, stderr=pipe, text=True,
    )  # fmt: skip


def stub(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)
    return folder


def shellcheck(script: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "shellcheck", "--shell=bash", script]
    return subprocess.run(command, capture_output=True, text=True)


# ---------------------------------------------------------------------------------------- scripts
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_shellcheck_finds_nothing_in_a_script(script: Path) -> None:
    assert shellcheck(script).stdout == ""


def test_shellcheck_finds_an_unquoted_variable(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("#!/bin/bash\nrm $1/*\n")
    assert shellcheck(tmp_path / "bad.sh").returncode == 1


# ---------------------------------------------------------------------------------------- gpu.sh
# Ends with code 1 once the other of two has ended; `-c` is how the launcher asks for a free port.
PEER = """
[[ $1 == -c ]] && exec {python} "$@"
all="$*" && number=${{all##*--process_id=}} && number=${{number%% *}} && other={folder}/pid.$((1 - number))
echo $$ >{folder}/pid.$number
while [[ ! -s $other ]] || kill -0 "$(<"$other")"; do sleep 0.1; done
exit 1
"""


def test_gpu_sh_ends_when_a_process_is_killed_and_the_other_notices(tmp_path: Path) -> None:
    """The processes are stubs; test_two_processes.py kills real ones, which notice it by themselves."""
    path = stub(tmp_path / "bin", "python", PEER.format(python=sys.executable, folder=tmp_path))
    run = gpu("--cpu_devices=1", "--processes=2", f"--logs={tmp_path}", f"--python={path / 'python'}", "--", "--w=1")
    assert run.stderr
    pids = [int(re.findall(r"pid (\d+)", run.stderr.readline())[0]) for _ in range(2)]
    while not all((tmp_path / f"pid.{i}").exists() for i in (0, 1)):
        assert run.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    assert run.poll() is None, "it runs as long as its processes do"
    os.kill(pids[1], signal.SIGKILL)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 128 + signal.SIGKILL, err  # and not 75: there may be no checkpoint to go on from
    assert "process 1 ended with exit code 137" in err
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_gpu_sh_trains_in_two_processes_and_passes_a_signal_on(tmp_path: Path) -> None:
    config = setting(tmp_path / "in", "c.data.phases[0].num_epochs = 500.0")
    run = gpu("--cpu_devices=2", "--processes=2", f"--logs={tmp_path}", "--", f"--config={config}",
              f"--workdir={tmp_path / 'run'}")  # fmt: skip
    while lines_of(tmp_path / "run") < 3:
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 75, out + err
    assert [r["step"] for r in read_metrics(tmp_path / "run")][:3] == [1, 2, 3]
    assert "fsdp 4" in out and "step 3/" in out, "the output of the main process is shown"
    assert "step 3/" not in (tmp_path / "1.log").read_text()


def test_gpu_sh_with_another_number_of_gpus_is_an_error(tmp_path: Path) -> None:
    path = stub(tmp_path / "bin", "nvidia-smi", "echo 'GPU 0: H100'; echo 'GPU 1: H100'")
    run = gpu("--gpus=8", "--", "--config=none.py", first_on_path=path)
    out, err = run.communicate(timeout=20)
    assert (run.returncode, out) == (2, "")
    assert err == "error: --gpus=8, but this host has 2. Set --gpus=2, or check the host.\n"


def test_gpu_sh_starts_a_process_for_each_gpu_over_ssh(tmp_path: Path) -> None:
    """ssh is a stub that runs here, the interpreter one that says how it was called."""
    path = stub(tmp_path / "bin", "nvidia-smi", "echo 'GPU 0: H100'; echo 'GPU 1: H100'")
    stub(path, "ssh", 'shift 2; shift; bash -c "$*"')
    stub(path, "python", 'echo "$CUDA_VISIBLE_DEVICES $*"')
    run = gpu("--gpus=2", "--hosts=me@a,b", "--per_gpu", f"--logs={tmp_path}", f"--python={path / 'python'}", "--",
              "--workdir=has a blank", first_on_path=path)  # fmt: skip
    out, err = run.communicate(timeout=30)
    assert run.returncode == 0, err
    said = [out, *((tmp_path / f"{i}.log").read_text() for i in (1, 2, 3))]
    assert [s.strip() for s in said] == [
        f"{i % 2} -m mice_jax.train --expect_devices=4 --coordinator_address=a:8476 --num_processes=4 "
        f"--process_id={i} --workdir=has a blank"
        for i in range(4)
    ]


# ---------------------------------------------------------------------------------------- Slurm
@pytest.mark.parametrize(("code", "requeued"), [(75, "requeue 7\n"), (2, ""), (0, "")])
def test_slurm_requeues_a_preempted_job_and_no_other(tmp_path: Path, code: int, requeued: str) -> None:
    path = stub(tmp_path / "bin", "srun", f'echo "$*" >{tmp_path}/asked; exit {code}')
    stub(path, "scontrol", f'echo "$*" >>{tmp_path}/requeued')
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_PER_NODE": "h100:8", "SLURM_JOB_ID": "7"}
    environment = os.environ | slurm | {"PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "--workdir=w"], env=environment, timeout=20)
    assert done.returncode == code
    assert "--expect_devices=16 --workdir=w" in (tmp_path / "asked").read_text()
    left = tmp_path / "requeued"
    assert (left.read_text() if left.exists() else "") == requeued


# ---------------------------------------------------------------------------------------- tpu_pod.sh
GCLOUD = """
cd {0}; echo "$*" >>asked
case "$*" in
  *describe*state*) [[ -f there ]] && echo READY ;;
  *describe*) printf '10.0.0.1\\n10.0.0.2\\n' ;;
  *" create "*) [[ ! -f full ]] && touch there ;;
  *" delete "*) rm there ;;
  *" scp "*) tar tf "$5" >shipped ;;
  *mice_jax.train*) (($(grep -c mice_jax.train asked) > 1)) || exit 75 ;;
esac
"""


@pytest.mark.parametrize("there", [False, True])
def test_tpu_pod_sh_reruns_after_75_and_deletes_only_what_it_created(tmp_path: Path, there: bool) -> None:
    path = stub(tmp_path / "bin", "gcloud", GCLOUD.format(tmp_path))
    if there:
        (tmp_path / "there").touch()
    command = [LAUNCH / "tpu_pod.sh", "--name=n", "--zone=z", "--type=v5p-16", "--version=v", "--", "--config=c"]
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    assert subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=30).returncode == 0
    asked = (tmp_path / "asked").read_text()
    assert asked.count(" create ") == asked.count(" delete ") == (not there)
    assert asked.count("mice_jax.train --expect_devices=8 ") == 2 and "--num_processes=2" in asked


def test_tpu_pod_sh_ships_the_checkout_with_uncommitted_changes(tmp_path: Path) -> None:
    """A config that is not committed yet is what a run is often started with."""
    path = stub(tmp_path / "bin", "gcloud", GCLOUD.format(tmp_path))
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("kept.py", "gone.py", "new.py", "ignored.log"):
        (checkout / name).write_text("")
    (checkout / ".gitignore").write_text("*.log\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "kept.py", "gone.py", ".gitignore"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=checkout, check=True)
    (checkout / "gone.py").unlink()
    command = [LAUNCH / "tpu_pod.sh", "--name=n", "--zone=z", "--type=v5p-16", "--version=v", "--autocheckpoint"]
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run([*command, "--", "--config=c"], cwd=checkout, env=environment, timeout=30)
    assert done.returncode == 0
    assert sorted((tmp_path / "shipped").read_text().split()) == [".gitignore", "kept.py", "new.py"]
    asked = (tmp_path / "asked").read_text()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    assert f"MICE_JAX_COMMIT={commit}\\ and\\ changes " in asked
    assert re.search(r" create .*--autocheckpoint-enabled", asked)


def test_tpu_pod_sh_without_capacity_is_an_error(tmp_path: Path) -> None:
    path = stub(tmp_path / "bin", "gcloud", GCLOUD.format(tmp_path))
    (tmp_path / "full").touch()
    command = [LAUNCH / "tpu_pod.sh", "--name=n", "--zone=z", "--type=v4-8", "--version=v"]
    environment = os.environ | {"PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=30, capture_output=True, text=True)
    assert done.returncode == 2 and "could not create v4-8" in done.stderr


# ---------------------------------------------------------------------------------------- manifests
def check_command(words: list[str], processes: int, devices: int, port: int) -> None:
    """That train has every flag, and that they agree with what is asked of the cluster."""
    values = flags.FlagValues()
    define_train(values, ["mice"])
    assert "mice_jax.train" in words
    given = dict(w[2:].split("=", 1) for w in words if w.startswith("--"))
    assert given.keys() <= set(values), given.keys() - set(values)
    assert int(given["expect_devices"]) == devices
    assert given["coordinator_address"].endswith(f":{port}")
    assert given["num_processes"] in (str(processes), "$SKYPILOT_NUM_NODES")


def check_jobset(manifest: Any) -> None:
    spec = manifest["spec"]
    (job,) = spec["replicatedJobs"]
    indexed = job["template"]["spec"]
    (container,) = indexed["template"]["spec"]["containers"]
    count = indexed["completions"]
    assert indexed["parallelism"] == count and indexed["completionMode"] == "Indexed"
    (port,) = container["ports"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    check_command(container["command"] + container["args"], count, count * gpus, port["containerPort"])
    lead = f"{manifest['metadata']['name']}-{job['name']}-0-0.{spec['network']['subdomain']}"
    assert f"--coordinator_address={lead}:{port['containerPort']}" in container["args"]
    (rule,) = indexed["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2, 3]  # 75 is not among them
    assert rule["onExitCodes"]["containerName"] == container["name"] and indexed["backoffLimit"] == 0
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet" and spec["failurePolicy"]["maxRestarts"] > 0
    assert indexed["template"]["spec"]["restartPolicy"] == "Never"


def check_sky(manifest: Any) -> None:
    words = shlex.split(manifest["run"])
    gpus = int(manifest["resources"]["accelerators"].split(":")[1])
    check_command(words, manifest["num_nodes"], manifest["num_nodes"] * gpus, 8476)
    assert manifest["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


MANIFESTS = {"k8s/jobset.yaml": check_jobset, "sky.yaml": check_sky}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_agrees_with_the_flags_of_train(name: str) -> None:
    MANIFESTS[name](yaml.safe_load((LAUNCH / name).read_text()))


@pytest.mark.parametrize(
    ("name", "was", "becomes"),
    [
        ("k8s/jobset.yaml", "containerPort: 8476", "containerPort: 8477"),
        ("k8s/jobset.yaml", "nvidia.com/gpu: 8", "nvidia.com/gpu: 4"),
        ("k8s/jobset.yaml", "--workdir", "--work_dir"),
        ("k8s/jobset.yaml", "values: [2, 3]", "values: [2, 75]"),
        ("k8s/jobset.yaml", "subdomain: mice-jax", "subdomain: mice"),
        ("sky.yaml", ":8476", ":8477"),
        ("sky.yaml", "num_nodes: 2", "num_nodes: 3"),
        ("sky.yaml", "mice_jax.train", "mice_jax.trian"),
    ],
)
def test_an_inconsistent_manifest_is_found(name: str, was: str, becomes: str) -> None:
    text = (LAUNCH / name).read_text()
    assert was in text
    with pytest.raises(AssertionError):
        MANIFESTS[name](yaml.safe_load(text.replace(was, becomes)))
