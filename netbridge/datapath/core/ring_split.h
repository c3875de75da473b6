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
enum { VRING_DESC_F_NEXT = 1, VRING_DESC_F_WRITE = 2 };

struct vring_avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[];
};
enum { VRING_AVAIL_F_NO_INTERRUPT = 1 };

struct vring_used_elem {
    uint32_t id;
    uint32_t len;
};
struct vring_used {
    uint16_t flags;
    uint16_t idx;
    struct vring_used_elem ring[];
};
enum { VRING_USED_F_NO_NOTIFY = 1 };

static inline void split_add(struct nb_virtqueue *queue, const struct nb_segment *segments, uint32_t readable,
                             uint32_t writable, uint32_t token)
{
    uint32_t count = readable + writable;
    uint32_t bytes_readable = 0, bytes_writable = 0;
    uint16_t head = queue->free_head, at = head;
    for (uint32_t i = 0; i < count; i++) {
        bool is_writable = i >= readable, is_last = i + 1 == count;
        uint16_t next = queue->slots[at].next;
        uint32_t flags = (is_writable ? VRING_DESC_F_WRITE : 0) | (is_last ? 0 : VRING_DESC_F_NEXT);
        queue->desc[at] = (struct vring_desc){
            .addr = segments[i].iova,
            .len = segments[i].len,
            .flags = (uint16_t)flags,
            .next = is_last ? 0 : next,
        };
        *(is_writable ? &bytes_writable : &bytes_readable) += segments[i].len;
        at = next;
    }
    struct nb_slot *slot = &queue->slots[head];
    slot->buffer = token;
    slot->writable = bytes_writable;
    slot->readable = bytes_readable;
    slot->length = (uint16_t)count;
    queue->free_head = at;
    queue->free_count -= (uint16_t)count;
    queue->avail->ring[queue->avail_next++ & (queue->size - 1)] = head;
    queue->chains_in_flight++;
}

static inline void split_show(struct nb_virtqueue *queue)
{
    /* Release: descriptors and ring entries are there before the index says so. */
    store_release_16(&queue->avail->idx, queue->avail_next);
}

/* Whether the device wants to be notified (virtio 1.3 §2.7.10). After a full fence. */
static inline bool split_wants_notification(const struct nb_virtqueue *queue)
{
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

static inline int split_take(struct nb_virtqueue *queue, struct nb_used *taken)
{
    if (queue->used_next == queue->used_shown)
        return 0;
    const struct vring_used_elem *element = &queue->used->ring[queue->used_next & (queue->size - 1)];
    uint32_t id = load_once_32(&element->id);
    uint32_t len = load_once_32(&element->len);
    if (id >= queue->size || queue->slots[id].length == 0)
        return -1 - NB_FAULT_USED_ID;
    struct nb_slot *head = &queue->slots[id];
    /* For a chain without writable descriptors the length says nothing, and some devices fill it in all the same
     * (virtio 1.3 §2.7.8.3). */
    if (head->writable != 0 && len > head->writable)
        return -1 - NB_FAULT_USED_LENGTH;
    struct nb_slot *tail = head;
    for (uint16_t left = head->length; left > 1; left--)
        tail = &queue->slots[tail->next];
    queue->free_count += head->length;
    tail->next = queue->free_head;
    queue->free_head = (uint16_t)id;
    head->length = 0;
    queue->used_next++;
    queue->chains_in_flight--;
    *taken = (struct nb_used){.buffer = head->buffer, .written = len, .readable = head->readable};
    return 1;
}

/* virtio 1.3 §2.7.7 */
static inline void split_set_interrupts(struct nb_virtqueue *queue, bool on)
{
    if (queue->interrupts == on)
        return;
    queue->interrupts = on;
    store_once_16(&queue->avail->flags, on ? 0 : VRING_AVAIL_F_NO_INTERRUPT);
}

#endif
