/* One ring of the port and its doorbell: docs/port.md "Memory ordering" and "Sleeping and waking".
 *
 * A producer puts ENTRIES entries into a ring of SLOTS slots, in bursts of any size; a consumer takes them and sleeps
 * whenever there are none. The statements are those of netbridge/datapath/core/port_ring.h. END chooses who consumes:
 *
 *   DRIVER  pump_ask_for_wakeup and pump_look_at_fds in wake.c: epoll_wait takes the edge, then the wish is withdrawn
 *   CLIENT  nb_client_wait in client.c: poll on the epoll instance, the wish is withdrawn, then the doorbell quietened
 *   LOOP    Waiting.arm in netbridge/client/waiting.py: the doorbell is quietened before arming, and the wish never withdrawn
 *
 * Entry n is the number n + 1, so one that is read too early or too late shows. OTHERS times the consumer is woken by
 * something else (the control socket), and STRAY times a doorbell rings without reason, both at the worst moments.
 *
 * Properties: every entry is taken in the end (the model checker looks for a state in which nobody can go on although
 * the consumer has not got everything: a lost wake-up); an entry is read only after it was written; never more doorbells
 * than sleeps asked for. With ENDLESS counts wrap and there is no end: then no fair execution stops taking entries.
 */
#define DRIVER 0
#define CLIENT 1
#define LOOP 2

#ifndef END
#define END CLIENT
#endif
#ifndef ENTRIES
#define ENTRIES 3
#endif
#ifndef OTHERS
#define OTHERS 1
#endif
#ifndef STRAY
#define STRAY 1
#endif

#define SLOTS 2
#define PRODUCER 0
#define CONSUMER 1
#define PRODUCED SLOTS
#define WAKE (SLOTS + 1)
#define THREADS 2
#define WORDS (SLOTS + 2)
#define DEPTH 3
#include "memory.pml"

/* 32 bits wide in C. */
#ifdef ENDLESS
#define COUNT(n) ((n) & 3)
#else
#define COUNT(n) (n)
#endif
#define SLOT(n) ((n) % SLOTS)

bool bell;          /* the eventfd is on the epoll instance's ready list; its counter is never read, each write an edge */
byte returned;      /* entries whose buffers the producer has again: they come by another ring, released and acquired */
byte owed;          /* sleeps asked for, less doorbells rung */

/* eventfd_write takes and releases the locks under which the sleeper is woken or looks, so what was stored before it is
 * seen by whoever hears it. */
inline ring_doorbell() {
    atomic {
#ifndef MUTANT_BELL_OVERTAKES
        all_stores_done(PRODUCER);
#endif
        bell = true;
#ifndef ENDLESS
        assert(owed > 0);   /* one sleep, one doorbell */
        owed--;
#endif
    }
}

inline ring_must_wake() {
#ifndef MUTANT_NO_PRODUCER_FENCE
    fence_store_load(PRODUCER);
#endif
    load_once(PRODUCER, WAKE, wake);
    if
    :: wake ->
#ifdef MUTANT_CLEAR_AFTER_RING
        ring_doorbell();
        store_once(PRODUCER, WAKE, 0);
#else
#ifndef MUTANT_NEVER_CLEAR
        store_once(PRODUCER, WAKE, 0);
#endif
        ring_doorbell();
#endif
        wake = 0
    :: else -> skip
    fi
}

proctype producer() {
    byte put, published, wake;
#ifdef ENDLESS
end_full:
#endif
    do
#ifndef ENDLESS
    :: put == ENTRIES && published == put -> break
    :: put < ENTRIES && put - returned < SLOTS ->
#else
    :: COUNT(put - returned) < SLOTS ->
#endif
#ifdef MUTANT_COUNT_BEFORE_ENTRY
        atomic { published == put; }
        store_release(PRODUCER, PRODUCED, COUNT(put + 1));
        store_once(PRODUCER, SLOT(put), COUNT(put) + 1);
        published = COUNT(put + 1);
        put = COUNT(put + 1);
        ring_must_wake()
#else
        store_once(PRODUCER, SLOT(put), COUNT(put) + 1);
        put = COUNT(put + 1)
#endif
    :: published != put ->
#ifdef MUTANT_LOOK_BEFORE_PUBLISH
        ring_must_wake();
#endif
#ifdef MUTANT_NO_RELEASE
        store_once(PRODUCER, PRODUCED, put);
#else
        store_release(PRODUCER, PRODUCED, put);
#endif
        published = put;
#ifndef MUTANT_LOOK_BEFORE_PUBLISH
        ring_must_wake()
#endif
    od
}

inline ring_waiting() {
#ifdef MUTANT_NO_ACQUIRE
    load_once(CONSUMER, PRODUCED, available)
#else
    load_acquire(CONSUMER, PRODUCED, available)
#endif
}

inline ring_arm() {
    atomic {
        store_once(CONSUMER, WAKE, 1);
#ifndef ENDLESS
        owed++;
#endif
    }
}

/* What wakes it happened before it goes on. */
inline sleep() {
    atomic {
        if
        :: bell -> heard = true; look_freshly(CONSUMER)
#ifndef ENDLESS
        :: others > 0 -> others--
#endif
        fi;
#if END == DRIVER
        bell = false;       /* an edge is taken together with the event that reports it */
        heard = false;
#endif
    }
}

inline quieten() { atomic { bell = false; heard = false } }

proctype consumer() {
    byte taken, available, entry, others = OTHERS;
    bool heard;
    do
    ::  ring_waiting();
        do
        :: taken != available ->
            load_once(CONSUMER, SLOT(taken), entry);
            assert(entry == COUNT(taken) + 1);
            entry = 0;
#ifdef ENDLESS
progress_taken:
#endif
            atomic { taken = COUNT(taken + 1); returned = taken }
        :: else -> break
        od;
#ifndef ENDLESS
        if
        :: taken == ENTRIES -> break
        :: else -> skip
        fi;
#endif
#if END == LOOP && !defined(MUTANT_QUIETEN_AFTER_LOOK)
        quieten();
#endif
        ring_arm();
#ifndef MUTANT_NO_CONSUMER_FENCE
        fence_store_load(CONSUMER);
#endif
#ifdef MUTANT_NO_SECOND_LOOK
        available = taken;
#else
        ring_waiting();
#endif
#ifdef MUTANT_QUIETEN_AFTER_LOOK
        quieten();
#endif
        if
        :: available != taken -> skip
        :: else ->
#ifdef ENDLESS
end_sleep:
#endif
            sleep()
        fi;
#if END != LOOP
        store_once(CONSUMER, WAKE, 0);
#endif
#if END == CLIENT
        if
        :: heard -> quieten()
        :: else -> skip
        fi
#else
        heard = false
#endif
    od
}

#if STRAY > 0 && !defined(ENDLESS)
proctype stray() {
    bell = true
}
#endif

init {
    atomic {
        start_memory();
        run producer();
        run consumer();
#if STRAY > 0 && !defined(ENDLESS)
        run stray();
#endif
    }
}
