/* The driver's whole loop, its sleep with several sources, and a client on the other side: deadlock freedom.
 *
 * run_round of netbridge/datapath/core/pump.c, its parts and wake.c, both queues of the device, and a client
 * that behaves as CLIENT says:
 *
 *   ECHO      nb_client_echo: answers each frame; waits for RECEIVE while it has a buffer to answer with, else ALLOCATE
 *   HOLDER    takes frames and keeps them until something else than the driver makes it give them back; it has its end
 *             of the port in an event loop
 *   SENDER    sends SENDS frames of its own as fast as it gets buffers, waiting for ALLOCATE, and receives afterwards
 *   BOTH      sends and receives, waiting for either
 *   FORWARDER sends each frame from where it is; the driver copies it if COPIES, so that its buffer is free at once
 *
 * Frames of PIECES buffers come from the wire, FRAMES of them; the device holds one back until it has room for all of it
 * (virtio 1.3 §5.1.6.4: it may not begin a frame that it cannot end). Counts only: what is in a ring is port_ring.pml's
 * and virtqueue.pml's matter, and so is that a device which was notified looks.
 *
 * Property: when nobody can go on any more (Spin's `timeout`), there is nothing left to do: no frame on the wire, in a
 * queue or in a ring that somebody would want, and every buffer has its owner. So nobody sleeps with work that nobody
 * will announce. On the way: buffers are conserved, and no queue holds more than fits.
 */
#define ECHO 0
#define HOLDER 1
#define SENDER 2
#define BOTH 3
#define FORWARDER 4

#ifndef CLIENT
#define CLIENT ECHO
#endif
#ifndef PIECES
#define PIECES 1        /* buffers of a frame, and the longest frame: rx_max_pieces */
#endif
#ifndef FRAMES
#define FRAMES 2
#endif
#ifndef SENDS
#define SENDS 2
#endif
#ifndef RX_QUEUE
#define RX_QUEUE 2      /* descriptors */
#endif
#ifndef RX_BUFFERS
#define RX_BUFFERS 3
#endif
#ifndef TX_BUFFERS
#define TX_BUFFERS 2
#endif
#ifndef RX_LIMIT
#define RX_LIMIT 2      /* rx_client_limit */
#endif
#ifndef CONTROLS
#define CONTROLS 1      /* times that the control fd wakes the driver */
#endif
#ifndef TX_ROOM
#define TX_ROOM 1       /* chains that the TX queue holds: a descriptor each for header and frame */
#endif
#ifndef COPIES
#define COPIES 0
#endif
#define MAX_PIECES PIECES

#define PUMP 0
#define STACK 1
#define DEVICE_RX 2
#define DEVICE_TX 3
#define THREADS 4
#define DEPTH 2

/* produced of the four rings and their wake; of the queues avail.idx, used.idx and avail.flags */
#define RX_ACTIVE 0
#define RX_FREE 1
#define TX_ACTIVE 2
#define TX_DONE 3
#define WAKE 4
#define RX_AVAIL 8
#define RX_USED 9
#define RX_QUIET 10
#define TX_AVAIL 11
#define TX_USED 12
#define TX_QUIET 13
#define WORDS 14
#include "memory.pml"

/* File descriptors. */
bool client_doorbell, driver_doorbell;
#ifdef INTX
bool intx_fd, line, masked;
#endif
bool rx_irq, tx_irq;        /* INTX: unused, but Spin wants them declared */
byte controls = CONTROLS;   /* and looks at the file descriptors while awake */

/* What nobody reads but the properties. */
byte wire = FRAMES;
byte dropped;
byte delivered;     /* frames that the client took */
byte sent;          /* frames that the client sent */
byte held;          /* RX buffers that the client has taken and not given back */
bool wants_frames, wants_buffers;

/* ---- The device ----------------------------------------------------------------------------------------------- */

#ifdef INTX
/* Level-triggered: the line stays asserted until ISR status is read; VFIO masks it when it signals. */
inline interrupt(irq) {
    atomic {
        line = true;
        if
        :: !masked -> masked = true; intx_fd = true
        :: else -> skip
        fi
    }
}
#else
inline interrupt(irq) { irq = true }
#endif

