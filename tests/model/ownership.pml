/* Who owns a buffer: the ledger, its leases, the virtqueue's shadow, and the end of a session.
 *
 * The verbs are those of netbridge/datapath/core/ledger.h (take_for_device, put_free, lend, check) and virtqueue.h (add,
 * take), as the pump uses them: BUFFERS buffers, a queue of as many descriptors. The client presents any handle it can
 * make up, at any time: every session, lease and index, those beyond the region too. The device says that it used any
 * chain, at any time. The lease is 16 bits wide in C and wraps at LEASES here; there are SESSIONS sessions (after 65,535 of
 * them the numbers begin anew).
 *
 * FORWARDS: what the client was lent it may also send from where it is: the buffer goes to the device through a second queue,
 * with a shadow of its own, and is free when the device says that it was sent. (`forward` in transmit.c, `finish_forwarded` in
 * complete.c. One that is copied is given back, as far as this model can see.)
 *
 * ORDERED: IN_ORDER (virtio 1.3 §2.7.9, §2.8.9). What the device names stands for all chains from the oldest to that one
 * (ring_begin_batch); they are taken one by one (ring_next_of_batch), and refills, the client's doings or the end of the
 * session may come between. Descriptors are used in a circle.
 *
 * Beside the ledger a second account is kept, of what really happened: `whose`, the handle that the client was last given
 * for each buffer and, with ORDERED, which chains the device has in which order. Properties: the two agree; no buffer is
 * twice among the free ones or in the queue, so it never has two owners; a handle is accepted only if it is the one last
 * given for a buffer that is the client's now. So one that is forged, stale, repeated or of an earlier session is
 * refused. ORDERED: no buffer is taken from a chain of which the device has not said that it is done with it.
 */
#ifndef BUFFERS
#define BUFFERS 2
#endif
#ifndef LEASES
#define LEASES 4
#endif
#ifndef SESSIONS
#define SESSIONS 3
#endif
#ifndef ORDERED
#define ORDERED 0
#endif

#ifndef FORWARDS
#define FORWARDS 0
#endif

#define FREE 0      /* NB_OWNER_DRIVER */
#define DEVICE 1
#define CLIENT 2
#define NOTHING 255

/* The ledger. */
byte owner[BUFFERS];
byte lease[BUFFERS];
byte owned[3];
byte free_stack[BUFFERS];
/* The queue's shadow: which buffer a descriptor's chain carries, and whether it is in flight. */
byte carried[BUFFERS];
bool in_flight[BUFFERS];
#if FORWARDS
/* The same of the queue that sends. */
byte forwarded[BUFFERS];
bool is_sent[BUFFERS];
#endif
byte session = 1, sessions = 1;
#if ORDERED
byte free_head, oldest, batch_left;
#ifdef MUTANT_NAMED_ALONE
byte named;
#endif
#endif

/* What really happened. */
byte whose[BUFFERS];
byte given_session[BUFFERS];
byte given_lease[BUFFERS];
#if ORDERED
byte order[BUFFERS];            /* the descriptors that the device has, the oldest first */
byte ordered;                   /* how many */
bool holds[BUFFERS];            /* whether a descriptor is among them */
#endif

#ifdef MUTANT_NO_SHADOW
#define BELIEVED(descriptor) true
#define BELIEVED_SENT(descriptor) true
#else
#define BELIEVED(descriptor) in_flight[descriptor]
#define BELIEVED_SENT(descriptor) is_sent[descriptor]
#endif

hidden byte i_, j_, accepted, buffer_;

inline move_owner(buffer, to) {
    owned[owner[buffer]]--;
    owner[buffer] = to;
    owned[to]++
}

inline start_session() {
    i_ = 0;
    do
    :: i_ < BUFFERS ->
        owner[i_] = FREE;
        lease[i_] = 0;
        free_stack[i_] = BUFFERS - 1 - i_;
        carried[i_] = 0;
        in_flight[i_] = false;
#if FORWARDS
        forwarded[i_] = 0;
        is_sent[i_] = false;
#endif
        whose[i_] = FREE;
        i_++
    :: else -> break
    od;
    owned[FREE] = BUFFERS;
    owned[DEVICE] = 0;
    owned[CLIENT] = 0;
#if ORDERED
    free_head = 0;
    oldest = 0;
#ifndef MUTANT_BATCH_STAYS
    batch_left = 0;
#endif
    ordered = 0;
    i_ = 0;
    do
    :: i_ < BUFFERS -> order[i_] = 0; holds[i_] = false; i_++
    :: else -> break
    od;
#endif
    i_ = 0
}

inline put_free(buffer) {
    free_stack[owned[FREE]] = buffer;
    move_owner(buffer, FREE);
    whose[buffer] = FREE
}

