"""Reads the text of a compiled program (scheduled HLO): its matrix products, its collectives, and what overlaps them.

XLA writes a program's instructions in the order in which they run. An asynchronous collective is two of them, a start
and a done, and what lies between the two runs at the same time. All functions here are pure.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

ITEM_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2,
    "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
HOST_TRANSFERS = ("infeed", "outfeed", "send", "recv")
ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """A dtype as XLA names it (f32, bf16) and a shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of bytes."""
        return int(math.prod(self.shape) * ITEM_BYTES[self.dtype])


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation.

    Attributes:
      name: The name, without the percent sign.
      opcode: What it does: fusion, convolution, all-gather, while.
      arrays: The arrays of the result, those of a tuple one after another.
      operands: The names of the operands.
      attributes: The rest of the line: dimensions, called computations, metadata.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """The name of the operation in JAX, a path; empty if it has none."""
        return self._attribute(r'op_name="([^"]*)"')

    @property
    def called(self) -> str:
        """The name of the computation that a fusion, call or asynchronous start runs; empty if none."""
        return self._attribute(r"\b(?:calls|to_apply)=%?([\w.\-]+)")

    @property
    def body(self) -> str:
        """The name of the body of a loop."""
        return self._attribute(r"\bbody=%?([\w.\-]+)")

    @property
    def condition(self) -> str:
        """The name of the condition of a loop."""
        return self._attribute(r"\bcondition=%?([\w.\-]+)")

    def _attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a compiled program, by name, and the name of the one that runs first."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str

    def find(self, computation: str, name: str) -> Instruction | None:
        """Returns the instruction of this name in a computation; None if there is none."""
        return next((i for i in self.computations.get(computation, ()) if i.name == name), None)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective that runs `times` times in one run of the program.

    Attributes:
      kind: all-gather, all-reduce, reduce-scatter or another of COLLECTIVES.
      dtypes: The dtypes of its arrays.
      full_bytes: The bytes of its arrays on a device that has them whole.
      sent_bytes: The bytes that one device sends, if devices form a ring.
      times: How often it runs.
      in_loop: Whether it is in a loop.
      is_async: Whether it is a start and a done.
      overlapped_flops: FLOPs of the products between its start and its done.
      op_name: The name of the operation in JAX.
    """

    kind: str
    dtypes: tuple[str, ...]
    full_bytes: int
    sent_bytes: float
    times: int
    in_loop: bool
    is_async: bool
    overlapped_flops: float
    op_name: str

    @property
    def overlaps(self) -> bool:
        """Whether products run at the same time."""
        return self.is_async and self.overlapped_flops > 0


@dataclasses.dataclass(frozen=True)
class Copy:
    """An instruction that only moves or converts an array, in device memory, and runs `times` times."""

    opcode: str
    array: Array
    times: int
    in_loop: bool
    op_name: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one run of a program does on one device.

    Attributes:
      flops: FLOPs of matrix products, those of kernels (custom calls) not included.
      kernel_flops: FLOPs of kernels.
      collectives: All collectives, in the order in which they run.
      copies: All copies, transpositions and conversions of an array as a whole.
      host_transfers: The names of instructions that exchange data with the host.
      compute_s: Seconds of products and kernels.
      exposed_s: Seconds in which no product runs because a collective has not ended.
    """

    flops: float
    kernel_flops: float
    collectives: tuple[Collective, ...]
    copies: tuple[Copy, ...]
    host_transfers: tuple[str, ...]
    compute_s: float
    exposed_s: float


KernelFlops = Callable[[Instruction, Sequence[Array]], float]


# ---------------------------------------------------------------------------------------- parsing
def parse_program(text: str) -> Program:
    """Parses the text of a program.

    Args:
      text: What XLA writes, starting with HloModule.

    Raises:
      ValueError: There is no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(lines)
        elif found := INSTRUCTION.match(line):
            lines.append(_parse_instruction(found[1], found[2]))
    if entry not in computations:
        raise ValueError("the text has no ENTRY computation, so it is not a compiled program")
    return Program(computations, entry)


