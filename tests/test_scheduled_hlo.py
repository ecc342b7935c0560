"""Reading a compiled program: FLOPs, collectives and what overlaps them, copies, host transfers; counted by hand."""

from pathlib import Path

import pytest

from mice_jax.planning import scheduled_hlo
from mice_jax.planning.scheduled_hlo import Array, Collective, Instruction, Program, parse_program

pytestmark = pytest.mark.smoke

DATA = Path(__file__).parent / "data"
TRIPS, CHUNKS = 3, 5  # of the loop over layers, as its condition says, and of the one that depends on data
PRODUCT = 2 * 16 * 64 * 32
SENT = 3 / 4 * 64 * 32  # entries that one of four devices sends of an array of 64 x 32, if devices form a ring


@pytest.fixture(scope="module")
def program() -> Program:
    return parse_program((DATA / "scheduled.hlo.txt").read_text())


def counted(program: Program, peak_flops: float = 1.0, link_rate: float = 1.0) -> scheduled_hlo.Counts:
    return scheduled_hlo.count(
        program,
        peak_flops=peak_flops,
        link_rate=link_rate,
        unknown_trips=CHUNKS,
        kernel_flops=lambda i, operands: 1000.0,
    )


def test_instruction_is_parsed_with_its_layouts_and_called_program(program: Program) -> None:
    assert program.entry == "main.1"
    start = program.find("layer", "call-start.2")
    assert start == Instruction(
        "call-start.2",
        "call-start",
        (Array("f32", (64, 32)), Array("f32", (16, 32))),
        ("gradient.2", "token.2"),
        ', async_execution_thread="sparsecore", to_apply=%on_sparse_core',
    )
    assert start is not None and start.called == "on_sparse_core"
    gather = program.find("layer", "all-gather.2")
    assert gather is not None and gather.op_name == "jit(f)/while/body/convert (first)"


def test_a_text_without_an_entry_computation_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_program("HloModule empty\n")


@pytest.mark.parametrize(("first", "trips"), [("0", TRIPS), ("1", TRIPS - 1)])
def test_rounds_taken_out_of_a_loop_are_not_counted_in_it(first: str, trips: int) -> None:
    text = (
        (DATA / "scheduled.hlo.txt")
        .read_text()
        .replace("%first.1 = s32[] constant(0)", f"%first.1 = s32[] constant({first})")
    )
    program = parse_program(text)
    loops = [i for i in program.computations[program.entry] if i.opcode == "while"]
    assert [scheduled_hlo.trip_count(program, program.entry, loop) for loop in loops] == [trips, None]


def test_products_are_counted_as_often_as_their_loops_run(program: Program) -> None:
    counts = counted(program)
    assert counts.flops == TRIPS * 2 * PRODUCT + CHUNKS * 2 * 4 * 2 * 8
    assert counts.kernel_flops == 1000


def test_collectives_have_their_kind_dtype_bytes_and_overlap(program: Program) -> None:
    found = counted(program).collectives
    path = "jit(f)/while/body/convert (first)"
    assert found == (
        Collective("all-gather", ("bf16",), 64 * 32 * 2, SENT * 2, TRIPS, True, False, 0.0, path),
        Collective("all-gather", ("bf16",), 64 * 32 * 2, SENT * 2, TRIPS, True, True, PRODUCT, ""),
        Collective("reduce-scatter", ("f32",), 64 * 32 * 4, SENT * 4, TRIPS, True, True, 0.0, ""),
        Collective("reduce-scatter", ("bf16",), 64 * 32 * 2, SENT * 2, 1, False, False, 0.0, ""),
        Collective("all-reduce", ("f32",), 48, 48.0, 1, False, False, 0.0, ""),
    )
    assert [c.overlaps for c in found] == [False, True, False, False, False]


def test_exposed_time_is_what_products_do_not_cover(program: Program) -> None:
    first, second, third = SENT * 2, SENT * 2, SENT * 4  # of the loop, in seconds at one byte a second
    after_loops = SENT * 2 + 48
    slow = counted(program, peak_flops=1.0)  # the product of 65,536 s covers the second gather
    assert slow.exposed_s == TRIPS * (first + third) + after_loops
    fast = counted(program, peak_flops=PRODUCT / 100)  # a product of 100 s does not
    assert fast.exposed_s == pytest.approx(TRIPS * (first + second - 100 + third) + after_loops)
    assert fast.compute_s == pytest.approx((fast.flops + fast.kernel_flops) / PRODUCT * 100)


def test_copies_and_host_transfers_are_listed_but_prefetches_are_not(program: Program) -> None:
    counts = counted(program)
    assert [(c.opcode, c.array, c.times, c.in_loop) for c in counts.copies] == [
        ("copy", Array("f32", (512, 1024)), TRIPS, True),
        ("convert+transpose", Array("bf16", (1024, 512)), 1, False),
        ("copy", Array("f32", (8, 4)), 1, False),
    ]
    assert counts.host_transfers == ("infeed.9",)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 4),
        ("replica_groups=[16,32]<=[8,64]T(1,0), dimensions={0}", 32),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=8] {'axis_1'}, dimensions={0}", 8),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=8] {'axis_0','axis_1'}", 32),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", 3),
        ("dimensions={0}", 1),
    ],
)
def test_group_size_is_read_from_every_form_of_groups(attributes: str, size: int) -> None:
    assert scheduled_hlo.group_size(attributes) == size


@pytest.mark.parametrize(
    ("left", "right", "out", "attributes", "flops"),
    [
        # The queries of a layer, as a TPU computes them: 31 of the 32 taps of each head lie in the padding.
        (
            (2, 4096, 2560, 1), (32, 80, 2560, 1), (2, 4096, 32, 80),
            "window={size=1x32 pad=0_0x31_31 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            2 * 2 * 4096 * 2560 * 32 * 80,
        ),
        # The output projection: the heads are a window that is summed over.
        (
            (2, 4096, 32, 80), (2560, 32, 80, 1), (2, 4096, 2560, 1),
            "window={size=1x32}, dim_labels=0b1f_o1i0->0bf1",
            2 * 2 * 4096 * 2560 * 32 * 80,
        ),
        ((512, 2560), (49152, 2560), (512, 49152), "dim_labels=bf_oi->bf", 2 * 512 * 2560 * 49152),
        # A batch of products, as a window whose stride and dilation pick one of the batch.
        (
            (4, 8, 16), (4, 16, 32), (4, 8, 32),
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            2 * 4 * 8 * 16 * 32,
        ),
    ],
)  # fmt: skip
def test_flops_of_a_convolution_leave_out_its_padding(
    left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str, flops: float
) -> None:
    operands = tuple(
        Instruction(name, "parameter", (Array("bf16", shape),), (), "") for name, shape in (("l", left), ("r", right))
    )
    product = Instruction("y", "convolution", (Array("bf16", out),), ("l", "r"), f", {attributes}")
    program = Program({"main": (*operands, product)}, "main")
    assert scheduled_hlo.product_flops(program, "main", product) == flops
