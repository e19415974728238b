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
two_shot. Which it is: ``tuning``. Which rank owns which row: ``layout.own_rows``.
"""

import concurrent.futures
import contextlib
import functools
import gc
import threading

import torch
from torch import Tensor

from ...compat import current_raw_stream, resolve_process_group
from ...site import NEXT_SITE, Site, empty_results
from .. import agree
from ..together import together
from . import gemms, host, nvrtc, support
from .arguments import ELEMENTS, ErrorRecord, macros
from .launch import Call, like
from .layout import Layout
from .tuning import LEAST_ROWS, Tuning
from .workspace import Workspace

MAX_HIDDEN = 32768

# Shapes of calls that are remembered, at most: those that have not come for longest are forgotten, and cost some time when they come.
MAX_CALLS = 256


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
        self._error = ErrorRecord()
        self.lock, self._depth = threading.RLock(), 0
        self._workspaces = {}  # (slot, dtype, hidden, rows) -> Workspace
        self._calls, self._older_calls = {}, {}  # (slot, dtype, shape) -> Call; of both MAX_CALLS at most
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

    unavailable = staticmethod(support.unavailable)

    def another(self, tuning: Tuning) -> "Symmetric":
        """One with that tuning that shares nothing with this one: its memory is free again when it is dropped."""
        return Symmetric(self.group_name, self.device, self.name == "multimem", tuning=tuning)

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

    def start(self, site: Site) -> Tensor:
        """Begin a site on the side stream; wait() gives its results. Returns an empty tensor, to hand to wait's op.

        A whole residual is read in own_rows only by two_shot. One in float32 is possible where it is sharded, and nowhere else.
        """
        x, *_, slot, number, fp32_residual, sharded_residual = site
        try:
            stream = self._current()
            call = self._begin(slot, x, stream)
            if call is None:
                self._pending[slot] = None, fp32_residual, x
                return x.new_empty(0)
            number = self._number(slot, number)
            kernel, grid, held = call.prepare(site, number, call.activations_at, call.whole_residual, call.ctas)
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
        pending = self._pending.pop(slot, None)
        if pending is None:
            raise RuntimeError(f"wait for slot {slot}, in which nothing was started")
        try:
            call, sharded_residual, held = pending
            stream = self._current()
            if stream != self._on:
                self._follow(stream)
            if self._carveout and not self._pending:
                self._end_carveout()
            if call is None:
                return empty_results(held, sharded_residual)
            self._host.wait(stream, self._events[slot][1])
            norm = call.norm if in_workspace else call.norm.clone()
            return norm, call.carried() if sharded_residual else call.whole_residual.clone()
        except RuntimeError as error:
            self.raise_if_lost(error)
            raise

    def fused(self, site: Site, in_workspace: bool) -> tuple[Tensor, Tensor]:
        """start() and wait() in one, on the current stream."""
        x, sharded_residual = site.x, site.sharded_residual
        try:
            stream = self._current()
            call = self._begin(site.slot, x, stream)
            if call is None:
                return empty_results(x, site.fp32_residual)
            norm, whole_residual = call.norm, call.whole_residual
            if call.one_shot:  # it writes for this rank only, and can do so anywhere
                norm = norm if in_workspace else like(x)
                whole_residual = whole_residual if sharded_residual else like(x)
            number = self._number(site.slot, site.number)
            kernel, grid, held = call.prepare(site, number, norm.data_ptr(), whole_residual, call.ctas_alone)
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

    def _begin(self, slot: int, x: Tensor, stream: int) -> Call | None:
        """What start() and fused() begin with: the call, None if there are no tokens."""
        if self._error.words[0]:
            self.raise_if_lost()
        if stream != self._on:
            self._follow(stream)
        if slot in self._pending:
            self._abandon(slot)
        return self._calls.get((slot, x.dtype, x.shape)) or (self._call(slot, x.dtype, x.shape) if x.numel() else None)

    def _call(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Call:
        """The call of a shape: remembered, or made now. One that is forgotten owns nothing: its workspace and kernels stay."""
        key = slot, dtype, shape
        call = self._calls.get(key) or self._older_calls.pop(key, None) or self._new_call(slot, dtype, shape)
        if key not in self._calls:
            if len(self._calls) >= MAX_CALLS // 2:
                self._calls, self._older_calls = {}, self._calls
            self._calls[key] = call
        return call

    def _new_call(self, slot: int, dtype: torch.dtype, shape: torch.Size) -> Call:
        hidden = shape[-1]
        if dtype not in ELEMENTS:
            raise RuntimeError(f"dtype {dtype}: the kernels are for bfloat16, float16 and float32")
        if hidden % 8 or hidden > MAX_HIDDEN:
            raise RuntimeError(f"hidden size {hidden}: the kernels take multiples of 8 up to {MAX_HIDDEN}")
        rows = shape.numel() // hidden
        return Call(self, self._workspace(slot, dtype, hidden, rows), shape, rows)

    def _workspace(self, slot: int, dtype: torch.dtype, hidden: int, rows: int) -> Workspace:
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
                self._workspaces[key] = thread.submit(Workspace, self, dtype, hidden, bucket).result()
        return self._workspaces[key]

    def _number(self, slot: int, number: int) -> int:
        self._sites[slot] = number = self._sites.get(slot, NEXT_SITE) + 1 if number == NEXT_SITE else number
        return number


    def _end_carveout(self) -> None:
        self._carveout = False
        gemms.as_before()

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
        call, *_ = self._pending.pop(slot)
        if self._carveout and not self._pending:
            self._end_carveout()
        if call is not None and not torch.cuda.is_current_stream_capturing():
            with contextlib.suppress(RuntimeError):  # if that run was a capture; then no kernel runs either
                for stream in {self._current(), self._uncaptured} - {None}:  # what reuses the memory of its inputs runs behind it
                    self._host.wait(stream, self._events[slot][1])


def _is_external(stream_id: int) -> bool:
    """Whether a stream is not torch's, by the number that torch gives it: odd for its own, 0 for the default one (CUDAStream.cpp)."""
    return stream_id != 0 and stream_id % 2 == 0


