/* Making, resetting and freeing a virtqueue; its verbs are in virtqueue.h, inlined into the pump. */
#include "virtqueue.h"

#include <stdlib.h>
#include <string.h>

/* The parts on pages of their own: driver and device do not write to each other's cache lines. */
enum { PART_ALIGNMENT = 4096, LARGEST = 32768 };
enum { ALL_FEATURES = NB_RING_PACKED | NB_RING_EVENT_IDX | NB_RING_IN_ORDER | NB_RING_NOTIFICATION_DATA };

static uint64_t align_up(uint64_t value) { return (value + PART_ALIGNMENT - 1) & ~(uint64_t)(PART_ALIGNMENT - 1); }

static bool is_valid(const struct nb_virtqueue_config *config)
{
    uint32_t size = config->size;
    bool packed = config->features & NB_RING_PACKED;
    /* A chain may have no more descriptors than the queue, in a table either (virtio 1.3 §2.7.5.3.1, §2.8.19). */
    return size >= 1 && size <= LARGEST && (packed || (size & (size - 1)) == 0) && config->table_segments <= size &&
           (config->features & ~ALL_FEATURES) == 0;
}

/* virtio 1.3 §2.7.2, §2.8.10.1; those of a split ring end with the other side's event word, also without EVENT_IDX. */
static uint64_t driver_bytes(const struct nb_virtqueue_config *config)
{
    if (config->features & NB_RING_PACKED)
        return sizeof(struct vring_packed_event);
    return sizeof(struct vring_avail) + 2u * config->size + 2u;
}

static uint64_t device_bytes(const struct nb_virtqueue_config *config)
{
    if (config->features & NB_RING_PACKED)
        return sizeof(struct vring_packed_event);
    return sizeof(struct vring_used) + sizeof(struct vring_used_elem) * config->size + 2u;
}

int nb_virtqueue_layout(const struct nb_virtqueue_config *config, struct nb_virtqueue_layout *layout)
{
    if (!is_valid(config))
        return -1;
    uint64_t descriptors = sizeof(struct vring_desc) * (uint64_t)config->size;
    layout->desc = 0;
    layout->driver = align_up(descriptors);
    layout->device = layout->driver + align_up(driver_bytes(config));
    layout->tables = layout->device + align_up(device_bytes(config));
    layout->bytes = layout->tables + align_up(descriptors * config->table_segments);
    return 0;
}

static void begin(struct nb_virtqueue *queue)
{
    uint16_t size = queue->size;
    queue->free_head = queue->oldest = 0;
    queue->free_count = size;
    queue->chains_in_flight = 0;
    queue->batch_left = 0;
    queue->avail_next = queue->avail_shown = queue->used_next = queue->used_shown = 0;
    queue->unpublished = queue->unnotified = 0;
    queue->interrupts = true;
    for (uint16_t i = 0; i < size; i++)
        queue->slots[i] = (struct nb_slot){.next = (uint16_t)(i + 1 < size ? i + 1 : 0)};
    if (queue->packed && queue->event_idx)
        packed_set_interrupts(queue, true);
}

struct nb_virtqueue *nb_virtqueue_new(const struct nb_virtqueue_config *config)
{
    struct nb_virtqueue_layout layout;
    if (nb_virtqueue_layout(config, &layout))
        return NULL;
    struct nb_virtqueue *queue = calloc(1, sizeof(*queue) + config->size * sizeof(queue->slots[0]));
    if (!queue)
        return NULL;
    uint8_t *memory = config->memory;
    queue->config = *config;
    queue->size = config->size;
    queue->packed = config->features & NB_RING_PACKED;
    queue->event_idx = config->features & NB_RING_EVENT_IDX;
    queue->in_order = config->features & NB_RING_IN_ORDER;
    queue->table_segments = config->table_segments;
    queue->desc = (struct vring_desc *)(memory + layout.desc);
    queue->avail = (struct vring_avail *)(memory + layout.driver);
    queue->used = (struct vring_used *)(memory + layout.device);
    queue->tables = memory + layout.tables;
    queue->tables_iova = config->iova + layout.tables;
    begin(queue);
    return queue;
}

void nb_virtqueue_free(struct nb_virtqueue *queue) { free(queue); }

uint16_t nb_virtqueue_in_flight(const struct nb_virtqueue *queue) { return (uint16_t)queue->chains_in_flight; }

uint32_t nb_virtqueue_notification(const struct nb_virtqueue *queue) { return virtqueue_notification(queue); }

uint32_t nb_virtqueue_reset(struct nb_virtqueue *queue, uint32_t *tokens)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < queue->size; i++)
        if (queue->slots[i].length != 0)
            tokens[count++] = queue->slots[i].buffer;
    memset(queue->desc, 0, sizeof(struct vring_desc) * queue->size);
    memset(queue->avail, 0, driver_bytes(&queue->config));
    memset(queue->used, 0, device_bytes(&queue->config));
    begin(queue);
    return count;
}
