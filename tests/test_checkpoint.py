"""Retention of checkpoints, and what happens if one is damaged or the disk is full."""

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mice_jax import checkpoint
from mice_jax.checkpoint import CheckpointReader, Checkpoints, differ_in_padding
from mice_jax.config import Checkpoint
from mice_jax.errors import AgreedError, StoreError, UserError
from mice_jax.step import TrainState
from mice_jax.storage.manifest import MANIFEST, verify
from mice_jax.storage.retention import checkpoints_to_keep, rank_by_score

pytestmark = pytest.mark.smoke


# ---------------------------------------------------------------------------------------- retention
def saved_steps(*scores: float | None, samples: int = 8) -> dict[int, dict[str, float]]:
    """Steps 1, 2, ... of this many samples each."""
    return {
        i: {"samples": i * samples} | ({} if score is None else {"score": score}) for i, score in enumerate(scores, 1)
    }


def keep(saved: dict[int, dict[str, float]], mode: str = "min", **rules: int) -> list[int]:
    policy = {"keep_last": 0, "keep_best": 0, "keep_every": 0} | rules
    return sorted(checkpoints_to_keep(saved, mode=mode, **policy))


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"keep_last": 2}, [4, 5]),
        ({"keep_best": 1}, [2, 5]),  # of two equal scores the earlier step, and always the newest
        ({"keep_best": 2}, [2, 4, 5]),
        ({"keep_best": 1, "mode": "max"}, [5]),
        ({"keep_best": 2, "mode": "max"}, [1, 5]),
        ({"keep_every": 16}, [2, 4, 5]),
        ({"keep_every": 24}, [3, 5]),
        ({"keep_last": 1, "keep_best": 1, "keep_every": 24}, [2, 3, 5]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5]),
        ({"keep_last": 1, "also": (1, 77)}, [1, 5]),
    ],
)
def test_kept_checkpoints_are_those_of_the_rules(rules: dict, kept: list[int]) -> None:
    assert keep(saved_steps(3.0, 1.0, 2.0, 1.0, 5.0), **rules) == kept


def test_a_missing_or_nan_score_is_never_the_best() -> None:
    saved = saved_steps(float("nan"), None, 4.0, float("inf"), None)
    assert rank_by_score(saved, "min") == rank_by_score(saved, "max") == [3]
    assert keep(saved, keep_best=3) == [3, 5]
    assert rank_by_score({}, "min") == []


# ---------------------------------------------------------------------------------------- damage
def make_state(step: int, width: int = 8, vocab: int = 128) -> TrainState:
    """A state whose numbers depend on the step."""
    embed, up = jnp.full((vocab, width), step, jnp.float32), jnp.full((2, width), step * 0.5)
    params = {"embed": {"table": embed}, "layers": {"up": up}}
    return TrainState(jnp.asarray(step, jnp.int32), params, {"mu": jnp.full((width,), step * 2.0)})


def abstract_of(state: TrainState) -> TrainState:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)


ABSTRACT = abstract_of(make_state(0))


