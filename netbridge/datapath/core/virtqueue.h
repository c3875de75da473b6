/* A virtqueue, the driver's side, whatever its format: what the pump knows of it. It knows neither PCI nor Ethernet.
 *
 * Chains of segments are added under a token, shown to the device together, and come back with their token when the
 * device has used them. The formats are in ring_split.h and ring_packed.h; the private shadow, which is all that is
 * believed, is in ring.h.
 */
#ifndef NB_VIRTQUEUE_H
#define NB_VIRTQUEUE_H

#include <sys/eventfd.h>

#include "ring.h"
#include "ring_packed.h"
#include "ring_split.h"

/* Whether a chain of so many segments can be added. */
static inline bool virtqueue_has_room(const struct nb_virtqueue *queue, uint32_t segments)
{
    return queue->free_count >= (ring_uses_table(queue, segments) ? 1 : segments);
}

/* How many chains of so many segments can be added. */
static inline uint32_t virtqueue_room(const struct nb_virtqueue *queue, uint32_t segments)
{
    return queue->free_count / (ring_uses_table(queue, segments) ? 1 : segments);
}

/* Whether more than half of the queue is free. */
static inline bool virtqueue_is_half_empty(const struct nb_virtqueue *queue)
{
    return queue->free_count > queue->size / 2;
}

/* Chains that were added and have not come back. */
static inline uint32_t virtqueue_in_flight(const struct nb_virtqueue *queue) { return queue->chains_in_flight; }

/* A number below `size` that the next chain will have to itself as long as it is in flight. */
static inline uint32_t virtqueue_next_slot(const struct nb_virtqueue *queue) { return queue->free_head; }

/* Adds a chain: `readable` segments that the device reads, then `writable` ones that it writes; one at least. Only while
 * virtqueue_has_room(). The device sees nothing of it before virtqueue_show() or virtqueue_publish(). `token` comes back
 * in nb_used.buffer. */
static inline void virtqueue_add(struct nb_virtqueue *queue, const struct nb_segment *segments, uint32_t readable,
                                 uint32_t writable, uint32_t token)
{
    if (queue->packed)
        packed_add(queue, segments, readable, writable, token);
    else
        split_add(queue, segments, readable, writable, token);
}

/* Shows the device what was added, for it to find when it looks. The question whether to notify it is left for the next
 * virtqueue_publish(). */
static inline void virtqueue_show(struct nb_virtqueue *queue)
{
    if (queue->packed)
        packed_show(queue);
    else
        split_show(queue);
}

/* Whether chains were added since the last virtqueue_publish(). */
static inline bool virtqueue_has_unpublished(const struct nb_virtqueue *queue)
{
    return queue->unpublished != 0;
}

/* Shows the device what was added, and says whether it wants to be notified (virtio 1.3 §2.7.13, §2.8.21). The caller then
 * does. */
static inline bool virtqueue_publish(struct nb_virtqueue *queue)
{
    if (!virtqueue_has_unpublished(queue))
        return false;
    virtqueue_show(queue);
    /* The device says when it wants to be woken, then looks at the ring; we fill the ring, then look what it said. */
    fence_store_load();
    ring_note_publication(queue, queue->packed ? 2u * queue->size - 1 : UINT16_MAX);
    bool wanted = queue->packed ? packed_wants_notification(queue) : split_wants_notification(queue);
    if (wanted)
        queue->unnotified = 0;
    return wanted;
}

/* Whether the device may have gone to sleep on chains that were shown to it, and that nobody will tell it of any more. To be
 * asked before the driver sleeps, after a full fence and once nothing is left to be taken. */
static inline bool virtqueue_device_sleeps_on(const struct nb_virtqueue *queue)
{
    return queue->packed && packed_sleeps_on(queue);
}

/* What a notification says with NOTIFICATION_DATA: the queue, and how far it is filled (virtio 1.3 §2.9, §4.1.5.2). */
static inline uint32_t virtqueue_notification(const struct nb_virtqueue *queue)
{
    uint16_t at = queue->packed ? packed_off_wrap(queue, queue->avail_next) : queue->avail_next;
    return (uint32_t)at << 16 | queue->config.index;
}

static inline void virtqueue_notify(const struct nb_virtqueue *queue)
{
    const struct nb_virtqueue_config *config = &queue->config;
    if (config->kick_fd >= 0)
        (void)!eventfd_write(config->kick_fd, 1);
    else if (config->features & NB_RING_NOTIFICATION_DATA)
        *(volatile uint32_t *)config->notify = virtqueue_notification(queue);
    else
        *(volatile uint16_t *)config->notify = config->index;
}

/* Looks what the device has completed: 0: nothing; otherwise virtqueue_take_burst() gives some, and no more than this; or
 * -1 - the enum nb_device_fault. */
static inline int virtqueue_completed(struct nb_virtqueue *queue)
{
    return queue->packed ? packed_completed(queue) : split_completed(queue);
}

/* Takes completed chains, up to `most`; of a split queue, of those that virtqueue_completed() saw. Returns how many, adds what
 * the device was given to read of them to `readable`, bytes. `last`: 1: there may be more; 0: there is none; or -1 - the enum
 * nb_device_fault. All at once, so that what a chain brought can be fetched while others are looked at. */
static inline int virtqueue_take_burst(struct nb_virtqueue *queue, struct nb_used *taken, int most, uint64_t *readable,
                                       int *last)
{
    int count = 0, got = 1;
    if (queue->packed)
        while (count < most && (got = packed_take(queue, &taken[count], readable)) > 0)
            count++;
    else
        while (count < most && (got = split_take(queue, &taken[count], readable)) > 0)
            count++;
    *last = got;
    return count;
}

/* The next one alone. 1; or what `last` is said to be. */
static inline int virtqueue_take(struct nb_virtqueue *queue, struct nb_used *taken)
{
    uint64_t readable = 0;
    return queue->packed ? packed_take(queue, taken, &readable) : split_take(queue, taken, &readable);
}

/* Interrupts on or off: a hint to the device, so whoever turns them on looks once more, after a full fence. On: for the
 * next chain that completes, and for none after it with EVENT_IDX. */
static inline void virtqueue_set_interrupts(struct nb_virtqueue *queue, bool on)
{
    /* With EVENT_IDX "on" names a position, which may have moved. */
    if (queue->interrupts == on && !(on && queue->event_idx))
        return;
    queue->interrupts = on;
    if (queue->packed)
        packed_set_interrupts(queue, on);
    else
        split_set_interrupts(queue, on);
}

#endif
