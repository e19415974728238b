"""How the work of a call is laid out over ranks, and over the threads of a kernel."""

from dataclasses import dataclass


def own_rows(rank: int, world: int, rows: int) -> tuple[int, int]:
    """The rows [begin, end) that a rank owns in a two-shot call: equal parts, but for the last ranks'."""
    part = -(-rows // world)
    return min(rank * part, rows), min((rank + 1) * part, rows)


@dataclass(frozen=True)
class Layout:
    """How the threads of a group share a row (csrc/vector.cuh), and what of it is in flight.

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
