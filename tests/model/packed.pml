/* A packed virtqueue (virtio 1.3 §2.8): what makes a descriptor the other side's, and who is told of it.
 *
 * One ring that both sides write. Two bits of a descriptor's flags say whose turn it is, and what they mean changes with
 * each lap; netbridge/datapath/core/ring_packed.h. The driver adds chains in batches of any size and shows them by one
 * store, that of the first one's flags (packed_show); the flags of the others are there by then. FLAGS: the event
 * suppression structures say on or off. EVENTS: EVENT_IDX, where they say at which position (§2.8.10). A structure is one
 * word here: to see its two halves at different times costs nothing, since who armed looks once more in any case.
 *
 * CHAINS chains of one descriptor go through a ring of SIZE. Positions count two laps; START lets them wrap during the
 * run. Chain n carries the number n, and comes back as that and USED_MARK.
 *
 * Properties: all chains are used and seen to be used in the end, so nobody sleeps for ever; what the flags announce was
 * written before; no side takes a descriptor of the lap before for one of this lap.
 */
#define FLAGS 0
#define EVENTS 1

#ifndef FORM
#define FORM FLAGS
#endif
#ifndef CHAINS
#define CHAINS 4
#endif
#ifndef START
#define START 3
#endif

#define SIZE 2
#define LAPS (2 * SIZE)
#define DRIVER 0
#define DEVICE 1
#define DESC 0                  /* SIZE words: what a descriptor says */
#define TURN SIZE               /* SIZE words: its flags, AVAIL_BIT and USED_BIT */
#define FOR_DRIVER (2 * SIZE)   /* the driver's structure: ON, OFF, or AT + position */
#define FOR_DEVICE (2 * SIZE + 1)
#define THREADS 2
#define WORDS (2 * SIZE + 2)
#define DEPTH 3
#include "memory.pml"

#define ON 0
#define OFF 1
#define AT 2
#define USED_MARK 16

#define LATER(position) (((position) + 1) % LAPS)
#define OFFSET(position) ((position) % SIZE)
#ifdef MUTANT_NO_WRAP_COUNTER
#define WRAP(position) true
#else
#define WRAP(position) ((position) < SIZE)
#endif
#define AVAILABLE(position) (WRAP(position) -> 1 : 2)
#define USED(position) (WRAP(position) -> 3 : 0)

#ifdef MUTANT_EVENT_WITHOUT_WRAP
#define NEED_EVENT(event, next, fresh) ((OFFSET(next) + SIZE - OFFSET(event) + SIZE - 1) % SIZE < fresh && fresh < SIZE)
#else
#define NEED_EVENT(event, next, fresh) ((next + LAPS - event + LAPS - 1) % LAPS < fresh)
#endif

bool notified, interrupt;
hidden byte entry_;

inline tell_device() {
    atomic { all_stores_done(DRIVER); notified = true }
}

inline tell_driver() {
    atomic { all_stores_done(DEVICE); interrupt = true }
}

