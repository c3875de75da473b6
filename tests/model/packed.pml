/* A packed virtqueue (virtio 1.3 §2.8): what makes a descriptor the other side's, and who is told of it.
 *
 * One ring that both sides write. Two bits of a descriptor's flags say whose turn it is, and what they mean changes with
 * each lap; netbridge/datapath/core/ring_packed.h. The driver adds chains in batches of any size and shows them by one
 * store, that of the first one's flags (packed_show); the flags of the others are there by then. FLAGS: the event
 * suppression structures say on or off. EVENTS: EVENT_IDX, where they say at which position (§2.8.10). A structure is one
 * word here: to see its two halves at different times costs nothing, since who armed looks once more in any case.
 *
 * WAY is how the device asks to be notified. LETTER: as the specification has it; after each look that found something it
 * asks anew before it sleeps. PASSES: QEMU, virtio_net_tx_bh and virtio_net_tx_complete. Its wire may be full; while it is,
 * the device listens to no notification, though it may ask for one for a moment. When the wire has room it asks, takes what
 * there is and sleeps, and virtqueue_packed_pop does not move the position on. PAIRS: QEMU before 9.1,
 * virtio_net_has_buffers. It takes two chains or none; if its second look finds one, it sleeps without asking anew.
 *
 * CHAINS chains of one descriptor go through a ring of SIZE. Positions count two laps; START lets them wrap during the
 * run. Chain n carries the number n, and comes back as that and USED_MARK.
 *
 * Properties: all chains are used and seen to be used in the end, so nobody sleeps for ever; what the flags announce was
 * written before; no side takes a descriptor of the lap before for one of this lap.
 */
#define FLAGS 0
#define EVENTS 1
#define LETTER 0
#define PASSES 1
#define PAIRS 2

#ifndef FORM
#define FORM FLAGS
#endif
#ifndef WAY
#define WAY LETTER
#endif
#ifndef SIZE
#define SIZE 2
#endif
#ifndef CHAINS
#define CHAINS 4
#endif
#ifndef START
#define START 3
#endif

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
#define EVENT(word) OFFSET(word - AT)                   /* packed_event */
#else
#define EVENT(word) (word - AT)
#endif
#define AHEAD(event) ((event + LAPS - done) % LAPS)
#if defined(MUTANT_BY_THE_LETTER) || defined(MUTANT_USED_IS_FORGOTTEN)
#define HAS_USED(event) false
#elif defined(MUTANT_WHOLE_LAP_IS_FORGOTTEN)
#define HAS_USED(event) (AHEAD(event) > SIZE)
#else                                                   /* packed_has_used */
#define HAS_USED(event) (AHEAD(event) > SIZE || (AHEAD(event) == SIZE && added - seen_used != SIZE))
#endif
#define PASSED(event) ((next + LAPS - event + LAPS - 1) % LAPS < unnotified)

bool notified, interrupt;
hidden byte entry_;

inline tell_device() {
    atomic { all_stores_done(DRIVER); notified = true }
}

inline tell_driver() {
    atomic { all_stores_done(DEVICE); interrupt = true }
}

proctype driver() {
    byte next = START, shown = START, done = START, word_, entry, added, fresh, unnotified, seen_used;
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
#ifdef MUTANT_BY_THE_LETTER
        unnotified = fresh;
#else                                                   /* ring_note_publication */
        unnotified = (unnotified + fresh < LAPS -> unnotified + fresh : LAPS - 1);
#endif
        load_acquire(DRIVER, FOR_DEVICE, word_);        /* packed_wants_notification */
        if
        :: word_ == ON || (word_ >= AT && (HAS_USED(EVENT(word_)) || PASSED(EVENT(word_)))) ->
            tell_device();
            unnotified = 0
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
#if WAY == PAIRS
            :: seen_used != added && (added - seen_used == SIZE || added == CHAINS) ->   /* one is too few */
#else
            :: seen_used != added ->
#endif
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
                :: else ->
#ifndef MUTANT_DEVICE_IS_LEFT_ASLEEP
                    load_acquire(DRIVER, FOR_DEVICE, word_);    /* wake_devices, packed_sleeps_on */
                    if
                    :: word_ >= AT && HAS_USED(EVENT(word_)) -> tell_device()
                    :: else -> skip
                    fi;
#endif
                    atomic { interrupt -> interrupt = false; look_freshly(DRIVER) }
                fi;
                word_ = 0;
                store_once(DRIVER, FOR_DRIVER, OFF)
#if WAY == PAIRS
            :: added - seen_used != SIZE && added < CHAINS -> skip
#else
            :: seen_used == added && added < CHAINS -> skip
#endif
            fi
        fi
    od
}

inline take_one() {
    load_once(DEVICE, DESC + OFFSET(position), entry);
    assert(entry == taken + 1)
}

inline use_one() {
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
}

inline ask_at(where) {
#if FORM == FLAGS
    store_once(DEVICE, FOR_DEVICE, ON);
#else
    store_once(DEVICE, FOR_DEVICE, AT + where);
#endif
#ifndef MUTANT_DEVICE_WITHOUT_FENCE
    fence_store_load(DEVICE)
#else
    skip
#endif
}

/* With EVENT_IDX a device need not say that it wants to hear of nothing: to have passed its position says it. QEMU does. */
inline ask_no_more() {
#if FORM == FLAGS || WAY != LETTER
    store_once(DEVICE, FOR_DEVICE, OFF)
#else
    skip
#endif
}

/* `asked`: it has asked, and looks once more before it sleeps. */
proctype device() {
    byte position = START, word_, entry, taken;
    bool asked;
#if WAY == PAIRS
    byte found;
    do
    ::  load_acquire(DEVICE, TURN + OFFSET(position), word_);
        if
        :: word_ == AVAILABLE(position) ->
            found = 1;
            load_acquire(DEVICE, TURN + OFFSET(LATER(position)), word_);
            if
            :: word_ == AVAILABLE(LATER(position)) -> found = 2
            :: else -> skip
            fi
        :: else -> skip
        fi;
        word_ = 0;
        if
        :: found == 2 ->
            atomic { found = 0; asked = false };
            ask_no_more();
            take_one();
            use_one();
            take_one();
            use_one()
        :: found < 2 && !asked -> ask_at((position + found) % LAPS); atomic { found = 0; asked = true }
        :: found < 2 && asked ->
            atomic { found = 0; asked = false };
end_idle:
            atomic { notified -> notified = false; look_freshly(DEVICE) };
            ask_no_more()
        fi
    od
#else
    do
    ::  load_acquire(DEVICE, TURN + OFFSET(position), word_);
        if
        :: word_ == AVAILABLE(position) ->
            word_ = 0;
            if
            :: asked -> asked = false; ask_no_more()
#if WAY == PASSES
            :: asked -> skip
#endif
            :: !asked -> skip
            fi;
            take_one();
#if WAY == PASSES
            if
            :: true -> use_one()
            :: true ->                                  /* its wire is full */
                ask_no_more();
                do
                :: ask_at(LATER(position)); notified = false; ask_no_more()
                :: break
                od;
                use_one();
                ask_at(position);
                asked = true
            fi
#else
            use_one()
#endif
        :: else ->
            word_ = 0;
            if
            :: !asked -> ask_at(position); asked = true
            :: asked ->
                asked = false;
end_idle:
                atomic { notified -> notified = false; look_freshly(DEVICE) };
                ask_no_more()
            fi
        fi
    od
#endif
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
