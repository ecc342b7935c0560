"""The mesh, and the placement of parameters and batches on it."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from helpers.models import mesh_of, spec_of
from mice_jax import sharding
from mice_jax.errors import UserError
from mice_jax.models.transformer import make_decoder

pytestmark = pytest.mark.smoke


# ---------------------------------------------------------------------------------------- mesh
@pytest.mark.parametrize(
    ("sizes", "made"),  # of data, fsdp, tensor, sequence
    [
        ((1, -1, 1, 1), (1, 8, 1, 1)),
        ((-1, 1, 1, 1), (8, 1, 1, 1)),
        ((2, 2, -1, 1), (2, 2, 2, 1)),
        ((1, 4, 2, 1), (1, 4, 2, 1)),
        ((2, 4, -1, 1), (2, 4, 1, 1)),
        ((1, -1, 1, 4), (1, 2, 1, 4)),
        ((1, 2, 2, -1), (1, 2, 2, 2)),
    ],
)
def test_a_mesh_size_of_minus_one_takes_the_remaining_devices(
    sizes: tuple[int, int, int, int], made: tuple[int, int, int, int]
) -> None:
    mesh = sharding.make_mesh(*sizes[:3], sequence=sizes[3])
    assert tuple(mesh.shape) == ("data", "fsdp", "sequence", "tensor")
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor", "sequence")) == made
    assert set(mesh.devices.flat) == set(jax.devices())
    assert sharding.num_shards(mesh) == made[0] * made[1]


@pytest.mark.parametrize("sizes", [(1, 4, 1), (3, -1, 1), (1, 16, 1), (1, -1, 16), (2, 8, 1)])
def test_sizes_that_do_not_multiply_to_the_devices_are_an_error(
    sizes: tuple[int, int, int],
) -> None:
    data, fsdp, tensor = sizes
    with pytest.raises(UserError) as e:
        sharding.make_mesh(*sizes)
    assert f"mesh.data={data} x mesh.fsdp={fsdp} x mesh.tensor={tensor}" in str(e.value)
    assert "the number of devices, 8" in str(e.value)
    assert "-1" in str(e.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the layout of a mesh reads of a TPU."""

    id: int
    coords: tuple[int, ...]
    device_kind: str = "TPU v5"
    platform: str = "tpu"
    process_index: int = 0
    core_on_chip: int = 0


@pytest.mark.parametrize(
    ("torus", "sizes", "splits"),  # of data, fsdp, sequence, tensor; whether an axis is no product of sides
    [
        ((2, 2, 2), (1, 8, 1, 1), False),
        ((2, 2, 2), (1, 4, 1, 2), False),
        ((4, 4, 4), (1, 32, 1, 2), True),
        ((4, 4, 4), (2, 16, 2, 1), True),
        ((4, 4, 8), (2, 8, 2, 4), True),
    ],
)
def test_axes_that_are_no_sides_of_a_torus_split_it(
    torus: tuple[int, ...], sizes: tuple[int, ...], splits: bool
) -> None:
    chips = [Chip(i, coords) for i, coords in enumerate(np.ndindex(*torus))]
    if splits:
        with pytest.raises(NotImplementedError):
            jax.make_mesh(sizes, sharding.AXES, devices=chips)
    data, fsdp, sequence, tensor = sizes
    mesh = sharding.make_mesh(data, fsdp, tensor, chips, sequence=sequence)
    assert tuple(mesh.shape.items()) == tuple(zip(sharding.AXES, sizes, strict=True))
    assert sorted(chip.id for chip in mesh.devices.flat) == [*range(len(chips))]
    coords = np.array([[chip.coords for chip in group] for group in mesh.devices.reshape(-1, sizes[-1])])
    apart = np.abs(np.diff(coords, axis=1)).sum(-1)
    assert (apart == 1).all()  # the chips of a tensor group are neighbours, in a line


# ---------------------------------------------------------------------------------------- parameters
def test_param_spec_follows_the_rules_and_replicates_undivided_dims() -> None:
    mesh = sharding.make_mesh(1, 4, 2)

    def spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
        return sharding.param_spec(shape, axes, mesh)

    assert spec((3, 32, 4, 12), "layers", "embed", "heads", "head_dim") == PartitionSpec(None, "fsdp", "tensor", None)
    assert spec((3, 32, 3, 12), "layers", "embed", "kv_heads", "head_dim") == PartitionSpec(None, "fsdp", None, None)
    assert spec((3, 32, 5, 12), "layers", "embed", "heads", "head_dim") == PartitionSpec(None, "fsdp", None, "tensor")
    assert spec((3, 32, 5, 13), "layers", "embed", "heads", "head_dim") == PartitionSpec(None, "fsdp", None, None)
    assert spec((128, 30), "vocab", "embed") == PartitionSpec("tensor", None)
    assert spec((8, 24, 32), "batch", "length", "hidden") == PartitionSpec(("data", "fsdp"), "sequence", None)
    assert spec((6, 24), "batch", None) == PartitionSpec(None, None)


