/* The device's side of a split ring. Offsets are virtio 1.3 §2.7's, spelt out. */
#include "fake_ring.h"

enum {
    DESCRIPTOR_FLAGS = 12,
    DESCRIPTOR_NEXT = 14,
    RING_FLAGS = 0,
    RING_INDEX = 2,
    RING_ENTRIES = 4,
    AVAILABLE_BYTES = 2,
    USED_BYTES = 8,
    USED_LEN = 4,
    EVENT_BYTES = 2,
    NO_INTERRUPT = 1,
    NO_NOTIFY = 1,
};

static uint64_t driver_bytes(uint16_t size) { return RING_ENTRIES + AVAILABLE_BYTES * (uint64_t)size + EVENT_BYTES; }
static uint64_t device_bytes(uint16_t size) { return RING_ENTRIES + USED_BYTES * (uint64_t)size + EVENT_BYTES; }

static uint8_t *used_event(const struct fake_queue *queue)
{
    return queue->driver_area + RING_ENTRIES + AVAILABLE_BYTES * (size_t)queue->place.size;
}

static uint8_t *avail_event(const struct fake_queue *queue)
{
    return queue->device_area + RING_ENTRIES + USED_BYTES * (size_t)queue->place.size;
}

static void start_at(struct fake_queue *queue, uint16_t index)
{
    queue->available_taken = queue->used_index = queue->interrupted = index;
    shared_store_16(avail_event(queue), index);
}

static uint16_t available(const struct fake_queue *queue)
{
    return (uint16_t)(shared_load_16(queue->driver_area + RING_INDEX) - queue->available_taken);
}

static void skip(struct fake_queue *queue) { queue->available_taken += available(queue); }

static bool read_table(struct fake_device *device, struct fake_queue *queue, const uint8_t *descriptor, uint16_t flags,
                       struct fake_chain *chain)
{
    uint32_t count, at = 0;
    const uint8_t *table = fake_table(device, queue, descriptor, flags, &count);
    if (!table)
        return false;
    for (;;) {
        const uint8_t *entry = table + (size_t)DESCRIPTOR_BYTES * at;
        uint16_t entry_flags = get_16(entry + DESCRIPTOR_FLAGS);
        if (!fake_add_segment(device, chain, entry, entry_flags, chain->head))
            return false;
        if (!(entry_flags & FLAG_NEXT))
            return true;
        at = get_16(entry + DESCRIPTOR_NEXT);
        if (at >= count) {
            fake_violated(device, "a table of %u goes on at %u", count, at);
            return false;
        }
    }
}

static bool read_chain(struct fake_device *device, struct fake_queue *queue, uint16_t head, struct fake_chain *chain)
{
    uint16_t next = head, size = queue->place.size;
    *chain = (struct fake_chain){.head = head};
    for (;;) {
        if (next >= size || queue->held[next]) {
            fake_violated(device, "descriptor %u is %s", next, next >= size ? "out of range" : "in use already");
            return false;
        }
        const uint8_t *descriptor = queue->descriptors + (size_t)DESCRIPTOR_BYTES * next;
        uint16_t flags = get_16(descriptor + DESCRIPTOR_FLAGS);
        bool good = flags & FLAG_INDIRECT ? read_table(device, queue, descriptor, flags, chain)
                                          : fake_add_segment(device, chain, descriptor, flags, next);
        if (!good)
            return false;
        chain->descriptors++;
        queue->held[next] = 1;
        if (!(flags & FLAG_NEXT))
            return true;
        uint16_t after = get_16(descriptor + DESCRIPTOR_NEXT);
        if (queue->place.features.in_order && after != (next + 1) % size) {
            fake_violated(device, "descriptor %u goes on at %u, although IN_ORDER was agreed", next, after);
            return false;
        }
        next = after;
    }
}

static bool pop(struct fake_device *device, struct fake_queue *queue, struct fake_chain *chain)
{
    uint16_t waiting = available(queue);
    if (waiting == 0)
        return false;
    if (waiting > queue->place.size) {
        fake_violated(device, "available index ran ahead by %u in a queue of %u", waiting, queue->place.size);
        return false;
    }
    uint16_t slot = queue->available_taken % queue->place.size;
    queue->available_taken++;
    return read_chain(device, queue, get_16(queue->driver_area + RING_ENTRIES + AVAILABLE_BYTES * slot), chain);
}

static void let_go(struct fake_queue *queue, const struct fake_chain *chain)
{
    for (unsigned i = 0; i < chain->segments; i++)
        queue->held[chain->segment[i].descriptor] = 0;
}

static void push(struct fake_queue *queue, uint32_t id, uint32_t len, uint16_t chains, uint16_t descriptors)
{
    (void)descriptors;
    uint8_t *element = queue->device_area + RING_ENTRIES + USED_BYTES * (size_t)(queue->used_index % queue->place.size);
    shared_store_32(element, id);
    shared_store_32(element + USED_LEN, len);
    queue->used_index += chains;
}

static void publish(struct fake_queue *queue) { fake_set_used_index(queue, queue->used_index); }

static void unpush(struct fake_queue *queue)
{
    queue->interrupted = --queue->used_index;
    publish(queue);
}

void fake_set_used_index(struct fake_queue *queue, uint16_t index)
{
    shared_store_16(queue->device_area + RING_INDEX, index);
}

static bool wants_interrupt(struct fake_queue *queue)
{
    if (!queue->place.features.event_idx)
        return !(shared_load_16(queue->driver_area + RING_FLAGS) & NO_INTERRUPT);
    uint16_t event = shared_load_16(used_event(queue));
    bool passed = false;
    for (; queue->interrupted != queue->used_index; queue->interrupted++)
        passed |= queue->interrupted == event;
    return passed;
}

static void want_notifications(struct fake_queue *queue, bool wanted)
{
    if (queue->place.features.event_idx)
        shared_store_16(avail_event(queue), (uint16_t)(queue->available_taken - (wanted ? 0 : 1)));
    else
        shared_store_16(queue->device_area + RING_FLAGS, wanted ? 0 : NO_NOTIFY);
}

static uint8_t *interrupt_word(struct fake_queue *queue)
{
    return queue->place.features.event_idx ? used_event(queue) : queue->driver_area + RING_FLAGS;
}

static uint8_t *notification_word(struct fake_queue *queue)
{
    return queue->place.features.event_idx ? avail_event(queue) : queue->device_area + RING_FLAGS;
}

const struct fake_ring fake_split_ring = {
    .start_at = start_at,
    .driver_bytes = driver_bytes,
    .device_bytes = device_bytes,
    .available = available,
    .skip = skip,
    .pop = pop,
    .let_go = let_go,
    .push = push,
    .publish = publish,
    .unpush = unpush,
    .wants_interrupt = wants_interrupt,
    .want_notifications = want_notifications,
    .interrupt_word = interrupt_word,
    .notification_word = notification_word,
};
