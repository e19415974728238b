"""The transports over symmetric memory. A site is one kernel launch, in which the ranks read and write each other's memory.

Workspaces. A workspace is memory that all ranks have mapped. It has activations, where the kernels read partial sums and write norms;
the carried residual and the whole residual; and memory that only the kernels use. There is one for each slot, dtype, hidden size and
power of two of rows. It is made on first use, by all ranks or by none, and is kept, as captured CUDA graphs contain its addresses.

Streams and threads. As with NCCL's communicators, the calls of a slot run one after the other, on whichever stream and thread they are
made, since a slot has one workspace. A call on another stream than the last call's waits, on the GPU, for the work on that stream. Calls
that belong together, such as a start and its wait or the calls of a graph, are made within ``call()``, which keeps other threads out.
All ranks must make the calls of all groups on a GPU in the same order, as with NCCL: kernels of two groups that wait in opposite orders
on two ranks may deadlock. With several threads the user must ensure this order. The user must also order replays of CUDA graphs that the
user has captured, which this module does not see, if they are on several streams. (Replays of Inductor's CUDA graphs are within a call
of the compiled model.) While a CUDA graph is captured, no other thread may make calls.

Kernels (``csrc/``). With one_shot, for few tokens, each rank finishes all rows for itself. With two_shot each rank finishes its own rows
for all ranks. ``tuning`` chooses between them, and ``layout.own_rows`` has the rows of each rank.
"""

import concurrent.futures
import contextlib
import functools
import gc
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...compat import current_raw_stream, resolve_process_group
from ...site import NEXT_SITE, Planned, empty_results
from ...wording import count
from .. import agree
from ..together import together
from . import gemms, host, nvrtc, support
from .arguments import ELEMENTS, ErrorRecord, macros
from .launch import Call
from .layout import Layout
from .tuning import LEAST_ROWS, Tuning
from .workspace import Workspace

MAX_HIDDEN = 32768

# The most shapes for which a Call is kept. The least recently used ones are dropped; the next call with such a shape takes longer.
MAX_CALLS = 256


