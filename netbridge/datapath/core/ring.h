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
    uint32_t buffer;  /* the token it was added with */
    uint32_t written; /* bytes the device wrote, checked against what it could write */
};

/* The shadow of one descriptor (split), or of one buffer id (packed). Of a chain only its head's counts. */
struct nb_slot {
    uint32_t buffer;   /* the chain's token */
    uint32_t writable; /* bytes the device may write */
    uint32_t readable; /* bytes the device reads */
    uint16_t next;     /* the next in the chain or in the free list. With IN_ORDER always the next one in the ring: the
                        * free ones, and those in flight, are then each without a gap */
    uint16_t length;   /* descriptors of the chain; 0: not the head of a chain in flight */
};

/* One descriptor; both formats have 16 bytes for it, and so have the tables of INDIRECT_DESC. */
struct vring_desc;
struct vring_packed_desc;

struct nb_virtqueue {
    union {
        struct vring_desc *desc;
        struct vring_packed_desc *packed_desc;
    };
    union {
        struct vring_avail *avail;
        struct vring_packed_event *driver_event;
    };
    union {
        struct vring_used *used;
        struct vring_packed_event *device_event;
    };
    bool packed;
    bool event_idx;
    bool in_order;
    bool interrupts; /* what the device was last told */
    uint16_t size;
    uint16_t table_segments; /* of each table of INDIRECT_DESC; 0: not agreed */
    uint16_t free_head;
    uint32_t free_count; /* descriptors */
    uint32_t chains_in_flight;
    /* Positions. Split: they wrap at 65,536, as the ring's own indices do. Packed: at twice the size; those of the first
     * lap stand for a wrap counter of 1, those of the second for 0. */
    uint16_t avail_next;
    uint16_t avail_shown;     /* packed: what comes from here on is not yet shown */
    uint16_t used_next;
    uint16_t used_shown; /* split: what the device's index said when it was last looked at */
    uint16_t withheld_flags; /* packed: of the descriptor at avail_shown, written last of all */
    uint32_t unpublished; /* positions before avail_next for which the device was not asked whether to notify it */
    uint32_t unnotified;  /* and those for which it was not notified, whatever it said: see ring_note_publication */
    /* IN_ORDER: one used element may stand for several chains. */
    uint16_t oldest;     /* the head that was added first of those in flight */
    uint16_t batch_left; /* chains of the element read last that virtqueue_take has not given yet */
    uint32_t batch_written; /* bytes written into the last of them */
    void *tables;        /* of INDIRECT_DESC: one for each slot */
    uint64_t tables_iova;
    struct nb_virtqueue_config config;
    struct nb_slot slots[];
};

/* Whether to tell a side that waits for `event`, when what it waits for has gone on from `old` to `new` (virtio 1.3
 * §2.7.10): whether `event` is among [old, new), whichever of them has wrapped. */
static inline bool vring_need_event(uint16_t event, uint16_t new, uint16_t old)
{
    return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

/* EVENT_IDX: the device waits for one of the positions that it was not notified of. The specification (virtio 1.3 §2.7.10,
 * §2.8.10) looks at those alone that are published now. But a device that sleeps asks at the position it has come to, then
 * looks at the ring once more, and what it finds there was published while it wanted to hear of nothing. QEMU before 9.1
 * may find that those buffers are too few for the frame, and then sleeps without asking anew (virtio_net_has_buffers). By
 * the letter nothing would ever wake it. A notification too many harms nobody.
 *
 * `most`: as far back as a position is told from one that is still to come. */
static inline void ring_note_publication(struct nb_virtqueue *queue, uint32_t most)
{
    queue->unnotified += queue->unpublished;
    if (queue->unnotified > most)
        queue->unnotified = most;
    queue->unpublished = 0;
}

static inline uint32_t ring_bytes(const struct nb_segment *segments, uint32_t count)
{
    uint32_t bytes = 0;
    for (uint32_t i = 0; i < count; i++)
        bytes += segments[i].len;
    return bytes;
}

/* Whether a chain of so many segments goes into a table, and so takes a single descriptor. */
static inline bool ring_uses_table(const struct nb_virtqueue *queue, uint32_t segments)
{
    return segments > 1 && segments <= queue->table_segments;
}

/* The table of a slot: where the device sees it. */
static inline uint64_t ring_table_iova(const struct nb_virtqueue *queue, uint16_t slot)
{
    return queue->tables_iova + (uint64_t)slot * queue->table_segments * 16;
}

/* Books a chain that was added. */
static inline void ring_book(struct nb_virtqueue *queue, uint16_t head, const struct nb_segment *segments,
                             uint32_t readable, uint32_t writable, uint32_t descriptors, uint32_t token)
{
    struct nb_slot *slot = &queue->slots[head];
    slot->buffer = token;
    slot->writable = ring_bytes(segments + readable, writable);
    slot->readable = ring_bytes(segments, readable);
    slot->length = (uint16_t)descriptors;
    queue->free_count -= descriptors;
    queue->chains_in_flight++;
}

/* Books a chain that came back: its slots, from `head` to `tail`, are free. */
static inline void ring_unbook(struct nb_virtqueue *queue, uint16_t head, uint16_t tail)
{
    queue->free_count += queue->slots[head].length;
    queue->slots[head].length = 0;
    queue->chains_in_flight--;
    if (queue->in_order) {
        queue->oldest = queue->slots[tail].next;
        return;
    }
    queue->slots[tail].next = queue->free_head;
    queue->free_head = head;
}

/* What the device says of a chain, held against the shadow: 0, or -1 - the enum nb_device_fault. */
static inline int ring_check(const struct nb_virtqueue *queue, uint32_t id, uint32_t len)
{
    if (id >= queue->size || queue->slots[id].length == 0)
        return -1 - NB_FAULT_USED_ID;
    /* For a chain without writable descriptors the length says nothing, and some devices fill it in all the same
     * (virtio 1.3 §2.7.8.3). */
    if (queue->slots[id].writable != 0 && len > queue->slots[id].writable)
        return -1 - NB_FAULT_USED_LENGTH;
    return 0;
}

/* IN_ORDER: an element naming `id`, which is in flight, stands for all chains from the oldest to that one (virtio 1.3
 * §2.7.9, §2.8.9), `most` at most. 0, or -1 - the enum nb_device_fault. `slots`: how many of them a chain takes, 0: as
 * many as it has descriptors. */
static inline int ring_begin_batch(struct nb_virtqueue *queue, uint32_t id, uint32_t written, uint32_t most, uint32_t slots)
{
    uint32_t at = queue->oldest, chains = 1;
    while (at != id) {
        if (chains++ == most)
            return -1 - NB_FAULT_USED_ID;
        at += slots ? slots : queue->slots[at].length;
        if (at >= queue->size)
            at -= queue->size;
    }
    queue->batch_left = (uint16_t)chains;
    queue->batch_written = written;
    return 0;
}

/* IN_ORDER: the next chain of a batch of which some are left. All but the last were used completely. */
static inline uint16_t ring_next_of_batch(struct nb_virtqueue *queue, uint32_t *written)
{
    uint16_t head = queue->oldest;
    *written = --queue->batch_left ? queue->slots[head].writable : queue->batch_written;
    return head;
}

#endif
