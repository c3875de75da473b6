/* Going to sleep, being woken, waking others: whoever waits asks for it, then looks once more. */
#include "pump.h"

#include <errno.h>
#include <sys/epoll.h>

#include "counting.h"

enum { ISR_CONFIG_CHANGE = 2 }; /* virtio 1.3 §4.1.4.5 */

/* What an epoll event stands for. */
enum source { SOURCE_QUEUE, SOURCE_INTX, SOURCE_DOORBELL, SOURCE_CONTROL };

/* ---- Waking the client ---------------------------------------------------------------------------------------- */

/* The client told when the last doorbell woke it; believed as far as it can be true. */
static void account_client_wakeup(struct nb_pump *pump, uint64_t now)
{
    uint64_t woken = load_once_64(&pump->config.rx_active.header->woken_ns);
    if (pump->doorbell_ns != 0 && woken >= pump->doorbell_ns && woken <= now)
        nb_histogram_add(&pump->config.counters->irq_latency_ns[NB_LATENCY_CLIENT], woken - pump->doorbell_ns);
    pump->doorbell_ns = 0;
}

/* Whether the client waits for what was published since it was last looked at. It is not woken for anything else: what was
 * there before, it saw when it looked once more. */
static bool has_news(const struct nb_ring_place *ring, uint32_t put, uint32_t *told)
{
    if (put == *told)
        return false;
    *told = put;
    return ring_must_wake(ring);
}

/* One processor, which the client would have for the first buffer that comes back and want again for the next: as long as
 * the device has more to send than has come back, it can wait for more. */
static bool buffers_can_wait(const struct nb_pump *pump)
{
    if (!pump->config.yields || !pump->polling.now_ns)
        return false;
    uint32_t in_flight = 0;
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        in_flight += virtqueue_in_flight(pump->pairs[i].tx_queue);
    return in_flight > pump->tx_done_put - pump->tx_done_told;
}

/* What the client asks to be woken for: 1 frames, 2 buffers. */
static uint32_t wishes(const struct nb_pump *pump)
{
    return (load_once_32(&pump->config.rx_active.header->wake) ? 1 : 0) |
           (load_once_32(&pump->config.tx_done.header->wake) ? 2 : 0);
}

static bool wake_client(struct nb_pump *pump, bool for_buffers_too)
{
    bool news = pump->rx_active_put != pump->rx_active_told || pump->tx_done_put != pump->tx_done_told;
    bool for_frames = has_news(&pump->config.rx_active, pump->rx_active_put, &pump->rx_active_told);
    bool for_buffers =
        (for_frames || for_buffers_too) && has_news(&pump->config.tx_done, pump->tx_done_put, &pump->tx_done_told);
    if (!for_frames && !for_buffers) {
        count(&pump->config.counters->wakeups_suppressed, news);
        return false;
    }
    pump->client_left_asking = wishes(pump);
    uint64_t now = now_ns();
    account_client_wakeup(pump, now);
    if (for_frames)
        pump->doorbell_ns = now;
    store_once_64(&pump->config.rx_active.header->doorbell_ns, now);
    doorbell_ring(pump->config.driver_doorbell_fd);
    count(&pump->config.counters->wakeups_sent, 1);
    return true;
}

bool pump_wake_client(struct nb_pump *pump) { return wake_client(pump, true); }
void pump_wake_client_soon(struct nb_pump *pump) { wake_client(pump, !buffers_can_wait(pump)); }

bool pump_client_is_awake(const struct nb_pump *pump) { return !(wishes(pump) & ~pump->client_left_asking); }

/* ---- Going to sleep ------------------------------------------------------------------------------------------- */

static void set_interrupts(struct nb_pump *pump, bool on)
{
    for (uint32_t i = 0; i < pump->config.pair_count; i++) {
        virtqueue_set_interrupts(pump->pairs[i].rx_queue, on && !pump->holds_back);
        virtqueue_set_interrupts(pump->pairs[i].tx_queue, on);
    }
}

static bool device_has_completed(struct nb_pump *pump)
{
    for (uint32_t i = 0; i < pump->config.pair_count; i++)
        if ((virtqueue_completed(pump->pairs[i].rx_queue) != 0 && !pump->holds_back) ||
            virtqueue_completed(pump->pairs[i].tx_queue) != 0)
            return true;
    return false;
}

void pump_stop_asking(struct nb_pump *pump)
{
    ring_disarm(&pump->config.rx_free);
    ring_disarm(&pump->config.tx_active);
    set_interrupts(pump, false);
}