def test_replicated_dims_names_each_replicated_dim_and_no_other() -> None:
    decoder = make_decoder(
        spec_of(d_model=36, num_heads=6, num_kv_heads=3, mlp_bias=False, qkv_bias=False, out_bias=False)
    )

    def replicated(*sizes: int) -> set[str]:
        return set(sharding.replicated_dims(decoder.abstract, decoder.axes, mesh_of(*sizes)))

    assert replicated(1, 4, 2) == {"layers.attention.k kv_heads=3", "layers.attention.v kv_heads=3"}
    # Nor does 4 divide the query heads, but they are split within.
    assert replicated(1, 1, 4) == {"layers.attention.k kv_heads=3", "layers.attention.v kv_heads=3"}
    # 8 does not divide 36, which every parameter has.
    over_eight = replicated(1, 8, 1)
    assert over_eight == {
        f"{name} embed=36"
        for name in (
            "embed.table", "final_norm.scale", "head.weight", "layers.attention_norm.scale", "layers.mlp_norm.scale",
            "layers.attention.q", "layers.attention.k", "layers.attention.v", "layers.attention.o",
            "layers.mlp.gate", "layers.mlp.up", "layers.mlp.down",
        )
    }  # fmt: skip
    assert replicated(1, 1, 1) == replicated(8, 1, 1) == set()  # nothing is to be split there


def test_dims_that_are_not_replicated_are_split() -> None:
    decoder, mesh = make_decoder(spec_of()), mesh_of(1, 4, 2)
    assert sharding.replicated_dims(decoder.abstract, decoder.axes, mesh) == []
    shardings = sharding.param_shardings(decoder.abstract, decoder.axes, mesh)
    table = jax.device_put(np.zeros(decoder.abstract["embed"]["table"].shape, np.float32), shardings["embed"]["table"])
    assert {s.data.shape for s in table.addressable_shards} == {(64, 8)}
    assert shardings["layers"]["attention"]["q"].shard_shape((2, 4, 12, 32)) == (2, 2, 12, 8)


# ---------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2), (4, 1, 2)])
def test_each_device_holds_the_rows_of_its_shard(sizes: tuple[int, int, int]) -> None:
    mesh = mesh_of(*sizes)
    shards = sizes[0] * sizes[1]
    assert sharding.local_shards(mesh) == tuple(range(shards))  # one process has them all
    rows = np.arange(shards * 3 * 5, dtype=np.int32).reshape(shards * 3, 5)
    put = sharding.put_rows({"tokens": rows, "loss_weights": rows.astype(np.float32)}, mesh)
    assert {name: x.dtype for name, x in put.items()} == {"tokens": np.int32, "loss_weights": np.float32}
    by_device = {s.device: np.asarray(s.data) for s in put["tokens"].addressable_shards}
    for (data, fsdp, _, _), device in np.ndenumerate(mesh.devices):
        shard = data * sizes[1] + fsdp
        assert np.array_equal(by_device[device], rows[shard * 3 : shard * 3 + 3])
    assert np.array_equal(put["tokens"], rows)


def test_each_device_holds_its_part_of_every_row() -> None:
    mesh = sharding.make_mesh(1, 2, 2, sequence=2)
    rows = np.arange(4 * 6, dtype=np.int32).reshape(4, 6)
    put = sharding.put_rows({"tokens": rows}, mesh)["tokens"]
    whole = sharding.put_rows({"tokens": rows}, mesh, whole=True)["tokens"]
    by_device = [{s.device: np.asarray(s.data) for s in x.addressable_shards} for x in (put, whole)]
    for (_, fsdp, sequence, _), device in np.ndenumerate(mesh.devices):
        own = rows[2 * fsdp : 2 * fsdp + 2]
        assert np.array_equal(by_device[0][device], own[:, 3 * sequence : 3 * sequence + 3])
        assert np.array_equal(by_device[1][device], own)


def test_a_process_puts_the_rows_of_its_own_shards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had shards 2 and 3 of four: the callback is asked for those blocks, by their global place."""
    mesh = mesh_of(1, 4, 1)
    rows = np.arange(4 * 5, dtype=np.int32).reshape(4, 5)  # two rows a shard
    blocks: dict[int, np.ndarray] = {}

    def ask(shape, sharding_, callback):
        assert shape == (8, 5)
        for start in (4, 6):
            blocks[start] = callback((slice(start, start + 2), slice(None)))

    monkeypatch.setattr(sharding, "local_shards", lambda mesh: (2, 3))
    monkeypatch.setattr(jax, "make_array_from_callback", ask)
    sharding.put_rows({"tokens": rows}, mesh)
    assert np.array_equal(blocks[4], rows[:2])
    assert np.array_equal(blocks[6], rows[2:])


def test_local_shards_are_those_with_a_device_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, i: int):
            self.process_index = i // 4  # two processes of four devices

    class FakeMesh:
        def __init__(self, *sizes: int):
            self.shape = dict(zip(sharding.AXES, (*sizes[:2], 1, sizes[2]), strict=True))
            self.devices = np.array([Device(i) for i in range(8)]).reshape(sizes)

    def shards_of(process: int, *sizes: int) -> tuple[int, ...]:
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return sharding.local_shards(FakeMesh(*sizes))

    assert shards_of(0, 1, 8, 1) == (0, 1, 2, 3)
    assert shards_of(1, 1, 8, 1) == (4, 5, 6, 7)
    assert shards_of(1, 2, 2, 2) == (2, 3)
    # A tensor axis over both processes: both hold the rows.
    assert shards_of(0, 1, 1, 8) == shards_of(1, 1, 1, 8) == (0,)


def test_constrain_acts_only_inside_a_mesh() -> None:
    x = np.zeros((8, 4), np.float32)
    assert sharding.constrain(x, "batch", "hidden") is x
    with jax.set_mesh(mesh_of(1, 8, 1)):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "hidden"))(x)
    assert y.sharding.spec[0] in (("data", "fsdp"), "fsdp")