proctype device_rx() {
    byte available, used, quiet;
end_idle:
    do
    :: atomic { wire > 0 && memory[RX_AVAIL] - used >= PIECES -> wire--; used = used + PIECES };
        store_release(DEVICE_RX, RX_USED, used);
        fence_store_load(DEVICE_RX);
        load_once(DEVICE_RX, RX_QUIET, quiet);
        if
        :: !quiet -> interrupt(rx_irq)
        :: else -> skip
        fi;
        quiet = 0
    od
}

proctype device_tx() {
    byte used, quiet;
end_idle:
    do
    :: memory[TX_AVAIL] != used ->
        used++;
        store_release(DEVICE_TX, TX_USED, used);
        fence_store_load(DEVICE_TX);
        load_once(DEVICE_TX, TX_QUIET, quiet);
        if
        :: !quiet -> interrupt(tx_irq)
        :: else -> skip
        fi;
        quiet = 0
    od
}

/* ---- The driver ----------------------------------------------------------------------------------------------- */

inline look_at_wish(tell, ring_number) {
    atomic { tell = false };
    fence_store_load(PUMP);
    load_once(PUMP, WAKE + ring_number, got);
    if
    :: got -> store_once(PUMP, WAKE + ring_number, 0); ring = true
    :: else -> skip
    fi;
    got = 0
}

/* pump_wake_client, or with `soon` pump_wake_client_soon: then buffers may wait, whatever the reason. */
inline wake_client(soon) {
    if
    :: tell_frames -> look_at_wish(tell_frames, RX_ACTIVE)
    :: else -> skip
    fi;
    if
    :: tell_buffers -> look_at_wish(tell_buffers, TX_DONE)
    :: tell_buffers && soon -> skip
    :: else -> skip
    fi;
    if
    :: ring -> atomic { all_stores_done(PUMP); driver_doorbell = true; ring = false }
    :: else -> skip
    fi
}

inline take_back() {
    load_acquire(PUMP, RX_FREE, got);
    atomic {
        if
        :: got != rx_free_taken ->
            free = free + got - rx_free_taken;
            lent = lent - (got - rx_free_taken);
            rx_free_taken = got;
            moved = true
        :: else -> skip
        fi;
        got = 0
    }
}

/* rx_may_hold */
#ifdef MUTANT_FORWARDED_IS_NOT_HELD
#define HELD_TOO 0
#else
#define HELD_TOO forwarded
#endif

inline receive() {
    load_acquire(PUMP, RX_USED, got);
    atomic {
        do
        :: got != rx_used_taken ->
            rx_used_taken = rx_used_taken + PIECES;
            in_rx_queue = in_rx_queue - PIECES;
            moved = true;
            if
            :: lent + HELD_TOO + PIECES > RX_LIMIT -> free = free + PIECES; dropped++
            :: else -> lent = lent + PIECES; rx_active_put = rx_active_put + PIECES; publish = true
            fi
        :: else -> break
        od;
        got = 0
    };
    if
    :: publish -> store_release(PUMP, RX_ACTIVE, rx_active_put); publish = false; tell_frames = true
    :: else -> skip
    fi
}

inline complete() {
    load_acquire(PUMP, TX_USED, got);
    if
    :: got != tx_used_taken ->
        atomic {
            in_tx_queue = in_tx_queue - (got - tx_used_taken);
            moved = true;
#if CLIENT == FORWARDER
            free = free + (COPIES -> 0 : got - tx_used_taken);
            forwarded = forwarded - (COPIES -> 0 : got - tx_used_taken);
#else
            tx_done_put = tx_done_put + (got - tx_used_taken);
#ifndef MUTANT_COMPLETIONS_TELL_NOBODY
            tell_buffers = true;
#endif
#endif
            tx_used_taken = got;
            got = 0
        };
        store_release(PUMP, TX_DONE, tx_done_put)
    :: else -> got = 0
    fi
}

inline refill() {
    if
    :: in_rx_queue < RX_QUEUE && free > 0 ->
        atomic {
            do
            :: in_rx_queue < RX_QUEUE && free > 0 -> in_rx_queue++; free--; rx_avail++
            :: else -> break
            od
        };
        store_release(PUMP, RX_AVAIL, rx_avail)
    :: else -> skip
    fi
}

