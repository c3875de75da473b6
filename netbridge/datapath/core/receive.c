/* Receive: device to client, and the buffers back from the client to the device. */
#include "pump.h"

#include "counting.h"

enum { NUM_BUFFERS_OFFSET = 10 }; /* in struct virtio_net_hdr (virtio 1.3 §5.1.6), a 16-bit word */

/* ---- Device to client ----------------------------------------------------------------------------------------- */

/* What a burst has come to so far: on the counters' page and in the port only at its end. */
struct received {
    uint64_t frames;
    uint64_t bytes;
    uint32_t put; /* of rx_active */
};

static inline void hand_over(struct nb_pump *pump, uint8_t queue, const struct rx_piece *pieces, uint32_t count,
                             struct received *received)
{
    for (uint32_t i = 0; i < count; i++) {
        uint8_t flags = i > 0 ? NB_CONTINUATION : pump->rx_flags;
        if (i + 1 < count)
            flags |= NB_MORE;
        ring_put(&pump->config.rx_active, &received->put,
                 (struct nb_entry){
                     .dma_handle = ledger_lend(pump->config.rx_ledger, pieces[i].buffer),
                     .len = pieces[i].bytes,
                     .kind = NB_RX_PACKET,
                     .flags = flags,
                     .queue = queue,
                 });
    }
}

static void put_free(struct nb_pump *pump, const struct rx_piece *pieces, uint32_t number)
{
    for (uint32_t i = 0; i < number; i++)
        ledger_put_free(pump->config.rx_ledger, pieces[i].buffer);
}

void pump_forget_gathered(struct nb_pump *pump, struct pump_pair *pair)
{
    put_free(pump, pair->pieces, pair->pieces_gathered);
    pair->pieces_gathered = pair->pieces_expected = 0;
}

static void drop(struct nb_pump *pump, const struct rx_piece *pieces, uint32_t number, enum nb_drop why)
{
    count(&pump->config.counters->drops[why], 1);
    if (why == NB_DROP_CLIENT_SLOW && pump->config.client_counters)
        count(&pump->config.client_counters->client_slow, 1);
    put_free(pump, pieces, number);
}

static inline void finish_received(struct nb_pump *pump, uint8_t queue, const struct rx_piece *pieces, uint32_t count,
                                   struct received *received)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < count; i++)
        bytes += pieces[i].bytes;
    received->frames++;
    received->bytes += bytes;
    if (bytes < ETHERNET_HEADER)
        drop(pump, pieces, count, NB_DROP_TOO_SHORT);
    else if (pump->config.rx_ledger->owned[NB_OWNER_CLIENT] + count > pump->rx_may_hold)
        drop(pump, pieces, count, NB_DROP_CLIENT_SLOW);
    else
        hand_over(pump, queue, pieces, count, received);
}

/* Where the device says how many buffers the frame spans that starts in `buffer`. */
static inline const uint16_t *num_buffers_of(const struct nb_pump *pump, uint32_t buffer)
{
    const struct nb_ledger *ledger = pump->config.rx_ledger;
    const uint8_t *header = ledger_address(ledger, buffer) + ledger->region.headroom - pump->config.net_header_bytes;
    return (const uint16_t *)(const void *)(header + NUM_BUFFERS_OFFSET);
}

/* How many buffers the frame that starts in `buffer` spans; 0: none that a device may say. */
static inline uint32_t frame_pieces(const struct nb_pump *pump, uint32_t buffer)
{
    if (pump->config.rx_max_pieces == 1)
        return 1;
    uint32_t pieces = load_once_16(num_buffers_of(pump, buffer));
    return pieces <= pump->config.rx_max_pieces ? pieces : 0;
}

/* The buffer came back, whatever the device says is in it. */
static int refuse_frame(struct nb_pump *pump, const struct nb_used *used, enum nb_device_fault fault)
{
    ledger_put_free(pump->config.rx_ledger, used->buffer);
    return device_fault(fault);
}

/* A buffer that came, with a whole frame if nothing is being gathered and its header says so. 0, or a verdict. */
static inline int receive_buffer(struct nb_pump *pump, struct pump_pair *pair, const struct nb_used *used,
                                 struct received *received)
{
    struct rx_piece piece = {.buffer = used->buffer, .bytes = used->written};
    if (pair->pieces_expected == 0) {
        uint32_t header = pump->config.net_header_bytes;
        if (used->written < header)
            return refuse_frame(pump, used, NB_FAULT_USED_LENGTH);
        piece.bytes -= header;
        uint32_t pieces = frame_pieces(pump, used->buffer);
        if (pieces == 0)
            return refuse_frame(pump, used, NB_FAULT_NUM_BUFFERS);
        if (pieces == 1) {
            finish_received(pump, pair->number, &piece, 1, received);
            return 0;
        }
        pair->pieces_expected = pieces;
    }
    pair->pieces[pair->pieces_gathered++] = piece;
    if (pair->pieces_gathered == pair->pieces_expected) {
        finish_received(pump, pair->number, pair->pieces, pair->pieces_gathered, received);
        pair->pieces_gathered = pair->pieces_expected = 0;
    }
    return 0;
}

/* Takes up to `most` buffers, looks at the memory of none before all are asked for: each header is a cache line that the
 * device has just written. Returns as virtqueue_take_burst does. */
static inline int take_buffers(const struct nb_pump *pump, struct pump_pair *pair, struct nb_used *used, uint32_t most,
                               int *last)
{
    uint64_t readable = 0;
    int got =
        virtqueue_take_burst(pair->rx_queue, used, (int)(most < TAKEN_AT_ONCE ? most : TAKEN_AT_ONCE), &readable, last);
    if (pump->config.rx_max_pieces > 1)
        for (int i = 0; i < got; i++)
            __builtin_prefetch(num_buffers_of(pump, used[i].buffer));
    return got;
}

