/* The pump as it is, compiled here so that its inside can be seen, and with delays in its fences. */
#include "jittered_barriers.h"

#include "pump.c"
#include "receive.c"
#include "transmit.c"
#include "complete.c"
#include "wake.c"

#include "white_box.h"

static void start_queue_at(struct nb_virtqueue *queue, uint16_t index)
{
    if (queue->packed)
        index %= 2 * queue->size;
    queue->avail_next = queue->avail_shown = queue->used_next = queue->used_shown = index;
    if (queue->packed) {
        /* As they are after so many descriptors: used, before this place in this lap, behind it in the one before. */
        bool first_lap = index < queue->size;
        for (uint16_t i = 0; i < queue->size; i++) {
            bool used_in_first_lap = i < packed_offset(queue, index) ? first_lap : !first_lap;
            queue->packed_desc[i].flags = used_in_first_lap ? VRING_PACKED_F_AVAIL | VRING_PACKED_F_USED : 0;
        }
    } else {
        queue->avail->idx = queue->used->idx = index;
    }
    virtqueue_set_interrupts(queue, false);
    virtqueue_set_interrupts(queue, true);
}

void white_box_start_at(struct nb_pump *pump, uint32_t ring_position, uint16_t queue_index)
{
    const struct nb_ring_place *places[] = {&pump->config.rx_active, &pump->config.rx_free, &pump->config.tx_active,
                                            &pump->config.tx_done};
    for (int i = 0; i < 4; i++)
        places[i]->header->produced = places[i]->header->consumed = ring_position;
    pump->rx_active_put = pump->rx_free_taken = pump->tx_active_taken = pump->tx_done_put = ring_position;
    pump->rx_active_told = pump->tx_done_told = ring_position;
    for (uint32_t i = 0; i < pump->config.pair_count; i++) {
        start_queue_at(pump->pairs[i].rx_queue, queue_index);
        start_queue_at(pump->pairs[i].tx_queue, queue_index);
    }
}

bool white_box_ask_for_wakeup(struct nb_pump *pump) { return pump_ask_for_wakeup(pump); }
void white_box_stop_asking(struct nb_pump *pump) { pump_stop_asking(pump); }

bool white_box_hand_over_and_wake(struct nb_pump *pump, uint32_t produced)
{
    uint64_t sent = pump->config.counters->wakeups_sent;
    pump->rx_active_put = produced;
    pump->rx_active_told = produced - 1;
    ring_publish(&pump->config.rx_active, produced);
    pump_wake_client(pump);
    return pump->config.counters->wakeups_sent != sent;
}

bool white_box_publish(struct nb_pump *pump)
{
    struct nb_virtqueue *queue = pump->pairs[0].tx_queue;
    struct nb_segment segment = {.len = 1};
    uint16_t head = queue->free_head;
    virtqueue_add(queue, &segment, 1, 0, 0);
    bool notify = virtqueue_publish(queue);
    ring_unbook(queue, head, head); /* this chain will never come back */
    return notify;
}

void white_box_add(struct nb_pump *pump, const struct nb_segment *segments, uint32_t count)
{
    virtqueue_add(pump->pairs[0].tx_queue, segments, count, 0, 0);
}

void white_box_show(struct nb_pump *pump) { virtqueue_show(pump->pairs[0].tx_queue); }

uint32_t white_box_gathered(const struct nb_pump *pump) { return pump->pairs[0].pieces_gathered; }

static const char *audit_ledger(const struct nb_ledger *ledger)
{
    uint32_t owned[NB_OWNERS] = {0};
    for (uint32_t i = 0; i < ledger->region.count; i++) {
        if (ledger->buffers[i].owner >= NB_OWNERS)
            return "a buffer has no owner";
        owned[ledger->buffers[i].owner]++;
    }
    for (int owner = 0; owner < NB_OWNERS; owner++) {
        if (owned[owner] != ledger->owned[owner])
            return "an owner's count is not the number of its buffers";
        if (owned[owner] != nb_ledger_owned(ledger, owner))
            return "nb_ledger_owned says something else than the ledger";
    }
    bool *seen = calloc(ledger->region.count, sizeof(*seen));
    const char *wrong = seen ? NULL : "no memory for the audit";
    for (uint32_t i = 0; i < owned[NB_OWNER_DRIVER] && !wrong; i++) {
        uint32_t index = ledger->free[i];
        if (index >= ledger->region.count || ledger->buffers[index].owner != NB_OWNER_DRIVER)
            wrong = "the free stack holds a buffer that is not free";
        else if (seen[index])
            wrong = "the free stack holds a buffer twice";
        else
            seen[index] = true;
    }
    free(seen);
    return wrong;
}

/* What the queues and the pump itself hold of a region's buffers. */
struct holdings {
    const struct nb_ledger *ledger;
    bool *seen;
    uint32_t count;
    uint32_t forwarded; /* of them, to be sent */
};

