"""The sites over symmetric memory: one kernel launch each, in which the ranks read and write each other's memory.

A *workspace* is memory that all ranks have mapped: ``rows`` rows of activations, where partial sums come in and norms go
out; the residual, as it is carried from site to site and as it leaves; and what the kernels need themselves. There is one
for each slot, dtype, hidden size and power of two of rows. It is made on first use, by all ranks together or by none, and stays
where it is for good: the pointers are in captured CUDA graphs.

Streams and threads. A slot has one workspace, so that calls follow each other, from whichever stream and thread they come: as NCCL's
on one communicator do. A call on another stream than the last one's waits, on the GPU, for all that was enqueued there; and whoever
makes calls that belong together, a start and its wait or a whole graph, makes them within ``call()``, which keeps other threads out.
All ranks must come to the same order of calls, those of all groups of a GPU together, as with NCCL: kernels of two groups that wait in
opposite orders on two ranks may never end. Where several threads make calls that is for the user to see to. What cannot be seen are
the replays of a CUDA graph that the user has captured: they must be ordered by the user, against each other and against other calls, if
they are on several streams. (Replays of Inductor's CUDA graphs are within a call of the compiled model.) While a graph is captured, no
other thread may make calls.

The kernels (``csrc/``): for few tokens each rank finishes all rows for itself, in one_shot; otherwise a part of them for all, in
two_shot. Which it is: ``tuning``. Which rank owns which row: ``own_rows``.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import gc
import itertools
import json
import os
import struct
import threading
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
import torch.utils.dlpack
from torch import Tensor

from ...compat import DeviceType, SymmetricMemory, current_raw_stream, resolve_process_group, symmetric_memory
from ...site import NEXT_SITE, empty_results
from .. import agree
from ..together import WorkspaceError, together
from . import gemms, host, nvrtc, tuning
from .tuning import LEAST_ROWS, Tuning, two_shot_ctas

MAX_HIDDEN = 32768

_ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# csrc/sync.cuh, kErrorMagic
_ERROR_MAGIC = 0x7457F417
_ERROR_WORDS = 7
_OTHER_CALL = 2
_ROW_BITS, _SITE_BITS = 18, 10  # of a flag

# Shapes of calls that are remembered, at most: those that have not come for longest are forgotten, and cost some time when they come.
MAX_CALLS = 256


def own_rows(rank: int, world: int, rows: int) -> tuple[int, int]:
    """The rows [begin, end) that a rank owns in a two-shot call: equal parts, but for the last ranks'."""
    part = -(-rows // world)
    return min(rank * part, rows), min((rank + 1) * part, rows)


@dataclass(frozen=True)
class Layout:
    """How the threads of a group share a row (csrc/row.cuh), and what of it is in flight.

    Threads, unroll and chunks are the same for all kernels, as the order of summation hangs on them.

    threads: of a group
    unroll:  16-byte vectors of a thread in a chunk
    chunks:  in a row
    groups:  of a two-shot CTA, which work on a row each; a one-shot CTA is one
    depth:   chunks that a two-shot thread has in flight
    cluster: two-shot CTAs that are placed together
    shared:  bytes of dynamic shared memory that two_shot needs, and that one_shot needs
    """

    threads: int
    unroll: int
    chunks: int
    groups: int
    depth: int
    cluster: int
    shared: tuple[int, int]

    SHAPES = (512, 2), (512, 1), (256, 1), (128, 1)  # most threads, unroll; the first that shared memory has room for
    MAX_THREADS, MAX_GROUPS = 1024, 4  # of a two-shot CTA
    MAX_DEPTH = 3  # of one group; more is no faster
    GROUPS_DEPTH = 1  # of several: while one waits, the others' rows are in flight
    HOPPER = 227 * 1024  # bytes of shared memory that a GPU with clusters has
    CLUSTER = 2
    ROOMY = 164 * 1024  # bytes of shared memory that leave L1, of the same memory, enough for the loads of the own part

    @property
    def block(self) -> tuple[int, int]:
        """Threads of a two-shot CTA, in x and y: a group is a row of them."""
        return self.threads, self.groups

    @classmethod
    def of(cls, hidden: int, itemsize: int, world: int, transport: str, center: bool, shared_limit: int) -> "Layout":
        """center: LayerNorm, not RMSNorm; shared_limit: bytes of shared memory that a CTA can have.

        Raises RuntimeError where that is too little.
        """
        vectors = hidden * itemsize // 16
        landing = world - 1 if transport == "peer" else 0  # vectors that land in shared memory
        for max_threads, unroll in cls.SHAPES:
            unroll = min(unroll, -(-vectors // 32))
            chunks = -(-vectors // (max_threads * unroll))
            threads = -(-vectors // (chunks * unroll * 32)) * 32
            kept = threads * unroll * chunks * 16 * (4 // itemsize) if chunks > 1 else 0
            fixed, chunk = 2 * 32 * 4 + kept, threads * unroll * landing * 16
            roomy = min(shared_limit, max(cls.ROOMY, fixed + chunk))
            groups = 1
            # Of several groups each thread has few registers: enough for the RMSNorm of a row that is an equal share for all,
            # as long as its sums do not come to registers, as those of multimem do.
            if landing and vectors == threads * unroll and not center:
                groups = max(1, min(cls.MAX_GROUPS, cls.MAX_THREADS // threads, roomy // (fixed + chunk)))
            depth = cls.MAX_DEPTH if groups == 1 else cls.GROUPS_DEPTH
            if landing:
                depth = min(depth, (roomy // groups - fixed) // chunk)
            if depth > 0:
                shared = groups * (fixed + depth * chunk), fixed + (chunk if landing > 4 else 0)
                cluster = cls.CLUSTER if shared_limit >= cls.HOPPER else 1
                return cls(threads, unroll, chunks, groups, depth, cluster, shared)
        raise RuntimeError(
            f"a row of {hidden} does not fit into the {shared_limit} bytes of shared memory that a thread block of this GPU can "
            "have: use transport 'process_group'"
        )


def macros(dtype: torch.dtype, hidden: int, world: int, rank: int, transport: str, center: bool, layout: Layout) -> dict[str, object]:
    """What a kernel is compiled for. transport: "peer" or "multimem"; center: LayerNorm, not RMSNorm."""
    return {
        "TW_ELEMENT": _ELEMENTS[dtype],
        "TW_HIDDEN": hidden,
        "TW_WORLD": world,
        "TW_RANK": rank,
        "TW_TRANSPORT": transport.capitalize(),
        "TW_NORM": "LayerNorm" if center else "RmsNorm",
        "TW_THREADS": layout.threads,
        "TW_UNROLL": layout.unroll,
        "TW_CHUNKS": layout.chunks,
        "TW_GROUPS": layout.groups,
        "TW_CLUSTER": layout.cluster,
        "TW_DEPTH": layout.depth,
        "TW_SHARED_BYTES": layout.shared[0],
        "TW_SITE_BYTES": Arguments.size(world),
    }


class Arguments:
    """The argument of a launch (csrc/site.cuh, Site), packed once but for what changes from call to call.

    All pointers are addresses; ``workspaces`` and ``pads`` in rank order.

    set(rows, x, residual, bias, weight, norm_out, residual_out, site, weight_is_float, takes_carried, whole_residual, eps, scale,
    offset, shift_is_float, shift) packs what changes.
    """

    _CALL = struct.Struct("<I6Q4I3fIQ")

    def __init__(self, rank, workspaces, pads, multicast, epochs, error, timeout_s, whole_residual_at, staging_at):
        world = len(workspaces)
        turned = [(rank + i) % world for i in range(world)]
        fixed = struct.Struct(f"<{2 * world + 6}QI")
        self._buffer = ctypes.create_string_buffer(self.size(world))
        self.set = functools.partial(self._CALL.pack_into, self._buffer, fixed.size)
        self._timeout_at = 8 * (2 * world + 3)
        fixed.pack_into(
            self._buffer,
            0,
            *(workspaces[r] for r in turned),
            *(pads[r] for r in turned),
            multicast,
            epochs,
            error,
            0,
            whole_residual_at,
            staging_at,
            rank,
        )
        self.set_timeout(timeout_s)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._buffer))
        self.address = ctypes.addressof(self._pointers)

    def set_timeout(self, timeout_s: float) -> None:
        struct.pack_into("<Q", self._buffer, self._timeout_at, int(timeout_s * 1e9))

    @classmethod
    def size(cls, world: int) -> int:
        return struct.calcsize(f"<{2 * world + 6}QI") + cls._CALL.size


class _ErrorRecord:
    """Where a kernel that gives up waiting says so: pinned host memory, readable when the CUDA context is lost."""

    def __init__(self):
        self._memory = torch.zeros(_ERROR_WORDS, dtype=torch.int32, pin_memory=True)
        self.address = self._memory.data_ptr()
        self.words = (ctypes.c_uint32 * _ERROR_WORDS).from_address(self.address)  # the first is 0 as long as all is well

    def raise_if_set(self, timeout_s: float, cause: BaseException | None = None) -> None:
        if self.words[0] != _ERROR_MAGIC:
            return
        _, rank, site, peer, phase, rows, call_of_peer = self.words
        if phase == _OTHER_CALL:
            site_of_peer, rows_of_peer = call_of_peer >> _ROW_BITS, call_of_peer & ((1 << _ROW_BITS) - 1)
            here = f"rank {rank} is at the all-reduce of site {site} with {rows} tokens, but rank {peer} "
            if site_of_peer != site % (1 << _SITE_BITS):
                there = f"at that of site {site_of_peer} with {rows_of_peer} tokens"
            else:
                there = f"with another number of tokens, {rows_of_peer}"
            raise RuntimeError(
                f"{here}{there}: all ranks of a tensor-parallel group must run the same, in the same order. The CUDA context is "
                "lost: start all ranks again."
            ) from cause
        place = "at the end of" if phase else "to begin"
        raise RuntimeError(
            f"rank {rank} waited {timeout_s:g} s for rank {peer} {place} the all-reduce of site {site}, and gave up. "
            f"Either rank {peer} has died or hangs: see its log; or it runs another number of tokens, or another model: "
            "all ranks of a tensor-parallel group must run the same. The CUDA context is lost: start all ranks again."
        ) from cause


class _Workspace:
    """Symmetric memory for calls of up to ``rows`` rows, and the kernels that work on it. A collective of the group.

    Raises WorkspaceError on all ranks where a rank cannot make it.

    activations, whole_residual: [rows, hidden] tensors of dtype
    carried:                     a [rows, hidden] tensor of float32. Of LEAST_ROWS rows or more, a rank has half of them
                                 at most, in the front of it; behind that it overlaps with whole_residual
    tuning:                      the owner's; otherwise that of the first rank that knows one, or what all now measure
    """

    def __init__(self, owner: "Symmetric", dtype: torch.dtype, hidden: int, rows: int):
        rank, world = owner.rank, owner.world
        torch.cuda.set_device(owner.device)
        self.max_ctas = symmetric_memory.get_signal_pad_size() // 4 // world
        row_bytes = hidden * dtype.itemsize
        one_shot = rows == LEAST_ROWS
        region, carried = rows * row_bytes, rows * hidden * 4
        staging = 2 * (LEAST_ROWS - 1) * row_bytes if one_shot else 0
        whole_residual_at = region + (carried if one_shot else carried // 2)
        staging_at = whole_residual_at + region
        epochs_at = staging_at + staging
        self.bytes = epochs_at + 4 * self.max_ctas

        ours = f"{rows} tokens of {dtype} [{hidden}], {self.bytes} bytes"
        mine = owner.tuning or tuning.known(owner, dtype, hidden)
        message = ours + "\n" + json.dumps(mine and asdict(mine))
        said = agree.exchange(owner.group_name, f"the making of a workspace for up to {ours}", message, owner.timeout_s)
        made, _, tunings = zip(*(theirs.partition("\n") for theirs in said))
        if len(set(made)) > 1:
            raise RuntimeError(
                f"the ranks of group {owner.group_name} run different things, and so make different workspaces: "
                + "; ".join(f"rank {r}: for up to {theirs}" for r, theirs in enumerate(made))
            )
        known = next((Tuning.from_dict(theirs) for theirs in map(json.loads, tunings) if theirs), None)
        self.tuning = known or tuning.measure(owner, dtype, hidden, self.max_ctas)

        def allocate():
            memory = symmetric_memory.empty(self.bytes, dtype=torch.uint8, device=owner.device)
            memory.zero_()  # the epochs
            # No rank begins the rendezvous before all have come here: nobody's flag can be overwritten by another's zeros.
            torch.cuda.synchronize(owner.device)
            return memory

        def meet():
            handle = symmetric_memory.rendezvous(memory, owner.group_name)  # which gives up when the group's store does
            if handle.rank != rank or handle.world_size != world:
                raise RuntimeError(f"rendezvous of group {owner.group_name} gave rank {handle.rank} of {handle.world_size}")
            if owner.name == "multimem" and handle.multicast_ptr == 0:
                raise RuntimeError("the group's symmetric memory has no multicast address: use transport 'peer'")
            return handle

        memory = together(owner.group_name, f"the allocation of a workspace for up to {ours}", allocate, owner.timeout_s)
        handle = together(owner.group_name, f"the rendezvous of a workspace for up to {ours}", meet, owner.timeout_s)
        here = memory.data_ptr()
        offset = here - handle.buffer_ptrs[rank]
        self.memory, self.handle = memory, handle
        self.activations = memory[:region].view(dtype).view(rows, hidden)
        self.carried = memory[region : region + carried].view(torch.float32).view(rows, hidden)
        self.whole_residual = memory[whole_residual_at:staging_at].view(dtype).view(rows, hidden)
        self.arguments = Arguments(
            rank,
            [pointer + offset for pointer in handle.buffer_ptrs],
            handle.signal_pad_ptrs,
            handle.multicast_ptr if owner.name == "multimem" else 0,
            here + epochs_at,
            owner.error_address,
            owner.timeout_s,
            whole_residual_at,
            staging_at,
        )
        names = {self.tuning.kernel_of(r) for r in (range(1, rows + 1) if one_shot else (rows,))}
        # center -> name -> Kernel. All names at once: a CUDA graph of another number of rows may be captured next.
        self.kernels = functools.cache(lambda center: owner.kernels(names, dtype, hidden, center))


class _Call:
    """What calls on inputs of one shape, in one slot, have in common."""

    def __init__(self, owner: "Symmetric", workspace: _Workspace, shape: torch.Size, rows: int):
        self.shape, self.rows, self.workspace, self.arguments = shape, rows, workspace, workspace.arguments
        self.dtype = workspace.activations.dtype
        self.activations_at, self.carried_at = workspace.activations.data_ptr(), workspace.carried.data_ptr()
        # One memory, several tensors: the result of an op may not share the storage of what it takes (torch warns of it
        # in 2.11, and from 2.12 on refuses it), and a site's input and norm, and its residuals before and after, are in
        # one place each.
        tensors = [_with_own_storage(t)[:rows].view(shape) for t in (workspace.activations, workspace.carried) for _ in range(2)]
        self.partials, self.norm, *carried = tensors
        # The carried residual, as another tensor than the last time, which may be what the site has taken.
        self.carried = itertools.cycle(carried).__next__
        self.token = self.partials.new_empty(0)
        self.whole_residual = workspace.whole_residual[:rows].view(shape)
        self.kernel = workspace.tuning.kernel_of(rows)
        self.one_shot = self.kernel != "two_shot"
        # The rows of the rank that has most: there are never more CTAs than rows for them.
        self.most_rows = rows if self.one_shot else -(-rows // owner.world)
        self.ctas = two_shot_ctas(owner.world)
        self.ctas_alone = workspace.tuning.ctas_alone(rows)
        # (center, ctas, otherwise) -> (Kernel, number of CTAs): see grid
        self.launcher = functools.cache(self._launcher)

    def _launcher(self, center: bool, ctas: int, otherwise: int) -> tuple[nvrtc.Kernel, int]:
        kernel = self.workspace.kernels(center)[self.kernel]
        return kernel, self.grid(ctas, otherwise, kernel.cluster)

    def grid(self, ctas: int, otherwise: int, cluster: int = 1) -> int:
        """The number of CTAs, the same on all ranks, in whole clusters. ctas: the caller's wish, 0 for none."""
        most = self.workspace.max_ctas // cluster * cluster
        if ctas > most:
            raise RuntimeError(
                f"{ctas} CTAs do not fit into the signal pad of symmetric memory, which has room for {most}: ask for fewer, or call "
                "torch.distributed._symmetric_memory.set_signal_pad_size before the first use"
            )
        grid = min(ctas or (self.most_rows if self.one_shot else otherwise), self.most_rows)
        return min(-(-grid // cluster) * cluster, most)


class Symmetric:
    """Sites over symmetric memory. One for each process group and device.

    name: "peer", loads and stores through a pointer to each rank's memory; or "multimem", through NVLink multicast, where
          the switch adds
    lock: held by ``call()``; that of another may be put in its place before the first call
    All ranks must make the same calls in the same order. x is bfloat16, float16 or float32, its last dimension H a multiple
    of 8 up to 32768; all others are tokens. Errors of a lost or late rank are RuntimeErrors that name it.
    """

    def __init__(
        self,
        group_name: str,
        device: torch.device,
        multicast: bool,
        timeout_s: float = agree.PATIENCE_S,
        tuning: Tuning | None = None,
    ):
        """No collective.

        timeout_s: how long a kernel waits for another rank, which may be compiling, say
        tuning:    the same on all ranks; None to measure it for each dtype and hidden size
        """
        group = resolve_process_group(group_name)
        self.name = "multimem" if multicast else "peer"
        self.group_name, self.timeout_s, self.tuning = group_name, timeout_s, tuning
        self.rank, self.world = group.rank(), group.size()
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._error = _ErrorRecord()
        self.lock, self._depth = threading.RLock(), 0
        self._workspaces = {}  # (slot, dtype, hidden, rows) -> _Workspace
        self._calls, self._older_calls = {}, {}  # (slot, dtype, shape) -> _Call; of both MAX_CALLS at most
        self._kernels = {}  # (name, dtype, hidden, center) -> Kernel
        self._pending = {}  # slot -> what wait() needs of start()
        self._carveout = False  # whether GEMMs leave SMs to its kernels
        self._stream = torch.cuda.Stream(self.device, priority=-1)  # ahead of the GEMMs when an SM becomes free
        self._side = self._stream.cuda_stream
        self._current = functools.partial(current_raw_stream, self.device.index)
        self._host = host.calls()
        self._context = self._host.context(self.device.index)
        self._order = self._host.event(self._context)
        self._on = None  # the stream of the last call; None where there is none yet, or it was captured
        self._uncaptured = self._captured = None  # the streams of the last call that was not captured, and that was
        self._external = False  # whether the last call's stream is the user's own, and may be gone any time after call()
        self._events = {}  # slot -> (fork, done)
        self._sites = {}  # slot -> the number of its last site

    def another(self, tuning: Tuning) -> "Symmetric":
        """One with that tuning that shares nothing with this one: its memory is free again when it is dropped."""
        return Symmetric(self.group_name, self.device, self.name == "multimem", tuning=tuning)

    @staticmethod
    def unavailable(group_name: str, device: torch.device, multicast: bool) -> str | None:
        """Why this rank cannot use the transport, as far as it can tell alone; None if it can."""
        if device.type != "cuda" or torch.version.cuda is None:
            return "it needs NVIDIA GPUs"
        world = resolve_process_group(group_name).size()
        if not 2 <= world <= 8:
            return f"it joins 2 to 8 ranks, and the group has {world}"
        if reason := nvrtc.missing() or host.missing():
            return reason
        index = torch.cuda.current_device() if device.index is None else device.index
        needed, capability = ((9, 0) if multicast else (8, 0)), torch.cuda.get_device_capability(index)
        if capability < needed:
            return f"it needs compute capability {needed[0]}.{needed[1]}, and this GPU has {capability[0]}.{capability[1]}"
        if reason := _not_neighbours(group_name, index):
            return reason
        if multicast and not _has_multicast(index):
            return "there is no NVLink multicast here, or it is switched off"
        return None

    # ---- Around the ops

    def call(self) -> "Symmetric":
        """``with transport.call():`` around calls that belong together, such as those of a graph.

        Other threads' calls wait until it ends; what is begun in it and not waited for, as after an exception, is then forgotten, and
        GEMMs have the SM carveout from before. May be nested.
        """
        return self

    def __enter__(self) -> None:
        self.lock.acquire()
        self._depth += 1
        try:
            stream = self._current()
            if stream != self._on:
                self._follow(stream)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error) -> None:
        try:
            self._depth -= 1
            if not self._depth:
                for slot in [*self._pending]:
                    self._abandon(slot)
                if self._external:
                    self._leave()
        finally:
            self.lock.release()

    def prepare(self, calls) -> None:
        """Make the workspaces and kernels of calls, each (slot, dtype, shape of x, center), for all of them or for none. A collective.

        Nothing is left to be made then while they run. Raises WorkspaceError on all ranks where a rank cannot make them.
        """
        before = set(self._workspaces)
        try:
            for slot, dtype, shape, center in calls:
                if 0 not in shape:
                    self._call(slot, dtype, torch.Size(shape)).workspace.kernels(center)
        except RuntimeError as error:
            self._drop(set(self._workspaces) - before)
            self.raise_if_lost(error)
            raise

    # ---- The ops

    def linear(self, a: Tensor, b: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        """a @ b (+ bias), written where start() and fused() of the slot need no copy.

        a: [M, K]; b: [K, H]; bias: [H] or None. Returns [M, H] in the workspace: valid until the slot is next used.
        """
        try:
            stream = self._current()
            if stream != self._on:
                self._follow(stream)
            if slot in self._pending:
                self._abandon(slot)
            shape = torch.Size((a.shape[0], b.shape[1]))
            if 0 in shape:
                return a.new_empty(shape)
            out = self._call(slot, a.dtype, shape).partials
            return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def start(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        eps: float,
        scale: float,
        offset: float,
        center: bool,
        ctas: int,
        slot: int,
        site: int,
        fp32_residual: bool,
        sharded_residual: bool,
    ) -> Tensor:
        """Begin a site on the side stream; wait() gives its results. Returns an empty tensor, to hand to wait's op.

        x:        [..., H] this rank's partial sums
        residual: [..., H], dtype and shape of x, or None; read in own_rows only by two_shot.
                  Or what the slot's last site left with ``sharded_residual``
        weight:   [H], of x's dtype or float32, or None for ones; used as ``weight + offset``
        bias:     [H], of x's dtype, or None; added to the sum, which then is multiplied by ``scale``
        shift:    [H], of x's dtype or float32, or None; added to the norm. Only with ``center``
        center:   LayerNorm; otherwise RMSNorm
        ctas:     CTAs of the kernel; 0 leaves it open
        site:     number for error messages; NEXT_SITE counts on from the slot's last one
        fp32_residual:     the new residual is float32; possible together with ``sharded_residual`` only
        sharded_residual:    the new residual need only be good for the slot's next site
        """
        try:
            stream = self._current()
            call = self._begin(slot, x, stream)
            if call is None:
                self._pending[slot] = None, fp32_residual, x
                return x.new_empty(0)
            held = self._prepare(
                call, x, residual, weight, bias, shift, eps, scale, offset, center, self._number(slot, site), fp32_residual, sharded_residual,
                call.activations_at,
                call.whole_residual,
            )  # fmt: skip
            kernel, grid = call.launcher(center, ctas, call.ctas)
            events = self._events.get(slot) or self._make_events(slot)
            kernel.start(grid, call.arguments.address, stream, self._side, *events)
            self._pending[slot] = call, sharded_residual, held
            if not self._carveout:
                self._carveout = gemms.leave_out(grid)
            return call.token
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def wait(self, slot: int, in_workspace: bool) -> tuple[Tensor, Tensor]:
        """What the slot's start() began: (norm, residual), both [..., H], in x's dtype but for a float32 residual.

        in_workspace: the norm may be memory of the workspace, valid until the slot is next used; otherwise it is a new tensor.
        With ``sharded_residual`` the residual is memory of the workspace, float32, and means something to the slot's next site only.
        """
        if slot not in self._pending:
            raise RuntimeError(f"wait for slot {slot}, in which nothing was started")
        try:
            stream = self._current()
            if stream != self._on:
                self._follow(stream)
            call, sharded_residual, held = self._pop(slot)
            if call is None:
                return empty_results(held, sharded_residual)
            self._host.wait(stream, self._events[slot][1])
            norm = call.norm if in_workspace else call.norm.clone()
            return norm, call.carried() if sharded_residual else call.whole_residual.clone()
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def fused(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        eps: float,
        scale: float,
        offset: float,
        center: bool,
        ctas: int,
        slot: int,
        site: int,
        fp32_residual: bool,
        sharded_residual: bool,
        in_workspace: bool,
    ) -> tuple[Tensor, Tensor]:
        """start() and wait() in one, on the current stream."""
        try:
            stream = self._current()
            call = self._begin(slot, x, stream)
            if call is None:
                return empty_results(x, fp32_residual)
            norm, whole_residual = call.norm, call.whole_residual
            if call.one_shot:  # it writes for this rank only, and can do so anywhere
                norm = norm if in_workspace else _like(x)
                whole_residual = whole_residual if sharded_residual else _like(x)
            held = self._prepare(
                call, x, residual, weight, bias, shift, eps, scale, offset, center, self._number(slot, site), fp32_residual, sharded_residual,
                norm.data_ptr(), whole_residual,
            )  # fmt: skip
            kernel, grid = call.launcher(center, ctas, call.ctas_alone)
            kernel.launch(grid, call.arguments.address, stream)
            del held  # what reuses its memory runs later on this stream
            if not call.one_shot:
                norm = norm if in_workspace else norm.clone()
                whole_residual = whole_residual if sharded_residual else whole_residual.clone()
            return norm, call.carried() if sharded_residual else whole_residual
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def set_timeout(self, timeout_s: float) -> None:
        """timeout_s: how long a kernel waits for another rank from now on. CUDA graphs keep what they were captured with."""
        self.timeout_s = timeout_s
        for workspace in self._workspaces.values():
            workspace.arguments.set_timeout(timeout_s)

    def workspace_bytes(self) -> int:
        """Bytes of symmetric memory held on this rank."""
        return sum(workspace.bytes for workspace in self._workspaces.values())

    # ---- Behind them

    @property
    def error_address(self) -> int:
        return self._error.address

    def raise_if_lost(self, cause: BaseException | None = None) -> None:
        """Raises RuntimeError where a kernel has given up waiting for another rank."""
        self._error.raise_if_set(self.timeout_s, cause)

    def kernels(self, names: set[str], dtype: torch.dtype, hidden: int, center: bool) -> dict[str, nvrtc.Kernel]:
        """Those of these names. A collective the first time: no rank launches one while another has none."""
        keys = {name: (name, dtype, hidden, center) for name in sorted(names)}
        missing = [key for key in keys.values() if key not in self._kernels]
        if missing:
            kind = f"a {'LayerNorm' if center else 'RMSNorm'} of {dtype} [{hidden}]"
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"no kernel yet for {kind}, and none can be loaded while a CUDA graph is captured: run once un-captured at this "
                    "size first"
                )
            made = together(
                self.group_name, f"the compilation of the kernels for {kind}", lambda: {k: self._kernel(*k) for k in missing}, self.timeout_s
            )
            self._kernels |= made
        return {name: self._kernels[key] for name, key in keys.items()}

    def _kernel(self, name: str, dtype: torch.dtype, hidden: int, center: bool) -> nvrtc.Kernel:
        limit = torch.cuda.get_device_properties(self.device).shared_memory_per_block_optin
        layout = Layout.of(hidden, dtype.itemsize, self.world, self.name, center, limit)
        arch = nvrtc.architecture(torch.cuda.get_device_capability(self.device))
        two_shot = name == "two_shot"
        block, cluster = (layout.block, layout.cluster) if two_shot else ((layout.threads, 1), 1)
        wanted = macros(dtype, hidden, self.world, self.rank, self.name, center, layout)
        return nvrtc.cubin(name, arch, wanted, lambda image: nvrtc.Kernel(image, name, block, layout.shared[not two_shot], cluster))

    def _begin(self, slot: int, x: Tensor, stream: int) -> _Call | None:
        """What start() and fused() begin with: the call, None if there are no tokens."""
        if self._error.words[0]:
            self.raise_if_lost()
        if stream != self._on:
            self._follow(stream)
        if slot in self._pending:
            self._abandon(slot)
        return self._calls.get((slot, x.dtype, x.shape)) or (self._call(slot, x.dtype, x.shape) if x.numel() else None)

    def _call(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> _Call:
        """The call of a shape: remembered, or made now. One that is forgotten owns nothing: its workspace and kernels stay."""
        key = slot, dtype, shape
        call = self._calls.get(key) or self._older_calls.pop(key, None) or self._new_call(slot, dtype, shape)
        if key not in self._calls:
            if len(self._calls) >= MAX_CALLS // 2:
                self._calls, self._older_calls = {}, self._calls
            self._calls[key] = call
        return call

    def _new_call(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> _Call:
        hidden = shape[-1]
        if dtype not in _ELEMENTS:
            raise RuntimeError(f"dtype {dtype}: the kernels are for bfloat16, float16 and float32")
        if hidden % 8 or hidden > MAX_HIDDEN:
            raise RuntimeError(f"hidden size {hidden}: the kernels take multiples of 8 up to {MAX_HIDDEN}")
        rows = shape.numel() // hidden
        return _Call(self, self._workspace(slot, dtype, hidden, rows), shape, rows)

    def _workspace(self, slot: int, dtype: torch.dtype, hidden: int, rows: int) -> _Workspace:
        bucket = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
        key = slot, dtype, hidden, bucket
        if key not in self._workspaces:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"no workspace yet for {rows} tokens of {dtype} [{hidden}], and none can be made while a CUDA graph is "
                    "captured: run once un-captured at this size first"
                )
            # In a thread of its own, as what is allocated there belongs to nobody else: not to the memory pool of CUDA
            # graphs that are about to be captured, nor to an inference mode.
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                self._workspaces[key] = thread.submit(_Workspace, self, dtype, hidden, bucket).result()
        return self._workspaces[key]

    def _number(self, slot: int, site: int) -> int:
        self._sites[slot] = number = self._sites.get(slot, NEXT_SITE) + 1 if site == NEXT_SITE else site
        return number

    def _prepare(
        self, call, x, residual, weight, bias, shift, eps, scale, offset, center, site, fp32_residual, sharded_residual, norm_out: int,
        whole_residual: Tensor,
    ) -> tuple:  # fmt: skip
        """Bring the inputs to where the kernel reads them, on the current stream, and pack its arguments.

        Returns what must stay alive until the kernel has run.
        """
        if fp32_residual is not sharded_residual:
            raise RuntimeError("over symmetric memory a residual is float32 where it is sharded, and nowhere else")
        if shift is not None and not center:
            raise RuntimeError("only a LayerNorm has a shift")
        x_at = residual_at = weight_at = bias_at = shift_at = 0
        weight_is_float = shift_is_float = carried = False
        if call.one_shot:
            x, x_at = _readable(x)
        elif x.data_ptr() != call.activations_at or not x.is_contiguous():
            call.partials.copy_(x)  # two_shot reads it there
        if residual is not None:
            residual_at = residual.data_ptr()
            carried = residual_at == call.carried_at
            if not carried:
                if residual.dtype is not call.dtype or residual.shape != call.shape:
                    raise RuntimeError(f"residual is {residual.dtype} {[*residual.shape]}, but x {x.dtype} {[*x.shape]}")
                residual, residual_at = _readable(residual)
        if weight is not None:
            weight_is_float = weight.dtype is not call.dtype and _is_float("weight", weight, x)
            weight, weight_at = _readable(weight)
        if bias is not None:
            if bias.dtype is not call.dtype:
                raise RuntimeError(f"bias is {bias.dtype}; beside {x.dtype} it must be the same")
            bias, bias_at = _readable(bias)
        if shift is not None:
            shift_is_float = shift.dtype is not call.dtype and _is_float("shift", shift, x)
            shift, shift_at = _readable(shift)
        call.arguments.set(
            call.rows, x_at, residual_at, bias_at, weight_at, norm_out, call.carried_at if sharded_residual else whole_residual.data_ptr(),
            site, weight_is_float, carried, not sharded_residual, eps, scale, offset, shift_is_float, shift_at,
        )  # fmt: skip
        return x, residual, weight, bias, shift

    def _pop(self, slot: int) -> tuple:
        pending = self._pending.pop(slot)
        if self._carveout and not self._pending:
            self._carveout = False
            gemms.as_before()
        return pending

    def _make_events(self, slot: int) -> tuple[int, int]:
        self._events[slot] = self._host.event(self._context), self._host.event(self._context)
        return self._events[slot]

    def _follow(self, stream: int) -> None:
        """Let what is enqueued next on this stream, which is not the last call's, wait for all that is on that one.

        What is captured and what is not run at different times: the last call of the same kind counts.
        """
        captured = self._host.capture(self._context, stream)
        if captured:
            before = self._captured if self._on is None else self._uncaptured
            if before not in (None, stream) and self._host.capture(self._context, before) == captured:
                self._host.follow(self._context, before, stream, self._order)
            self._captured, self._on = stream, None
            return
        before = self._uncaptured
        if before not in (None, stream):
            if self._host.capture(self._context, before):
                raise RuntimeError("no call can be made while another thread captures a CUDA graph on the stream of the last one")
            self._host.follow(self._context, before, stream, self._order)
        self._uncaptured = self._on = stream
        self._external = _is_external(torch.cuda.current_stream(self.device).stream_id)

    def _leave(self) -> None:
        """Let the side stream stand for the last call's, which may be gone when another call comes; and one with its address be there."""
        if self._on is not None and not self._host.capture(self._context, self._on):
            self._host.follow(self._context, self._on, self._side, self._order)
            self._uncaptured, self._on = self._side, None

    def _drop(self, keys: set) -> None:
        """Give back workspaces that no kernel has run in yet."""
        for key in keys:
            workspace = self._workspaces.pop(key)
            for calls in (self._calls, self._older_calls):
                for which in [which for which, call in calls.items() if call.workspace is workspace]:
                    del calls[which]
        if keys:
            del workspace, calls
            gc.collect()  # some things in them refer to each other

    def _abandon(self, slot: int) -> None:
        """Forget a start() without wait(): its run failed in between. Its kernel may not have ended."""
        call, *_ = self._pop(slot)
        if call is not None and not torch.cuda.is_current_stream_capturing():
            with contextlib.suppress(RuntimeError):  # if that run was a capture; then no kernel runs either
                for stream in {self._current(), self._uncaptured} - {None}:  # what reuses the memory of its inputs runs behind it
                    self._host.wait(stream, self._events[slot][1])


def _with_own_storage(t: Tensor) -> Tensor:
    """The same memory, kept alive by the result, under a storage of its own. Not an inference tensor, wherever it is made."""
    with torch.inference_mode(False):
        return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(t))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _readable(t: Tensor) -> tuple[Tensor, int]:
    """t as the kernels can read it, contiguous and 16-byte aligned, and its address."""
    address = t.data_ptr()
    if address % 16 or not t.is_contiguous():
        t = t.clone(memory_format=torch.contiguous_format)
        address = t.data_ptr()
    return t, address


def _is_external(stream_id: int) -> bool:
    """Whether a stream is not torch's, by the number that torch gives it: odd for its own, 0 for the default one (CUDAStream.cpp)."""
    return stream_id != 0 and stream_id % 2 == 0


def _is_float(name: str, vector: Tensor, x: Tensor) -> bool:
    """True; raises RuntimeError for a vector that is not float32 where it is not of x's dtype."""
    if vector.dtype is not torch.float32:
        raise RuntimeError(f"{name} is {vector.dtype}; beside {x.dtype} it must be that, or float32")
    return True


def _not_neighbours(group_name: str, index: int) -> str | None:
    """Why the GPUs of the group cannot reach each other's memory, as far as this rank can know."""
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", 0))  # set by torchrun
    if on_host == 0:
        return None
    ranks = dist.get_process_group_ranks(resolve_process_group(group_name))
    if len({rank // on_host for rank in ranks}) > 1:
        return "the ranks of the group are not all on one host"
    if torch.cuda.device_count() < on_host:
        return None  # each rank sees GPUs of its own
    for device in (rank % on_host for rank in ranks):
        if device != index and not torch.cuda.can_device_access_peer(index, device):
            return f"GPU {index} cannot reach the memory of GPU {device}"
    return None


def _has_multicast(index: int) -> bool:
    if os.environ.get("TORCH_SYMM_MEM_DISABLE_MULTICAST", "0") not in ("", "0"):
        return False
    return SymmetricMemory.has_multicast_support(DeviceType.CUDA, index)