/* A device that slept on while we went on would never wake us either. */
static void wake_device(struct nb_pump *pump, const struct nb_virtqueue *queue)
{
    if (!virtqueue_device_sleeps_on(queue))
        return;
    virtqueue_notify(queue);
    count(&pump->config.counters->notifications_sent, 1);
}

static void wake_devices(struct nb_pump *pump)
{
    for (uint32_t i = 0; i < pump->config.pair_count; i++) {
        wake_device(pump, pump->pairs[i].rx_queue);
        wake_device(pump, pump->pairs[i].tx_queue);
    }
}

/* Asks everybody for a wake-up, then looks once more: what arrived before they saw it would wake nobody. True: sleep. */
bool pump_ask_for_wakeup(struct nb_pump *pump)
{
    const struct nb_pump_config *config = &pump->config;
    /* Returned RX buffers can wait while the device has plenty, and the client is not waited for. */
    bool wants_buffers = pump->holds_back || pump_device_starves(pump);
    if (wants_buffers)
        ring_arm(&config->rx_free);
    /* Frames to send can wait while the device has no room for them: its interrupt will tell. */
    bool room_to_send = pump_can_transmit(pump);
    if (room_to_send)
        ring_arm(&config->tx_active);
    set_interrupts(pump, true);
    fence_store_load();
    bool nothing = !device_has_completed(pump) &&
                   (!room_to_send || ring_waiting(&config->tx_active, pump->tx_active_taken) == 0) &&
                   (!wants_buffers || ring_waiting(&config->rx_free, pump->rx_free_taken) == 0);
    if (nothing)
        wake_devices(pump);
    else
        pump_stop_asking(pump);
    return nothing;
}

/* ---- Being woken ---------------------------------------------------------------------------------------------- */

/* INTx is level-triggered: reading ISR status lets go of the line, then VFIO may unmask it. Returns an enum nb_event or 0. */
static int acknowledge_intx(struct nb_pump *pump)
{
    doorbell_clear(pump->config.intx_fd);
    uint8_t isr = *pump->config.isr_status;
    doorbell_ring(pump->config.intx_unmask_fd);
    return isr & ISR_CONFIG_CHANGE ? NB_EVENT_CONFIG : 0;
}

/* Waits up to `timeout_ms` (-1: for ever) and quietens what woke us. Returns an enum nb_event, or 0, or -errno. */
int pump_look_at_fds(struct nb_pump *pump, int timeout_ms)
{
    struct epoll_event events[2 * NB_MOST_PAIRS + 3];
    int ready = epoll_wait(pump->epoll_fd, events, sizeof(events) / sizeof(events[0]), timeout_ms);
    if (ready < 0)
        return errno == EINTR ? 0 : -errno;
    int event = 0;
    for (int i = 0; i < ready; i++) {
        switch ((enum source)events[i].data.u32) {
        case SOURCE_QUEUE: /* never read: see watch() */
            count(&pump->config.counters->interrupts, 1);
            break;
        case SOURCE_INTX:
            count(&pump->config.counters->interrupts, 1);
            if (acknowledge_intx(pump))
                event = NB_EVENT_CONFIG;
            break;
        case SOURCE_DOORBELL: /* never read: see watch() */
            break;
        case SOURCE_CONTROL:
            /* A configuration change goes first: the ISR has forgotten it, control_fd will still be readable. */
            event = event ? event : NB_EVENT_CONTROL;
            break;
        }
    }
    return event;
}

static int watch(struct nb_pump *pump, int fd, enum source source)
{
    if (fd < 0)
        return 0;
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = source};
    /* Each ring of an eventfd is an edge, so it need not be read: a system call less for each interrupt. And the client
     * shares its doorbell's open file description: it could make it blocking, and empty it under our hands. */
    if (source == SOURCE_QUEUE || source == SOURCE_DOORBELL)
        event.events |= EPOLLET;
    /* A device with few vectors has one for several queues. */
    return epoll_ctl(pump->epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0 || errno == EEXIST ? 0 : -1;
}

int pump_watch_fds(struct nb_pump *pump)
{
    const struct nb_pump_config *config = &pump->config;
    pump->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (pump->epoll_fd < 0)
        return -1;
    for (uint32_t i = 0; i < config->pair_count; i++)
        if (watch(pump, config->pairs[i].rx_irq_fd, SOURCE_QUEUE) || watch(pump, config->pairs[i].tx_irq_fd, SOURCE_QUEUE))
            return -1;
    return watch(pump, config->intx_fd, SOURCE_INTX) || watch(pump, config->client_doorbell_fd, SOURCE_DOORBELL) ||
                   watch(pump, config->control_fd, SOURCE_CONTROL)
               ? -1
               : 0;
}