@contextlib.contextmanager
def opened(workdir: Path, policy: Checkpoint | None = None) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(workdir, policy)
    yield checkpoints
    checkpoints.close()


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with checkpoints of steps 9 and 10."""
    workdir = tmp_path_factory.mktemp("saved")
    with opened(workdir) as checkpoints:
        for step in (9, 10):
            checkpoints.save(make_state(step), {"samples": 8 * step})
        checkpoints.wait()
    return workdir


@pytest.fixture
def run(saved_run: Path, tmp_path: Path) -> Path:
    """A copy of that workdir, to be damaged."""
    shutil.copytree(saved_run, tmp_path / "run")
    return tmp_path / "run"


def assert_is_state(state: TrainState, step: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


def data_file(step: Path) -> Path:
    """The largest file of arrays."""
    return max((p for p in (step / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    file.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut arrays": lambda step: [os.truncate(f, f.stat().st_size // 2) for f in (step / "params").rglob("d/*")],
    "missing arrays": lambda step: data_file(step).unlink(),
    "flipped bit in arrays": lambda step: flip(data_file(step)),
    "flipped bit in orbax manifest": lambda step: flip(step / "opt_state" / "manifest.ocdbt"),
    "invalid metadata": lambda step: (step / "params" / "_METADATA").write_text("{"),
    "missing progress": lambda step: shutil.rmtree(step / "progress"),
    "invalid manifest": lambda step: (step / MANIFEST).write_text("[1, 2"),
}
NEEDS_MANIFEST = ("flipped bit in arrays", "invalid manifest")  # restoring alone does not notice these


@pytest.mark.parametrize(
    ("damage", "has_manifest"),
    [*((d, True) for d in DAMAGES), *((d, False) for d in DAMAGES if d not in NEEDS_MANIFEST)],
)
def test_a_damaged_newest_checkpoint_is_moved_and_the_one_before_restored(
    damage: str, has_manifest: bool, run: Path
) -> None:
    newest = run / "checkpoints" / "10"
    if not has_manifest:  # as a process leaves it that is killed between a save and its manifest
        (newest / MANIFEST).unlink()
    DAMAGES[damage](newest)
    messages: list[str] = []
    with opened(run) as checkpoints:
        restored = checkpoints.restore_newest(ABSTRACT, messages.append)
        assert restored is not None
        step, state, progress = restored
        assert (step, progress, checkpoints.steps()) == (9, {"samples": 72}, [9])
    assert_is_state(state, 9)
    quarantine = run / "checkpoints" / "damaged" / "10"
    assert quarantine.is_dir() and len(messages) == 1
    assert messages[0].startswith("the checkpoint of step 10 is damaged (") and str(quarantine) in messages[0]


def test_an_undamaged_newest_checkpoint_is_restored(run: Path) -> None:
    with opened(run) as checkpoints:
        restored = checkpoints.restore_newest(ABSTRACT, pytest.fail)
        assert restored is not None and checkpoints.last_committed_step() == 10
    assert (restored[0], restored[2]) == (10, {"samples": 80})
    assert_is_state(restored[1], 10)


def test_manifest_detects_a_flipped_bit_in_every_file(run: Path) -> None:
    step = run / "checkpoints" / "10"
    files = [p for p in step.rglob("*") if p.is_file() and p.name != MANIFEST and p.stat().st_size]
    assert len(files) > 5 and verify(step) is None
    assert {str(p.relative_to(step)) for p in files} <= json.loads((step / MANIFEST).read_text())["files"].keys()
    for file in files:
        before = file.read_bytes()
        flip(file)
        assert verify(step) == f"{file.relative_to(step)} has other bytes than were written"
        file.write_bytes(before)
    assert verify(step) is None


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(run: Path) -> None:
    for step in (run / "checkpoints").iterdir():
        flip(data_file(step))
    for _ in range(2):  # nor does it the second time
        with (
            opened(run) as checkpoints,
            pytest.raises(UserError, match=r"all checkpoints in .* are damaged: .*/10"),
        ):
            checkpoints.restore_newest(ABSTRACT, lambda text: None)
    assert len(list((run / "checkpoints" / "damaged").iterdir())) == 2


def test_a_new_run_has_nothing_to_restore(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT, pytest.fail) is None


def shaped(embed: tuple[int, ...] = (128, 8), up: tuple[int, ...] = (2, 8), **others: tuple[int, ...]) -> TrainState:
    shapes = {"embed": {"table": embed}, "layers": {"up": up} | others}
    params = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return abstract_of(dataclasses.replace(make_state(0), params=params))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (
            shaped(up=(2, 12)),
            r"layers\.up with the shape \[2, 8\], but .* layers\.up with the shape \[2, 12\]\. .* Undo",
        ),
        (shaped(up=(2, 8, 1)), r"layers\.up with the shape \[2, 8\], but .* with the shape \[2, 8, 1\]"),
        (shaped(embed=(128, 12)), r"embed\.table with the shape \[128, 8\], but .* \[128, 12\]"),
        (shaped(embed=(256, 8)), r"embed\.table with the shape \[128, 8\], but .* \[256, 8\]"),
        (shaped(down=(2, 8)), r"holds no layers\.down, but the model that is asked for has layers\.down with"),
        (
            dataclasses.replace(shaped(), params={"embed": shaped().params["embed"]}),
            r"holds layers\.up .* has no layers\.up",
        ),
    ],
    ids=["width", "dims", "width of the vocabulary", "vocabulary", "more", "fewer"],
)
def test_another_model_is_an_error_and_not_damage(asked: TrainState, text: str, run: Path) -> None:
    with opened(run) as checkpoints, pytest.raises(UserError, match=text):
        checkpoints.restore_newest(asked, pytest.fail)
    assert not (run / "checkpoints" / "damaged").exists()


@pytest.mark.parametrize(
    ("name", "a", "b", "may_be"),
    [
        ("embed.table", (49_280, 64), (49_536, 64), True),  # 49,155 for tensor axes of 1 and 3
        ("head.weight", (32_256, 64), (32_000, 64), True),  # 32,000 for tensor axes of 7 and 1
        (
            "embed.table",
            (32_000, 64),
            (32_768, 64),
            False,
        ),  # no axis of 128 or fewer needs so much padding
        ("embed.table", (49_280, 64), (49_536, 65), False),
        ("embed.table", (49_155, 64), (49_280, 64), False),
        ("own_embeddings.projection", (128, 64), (384, 64), False),
    ],
)
def test_only_padding_of_a_vocabulary_is_padding(name: str, a: tuple, b: tuple, may_be: bool) -> None:
    assert differ_in_padding(name, a, b) == differ_in_padding(name, b, a) == may_be


def test_a_vocabulary_is_padded_with_zeros(run: Path) -> None:
    with opened(run) as checkpoints:
        restored = checkpoints.restore_newest(shaped(embed=(384, 8)), pytest.fail)
    assert restored is not None
    embed = np.asarray(restored[1].params["embed"]["table"])
    np.testing.assert_array_equal(embed, np.pad(np.full((128, 8), 10.0), ((0, 256), (0, 0))))


@pytest.mark.parametrize("damage", ["cut arrays", "missing arrays", "invalid metadata"])
def test_a_reader_of_a_damaged_checkpoint_names_the_other_steps(damage: str, run: Path) -> None:
    DAMAGES[damage](run / "checkpoints" / "10")
    reader = CheckpointReader(run)
    said = r" is missing| has [\d,]+ bytes, not [\d,]+| has other bytes than were written"
    with pytest.raises(UserError, match=rf"checkpoints/10 cannot be read \([^)]*({said})\)\. .* \(there are 9\)"):
        reader.restore_params(10, ABSTRACT.params)
    with pytest.raises(UserError, match=r"checkpoints/10 cannot be read .* another step \(there are 9\)"):
        reader.restore(10, ABSTRACT)
    reader.close()


def test_a_reader_compares_with_the_manifest_what_it_reads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orbax itself may read changed bytes without an error."""
    reader = CheckpointReader(run)
    monkeypatch.setattr(reader, "_restore_params", lambda *_: "read")
    monkeypatch.setattr(reader, "_restore", lambda *_: "read")
    flip(next((run / "checkpoints" / "10" / "opt_state").rglob("d/*")))
    assert reader.restore_params(10, ABSTRACT.params) == "read", "that file is of no parameter"
    with pytest.raises(
        UserError, match=r"checkpoints/10 cannot be read \(opt_state\S+ has other bytes than were written"
    ):
        reader.restore(10, ABSTRACT)
    flip(data_file(run / "checkpoints" / "10"))
    with pytest.raises(UserError, match=r"checkpoints/10 cannot be read \(params\S+ has other bytes than were written"):
        reader.restore_params(10, ABSTRACT.params)
    reader.close()


