/* A load on the core's virtqueues, on one processor: a generator, a sink, and an echo, as a shared object.
 *
 * It does what the pump does to a virtqueue, with its calls and its burst, and nothing of what the pump does to the port.
 * So beside DPDK's own front-end it says what the virtqueues cost. What the generator sends goes the pump's way: a short
 * frame is copied behind its header, a longer one has a descriptor for the header and one for itself, or, with_frame, one
 * for both. The generator writes the first 42 bytes of each frame, as testpmd's does. The echo, as testpmd's, has no client:
 * it sends a frame in the buffer that it came in.
 */
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "tx_slot.h"
#include "virtqueue.h"

enum { BURST = 64, TAKEN_AT_ONCE = 32, HEADER_BYTES = 12, HEADROOM = 64, MAC_BYTES = 6, NUM_BUFFERS_OFFSET = 10, TEMPLATE_BYTES = 42, LOAD_BUFFERS = 4096 };

/* `memory` is `buffers` buffers of `stride` bytes; a frame lies at HEADROOM in its buffer, as in those of the port. */
struct load {
    struct nb_virtqueue *rx;
    struct nb_virtqueue *tx;
    uint8_t *memory;
    uint64_t iova;
    uint32_t stride;
    uint32_t length;      /* of a generated frame */
    uint8_t *slots;       /* tx_slot.h: one of zeroes, one for each buffer */
    uint64_t slots_iova;
    uint32_t copied;      /* frames up to so many bytes are */
    int32_t with_frame;   /* what the generator sends has its header in front of it in its buffer: tx_header_with_frame */
    int32_t merges;       /* MRG_RXBUF was agreed: the header says of how many buffers a frame is */
    int32_t exchanges;    /* the echo exchanges the MAC addresses */
    int32_t stop;         /* set by another thread */
    uint64_t *moved;      /* frames so far */
    uint32_t free_count;
    uint32_t free[LOAD_BUFFERS]; /* buffers neither queue has */
};

static int lesser(int a, int b) { return a < b ? a : b; }

static bool stopped(struct load *load) { return __atomic_load_n(&load->stop, __ATOMIC_RELAXED); }

static void account(struct load *load, int64_t frames) { __atomic_store_n(load->moved, (uint64_t)frames, __ATOMIC_RELAXED); }

static void publish(struct nb_virtqueue *queue)
{
    if (virtqueue_publish(queue))
        virtqueue_notify(queue);
}

static void post(struct load *load, uint32_t buffer)
{
    uint32_t before = HEADROOM - HEADER_BYTES;
    struct nb_segment segment = {load->iova + (uint64_t)buffer * load->stride + before, load->stride - before};
    virtqueue_add(load->rx, &segment, 0, 1, buffer);
}

static void send(struct load *load, uint32_t buffer, uint32_t length)
{
    uint64_t place = (uint64_t)buffer * load->stride + HEADROOM;
    if (length <= load->copied) {
        uint64_t slot = tx_slot_offset(1 + buffer);
        tx_slot_copy(load->slots + slot, load->memory + place, length);
        struct nb_segment segment = tx_slot_segment(load->slots_iova + slot, HEADER_BYTES, length);
        virtqueue_add(load->tx, &segment, 1, 0, buffer);
        return;
    }
    if (load->with_frame) {
        tx_header_clear(load->memory + place - HEADER_BYTES);
        struct nb_segment segment = {load->iova + place - HEADER_BYTES, HEADER_BYTES + length};
        virtqueue_add(load->tx, &segment, 1, 0, buffer);
        return;
    }
    struct nb_segment segments[] = {{load->slots_iova, HEADER_BYTES}, {load->iova + place, length}};
    virtqueue_add(load->tx, segments, 2, 0, buffer);
}

/* Gives up to a burst of sent buffers back to the free ones; their number, or -1 - the fault. */
static int reap(struct load *load)
{
    int done = virtqueue_completed(load->tx), got = 0, taken = 0;
    struct nb_used used;
    if (done < 0)
        return done;
    for (; taken < done && (got = virtqueue_take(load->tx, &used)) > 0; taken++)
        load->free[load->free_count++] = used.buffer;
    return got < 0 ? got : taken;
}

static void refill(struct load *load)
{
    while (load->free_count && virtqueue_has_room(load->rx, 1))
        post(load, load->free[--load->free_count]);
    publish(load->rx);
}

/* A round of the pump's takes longer than this loop: to look at once again would take the line from the device that is
 * about to write there. */
static void wait_a_little(void)
{
    for (int i = 0; i < 4; i++)
        cpu_relax();
}

