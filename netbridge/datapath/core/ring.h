/* What every format of virtqueue has: where its parts are, what was agreed about it, and the private shadow.
 *
 * The device can write its part of the ring, and nothing keeps a broken one from writing elsewhere in the queue's memory.
 * So everything needed to give a buffer back is in the shadow: descriptors are written for the device and never read
 * again, and a used element is believed only if the shadow says that its chain is in flight.
 */
#ifndef NB_RING_H
#define NB_RING_H

#include <stdbool.h>
#include <stdint.h>

#include "core.h"
#include "barriers.h"

/* Memory that the device reads or writes. */
struct nb_segment {
    uint64_t iova;
    uint32_t len;
};

/* A completed chain. */
struct nb_used {
    uint32_t buffer;   /* the token it was added with */
    uint32_t written;  /* bytes the device wrote, checked against what it could write */
    uint32_t readable; /* bytes it was given to read */
};

/* The shadow of one descriptor. */
struct nb_slot {
    uint32_t buffer;   /* of a chain's head: the chain's token */
    uint32_t writable; /* of a chain's head: bytes the device may write */
    uint32_t readable; /* of a chain's head: bytes the device reads */
    uint16_t next;     /* the chain's or the free list's next descriptor */
    uint16_t length;   /* of a chain's head: its descriptors; 0: not the head of a chain in flight */
};

struct vring_desc;
struct vring_avail;
struct vring_used;

struct nb_virtqueue {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    volatile void *notify; /* where notifications are written; not looked at with a kick_fd */
    int kick_fd;           /* eventfd that notifies; -1: none */
    uint16_t size;
    uint16_t index;
    uint16_t free_head;
    uint16_t free_count;
    uint16_t avail_next; /* wraps at 65,536, as the ring's own index does */
    uint16_t avail_published;
    uint16_t used_next;
    uint16_t used_shown; /* what the device's index said when it was last looked at */
    uint16_t chains_in_flight;
    bool interrupts;
    struct nb_slot slots[];
};

#endif
