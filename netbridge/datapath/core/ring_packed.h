/* The packed format of a virtqueue, the driver's side (virtio 1.3 §2.8).
 *
 * One ring of descriptors that both sides write: the driver makes one available, the device writes over one of those when
 * it has used a chain. Whose turn it is, two bits of the flags say, and what they mean changes with each lap. What the
 * device writes names the chain by its buffer id, in whatever order it is done with them.
 */
#ifndef NB_RING_PACKED_H
#define NB_RING_PACKED_H

#include "ring.h"

/* virtio 1.3 §2.8.13, §2.8.14 */
struct vring_packed_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t id;
    uint16_t flags;
};
enum {
    VRING_PACKED_F_NEXT = 1,
    VRING_PACKED_F_WRITE = 2,
    VRING_PACKED_F_INDIRECT = 4,
    VRING_PACKED_F_AVAIL = 1 << 7,
    VRING_PACKED_F_USED = 1 << 15,
};
struct vring_packed_event {
    uint16_t off_wrap; /* a ring position: offset, and the wrap counter in the highest bit */
    uint16_t flags;
};
enum { VRING_PACKED_EVENT_ENABLE = 0, VRING_PACKED_EVENT_DISABLE = 1, VRING_PACKED_EVENT_DESC = 2 };
enum { VRING_PACKED_WRAP = 0x8000, PACKED_NOWHERE = 0x10000 };

static inline uint16_t packed_offset(const struct nb_virtqueue *queue, uint16_t position)
{
    return position < queue->size ? position : (uint16_t)(position - queue->size);
}

static inline uint16_t packed_advance(const struct nb_virtqueue *queue, uint16_t position, uint32_t by)
{
    uint32_t laps = 2u * queue->size, next = position + by;
    return (uint16_t)(next < laps ? next : next - laps);
}

/* The flags by which the driver makes a descriptor available: AVAIL is the wrap counter, USED its opposite. */
static inline uint16_t packed_available(const struct nb_virtqueue *queue, uint16_t position)
{
    return position < queue->size ? VRING_PACKED_F_AVAIL : VRING_PACKED_F_USED;
}

/* A position as it is shown to the device. */
static inline uint16_t packed_off_wrap(const struct nb_virtqueue *queue, uint16_t position)
{
    return packed_offset(queue, position) | (position < queue->size ? VRING_PACKED_WRAP : 0);
}

/* Fills a descriptor in. The first one that was not shown yet gets its flags last: see packed_show. */
static inline void packed_write(struct nb_virtqueue *queue, uint16_t position, uint64_t iova, uint32_t len, uint16_t id,
                                uint32_t flags)
{
    struct vring_packed_desc *desc = &queue->packed_desc[packed_offset(queue, position)];
    desc->addr = iova;
    desc->len = len;
    desc->id = id;
    uint16_t all_flags = (uint16_t)(flags | packed_available(queue, position));
    if (position == queue->avail_shown)
        queue->withheld_flags = all_flags;
    else
        desc->flags = all_flags;
}

/* virtio 1.3 §2.8.7: of a table's flags the device looks at WRITE alone. */
static inline void packed_add_table(struct nb_virtqueue *queue, uint16_t id, const struct nb_segment *segments,
                                    uint32_t readable, uint32_t count)
{
    struct vring_packed_desc *table = (struct vring_packed_desc *)queue->tables + (uint32_t)id * queue->table_segments;
    for (uint32_t i = 0; i < count; i++)
        table[i] = (struct vring_packed_desc){
            .addr = segments[i].iova, .len = segments[i].len, .flags = i >= readable ? VRING_PACKED_F_WRITE : 0};
    packed_write(queue, queue->avail_next, ring_table_iova(queue, id), count * (uint32_t)sizeof(*table), id,
                 VRING_PACKED_F_INDIRECT);
}

static inline void packed_add(struct nb_virtqueue *queue, const struct nb_segment *segments, uint32_t readable,
                              uint32_t writable, uint32_t token)
{
    uint32_t count = readable + writable, descriptors = count;
    uint16_t id = queue->free_head;
    if (ring_uses_table(queue, count)) {
        packed_add_table(queue, id, segments, readable, count);
        descriptors = 1;
    } else {
        for (uint32_t i = 0; i < count; i++)
            packed_write(queue, packed_advance(queue, queue->avail_next, i), segments[i].iova, segments[i].len, id,
                         (i >= readable ? VRING_PACKED_F_WRITE : 0) | (i + 1 < count ? VRING_PACKED_F_NEXT : 0));
    }
    queue->free_head = queue->slots[id].next;
    queue->avail_next = packed_advance(queue, queue->avail_next, descriptors);
    queue->unpublished += descriptors;
    ring_book(queue, id, segments, readable, writable, descriptors, token);
}

/* The device takes descriptors in the order of the ring, so it finds nothing of what was added before the first one says
 * that it is available. Release: everything else is there before that. One such store for all, not one for each chain. */
static inline void packed_show(struct nb_virtqueue *queue)
{
    if (queue->avail_shown == queue->avail_next)
        return;
    store_release_16(&queue->packed_desc[packed_offset(queue, queue->avail_shown)].flags, queue->withheld_flags);
    queue->avail_shown = queue->avail_next;
}

