/* The device's thread, the echo's thread, and the account at the end: see traffic.h. */
#include "traffic.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>

#include "check.h"
#include "jitter.h"
#include "white_box.h"

enum { MOST_HELD = 64 };
static const double DEADLINE_S = 10;

static uint32_t draw(struct traffic *traffic)
{
    uint32_t x = traffic->random;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return traffic->random = x;
}

static void pause_a_little(struct traffic *traffic)
{
    if (!traffic->config.delays)
        return;
    uint32_t choice = draw(traffic);
    if (choice % 16 == 0)
        sched_yield();
    for (volatile uint32_t i = choice % 8 == 0 ? choice >> 8 & 0x7ff : 0; i > 0; i--)
        ;
}

static void fail_with_picture(const struct traffic *traffic, const char *what)
{
    const struct world *world = traffic->world;
    const struct nb_counters *counters = &world->counters;
    const struct nb_client *client = &world->client;
    FAIL("%s: %llu delivered, %llu returned of %llu; pump received %llu, sent %llu, dropped %llu, slept %llu times; "
         "rx_active %u put, client took %u (wake %u), tx_done %u put (wake %u); rx_free %u put, driver took %u (wake %u); "
         "tx_active %u put, driver took %u (wake %u); device: RX %u available, TX %u available, notified %d %d; "
         "violation: %s",
         what, (unsigned long long)traffic->delivered, (unsigned long long)traffic->returned,
         (unsigned long long)traffic->config.frames, (unsigned long long)counters->packets_rx,
         (unsigned long long)counters->packets_tx, (unsigned long long)counters->drops[NB_DROP_CLIENT_SLOW],
         (unsigned long long)counters->sleeps, client->rx_active.header->produced, client->rx_active.header->consumed,
         client->rx_active.header->wake, client->tx_done.header->produced, client->tx_done.header->wake,
         client->rx_free.header->produced, client->rx_free.header->consumed, client->rx_free.header->wake,
         client->tx_active.header->produced, client->tx_active.header->consumed, client->tx_active.header->wake,
         fake_available(&world->device.rx), fake_available(&world->device.tx), fake_notified(&world->device.rx),
         fake_notified(&world->device.tx), world->device.violation[0] ? world->device.violation : "none");
}

static uint32_t length_of(const struct traffic *traffic, uint64_t number)
{
    return traffic->config.fixed_length ? traffic->config.fixed_length : frame_length(number);
}

static bool lie_is_told(const struct traffic *traffic)
{
    return traffic->config.lie != FAKE_HONEST && traffic->delivered > traffic->config.lie_at;
}

static unsigned deliver_burst(struct traffic *traffic)
{
    struct fake_device *device = &traffic->world->device;
    uint8_t frame[65536];
    unsigned delivered = 0;
    while (delivered < traffic->config.burst && traffic->delivered < traffic->config.frames && !lie_is_told(traffic) &&
           (traffic->config.lossy || traffic->delivered - traffic->returned < traffic->config.window)) {
        uint32_t len = length_of(traffic, traffic->delivered);
        if (!traffic->config.unchecked)
            frame_make(frame, traffic->delivered, len);
        if (traffic->config.lie && traffic->delivered == traffic->config.lie_at)
            device->lie = traffic->config.lie;
        if (!fake_deliver(device, frame, len))
            break;
        traffic->delivered++;
        delivered++;
        pause_a_little(traffic);
    }
    if (delivered)
        fake_interrupt(device, &device->rx);
    return delivered;
}

static void check_returned(struct traffic *traffic, const uint8_t *frame, uint32_t len)
{
    traffic->returned++;
    if (traffic->config.unchecked)
        return;
    while (!(len == length_of(traffic, traffic->next_expected) && frame_is(frame, traffic->next_expected, len, true))) {
        if (!traffic->config.lossy || traffic->next_expected == traffic->delivered)
            FAIL("what came back as frame %llu is something else (%u bytes)", (unsigned long long)traffic->next_expected, len);
        traffic->next_expected++;
    }
    traffic->next_expected++;
}

static unsigned complete_burst(struct traffic *traffic)
{
    struct fake_device *device = &traffic->world->device;
    struct fake_chain held[MOST_HELD];
    uint8_t frame[65536];
    uint32_t len;
    unsigned count = 0;
    while (count < MOST_HELD && fake_collect(device, &held[count], frame, &len)) {
        check_returned(traffic, frame, len);
        count++;
    }
    for (unsigned left = count; left > 0; left--) {
        unsigned pick = traffic->config.scrambled ? draw(traffic) % left : 0;
        fake_complete(device, &held[pick]);
        memmove(&held[pick], &held[pick + 1], (left - pick - 1) * sizeof(held[0]));
        pause_a_little(traffic);
    }
    if (count)
        fake_interrupt(device, &device->tx);
    return count;
}

static bool is_done(const struct traffic *traffic)
{
    const struct nb_counters *counters = &traffic->world->counters;
    if (lie_is_told(traffic) || __atomic_load_n(&traffic->abandoned, __ATOMIC_RELAXED))
        return true;
    if (traffic->config.lossy)
        return traffic->delivered == traffic->config.frames &&
               traffic->returned + __atomic_load_n(&counters->drops[NB_DROP_CLIENT_SLOW], __ATOMIC_RELAXED) ==
                   traffic->config.frames;
    return traffic->returned == traffic->config.frames;
}

