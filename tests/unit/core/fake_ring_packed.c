/* The device's side of a packed ring. Offsets and bits are virtio 1.3 §2.8's, spelt out. */
#include "fake_ring.h"

enum {
    DESCRIPTOR_ID = 12,
    DESCRIPTOR_FLAGS = 14,
    AVAILABLE_BIT = 0x0080,
    USED_BIT = 0x8000,
    EVENT_POSITION = 0,
    EVENT_FLAGS = 2,
    EVENT_BYTES = 4,
    EVENTS_ON = 0,
    EVENTS_OFF = 1,
    EVENTS_AT = 2,
};

static uint64_t event_bytes(uint16_t size)
{
    (void)size;
    return EVENT_BYTES;
}

static bool wrap_counter(const struct fake_queue *queue, uint16_t position) { return position < queue->place.size; }

static uint8_t *descriptor_at(const struct fake_queue *queue, uint16_t position)
{
    return queue->descriptors + (size_t)DESCRIPTOR_BYTES * (position % queue->place.size);
}

static uint16_t later(const struct fake_queue *queue, uint32_t position, uint32_t by)
{
    return (uint16_t)((position + by) % (2u * queue->place.size));
}

static void start_at(struct fake_queue *queue, uint16_t index)
{
    queue->available_taken = queue->used_index = queue->interrupted = (uint16_t)(index % (2u * queue->place.size));
}

static bool is_available(const struct fake_queue *queue, uint16_t position, uint16_t *flags)
{
    *flags = shared_load_16(descriptor_at(queue, position) + DESCRIPTOR_FLAGS);
    bool available = *flags & AVAILABLE_BIT, used = *flags & USED_BIT;
    return available != used && available == wrap_counter(queue, position);
}

static uint16_t available(const struct fake_queue *queue)
{
    uint16_t position = queue->available_taken, chains = 0, flags;
    for (uint32_t seen = 0; seen < queue->place.size && is_available(queue, position, &flags); seen++) {
        chains += !(flags & FLAG_NEXT);
        position = later(queue, position, 1);
    }
    return chains;
}

static void skip(struct fake_queue *queue)
{
    uint16_t flags;
    while (is_available(queue, queue->available_taken, &flags))
        queue->available_taken = later(queue, queue->available_taken, 1);
}

static bool read_table(struct fake_device *device, struct fake_queue *queue, const uint8_t *descriptor, uint16_t flags,
                       struct fake_chain *chain)
{
    uint32_t count;
    const uint8_t *table = fake_table(device, queue, descriptor, flags & 0xff, &count);
    for (uint32_t i = 0; table && i < count; i++) {
        const uint8_t *entry = table + (size_t)DESCRIPTOR_BYTES * i;
        if (!fake_add_segment(device, chain, entry, get_16(entry + DESCRIPTOR_FLAGS) & FLAG_WRITE, chain->head))
            return false;
    }
    return table != NULL;
}

static bool pop(struct fake_device *device, struct fake_queue *queue, struct fake_chain *chain)
{
    uint16_t flags, position = queue->available_taken;
    *chain = (struct fake_chain){0};
    if (!is_available(queue, position, &flags))
        return false;
    for (;;) {
        const uint8_t *descriptor = descriptor_at(queue, position);
        uint16_t kind = flags & (FLAG_NEXT | FLAG_WRITE | FLAG_INDIRECT);
        if (flags & ~(AVAILABLE_BIT | USED_BIT | kind)) {
            fake_violated(device, "descriptor %u has flags %#x", position, flags);
            return false;
        }
        chain->head = get_16(descriptor + DESCRIPTOR_ID); /* that of the last one counts */
        bool good = kind & FLAG_INDIRECT ? read_table(device, queue, descriptor, kind, chain)
                                         : fake_add_segment(device, chain, descriptor, kind, position);
        if (!good)
            return false;
        chain->descriptors++;
        position = later(queue, position, 1);
        if (!(kind & FLAG_NEXT))
            break;
        if (!is_available(queue, position, &flags)) {
            fake_violated(device, "a chain goes on at %u, which is not available", position);
            return false;
        }
    }
    if (chain->head >= queue->place.size || queue->held[chain->head]) {
        fake_violated(device, "buffer id %u is %s", chain->head,
                      chain->head >= queue->place.size ? "out of range" : "in use already");
        return false;
    }
    queue->held[chain->head] = chain->descriptors;
    queue->available_taken = position;
    return true;
}

