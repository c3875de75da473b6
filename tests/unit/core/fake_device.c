/* The device's side of the rings: see fake_device.h. Offsets are virtio 1.3 §2.7's, spelt out. */
#include "fake_device.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum {
    DESCRIPTOR_BYTES = 16,
    DESCRIPTOR_LEN = 8,
    DESCRIPTOR_FLAGS = 12,
    DESCRIPTOR_NEXT = 14,
    FLAG_NEXT = 1,
    FLAG_WRITE = 2,
    FLAG_INDIRECT = 4,
    RING_FLAGS = 0,
    RING_INDEX = 2,
    RING_ENTRIES = 4,
    AVAILABLE_BYTES = 2,
    USED_BYTES = 8,
    USED_LEN = 4,
    NO_INTERRUPT = 1,
    NO_NOTIFY = 1,
    HEADER_NUM_BUFFERS = 10,
    ISR_QUEUE = 1,
    ISR_CONFIG = 2,
    NOT_NOTIFIED = 0xffff,
};

static void violated(struct fake_device *device, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void violated(struct fake_device *device, const char *format, ...)
{
    if (device->violation[0])
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(device->violation, sizeof(device->violation), format, arguments);
    va_end(arguments);
}

static uint16_t get_16(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }
static uint32_t get_32(const uint8_t *at) { return get_16(at) | (uint32_t)get_16(at + 2) << 16; }
static uint64_t get_64(const uint8_t *at) { return get_32(at) | (uint64_t)get_32(at + 4) << 32; }

/* Words that the driver reads or writes at the same time. */
static uint16_t shared_load_16(const uint8_t *at) { return __atomic_load_n((const uint16_t *)at, __ATOMIC_ACQUIRE); }
static void shared_store_16(uint8_t *at, uint16_t value) { __atomic_store_n((uint16_t *)at, value, __ATOMIC_RELEASE); }
static void shared_store_32(uint8_t *at, uint32_t value) { __atomic_store_n((uint32_t *)at, value, __ATOMIC_RELAXED); }
static void full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

void fake_window_add(struct fake_device *device, struct fake_window window)
{
    if (device->window_count == FAKE_MOST_WINDOWS)
        abort();
    device->windows[device->window_count++] = window;
}

static uint8_t *translate(struct fake_device *device, uint64_t iova, uint64_t len, bool write)
{
    for (unsigned i = 0; i < device->window_count; i++) {
        const struct fake_window *window = &device->windows[i];
        uint64_t offset = iova - window->iova;
        if (iova < window->iova || offset >= window->bytes)
            continue;
        bool crosses = window->stride && len && offset / window->stride != (offset + len - 1) / window->stride;
        if (len > window->bytes - offset || crosses)
            violated(device, "%llu bytes at %#llx leave their buffer", (unsigned long long)len, (unsigned long long)iova);
        else if (write ? !window->writable : !window->readable)
            violated(device, "%#llx is not to be %s", (unsigned long long)iova, write ? "written" : "read");
        else
            return window->at + offset;
        return NULL;
    }
    violated(device, "%#llx is nowhere", (unsigned long long)iova);
    return NULL;
}

void fake_attach(struct fake_device *device, struct fake_queue *queue, struct fake_queue_place place)
{
    *queue = (struct fake_queue){.place = place};
    queue->descriptors = translate(device, place.descriptors, (uint64_t)DESCRIPTOR_BYTES * place.size, false);
    queue->available = translate(device, place.driver_area, RING_ENTRIES + AVAILABLE_BYTES * (uint64_t)place.size, false);
    queue->used = translate(device, place.device_area, RING_ENTRIES + USED_BYTES * (uint64_t)place.size, true);
    queue->held = calloc(place.size, sizeof(queue->held[0]));
    if (!queue->descriptors || !queue->available || !queue->used || !queue->held)
        abort();
}

void fake_detach(struct fake_device *device)
{
    free(device->rx.held);
    free(device->tx.held);
}

uint16_t fake_available(const struct fake_queue *queue)
{
    return (uint16_t)(shared_load_16(queue->available + RING_INDEX) - queue->available_taken);
}

static bool read_chain(struct fake_device *device, struct fake_queue *queue, uint16_t head, struct fake_chain *chain)
{
    uint16_t next = head;
    *chain = (struct fake_chain){.head = head};
    for (;;) {
        if (next >= queue->place.size || queue->held[next]) {
            violated(device, "descriptor %u is %s", next, next >= queue->place.size ? "out of range" : "in use already");
            return false;
        }
        if (chain->segments == FAKE_MOST_SEGMENTS) {
            violated(device, "the chain from descriptor %u is too long", head);
            return false;
        }
        const uint8_t *descriptor = queue->descriptors + (size_t)DESCRIPTOR_BYTES * next;
        uint16_t flags = get_16(descriptor + DESCRIPTOR_FLAGS);
        struct fake_segment segment = {.len = get_32(descriptor + DESCRIPTOR_LEN), .descriptor = next};
        segment.writable = flags & FLAG_WRITE;
        if (flags & FLAG_INDIRECT || flags & ~(FLAG_NEXT | FLAG_WRITE)) {
            violated(device, "descriptor %u has flags %#x", next, flags);
            return false;
        }
        segment.at = translate(device, get_64(descriptor), segment.len, segment.writable);
        if (!segment.at)
            return false;
        chain->segment[chain->segments++] = segment;
        queue->held[next] = true;
        if (!(flags & FLAG_NEXT))
            return true;
        next = get_16(descriptor + DESCRIPTOR_NEXT);
    }
}

bool fake_pop(struct fake_device *device, struct fake_queue *queue, struct fake_chain *chain)
{
    uint16_t waiting = fake_available(queue);
    if (waiting == 0)
        return false;
    if (waiting > queue->place.size) {
        violated(device, "available index ran ahead by %u in a queue of %u", waiting, queue->place.size);
        return false;
    }
    uint16_t slot = queue->available_taken % queue->place.size;
    queue->available_taken++;
    return read_chain(device, queue, get_16(queue->available + RING_ENTRIES + AVAILABLE_BYTES * slot), chain);
}

void fake_push(struct fake_queue *queue, uint32_t id, uint32_t len)
{
    uint8_t *element = queue->used + RING_ENTRIES + USED_BYTES * (size_t)(queue->used_index++ % queue->place.size);
    shared_store_32(element, id);
    shared_store_32(element + USED_LEN, len);
}

static void let_go(struct fake_queue *queue, const struct fake_chain *chain)
{
    for (unsigned i = 0; i < chain->segments; i++)
        queue->held[chain->segment[i].descriptor] = false;
}

void fake_give_back(struct fake_queue *queue, const struct fake_chain *chain, uint32_t len)
{
    let_go(queue, chain);
    fake_push(queue, chain->head, len);
}

void fake_publish(struct fake_queue *queue) { fake_set_used_index(queue, queue->used_index); }

void fake_set_used_index(struct fake_queue *queue, uint16_t index) { shared_store_16(queue->used + RING_INDEX, index); }

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
    if (shared_load_16(queue->available + RING_FLAGS) & NO_INTERRUPT) {
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
    shared_store_16(queue->used + RING_FLAGS, wanted ? 0 : NO_NOTIFY);
    full_fence();
}

bool fake_notified(const struct fake_queue *queue)
{
    return __atomic_load_n(queue->place.notify, __ATOMIC_RELAXED) != NOT_NOTIFIED;
}

void fake_touch(struct fake_queue *queue)
{
    __atomic_fetch_or((uint16_t *)(queue->available + RING_FLAGS), 0, __ATOMIC_RELAXED);
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
        let_go(queue, &chains[i]);
        fake_push(queue, device->lie == FAKE_ID_OUT_OF_RANGE ? queue->place.size : chains[i].head, len);
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
                let_go(queue, &chains[i]);
            queue->available_taken = taken_before;
            return 0;
        }
        const struct fake_chain *chain = &chains[pieces++];
        if (chain->segments != 1 || !chain->segment[0].writable || chain->segment[0].len <= device->header_bytes) {
            violated(device, "descriptor %u is no receive buffer", chain->head);
            return 0;
        }
        room += chain->segment[0].len;
    }
    if (pieces > 1 && !device->merges) {
        violated(device, "a frame of %u bytes does not fit a buffer", len);
        return 0;
    }
    uint8_t header[16] = {0};
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
            violated(device, "descriptor %u of a frame to send is writable", segment->descriptor);
            return false;
        }
        if (memcmp(segment->at, zeroes, skipped) != 0) {
            violated(device, "a frame's header asks for offloads");
            return false;
        }
        skip -= skipped;
        memcpy(frame + *len, segment->at + skipped, segment->len - skipped);
        *len += segment->len - skipped;
    }
    if (skip)
        violated(device, "a frame has no whole header");
    return !skip;
}

void fake_complete(struct fake_device *device, const struct fake_chain *chain)
{
    uint32_t written = 0; /* nothing: the device only reads what is sent */
    push_pieces(device, &device->tx, chain, &written, 1);
}