def _parse_instruction(name: str, rest: str) -> Instruction:
    """Parses `TYPE opcode(operands), attributes`."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, call = rest[:end], rest[end:].lstrip()
    opcode, _, _ = call.partition("(")
    close = _closing(call, len(opcode))
    operands = re.findall(r"%([\w.\-]+)", call[len(opcode) : close])
    found = [(dtype, dims) for dtype, dims in ARRAY.findall(kind) if dtype in ITEM_BYTES]  # no tokens
    arrays = tuple(Array(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in found)
    # A constant's operand is its value, which the trip counts of loops need.
    attributes = call[len(opcode) : close + 1] if opcode == "constant" else call[close + 1 :]
    return Instruction(name, opcode, arrays, tuple(operands), attributes)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    return len(text)


# ---------------------------------------------------------------------------------------- FLOPs
def product_flops(program: Program, computation: str, instruction: Instruction) -> float:
    """Computes the FLOPs of a dot or convolution, two for each multiply-add; 0 for any other instruction.

    A TPU's products are convolutions. One with several dims of inputs or outputs has some of them as window dims, with
    padding, of which most taps lie outside of the array: those are not counted.

    Args:
      program: The program.
      computation: The name of the instruction's computation.
      instruction: The instruction.
    """
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (program.find(computation, name) for name in instruction.operands[:2])
    out = instruction.arrays[0].shape
    assert left is not None and right is not None, instruction
    lhs, rhs = left.arrays[0].shape, right.arrays[0].shape
    if instruction.opcode == "dot":
        dims = instruction._attribute(r"lhs_contracting_dims=\{([0-9,]*)\}")
        return 2.0 * math.prod(out) * math.prod(lhs[int(d)] for d in dims.split(",") if d)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction
    of_input, of_kernel, of_output = labels.groups()
    flops = 2.0 * out[of_output.index("b")] * out[of_output.index("f")] * rhs[of_kernel.index("i")]
    for dim in filter(str.isdigit, of_output):
        window = _window(instruction.attributes, int(dim))
        flops *= _taps(lhs[of_input.index(dim)], rhs[of_kernel.index(dim)], out[of_output.index(dim)], *window)
    return flops


def _window(attributes: str, dim: int) -> tuple[int, int, int, int]:
    """The stride, low padding, input dilation and kernel dilation of a dim of a convolution's window."""
    window = re.search(r"window=\{([^}]*)\}", attributes)
    values = dict(part.split("=") for part in window[1].split()) if window else {}

    def of_dim(name: str, default: str) -> str:
        return values[name].split("x")[dim] if name in values else default

    padding = of_dim("pad", "0_0").split("_")[0]
    return int(of_dim("stride", "1")), int(padding), int(of_dim("lhs_dilate", "1")), int(of_dim("rhs_dilate", "1"))


