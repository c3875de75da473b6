/* What the device does with its rings, and what it does with frames: see fake_device.h. */
#include "fake_device.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fake_ring.h"

enum {
    HEADER_NUM_BUFFERS = 10,
    ISR_QUEUE = 1,
    ISR_CONFIG = 2,
    NOT_NOTIFIED = 0xffff,
};

void fake_violated(struct fake_device *device, const char *format, ...)
{
    if (device->violation[0])
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(device->violation, sizeof(device->violation), format, arguments);
    va_end(arguments);
}

void fake_window_add(struct fake_device *device, struct fake_window window)
{
    if (device->window_count == FAKE_MOST_WINDOWS)
        abort();
    device->windows[device->window_count++] = window;
}

uint8_t *fake_translate(struct fake_device *device, uint64_t iova, uint64_t len, bool write)
{
    for (unsigned i = 0; i < device->window_count; i++) {
        const struct fake_window *window = &device->windows[i];
        uint64_t offset = iova - window->iova;
        if (iova < window->iova || offset >= window->bytes)
            continue;
        bool crosses = window->stride && len && offset / window->stride != (offset + len - 1) / window->stride;
        if (len > window->bytes - offset || crosses)
            fake_violated(device, "%llu bytes at %#llx leave their buffer", (unsigned long long)len, (unsigned long long)iova);
        else if (write ? !window->writable : !window->readable)
            fake_violated(device, "%#llx is not to be %s", (unsigned long long)iova, write ? "written" : "read");
        else
            return window->at + offset;
        return NULL;
    }
    fake_violated(device, "%#llx is nowhere", (unsigned long long)iova);
    return NULL;
}

static const struct fake_ring *ring_of(const struct fake_queue *queue)
{
    return queue->place.features.packed ? &fake_packed_ring : &fake_split_ring;
}

void fake_attach(struct fake_device *device, struct fake_queue *queue, struct fake_queue_place place)
{
    *queue = (struct fake_queue){.place = place};
    const struct fake_ring *ring = ring_of(queue);
    queue->descriptors = fake_translate(device, place.descriptors, (uint64_t)DESCRIPTOR_BYTES * place.size, false);
    queue->driver_area = fake_translate(device, place.driver_area, ring->driver_bytes(place.size), false);
    queue->device_area = fake_translate(device, place.device_area, ring->device_bytes(place.size), true);
    queue->held = calloc(place.size, sizeof(queue->held[0]));
    if (!queue->descriptors || !queue->driver_area || !queue->device_area || !queue->held)
        abort();
}

void fake_detach(struct fake_device *device)
{
    free(device->rx.held);
    free(device->tx.held);
}

void fake_start_at(struct fake_queue *queue, uint16_t index) { ring_of(queue)->start_at(queue, index); }

bool fake_add_segment(struct fake_device *device, struct fake_chain *chain, const uint8_t *descriptor, uint16_t flags, uint16_t number)
{
    struct fake_segment segment = {.len = get_32(descriptor + DESCRIPTOR_LEN), .descriptor = number};
    segment.writable = flags & FLAG_WRITE;
    if (chain->segments == FAKE_MOST_SEGMENTS)
        fake_violated(device, "the chain with descriptor %u is too long", number);
    else if (flags & ~(FLAG_NEXT | FLAG_WRITE))
        fake_violated(device, "descriptor %u has flags %#x", number, flags);
    else if (chain->segments && chain->segment[chain->segments - 1].writable && !segment.writable)
        fake_violated(device, "descriptor %u is to be read, and one before it to be written", number);
    else
        segment.at = fake_translate(device, get_64(descriptor), segment.len, segment.writable);
    if (!segment.at)
        return false;
    chain->segment[chain->segments++] = segment;
    return true;
}

const uint8_t *fake_table(struct fake_device *device, const struct fake_queue *queue, const uint8_t *descriptor, uint16_t flags,
                          uint32_t *count)
{
    uint32_t bytes = get_32(descriptor + DESCRIPTOR_LEN);
    *count = bytes / DESCRIPTOR_BYTES;
    if (!queue->place.features.indirect || flags != FLAG_INDIRECT || bytes == 0 || bytes % DESCRIPTOR_BYTES ||
        *count > queue->place.size) {
        fake_violated(device, "a table of %u bytes with flags %#x%s", bytes, flags,
                      queue->place.features.indirect ? "" : ", although INDIRECT_DESC was not agreed");
        return NULL;
    }
    return fake_translate(device, get_64(descriptor), bytes, false);
}

uint16_t fake_available(const struct fake_queue *queue) { return ring_of(queue)->available(queue); }

void fake_skip_available(struct fake_queue *queue) { ring_of(queue)->skip(queue); }

