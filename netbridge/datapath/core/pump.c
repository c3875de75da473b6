/* The pump: one call that moves frames between the virtqueues and the port for as long as they flow.
 *
 * Follow a frame: pump_receive() takes it from an RX virtqueue and lends its buffers to the client through rx_active;
 * pump_take_back() gets them back from rx_free; refill() posts them again. pump_transmit() takes a frame from tx_active
 * to a TX virtqueue; pump_complete() gives its buffers back through tx_done. (A frame that the client forwards skips
 * two of these: its RX buffers go from rx_active through tx_active to the device, and are free when it is done.)
 * run_round() is those five, and nb_pump_run() repeats it, polling while there is work and sleeping on the eventfds
 * when there is none.
 *
 * A round is bounded: `burst` chains of each queue and of what the client sends. So no queue pair and no direction
 * waits for another to run dry, and which pair goes first changes with every round.
 */
#include "pump.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

#include "counting.h"

enum { ROUNDS_BETWEEN_LOOKS = 256 }; /* while awake, how often control_fd and INTx are looked at */

/* ---- Rounds --------------------------------------------------------------------------------------------------- */

void pump_notify(struct nb_pump *pump, struct nb_virtqueue *queue)
{
    struct nb_counters *counters = pump->config.counters;
    if (!virtqueue_has_unpublished(queue))
        return;
    if (virtqueue_publish(queue)) {
        virtqueue_notify(queue);
        count(&counters->notifications_sent, 1);
    } else {
        count(&counters->notifications_suppressed, 1);
    }
}

static void refill(struct nb_pump *pump)
{
    pump_post_free_buffers(pump);
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        pump_notify(pump, pump->pairs[i].rx_queue);
}

/* What the device has done, on all queues. */
static int collect(struct nb_pump *pump)
{
    int moved = 0;
    pump->holds_back = false;
    for (uint32_t i = 0; i < pump->config.pair_count; i++) {
        struct pump_pair *pair = pair_in_turn(pump, i);
        int received = pump_receive(pump, pair);
        if (received < 0)
            return received;
        int completed = pump_complete(pump, pair);
        if (completed < 0)
            return completed;
        moved += received + completed;
    }
    if (++pump->turn >= pump->config.pair_count)
        pump->turn = 0;
    return moved;
}

static int run_round(struct nb_pump *pump)
{
    /* First, or a frame would be dropped for buffers that the client has already given back. */
    int returned = pump_take_back(pump);
    if (returned < 0)
        return returned;
    int collected = collect(pump);
    /* Before the slower half: the client works while we refill and send. After a fault as well: what came before it has
     * been published, and who sleeps was promised a doorbell for that. */
    if (collected)
        pump_wake_client_soon(pump);
    if (collected < 0)
        return collected;
    refill(pump);
    int sent = pump_transmit(pump);
    return sent < 0 ? sent : collected + returned + sent;
}

/* Before Python is asked, which may end the session: what was sent by now counts as sent, whatever woke us beside it. */
static void settle(struct nb_pump *pump)
{
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        while (pump_complete(pump, &pump->pairs[i]) > 0)
            ;
}

static void report(struct nb_pump *pump, int verdict, struct nb_pump_result *result)
{
    if (verdict <= DEVICE_FAULT) {
        *result = (struct nb_pump_result){NB_EVENT_DEVICE_FAULT, DEVICE_FAULT - verdict};
        count(&pump->config.counters->device_faults[result->detail], 1);
    } else if (verdict <= CLIENT_FAULT) {
        *result = (struct nb_pump_result){NB_EVENT_CLIENT_FAULT, CLIENT_FAULT - verdict};
        count(&pump->config.counters->refused_handles[result->detail], 1);
    } else if (verdict < 0) {
        *result = (struct nb_pump_result){NB_EVENT_SYSTEM_ERROR, -verdict};
    } else {
        *result = (struct nb_pump_result){verdict, 0};
    }
}