def _taps(size: int, kernel: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """The number of pairs of an output and a kernel position, along one dim, that read a real input."""
    position = np.arange(out)[:, None] * stride + np.arange(kernel) * rhs_dilate - low
    inside = (position >= 0) & (position < (size - 1) * lhs_dilate + 1) & (position % lhs_dilate == 0)
    return int(inside.sum())


# ---------------------------------------------------------------------------------------- counting
def count(
    program: Program,
    *,
    peak_flops: float,
    link_rate: float,
    unknown_trips: int,
    kernel_flops: KernelFlops = lambda instruction, operands: 0.0,
) -> Counts:
    """Counts what one run of a program does on one device, and simulates how its collectives overlap with products.

    In the simulation, products run at the peak in the order of the schedule. Collectives share the device's links, one
    after another: a start puts a collective into the queue, and a done waits until it has ended. Nothing else takes
    time, so that real overlap can only be better.

    Args:
      program: The program.
      peak_flops: FLOP/s of products.
      link_rate: Bytes/s that one device sends.
      unknown_trips: How often a loop runs whose number of rounds depends on data.
      kernel_flops: Returns the FLOPs of a custom call, from the instruction and the arrays that it is given.
    """
    counter = _Counter(program, peak_flops, link_rate, unknown_trips, kernel_flops)
    counter.run(program.entry, times=1, in_loop=False)
    return Counts(
        counter.flops,
        counter.kernel_flops,
        tuple(counter.collectives),
        tuple(counter.copies),
        tuple(counter.host_transfers),
        counter.compute_s,
        counter.exposed_s,
    )


class _Counter:
    """The state of `count`. Times are those of one round of a loop, multiplied by its rounds when it is left."""

    def __init__(
        self,
        program: Program,
        peak_flops: float,
        link_rate: float,
        unknown_trips: int,
        kernel_flops_of: KernelFlops,
    ):
        self.program, self.peak_flops, self.link_rate = program, peak_flops, link_rate
        self.unknown_trips, self.kernel_flops_of = unknown_trips, kernel_flops_of
        self.flops = self.kernel_flops = self.compute_s = self.exposed_s = 0.0
        self.collectives: list[Collective] = []
        self.copies: list[Copy] = []
        self.host_transfers: list[str] = []

    def run(self, computation: str, times: int, in_loop: bool) -> float:
        """Counts a computation that runs `times` times; returns the FLOPs of one run."""
        now = link_free = total = 0.0
        in_flight: dict[str, tuple[float, int, float]] = {}  # start -> its end, its index, total FLOPs at its start
        for i in self.program.computations[computation]:
            if i.opcode == "while":
                trips = trip_count(self.program, computation, i) or self.unknown_trips
                total += trips * self.run(i.body, times * trips, in_loop=True)
                continue
            if source := _collective_in(self.program, i):
                collective = _collective(source, times, in_loop, is_async=_is_start(i))
                begin = max(now, link_free)
                link_free = begin + collective.sent_bytes / self.link_rate
                if _is_start(i):
                    in_flight[i.name] = link_free, len(self.collectives), total
                else:
                    self.exposed_s += times * (link_free - now)
                    now = link_free
                self.collectives.append(collective)
                continue
            started = next((name for name in i.operands if name in in_flight), None)
            if i.opcode.endswith("-done") and started:
                end, index, before = in_flight.pop(started)
                overlapped = total - before
                self.collectives[index] = dataclasses.replace(self.collectives[index], overlapped_flops=overlapped)
                self.exposed_s += times * max(0.0, end - now)
                now = max(now, end)
                continue
            products, kernels = self._flops_of(computation, i)
            self.flops += times * products
            self.kernel_flops += times * kernels
            self.compute_s += times * (products + kernels) / self.peak_flops
            now += (products + kernels) / self.peak_flops
            total += products + kernels
            self._note_copy(i, times, in_loop)
            if i.opcode.removesuffix("-start") in HOST_TRANSFERS:
                self.host_transfers.append(i.name)
        return total

    def _flops_of(self, computation: str, i: Instruction) -> tuple[float, float]:
        """FLOPs of the products and of the kernels of an instruction, with what it calls."""
        if i.opcode == "custom-call":
            given = (self.program.find(computation, name) for name in i.operands)
            return 0.0, self.kernel_flops_of(i, [array for operand in given if operand for array in operand.arrays])
        if i.opcode in ("fusion", "call") and i.called in self.program.computations:
            parts = [self._flops_of(i.called, inner) for inner in self.program.computations[i.called]]
            return sum(p for p, _ in parts), sum(k for _, k in parts)
        if i.opcode == "conditional":
            branches = re.findall(r"%([\w.\-]+)", i._attribute(r"branch_computations=\{([^}]*)\}"))
            sums = [[self._flops_of(b, inner) for inner in self.program.computations[b]] for b in branches]
            return max(((sum(p for p, _ in s), sum(k for _, k in s)) for s in sums), default=(0.0, 0.0))
        return product_flops(self.program, computation, i), 0.0

    def _note_copy(self, i: Instruction, times: int, in_loop: bool) -> None:
        if i.opcode in ("copy", "transpose", "convert"):
            self.copies.append(Copy(i.opcode, i.arrays[0], times, in_loop, i.op_name))
        elif i.opcode == "fusion" and i.called in self.program.computations:
            # A fusion that does nothing but move and convert.
            inner = {x.opcode for x in self.program.computations[i.called]} - {"parameter", "bitcast", "tuple"}
            if inner and inner <= {"copy", "transpose", "convert"}:
                self.copies.append(Copy("+".join(sorted(inner)), i.arrays[0], times, in_loop, i.op_name))


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """Returns how often a loop runs that counts up to a constant; None if either end depends on data.

    Args:
      program: The program.
      computation: The name of the computation that the loop is in.
      loop: The while instruction.
    """
    compare = next((i for i in program.computations[loop.condition] if i.opcode == "compare"), None)
    if compare is None:
        return None
    counter, limit = (program.find(loop.condition, name) for name in compare.operands)
    if counter is None or limit is None or limit.opcode != "constant":
        return None
    # The counter starts at 0, unless the compiler has taken rounds out of the loop.
    index = re.search(r"\bindex=(\d+)", counter.attributes)
    state = program.find(computation, loop.operands[0])
    first = program.find(computation, state.operands[int(index[1])]) if index and state and state.operands else None
    start = int(first.attributes.strip("()")) if first is not None and first.opcode == "constant" else 0
    return int(limit.attributes.strip("()")) - start


def _is_start(i: Instruction) -> bool:
    return i.opcode.endswith("-start")


def _collective_in(program: Program, i: Instruction) -> Instruction | None:
    """The collective that an instruction is, or that the fusion or asynchronous call which it is runs; else None."""
    if i.opcode.removesuffix("-start") in COLLECTIVES:
        return i
    if i.opcode in ("fusion", "call", "call-start", "async-start"):
        return next(_collectives_of(program, i.called), None)
    return None


def _collectives_of(program: Program, computation: str) -> Iterator[Instruction]:
    for i in program.computations.get(computation, ()):
        if i.opcode.removesuffix("-start") in COLLECTIVES:
            # XLA for TPUs writes a fused reduce-scatter as an all-reduce and a slice, whose arrays are the result.
            if i.opcode == "all-reduce" and "reduce-scatter" in computation:
                result = program.computations[computation][-1]
                yield dataclasses.replace(i, opcode="reduce-scatter", arrays=result.arrays)
            else:
                yield i
        elif i.called:
            yield from _collectives_of(program, i.called)


def _collective(i: Instruction, times: int, in_loop: bool, *, is_async: bool) -> Collective:
    kind = i.opcode.removesuffix("-start")
    devices = group_size(i.attributes)
    arrays = i.arrays
    if i.opcode.endswith("-start") and len(arrays) > 1:  # a start returns its operands, then its results
        arrays = arrays[len(arrays) // 2 :]
    size = sum(a.size for a in arrays)
    full = size * devices if kind == "reduce-scatter" else size
    share = 1 - 1 / devices
    sent = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share) * full
    dtypes = tuple(dict.fromkeys(a.dtype for a in arrays))
    return Collective(kind, dtypes, full, sent, times, in_loop, is_async, 0.0, i.op_name)


def group_size(attributes: str) -> int:
    """Returns how many devices take part in one group of a collective, from its `replica_groups`.

    XLA writes groups as lists ({{0,1},{2,3}}), as a shape of groups ([2,2]<=[4]), or as axes of a mesh
    (mesh['a'=2,'b'=2] {'b'}).
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([0-9,]+)\}", attributes):
        return found[1].count(",") + 1
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return found[1].count("{")
    return 1
