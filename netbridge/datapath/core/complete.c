/* What the device has sent: TX buffers go back to the client, RX buffers that were forwarded are free again. */
#include "pump.h"

#include "counting.h"

static inline void acknowledge(struct nb_pump *pump, uint32_t buffer)
{
    ring_put(&pump->config.tx_done, &pump->tx_done_put,
             (struct nb_entry){
                 .dma_handle = ledger_lend(pump->config.tx_ledger, buffer),
                 .len = ledger_room(pump->config.tx_ledger),
                 .kind = NB_TX_PACKET_ACK,
             });
}

void pump_acknowledge(struct nb_pump *pump, uint32_t buffer) { acknowledge(pump, buffer); }

static inline void finish_forwarded(struct nb_pump *pump, uint32_t buffer)
{
    ledger_put_free(pump->config.rx_ledger, buffer);
    pump->rx_may_hold++;
    pump_note_return(pump);
}

static inline void acknowledge_frame(struct nb_pump *pump, uint32_t token)
{
    uint32_t tx_count = pump->config.tx_ledger->region.count;
    if (token < tx_count) {
        acknowledge(pump, token);
        return;
    }
    if (!(token & HAS_MORE_PIECES)) {
        finish_forwarded(pump, token - tx_count);
        return;
    }
    if (token == NO_BUFFER)
        return;
    for (uint32_t buffer = token & ~(uint32_t)HAS_MORE_PIECES, next; buffer != NO_BUFFER; buffer = next) {
        next = pump->tx_pieces[buffer].next;
        pump->tx_pieces[buffer].next = NO_BUFFER;
        acknowledge(pump, buffer);
    }
}

void pump_acknowledge_frame(struct nb_pump *pump, uint32_t token) { acknowledge_frame(pump, token); }

int pump_complete(struct nb_pump *pump, struct pump_pair *pair)
{
    struct nb_counters *counters = pump->config.counters;
    int completed = virtqueue_completed(pair->tx_queue);
    if (completed <= 0)
        return completed < 0 ? device_fault(-1 - completed) : 0;
    uint64_t bytes = 0; /* with their headers */
    int taken = 0, last = 1;
    while (taken < completed && last > 0) {
        struct nb_used used[TAKEN_AT_ONCE];
        int most = completed - taken < TAKEN_AT_ONCE ? completed - taken : TAKEN_AT_ONCE;
        int got = virtqueue_take_burst(pair->tx_queue, used, most, &bytes, &last);
        for (int i = 0; i < got; i++)
            acknowledge_frame(pump, used[i].buffer);
        taken += got;
    }
    if (taken) {
        bytes -= (uint64_t)taken * pump->config.net_header_bytes;
        pair->completed += (uint32_t)taken;
        count(&counters->packets_tx, (uint64_t)taken);
        count(&counters->bytes_tx, bytes);
        ring_publish(&pump->config.tx_done, pump->tx_done_put);
    }
    return last < 0 ? device_fault(-1 - last) : taken;
}
