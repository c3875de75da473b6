/* The pump: one call that moves frames between the virtqueues and the port for as long as they flow.
 *
 * Follow a frame: receive() takes it from the RX virtqueue and lends its buffers to the client through rx_active;
 * take_back() gets them back from rx_free; refill() posts them again. transmit() takes a frame from tx_active to the TX
 * virtqueue; complete() gives its buffer back through tx_done. run_round() is those five, and
 * nb_pump_run() repeats it, polling while there is work and sleeping on the eventfds when there is none.
 *
 * Every function that moves frames returns how many it moved, or a negative verdict: see CLIENT_FAULT and DEVICE_FAULT.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "core.h"
#include "counting.h"
#include "ledger.h"
#include "port_ring.h"
#include "virtqueue.h"

enum {
    ETHERNET_HEADER = 14,
    TX_SEGMENTS = 2,            /* header and frame */
    MAX_PIECES = 64,            /* more than a 64 KiB frame needs in buffers of 2 KiB */
    ROUNDS_BETWEEN_LOOKS = 256, /* while awake, how often control_fd and INTx are looked at */
    NUM_BUFFERS_OFFSET = 10,    /* in struct virtio_net_hdr (virtio 1.3 §5.1.6), a 16-bit word */
    ISR_CONFIG_CHANGE = 2,      /* virtio 1.3 §4.1.4.5 */
};

/* A negative verdict carries what happened: the enum nb_refusal or enum nb_device_fault is recovered from it. */
enum { CLIENT_FAULT = -1000, DEVICE_FAULT = -2000 };
static int client_fault(int refusal) { return CLIENT_FAULT - refusal; }
static int device_fault(int fault) { return DEVICE_FAULT - fault; }

/* What an epoll event stands for. */
enum source { SOURCE_QUEUE, SOURCE_INTX, SOURCE_DOORBELL, SOURCE_CONTROL };

struct piece {
    uint32_t buffer;
    uint32_t bytes;
};

struct nb_pump {
    struct nb_pump_config config;
    int epoll_fd;
    uint32_t rx_active_put;
    uint32_t rx_free_taken;
    uint32_t tx_active_taken;
    uint32_t tx_done_put;
    struct piece pieces[MAX_PIECES]; /* of the frame being gathered */
    uint32_t pieces_gathered;
    uint32_t pieces_expected; /* 0: between frames */
    uint64_t doorbell_ns;     /* when the client's bell was last rung; 0: its wake-up was accounted for */
};

/* ---- Receive: device to client -------------------------------------------------------------------------------- */

static void hand_over(struct nb_pump *pump)
{
    struct nb_ledger *ledger = pump->config.rx_ledger;
    for (uint32_t i = 0; i < pump->pieces_gathered; i++) {
        uint16_t flags = 0;
        if (i > 0)
            flags |= NB_CONTINUATION;
        if (i + 1 < pump->pieces_gathered)
            flags |= NB_MORE;
        ring_put(&pump->config.rx_active, &pump->rx_active_put,
                 (struct nb_entry){
                     .dma_handle = ledger_lend(ledger, pump->pieces[i].buffer),
                     .len = pump->pieces[i].bytes,
                     .kind = NB_RX_PACKET,
                     .flags = flags,
                 });
    }
}

static void finish_frame(struct nb_pump *pump)
{
    struct nb_counters *counters = pump->config.counters;
    struct nb_ledger *ledger = pump->config.rx_ledger;
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < pump->pieces_gathered; i++)
        bytes += pump->pieces[i].bytes;
    count(&counters->packets_rx, 1);
    count(&counters->bytes_rx, bytes);

    int dropped = -1;
    if (bytes < ETHERNET_HEADER)
        dropped = NB_DROP_TOO_SHORT;
    else if (ledger->owned[NB_OWNER_CLIENT] + pump->pieces_gathered > pump->config.rx_client_limit)
        dropped = NB_DROP_CLIENT_SLOW;
    if (dropped < 0) {
        hand_over(pump);
    } else {
        count(&counters->drops[dropped], 1);
        for (uint32_t i = 0; i < pump->pieces_gathered; i++)
            ledger_put_free(ledger, pump->pieces[i].buffer);
    }
    pump->pieces_gathered = 0;
    pump->pieces_expected = 0;
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

