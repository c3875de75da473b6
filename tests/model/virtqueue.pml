/* One virtqueue's two ways to be told less: notifications to the device, interrupts to the driver.
 *
 * FLAGS: used.flags NO_NOTIFY and avail.flags NO_INTERRUPT (virtio 1.3 §2.7.7, §2.7.10), as virtqueue_publish,
 * virtqueue_completed and virtqueue_set_interrupts in netbridge/datapath/core/virtqueue.h have them. EVENTS: EVENT_IDX,
 * where each side instead says after which index it wants to be told (§2.7.7.1, §2.7.10.1), with vring_need_event; the
 * index wraps at 65,536 in C and at 8 here, so it wraps during the run.
 *
 * WAY is how the device asks to be notified, as in packed.pml. LETTER: as the specification has it. PASSES: QEMU after its
 * wire was full; virtqueue_split_pop asks anew with each chain that it takes. PAIRS: QEMU before 9.1, which takes two chains
 * or none, and sleeps on one that came after it had asked.
 *
 * The driver makes CHAINS chains available, in batches of any size, at most SIZE in flight; the device uses each. Either
 * side sleeps when there is nothing for it. Chain n carries the number n + 1, and is given back as that.
 *
 * Properties: all chains are used and seen to be used in the end, so no notification and no interrupt is lost; what an
 * index announces was written before; with EVENTS nobody is told more often than it asked.
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
#ifndef CHAINS
#define CHAINS 3
#endif
#ifndef START
#define START 0         /* of the indices: near the wrap, with EVENTS */
#endif

#define SIZE 2
#define DRIVER 0
#define DEVICE 1
#define AVAIL_RING 0            /* SIZE words */
#define USED_RING SIZE          /* SIZE words */
#define AVAIL_IDX (2 * SIZE)
#define USED_IDX (2 * SIZE + 1)
/* FLAGS: avail.flags and used.flags. EVENTS: used_event, written by the driver, and avail_event, by the device. */
#define FOR_DRIVER (2 * SIZE + 2)
#define FOR_DEVICE (2 * SIZE + 3)
#define THREADS 2
#define WORDS (2 * SIZE + 4)
#define DEPTH 3
#include "memory.pml"

#define INDEX(n) ((n) & 7)

/* (u16)(new - event - 1) < (u16)(new - old): whether the event index is one that was just passed. */
#ifdef MUTANT_NEED_EVENT_WITHOUT_WRAP
#define NEED_EVENT(event, new, old) (event >= old && event < new)
#elif defined(MUTANT_NEED_EVENT_OFF_BY_ONE)
#define NEED_EVENT(event, new, old) (INDEX((new) - (event)) < INDEX((new) - (old)))
#else
#define NEED_EVENT(event, new, old) (INDEX((new) - (event) + 7) < INDEX((new) - (old) + 8))
#endif

bool notified, interrupt;       /* the notification register and the eventfd of the queue's vector */
short owed_device, owed_driver;    /* times asked to be told, less times told */

/* One more than asked for: both sides begin with everything on. */
inline told(owed) {
#if FORM == EVENTS
    owed--;
    assert(owed >= -1)
#else
    skip
#endif
}

inline tell_device() {
    atomic { all_stores_done(DRIVER); notified = true; told(owed_device) }
}

inline tell_driver() {
    atomic { all_stores_done(DEVICE); interrupt = true; told(owed_driver) }
}