inline lend(buffer) {
    move_owner(buffer, CLIENT);
#ifndef MUTANT_LEASE_STAYS
    lease[buffer] = (lease[buffer] + 1) % LEASES;
#endif
    assert(whose[buffer] == DEVICE);
    /* No new handle looks like the one before. */
    assert(given_session[buffer] != session || given_lease[buffer] != lease[buffer]);
    whose[buffer] = CLIENT;
    given_session[buffer] = session;
    given_lease[buffer] = lease[buffer]
}

/* ledger_check: `accepted` is whether it is good. */
inline check(a_session, a_lease, index) {
    accepted = 1;
    if
    :: index >= BUFFERS -> accepted = 0
    :: else ->
        if
#ifndef MUTANT_SESSION_UNCHECKED
        :: a_session != session -> accepted = 0
#endif
#ifndef MUTANT_LEASE_UNCHECKED
        :: a_lease != lease[index] -> accepted = 0
#endif
#ifndef MUTANT_OWNER_UNCHECKED
        :: owner[index] != CLIENT -> accepted = 0
#endif
        :: else -> skip
        fi
    fi
}

#if FORWARDS
/* Onto any free descriptor of the queue that sends; there are as many as buffers. */
inline forward(buffer) {
    i_ = 0;
    do
    :: is_sent[i_] -> i_++
    :: else -> break
    od;
    forwarded[i_] = buffer;
    is_sent[i_] = true;
    whose[buffer] = DEVICE;
#if defined(MUTANT_FORWARDED_IS_FREE)
    free_stack[owned[FREE]] = buffer;
    move_owner(buffer, FREE)
#elif !defined(MUTANT_FORWARDED_STAYS)
    move_owner(buffer, DEVICE)
#endif
}

/* No buffer is in both queues, nor in one of them twice, and those that are belong to the device. */
inline audit_sent() {
    i_ = 0;
    do
    :: i_ < BUFFERS && is_sent[i_] ->
        assert(owner[forwarded[i_]] == DEVICE);
        j_ = 0;
        do
        :: j_ < BUFFERS ->
            assert(!(in_flight[j_] && carried[j_] == forwarded[i_]));
            assert(j_ == i_ || !(is_sent[j_] && forwarded[j_] == forwarded[i_]));
            j_++
        :: else -> break
        od;
        i_++
    :: i_ < BUFFERS && !is_sent[i_] -> i_++
    :: else -> break
    od
}
#endif

inline audit() {
#if FORWARDS
    audit_sent();
#endif
    i_ = 0;
    do
    :: i_ < BUFFERS -> assert(owner[i_] == whose[i_]); i_++
    :: else -> break
    od;
    assert(owned[FREE] + owned[DEVICE] + owned[CLIENT] == BUFFERS);
    i_ = 0;
    do
    :: i_ < owned[FREE] ->
        assert(owner[free_stack[i_]] == FREE);
        j_ = i_ + 1;
        do
        :: j_ < owned[FREE] -> assert(free_stack[i_] != free_stack[j_]); j_++
        :: else -> break
        od;
        i_++
    :: else -> break
    od;
    i_ = 0;
    do
    :: i_ < BUFFERS ->
        j_ = i_ + 1;
        assert(!in_flight[i_] || owner[carried[i_]] == DEVICE);
        do
        :: j_ < BUFFERS -> assert(!(in_flight[i_] && in_flight[j_] && carried[i_] == carried[j_])); j_++
        :: else -> break
        od;
        i_++
    :: else -> break
    od;
    /* So that equal states look equal: what is above the stack means nothing. */
    i_ = owned[FREE];
    do
    :: i_ < BUFFERS -> free_stack[i_] = 0; i_++
    :: else -> break
    od;
    i_ = 0;
    j_ = 0
}

#if ORDERED
#define AFTER(descriptor) (((descriptor) + 1) % BUFFERS)

inline give_to_device() {
    assert(!in_flight[free_head] && !holds[free_head]);
    buffer_ = free_stack[owned[FREE] - 1];
    move_owner(buffer_, DEVICE);
    whose[buffer_] = DEVICE;
    carried[free_head] = buffer_;
    in_flight[free_head] = true;
    order[ordered] = free_head;
    ordered++;
    holds[free_head] = true;
    free_head = AFTER(free_head)
}

/* What the device means by naming a chain: it is done with this one and all before it. */
inline let_go_up_to(descriptor) {
    do
    :: holds[descriptor] ->
        holds[order[0]] = false;
        ordered--;
        i_ = 0;
        do
        :: i_ < ordered -> order[i_] = order[i_ + 1]; i_++
        :: else -> break
        od;
        order[ordered] = 0
    :: else -> break
    od
}