bool fake_pop(struct fake_device *device, struct fake_queue *queue, struct fake_chain *chain)
{
    return ring_of(queue)->pop(device, queue, chain);
}

void fake_unpush(struct fake_queue *queue) { ring_of(queue)->unpush(queue); }

static void end_batch(struct fake_queue *queue)
{
    if (queue->batch)
        ring_of(queue)->push(queue, queue->batch_id, queue->batch_len, queue->batch, queue->batch_descriptors);
    queue->batch = queue->batch_descriptors = 0;
}

void fake_push(struct fake_queue *queue, uint32_t id, uint32_t len)
{
    uint16_t descriptors = id < queue->place.size ? queue->held[id] : 0;
    end_batch(queue);
    ring_of(queue)->push(queue, id, len, 1, descriptors ? descriptors : 1);
}

void fake_give_back(struct fake_queue *queue, const struct fake_chain *chain, uint32_t len)
{
    uint32_t room = 0;
    for (unsigned i = 0; i < chain->segments; i++)
        room += chain->segment[i].writable ? chain->segment[i].len : 0;
    ring_of(queue)->let_go(queue, chain);
    /* The driver takes all chains of a batch but the last for used completely. */
    if (!queue->place.features.in_order || !queue->batch_may_grow)
        end_batch(queue);
    queue->batch++;
    queue->batch_descriptors += chain->descriptors;
    queue->batch_id = chain->head;
    queue->batch_len = len;
    queue->batch_may_grow = room == 0 || len == room;
}

void fake_publish(struct fake_queue *queue)
{
    end_batch(queue);
    ring_of(queue)->publish(queue);
}

void fake_intx_poll(struct fake_device *device)
{
    eventfd_t told;
    if (device->masked && read(device->unmask_fd, &told, sizeof(told)) == sizeof(told)) {
        device->masked = false;
        __atomic_store_n(device->isr, 0, __ATOMIC_RELAXED); /* it was read: reading clears it */
    }
    if (!device->masked && device->isr_pending) {
        __atomic_store_n(device->isr, device->isr_pending, __ATOMIC_RELAXED);
        device->isr_pending = 0;
        device->masked = true;
        eventfd_write(device->intx_fd, 1);
    }
}

void fake_config_changed(struct fake_device *device)
{
    device->isr_pending |= ISR_CONFIG;
    fake_intx_poll(device);
}

void fake_interrupt(struct fake_device *device, struct fake_queue *queue)
{
    full_fence(); /* used index, then the driver's wish; it writes its wish, then looks at the index */
    if (!ring_of(queue)->wants_interrupt(queue)) {
        device->interrupts_suppressed++;
        return;
    }
    device->interrupts_sent++;
    if (device->intx_fd >= 0) {
        device->isr_pending |= ISR_QUEUE;
        fake_intx_poll(device);
    } else {
        eventfd_write(queue->place.irq_fd, 1);
    }
}

void fake_want_notifications(struct fake_queue *queue, bool wanted)
{
    if (wanted)
        __atomic_store_n(queue->place.notify, NOT_NOTIFIED, __ATOMIC_RELAXED);
    ring_of(queue)->want_notifications(queue, wanted);
    full_fence();
}

bool fake_notified(const struct fake_queue *queue)
{
    return (uint16_t)__atomic_load_n(queue->place.notify, __ATOMIC_RELAXED) != NOT_NOTIFIED;
}

void fake_touch_interrupts(struct fake_queue *queue)
{
    __atomic_fetch_or((uint16_t *)ring_of(queue)->interrupt_word(queue), 0, __ATOMIC_RELAXED);
}

void fake_touch_notifications(struct fake_queue *queue)
{
    __atomic_fetch_or((uint16_t *)ring_of(queue)->notification_word(queue), 0, __ATOMIC_RELAXED);
}

/* ---- Frames --------------------------------------------------------------------------------------------------- */

static uint16_t claimed_buffers(const struct fake_device *device, unsigned pieces)
{
    switch (device->lie) {
    case FAKE_NUM_BUFFERS_ZERO:
        return 0;
    case FAKE_NUM_BUFFERS_TOO_MANY:
        return 0xffff;
    case FAKE_NUM_BUFFERS_NEVER_REACHED:
        return (uint16_t)(pieces + 1);
    default:
        return (uint16_t)pieces;
    }
}

static uint32_t claimed_length(const struct fake_device *device, const struct fake_chain *chain, uint32_t written)
{
    switch (device->lie) {
    case FAKE_LENGTH_TOO_LONG:
        return chain->segment[0].len + 1;
    case FAKE_LENGTH_TOO_SHORT:
        return device->header_bytes - 1;
    default:
        return written;
    }
}