def test_a_reader_names_what_a_checkpoint_lacks(run: Path) -> None:
    step = run / "checkpoints" / "10"
    reader = CheckpointReader(run)
    with pytest.raises(UserError, match=r"checkpoints/10 holds no average of the weights"):
        reader.restore_params(10, ABSTRACT.params, "average")
    (step / "average").mkdir()  # the average is there, but its files are lost
    with pytest.raises(UserError, match=r"checkpoints/10 cannot be read"):
        reader.restore_params(10, ABSTRACT.params, "average")
    DAMAGES["missing progress"](step)
    with pytest.raises(UserError, match=r"checkpoints/10 cannot be read"):
        reader.samples(10)
    reader.close()


def test_a_reader_resolves_steps_and_changes_nothing(run: Path) -> None:
    before = sorted(run.rglob("*"))
    reader = CheckpointReader(run)
    assert (reader.resolve_step(None), reader.resolve_step(9), reader.samples(9)) == (10, 9, 72)
    with pytest.raises(UserError, match="has no step 7; it has 9, 10"):
        reader.resolve_step(7)
    jax.tree.map(np.testing.assert_array_equal, reader.restore_params(9, ABSTRACT.params), make_state(9).params)
    reader.close()
    assert sorted(run.rglob("*")) == before


def test_the_best_step_survives_a_resume(tmp_path: Path) -> None:
    policy = Checkpoint(keep_last=1, keep_best=1)
    with opened(tmp_path, policy) as checkpoints:
        for step, score in ((1, 3.0), (2, 1.0), (3, 2.0)):
            checkpoints.save(make_state(step), {"samples": 8 * step}, score)
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step(range(1, 4))) == ([2, 3], 2)
    with opened(tmp_path, policy) as checkpoints:
        assert checkpoints.restore_newest(ABSTRACT, pytest.fail) is not None
        checkpoints.save(make_state(4), {"samples": 32})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step(range(1, 4))) == ([2, 4], 2)


