/* The protocol of the kernels, for spin: csrc/sync.cuh, two_shot.cuh, one_shot.cuh, and the calls of transports/symmetric/transport.py around
 * them. The names are theirs. tests/test_protocol.py runs it, whole and with mistakes put in: the macros after #ifdef.
 *
 * All ranks make the same CALLS calls in one workspace. A call is a GEMM that writes the partial sums, the kernel's CTAs, and
 * the next layer, which reads the norms. Any kind of call may follow any other: of the other kernel, which shares flags and
 * epochs, and of another grid, so that a CTA takes part in one call and not in the next.
 *
 * Memory is as weak as PTX has it. A plain store lands, and a plain load is satisfied, at no particular moment; another
 * agent's access is over only if it "happens before" one's own: by release and acquire, or by the order of a stream. Vector
 * clocks keep account of that, and every access is checked against them, in whichever order spin happens to run the two. So
 * a store that may land too late, and a load that may be satisfied too early or too late, is an error even though the model
 * itself runs it at once; and that is why the accesses between two flags can be one step of the model.
 * A release is cumulative: it carries all that happens before it. An acquire learns what the awaited release carried, and no
 * more if the flag has moved on meanwhile: what is known is then the least that can be, whoever runs ahead.
 *
 * Errors: the asserts, of which each says what it is about, and waiting without end, which spin calls an invalid end state.
 *
 * Not here: the threads of a CTA, which its __syncthreads make one agent; multimem and its proxy fences; the residual, which
 * goes the way of the norms; epochs, which are private to a CTA, as memory; the site and the rows in a flag, which are the same on
 * all ranks or end everything; the timeout; the making of a workspace; the side
 * stream; two workspaces, which share nothing.
 */

#ifndef RANKS
#define RANKS 2
#endif
#ifndef CTAS
#define CTAS 2    /* of a rank, at most */
#endif
#ifndef CALLS
#define CALLS 3
#endif
#ifndef SMS
#define SMS CTAS  /* of a rank: the CTAs that it can run at a time */
#endif

#define ROWS (RANKS * CTAS)  /* of the workspace */

/* ---- Agents, and what they know. An agent does one thing after the other: the stream of a rank, which runs the GEMM and
 * the next layer; and each of its CTAs, one agent for all kernels, as its flags and its epoch are there for all kernels. */

#define AGENTS       (RANKS * (1 + CTAS))
#define STREAM(r)    ((r) * (1 + CTAS))
#define CTA(r, i)    ((r) * (1 + CTAS) + 1 + (i))

typedef Clock { byte time[AGENTS] };

Clock now[AGENTS];  /* what b did up to its time now[a].time[b] happens before what a does next */

hidden byte b;      /* counts in d_steps */

inline learn(a, clock) {
  for (b : 0 .. AGENTS - 1) {
    if
    :: now[a].time[b] < clock.time[b] -> now[a].time[b] = clock.time[b]
    :: else
    fi
  }
}

/* What a does from now on is not in what others have learned. */
inline tick(a) { now[a].time[a]++ }

/* ---- Memory: places for a row, with what each holds, its last write, and the reads since. What is written to a place grows
 * with time. */

#define PARTIAL(call, row)  (1 + 2 * ((call) * ROWS + (row)))
#define NORM(call, row)     (2 + 2 * ((call) * ROWS + (row)))

typedef Place { byte holds; byte writer; byte written_at; byte read_at[AGENTS] };

Place activations[RANKS * ROWS];
Place staging[RANKS * CTAS * 2];
#define ACTIVATIONS(r, row)    activations[(r) * ROWS + (row)]
#define STAGING(r, i, place)   staging[((r) * CTAS + (i)) * 2 + (place)]

#define UNSEEN(a, place)       (now[a].time[place.writer] < place.written_at)

hidden byte read_before_write, overwrite_before_write, overwrite_before_read, stale_norm, far_ahead;

inline read(a, place, value) {
  overwrite_before_read = place.holds > value;
  assert(!overwrite_before_read);
  read_before_write = place.holds < value || UNSEEN(a, place);
  assert(!read_before_write);
  place.read_at[a] = now[a].time[a]
}

inline write(a, place, value) {
  overwrite_before_write = UNSEEN(a, place);
  assert(!overwrite_before_write);
  for (b : 0 .. AGENTS - 1) {
    overwrite_before_read = now[a].time[b] < place.read_at[b];
    assert(!overwrite_before_read);
    place.read_at[b] = 0
  }
  place.holds = value;
  place.writer = a;
  place.written_at = now[a].time[a]
}

/* ---- The calls. The first rank to come chooses. */

mtype = { two_shot_kernel, one_shot_kernel };
typedef Call { mtype kernel; byte rows; byte grid };