inline transmit() {
    load_acquire(PUMP, TX_ACTIVE, got);
    atomic {
        do
        :: got != tx_active_taken && in_tx_queue < TX_ROOM ->
            tx_active_taken++;
            in_tx_queue++;
            tx_avail++;
#if CLIENT == FORWARDER
            lent--;
            free = free + (COPIES -> 1 : 0);
            forwarded = forwarded + (COPIES -> 0 : 1);
#endif
            publish = true;
            moved = true
        :: else -> break
        od;
        got = 0
    };
    if
    :: publish -> store_release(PUMP, TX_AVAIL, tx_avail); publish = false
    :: else -> skip
    fi
}

inline stop_asking() {
    atomic {
        store_once(PUMP, WAKE + RX_FREE, 0);
        store_once(PUMP, WAKE + TX_ACTIVE, 0);
        store_once(PUMP, RX_QUIET, 1);
        store_once(PUMP, TX_QUIET, 1)
    }
}

inline look(shared, taken, condition) {
    if
    :: condition ->
        load_acquire(PUMP, shared, got);
        if
        :: got != taken -> found = true
        :: else -> skip
        fi;
        got = 0
    :: else -> skip
    fi
}

#define MORE_THAN_HALF_EMPTY (RX_QUEUE - in_rx_queue > RX_QUEUE / 2)
#if defined(MUTANT_NEVER_ASKS_FOR_BUFFERS)
#define DEVICE_STARVES false
#elif defined(MUTANT_STARVES_BY_HALF_ONLY)
#define DEVICE_STARVES MORE_THAN_HALF_EMPTY
#else
#define DEVICE_STARVES (MORE_THAN_HALF_EMPTY || in_rx_queue < MAX_PIECES)
#endif

inline ask_for_wakeup() {
    atomic {
        starves = DEVICE_STARVES;
        room = in_tx_queue < TX_ROOM
    };
    atomic {
        if
        :: starves -> store_once(PUMP, WAKE + RX_FREE, 1)
        :: else -> skip
        fi;
        if
        :: room -> store_once(PUMP, WAKE + TX_ACTIVE, 1)
        :: else -> skip
        fi;
#ifndef MUTANT_NO_RX_INTERRUPT
        store_once(PUMP, RX_QUIET, 0);
#endif
#ifdef MUTANT_TX_INTERRUPT_WHEN_FULL_ONLY
        if
        :: room -> skip
        :: else -> store_once(PUMP, TX_QUIET, 0)
        fi;
#else
#ifndef MUTANT_NO_TX_INTERRUPT
        store_once(PUMP, TX_QUIET, 0);
#endif
#endif
        skip
    };
    fence_store_load(PUMP);
#ifndef MUTANT_NO_LOOK_AT_QUEUES
    look(RX_USED, rx_used_taken, true);
    look(TX_USED, tx_used_taken, true);
#endif
#ifndef MUTANT_NO_LOOK_AT_TX_ACTIVE
    look(TX_ACTIVE, tx_active_taken, room);
#endif
#ifndef MUTANT_NO_LOOK_AT_RX_FREE
    look(RX_FREE, rx_free_taken, starves);
#endif
    starves = false;
    room = false
}

#ifdef INTX
#define READY (client_doorbell || intx_fd)
#else
#define READY (client_doorbell || rx_irq || tx_irq)
#endif

/* epoll_wait's answer is a snapshot, and takes the edges; INTx is an eventfd that is read afterwards. */
inline look_at_fds() {
    atomic {
        client_doorbell = false;
#ifdef INTX
        heard = intx_fd
#else
        rx_irq = false;
        tx_irq = false
#endif
    };
#ifdef INTX
    if
    :: heard ->
#ifdef MUTANT_UNMASK_THEN_CLEAR
        line = false;
        atomic { masked = false; if :: line -> masked = true; intx_fd = true :: else -> skip fi };
        intx_fd = false;
#else
#ifdef MUTANT_READ_ISR_FIRST_UNMASK_NEVER
        intx_fd = false;
        line = false;
#else
        intx_fd = false;
        line = false;   /* reading ISR status */
        atomic { masked = false; if :: line -> masked = true; intx_fd = true :: else -> skip fi };
#endif
#endif
        heard = false
    :: else -> skip
    fi
#else
    skip
#endif
}