static const char *hold(struct holdings *holdings, uint32_t buffer)
{
    if (buffer >= holdings->ledger->region.count)
        return "a buffer that is none is held";
    if (holdings->seen[buffer])
        return "a buffer is held twice";
    if (holdings->ledger->buffers[buffer].owner != NB_OWNER_DEVICE)
        return "a buffer is held that is not booked as the device's";
    holdings->seen[buffer] = true;
    holdings->count++;
    return NULL;
}

/* A frame to send, by its first piece. */
static const char *hold_frame(struct holdings *rx, struct holdings *tx, const struct nb_pump *pump, uint32_t first)
{
    uint32_t tx_count = tx->ledger->region.count;
    if (first < NO_BUFFER && first >= tx_count) {
        rx->forwarded++;
        return hold(rx, first - tx_count);
    }
    const char *wrong = NULL;
    for (uint32_t buffer = first; buffer != NO_BUFFER && !wrong; buffer = pump->tx_pieces[buffer].next)
        wrong = hold(tx, buffer);
    return wrong;
}

/* `tx`: NULL for a queue that receives. */
static const char *hold_queue(struct holdings *rx, struct holdings *tx, const struct nb_pump *pump,
                              const struct nb_virtqueue *queue)
{
    uint32_t chains = 0, descriptors = 0;
    const char *wrong = NULL;
    for (uint32_t i = 0; i < queue->size && !wrong; i++) {
        const struct nb_slot *slot = &queue->slots[i];
        if (slot->length == 0)
            continue;
        chains++;
        descriptors += slot->length;
        uint32_t first = slot->buffer == NO_BUFFER ? NO_BUFFER : slot->buffer & ~(uint32_t)HAS_MORE_PIECES;
        wrong = tx ? hold_frame(rx, tx, pump, first) : hold(rx, slot->buffer);
    }
    if (wrong)
        return wrong;
    if (chains != queue->chains_in_flight || chains != nb_virtqueue_in_flight(queue))
        return "the chains in flight are not as many as counted";
    if (descriptors + queue->free_count != queue->size)
        return "a descriptor was lost";
    uint32_t free_slots = queue->packed ? queue->size - chains : queue->free_count;
    uint16_t slot = queue->free_head;
    for (uint32_t i = 0; i < free_slots; i++, slot = queue->slots[slot].next)
        if (slot >= queue->size || queue->slots[slot].length != 0)
            return "the list of free slots is broken";
    return NULL;
}

static const char *hold_pair(struct holdings *rx, struct holdings *tx, const struct nb_pump *pump,
                             const struct pump_pair *pair)
{
    const char *wrong = hold_queue(rx, NULL, pump, pair->rx_queue);
    if (!wrong)
        wrong = hold_queue(rx, tx, pump, pair->tx_queue);
    for (uint32_t i = 0; i < pair->pieces_gathered && !wrong; i++)
        wrong = hold(rx, pair->pieces[i].buffer);
    uint32_t first = pair->backlog_first;
    while (first != NO_BUFFER && !wrong) {
        wrong = hold_frame(rx, tx, pump, first);
        first = pump->tx_pieces[first].following;
    }
    return wrong;
}

static const char *audit_holdings(const struct nb_pump *pump, struct holdings *rx, struct holdings *tx)
{
    const char *wrong = rx->seen && tx->seen ? NULL : "no memory for the audit";
    for (uint32_t i = 0; i < pump->config.pair_count && !wrong; i++)
        wrong = hold_pair(rx, tx, pump, &pump->pairs[i]);
    if (!wrong && pump->gathered.pieces)
        wrong = hold_frame(rx, tx, pump, pump->gathered.first);
    if (!wrong && (rx->count != rx->ledger->owned[NB_OWNER_DEVICE] || tx->count != tx->ledger->owned[NB_OWNER_DEVICE]))
        wrong = "the device owns buffers that are in no queue";
    uint32_t slot = 1 + tx->ledger->region.count;
    for (uint32_t i = 0; i < pump->config.pair_count && !wrong; slot += pump->pairs[i++].tx_queue->size)
        if (pump->pairs[i].first_slot != slot)
            wrong = "a pair's slots for copies are not behind those of the pair before";
    if (!wrong && pump->rx_may_hold != pump->config.rx_client_limit - rx->forwarded)
        wrong = "what the client may hold is not its limit without what it forwards";
    return wrong;
}

const char *white_box_audit(const struct nb_pump *pump)
{
    const char *wrong = audit_ledger(pump->config.rx_ledger);
    if (!wrong)
        wrong = audit_ledger(pump->config.tx_ledger);
    if (wrong)
        return wrong;
    struct holdings rx = {pump->config.rx_ledger, calloc(pump->config.rx_ledger->region.count, sizeof(bool)), 0, 0};
    struct holdings tx = {pump->config.tx_ledger, calloc(pump->config.tx_ledger->region.count, sizeof(bool)), 0, 0};
    wrong = audit_holdings(pump, &rx, &tx);
    free(rx.seen);
    free(tx.seen);
    return wrong;
}