/* The used elements of one frame, with the lie that is due about them. */
static void push_pieces(struct fake_device *device, struct fake_queue *queue, const struct fake_chain *chains,
                        const uint32_t *written, unsigned pieces)
{
    for (unsigned i = 0; i < pieces; i++) {
        uint32_t len = claimed_length(device, &chains[i], written[i]);
        if (device->lie == FAKE_ID_OUT_OF_RANGE) {
            ring_of(queue)->let_go(queue, &chains[i]);
            fake_push(queue, queue->place.size, len);
            continue;
        }
        fake_give_back(queue, &chains[i], len);
        if (device->lie == FAKE_ID_TWICE)
            fake_push(queue, chains[i].head, len);
    }
    fake_publish(queue);
    if (device->lie == FAKE_INDEX_JUMP)
        fake_set_used_index(queue, (uint16_t)(queue->used_index + queue->place.size));
    if (device->lie == FAKE_INDEX_BACK)
        fake_set_used_index(queue, (uint16_t)(queue->used_index - pieces - 1));
    device->lie = FAKE_HONEST;
}

/* Copies `header` and `frame`, one behind the other, into the chains; notes how much went into each. */
static void scatter(const struct fake_chain *chains, unsigned pieces, const uint8_t *header, uint32_t header_len,
                    const uint8_t *frame, uint32_t len, uint32_t *written)
{
    for (unsigned i = 0; i < pieces; i++) {
        uint8_t *to = chains[i].segment[0].at;
        uint32_t room = chains[i].segment[0].len;
        uint32_t before = i == 0 ? header_len : 0;
        uint32_t part = len < room - before ? len : room - before;
        memcpy(to, header, before);
        memcpy(to + before, frame, part);
        frame += part;
        len -= part;
        written[i] = before + part;
    }
}

unsigned fake_deliver(struct fake_device *device, const uint8_t *frame, uint32_t len)
{
    struct fake_queue *queue = &device->rx;
    struct fake_chain chains[FAKE_MOST_PIECES];
    uint32_t written[FAKE_MOST_PIECES];
    uint32_t room = 0;
    unsigned pieces = 0;
    uint16_t taken_before = queue->available_taken;
    while (room < device->header_bytes + len) {
        if (pieces == FAKE_MOST_PIECES || !fake_pop(device, queue, &chains[pieces])) {
            for (unsigned i = 0; i < pieces; i++)
                ring_of(queue)->let_go(queue, &chains[i]);
            queue->available_taken = taken_before;
            return 0;
        }
        const struct fake_chain *chain = &chains[pieces++];
        if (chain->segments != 1 || !chain->segment[0].writable || chain->segment[0].len <= device->header_bytes) {
            fake_violated(device, "descriptor %u is no receive buffer", chain->head);
            return 0;
        }
        room += chain->segment[0].len;
    }
    if (pieces > 1 && !device->merges) {
        fake_violated(device, "a frame of %u bytes does not fit a buffer", len);
        return 0;
    }
    uint8_t header[16];
    memcpy(header, device->header, sizeof(header));
    uint16_t claimed = claimed_buffers(device, pieces);
    header[HEADER_NUM_BUFFERS] = (uint8_t)claimed;
    header[HEADER_NUM_BUFFERS + 1] = (uint8_t)(claimed >> 8);
    scatter(chains, pieces, header, device->header_bytes, frame, len, written);
    push_pieces(device, queue, chains, written, pieces);
    return pieces;
}

bool fake_collect(struct fake_device *device, struct fake_chain *chain, uint8_t *frame, uint32_t *len)
{
    static const uint8_t zeroes[16];
    if (!fake_pop(device, &device->tx, chain))
        return false;
    uint32_t skip = device->header_bytes;
    *len = 0;
    for (unsigned i = 0; i < chain->segments; i++) {
        const struct fake_segment *segment = &chain->segment[i];
        uint32_t skipped = skip < segment->len ? skip : segment->len;
        if (segment->writable) {
            fake_violated(device, "descriptor %u of a frame to send is writable", segment->descriptor);
            return false;
        }
        memcpy(device->sent_header + device->header_bytes - skip, segment->at, skipped);
        if (!device->takes_headers && memcmp(segment->at, zeroes, skipped) != 0) {
            fake_violated(device, "a frame's header asks for offloads");
            return false;
        }
        skip -= skipped;
        memcpy(frame + *len, segment->at + skipped, segment->len - skipped);
        *len += segment->len - skipped;
    }
    if (skip)
        fake_violated(device, "a frame has no whole header");
    return !skip;
}

void fake_complete(struct fake_device *device, const struct fake_chain *chain)
{
    uint32_t written = 0; /* nothing: the device only reads what is sent */
    push_pieces(device, &device->tx, chain, &written, 1);
}
