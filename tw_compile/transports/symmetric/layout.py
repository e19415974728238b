"""How the rows of a call are divided among ranks, and a row among the threads of a kernel."""

from dataclasses import dataclass


def own_rows(rank: int, world: int, rows: int) -> tuple[int, int]:
    """The rows [begin, end) that a rank owns in a two_shot call. The parts are equal, except that the last ranks may have fewer."""
    part = -(-rows // world)
    return min(rank * part, rows), min((rank + 1) * part, rows)


@dataclass(frozen=True)
class Layout:
    """How a row is divided among the threads of a group (csrc/vector.cuh), and how much of it is in flight.

    Threads, unroll and chunks determine the order of summation, and so are the same for all kernels.

    threads: threads of a group
    unroll:  16-byte vectors of a thread in a chunk
    chunks:  chunks of a row
    groups:  groups of a two_shot CTA, each of which works on a row of its own; a one_shot CTA has one
    depth:   chunks that a two_shot thread has in flight
    cluster: CTAs of a cluster in two_shot
    shared:  (bytes of dynamic shared memory of a two_shot CTA, the same of a one_shot CTA)
    """

    threads: int
    unroll: int
    chunks: int
    groups: int
    depth: int
    cluster: int
    shared: tuple[int, int]

    SHAPES = (512, 2), (512, 1), (256, 1), (128, 1)  # (most threads, unroll); the first one that fits into shared memory is used
    MAX_THREADS, MAX_GROUPS = 1024, 4  # of a two_shot CTA
    MAX_DEPTH = 3  # of a single group; more is no faster
    GROUPS_DEPTH = 1  # of several groups: while one waits, rows of the others are in flight
    HOPPER = 227 * 1024  # bytes of shared memory of a CTA on GPUs that have clusters
    CLUSTER = 2
    ROOMY = 164 * 1024  # bytes of shared memory that leave enough L1, which shares the same memory, for the loads from this GPU

    @property
    def block(self) -> tuple[int, int]:
        """Threads of a two_shot CTA in x and y. All threads of a group have the same y."""
        return self.threads, self.groups

    @classmethod
    def of(cls, hidden: int, itemsize: int, world: int, transport: str, center: bool, shared_limit: int) -> "Layout":
        """The layout for a row of ``hidden`` elements of ``itemsize`` bytes.

        transport:    "peer" or "multimem"
        center:       True for a LayerNorm, False for an RMSNorm
        shared_limit: the most bytes of shared memory of a CTA
        Raises RuntimeError if that is too little.
        """
        vectors = hidden * itemsize // 16
        landing = world - 1 if transport == "peer" else 0  # vectors that are copied into shared memory, for each vector of the row
        for max_threads, unroll in cls.SHAPES:
            unroll = min(unroll, -(-vectors // 32))
            chunks = -(-vectors // (max_threads * unroll))
            threads = -(-vectors // (chunks * unroll * 32)) * 32
            kept = threads * unroll * chunks * 16 * (4 // itemsize) if chunks > 1 else 0
            fixed, chunk = 2 * 32 * 4 + kept, threads * unroll * landing * 16
            roomy = min(shared_limit, max(cls.ROOMY, fixed + chunk))
            groups = 1
            # With several groups a thread has few registers. They are enough for the RMSNorm of a row that divides evenly among the
            # threads, unless the data of other ranks comes to registers, as with multimem.

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
