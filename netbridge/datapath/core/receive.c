/* Receive: device to client, and the buffers back from the client to the device. */
#include "pump.h"

#include "counting.h"

enum { NUM_BUFFERS_OFFSET = 10 }; /* in struct virtio_net_hdr (virtio 1.3 §5.1.6), a 16-bit word */

/* ---- Device to client ----------------------------------------------------------------------------------------- */

static void hand_over(struct nb_pump *pump, const struct pump_pair *pair)
{
    struct nb_ledger *ledger = pump->config.rx_ledger;
    for (uint32_t i = 0; i < pair->pieces_gathered; i++) {
        uint8_t flags = i > 0 ? NB_CONTINUATION : pump->rx_flags;
        if (i + 1 < pair->pieces_gathered)
            flags |= NB_MORE;
        ring_put(&pump->config.rx_active, &pump->rx_active_put,
                 (struct nb_entry){
                     .dma_handle = ledger_lend(ledger, pair->pieces[i].buffer),
                     .len = pair->pieces[i].bytes,
                     .kind = NB_RX_PACKET,
                     .flags = flags,
                     .queue = pair->number,
                 });
    }
}

void pump_forget_gathered(struct nb_pump *pump, struct pump_pair *pair)
{
    for (uint32_t i = 0; i < pair->pieces_gathered; i++)
        ledger_put_free(pump->config.rx_ledger, pair->pieces[i].buffer);
    pair->pieces_gathered = pair->pieces_expected = 0;
}

static void drop(struct nb_pump *pump, struct pump_pair *pair, enum nb_drop why)
{
    count(&pump->config.counters->drops[why], 1);
    if (why == NB_DROP_CLIENT_SLOW && pump->config.client_counters)
        count(&pump->config.client_counters->client_slow, 1);
    pump_forget_gathered(pump, pair);
}

static void finish_received(struct nb_pump *pump, struct pump_pair *pair)
{
    struct nb_counters *counters = pump->config.counters;
    const struct nb_ledger *ledger = pump->config.rx_ledger;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < pair->pieces_gathered; i++)
        bytes += pair->pieces[i].bytes;
    count(&counters->packets_rx, 1);
    count(&counters->bytes_rx, bytes);
    if (bytes < ETHERNET_HEADER)
        drop(pump, pair, NB_DROP_TOO_SHORT);
    else if (ledger->owned[NB_OWNER_CLIENT] + pair->pieces_gathered > pump->config.rx_client_limit)
        drop(pump, pair, NB_DROP_CLIENT_SLOW);
    else
        hand_over(pump, pair);
    pair->pieces_gathered = pair->pieces_expected = 0;
}

/* How many buffers the frame that starts in `buffer` spans; 0: none that a device may say. */
static uint32_t frame_pieces(const struct nb_pump *pump, uint32_t buffer)
{
    if (pump->config.rx_max_pieces == 1)
        return 1;
    const struct nb_ledger *ledger = pump->config.rx_ledger;
    const uint8_t *header = ledger_address(ledger, buffer) + ledger->region.headroom - pump->config.net_header_bytes;
    uint32_t pieces = load_once_16((const uint16_t *)(const void *)(header + NUM_BUFFERS_OFFSET));
    return pieces <= pump->config.rx_max_pieces ? pieces : 0;
}

/* The buffer came back, whatever the device says is in it. */
static int refuse_frame(struct nb_pump *pump, const struct nb_used *used, enum nb_device_fault fault)
{
    ledger_put_free(pump->config.rx_ledger, used->buffer);
    return device_fault(fault);
}

static int gather_buffer(struct nb_pump *pump, struct pump_pair *pair, const struct nb_used *used)
{
    uint32_t header = 0;
    if (pair->pieces_expected == 0) {
        header = pump->config.net_header_bytes;
        if (used->written < header)
            return refuse_frame(pump, used, NB_FAULT_USED_LENGTH);
        pair->pieces_expected = frame_pieces(pump, used->buffer);
        if (pair->pieces_expected == 0)
            return refuse_frame(pump, used, NB_FAULT_NUM_BUFFERS);
    }
    pair->pieces[pair->pieces_gathered++] = (struct rx_piece){.buffer = used->buffer, .bytes = used->written - header};
    return 0;
}

int pump_receive(struct nb_pump *pump, struct pump_pair *pair)
{
    int completed = virtqueue_completed(pair->rx_queue);
    if (completed <= 0)
        return completed < 0 ? device_fault(-1 - completed) : 0;
    uint32_t most = pump->config.burst;
    uint32_t take = (uint32_t)completed < most ? (uint32_t)completed : most;
    uint32_t put_before = pump->rx_active_put;
    uint32_t frames = 0;
    int verdict = 0;
    uint32_t taken = 0;
    for (; taken < take && verdict == 0; taken++) {
        struct nb_used used;
        int got = virtqueue_take(pair->rx_queue, &used);
        if (got == 0)
            break;
        verdict = got < 0 ? device_fault(-1 - got) : gather_buffer(pump, pair, &used);
        if (verdict == 0 && pair->pieces_gathered == pair->pieces_expected) {
            finish_received(pump, pair);
            frames++;
        }
    }
    if (frames)
        count_burst(pump->config.counters->rx_bursts, frames);
    if (pump->rx_active_put != put_before)
        ring_publish(&pump->config.rx_active, pump->rx_active_put);
    return verdict < 0 ? verdict : (int)taken;
}

/* ---- RX buffers: client to device ----------------------------------------------------------------------------- */

int pump_take_back(struct nb_pump *pump)
{
    int64_t waiting = ring_waiting(&pump->config.rx_free, pump->rx_free_taken);
    if (waiting < 0)
        return client_fault(NB_REFUSE_RING_JUMP);
    struct nb_ledger *ledger = pump->config.rx_ledger;
    for (int64_t i = 0; i < waiting; i++) {
        struct nb_entry entry = ring_take(&pump->config.rx_free, &pump->rx_free_taken);
        if (entry.kind != NB_RX_PACKET || entry.flags != 0 || entry.queue != 0)
            return client_fault(NB_REFUSE_KIND);
        int64_t buffer = ledger_check(ledger, entry.dma_handle);
        if (buffer < 0)
            return client_fault((int)(-1 - buffer));
        ledger_put_free(ledger, (uint32_t)buffer);
    }
    if (waiting)
        ring_consumed(&pump->config.rx_free, pump->rx_free_taken);
    return (int)waiting;
}

static void post_to(struct nb_pump *pump, struct pump_pair *pair)
{
    struct nb_virtqueue *queue = pair->rx_queue;
    struct nb_ledger *ledger = pump->config.rx_ledger;
    uint32_t before_frame = ledger->region.headroom - pump->config.net_header_bytes;
    uint32_t room = ledger->region.stride - before_frame;
    while (ledger_free_count(ledger) != 0 && virtqueue_has_room(queue, 1) && virtqueue_in_flight(queue) < pump->rx_share) {
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