Call calls[CALLS];
byte chosen;          /* calls so far */
byte call_of[RANKS];  /* at which call a rank is */
#define call call_of[r]

inline set(kernel_, rows_, grid_) {
  calls[chosen].kernel = kernel_;
  calls[chosen].rows = rows_;
  calls[chosen].grid = grid_
}

inline choose() {
  if
  :: set(two_shot_kernel, ROWS, CTAS)
  :: set(two_shot_kernel, ROWS - 1, CTAS)  /* the last rank has fewer rows, or none */
#if CTAS > 1
  :: set(two_shot_kernel, ROWS, 1)
#endif
  :: set(one_shot_kernel, CTAS, CTAS)
  :: set(one_shot_kernel, 2, 1)            /* two rounds */
  fi;
  chosen++
}

/* ---- csrc/sync.cuh. From here on: CTA i of rank r, which is agent a */

/* Of a flag only the epoch is here, in as many bits as it has there. The kernels have been running for long: it wraps within three
 * barriers. */
#define WORD      16
#define AT_FIRST  (WORD - 2)

byte epochs[RANKS * CTAS] = AT_FIRST;
byte pad[RANKS * CTAS * RANKS] = AT_FIRST;
#define FLAG(p, i, r)          (((p) * CTAS + (i)) * RANKS + (r))  /* in the pad of p, written by r */

Clock carried[RANKS * CTAS * 2];  /* by the last two releases of a CTA: nobody still waits for an older one */
#define CARRIED(r, i, epoch)   carried[((r) * CTAS + (i)) * 2 + (epoch) % 2]

#ifdef FLAGS_RESET
#define FLAG_OF(epoch) 1
#else
#define FLAG_OF(epoch) epoch
#endif

#define AHEAD(flag) ((flag - FLAG_OF(epoch) + WORD) % WORD)  /* negative numbers are those from WORD / 2 on */

#if defined(WAIT_FOR_EQUAL) || defined(FLAGS_RESET)
#define ARRIVED(flag) (AHEAD(flag) == 0)
#elif defined(WAIT_UNSIGNED)
#define ARRIVED(flag) (flag >= epoch)
#elif defined(WAIT_ONE_SHORT)
#define ARRIVED(flag) ((AHEAD(flag) + 1) % WORD < WORD / 2)
#else
#define ARRIVED(flag) (AHEAD(flag) < WORD / 2)
#endif
#define ARRIVED_FROM(p) (p >= RANKS || ARRIVED(pad[FLAG(r, i, p)]))

inline open() { epoch = epochs[r * CTAS + i] }

/* store_release_sys into each pad. In one step: a peer that gets its flag later is one that looks later. */
inline arrive() {
  d_step {
    epoch = (epoch + 1) % WORD;
#ifndef FLAG_WITHOUT_RELEASE
    for (b : 0 .. AGENTS - 1) { CARRIED(r, i, epoch).time[b] = now[a].time[b] }
#endif
    tick(a);
    for (p : 0 .. RANKS - 1) { pad[FLAG(p, i, r)] = FLAG_OF(epoch) }
    p = 0
  }
}

/* load_acquire_sys from each word of the own pad, until all have arrived */
inline wait() {
  d_step {
    ARRIVED_FROM(0) && ARRIVED_FROM(1) && ARRIVED_FROM(2) && ARRIVED_FROM(3) ->
    for (p : 0 .. RANKS - 1) {
      far_ahead = AHEAD(pad[FLAG(r, i, p)]) > 1 && AHEAD(pad[FLAG(r, i, p)]) < WORD / 2;
      assert(!far_ahead);  /* see carried */
#ifdef FLAGS_RESET
      pad[FLAG(r, i, p)] = 0;
#endif
#ifndef FLAG_WITHOUT_ACQUIRE
      learn(a, CARRIED(p, i, epoch));
#endif
    }
    p = 0
  }
}

inline close() {
#ifndef EPOCH_NOT_STORED
  epochs[r * CTAS + i] = epoch;
#endif
  epoch = 0
}

/* ---- How a CTA begins and ends */

byte waiting[RANKS];           /* the CTAs of the running kernel that have not begun, a bit each */
byte left[RANKS];              /* how many have not ended */
byte free_sms[RANKS] = SMS;

/* Where a rank cannot run all CTAs of the grid at a time, all ranks must begin them in the same order. */
#ifdef CTAS_IN_ANY_ORDER
#define NEXT true
#else
#define NEXT ((waiting[r] & ((1 << i) - 1)) == 0)
#endif

inline begin(kernel_) {
  d_step {
    (waiting[r] & (1 << i)) && NEXT && free_sms[r] > 0 && calls[call].kernel == kernel_ ->
    waiting[r] = waiting[r] & ~(1 << i);
    free_sms[r]--;
    tick(a);
    learn(a, now[STREAM(r)]);
    open()
  }
}