/* Nothing to do: asks for notifications, looks once more, and waits for one. */
static void sleep_until_notified(struct traffic *traffic, double deadline)
{
    struct fake_device *device = &traffic->world->device;
    fake_want_notifications(&device->rx, true);
    fake_want_notifications(&device->tx, true);
    bool more_to_deliver = traffic->delivered < traffic->config.frames &&
                           (traffic->config.lossy || traffic->delivered - traffic->returned < traffic->config.window);
    if (!(more_to_deliver && fake_available(&device->rx)) && !fake_available(&device->tx)) {
        while (!fake_notified(&device->rx) && !fake_notified(&device->tx) && !is_done(traffic)) {
            if (device->intx_fd >= 0)
                fake_intx_poll(device);
            sched_yield();
            if (seconds_now() > deadline)
                fail_with_picture(traffic, "everybody sleeps");
        }
    }
    fake_want_notifications(&device->rx, false);
    fake_want_notifications(&device->tx, false);
}

static void *serve(void *argument)
{
    struct traffic *traffic = argument;
    struct fake_device *device = &traffic->world->device;
    double deadline = seconds_now() + DEADLINE_S;
    while (!is_done(traffic)) {
        if (device->intx_fd >= 0)
            fake_intx_poll(device);
        unsigned moved = deliver_burst(traffic);
        moved += complete_burst(traffic);
        if (device->violation[0])
            fail_with_picture(traffic, "the device was misused");
        if (moved)
            deadline = seconds_now() + DEADLINE_S;
        else
            sleep_until_notified(traffic, deadline);
    }
    return NULL;
}

void traffic_start(struct traffic *traffic, struct world *world, struct traffic_config config)
{
    if (!config.window)
        config.window = 1;
    if (!config.burst)
        config.burst = 1;
    config.scrambled &= !world->config.ring.in_order;
    *traffic = (struct traffic){.config = config, .world = world, .random = 0x2545f491};
    CHECK_EQ(pthread_create(&traffic->thread, NULL, serve, traffic), 0);
}

void traffic_finish(struct traffic *traffic) { CHECK_EQ(pthread_join(traffic->thread, NULL), 0); }

void traffic_abandon(struct traffic *traffic)
{
    __atomic_store_n(&traffic->abandoned, true, __ATOMIC_RELAXED);
    traffic_finish(traffic);
}

static void *run_echo(void *argument)
{
    struct echo *echo = argument;
    echo->verdict = nb_client_echo(&echo->world->client, echo->world->client_control_fd, &echo->counts);
    drain_stores();
    return NULL;
}

void echo_start(struct echo *echo, struct world *world)
{
    *echo = (struct echo){.world = world};
    CHECK_EQ(pthread_create(&echo->thread, NULL, run_echo, echo), 0);
}

void echo_stop(struct echo *echo)
{
    CHECK_EQ(eventfd_write(echo->world->client_control_fd, 1), 0);
    CHECK_EQ(pthread_join(echo->thread, NULL), 0);
    CHECK_EQ(echo->verdict, 0);
}

void traffic_echo(struct world *world, struct traffic_config config)
{
    struct traffic traffic;
    struct echo echo;
    world_start_pump(world);
    echo_start(&echo, world);
    traffic_start(&traffic, world, config);
    traffic_finish(&traffic);
    echo_stop(&echo);
    world_stop_pump(world);
    CHECK_EQ(world->result.event, NB_EVENT_CONTROL);
    world_pump_idle(world);

    const struct nb_counters *counters = &world->counters;
    uint64_t bytes = 0;
    for (uint64_t i = 0; i < config.frames; i++)
        bytes += length_of(&traffic, i);
    CHECK_EQ(traffic.delivered, config.frames);
    CHECK_EQ(counters->packets_rx, config.frames);
    CHECK_EQ(counters->bytes_rx, bytes);
    CHECK_EQ(traffic.returned + counters->drops[NB_DROP_CLIENT_SLOW], config.frames);
    CHECK_EQ(counters->packets_tx, traffic.returned);
    CHECK_EQ(echo.counts.frames, traffic.returned);
    CHECK_EQ(echo.counts.bytes, counters->bytes_tx);
    CHECK_EQ(echo.counts.unsendable, 0);
    CHECK_EQ(echo.counts.forwarded, world->config.rx_writable ? echo.counts.frames : 0);
    CHECK_EQ(counters->drops[NB_DROP_TOO_SHORT], 0);
    if (!config.lossy) {
        CHECK_EQ(counters->drops[NB_DROP_CLIENT_SLOW], 0);
        CHECK_EQ(counters->bytes_tx, bytes);
    }
    for (int i = 0; i < NB_REFUSALS; i++)
        CHECK_EQ(counters->refused_handles[i], 0);
    for (int i = 0; i < NB_FAULTS; i++)
        CHECK_EQ(counters->device_faults[i], 0);
    /* Everybody is idle: the client has all TX buffers back and holds no RX buffer. */
    CHECK_EQ(nb_ledger_owned(world->rx_ledger, NB_OWNER_CLIENT), 0);
    CHECK_EQ(nb_ledger_owned(world->tx_ledger, NB_OWNER_CLIENT), world->config.tx_count);
    CHECK_EQ(world->client.tx_done.header->produced - world->client.tx_done_taken, world->config.tx_count);
}