void nb_pump_run(struct nb_pump *pump, struct nb_pump_result *result)
{
    struct nb_histogram *drain = &pump->config.counters->irq_latency_ns[NB_LATENCY_DRAIN];
    uint64_t woken_at = 0;   /* 0: the drain since the last wake-up was accounted for */
    uint64_t idle_since = 0; /* 0: the last round moved something, or nobody wants to know */
    bool has_yielded = false; /* since the last round that moved something */
    uint32_t rounds = 0;
    int verdict = 0;
    pump_stop_asking(pump);
    while (verdict == 0) {
        /* Counted here, so that no peer that keeps us from sleeping keeps us from looking. */
        int timeout_ms;
        if (++rounds % ROUNDS_BETWEEN_LOOKS == 0 && ((verdict = pump_look_at_fds(pump, 0)) != 0 ||
                                                     (verdict = pump_look_for_stall(pump, &timeout_ms)) != 0))
            break;
        int moved = run_round(pump);
        if (moved != 0) {
            if (idle_since)
                polling_learn(&pump->polling, now_ns() - idle_since);
            idle_since = 0;
            has_yielded = false;
            verdict = moved < 0 ? moved : 0;
            continue;
        }
        if (woken_at) {
            nb_histogram_add(drain, now_ns() - woken_at);
            woken_at = 0;
        }
        /* What the client does with what it was just given is there when we are back: it need not wake us for that. Once, for
         * it may not be its turn, and Linux 6.12 puts our deadline off by a slice with each yield. Then we sleep, whether or
         * not we would poll: as long as we have the processor, nothing comes from the client. */
        bool client_wants_processor = pump->config.yields && pump_client_is_awake(pump);
        if (client_wants_processor && !has_yielded) {
            has_yielded = true;
            sched_yield();
            continue;
        }
        if (pump->polling.most_ns && !pump->holds_back && !client_wants_processor) {
            uint64_t now = now_ns();
            if (!idle_since)
                idle_since = now;
            if (now - idle_since < pump->polling.now_ns) {
                /* On the only processor there is nobody to relax for; and an emulator takes a pause for a reason to stop. */
                if (!pump->config.yields)
                    cpu_relax();
                continue;
            }
        }
        if (pump_wake_client(pump) || !pump_ask_for_wakeup(pump))
            continue;
        verdict = pump_look_for_stall(pump, &timeout_ms);
        if (verdict < 0)
            break;
        if (pump->holds_back && (timeout_ms < 0 || timeout_ms > CLIENT_PATIENCE_MS))
            timeout_ms = CLIENT_PATIENCE_MS;
        count(&pump->config.counters->sleeps, 1);
        verdict = pump_look_at_fds(pump, timeout_ms);
        woken_at = now_ns();
        pump_stop_asking(pump);
    }
    if (verdict == NB_EVENT_CONTROL)
        settle(pump);
    pump_wake_client(pump);
    report(pump, verdict, result);
}

/* ---- Making and freeing --------------------------------------------------------------------------------------- */

/* What may be in front of a frame in its buffer is read in words of 32 bits. */
static bool header_is_aligned(const struct nb_region *region)
{
    return ((uintptr_t)region->base + region->headroom) % 4 == 0 && region->stride % 4 == 0;
}

static bool headers_are_consistent(const struct nb_pump_config *config)
{
    const struct nb_region *rx = &config->rx_ledger->region;
    const struct nb_region *tx = &config->tx_ledger->region;
    /* Only merged frames have num_buffers; it must lie inside the header, and where a 16-bit word may. */
    bool merges = config->rx_max_pieces > 1;
    bool merge_header_is_valid = config->net_header_bytes >= NB_NET_HEADER_BYTES &&
                                 ((uintptr_t)rx->base + rx->headroom - config->net_header_bytes) % 2 == 0 &&
                                 rx->stride % 2 == 0;
    bool looks_there = config->offloads & TX_OFFLOADS || config->tx_header_with_frame;
    bool header_there_is_valid = config->net_header_bytes == NB_NET_HEADER_BYTES && config->tx_slots &&
                                 tx->headroom >= NB_NET_HEADER_BYTES && header_is_aligned(tx) &&
                                 (!config->tx_header_with_frame || header_is_aligned(rx)); /* of one that is forwarded */
    /* Whole lines are copied, whatever the frame's length. */
    bool copies = config->tx_copied != 0;
    bool copy_is_valid = config->tx_slots && config->tx_copied <= NB_TX_MOST_COPIED &&
                         ledger_room(config->tx_ledger) >= NB_TX_MOST_COPIED &&
                         ledger_room(config->rx_ledger) >= NB_TX_MOST_COPIED;
    return config->net_header_bytes <= rx->headroom && config->net_header_bytes <= NB_NET_HEADER_BYTES &&
           (!merges || merge_header_is_valid) && (!looks_there || header_there_is_valid) && (!copies || copy_is_valid);
}