inline end() {
  d_step {
    close();
    free_sms[r]++;
    left[r]--
  }
}

/* ---- csrc/two_shot.cuh */

#define PER_RANK   ((calls[call].rows + RANKS - 1) / RANKS)
#define BEGIN      (r * PER_RANK)
#define END        ((r + 1) * PER_RANK < calls[call].rows -> (r + 1) * PER_RANK : calls[call].rows)

inline two_shot() {
  begin(two_shot_kernel);
#ifndef NO_ENTRY_BARRIER
  arrive();
  wait();
#endif
#ifdef ARRIVE_BEFORE_READS
  arrive();
#endif
  d_step {  /* fetch the CTA's rows among the rank's own, from all ranks */
    row = BEGIN + i;
    do
    :: row < END ->
       for (p : 0 .. RANKS - 1) { read(a, ACTIVATIONS(p, row), PARTIAL(call, row)) }
       row = row + calls[call].grid
    :: else -> break
    od;
    p = 0; row = 0
  }
#ifdef ARRIVE_BEFORE_STORES
  arrive();
#endif
  d_step {  /* store their norms to all ranks, in place */
    row = BEGIN + i;
    do
    :: row < END ->
       for (p : 0 .. RANKS - 1) { write(a, ACTIVATIONS(p, row), NORM(call, row)) }
       row = row + calls[call].grid
    :: else -> break
    od;
    p = 0; row = 0
  }
#if defined(ARRIVE_BEFORE_READS) || defined(ARRIVE_BEFORE_STORES)
  wait();
#elif !defined(NO_EXIT_BARRIER)
  arrive();
  wait();
#endif
  end()
}

/* ---- csrc/one_shot.cuh. x and norm_out are the activations of the workspace: they may be, and it is the harder case. */

#ifdef ONE_STAGING_PLACE
#define STAGING_PLACE 0
#else
#define STAGING_PLACE (epoch % 2)
#endif

inline one_shot() {
  begin(one_shot_kernel);
  row = i;
  do
  :: row < calls[call].rows ->
     d_step {  /* copy */
       place = STAGING_PLACE;
       read(a, ACTIVATIONS(r, row), PARTIAL(call, row));
       write(a, STAGING(r, i, place), PARTIAL(call, row))
     }
#ifndef NO_ENTRY_BARRIER
     arrive();
     wait();
#endif
     d_step {  /* fetch from all ranks, store here */
       for (p : 0 .. RANKS - 1) { read(a, STAGING(p, i, place), PARTIAL(call, row)) }
       write(a, ACTIVATIONS(r, row), NORM(call, row));
       p = 0; place = 0;
       row = row + calls[call].grid
     }
  :: else -> break
  od;
  row = 0;
  end()
}

proctype Cta(byte r; byte i) {
  byte a = CTA(r, i), epoch, p, row, place;

end_of_calls:  /* here a CTA may be in the end, and nowhere else */
  do
  :: two_shot()
  :: one_shot()
  od
}

/* ---- The stream of rank r. A kernel begins with what the stream knows and the stream goes on with what its CTAs know. */

inline gemm_and_launch() {
  if
  :: call == chosen -> choose()
  :: else
  fi;
  d_step {
    for (row : 0 .. calls[call].rows - 1) { write(a, ACTIVATIONS(r, row), PARTIAL(call, row)) }
    row = 0;
    left[r] = calls[call].grid;
    waiting[r] = (1 << calls[call].grid) - 1
  }
}

inline next_layer() {
  d_step {
    tick(a);
    for (i : 0 .. calls[call].grid - 1) { learn(a, now[CTA(r, i)]) }
    i = 0;
    for (row : 0 .. calls[call].rows - 1) {
      stale_norm = ACTIVATIONS(r, row).holds != NORM(call, row) || UNSEEN(a, ACTIVATIONS(r, row));
      assert(!stale_norm);
      ACTIVATIONS(r, row).read_at[a] = now[a].time[a]
    }
    row = 0;
    call++
  }
}

proctype Stream(byte r) {
  byte a = STREAM(r), i, row;

  atomic { gemm_and_launch() }
  do
  :: atomic {
       left[r] == 0 -> next_layer();
       if
       :: call < CALLS -> gemm_and_launch()
       :: else -> break
       fi
     }
  od
}

init {
  byte r, i;

  atomic {
    for (r : 0 .. AGENTS - 1) { tick(r) }
    for (r : 0 .. RANKS - 1) {
      run Stream(r);
      for (i : 0 .. CTAS - 1) { run Cta(r, i) }
    }
    r = 0; i = 0
  }
}