class Symmetric:
    """Sites over symmetric memory. One for each process group and device.

    name: "peer": loads and stores through a pointer to each rank's memory; or "multimem": NVLink multicast, where the switch adds
    lock: is held by ``call()``. It may be replaced by the lock of another object before the first call

    All ranks must make the same calls in the same order. x is bfloat16, float16 or float32. Its last dimension H is a multiple of 8 up to
    32768, and the other dimensions are tokens. If a rank is lost or late, the others raise a RuntimeError that names it.
    """

    def __init__(
        self,
        group_name: str,
        device: torch.device,
        multicast: bool,
        timeout_s: float = agree.PATIENCE_S,
        tuning: Tuning | None = None,
    ) -> None:
        """Not a collective.

        multicast: True for multimem, False for peer
        timeout_s: seconds that a kernel waits for another rank, which may be compiling
        tuning:    the same on all ranks; None to measure one for each dtype and hidden size
        """
        group = resolve_process_group(group_name)
        self.name = "multimem" if multicast else "peer"
        self.group_name, self.timeout_s, self.tuning = group_name, timeout_s, tuning
        self.rank, self.world = group.rank(), group.size()
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._error = ErrorRecord()
        self.lock, self._depth = threading.RLock(), 0
        self._workspaces: dict[tuple[int, torch.dtype, int, int], Workspace] = {}  # (slot, dtype, hidden, rows) -> Workspace
        self._calls: dict[tuple[int, torch.dtype, torch.Size], Call] = {}  # (slot, dtype, shape) -> Call, recently used ones
        self._older_calls: dict[tuple[int, torch.dtype, torch.Size], Call] = {}
        self._latest: dict[int, Call] = {}  # slot -> its last Call: to compare it takes less time than to hash a shape
        self._kernels: dict[tuple[str, torch.dtype, int, bool, str], nvrtc.Kernel] = {}  # (name, dtype, hidden, center, output) -> Kernel
        # slot -> what wait() needs of start(), and what must stay alive until then; no Call without tokens
        self._pending: dict[int, tuple[Call | None, tuple, Any, Any]] = {}
        self._carveout = False  # whether SMs are reserved for its kernels
        self._stream = torch.cuda.Stream(self.device, priority=-1)  # CTAs of its kernels come before those of GEMMs
        self.side = self._stream.cuda_stream
        self._current = functools.partial(current_raw_stream, self.device.index)
        self._host = host.calls()
        self._context = self._host.context(self.device.index)
        self._order = self._host.event(self._context)
        self._on: int | None = None  # the stream of the last call; None if there was none yet, or it was captured
        self._uncaptured: int | None = None  # the stream of the last call that was not captured
        self._captured: int | None = None  # the stream of the last call that was captured
        self._external = False  # whether the last call's stream is not PyTorch's, and may be destroyed after call()
        self._events: dict[int, tuple[int, int]] = {}  # slot -> (fork, done)
        self._sites: dict[int, int] = {}  # slot -> the number of its last site

    unavailable = staticmethod(support.unavailable)

    def another(self, tuning: Tuning) -> "Symmetric":
        """A new transport of the same kind, with memory of its own, which is freed when the transport is dropped."""
        return Symmetric(self.group_name, self.device, self.name == "multimem", tuning=tuning)

    # ---- Around the ops

    def call(self) -> "Symmetric":
        """``with transport.call():`` around calls that belong together, such as those of a graph. May be nested.

        Calls of other threads wait until it ends. Its end drops sites that were started and not waited for, as after an exception, and
        restores the SM carveout.
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

    def __exit__(self, *error: object) -> None:
        try:
            self._depth -= 1
            if not self._depth or any(error):
                for slot in [*self._pending]:
                    self._abandon(slot)
            if not self._depth and self._external:
                self._leave()
        finally:
            self.lock.release()

    def prepare(self, calls: Iterable[Planned]) -> None:
        """Make the workspaces and kernels of calls, so that the calls make none. A collective.

        Raises WorkspaceError on all ranks if a rank cannot make them. Then no workspace is made.
        """
        before = set(self._workspaces)
        try:
            for slot, dtype, shape, center, output in calls:
                if 0 not in shape:
                    self._call(slot, dtype, torch.Size(shape)).workspace.kernels(center, output)
        except RuntimeError as error:
            self._drop(set(self._workspaces) - before)
            self.raise_if_lost(error)
            raise

    # ---- The ops

    def partials(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
        """Memory [..., H] in the workspace for x of the slot's next site, which then needs no copy. It is written after the last site."""
        stream = self._current()
        if stream != self._on:
            self._follow(stream)
        return torch.empty(shape, dtype=dtype, device=self.device) if 0 in shape else self._call(slot, dtype, shape).partials

    def linear(self, a: Tensor, b: Tensor, bias: Tensor | None, slot: int) -> Tensor:
        """a @ b, or a @ b + bias, in the workspace.

        a: [M, K]; b: [K, H]; bias: [H], [M, H], or None; it may be the result of the slot's last linear()
        Returns [M, H], valid until the next use of the slot.
        """
        try:
            out = self.partials(slot, a.dtype, torch.Size((a.shape[0], b.shape[1])))
            return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def start(self, site: tuple) -> Tensor:
        """Begin a site on the side stream. wait() returns its results.

        site: a Site, or its fields as a plain tuple, from which fields are read by position: to make a Site takes longer
        Returns a tensor without elements, for the op ``wait``. Raises RuntimeError if fp32_residual and sharded_residual differ.
        two_shot reads only ``own_rows`` of a residual that is not sharded.
        """
        x, slot, number, quantise = site[0], site[10], site[11], site[14]
        try:
            stream = self._current()
            call = self._begin(slot, number, x, stream)
            if call is None:
                self._pending[slot] = None, site, None, None
                return x.new_empty(0)
            outputs = call.in_workspace(quantise)
            launch, grid, held = call.prepare(site, self._sites[slot], outputs, call.ctas)
            self._host.start(launch, stream)
            self._pending[slot] = call, site, outputs, held
            if not self._carveout:
                self._carveout = gemms.reserve_sms(grid)
            return call.token
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def wait(self, slot: int, in_workspace: bool) -> tuple[Tensor, ...]:
        """The results of the slot's start(): (norm, residual), both [..., H], in the dtype of x, and what a quantisation adds.

        in_workspace: all but the residual may be in the workspace, valid until the next use of the slot; otherwise they are new tensors
        With ``sharded_residual`` the residual is float32, in the workspace, and only for the slot's next site.
        """
        pending = self._pending.pop(slot, None)
        if pending is None:
            raise RuntimeError(f"wait for slot {slot} without a start")
        try:
            call, site, outputs, _ = pending
            stream = self._current()
            if stream != self._on:
                self._follow(stream)
            if self._carveout and not self._pending:
                self._end_carveout()
            if call is None:
                return _nothing(site)
            self._host.wait(stream, call.done)
            return call.results(site, outputs, in_workspace)
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def fused(self, site: tuple, in_workspace: bool) -> tuple[Tensor, ...]:
        """start() and wait() in one kernel launch on the current stream."""
        x, slot, number = site[0], site[10], site[11]
        try:
            stream = self._current()
            call = self._begin(slot, number, x, stream)
            if call is None:
                return _nothing(site)
            outputs = call.outputs(site, in_workspace)
            launch, _, held = call.prepare(site, self._sites[slot], outputs, call.ctas_alone)
            self._host.launch(launch, stream)
            del held  # its memory is reused later on this stream
            return call.results(site, outputs, in_workspace)
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def set_timeout(self, timeout_s: float) -> None:
        """timeout_s: seconds that kernels launched from now on wait for another rank. Captured CUDA graphs keep their timeout"""
        self.timeout_s = timeout_s
        for workspace in self._workspaces.values():
            workspace.arguments.set_timeout(timeout_s)

    def workspace_bytes(self) -> int:
        """Bytes of symmetric memory held on this rank."""
        return sum(workspace.bytes for workspace in self._workspaces.values())

    # ---- Internals

    @property
    def error_address(self) -> int:
        return self._error.address

    def raise_if_lost(self, cause: BaseException | None = None) -> None:
        """Raise RuntimeError if a kernel has given up waiting for another rank."""
        self._error.raise_if_set(self.timeout_s, cause)

    def kernels(self, names: set[str], dtype: torch.dtype, hidden: int, center: bool, output: str) -> dict[str, nvrtc.Kernel]:
        """name -> kernel. A collective the first time: no rank launches a kernel that another rank could not load."""
        keys = {name: (name, dtype, hidden, center, output) for name in sorted(names)}
        missing = [key for key in keys.values() if key not in self._kernels]
        if missing:
            kind = f"a {'LayerNorm' if center else 'RMSNorm'} of {dtype} [{hidden}]"
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"the kernels for {kind} cannot be loaded while a CUDA graph is captured: run this size once without capture first"
                )
            what = f"the compilation of the kernels for {kind}"
            self._kernels |= together(self.group_name, what, lambda: {k: self._kernel(*k) for k in missing}, self.timeout_s)
        return {name: self._kernels[key] for name, key in keys.items()}

    def _kernel(self, name: str, dtype: torch.dtype, hidden: int, center: bool, output: str) -> nvrtc.Kernel:
        limit = torch.cuda.get_device_properties(self.device).shared_memory_per_block_optin
        layout = Layout.of(hidden, dtype.itemsize, self.world, self.name, center, limit)
        arch = nvrtc.architecture(torch.cuda.get_device_capability(self.device))
        two_shot = name == "two_shot"
        block, cluster = (layout.block, layout.cluster) if two_shot else ((layout.threads, 1), 1)
        wanted = macros(dtype, hidden, self.world, self.rank, self.name, center, layout, output)
        return nvrtc.cubin(name, arch, wanted, lambda image: nvrtc.Kernel(image, name, block, layout.shared[not two_shot], cluster))

    def _begin(self, slot: int, number: int, x: Tensor, stream: int) -> Call | None:
        """The common beginning of start() and fused(). Returns the Call; None if there are no tokens.

        number: of the site, which is kept in _sites
        """
        if self._error.words[0]:
            self.raise_if_lost()
        if stream != self._on:
            self._follow(stream)
        if slot in self._pending:
            self._abandon(slot)
        self._sites[slot] = self._sites.get(slot, NEXT_SITE) + 1 if number == NEXT_SITE else number
        call, shape = self._latest.get(slot), x.shape
        if call is not None and call.shape == shape and call.dtype is x.dtype:
            return call
        return self._call(slot, x.dtype, shape) if x.numel() else None

    def _call(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Call:
        """The Call for a shape, which is made if there is none. A Call that is dropped owns no workspace and no kernels: they are kept."""
        key = slot, dtype, shape
        call = self._calls.get(key) or self._older_calls.pop(key, None) or self._new_call(slot, dtype, shape)
        if key not in self._calls:
            if len(self._calls) >= MAX_CALLS // 2:
                self._calls, self._older_calls = {}, self._calls
            self._calls[key] = call
        self._latest[slot] = call
        return call

    def _new_call(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Call:
        hidden = shape[-1]
        if dtype not in ELEMENTS:
            raise RuntimeError(f"dtype {dtype}: the kernels support bfloat16, float16 and float32")
        if hidden % 8 or hidden > MAX_HIDDEN:
            raise RuntimeError(f"hidden size {hidden}: the kernels support multiples of 8 up to {MAX_HIDDEN}")
        rows = shape.numel() // hidden
        events = self._events.get(slot) or self._make_events(slot)
        return Call(self, self._workspace(slot, dtype, hidden, rows), shape, rows, *events)

    def _workspace(self, slot: int, dtype: torch.dtype, hidden: int, rows: int) -> Workspace:
        bucket = max(LEAST_ROWS, 1 << (rows - 1).bit_length())
        key = slot, dtype, hidden, bucket
        if key not in self._workspaces:
            if torch.cuda.is_current_stream_capturing():
                what = f"a workspace for {count(rows, 'token')} of {dtype} [{hidden}]"
                raise RuntimeError(f"{what} cannot be made while a CUDA graph is captured: run this size once without capture first")
            # Another thread allocates it, which has no memory pool of CUDA graphs that are captured next, and no inference mode.
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                self._workspaces[key] = thread.submit(Workspace, self, dtype, hidden, bucket).result()
        return self._workspaces[key]

    def _end_carveout(self) -> None:
        self._carveout = False
        gemms.release_sms()

    def _make_events(self, slot: int) -> tuple[int, int]:
        self._events[slot] = self._host.event(self._context), self._host.event(self._context)
        return self._events[slot]

    def _follow(self, stream: int) -> None:
        """Let later work on this stream wait for the work on the stream of the last call, which is another one.

        Captured calls wait for captured calls only, and others for others, as the two run at different times.
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
                raise RuntimeError("a call cannot be made while another thread captures a CUDA graph on the stream of the last call")
            self._host.follow(self._context, before, stream, self._order)
        self._uncaptured = self._on = stream
        self._external = _is_external(torch.cuda.current_stream(self.device).stream_id)

    def _leave(self) -> None:
        """Let the side stream take the place of the last call's, which may be destroyed before the next call, and its address reused."""
        if self._on is not None and not self._host.capture(self._context, self._on):
            self._host.follow(self._context, self._on, self.side, self._order)
            self._uncaptured, self._on = self.side, None

    def _drop(self, keys: set[tuple[int, torch.dtype, int, int]]) -> None:
        """Free workspaces that no kernel has used yet."""
        for key in keys:
            workspace = self._workspaces.pop(key)
            for calls in (self._calls, self._older_calls):
                for which in [which for which, call in calls.items() if call.workspace is workspace]:
                    del calls[which]
            self._latest = {}
        if keys:
            del workspace, calls
            gc.collect()  # frees the workspaces, which contain reference cycles

    def _abandon(self, slot: int) -> None:
        """Drop a site that was started and not waited for, as the call failed in between. Its kernel may still run."""
        call, *_ = self._pending.pop(slot)
        if self._carveout and not self._pending:
            self._end_carveout()
        if call is not None and not torch.cuda.is_current_stream_capturing():
            with contextlib.suppress(RuntimeError):  # raised if that call was captured; then no kernel runs either
                for stream in {self._current(), self._uncaptured} - {None}:  # the memory of its inputs is reused on these streams
                    self._host.wait(stream, call.done)


def _nothing(site: tuple) -> tuple[Tensor, ...]:
    """The results of a site without tokens."""
    x, *_, fp32_residual, _, quantise, _ = site
    return empty_results(x, fp32_residual, quantise)


def _is_external(stream_id: int) -> bool:
    """Whether PyTorch did not create a stream. PyTorch gives its own streams odd ids, and the default stream 0 (CUDAStream.cpp)."""
    return stream_id != 0 and stream_id % 2 == 0