static bool pairs_are_consistent(const struct nb_pump_config *config)
{
    if (config->pair_count == 0 || config->pair_count > NB_MOST_PAIRS)
        return false;
    for (uint32_t i = 0; i < config->pair_count; i++)
        /* The header is a segment of its own. */
        if (!config->pairs[i].rx_queue || !config->pairs[i].tx_queue ||
            !virtqueue_has_room(config->pairs[i].tx_queue, 1 + config->tx_max_pieces))
            return false;
    return true;
}

static bool is_consistent(const struct nb_pump_config *config)
{
    uint32_t rx = config->rx_ledger->region.count;
    uint32_t tx = config->tx_ledger->region.count;
    return ring_is_valid(&config->rx_active, rx) && ring_is_valid(&config->rx_free, rx) &&
           ring_is_valid(&config->tx_active, tx + rx) && ring_is_valid(&config->tx_done, tx) && config->burst != 0 &&
           config->rx_max_pieces >= 1 && config->rx_max_pieces <= NB_MOST_PIECES && config->tx_max_pieces >= 1 &&
           config->tx_max_pieces <= NB_MOST_PIECES && config->tx_largest_frame >= ledger_room(config->tx_ledger) &&
           headers_are_consistent(config) && pairs_are_consistent(config) &&
           (config->intx_fd < 0 || config->isr_status != NULL);
}

struct nb_pump *nb_pump_new(const struct nb_pump_config *config)
{
    if (!is_consistent(config)) {
        errno = EINVAL;
        return NULL;
    }
    struct nb_pump *pump = calloc(1, sizeof(*pump));
    if (!pump)
        return NULL;
    pump->config = *config;
    pump->epoll_fd = -1;
    pump->polling = polling_start(config->spin_ns);
    pump->rx_flags = config->offloads & RX_OFFLOADS ? NB_HEADER : 0;
    pump->tx_has_offloads = config->offloads & TX_OFFLOADS;
    pump->rx_may_hold = config->rx_client_limit;
    uint32_t rx_room = ledger_room(config->rx_ledger);
    pump->longest_forwarded = rx_room < config->tx_largest_frame ? rx_room : config->tx_largest_frame;
    uint32_t share = config->rx_ledger->region.count / config->pair_count;
    pump->rx_share = share ? share : 1;
    for (uint32_t i = 0; i < config->pair_count; i++)
        pump->pairs[i] = (struct pump_pair){
            .rx_queue = config->pairs[i].rx_queue,
            .tx_queue = config->pairs[i].tx_queue,
            .number = (uint8_t)i,
            .backlog_first = NO_BUFFER,
        };
    pump_place_slots(pump);
    uint32_t sendable = config->tx_ledger->region.count + config->rx_ledger->region.count;
    pump->tx_pieces = calloc(sendable, sizeof(pump->tx_pieces[0]));
    if (!pump->tx_pieces || pump_watch_fds(pump)) {
        nb_pump_free(pump);
        return NULL;
    }
    for (uint32_t i = 0; i < sendable; i++)
        pump->tx_pieces[i].next = NO_BUFFER;
    return pump;
}

void nb_pump_free(struct nb_pump *pump)
{
    if (!pump)
        return;
    if (pump->epoll_fd >= 0)
        close(pump->epoll_fd);
    free(pump->tx_pieces);
    free(pump);
}

void pump_place_slots(struct nb_pump *pump)
{
    uint32_t slot = 1 + pump->config.tx_ledger->region.count;
    for (uint32_t i = 0; i < pump->config.pair_count; i++) {
        pump->pairs[i].first_slot = slot;
        slot += pump->pairs[i].tx_queue->size;
    }
}

void pump_show_free_buffers(struct nb_pump *pump)
{
    pump_post_free_buffers(pump);
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        virtqueue_show(pump->pairs[i].rx_queue);
}

void nb_pump_prime(struct nb_pump *pump)
{
    pump_show_free_buffers(pump);
    struct nb_ledger *tx = pump->config.tx_ledger;
    while (ledger_free_count(tx) != 0)
        pump_acknowledge(pump, ledger_take_for_device(tx));
    ring_publish(&pump->config.tx_done, pump->tx_done_put);
    pump_wake_client(pump); /* it may have been waiting for a buffer since it got the port */
}