/* ring_check, ring_begin_batch; `most`: how many chains there are by the used index, or in flight at most. */
inline begin_batch(descriptor, most) {
    i_ = oldest;
    j_ = 1;
    do
    :: i_ != descriptor && j_ <= most -> i_ = AFTER(i_); j_++
    :: else -> break
    od;
#ifdef MUTANT_ONE_TOO_MANY
    batch_left = (j_ <= most -> j_ + 1 : 0)
#else
    batch_left = (j_ <= most -> j_ : 0)
#endif
}

/* ring_next_of_batch, ring_unbook: `buffer_` is what comes back. */
inline take_next() {
    batch_left--;
#ifdef MUTANT_NAMED_ALONE
    i_ = named;
#else
    i_ = oldest;
#endif
    assert(in_flight[i_] && !holds[i_]);
    in_flight[i_] = false;
    buffer_ = carried[i_];
    carried[i_] = 0;
#ifndef MUTANT_OLDEST_STAYS
    oldest = AFTER(oldest)
#endif
}
#endif

active proctype world() {
    byte a_session, a_lease, an_index, descriptor;
#if FORWARDS
    bool forwards;
#endif
#if ORDERED
    byte most;
#endif
    d_step { start_session(); i_ = 0; do :: i_ < BUFFERS -> given_session[i_] = 0; i_++ :: else -> break od; i_ = 0 };
    skip;
    do
#if ORDERED
    :: d_step { owned[FREE] > 0 -> give_to_device(); audit() }
    ::  batch_left == 0 ->
        select(descriptor : 0 .. BUFFERS);
        select(most : 1 .. BUFFERS);
        skip;
        d_step {
            if
            :: descriptor < BUFFERS ->
                let_go_up_to(descriptor);
                if
                :: BELIEVED(descriptor) -> begin_batch(descriptor, most)
                :: else -> skip
                fi
            :: else -> skip
            fi;
#ifdef MUTANT_NAMED_ALONE
            named = descriptor;
#endif
            audit();
            descriptor = 0;
            most = 0
        }
    :: d_step { batch_left > 0 -> take_next(); lend(buffer_); audit() }
    :: d_step { batch_left > 0 -> take_next(); put_free(buffer_); audit() }
#else
    /* Refill: a free buffer into the queue, on any free descriptor. */
    :: owned[FREE] > 0 ->
        select(descriptor : 0 .. BUFFERS - 1);
        skip;
        d_step {
            if
            :: !in_flight[descriptor] ->
                buffer_ = free_stack[owned[FREE] - 1];
                move_owner(buffer_, DEVICE);
                whose[buffer_] = DEVICE;
                carried[descriptor] = buffer_;
                in_flight[descriptor] = true
            :: else -> skip
            fi;
            audit();
            descriptor = 0
        }
    /* The device says that it used some chain, true or not; the frame is for the client, or dropped. */
    ::  select(descriptor : 0 .. BUFFERS);
        if
        :: d_step { descriptor < BUFFERS && BELIEVED(descriptor) ->
            in_flight[descriptor] = false; lend(carried[descriptor]); carried[descriptor] = 0; audit();
            descriptor = 0 }
        :: d_step { descriptor < BUFFERS && in_flight[descriptor] ->
            in_flight[descriptor] = false; put_free(carried[descriptor]); carried[descriptor] = 0; audit();
            descriptor = 0 }
        :: else -> descriptor = 0      /* a fault: the session ends, below */
        fi
#endif
#if FORWARDS
    /* The device says that it sent some chain, true or not. */
    ::  select(descriptor : 0 .. BUFFERS);
        if
        :: d_step { descriptor < BUFFERS && BELIEVED_SENT(descriptor) ->
            is_sent[descriptor] = false; put_free(forwarded[descriptor]); forwarded[descriptor] = 0; audit();
            descriptor = 0 }
        :: else -> descriptor = 0
        fi
#endif
    /* The client gives something back, or sends it. */
    ::  select(a_session : 1 .. SESSIONS);
        select(a_lease : 0 .. LEASES - 1);
        select(an_index : 0 .. BUFFERS);
#if FORWARDS
        if
        :: forwards = true
        :: skip
        fi;
#endif
        skip;
        d_step {
            check(a_session, a_lease, an_index);
            if
            :: accepted ->
                assert(whose[an_index] == CLIENT);
                assert(a_session == given_session[an_index] && a_lease == given_lease[an_index]);
#if FORWARDS
                if
                :: forwards -> forward(an_index)
                :: else -> put_free(an_index)
                fi
#else
                put_free(an_index)
#endif
            :: else -> skip
            fi;
            accepted = 0;
#if FORWARDS
            forwards = false;
#endif
            audit();
            a_session = 0;
            a_lease = 0;
            an_index = 0
        }
    /* The session ends, whoever has what; the client keeps all its handles. */
    :: d_step { sessions < SESSIONS ->
            sessions++;
#ifndef MUTANT_SESSION_STAYS
            session++;
#endif
            start_session();
            audit()
        }
    od
}