proctype pump() {
    byte free = RX_BUFFERS, lent, forwarded, in_rx_queue, in_tx_queue;
    byte rx_active_put, tx_done_put, rx_free_taken, tx_active_taken, rx_used_taken, tx_used_taken, rx_avail, tx_avail;
    byte got;
    bool moved, tell_frames, tell_buffers, publish, ring, found, starves, room;
#ifdef INTX
    bool heard;
#endif

    /* nb_pump_prime */
    refill();
    tx_done_put = TX_BUFFERS;
    store_release(PUMP, TX_DONE, tx_done_put);
#ifndef MUTANT_PRIME_TELLS_NOBODY
    tell_buffers = true;
    wake_client(false);
#endif
    stop_asking();
    do
    ::  if
        :: atomic { controls > 0 && READY -> controls-- }; look_at_fds()    /* the look once in 256 rounds */
        :: skip
        fi;
        take_back();
        receive();
        complete();
        wake_client(true);
        refill();
        transmit();
        assert(free + lent + forwarded + in_rx_queue == RX_BUFFERS);
        assert(in_rx_queue <= RX_QUEUE && in_tx_queue <= TX_ROOM && lent + forwarded <= RX_LIMIT);
        if
        :: moved -> moved = false
        :: else ->
#ifndef MUTANT_SLEEPS_BEFORE_IT_HAS_TOLD
            wake_client(false);
#endif
            ask_for_wakeup();
            if
            :: found -> found = false
            :: else ->
end_asleep:
                atomic {
                    if
                    :: READY -> look_freshly(PUMP)
                    :: controls > 0 -> controls--
                    fi
                };
                look_at_fds()
            fi;
            stop_asking()
        fi
    od
}

/* ---- The client ----------------------------------------------------------------------------------------------- */

inline flush() {
    fence_store_load(STACK);
    load_once(STACK, WAKE + RX_FREE, got);
    if
    :: got -> store_once(STACK, WAKE + RX_FREE, 0); ring = true
    :: else -> skip
    fi;
    fence_store_load(STACK);
    load_once(STACK, WAKE + TX_ACTIVE, got);
    if
    :: got -> store_once(STACK, WAKE + TX_ACTIVE, 0); ring = true
    :: else -> skip
    fi;
    got = 0;
    if
    :: ring -> atomic { all_stores_done(STACK); client_doorbell = true; ring = false }
    :: else -> skip
    fi
}

inline allocate() {
    load_acquire(STACK, TX_DONE, got);
    atomic { spare = spare + (got - tx_done_taken); tx_done_taken = got; got = 0 }
}

inline send_one() {
    atomic { spare--; sent++; tx_active_put++ };
    store_release(STACK, TX_ACTIVE, tx_active_put)
}

inline release_held() {
    atomic { rx_free_put = rx_free_put + held; held = 0 };
    store_release(STACK, RX_FREE, rx_free_put)
}

/* nb_client_wait; `other`: a file descriptor of its own that wakes it. */
inline wait(other) {
    if
    :: wants_frames -> store_once(STACK, WAKE + RX_ACTIVE, 1)
    :: else -> skip
    fi;
    if
    :: wants_buffers -> store_once(STACK, WAKE + TX_DONE, 1)
    :: else -> skip
    fi;
    fence_store_load(STACK);
    if
    :: wants_frames -> load_acquire(STACK, RX_ACTIVE, got); found = (got != rx_active_taken)
    :: else -> skip
    fi;
    if
    :: wants_buffers && !found -> load_acquire(STACK, TX_DONE, got); found = (got != tx_done_taken)
    :: else -> skip
    fi;
    got = 0;
    if
    :: found -> found = false
    :: else ->
end_asleep:
        atomic {
            if
            :: driver_doorbell -> heard = true; look_freshly(STACK)
            :: other -> skip
            fi
        }
    fi;
    if
    :: wants_frames -> store_once(STACK, WAKE + RX_ACTIVE, 0)
    :: else -> skip
    fi;
    if
    :: wants_buffers -> store_once(STACK, WAKE + TX_DONE, 0)
    :: else -> skip
    fi;
    if
    :: heard -> atomic { driver_doorbell = false; heard = false }
    :: else -> skip
    fi;
    atomic { wants_frames = false; wants_buffers = false }
}

