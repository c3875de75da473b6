/* A device, or one queue of it, is reset under a session that goes on: what it held is taken from it, and it gets new queues.
 *
 * Between the two the device touches no memory. What it had completed before its reset counts as done; a received frame of
 * which it had written only a part, and every frame to be sent that it had not completed, is lost, counted, and its buffers
 * go back to where they belong. A frame that the client has sent only the beginning of is none of the device's yet.
 */
#include <stdlib.h>
#include <string.h>

#include "counting.h"
#include "pump.h"

/* As much as the device had completed, up to its first lie. */
static void collect_completed(struct nb_pump *pump, struct pump_pair *pair)
{
    while (pump_receive(pump, pair) > 0)
        ;
    while (pump_complete(pump, pair) > 0)
        ;
}

static uint64_t frames_unsent(const struct nb_pump *pump, const struct pump_pair *pair)
{
    uint64_t frames = virtqueue_in_flight(pair->tx_queue);
    for (uint32_t first = pair->backlog_first; first != NO_BUFFER; first = pump->tx_pieces[first].following)
        frames++;
    return frames;
}

static void count_lost(struct nb_pump *pump, uint64_t frames)
{
    count(&pump->config.counters->drops[NB_DROP_DEVICE_RESET], frames);
}

/* Those that were to be received into, and those that were to be forwarded. */
static void take_rx_buffers(struct nb_pump *pump)
{
    struct nb_ledger *ledger = pump->config.rx_ledger;
    for (uint32_t buffer = 0; buffer < ledger->region.count; buffer++)
        if (ledger->buffers[buffer].owner == NB_OWNER_DEVICE)
            ledger_put_free(ledger, buffer);
    pump->rx_may_hold = pump->config.rx_client_limit;
}

/* The pieces of the frame that the client is sending: booked as `owner`, so that whoever looks for the others passes over
 * them. */
static void book_gathered(struct nb_pump *pump, enum nb_owner from, enum nb_owner owner)
{
    if (pump->gathered.pieces == 0)
        return;
    for (uint32_t buffer = pump->gathered.first; buffer != NO_BUFFER; buffer = pump->tx_pieces[buffer].next)
        ledger_move(pump->config.tx_ledger, buffer, from, owner);
}

static void take_unsent(struct nb_pump *pump)
{
    struct nb_ledger *ledger = pump->config.tx_ledger;
    book_gathered(pump, NB_OWNER_DEVICE, NB_OWNER_DRIVER);
    for (uint32_t buffer = 0; buffer < ledger->region.count; buffer++)
        if (ledger->buffers[buffer].owner == NB_OWNER_DEVICE) {
            pump->tx_pieces[buffer].next = NO_BUFFER;
            pump_acknowledge(pump, buffer);
        }
    book_gathered(pump, NB_OWNER_DRIVER, NB_OWNER_DEVICE);
    ring_publish(&pump->config.tx_done, pump->tx_done_put);
}

uint64_t nb_pump_salvage(struct nb_pump *pump)
{
    uint64_t lost = 0;
    for (uint32_t i = 0; i < pump->config.pair_count; i++) {
        struct pump_pair *pair = &pump->pairs[i];
        collect_completed(pump, pair);
        lost += frames_unsent(pump, pair) + (pair->pieces_gathered != 0);
        pair->pieces_gathered = pair->pieces_expected = 0;
        pair->backlog_first = NO_BUFFER;
        pair->stalled_since = 0;
    }
    take_rx_buffers(pump);
    take_unsent(pump);
    if (pump->gathered.pieces != 0 && pump->gathered.has_header)
        memcpy(pump->kept_header, tx_header_of(pump, pump->gathered.first), sizeof(pump->kept_header));
    count_lost(pump, lost);
    pump_wake_client(pump);
    return lost;
}

int nb_pump_resume(struct nb_pump *pump, const struct nb_pump_pair *pairs, uint32_t pair_count, uint8_t *tx_slots,
                   uint64_t tx_slots_iova)
{
    struct nb_pump_config *config = &pump->config;
    if (pair_count != config->pair_count)
        return -1;
    for (uint32_t i = 0; i < pair_count; i++)
        if (pairs[i].rx_irq_fd != config->pairs[i].rx_irq_fd || pairs[i].tx_irq_fd != config->pairs[i].tx_irq_fd ||
            !virtqueue_has_room(pairs[i].tx_queue, 1 + config->tx_max_pieces))
            return -1;
    for (uint32_t i = 0; i < pair_count; i++) {
        config->pairs[i] = pairs[i];
        pump->pairs[i].rx_queue = pairs[i].rx_queue;
        pump->pairs[i].tx_queue = pairs[i].tx_queue;
    }
    config->tx_slots = tx_slots;
    config->tx_slots_iova = tx_slots_iova;
    pump_place_slots(pump);
    if (pump->gathered.pieces != 0 && pump->gathered.has_header)
        memcpy(tx_header_of(pump, pump->gathered.first), pump->kept_header, sizeof(pump->kept_header));
    pump_show_free_buffers(pump);
    return 0;
}

/* What was in flight on a receive queue, and the frame that was being gathered. */
static uint64_t take_received_of(struct nb_pump *pump, struct pump_pair *pair, const uint32_t *buffers, uint32_t count)
{
    uint64_t lost = pair->pieces_gathered != 0;
    for (uint32_t i = 0; i < count; i++)
        ledger_put_free(pump->config.rx_ledger, buffers[i]);
    pump_forget_gathered(pump, pair);
    return lost;
}

/* What was in flight on a transmit queue. Its backlog waits on. */
static uint64_t take_unsent_of(struct nb_pump *pump, struct pump_pair *pair, const uint32_t *tokens, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        pump_acknowledge_frame(pump, tokens[i]);
    ring_publish(&pump->config.tx_done, pump->tx_done_put);
    pair->stalled_since = 0;
    pair->was_reset = true;
    pair->completed_at_reset = pair->completed;
    return count;
}

int nb_pump_reset_queue(struct nb_pump *pump, struct nb_virtqueue *queue)
{
    struct pump_pair *pair = NULL;
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        if (pump->pairs[i].rx_queue == queue || pump->pairs[i].tx_queue == queue)
            pair = &pump->pairs[i];
    uint32_t *tokens = pair ? calloc(queue->size, sizeof(*tokens)) : NULL;
    if (!tokens)
        return -1;
    bool receives = queue == pair->rx_queue;
    while ((receives ? pump_receive(pump, pair) : pump_complete(pump, pair)) > 0)
        ;
    uint32_t count = nb_virtqueue_reset(queue, tokens);
    uint64_t lost = receives ? take_received_of(pump, pair, tokens, count) : take_unsent_of(pump, pair, tokens, count);
    count_lost(pump, lost);
    pump_wake_client(pump);
    free(tokens);
    return (int)lost;
}