proctype driver() {
    byte added = START, published = START, done = START, word_, entry, unnotified, left = CHAINS;
    do
    :: left > 0 && INDEX(added - done) < SIZE ->
        store_once(DRIVER, AVAIL_RING + added % SIZE, INDEX(added) + 1);
        atomic { added = INDEX(added + 1); left-- }
    :: added != published ->                            /* virtqueue_publish */
#ifdef MUTANT_NO_RELEASE
        store_once(DRIVER, AVAIL_IDX, added);
#else
        store_release(DRIVER, AVAIL_IDX, added);
#endif
#ifndef MUTANT_NO_PUBLISH_FENCE
        fence_store_load(DRIVER);
#endif
#ifdef MUTANT_BY_THE_LETTER
        unnotified = INDEX(added - published);
#else                                                   /* ring_note_publication */
        unnotified = (unnotified + INDEX(added - published) < 7 -> unnotified + INDEX(added - published) : 7);
#endif
        load_once(DRIVER, FOR_DEVICE, word_);           /* split_wants_notification */
        if
#if FORM == FLAGS
        :: !word_ -> tell_device(); unnotified = 0
#else
        :: NEED_EVENT(word_, added, INDEX(added + 8 - unnotified)) -> tell_device(); unnotified = 0
#endif
        :: else -> skip
        fi;
        atomic { published = added; word_ = 0 }
    :: added == published ->                            /* nothing to add, or no room, or rather not now: harvest */
#ifdef MUTANT_NO_ACQUIRE
        load_once(DRIVER, USED_IDX, word_);
#else
        load_acquire(DRIVER, USED_IDX, word_);
#endif
        if
        :: word_ != done ->
            do
            :: word_ != done ->
                load_once(DRIVER, USED_RING + done % SIZE, entry);
                assert(entry == INDEX(done) + 1);
                atomic { entry = 0; done = INDEX(done + 1) }
            :: else -> break
            od;
            word_ = 0
        :: else ->
            word_ = 0;
            if
            :: left == 0 && done == added -> break
#if WAY == PAIRS
            :: INDEX(added - done) == SIZE || (done != added && left == 0) ->    /* one is too few */
#else
            :: done != added ->
#endif
#if FORM == FLAGS
                store_once(DRIVER, FOR_DRIVER, 0);
#else
                atomic { owed_driver++; store_once(DRIVER, FOR_DRIVER, done) };
#endif
#ifndef MUTANT_NO_ASK_FENCE
                fence_store_load(DRIVER);
#endif
#ifdef MUTANT_NO_SECOND_LOOK
                word_ = done;
#else
                load_acquire(DRIVER, USED_IDX, word_);
#endif
                if
                :: word_ != done -> skip
                :: else -> atomic { interrupt -> interrupt = false; look_freshly(DRIVER) }
                fi;
                word_ = 0;
#if FORM == FLAGS
                store_once(DRIVER, FOR_DRIVER, 1)
#else
                skip        /* a used_event that was passed asks for nothing until the index comes round */
#endif
#if WAY == PAIRS
            :: INDEX(added - done) != SIZE && left > 0 -> skip
#else
            :: done == added && left > 0 -> skip
#endif
            fi
        fi
    od
}

inline take_one() {
    load_once(DEVICE, AVAIL_RING + taken % SIZE, entry);
    assert(entry == INDEX(taken) + 1);
    taken = INDEX(taken + 1)
}

inline use_one() {
    store_once(DEVICE, USED_RING + shown % SIZE, entry);
    entry = 0;
    store_release(DEVICE, USED_IDX, INDEX(shown + 1));
    fence_store_load(DEVICE);
    load_once(DEVICE, FOR_DRIVER, word_);
    if
#if FORM == FLAGS
    :: !word_ -> tell_driver()
#else
    :: NEED_EVENT(word_, INDEX(shown + 1), shown) -> tell_driver()
#endif
    :: else -> skip
    fi;
    atomic { shown = INDEX(shown + 1); word_ = 0 }
}

inline ask() {
#if FORM == FLAGS
    store_once(DEVICE, FOR_DEVICE, 0);
#elif WAY == LETTER
    atomic { owed_device++; store_once(DEVICE, FOR_DEVICE, taken) };
#else                                                   /* virtio_queue_split_set_notification */
    load_acquire(DEVICE, AVAIL_IDX, word_);
    atomic { owed_device++; store_once(DEVICE, FOR_DEVICE, word_); word_ = 0 };
#endif
#ifndef MUTANT_DEVICE_WITHOUT_FENCE
    fence_store_load(DEVICE)
#else
    skip
#endif
}

/* An avail_event that was passed asks for nothing until the index comes round. */
inline ask_no_more() {
#if FORM == FLAGS
    store_once(DEVICE, FOR_DEVICE, 1)
#else
    skip
#endif
}

/* `asked`: it has asked, and looks once more before it sleeps. */
proctype device() {
    byte taken = START, shown = START, word_, entry;
    bool asked;
    do
    ::  load_acquire(DEVICE, AVAIL_IDX, word_);
        if
#if WAY == PAIRS
        :: INDEX(word_ - taken) == SIZE ->
            atomic { word_ = 0; asked = false };
            ask_no_more();
            take_one();
            use_one();
            take_one();
            use_one()
        :: INDEX(word_ - taken) < SIZE ->
#else
        :: word_ != taken ->
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
#if FORM == EVENTS
            atomic { owed_device++; store_once(DEVICE, FOR_DEVICE, taken) };
#endif
            if
            :: true -> use_one()
            :: true ->                                  /* its wire is full */
                ask_no_more();
                do
                :: notified -> notified = false; ask(); ask_no_more()
                :: break
                od;
                use_one();
                ask();
                asked = true
            fi
#else
            use_one()
#endif
        :: word_ == taken ->
#endif
            word_ = 0;
            if
            :: !asked -> ask(); asked = true
            :: asked ->
                asked = false;
end_idle:
                atomic { notified -> notified = false; look_freshly(DEVICE) };
                ask_no_more()
            fi
        fi
    od
}

init {
    atomic {
        memory[AVAIL_IDX] = START;
        memory[USED_IDX] = START;
#if FORM == EVENTS
        memory[FOR_DRIVER] = START;
        memory[FOR_DEVICE] = START;
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