static void publish_received(struct nb_pump *pump, const struct received *received)
{
    struct nb_counters *counters = pump->config.counters;
    if (received->frames) {
        count(&counters->packets_rx, received->frames);
        count(&counters->bytes_rx, received->bytes);
        count_burst(counters->rx_bursts, (uint32_t)received->frames);
    }
    if (received->put != pump->rx_active_put) {
        pump->rx_active_put = received->put;
        ring_publish(&pump->config.rx_active, received->put);
    }
}

static inline uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

/* How many buffers to take of those that have come. On one processor the client gives nothing back as long as we run: what it
 * may not hold yet is left with the device, and none taken (`holds_back`) if the next frame might be dropped. A client that
 * does not make use of the time is not waited for again before it has given something back. */
static uint32_t takeable(struct nb_pump *pump, const struct pump_pair *pair, uint32_t completed)
{
    const struct nb_pump_config *config = &pump->config;
    uint32_t take = least(completed, config->burst);
    uint32_t held = config->rx_ledger->owned[NB_OWNER_CLIENT] + pair->pieces_gathered;
    if (!config->yields || pump->client_is_late || held + take <= pump->rx_may_hold)
        return take;
    uint32_t room = held < pump->rx_may_hold ? pump->rx_may_hold - held : 0;
    if (room >= least(config->rx_max_pieces, (config->rx_client_limit + 1) / 2))
        return room;
    uint64_t now = now_ns();
    if (pump->awaited_since == 0)
        pump->awaited_since = now;
    pump->client_is_late = now - pump->awaited_since >= CLIENT_PATIENCE_MS * 1000000ull;
    pump->holds_back = !pump->client_is_late;
    return pump->holds_back ? 0 : take;
}

int pump_receive(struct nb_pump *pump, struct pump_pair *pair)
{
    int completed = virtqueue_completed(pair->rx_queue);
    if (completed <= 0)
        return completed < 0 ? device_fault(-1 - completed) : 0;
    uint32_t take = takeable(pump, pair, (uint32_t)completed);
    struct received received = {.put = pump->rx_active_put};
    struct nb_used used[TAKEN_AT_ONCE];
    uint32_t taken = 0;
    int verdict = 0, last = 1;
    while (verdict == 0 && taken < take && last > 0) {
        int got = take_buffers(pump, pair, used, take - taken, &last);
        taken += (uint32_t)got;
        /* Also after a lie, for those behind it are off the queue. The first one is what is reported. */
        for (int i = 0; i < got; i++) {
            int fault = receive_buffer(pump, pair, &used[i], &received);
            verdict = verdict ? verdict : fault;
        }
    }
    publish_received(pump, &received);
    if (verdict == 0 && last < 0)
        verdict = device_fault(-1 - last);
    return verdict < 0 ? verdict : (int)taken;
}

/* ---- RX buffers: client to device ----------------------------------------------------------------------------- */

int pump_take_back(struct nb_pump *pump)
{
    int64_t waiting = ring_waiting(&pump->config.rx_free, pump->rx_free_taken);
    if (waiting < 0)
        return client_fault(NB_REFUSE_RING_JUMP);
    struct nb_ledger *ledger = pump->config.rx_ledger;
    const struct nb_ring_place ring = pump->config.rx_free;
    for (int64_t i = 0; i < waiting; i++) {
        struct nb_entry entry = ring_take(&ring, &pump->rx_free_taken);
        if (entry.kind != NB_RX_PACKET || entry.flags != 0 || entry.queue != 0)
            return client_fault(NB_REFUSE_KIND);
        int64_t buffer = ledger_check(ledger, entry.dma_handle);
        if (buffer < 0)
            return client_fault((int)(-1 - buffer));
        ledger_put_free(ledger, (uint32_t)buffer);
    }
    if (waiting) {
        ring_consumed(&pump->config.rx_free, pump->rx_free_taken);
        pump_note_return(pump);
    }
    return (int)waiting;
}

static void post_to(struct nb_pump *pump, struct pump_pair *pair)
{
    struct nb_virtqueue *queue = pair->rx_queue;
    struct nb_ledger *ledger = pump->config.rx_ledger;
    uint32_t before_frame = ledger->region.headroom - pump->config.net_header_bytes;
    uint32_t room = ledger->region.stride - before_frame;
    uint32_t share = pump->rx_share - virtqueue_in_flight(queue);
    uint32_t most = virtqueue_room(queue, 1) < share ? virtqueue_room(queue, 1) : share;
    uint32_t count = ledger_free_count(ledger) < most ? ledger_free_count(ledger) : most;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t buffer = ledger_take_for_device(ledger);
        struct nb_segment segment = {ledger_iova(ledger, buffer) + before_frame, room};
        virtqueue_add(queue, &segment, 0, 1, buffer);
    }
}

void pump_post_free_buffers(struct nb_pump *pump)
{
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        post_to(pump, pair_in_turn(pump, i));
}

bool pump_device_starves(const struct nb_pump *pump)
{
    for (uint32_t i = 0; i < pump->config.pair_count; i++) {
        const struct nb_virtqueue *queue = pump->pairs[i].rx_queue;
        /* Plenty is half of its queue, and enough for the longest frame, which it holds back until it has room for all
         * of it. */
        if (virtqueue_is_half_empty(queue) || virtqueue_in_flight(queue) < pump->config.rx_max_pieces)
            return true;
    }
    return false;
}
