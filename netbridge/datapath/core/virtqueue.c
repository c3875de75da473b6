/* Making and freeing a virtqueue; its verbs are in virtqueue.h, inlined into the pump. */
#include "virtqueue.h"

#include <stdlib.h>

/* The three parts on pages of their own: driver and device do not write to each other's cache lines. */
enum { PART_ALIGNMENT = 4096 };

static uint64_t align_up(uint64_t value) { return (value + PART_ALIGNMENT - 1) & ~(uint64_t)(PART_ALIGNMENT - 1); }

static bool is_valid_size(uint16_t size) { return size >= 1 && size <= 32768 && (size & (size - 1)) == 0; }

int nb_virtqueue_layout(const struct nb_virtqueue_config *config, struct nb_virtqueue_layout *layout)
{
    uint16_t size = config->size;
    if (!is_valid_size(size) || config->features != 0 || config->table_segments != 0)
        return -1;
    /* Two bytes more than flags, idx and ring: the event words of EVENT_IDX (virtio 1.3 §2.7.2). */
    layout->desc = 0;
    layout->driver = align_up(sizeof(struct vring_desc) * size);
    layout->device = layout->driver + align_up(sizeof(struct vring_avail) + 2u * size + 2u);
    layout->bytes = layout->device + align_up(sizeof(struct vring_used) + sizeof(struct vring_used_elem) * size + 2u);
    return 0;
}

struct nb_virtqueue *nb_virtqueue_new(const struct nb_virtqueue_config *config)
{
    struct nb_virtqueue_layout layout;
    if (nb_virtqueue_layout(config, &layout))
        return NULL;
    uint16_t size = config->size;
    struct nb_virtqueue *queue = calloc(1, sizeof(*queue) + size * sizeof(queue->slots[0]));
    if (!queue)
        return NULL;
    queue->desc = (struct vring_desc *)((uint8_t *)config->memory + layout.desc);
    queue->avail = (struct vring_avail *)((uint8_t *)config->memory + layout.driver);
    queue->used = (struct vring_used *)((uint8_t *)config->memory + layout.device);
    queue->notify = config->notify;
    queue->kick_fd = config->kick_fd;
    queue->size = size;
    queue->index = config->index;
    queue->free_count = size;
    queue->interrupts = true;
    for (uint16_t i = 0; i < size; i++)
        queue->slots[i].next = (uint16_t)(i + 1);
    return queue;
}

void nb_virtqueue_free(struct nb_virtqueue *queue) { free(queue); }

uint16_t nb_virtqueue_in_flight(const struct nb_virtqueue *queue) { return queue->chains_in_flight; }
