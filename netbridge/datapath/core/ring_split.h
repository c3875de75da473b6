/* The split format of a virtqueue, the driver's side (virtio 1.3 §2.7). */
#ifndef NB_RING_SPLIT_H
#define NB_RING_SPLIT_H

#include "ring.h"

/* virtio 1.3 §2.7.5, §2.7.6, §2.7.8 */
struct vring_desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags;
    uint16_t next;
};
enum { VRING_DESC_F_NEXT = 1, VRING_DESC_F_WRITE = 2, VRING_DESC_F_INDIRECT = 4 };

struct vring_avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[]; /* and one more: used_event */
};
enum { VRING_AVAIL_F_NO_INTERRUPT = 1 };

struct vring_used_elem {
    uint32_t id;
    uint32_t len;
};
struct vring_used {
    uint16_t flags;
    uint16_t idx;
    struct vring_used_elem ring[]; /* and 16 bits more: avail_event */
};
enum { VRING_USED_F_NO_NOTIFY = 1 };

static inline uint16_t *split_used_event(const struct nb_virtqueue *queue) { return &queue->avail->ring[queue->size]; }

static inline const uint16_t *split_avail_event(const struct nb_virtqueue *queue)
{
    return (const uint16_t *)&queue->used->ring[queue->size];
}

static inline struct vring_desc split_descriptor(const struct nb_segment *segment, bool is_writable, bool is_last, uint16_t next)
{
    return (struct vring_desc){
        .addr = segment->iova,
        .len = segment->len,
        .flags = (uint16_t)((is_writable ? VRING_DESC_F_WRITE : 0) | (is_last ? 0 : VRING_DESC_F_NEXT)),
        .next = is_last ? 0 : next,
    };
}

/* virtio 1.3 §2.7.5.3 */
static inline void split_add_table(struct nb_virtqueue *queue, uint16_t head, const struct nb_segment *segments,
                                   uint32_t readable, uint32_t count)
{
    struct vring_desc *table = (struct vring_desc *)queue->tables + (uint32_t)head * queue->table_segments;
    for (uint32_t i = 0; i < count; i++)
        table[i] = split_descriptor(&segments[i], i >= readable, i + 1 == count, (uint16_t)(i + 1));
    queue->desc[head] = (struct vring_desc){
        .addr = ring_table_iova(queue, head), .len = count * (uint32_t)sizeof(*table), .flags = VRING_DESC_F_INDIRECT};
}

static inline void split_add(struct nb_virtqueue *queue, const struct nb_segment *segments, uint32_t readable,
                             uint32_t writable, uint32_t token)
{
    uint32_t count = readable + writable, descriptors = count;
    uint16_t head = queue->free_head, next = head;
    if (ring_uses_table(queue, count)) {
        split_add_table(queue, head, segments, readable, count);
        next = queue->slots[head].next;
        descriptors = 1;
    } else {
        for (uint32_t i = 0; i < count; i++) {
            uint16_t at = next;
            next = queue->slots[at].next;
            queue->desc[at] = split_descriptor(&segments[i], i >= readable, i + 1 == count, next);
        }
    }
    queue->free_head = next;
    ring_book(queue, head, segments, readable, writable, descriptors, token);
    queue->avail->ring[queue->avail_next++ & (queue->size - 1)] = head;
    queue->unpublished++;
}

static inline void split_show(struct nb_virtqueue *queue)
{
    /* Release: descriptors, tables and ring entries are there before the index says so. */
    store_release_16(&queue->avail->idx, queue->avail_next);
}

/* Whether the device wants to be notified (virtio 1.3 §2.7.10) of anything it was not notified of. After a full fence. */
static inline bool split_wants_notification(const struct nb_virtqueue *queue)
{
    if (queue->event_idx)
        return vring_need_event(load_once_16(split_avail_event(queue)), queue->avail_next,
                                (uint16_t)(queue->avail_next - queue->unnotified));
    return !(load_once_16(&queue->used->flags) & VRING_USED_F_NO_NOTIFY);
}

static inline int split_completed(struct nb_virtqueue *queue)
{
    /* Acquire: the used elements and the buffers' contents are read after the index that announced them. */
    uint16_t shown = load_acquire_16(&queue->used->idx);
    uint16_t completed = (uint16_t)(shown - queue->used_next);
    if (completed > queue->chains_in_flight)
        return -1 - NB_FAULT_USED_JUMP;
    queue->used_shown = shown;
    return completed;
}

static inline int split_take(struct nb_virtqueue *queue, struct nb_used *taken, uint64_t *readable)
{
    uint16_t shown = (uint16_t)(queue->used_shown - queue->used_next);
    if (shown == 0)
        return 0;
    uint32_t id = 0, len = 0;
    if (queue->batch_left == 0) {
        const struct vring_used_elem *element = &queue->used->ring[queue->used_next & (queue->size - 1)];
        id = load_once_32(&element->id);
        len = load_once_32(&element->len);
        int fault = ring_check(queue, id, len);
        if (!fault && queue->in_order)
            fault = ring_begin_batch(queue, id, len, shown, 0);
        if (fault)
            return fault;
    }
    if (queue->in_order)
        id = ring_next_of_batch(queue, &len);
    struct nb_slot *head = &queue->slots[id];
    uint16_t tail = (uint16_t)id;
    for (uint16_t left = head->length; left > 1; left--)
        tail = queue->slots[tail].next;
    ring_unbook(queue, (uint16_t)id, tail);
    queue->used_next++;
    *taken = (struct nb_used){.buffer = head->buffer, .written = len};
    *readable += head->readable;
    return 1;
}

/* virtio 1.3 §2.7.7. With EVENT_IDX the device interrupts when it passes used_event: at once, or not before its index
 * has gone all the way round. */
static inline void split_set_interrupts(struct nb_virtqueue *queue, bool on)
{
    if (queue->event_idx)
        store_once_16(split_used_event(queue), (uint16_t)(queue->used_next - !on));
    else
        store_once_16(&queue->avail->flags, on ? 0 : VRING_AVAIL_F_NO_INTERRUPT);
}

#endif