static int gather(struct nb_pump *pump, const struct nb_used *used)
{
    uint32_t header = 0;
    if (pump->pieces_expected == 0) {
        header = pump->config.net_header_bytes;
        if (used->written < header)
            return refuse_frame(pump, used, NB_FAULT_USED_LENGTH);
        pump->pieces_expected = frame_pieces(pump, used->buffer);
        if (pump->pieces_expected == 0)
            return refuse_frame(pump, used, NB_FAULT_NUM_BUFFERS);
    }
    pump->pieces[pump->pieces_gathered++] = (struct piece){.buffer = used->buffer, .bytes = used->written - header};
    return 0;
}

static int receive(struct nb_pump *pump)
{
    struct nb_virtqueue *queue = pump->config.rx_queue;
    int completed = virtqueue_completed(queue);
    if (completed < 0)
        return device_fault(-1 - completed);
    uint32_t most = pump->config.burst;
    uint32_t take = (uint32_t)completed < most ? (uint32_t)completed : most;
    uint32_t put_before = pump->rx_active_put;
    uint32_t frames = 0;
    int verdict = 0;
    uint32_t taken = 0;
    for (; taken < take && verdict == 0; taken++) {
        struct nb_used used;
        int got = virtqueue_take(queue, &used);
        if (got == 0)
            break;
        verdict = got < 0 ? device_fault(-1 - got) : gather(pump, &used);
        if (verdict == 0 && pump->pieces_gathered == pump->pieces_expected) {
            finish_frame(pump);
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

static int take_back(struct nb_pump *pump)
{
    int64_t waiting = ring_waiting(&pump->config.rx_free, pump->rx_free_taken);
    if (waiting < 0)
        return client_fault(NB_REFUSE_RING_JUMP);
    struct nb_ledger *ledger = pump->config.rx_ledger;
    for (int64_t i = 0; i < waiting; i++) {
        struct nb_entry entry = ring_take(&pump->config.rx_free, &pump->rx_free_taken);
        if (entry.kind != NB_RX_PACKET || entry.flags != 0)
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

static void notify(struct nb_pump *pump, struct nb_virtqueue *queue)
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

static void post_free_buffers(struct nb_pump *pump)
{
    struct nb_virtqueue *queue = pump->config.rx_queue;
    struct nb_ledger *ledger = pump->config.rx_ledger;
    uint32_t before_frame = ledger->region.headroom - pump->config.net_header_bytes;
    uint32_t room = ledger->region.stride - before_frame;
    while (virtqueue_has_room(queue, 1) && ledger_free_count(ledger) != 0) {
        uint32_t buffer = ledger_take_for_device(ledger);
        struct nb_segment segment = {.iova = ledger_iova(ledger, buffer) + before_frame, .len = room};
        virtqueue_add(queue, &segment, 0, 1, buffer);
    }
}

static void refill(struct nb_pump *pump)
{
    post_free_buffers(pump);
    notify(pump, pump->config.rx_queue);
}

/* ---- Transmit: client to device ------------------------------------------------------------------------------- */

static int transmit(struct nb_pump *pump)
{
    struct nb_virtqueue *queue = pump->config.tx_queue;
    struct nb_ledger *ledger = pump->config.tx_ledger;
    int64_t waiting = ring_waiting(&pump->config.tx_active, pump->tx_active_taken);
    if (waiting < 0)
        return client_fault(NB_REFUSE_RING_JUMP);
    uint32_t room = ledger_room(ledger);
    uint32_t sent = 0;
    int verdict = 0;
    while (sent < waiting && sent < pump->config.burst && virtqueue_has_room(queue, TX_SEGMENTS)) {
        struct nb_entry entry = ring_take(&pump->config.tx_active, &pump->tx_active_taken);
        int64_t buffer = ledger_check(ledger, entry.dma_handle);
        if (entry.kind != NB_TX_PACKET || entry.flags != 0)
            verdict = client_fault(NB_REFUSE_KIND);
        else if (buffer < 0)
            verdict = client_fault((int)(-1 - buffer));
        else if (entry.len < ETHERNET_HEADER || entry.len > room)
            verdict = client_fault(NB_REFUSE_LENGTH);
        if (verdict < 0)
            break;
        ledger_move(ledger, (uint32_t)buffer, NB_OWNER_CLIENT, NB_OWNER_DEVICE);
        struct nb_segment segments[TX_SEGMENTS] = {
            {.iova = pump->config.tx_header_iova, .len = pump->config.net_header_bytes},
            {.iova = ledger_iova(ledger, (uint32_t)buffer) + ledger->region.headroom, .len = entry.len},
        };
        virtqueue_add(queue, segments, TX_SEGMENTS, 0, (uint32_t)buffer);
        sent++;
    }
    if (sent) {
        ring_consumed(&pump->config.tx_active, pump->tx_active_taken);
        count_burst(pump->config.counters->tx_bursts, sent);
        notify(pump, queue);
    }
    return verdict < 0 ? verdict : (int)sent;
}

static void acknowledge(struct nb_pump *pump, uint32_t buffer)
{
    ring_put(&pump->config.tx_done, &pump->tx_done_put,
             (struct nb_entry){
                 .dma_handle = ledger_lend(pump->config.tx_ledger, buffer),
                 .len = ledger_room(pump->config.tx_ledger),
                 .kind = NB_TX_PACKET_ACK,
             });
}

static int complete(struct nb_pump *pump)
{
    struct nb_counters *counters = pump->config.counters;
    int completed = virtqueue_completed(pump->config.tx_queue);
    if (completed < 0)
        return device_fault(-1 - completed);
    int taken = 0, got = 0;
    struct nb_used used;
    while (taken < completed && (got = virtqueue_take(pump->config.tx_queue, &used)) > 0) {
        acknowledge(pump, used.buffer);
        count(&counters->packets_tx, 1);
        count(&counters->bytes_tx, used.readable - pump->config.net_header_bytes);
        taken++;
    }
    if (taken)
        ring_publish(&pump->config.tx_done, pump->tx_done_put);
    return got < 0 ? device_fault(-1 - got) : taken;
}

/* ---- Rounds, sleep and wake-up -------------------------------------------------------------------------------- */

/* The client told when the last doorbell woke it; believed as far as it can be true. */
static void account_client_wakeup(struct nb_pump *pump, uint64_t now)
{
    uint64_t woken = load_once_64(&pump->config.rx_active.header->woken_ns);
    if (pump->doorbell_ns != 0 && woken >= pump->doorbell_ns && woken <= now)
        nb_histogram_add(&pump->config.counters->irq_latency_ns[NB_LATENCY_CLIENT], woken - pump->doorbell_ns);
    pump->doorbell_ns = 0;
}

static void wake_client(struct nb_pump *pump)
{
    bool for_frames = ring_must_wake(&pump->config.rx_active);
    bool for_buffers = ring_must_wake(&pump->config.tx_done);
    if (!for_frames && !for_buffers) {
        count(&pump->config.counters->wakeups_suppressed, 1);
        return;
    }
    uint64_t now = now_ns();
    account_client_wakeup(pump, now);
    if (for_frames)
        pump->doorbell_ns = now;
    store_once_64(&pump->config.rx_active.header->doorbell_ns, now);
    doorbell_ring(pump->config.driver_doorbell_fd);
    count(&pump->config.counters->wakeups_sent, 1);
}

static int run_round(struct nb_pump *pump)
{
    /* First, or a frame would be dropped for buffers that the client has already given back. */
    int returned = take_back(pump);
    if (returned < 0)
        return returned;
    int received = receive(pump);
    int completed = received < 0 ? 0 : complete(pump);
    /* Before the slower half: the client works while we refill and send. After a fault as well: what came before it has
     * been published, and who sleeps was promised a doorbell for that. */
    if (received || completed)
        wake_client(pump);
    if (received < 0)
        return received;
    if (completed < 0)
        return completed;
    refill(pump);
    int sent = transmit(pump);
    return sent < 0 ? sent : received + completed + returned + sent;
}

static void stop_asking(struct nb_pump *pump)
{
    ring_disarm(&pump->config.rx_free);
    ring_disarm(&pump->config.tx_active);
    virtqueue_set_interrupts(pump->config.rx_queue, false);
    virtqueue_set_interrupts(pump->config.tx_queue, false);
}

/* Asks everybody for a wake-up, then looks once more: what arrived before they saw it would wake nobody. True: sleep. */
static bool ask_for_wakeup(struct nb_pump *pump)
{
    const struct nb_pump_config *config = &pump->config;
    /* Returned RX buffers can wait while the device has plenty: half of its queue, and enough for the longest frame, which
     * it holds back until it has room for all of it. */
    bool device_starves = virtqueue_is_half_empty(config->rx_queue) ||
                          virtqueue_in_flight(config->rx_queue) < config->rx_max_pieces;
    if (device_starves)
        ring_arm(&config->rx_free);
    /* Frames to send can wait while the device has no room for them: its interrupt will tell. */
    bool room_to_send = virtqueue_has_room(config->tx_queue, TX_SEGMENTS);
    if (room_to_send)
        ring_arm(&config->tx_active);
    virtqueue_set_interrupts(config->rx_queue, true);
    virtqueue_set_interrupts(config->tx_queue, true);
    fence_store_load();
    bool nothing = virtqueue_completed(config->rx_queue) == 0 && virtqueue_completed(config->tx_queue) == 0 &&
                   (!room_to_send || ring_waiting(&config->tx_active, pump->tx_active_taken) == 0) &&
                   (!device_starves || ring_waiting(&config->rx_free, pump->rx_free_taken) == 0);
    if (!nothing)
        stop_asking(pump);
    return nothing;
}

/* INTx is level-triggered: reading ISR status lets go of the line, then VFIO may unmask it. Returns an enum nb_event or 0. */
static int acknowledge_intx(struct nb_pump *pump)
{
    doorbell_clear(pump->config.intx_fd);
    uint8_t isr = *pump->config.isr_status;
    doorbell_ring(pump->config.intx_unmask_fd);
    return isr & ISR_CONFIG_CHANGE ? NB_EVENT_CONFIG : 0;
}

/* Waits up to `timeout_ms` (-1: for ever) and quietens what woke us. Returns an enum nb_event, or 0, or -errno. */
static int look_at_fds(struct nb_pump *pump, int timeout_ms)
{
    struct epoll_event events[8];
    int ready = epoll_wait(pump->epoll_fd, events, 8, timeout_ms);
    if (ready < 0)
        return errno == EINTR ? 0 : -errno;
    int event = 0;
    for (int i = 0; i < ready; i++) {
        int fd = (int)(events[i].data.u64 >> 32);
        switch ((enum source)(events[i].data.u64 & 0xff)) {
        case SOURCE_QUEUE:
            doorbell_clear(fd);
            count(&pump->config.counters->interrupts, 1);
            break;
        case SOURCE_INTX:
            count(&pump->config.counters->interrupts, 1);
            if (acknowledge_intx(pump))
                event = NB_EVENT_CONFIG;
            break;
        case SOURCE_DOORBELL: /* edge-triggered, never read: see watch() */
            break;
        case SOURCE_CONTROL:
            /* A configuration change goes first: the ISR has forgotten it, control_fd will still be readable. */
            event = event ? event : NB_EVENT_CONTROL;
            break;
        }
    }
    return event;
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
    uint64_t woken_at = 0;  /* 0: the drain since the last wake-up was accounted for */
    uint64_t idle_since = 0; /* 0: the last round moved something */
    uint32_t rounds = 0;
    int verdict = 0;
    stop_asking(pump);
    while (verdict == 0) {
        /* Counted here, so that no peer that keeps us from sleeping keeps us from looking. */
        if (++rounds % ROUNDS_BETWEEN_LOOKS == 0 && (verdict = look_at_fds(pump, 0)) != 0)
            break;
        int moved = run_round(pump);
        if (moved != 0) {
            idle_since = 0;
            verdict = moved < 0 ? moved : 0;
            continue;
        }
        if (woken_at) {
            nb_histogram_add(drain, now_ns() - woken_at);
            woken_at = 0;
        }
        if (pump->config.spin_ns) {
            uint64_t now = now_ns();
            if (!idle_since)
                idle_since = now;
            if (now - idle_since < pump->config.spin_ns) {
                cpu_relax();
                continue;
            }
        }
        if (!ask_for_wakeup(pump))
            continue;
        count(&pump->config.counters->sleeps, 1);
        verdict = look_at_fds(pump, -1);
        woken_at = now_ns();
        idle_since = 0;
        stop_asking(pump);
    }
    report(pump, verdict, result);
}

/* ---- Making and freeing --------------------------------------------------------------------------------------- */

static int watch(struct nb_pump *pump, int fd, enum source source)
{
    if (fd < 0)
        return 0;
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)(uint32_t)fd << 32 | source};
    /* The client shares the doorbell's open file description: it could make it blocking and empty it under our hands. So
     * the doorbell is never read; each ring is an edge. */
    if (source == SOURCE_DOORBELL)
        event.events |= EPOLLET;
    return epoll_ctl(pump->epoll_fd, EPOLL_CTL_ADD, fd, &event);
}

static bool is_consistent(const struct nb_pump_config *config)
{
    const struct nb_region *region = &config->rx_ledger->region;
    uint32_t rx = region->count;
    uint32_t tx = config->tx_ledger->region.count;
    /* Only merged frames have num_buffers; it must lie inside the header, and where a 16-bit word may. */
    bool merges = config->rx_max_pieces > 1;
    bool merge_header_is_valid = config->net_header_bytes >= NUM_BUFFERS_OFFSET + sizeof(uint16_t) &&
                                 ((uintptr_t)region->base + region->headroom - config->net_header_bytes) % 2 == 0 &&
                                 region->stride % 2 == 0;
    return ring_is_valid(&config->rx_active, rx) && ring_is_valid(&config->rx_free, rx) &&
           ring_is_valid(&config->tx_active, tx) && ring_is_valid(&config->tx_done, tx) && config->burst != 0 &&
           config->rx_max_pieces >= 1 && config->rx_max_pieces <= MAX_PIECES &&
           config->net_header_bytes <= region->headroom && (!merges || merge_header_is_valid) &&
           virtqueue_has_room(config->tx_queue, TX_SEGMENTS) &&
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
    pump->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    /* A device with few vectors has one for both queues. */
    int second_irq_fd = config->tx_irq_fd == config->rx_irq_fd ? -1 : config->tx_irq_fd;
    if (pump->epoll_fd < 0 || watch(pump, config->rx_irq_fd, SOURCE_QUEUE) ||
        watch(pump, second_irq_fd, SOURCE_QUEUE) || watch(pump, config->intx_fd, SOURCE_INTX) ||
        watch(pump, config->client_doorbell_fd, SOURCE_DOORBELL) ||
        watch(pump, config->control_fd, SOURCE_CONTROL)) {
        nb_pump_free(pump);
        return NULL;
    }
    return pump;
}

void nb_pump_free(struct nb_pump *pump)
{
    if (!pump)
        return;
    if (pump->epoll_fd >= 0)
        close(pump->epoll_fd);
    free(pump);
}

void nb_pump_prime(struct nb_pump *pump)
{
    post_free_buffers(pump);
    /* The device may look from DRIVER_OK on; the notification comes with the first round. */
    virtqueue_show(pump->config.rx_queue);
    struct nb_ledger *tx = pump->config.tx_ledger;
    while (ledger_free_count(tx) != 0)
        acknowledge(pump, ledger_take_for_device(tx));
    ring_publish(&pump->config.tx_done, pump->tx_done_put);
    wake_client(pump); /* it may have been waiting for a buffer since it got the port */
}