/* The position at which the device asked for a notification, as avail_next counts; or PACKED_NOWHERE. */
static inline uint32_t packed_event(const struct nb_virtqueue *queue)
{
    uint16_t off_wrap = load_once_16(&queue->device_event->off_wrap);
    uint32_t offset = off_wrap & ~VRING_PACKED_WRAP;
    return offset < queue->size ? offset + (off_wrap & VRING_PACKED_WRAP ? 0 : queue->size) : PACKED_NOWHERE;
}

/* Whether the device waits for a descriptor that it has used long since. QEMU does: virtio_net_tx_complete asks for a
 * notification when its wire has room again, then takes what there is, and on a packed ring virtqueue_pop does not move
 * the position on. Nor does it help that it was notified at that position: while its wire was full it did not listen.
 *
 * From used_next on up to a whole ring the device may have what it asked behind; that whole ring only if all are its. */
static inline bool packed_has_used(const struct nb_virtqueue *queue, uint32_t event)
{
    uint32_t laps = 2u * queue->size;
    uint32_t ahead = (event + laps - queue->used_next) % laps;
    return ahead > queue->size || (ahead == queue->size && queue->free_count != 0);
}

/* Whether the device wants to be notified (virtio 1.3 §2.8.10) of anything it was not notified of. After a full fence. */
static inline bool packed_wants_notification(const struct nb_virtqueue *queue)
{
    /* Acquire: the device fills in off_wrap, then says DESC. */
    uint16_t flags = load_acquire_16(&queue->device_event->flags);
    if (!queue->event_idx || flags != VRING_PACKED_EVENT_DESC)
        return flags != VRING_PACKED_EVENT_DISABLE;
    uint32_t event = packed_event(queue);
    if (event == PACKED_NOWHERE || packed_has_used(queue, event))
        return true; /* to be notified once too often harms nobody */
    /* Behind avail_next, and not further back than what is unnotified: what vring_need_event asks where indices wrap at
     * 65,536. */
    uint32_t laps = 2u * queue->size;
    return (queue->avail_next + laps - event - 1) % laps < queue->unnotified;
}

/* Whether the device may sleep although it has chains that it has not seen: after their publication it has gone past the
 * position where it asked. After a full fence, and after all that it has completed was taken. */
static inline bool packed_sleeps_on(const struct nb_virtqueue *queue)
{
    if (!queue->event_idx || queue->chains_in_flight == 0 ||
        load_acquire_16(&queue->device_event->flags) != VRING_PACKED_EVENT_DESC)
        return false;
    uint32_t event = packed_event(queue);
    return event != PACKED_NOWHERE && packed_has_used(queue, event);
}

/* Whether the next descriptor that the device is to write says that it is used: both bits are the wrap counter. */
static inline bool packed_is_used(const struct nb_virtqueue *queue)
{
    /* Acquire: the descriptor's id and length and the buffer's contents are read after the flags. */
    uint16_t flags = load_acquire_16(&queue->packed_desc[packed_offset(queue, queue->used_next)].flags);
    uint16_t both = VRING_PACKED_F_AVAIL | VRING_PACKED_F_USED;
    return (flags & both) == (queue->used_next < queue->size ? both : 0);
}

/* There is no index that says how many: at least one, and at most what is in flight. */
static inline int packed_completed(const struct nb_virtqueue *queue)
{
    if (queue->batch_left == 0 && !packed_is_used(queue))
        return 0;
    return queue->chains_in_flight ? (int)queue->chains_in_flight : -1 - NB_FAULT_USED_JUMP;
}

static inline int packed_take(struct nb_virtqueue *queue, struct nb_used *taken, uint64_t *readable)
{
    uint32_t id = 0, len = 0;
    if (queue->batch_left == 0) {
        if (!packed_is_used(queue))
            return 0;
        const struct vring_packed_desc *desc = &queue->packed_desc[packed_offset(queue, queue->used_next)];
        id = load_once_16(&desc->id);
        len = load_once_32(&desc->len);
        int fault = ring_check(queue, id, len);
        if (!fault && queue->in_order)
            fault = ring_begin_batch(queue, id, len, queue->chains_in_flight, 1);
        if (fault)
            return fault;
    }
    if (queue->in_order)
        id = ring_next_of_batch(queue, &len);
    struct nb_slot *head = &queue->slots[id];
    queue->used_next = packed_advance(queue, queue->used_next, head->length);
    ring_unbook(queue, (uint16_t)id, (uint16_t)id);
    *taken = (struct nb_used){.buffer = head->buffer, .written = len};
    *readable += head->readable;
    return 1;
}

/* virtio 1.3 §2.8.10 */
static inline void packed_set_interrupts(struct nb_virtqueue *queue, bool on)
{
    uint16_t flags = on ? VRING_PACKED_EVENT_ENABLE : VRING_PACKED_EVENT_DISABLE;
    if (on && queue->event_idx) {
        store_once_16(&queue->driver_event->off_wrap, packed_off_wrap(queue, queue->used_next));
        flags = VRING_PACKED_EVENT_DESC;
    }
    /* Release: the position is there before it is said to count. */
    store_release_16(&queue->driver_event->flags, flags);
}

#endif