proctype stack() {
    byte rx_active_taken, rx_free_put, tx_active_put, tx_done_taken, spare, got, count;
    bool ring, found, heard;
    do
#if CLIENT == ECHO
    ::  allocate();
        if
        :: spare > 0 -> load_acquire(STACK, RX_ACTIVE, got); count = got - rx_active_taken; got = 0
        :: else -> skip
        fi;
        if
        :: count > spare -> count = spare
        :: else -> skip
        fi;
        if
        :: count > 0 ->
            atomic { rx_active_taken = rx_active_taken + count; delivered = delivered + count; held = count };
            atomic {
                tx_active_put = tx_active_put + count;
                sent = sent + count;
                spare = spare - count;
                count = 0
            };
            store_release(STACK, TX_ACTIVE, tx_active_put);
            release_held();
#ifndef MUTANT_CLIENT_NEVER_FLUSHES
            flush()
#endif
        :: else ->
            if
            :: spare > 0 -> wants_frames = true
            :: else -> wants_buffers = true
            fi;
            wait(false)
        fi
#endif
#if CLIENT == HOLDER
    ::  load_acquire(STACK, RX_ACTIVE, got);
        atomic {
            held = held + (got - rx_active_taken);
            delivered = delivered + (got - rx_active_taken) / PIECES;
            rx_active_taken = got;
            got = 0
        };
        wants_frames = true;
        wait(held > 0);
        if
        :: held > 0 -> release_held(); flush()
        :: skip
        fi
#endif
#if CLIENT == FORWARDER
    ::  load_acquire(STACK, RX_ACTIVE, got);
        atomic { count = got - rx_active_taken; got = 0 };
        if
        :: count > 0 ->
            atomic {
                rx_active_taken = rx_active_taken + count;
                delivered = delivered + count;
                tx_active_put = tx_active_put + count;
                sent = sent + count;
                count = 0
            };
            store_release(STACK, TX_ACTIVE, tx_active_put);
#ifndef MUTANT_CLIENT_NEVER_FLUSHES
            flush()
#endif
        :: else -> wants_frames = true; wait(false)
        fi
#endif
#if CLIENT == SENDER || CLIENT == BOTH
    ::  allocate();
#if CLIENT == SENDER
        if
        :: sent < SENDS -> wants_buffers = true
        :: else -> wants_frames = true
        fi;
#else
        wants_frames = true;
        wants_buffers = (sent < SENDS);
#endif
        if
        :: wants_frames ->
            load_acquire(STACK, RX_ACTIVE, got);
            atomic {
                held = held + (got - rx_active_taken);
                delivered = delivered + (got - rx_active_taken) / PIECES;
                rx_active_taken = got;
                got = 0
            };
        :: else -> skip
        fi;
        if
        :: spare > 0 && sent < SENDS -> send_one(); ring = true
        :: else -> skip
        fi;
        if
        :: held > 0 -> release_held(); ring = true
        :: else -> skip
        fi;
        if
        :: ring -> ring = false; flush(); atomic { wants_frames = false; wants_buffers = false }
        :: else -> wait(false)
        fi
#endif
    od
}

/* ---- Nobody can go on ----------------------------------------------------------------------------------------- */

proctype judge() {
    timeout ->
        assert(wire == 0);
        assert(held == 0);
        assert(delivered + dropped == FRAMES);
        assert(memory[TX_USED] == memory[TX_ACTIVE]);
#if CLIENT == FORWARDER
        assert(memory[TX_DONE] == TX_BUFFERS);
#else
        assert(memory[TX_DONE] == TX_BUFFERS + sent);
#endif
#if CLIENT == ECHO || CLIENT == FORWARDER
        assert(sent == delivered);
#endif
#if CLIENT == SENDER || CLIENT == BOTH
        assert(sent == SENDS)
#endif
}

init {
    atomic {
        start_memory();
        run device_rx();
        run device_tx();
        run pump();
        run stack();
        run judge()
    }
}