int64_t load_transmit(struct load *load)
{
    static const uint8_t template[TEMPLATE_BYTES] = {0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x88, 0xb5};
    int64_t frames = 0;
    while (!stopped(load)) {
        int done = reap(load);
        if (done < 0)
            return done;
        account(load, frames += done);
        /* First the frames, then what is done with them: another process made those of the pump. */
        uint32_t room = virtqueue_room(load->tx, 2), burst = room < BURST ? room : BURST;
        burst = load->free_count < burst ? load->free_count : burst;
        if (burst < BURST / 2) {
            wait_a_little();
            continue;
        }
        const uint32_t *buffers = &load->free[load->free_count -= burst];
        for (uint32_t i = 0; i < burst; i++)
            memcpy(load->memory + (uint64_t)buffers[i] * load->stride + HEADROOM, template, TEMPLATE_BYTES);
        for (uint32_t i = 0; i < burst; i++)
            send(load, buffers[i], load->length);
        publish(load->tx);
    }
    return frames;
}

static uint8_t *header_of(const struct load *load, uint32_t buffer)
{
    return load->memory + (uint64_t)buffer * load->stride + HEADROOM - HEADER_BYTES;
}

/* In the buffer that it came in, behind a header that asks for nothing: there is nobody who could change it. */
static void send_back(struct load *load, uint32_t buffer, uint32_t length)
{
    uint8_t *header = header_of(load, buffer), *frame = header + HEADER_BYTES, address[MAC_BYTES];
    memset(header, 0, HEADER_BYTES);
    if (load->exchanges) {
        memcpy(address, frame, MAC_BYTES);
        memcpy(frame, frame + MAC_BYTES, MAC_BYTES);
        memcpy(frame + MAC_BYTES, address, MAC_BYTES);
    }
    struct nb_segment segment = {load->iova + (uint64_t)buffer * load->stride + HEADROOM - HEADER_BYTES, HEADER_BYTES + length};
    virtqueue_add(load->tx, &segment, 1, 0, buffer);
}

/* Takes up to `most` buffers, and fetches their headers if they say something, as the pump does. */
static inline int take_buffers(struct load *load, struct nb_used *used, int most, int *last)
{
    uint64_t readable = 0;
    int got = virtqueue_take_burst(load->rx, used, lesser(most, TAKEN_AT_ONCE), &readable, last);
    if (load->merges)
        for (int i = 0; i < got; i++)
            __builtin_prefetch(header_of(load, used[i].buffer));
    return got;
}

/* Takes up to a burst of received buffers, and sends them back or is done with them. */
static inline int take(struct load *load, bool echo)
{
    int done = virtqueue_completed(load->rx), last = 1, taken = 0;
    struct nb_used used[TAKEN_AT_ONCE];
    if (done < 0)
        return done;
    int most = lesser(done, BURST);
    if (echo)
        most = lesser(most, (int)virtqueue_room(load->tx, 1));
    while (taken < most && last > 0) {
        int got = take_buffers(load, used, most - taken, &last);
        for (int i = 0; i < got; i++) {
            uint16_t pieces = 1;
            if (load->merges)
                memcpy(&pieces, header_of(load, used[i].buffer) + NUM_BUFFERS_OFFSET, sizeof(pieces));
            if (pieces != 1 || used[i].written < HEADER_BYTES)
                return -1 - NB_FAULT_NUM_BUFFERS;
            if (echo)
                send_back(load, used[i].buffer, used[i].written - HEADER_BYTES);
            else
                load->free[load->free_count++] = used[i].buffer;
        }
        taken += got;
    }
    return last < 0 ? last : taken;
}

int64_t load_receive(struct load *load)
{
    int64_t frames = 0;
    while (!stopped(load)) {
        int done = take(load, false);
        if (done < 0)
            return done;
        account(load, frames += done);
        refill(load);
    }
    return frames;
}

int64_t load_echo(struct load *load)
{
    int64_t frames = 0;
    while (!stopped(load)) {
        int sent = reap(load);
        int done = sent < 0 ? sent : take(load, true);
        if (done < 0)
            return done;
        account(load, frames += done);
        /* In the pump's order: buffers first, for a notification may take long. */
        refill(load);
        publish(load->tx);
    }
    return frames;
}

void load_start(struct load *load, uint32_t buffers)
{
    virtqueue_set_interrupts(load->rx, false);
    virtqueue_set_interrupts(load->tx, false);
    for (uint32_t i = 0; i < buffers; i++)
        load->free[load->free_count++] = i;
    /* The rest is the generator's. */
    for (uint32_t i = 0; i < load->rx->size && i < buffers / 2; i++)
        post(load, load->free[--load->free_count]);
    virtqueue_show(load->rx);
}