static void let_go(struct fake_queue *queue, const struct fake_chain *chain) { queue->held[chain->head] = 0; }

/* The flags of the first descriptor since the last publication are kept back, so that all show at once. */
static void push(struct fake_queue *queue, uint32_t id, uint32_t len, uint16_t chains, uint16_t descriptors)
{
    (void)chains;
    uint8_t *descriptor = descriptor_at(queue, queue->used_index);
    uint16_t flags = wrap_counter(queue, queue->used_index) ? AVAILABLE_BIT | USED_BIT : 0;
    __atomic_store_n((uint16_t *)(descriptor + DESCRIPTOR_ID), (uint16_t)id, __ATOMIC_RELAXED);
    shared_store_32(descriptor + DESCRIPTOR_LEN, len);
    if (queue->withholds) {
        shared_store_16(descriptor + DESCRIPTOR_FLAGS, flags);
    } else {
        queue->withholds = true;
        queue->withheld_at = queue->used_index;
        queue->withheld_flags = flags;
    }
    queue->used_index = later(queue, queue->used_index, descriptors);
}

static void publish(struct fake_queue *queue)
{
    if (queue->withholds)
        shared_store_16(descriptor_at(queue, queue->withheld_at) + DESCRIPTOR_FLAGS, queue->withheld_flags);
    queue->withholds = false;
}

/* Of a chain of one descriptor. */
static void unpush(struct fake_queue *queue)
{
    queue->interrupted = queue->used_index = later(queue, queue->used_index, 2u * queue->place.size - 1);
    uint16_t flags = wrap_counter(queue, queue->used_index) ? AVAILABLE_BIT : USED_BIT;
    shared_store_16(descriptor_at(queue, queue->used_index) + DESCRIPTOR_FLAGS, flags);
}

static bool wants_interrupt(struct fake_queue *queue)
{
    uint16_t flags = shared_load_16(queue->driver_area + EVENT_FLAGS);
    uint16_t event = shared_load_16(queue->driver_area + EVENT_POSITION);
    uint16_t position = (uint16_t)((event & 0x7fff) + (event & 0x8000 ? 0 : queue->place.size));
    bool passed = false;
    for (; queue->interrupted != queue->used_index; queue->interrupted = later(queue, queue->interrupted, 1))
        passed |= queue->interrupted == position;
    return flags == EVENTS_AT ? passed : flags == EVENTS_ON;
}

static void want_notifications(struct fake_queue *queue, bool wanted)
{
    uint16_t flags = wanted ? EVENTS_ON : EVENTS_OFF;
    if (wanted && queue->place.features.event_idx) {
        uint16_t position = queue->available_taken;
        uint16_t wrap = wrap_counter(queue, position) ? 0x8000 : 0;
        shared_store_16(queue->device_area + EVENT_POSITION, (uint16_t)(position % queue->place.size | wrap));
        flags = EVENTS_AT;
    }
    shared_store_16(queue->device_area + EVENT_FLAGS, flags);
}

static uint8_t *interrupt_word(struct fake_queue *queue) { return queue->driver_area + EVENT_FLAGS; }

static uint8_t *notification_word(struct fake_queue *queue) { return queue->device_area + EVENT_FLAGS; }

const struct fake_ring fake_packed_ring = {
    .start_at = start_at,
    .driver_bytes = event_bytes,
    .device_bytes = event_bytes,
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
