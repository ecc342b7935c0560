"""Workdirs in a bucket: the lock, uploads of small files, and runs that equal those on disk."""

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import orbax.checkpoint as ocp
import pytest
from etils import epath

from helpers import bucket
from helpers.runs import (
    arrays,
    read_metrics,
    run_export,
    run_train,
    setting,
    timeless,
)
from mice_jax.checkpoint import Checkpoints
from mice_jax.errors import StoreError, UserError
from mice_jax.storage import lock, paths, workdir
from mice_jax.storage.paths import parse_path
from mice_jax.storage.workdir import Workdir
from mice_jax.training import writers


@pytest.fixture(scope="module")
def store() -> Iterator[bucket.Bucket]:
    with bucket.serve() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment(served).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf["gs"], "token", "anon")  # in addition to what paths.py has set
        yield served
        fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.fixture
def name(store: bucket.Bucket) -> str:
    return f"gs://{bucket.NAME}/{uuid.uuid4().hex}"


def key_of(place: str, file: str) -> str:
    return f"{place.removeprefix(f'gs://{bucket.NAME}/')}/{file}"


def text_of(store: bucket.Bucket, place: str, file: str) -> str:
    return store.objects[key_of(place, file)].content.decode()


# ---------------------------------------------------------------------------------------- one writer
def test_a_second_writer_is_an_error_once_the_first_shows_a_heartbeat(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(lock, "POLL_S", 0.1)
    monkeypatch.setattr(lock, "_ran_here_and_ended", lambda holder: False)  # as if on two machines
    with Workdir(parse_path(name)) as first:
        first.lock()
        began = time.monotonic()
        with pytest.raises(UserError, match=f"another live process .process {os.getpid()} on "):
            Workdir(parse_path(name)).lock()
        assert time.monotonic() - began < 10
    with Workdir(parse_path(name)) as second:  # the control: given back, it can be taken
        second.lock()


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_at_once(store: bucket.Bucket, name: str) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    holder = lock._this_process() | {"process": process.pid, "id": "x"}
    store.put(json.dumps(holder).encode(), {"name": key_of(name, "lock")})
    said: list[str] = []
    began = time.monotonic()
    with Workdir(parse_path(name)) as run:
        run.lock(said.append)
    assert time.monotonic() - began < 30 and len(said) == 1 and f"process {process.pid} on " in said[0]


@pytest.mark.parametrize("key", ["numbers", "boot", "machine", "host"])
def test_a_process_of_another_boot_or_namespace_is_not_assumed_dead(key: str) -> None:
    """In another container its number is another process's here, or nobody's."""
    process = subprocess.Popen(["true"])
    process.wait()
    gone = lock._this_process() | {"process": process.pid}
    assert lock._ran_here_and_ended(gone)
    assert not lock._ran_here_and_ended(gone | {key: "other"})
    del gone[key]  # written by something that does not tell
    assert not lock._ran_here_and_ended(gone)


def test_a_lock_that_another_process_took_meanwhile_is_not_removed(store: bucket.Bucket, name: str) -> None:
    """Between the look at a dead holder and the removal another process has taken the lock, and lives."""
    process = subprocess.Popen(["true"])
    process.wait()
    key = key_of(name, "lock")
    store.put(json.dumps(lock._this_process() | {"process": process.pid, "id": "dead"}).encode(), {"name": key})
    other = json.dumps(lock._this_process() | {"process": 1, "id": "other"}).encode()

    def overtake(text: str) -> None:
        if "taking over" in text:
            store.put(other, {"name": key})
        else:
            raise UserError("it watches the other")

    with pytest.raises(UserError, match="watches the other"):  # the second look
        lock.BucketLock(parse_path(name), overtake)  # type: ignore[arg-type]
    assert store.objects[key].content == other


def test_a_lock_without_heartbeats_from_elsewhere_is_taken_after_a_while(
    store: bucket.Bucket, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "DEAD_AFTER_S", 0.5)
    monkeypatch.setattr(lock, "POLL_S", 0.1)
    holder = {"process": 1, "host": "elsewhere", "machine": 1, "id": "x"}
    store.put(json.dumps(holder).encode(), {"name": key_of(name, "lock")})
    said: list[str] = []
    began = time.monotonic()
    with Workdir(parse_path(name)) as run:
        run.lock(said.append)
    assert time.monotonic() - began > 0.5
    assert "held by process 1 on elsewhere; watching it" in said[0] and "taking over" in said[1]


def test_a_writer_whose_lock_was_taken_writes_nothing_more(
    store: bucket.Bucket, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen at the next write, not at the next sign of life, which is seconds away."""
    with pytest.raises(UserError, match="has been taken by another process"), Workdir(parse_path(name)) as run:
        run.lock()
        run.write_json("mine.json", 1)
        run.sync()
        other = {"process": 1, "host": "elsewhere", "id": "x"}
        store.put(json.dumps(other).encode(), {"name": key_of(name, "lock")})
        run.write_json("mine.json", 2)
        run.sync()
    assert text_of(store, name, "mine.json") == "1\n"
    assert json.loads(text_of(store, name, "lock"))["id"] == "x"  # nor does it take the other's away


# ---------------------------------------------------------------------------------------- files
def test_synced_files_are_in_the_bucket_and_read_by_the_next_writer(store: bucket.Bucket, name: str) -> None:
    with Workdir(parse_path(name)) as run:
        run.lock()
        run.write_json("config.json", {"seed": 1})
        (run.local / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 5)))
        assert not any(key.startswith(key_of(name, "config")) for key in store.objects)  # not yet
        run.sync()
        assert json.loads(text_of(store, name, "config.json")) == {"seed": 1}
        written = store.objects[key_of(name, "config.json")].generation
        run.sync()
        assert store.objects[key_of(name, "config.json")].generation == written  # it has not changed
        run.write_json("config.json", {"seed": 2})
        run.sync(after_s=3600)  # tried just now
        assert json.loads(text_of(store, name, "config.json")) == {"seed": 1}
    with Workdir(parse_path(name)) as run:
        run.lock()
        assert run.read_json("config.json") == {"seed": 2}  # put there at the end
        run.truncate_metrics(2)
    assert text_of(store, name, "metrics.jsonl") == '{"step": 1}\n{"step": 2}\n'
    assert key_of(name, "lock") not in store.objects


def test_a_store_that_cannot_be_read_is_an_error_not_an_empty_folder(store: bucket.Bucket, name: str) -> None:
    """A run that was taken for a new one would be written over."""
    store.put(b"{}", {"name": key_of(name, "config.json")})
    place = parse_path(name)
    with refusing(store):
        with pytest.raises(StoreError, match=f"{name} cannot be read: Forbidden"):
            Workdir(place)
        with pytest.raises(StoreError, match=f"{name} cannot be reached: Forbidden"):
            parse_path(name)
        with pytest.raises(StoreError, match="could not be opened or written"):
            Checkpoints(place)
    assert Workdir(place).read_json("config.json") == {}  # the control


def test_only_the_new_part_of_a_grown_file_is_uploaded(
    store: bucket.Bucket, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "MIN_APPEND_BYTES", 100)
    with Workdir(parse_path(name)) as run:
        run.lock()
        (run.local / "wandb").mkdir()
        (run.local / "wandb" / "debug.log").write_text("its own")
        lines = run.local / "metrics.jsonl"
        lines.write_text('{"step": 1}\n' * 20)
        run.sync()
        for more in ('{"step": 2}\n', '{"step": 3}\n{"st'):  # the last is being written
            with lines.open("a") as f:
                f.write(more)
            sent = len(store.received)
            run.sync()
            beat = [s for s in store.received[sent:] if "lock." not in s[0]]
            assert beat == [(key_of(name, ".more"), 12)]
        whole = '{"step": 1}\n' * 20 + '{"step": 2}\n{"step": 3}\n'
        assert text_of(store, name, "metrics.jsonl") == whole
        lines.write_text(whole.replace("1", "4"))  # rewritten: all of it is sent
        run.sync()
        assert text_of(store, name, "metrics.jsonl") == whole.replace("1", "4")
        store.put(b"x", {"name": key_of(name, "metrics.jsonl")})  # changed there: the same
        lines.write_text(whole.replace("1", "4") + '{"step": 5}\n')
        run.sync()
        assert text_of(store, name, "metrics.jsonl") == lines.read_text()
    assert not any(key.startswith((key_of(name, "wandb"), key_of(name, ".more"))) for key in store.objects)


def test_a_sync_by_the_clock_runs_in_the_background_and_is_retried(store: bucket.Bucket, name: str) -> None:
    with Workdir(parse_path(name)) as run:
        run.lock()
        run.write_json("mine.json", 1)
        with store.one_at_a_time:  # it answers nothing for now
            began = time.monotonic()
            run.sync(after_s=1e-9)
            run.sync(after_s=1e-9)  # nor is a second begun
            assert time.monotonic() - began < 1
        with refusing(store):
            run.sync(after_s=1e-9)
        run.sync()
        assert text_of(store, name, "mine.json") == "1\n"


@contextlib.contextmanager
def refusing(store: bucket.Bucket, requests: int = 10**9) -> Iterator[None]:
    """A store that is down for so many requests."""
    store.refusing = requests
    try:
        yield
    finally:
        store.refusing = 0


def test_directory_listings_are_not_cached(store: bucket.Bucket, name: str) -> None:
    """What one process lists, another has changed: etils' file system keeps listings unless it is told otherwise."""
    place = epath.Path(name)
    store.put(b"", {"name": key_of(name, "checkpoints/1/commit_success.txt")})
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["1"]
    store.put(b"", {"name": key_of(name, "checkpoints/2/commit_success.txt")})
    store.delete(key_of(name, "checkpoints/1/commit_success.txt"), {})
    assert [p.name for p in (place / "checkpoints").iterdir()] == ["2"]
    assert not (place / "checkpoints" / "1").exists()


def test_a_workdir_in_another_kind_of_store_is_an_error() -> None:
    with pytest.raises(UserError, match="a s3:// store, but a workdir can be on disk or in a gs:// bucket"):
        parse_path("s3://bucket/run")


# ---------------------------------------------------------------------------------------- whole runs
# test_two_processes kills one, whose newest checkpoint is then damaged.
@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("in"), "c.checkpoint.every_samples = 16\nc.checkpoint.keep_last = 2")


@pytest.fixture(scope="module")
def run_on_disk(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir, on disk, of an undisturbed run."""
    folder = tmp_path_factory.mktemp("disk")
    assert run_train(config, folder) == 0
    return folder


def downloaded(store: bucket.Bucket, place: str, folder: Path) -> Path:
    return bucket.download(store, key_of(place, "").rstrip("/"), folder)


def steps_of(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())


# ---------------------------------------------------------------------------------------- a store that is down
@pytest.fixture
def at_line(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What calls a function once a run in this process has written its line of a step."""
    write = writers.JsonlWriter.write

    def at_line(step: int, then: Any) -> None:
        def written(self: writers.JsonlWriter, record: Any) -> None:
            write(self, record)
            if record["step"] == step:
                then()

        monkeypatch.setattr(writers.JsonlWriter, "write", written)

    return at_line


@pytest.mark.slow
def test_an_outage_at_a_save_is_retried_and_then_ends_the_run_with_75(
    config: Path,
    store: bucket.Bucket,
    name: str,
    at_line: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run_on_disk: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(workdir, "OUTAGE_S", 4.0)
    save, managers = ocp.CheckpointManager.save, []
    monkeypatch.setattr(
        ocp.CheckpointManager, "save", lambda self, *a, **k: managers.append(self) or save(self, *a, **k)
    )

    def go_down() -> None:
        while managers and managers[-1].is_saving_in_progress():
            time.sleep(0.01)
        store.refusing = 10**9

    place: Any = name
    at_line(1, go_down)
    assert run_train(config, place) == 2  # there is no checkpoint yet
    store.refusing = 0
    assert f"error: --workdir={name} cannot be" in capsys.readouterr().err
    at_line(3, go_down)
    assert run_train(config, place) == 75
    store.refusing = 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"preempted: --workdir={name} cannot be") and f"continue from {name}/checkpoints/2," in said
    at_line(4, lambda: setattr(store, "refusing", 2))  # a short one: the run goes on by itself
    assert run_train(config, place) == 0
    assert "resumed after step 2" in capsys.readouterr().out
    run = downloaded(store, name, tmp_path / "run")
    assert timeless(read_metrics(run)) == timeless(read_metrics(run_on_disk))
    assert steps_of(run) == steps_of(run_on_disk) == [4, 5]  # keep_last=2
    assert list((run / "tensorboard").iterdir()) and not (run / "lock").exists()
    left, right = arrays(run, 5), arrays(run_on_disk, 5)
    assert all(left[k].tobytes() == right[k].tobytes() for k in right) and left.keys() == right.keys()
    # Read from the bucket it is the model that it is on disk.
    assert run_export(parse_path(name), tmp_path / "there") == 0  # type: ignore[arg-type]
    assert run_export(run_on_disk, tmp_path / "here") == 0
    files = [folder / "model.safetensors" for folder in (tmp_path / "there", tmp_path / "here")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_run_that_has_lost_its_lock_deletes_and_commits_nothing(
    config: Path, store: bucket.Bucket, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is taken while a save goes on, after which an older checkpoint would be deleted."""
    wait, waited = ocp.CheckpointManager.wait_until_finished, []
    other = json.dumps({"process": 1, "host": "elsewhere", "id": "x"}).encode()

    def taken(self: ocp.CheckpointManager) -> None:
        wait(self)
        if self.latest_step() == 4 and not waited:
            waited.append(4)
            store.put(other, {"name": key_of(name, "lock")})

    monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", taken)
    place: Any = name
    assert run_train(config, place, "--config.checkpoint.keep_last=1") == 2
    assert "has been taken by another process (process 1 on elsewhere)" in capsys.readouterr().err
    there = {
        key.removeprefix(key_of(name, "checkpoints/")).split("/")[0]
        for key in store.objects
        if key.startswith(key_of(name, ""))
    }
    assert waited and {"2", "4"} <= there
    assert key_of(name, "checkpoints/4/manifest.json") not in store.objects
    assert store.objects[key_of(name, "lock")].content == other