# ---------------------------------------------------------------------------------------- a full disk
def test_a_full_disk_is_reported_and_saving_works_once_there_is_room(run: Path) -> None:
    """A limit on the size of files stands for the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).random((10, 1 << 14), np.float32)  # 655 kB, which do not compress
    large = dataclasses.replace(make_state(11), params={"embed": {"table": jnp.asarray(noise)}})
    with opened(run) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            with pytest.raises(UserError, match=r"no space for it \(.* bytes free\)\. The earlier") as e:
                checkpoints.save(large, {"samples": 88})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert f"could not be written to {run / 'checkpoints'}" in str(e.value)
    with opened(run) as checkpoints:
        restored = checkpoints.restore_newest(ABSTRACT, pytest.fail)
        assert restored is not None and restored[0] == 10
        checkpoints.save(make_state(11), {"samples": 88})
        checkpoints.wait()
        assert checkpoints.steps() == [9, 10, 11]


# ---------------------------------------------------------------------------------------- several processes
@pytest.mark.parametrize(
    ("own", "in_store", "raised"),
    [
        (None, False, AgreedError("a checkpoint could not be written; another process prints the reason.")),
        (None, True, StoreError("a checkpoint could not be written; another process prints the reason.")),
        (UserError("a reason"), False, AgreedError("a reason")),
        (StoreError("no answer"), True, StoreError("no answer")),
        (KeyError("a bug"), False, KeyError("a bug")),
    ],
)
def test_processes_agree_on_whether_a_failed_save_can_be_resumed(
    own: Exception | None, in_store: bool, raised: Exception, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only an unavailable store ends a run with "run the same command again"."""
    monkeypatch.setattr(checkpoint.distributed, "any_across_processes", lambda *flags: [True, in_store])
    with (
        opened(run) as checkpoints,
        pytest.raises(type(raised)) as e,
        checkpoints._raise_write_errors_on_all_processes(),
    ):
        if own is not None:
            raise own
    assert (type(e.value), str(e.value)) == (type(raised), str(raised))


@pytest.mark.parametrize("in_bucket", [False, True])
@pytest.mark.parametrize("kind", [ValueError, jax.errors.JaxRuntimeError])
def test_the_error_of_a_lost_peer_is_raised_at_once(
    kind: type[Exception], in_bucket: bool, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lost process would not join a collective."""
    lost = kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    with opened(run) as checkpoints, monkeypatch.context() as patch, pytest.raises(kind) as e:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(checkpoint, "is_remote", lambda folder: in_bucket)
        patch.setattr(checkpoint.distributed, "any_across_processes", lambda *flags: pytest.fail("a collective"))
        with checkpoints._raise_write_errors_on_all_processes():
            raise lost
    assert e.value is lost


@pytest.mark.parametrize(
    ("reads", "call"),
    [
        ("_restore", lambda checkpoints: checkpoints._try_restore(1, ABSTRACT)),
        ("_restore_params", lambda checkpoints: checkpoints.restore_params(10, ABSTRACT.params)),
    ],
)
def test_a_process_lost_while_a_checkpoint_is_read_is_no_damage(
    reads: str, call: Callable[[Checkpoints], object], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_a_process(*_: object) -> None:
        raise lost

    lost = ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    with opened(run) as checkpoints, monkeypatch.context() as patch, pytest.raises(ValueError, match="Gloo") as e:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(checkpoints, "_verify", lambda *_: None)  # every process has found it undamaged
        patch.setattr(checkpoints, reads, lose_a_process)
        patch.setattr(checkpoint.distributed, "is_true_on_any_process", lambda flag: pytest.fail("a collective"))
        call(checkpoints)
    assert e.value is lost
