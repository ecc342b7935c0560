"""A run whose workdir is in a bucket: one writer at a time, whole lines only, and the same run as on disk."""

import json
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import bucket
from mice_jax import lock
from mice_jax.errors import UserError
from mice_jax.places import find_place
from mice_jax.workdir import Workdir
from runs import (
    arrays,
    read_metrics,
    run_export,
    run_train,
    setting,
    start_train,
    timeless,
)


@pytest.fixture(scope="module")
def store() -> Iterator[bucket.Bucket]:
    with bucket.serve() as served, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment(served).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon", "use_listings_cache": False})
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
def test_a_second_writer_is_refused_as_soon_as_the_first_is_seen_to_live(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.2)
    monkeypatch.setattr(lock, "LOOK_S", 0.1)
    monkeypatch.setattr(lock, "_was_here", lambda holder: False)  # as if on two machines
    with Workdir(find_place(name)) as first:
        first.lock()
        began = time.monotonic()
        with pytest.raises(UserError, match=f"another live process .process {os.getpid()} on "):
            Workdir(find_place(name)).lock()
        assert time.monotonic() - began < 10
    with Workdir(find_place(name)) as second:  # the control: given back, it can be taken
        second.lock()


def test_the_lock_of_a_dead_writer_of_this_machine_is_taken_at_once(store: bucket.Bucket, name: str) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    holder = {"process": process.pid, "host": socket.gethostname(), "machine": uuid.getnode(), "id": "x"}
    store.put(json.dumps(holder).encode(), {"name": key_of(name, "lock")})
    said: list[str] = []
    began = time.monotonic()
    with Workdir(find_place(name)) as run:
        run.lock(said.append)
    assert time.monotonic() - began < 10 and f"process {process.pid} on " in said[0]


def test_the_lock_of_a_silent_writer_elsewhere_is_taken_after_a_while(
    store: bucket.Bucket, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "DEAD_S", 1.5)
    monkeypatch.setattr(lock, "LOOK_S", 0.1)
    holder = {"process": 1, "host": "elsewhere", "machine": 1, "id": "x"}
    store.put(json.dumps(holder).encode(), {"name": key_of(name, "lock")})
    said: list[str] = []
    began = time.monotonic()
    with Workdir(find_place(name)) as run:
        run.lock(said.append)
    assert time.monotonic() - began > 1.5
    assert "held by process 1 on elsewhere; watching" in said[0] and "is taken" in said[1]


def test_a_writer_whose_lock_was_taken_writes_no_more(
    store: bucket.Bucket, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    with pytest.raises(UserError, match="has been taken by another process"), Workdir(find_place(name)) as run:
        run.lock()
        run.write_json("mine.json", 1)
        run.publish()
        other = {"process": 1, "host": "elsewhere", "id": "x"}
        store.put(json.dumps(other).encode(), {"name": key_of(name, "lock")})
        time.sleep(1)
        run.write_json("mine.json", 2)
        run.publish()
    assert text_of(store, name, "mine.json") == "1\n"
    assert json.loads(text_of(store, name, "lock"))["id"] == "x"  # nor does it take the other's away


# ---------------------------------------------------------------------------------------- files
def test_what_is_written_is_there_once_published_and_the_next_writer_has_it(store: bucket.Bucket, name: str) -> None:
    with Workdir(find_place(name)) as run:
        run.lock()
        run.write_json("config.json", {"seed": 1})
        (run.local / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, 5)))
        assert not any(key.startswith(key_of(name, "config")) for key in store.objects)  # not yet
        run.publish()
        assert json.loads(text_of(store, name, "config.json")) == {"seed": 1}
        written = store.objects[key_of(name, "config.json")].generation
        run.publish()
        assert store.objects[key_of(name, "config.json")].generation == written  # it has not changed
        run.write_json("config.json", {"seed": 2})
        run.publish(after_s=3600)  # tried just now
        assert json.loads(text_of(store, name, "config.json")) == {"seed": 1}
    with Workdir(find_place(name)) as run:
        run.lock()
        assert run.read_json("config.json") == {"seed": 2}  # put there at the end
        run.cut_metrics(2)
    assert text_of(store, name, "metrics.jsonl") == '{"step": 1}\n{"step": 2}\n'
    assert key_of(name, "lock") not in store.objects


def test_other_stores_are_refused() -> None:
    with pytest.raises(UserError, match="a s3:// store: a run's folder can be on disk or in a gs:// bucket"):
        find_place("s3://bucket/run")


# ---------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("in"), "c.checkpoint.every_samples = 16\nc.checkpoint.keep_last = 2")


def downloaded(store: bucket.Bucket, place: str, folder: Path) -> Path:
    """The run as it would lie on disk."""
    prefix = key_of(place, "")
    for key, stored in store.objects.items():
        if key.startswith(prefix) and not key.endswith("/"):
            file = folder / key.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(stored.content)
    return folder


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_goes_on_and_ends_as_one_on_disk(
    config: Path, store: bucket.Bucket, name: str, tmp_path: Path
) -> None:
    """Its newest checkpoint is damaged besides: it is set aside, and the run goes on from the one before."""
    assert run_train(config, tmp_path / "disk") == 0
    process = start_train(config, name, **bucket.environment(store))  # type: ignore[arg-type]
    try:
        while key_of(name, "checkpoints/4/manifest.json") not in store.objects:
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert key_of(name, "lock") in store.objects  # a dead writer's
    store.put(b"{", {"name": key_of(name, "checkpoints/4/params/_METADATA")})
    process = start_train(config, name, **bucket.environment(store))  # type: ignore[arg-type]
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    assert "the checkpoint of step 4 is damaged" in said and "resumed after step 2" in said, said
    run = downloaded(store, name, tmp_path / "run")
    assert timeless(read_metrics(run)) == timeless(read_metrics(tmp_path / "disk"))
    assert (run / "checkpoints" / "damaged" / "4" / "manifest.json").exists()
    assert list((run / "tensorboard").iterdir()) and not (run / "lock").exists()
    left, right = arrays(run, 5), arrays(tmp_path / "disk", 5)
    assert all(left[k].tobytes() == right[k].tobytes() for k in right) and left.keys() == right.keys()
    # Read from the bucket it is the model that it is on disk.
    assert run_export(find_place(name), tmp_path / "there") == 0  # type: ignore[arg-type]
    assert run_export(tmp_path / "disk", tmp_path / "here") == 0
    files = [folder / "model.safetensors" for folder in (tmp_path / "there", tmp_path / "here")]
    assert files[0].read_bytes() == files[1].read_bytes()
