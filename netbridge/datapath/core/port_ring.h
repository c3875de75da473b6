/* One ring of the port, seen from either end (docs/port.md).
 *
 * A ring has as many slots as there are buffers that can be in it, so putting an entry in never fails and the producer
 * never needs to believe the consumer. Each side keeps its own count privately; what it reads of the other's is copied
 * once and bounded.
 */
#ifndef NB_PORT_RING_H
#define NB_PORT_RING_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/eventfd.h>

#include "core.h"
#include "barriers.h"
#include "counting.h"

static inline struct nb_entry *ring_slot(const struct nb_ring_place *ring, uint32_t position)
{
    return (struct nb_entry *)(ring->header + 1) + (position & (ring->slots - 1));
}

static inline void ring_put(const struct nb_ring_place *ring, uint32_t *put, struct nb_entry entry)
{
    *ring_slot(ring, (*put)++) = entry;
}

/* Shows the consumer what was put in. Release: the entries, and the frames behind them, before the count. */
static inline void ring_publish(const struct nb_ring_place *ring, uint32_t put)
{
    store_release_32(&ring->header->produced, put);
}

/* After ring_publish: whether the consumer sleeps and must be woken. Clears its wish, so one sleep costs one doorbell. The
 * doorbell must be rung after this returned true: a consumer that armed again meanwhile relies on it. */
static inline bool ring_must_wake(const struct nb_ring_place *ring)
{
    fence_store_load(); /* pairs with the one in ring_arm */
    if (!load_once_32(&ring->header->wake))
        return false;
    store_once_32(&ring->header->wake, 0);
    return true;
}

/* Entries waiting, at most `slots`; -1: the producer's count ran ahead by more than the ring holds. */
static inline int64_t ring_waiting(const struct nb_ring_place *ring, uint32_t taken)
{
    /* Acquire: the entries are read after the count that announced them. The difference is of 32 bits by type, so it is
     * right across the wrap. */
    uint32_t waiting = load_acquire_32(&ring->header->produced) - taken;
    return waiting > ring->slots ? -1 : (int64_t)waiting;
}

/* Copies the next entry out, once: the producer may be changing it. */
static inline struct nb_entry ring_take(const struct nb_ring_place *ring, uint32_t *taken)
{
    const struct nb_entry *slot = ring_slot(ring, (*taken)++);
    return (struct nb_entry){
        .dma_handle = load_once_64(&slot->dma_handle),
        .len = load_once_32(&slot->len),
        .kind = load_once_16(&slot->kind),
        .flags = load_once_8(&slot->flags),
        .queue = load_once_8(&slot->queue),
    };
}

/* Tells whoever watches how far the consumer is; nothing depends on it. */
static inline void ring_consumed(const struct nb_ring_place *ring, uint32_t taken)
{
    store_once_32(&ring->header->consumed, taken);
}

/* Before sleeping: asks for a doorbell. The caller then calls fence_store_load() and looks at the ring once more. */
static inline void ring_arm(const struct nb_ring_place *ring) { store_once_32(&ring->header->wake, 1); }
static inline void ring_disarm(const struct nb_ring_place *ring) { store_once_32(&ring->header->wake, 0); }

static inline bool ring_is_valid(const struct nb_ring_place *ring, uint32_t buffers)
{
    uint32_t slots = ring->slots;
    return ring->header != NULL && slots != 0 && slots <= MOST_BUFFERS && (slots & (slots - 1)) == 0 && slots >= buffers;
}

/* Rings a doorbell. A full counter (EAGAIN) means that it is ringing already. */
static inline void doorbell_ring(int fd) { (void)!eventfd_write(fd, 1); }

/* Silences a doorbell or an interrupt's eventfd. */
static inline void doorbell_clear(int fd)
{
    eventfd_t value;
    (void)!eventfd_read(fd, &value);
}

#endif