proctype driver() {
    byte next = START, shown = START, done = START, word_, entry, added, fresh, seen_used;
    do
    :: added < CHAINS && added - seen_used < SIZE ->
        atomic { added++; fresh++ };
        store_once(DRIVER, DESC + OFFSET(next), added);
        if
#ifdef MUTANT_HEAD_NOT_WITHHELD
        :: true -> store_once(DRIVER, TURN + OFFSET(next), AVAILABLE(next))
#else
        :: next != shown -> store_once(DRIVER, TURN + OFFSET(next), AVAILABLE(next))
        :: else -> skip
#endif
        fi;
        next = LATER(next)
    :: fresh > 0 ->                                     /* virtqueue_publish */
#ifdef MUTANT_NO_RELEASE
        store_once(DRIVER, TURN + OFFSET(shown), AVAILABLE(shown));
#elif !defined(MUTANT_HEAD_NOT_WITHHELD)
        store_release(DRIVER, TURN + OFFSET(shown), AVAILABLE(shown));
#endif
        shown = next;
#ifndef MUTANT_NO_PUBLISH_FENCE
        fence_store_load(DRIVER);
#endif
        load_acquire(DRIVER, FOR_DEVICE, word_);
        if
        :: word_ == ON -> tell_device()
        :: word_ >= AT && NEED_EVENT((word_ - AT), next, fresh) -> tell_device()
        :: else -> skip
        fi;
        atomic { fresh = 0; word_ = 0 }
    :: fresh == 0 ->                                    /* harvest */
#ifdef MUTANT_NO_ACQUIRE
        load_once(DRIVER, TURN + OFFSET(done), word_);
#else
        load_acquire(DRIVER, TURN + OFFSET(done), word_);
#endif
        if
        :: word_ == USED(done) ->
            load_once(DRIVER, DESC + OFFSET(done), entry);
            assert(entry == seen_used + 1 + USED_MARK);
            atomic { seen_used++; done = LATER(done); entry = 0; word_ = 0 }
        :: else ->
            word_ = 0;
            if
            :: seen_used == CHAINS -> break
            :: seen_used != added ->
#if FORM == FLAGS
                store_once(DRIVER, FOR_DRIVER, ON);
#else
                store_once(DRIVER, FOR_DRIVER, AT + done);
#endif
#ifndef MUTANT_NO_ASK_FENCE
                fence_store_load(DRIVER);
#endif
#ifndef MUTANT_NO_SECOND_LOOK
                load_acquire(DRIVER, TURN + OFFSET(done), word_);
#else
                word_ = AVAILABLE(done);
#endif
                if
                :: word_ == USED(done) -> skip
                :: else -> atomic { interrupt -> interrupt = false; look_freshly(DRIVER) }
                fi;
                word_ = 0;
                store_once(DRIVER, FOR_DRIVER, OFF)
            :: seen_used == added && added < CHAINS -> skip
            fi
        fi
    od
}

proctype device() {
    byte position = START, word_, entry, taken;
    do
    ::  load_acquire(DEVICE, TURN + OFFSET(position), word_);
        if
        :: word_ == AVAILABLE(position) ->
            load_once(DEVICE, DESC + OFFSET(position), entry);
            assert(entry == taken + 1);
            store_once(DEVICE, DESC + OFFSET(position), entry + USED_MARK);
            store_release(DEVICE, TURN + OFFSET(position), USED(position));
            atomic { taken++; entry = 0; word_ = 0 };
            fence_store_load(DEVICE);
            load_acquire(DEVICE, FOR_DRIVER, word_);
            if
            :: word_ == ON || word_ == AT + position -> tell_driver()
            :: else -> skip
            fi;
            atomic { position = LATER(position); word_ = 0 }
        :: else ->
            word_ = 0;
#if FORM == FLAGS
            store_once(DEVICE, FOR_DEVICE, ON);
#else
            store_once(DEVICE, FOR_DEVICE, AT + position);
#endif
#ifndef MUTANT_DEVICE_WITHOUT_FENCE
            fence_store_load(DEVICE);
#endif
            load_acquire(DEVICE, TURN + OFFSET(position), word_);
            if
            :: word_ == AVAILABLE(position) -> skip
            :: else ->
end_idle:
                atomic { notified -> notified = false; look_freshly(DEVICE) }
            fi;
            word_ = 0
#if FORM == FLAGS
            ;
            store_once(DEVICE, FOR_DEVICE, OFF)
#endif
        fi
    od
}

init {
    atomic {
        /* As the laps before have left them: used, in this lap before START, in the last one from there on. */
        entry_ = 0;
        do
        :: entry_ < SIZE ->
            memory[TURN + entry_] = ((entry_ < OFFSET(START)) == (START < SIZE) -> 3 : 0);
            entry_++
        :: else -> break
        od;
        entry_ = 0;
#if FORM == EVENTS
        memory[FOR_DRIVER] = AT + START;
        memory[FOR_DEVICE] = AT + START;
#endif
#if MEMORY == WEAK
        look_freshly(DRIVER);
        look_freshly(DEVICE);
#endif
        start_memory();
        run driver();
        run device()
    }
}
