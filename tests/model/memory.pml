/* Shared memory as processors really have it, for the other models: included by them, no model by itself.
 *
 * Every processor has a store buffer: a store goes there first and into memory later, at a time of its own, done by a
 * process `drain`. A load sees the processor's own buffered stores, then memory. MEMORY chooses how weak it is:
 *
 *   SC    no buffer: every store is seen at once by everybody
 *   TSO   x86: the buffer is first in, first out, so the one surprise is a load that overtakes an earlier store
 *   PSO   stores to different words leave the buffer in any order, unless the later one is a release
 *   WEAK  PSO, and a load may return what the word was at any time since the last acquire or fence (an Arm processor's
 *         load that was satisfied early); an acquire load or a fence ends that
 *
 * The words are those of netbridge/datapath/core/barriers.h: store_once, store_release, load_once, load_acquire,
 * fence_store_load. The includer defines THREADS, WORDS and DEPTH (of a store buffer).
 */
#define SC 0
#define TSO 1
#define PSO 2
#define WEAK 3

byte memory[WORDS];

#if MEMORY == SC

inline store_once(me, word, value) { memory[word] = value }
inline store_release(me, word, value) { memory[word] = value }
inline load_once(me, word, into) { into = memory[word] }
inline load_acquire(me, word, into) { into = memory[word] }
inline fence_store_load(me) { skip }
inline all_stores_done(me) { skip }
inline look_freshly(me) { skip }
inline start_memory() { skip }

#else

byte stored[THREADS];               /* how many stores wait in each buffer */
byte place[THREADS * DEPTH];        /* which words they go to, the oldest first */
byte datum[THREADS * DEPTH];
bool release[THREADS * DEPTH];      /* it may not overtake any earlier one */
#if MEMORY == WEAK
byte seen[THREADS * WORDS];         /* what a load may still return although memory has changed since */
#endif
hidden byte at_, own_;

inline buffer_store(me, word, value, is_release) {
    atomic {
        stored[me] < DEPTH;
        place[me * DEPTH + stored[me]] = word;
        datum[me * DEPTH + stored[me]] = value;
        release[me * DEPTH + stored[me]] = is_release;
        stored[me] = stored[me] + 1
    }
}
inline store_once(me, word, value) { buffer_store(me, word, value, false) }
inline store_release(me, word, value) { buffer_store(me, word, value, true) }

/* own_: whether a store of this processor's own answers the load. */
inline forward(me, word, into) {
    own_ = 0;
    at_ = 0;
    do
    :: at_ < stored[me] && place[me * DEPTH + at_] == word -> into = datum[me * DEPTH + at_]; own_ = 1; at_++
    :: at_ < stored[me] && place[me * DEPTH + at_] != word -> at_++
    :: at_ >= stored[me] -> break
    od;
    at_ = 0
}

#if MEMORY == WEAK
inline look_freshly(me) {
    d_step {
        at_ = 0;
        do
        :: at_ < WORDS -> seen[me * WORDS + at_] = memory[at_]; at_++
        :: at_ >= WORDS -> break
        od;
        at_ = 0
    }
}
inline load_once(me, word, into) {
    if
    :: d_step { into = memory[word]; forward(me, word, into);
                if :: !own_ -> seen[me * WORDS + word] = memory[word] :: else -> skip fi }
    :: d_step { into = seen[me * WORDS + word]; forward(me, word, into) }
    fi
}
inline load_acquire(me, word, into) {
    d_step {
        at_ = 0;
        do
        :: at_ < WORDS -> seen[me * WORDS + at_] = memory[at_]; at_++
        :: at_ >= WORDS -> break
        od;
        into = memory[word];
        forward(me, word, into)
    }
}
#else
inline look_freshly(me) { skip }
inline load_once(me, word, into) { d_step { into = memory[word]; forward(me, word, into) } }
inline load_acquire(me, word, into) { d_step { into = memory[word]; forward(me, word, into) } }
#endif

inline all_stores_done(me) { stored[me] == 0 }
inline fence_store_load(me) { atomic { stored[me] == 0; look_freshly(me) } }

inline drain_one(me, which) {
    memory[place[me * DEPTH + which]] = datum[me * DEPTH + which];
#if MEMORY == WEAK
    seen[me * WORDS + place[me * DEPTH + which]] = datum[me * DEPTH + which];
#endif
    at_ = which;
    do
    :: at_ + 1 < stored[me] ->
        place[me * DEPTH + at_] = place[me * DEPTH + at_ + 1];
        datum[me * DEPTH + at_] = datum[me * DEPTH + at_ + 1];
        release[me * DEPTH + at_] = release[me * DEPTH + at_ + 1];
        at_++
    :: at_ + 1 >= stored[me] -> break
    od;
    stored[me] = stored[me] - 1;
    /* So that equal states look equal. */
    place[me * DEPTH + stored[me]] = 0;
    datum[me * DEPTH + stored[me]] = 0;
    release[me * DEPTH + stored[me]] = false
}

proctype drain(byte me) {
end_empty:
    do
    :: d_step { stored[me] > 0 -> drain_one(me, 0) }
#if MEMORY >= PSO
    :: d_step { stored[me] > 1 && !release[me * DEPTH + 1] && place[me * DEPTH + 1] != place[me * DEPTH] ->
                drain_one(me, 1) }
#if DEPTH > 2
    :: d_step { stored[me] > 2 && !release[me * DEPTH + 2] && place[me * DEPTH + 2] != place[me * DEPTH] &&
                place[me * DEPTH + 2] != place[me * DEPTH + 1] -> drain_one(me, 2) }
#endif
#endif
    od
}

inline start_memory() {
    at_ = 0;
    do
    :: at_ < THREADS -> run drain(at_); at_++
    :: at_ >= THREADS -> break
    od
}

#endif
