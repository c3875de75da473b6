/* A split virtqueue, the driver's side (virtio 1.3 §2.7). It knows neither PCI nor Ethernet.
 *
 * The device can write the used ring, and nothing keeps a broken one from writing elsewhere in the queue's memory. So
 * everything needed to give a buffer back is in a private shadow: descriptors are written for the device and never read
 * again, and a used element is believed only if the shadow says that its chain is in flight.
 */
#ifndef NB_VIRTQUEUE_H
#define NB_VIRTQUEUE_H

#include <stdbool.h>
#include <stdint.h>

#include "core.h"
#include "barriers.h"

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

/* The shadow of one descriptor. */
struct nb_slot {
    uint32_t buffer;   /* of a chain's head: which buffer the chain carries */
    uint32_t writable; /* of a chain's head: bytes the device may write */
    uint32_t readable; /* of a chain's head: bytes of frame the device reads */
    uint16_t next;     /* the chain's or the free list's next descriptor */
    uint16_t length;   /* of a chain's head: its descriptors; 0: not the head of a chain in flight */
};

struct nb_virtqueue {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    volatile uint16_t *notify;
    uint16_t size;
    uint16_t index;
    uint16_t free_head;
    uint16_t free_count;
    uint16_t avail_next; /* wraps at 65,536, as the ring's own index does */
    uint16_t avail_published;
    uint16_t used_next;
    uint16_t chains_in_flight;
    bool interrupts;
    struct nb_slot slots[];
};

/* A completed chain. */
struct nb_used {
    uint32_t buffer;
    uint32_t written;  /* bytes the device wrote, checked against what it could write */
    uint32_t readable; /* bytes of frame it was given to read */
};

/* Adds a chain of one descriptor that the device writes to. Needs one free descriptor. */
static inline void virtqueue_add_writable(struct nb_virtqueue *queue, uint64_t iova, uint32_t len, uint32_t buffer)
{
    uint16_t head = queue->free_head;
    struct nb_slot *slot = &queue->slots[head];
    queue->free_head = slot->next;
    queue->free_count--;
    *slot = (struct nb_slot){.buffer = buffer, .writable = len, .length = 1};
    queue->desc[head] = (struct vring_desc){.addr = iova, .len = len, .flags = VRING_DESC_F_WRITE};
    queue->avail->ring[queue->avail_next++ & (queue->size - 1)] = head;
    queue->chains_in_flight++;
}

/* Adds a chain of two descriptors that the device reads, header and frame. Needs two free descriptors. */
static inline void virtqueue_add_readable(struct nb_virtqueue *queue, uint64_t header_iova, uint32_t header_len,
                                          uint64_t iova, uint32_t len, uint32_t buffer)
{
    uint16_t head = queue->free_head;
    uint16_t tail = queue->slots[head].next;
    queue->free_head = queue->slots[tail].next;
    queue->free_count -= 2;
    queue->slots[head] = (struct nb_slot){.buffer = buffer, .readable = len, .next = tail, .length = 2};
    queue->desc[head] = (struct vring_desc){.addr = header_iova, .len = header_len, .flags = VRING_DESC_F_NEXT, .next = tail};
    queue->desc[tail] = (struct vring_desc){.addr = iova, .len = len};
    queue->avail->ring[queue->avail_next++ & (queue->size - 1)] = head;
    queue->chains_in_flight++;
}

/* Shows the device what was added, and says whether it wants to be notified of it (virtio 1.3 §2.7.13). */
static inline bool virtqueue_publish(struct nb_virtqueue *queue)
{
    if (queue->avail_published == queue->avail_next)
        return false;
    /* Release: descriptors and ring entries are there before the index says so. */
    store_release_16(&queue->avail->idx, queue->avail_next);
    queue->avail_published = queue->avail_next;
    /* The device sets NO_NOTIFY, then looks at the index; we set the index, then look at NO_NOTIFY. */
    fence_store_load();
    return !(load_once_16(&queue->used->flags) & VRING_USED_F_NO_NOTIFY);
}

static inline void virtqueue_notify(const struct nb_virtqueue *queue) { *queue->notify = queue->index; }

/* Completed chains the device shows, at most what is in flight; or -1 - NB_FAULT_USED_JUMP. */
static inline int virtqueue_completed(const struct nb_virtqueue *queue)
{
    /* Acquire: the used elements and the buffers' contents are read after the index that announced them. */
    uint16_t completed = (uint16_t)(load_acquire_16(&queue->used->idx) - queue->used_next);
    return completed > queue->chains_in_flight ? -1 - NB_FAULT_USED_JUMP : completed;
}

/* Takes the next completed chain; only after virtqueue_completed() showed one. 0, or -1 - the enum nb_device_fault. */
static inline int virtqueue_take(struct nb_virtqueue *queue, struct nb_used *taken)
{
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
    uint16_t tail = head->length == 2 ? head->next : (uint16_t)id;
    queue->free_count += head->length;
    queue->slots[tail].next = queue->free_head;
    queue->free_head = (uint16_t)id;
    head->length = 0;
    queue->used_next++;
    queue->chains_in_flight--;
    *taken = (struct nb_used){.buffer = head->buffer, .written = len, .readable = head->readable};
    return 0;
}

/* Interrupts on or off (virtio 1.3 §2.7.7): a hint to the device, so whoever turns them on looks at the ring once more. */
static inline void virtqueue_set_interrupts(struct nb_virtqueue *queue, bool on)
{
    if (queue->interrupts == on)
        return;
    queue->interrupts = on;
    store_once_16(&queue->avail->flags, on ? 0 : VRING_AVAIL_F_NO_INTERRUPT);
}

#endif
