/* Frames through the pump one step at a time: no threads, every count exact. */
#include "check.h"
#include "ledger.h"
#include "traffic.h"
#include "white_box.h"
#include "world.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

enum { PIECE = STRIDE - HEADROOM + HEADER }; /* what a merged frame's later buffers hold */

TEST(a_frame_comes_in_and_a_frame_goes_out)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    deliver(&world, 1, 1514);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 1);
    release_one(&world, receive_one(&world, 1, 1514));
    send_one(&world, 2, 777);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 0);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), 1);
    transmit_one(&world, 2, 777);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64);
    CHECK_EQ(world.counters.packets_rx, 1);
    CHECK_EQ(world.counters.bytes_rx, 1514);
    CHECK_EQ(world.counters.packets_tx, 1);
    CHECK_EQ(world.counters.bytes_tx, 777);
    world_close(&world);
}

TEST(frames_of_every_length_both_ways)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    for (uint32_t len = SHORTEST; len <= ROOM; len++) {
        deliver(&world, len, len);
        send_one(&world, len, len);
        world_pump_idle(&world);
        release_one(&world, receive_one(&world, len, len));
        transmit_one(&world, len, len);
    }
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_rx, ROOM - SHORTEST + 1);
    CHECK_EQ(world.counters.packets_tx, ROOM - SHORTEST + 1);
    CHECK_EQ(world.counters.bytes_rx, world.counters.bytes_tx);
    world_close(&world);
}

/* More than one burst is waiting: all of it moves before the pump sleeps, in order. */
TEST(more_than_a_burst_at_once)
{
    struct world world;
    struct nb_piece pieces[128];
    world_open(&world, (struct world_config){.rx_size = 128, .tx_size = 256, .tx_count = 128, .burst = 10});
    for (uint64_t i = 0; i < 128; i++) {
        deliver(&world, i, 60);
        send_one(&world, i, 61);
    }
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 128), 128);
    for (uint64_t i = 0; i < 128; i++) {
        CHECK(frame_is(pieces[i].data, i, 60, false));
        transmit_one(&world, i, 61);
    }
    CHECK_EQ(world.counters.rx_bursts[3], 13); /* 12 of 10 and one of 8: all from 8 to 15 */
    CHECK_EQ(world.counters.tx_bursts[3], 13);
    world_close(&world);
}

/* ---- A slow client -------------------------------------------------------------------------------------------- */

TEST(slow_client_loses_frames_and_no_buffers)
{
    struct world world;
    struct nb_piece pieces[128];
    world_open(&world, (struct world_config){.client_limit = 100});
    for (uint64_t i = 0; i < 1000; i++) {
        deliver(&world, i, 60);
        world_pump_idle(&world);
    }
    CHECK_EQ(world.counters.packets_rx, 1000);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 900);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 100);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_DEVICE), 28);
    /* The first hundred are the client's, in order; then it goes on as before. */
    CHECK_EQ(nb_client_receive(&world.client, pieces, 128), 100);
    for (uint64_t i = 0; i < 100; i++)
        CHECK(frame_is(pieces[i].data, i, 60, false));
    nb_client_release(&world.client, pieces, 100);
    deliver(&world, 1000, 60);
    world_pump_idle(&world);
    receive_one(&world, 1000, 60);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 900);
    world_close(&world);
}

/* What the client has given back counts as given back, also before the pump has seen it. */
TEST(no_frame_is_dropped_for_buffers_already_given_back)
{
    struct world world;
    struct nb_piece pieces[64];
    world_open(&world, (struct world_config){.client_limit = 64});
    for (int round = 0; round < 10; round++) {
        for (uint64_t i = 0; i < 64; i++)
            deliver(&world, i, 60);
        world_pump_idle(&world);
        CHECK_EQ(nb_client_receive(&world.client, pieces, 64), 64);
        nb_client_release(&world.client, pieces, 64);
    }
    CHECK_EQ(world.counters.packets_rx, 640);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 0);
    world_close(&world);
}

/* With the limit at the number of buffers the client can hold all of them; the device has none, and gets them back. */
TEST(client_that_holds_every_buffer)
{
    struct world world;
    struct nb_piece pieces[64];
    world_open(&world, (struct world_config){.rx_size = 64, .rx_count = 64});
    for (uint64_t i = 0; i < 64; i++)
        deliver(&world, i, 60);
    world_pump_idle(&world);
    CHECK_EQ(fake_available(&world.device.rx), 0);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 64);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 64), 64);
    nb_client_release(&world.client, pieces, 64);
    world_pump_idle(&world);
    CHECK_EQ(fake_available(&world.device.rx), 64);
    world_close(&world);
}

/* ---- Frames of more than one buffer --------------------------------------------------------------------------- */

static uint32_t pieces_of(uint32_t len) { return len <= ROOM ? 1 : 1 + (len - ROOM + PIECE - 1) / PIECE; }

static void receive_merged(struct world *world, uint64_t number, uint32_t len)
{
    struct nb_piece pieces[64];
    uint8_t frame[65536];
    uint32_t count = pieces_of(len), at = 0;
    CHECK_EQ(nb_client_receive(&world->client, pieces, 64), count);
    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)((i > 0 ? NB_CONTINUATION : 0) | (i + 1 < count ? NB_MORE : 0));
        CHECK_EQ(pieces[i].flags, flags);
        uint64_t offset = (uint64_t)(pieces[i].data - world->client.rx_base) % STRIDE;
        CHECK_EQ(offset, i ? HEADROOM - HEADER : HEADROOM);
        CHECK(at + pieces[i].len <= sizeof(frame));
        memcpy(frame + at, pieces[i].data, pieces[i].len);
        at += pieces[i].len;
    }
    CHECK_EQ(at, len);
    CHECK(frame_is(frame, number, len, false));
    nb_client_release(&world->client, pieces, count);
}

TEST(merged_frames_of_all_sizes)
{
    struct world world;
    world_open(&world, (struct world_config){.max_pieces = 34});
    uint64_t frames = 0, bytes = 0;
    for (uint32_t len = SHORTEST; len <= 65535; len += len < 2 * ROOM ? 1 : 997) {
        deliver(&world, frames, len);
        world_pump_idle(&world);
        receive_merged(&world, frames, len);
        frames++;
        bytes += len;
    }
    deliver(&world, frames, 65535);
    world_pump_idle(&world);
    receive_merged(&world, frames, 65535);
    CHECK_EQ(world.counters.packets_rx, frames + 1);
    CHECK_EQ(world.counters.bytes_rx, bytes + 65535);
    world_close(&world);
}

/* A burst ends in the middle of a frame, and so does the pump call; the frame goes on where it was. */
TEST(merged_frame_across_bursts_and_calls)
{
    struct world world;
    world_open(&world, (struct world_config){.max_pieces = 34, .burst = 3});
    for (uint64_t i = 0; i < 50; i++) {
        deliver(&world, i, 9000);
        world_pump_idle(&world);
        CHECK_EQ(white_box_gathered(world.pump), 0);
        receive_merged(&world, i, 9000);
    }
    world_close(&world);
}

/* The device shows a frame's buffers one at a time: nothing of it is handed over before the last one is there. */
TEST(merged_frame_shown_piece_by_piece)
{
    struct world world;
    struct nb_piece piece;
    uint8_t bytes[HEADER + 9000] = {[10] = 5};
    world_open(&world, (struct world_config){.max_pieces = 34});
    frame_make(bytes + HEADER, 0, 9000);
    uint32_t left = sizeof(bytes);
    for (uint32_t shown = 1; shown <= 5; shown++) {
        struct fake_chain chain;
        CHECK(fake_pop(&world.device, &world.device.rx, &chain));
        uint32_t part = left < PIECE ? left : PIECE;
        memcpy(chain.segment[0].at, bytes + sizeof(bytes) - left, part);
        left -= part;
        fake_give_back(&world.device.rx, &chain, part);
        fake_publish(&world.device.rx);
        world_pump_idle(&world);
        if (left) {
            CHECK_EQ(white_box_gathered(world.pump), shown);
            CHECK_EQ(nb_client_receive(&world.client, &piece, 1), 0);
        }
    }
    receive_merged(&world, 0, 9000);
    world_close(&world);
}

/* A merged frame is dropped whole or handed over whole. */
TEST(merged_frame_that_the_client_has_no_room_for)
{
    struct world world;
    world_open(&world, (struct world_config){.max_pieces = 34, .client_limit = 4});
    deliver(&world, 0, 9000); /* five buffers */
    deliver(&world, 1, 60);
    world_pump_idle(&world);
    CHECK_EQ(pieces_of(9000), 5);
    CHECK_EQ(world.counters.packets_rx, 2);
    CHECK_EQ(world.counters.drops[NB_DROP_CLIENT_SLOW], 1);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 1);
    receive_merged(&world, 1, 60);
    world_close(&world);
}

/* The shortest frame may come in pieces, too; what counts is the whole. */
TEST(merged_frame_with_a_piece_shorter_than_an_ethernet_header)
{
    struct world world;
    struct fake_chain chains[2];
    struct nb_piece pieces[2];
    world_open(&world, (struct world_config){.max_pieces = 4});
    for (int i = 0; i < 2; i++)
        CHECK(fake_pop(&world.device, &world.device.rx, &chains[i]));
    memset(chains[0].segment[0].at, 0, HEADER);
    chains[0].segment[0].at[10] = 2;
    fake_give_back(&world.device.rx, &chains[0], HEADER); /* no byte of frame here */
    fake_give_back(&world.device.rx, &chains[1], SHORTEST);
    fake_publish(&world.device.rx);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 2), 2);
    CHECK_EQ(pieces[0].len, 0);
    CHECK_EQ(pieces[1].len, SHORTEST);
    CHECK_EQ(world.counters.drops[NB_DROP_TOO_SHORT], 0);
    world_close(&world);
}

/* ---- Back-pressure and notifications -------------------------------------------------------------------------- */

/* More frames than the TX queue holds: they wait in order, none is lost, and each completion lets the next go. */
TEST(full_tx_queue_holds_frames_back)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_size = 8, .tx_count = 64});
    for (uint64_t i = 0; i < 64; i++)
        send_one(&world, i, 60);
    world_pump_idle(&world);
    CHECK_EQ(fake_available(&world.device.tx), tx_room(&world));
    /* No doorbell for frames that would find no room: the device's interrupt will do. */
    CHECK_EQ(world.client.tx_active.header->wake, 0);
    for (uint64_t i = 0; i < 64; i++) {
        transmit_one(&world, i, 60);
        world_pump_idle(&world);
    }
    CHECK_EQ(world.counters.packets_tx, 64);
    world_close(&world);
}

/* NOTIFICATION_DATA: the queue, and where the next entry will be written: an offset and a wrap counter, or an index. */
static uint32_t notification(const struct world *world, uint16_t queue, uint16_t next)
{
    if (!world->config.ring.packed)
        return (uint32_t)next << 16 | queue;
    uint16_t size = queue ? world->config.tx_size : world->config.rx_size;
    return (uint32_t)(next % size | (next < size ? 0x8000 : 0)) << 16 | queue;
}

TEST(device_that_wants_no_notifications_gets_none)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    world_pump_idle(&world);
    CHECK_EQ(world.counters.notifications_sent, 1); /* the first RX buffers */
    CHECK(fake_notified(&world.device.rx));
    CHECK_EQ(world.rx_notify, world.config.ring.notification_data ? notification(&world, 0, 64) : 0);
    fake_want_notifications(&world.device.tx, true);
    send_one(&world, 0, 60);
    send_one(&world, 1, 60);
    world_pump_idle(&world);
    CHECK(fake_notified(&world.device.tx));
    uint16_t descriptors = world.config.ring.indirect || !world.config.ring.packed ? 2 : 4;
    CHECK_EQ(world.tx_notify, world.config.ring.notification_data ? notification(&world, 1, descriptors) : 1);
    CHECK_EQ(world.counters.notifications_sent, 2); /* one for both */
    fake_want_notifications(&world.device.tx, true);
    fake_want_notifications(&world.device.tx, false);
    send_one(&world, 2, 60);
    world_pump_idle(&world);
    CHECK(!fake_notified(&world.device.tx));
    CHECK_EQ(world.counters.notifications_sent, 2);
    CHECK_EQ(world.counters.notifications_suppressed, 1);
    world_close(&world);
}

/* A device in another process is notified by eventfd. */
TEST(notifications_by_eventfd)
{
    struct world world;
    world_open(&world, (struct world_config){.kicks = true});
    world_pump_idle(&world);
    CHECK(is_rung(world.rx_config.kick_fd));
    CHECK(!is_rung(world.tx_config.kick_fd));
    send_one(&world, 0, 60);
    world_pump_idle(&world);
    CHECK(is_rung(world.tx_config.kick_fd));
    CHECK_EQ(world.rx_notify | world.tx_notify, 0);
    world_close(&world);
}

/* While awake the pump asks the device for no interrupts and the client for no doorbells. */
TEST(nobody_is_asked_for_wake_ups_while_the_pump_is_awake)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    world_pump_idle(&world);
    CHECK_EQ(world.client.tx_active.header->wake, 0);
    CHECK_EQ(world.client.rx_free.header->wake, 0);
    fake_interrupt(&world.device, &world.device.rx);
    fake_interrupt(&world.device, &world.device.tx);
    CHECK_EQ(world.device.interrupts_sent, 0);
    CHECK_EQ(world.device.interrupts_suppressed, 2);
    world_close(&world);
}

TEST(one_doorbell_for_one_sleep)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    world_pump_idle(&world);
    uint64_t sent = world.counters.wakeups_sent;
    world.client.rx_active.header->wake = 1;
    for (uint64_t i = 0; i < 10; i++) {
        deliver(&world, i, 60);
        world_pump_idle(&world);
    }
    CHECK_EQ(world.counters.wakeups_sent, sent + 1);
    CHECK(world.counters.wakeups_suppressed >= 9);
    world_close(&world);
}

/* Buffers that come back are none of the business of a client that waits for frames. */
TEST(nobody_is_woken_for_what_he_does_not_wait_for)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    world.client.rx_active.header->wake = 1;
    for (uint64_t i = 0; i < 10; i++) {
        send_one(&world, i, 60);
        world_pump_idle(&world);
        transmit_one(&world, i, 60);
        world_pump_idle(&world);
    }
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64);
    CHECK(!is_rung(world.client.driver_doorbell_fd));
    CHECK_EQ(world.client.rx_active.header->wake, 1);
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    CHECK(is_rung(world.client.driver_doorbell_fd));
    world_close(&world);
}

static void await_count(const uint32_t *word, uint32_t value)
{
    for (double until = seconds_now() + 20; __atomic_load_n(word, __ATOMIC_ACQUIRE) != value; sched_yield())
        if (seconds_now() > until)
            FAIL("a count is %u, not %u", __atomic_load_n(word, __ATOMIC_ACQUIRE), value);
}

/* One processor: the client sleeps on until as many buffers came back as the device still has. */
TEST(on_one_processor_a_client_is_woken_for_many_buffers)
{
    struct world world;
    world_open(&world, (struct world_config){.yields = true, .spin_ns = 4000000000});
    const uint32_t *done = &world.client.tx_done.header->produced;
    uint32_t before = *done;
    for (uint64_t i = 0; i < 4; i++)
        send_one(&world, i, 60);
    world.client.tx_done.header->wake = 1;
    world_start_pump(&world);
    await_count(&world.client.tx_active.header->consumed, 4);
    transmit_one(&world, 0, 60);
    await_count(done, before + 1);
    deliver(&world, 0, 60); /* seen a round later, so the pump has decided whether to ring */
    await_count(&world.client.rx_active.header->produced, 1);
    CHECK(!is_rung(world.client.driver_doorbell_fd));
    transmit_one(&world, 1, 60);
    await_count(&world.client.tx_done.header->wake, 0);
    CHECK_EQ(*done, before + 2);
    world_stop_pump(&world);
    CHECK(is_rung(world.client.driver_doorbell_fd));
    world_close(&world);
}

/* Before it returns, and before it sleeps, it has told everything. */
TEST(on_one_processor_no_client_sleeps_for_buffers_that_are_there)
{
    struct world world;
    world_open(&world, (struct world_config){.yields = true, .spin_ns = 1000000});
    for (uint64_t i = 0; i < 4; i++)
        send_one(&world, i, 60);
    world_pump_idle(&world);
    world.client.tx_done.header->wake = 1;
    transmit_one(&world, 0, 60);
    world_pump_idle(&world);
    CHECK(is_rung(world.client.driver_doorbell_fd));
    world_close(&world);
}

/* Poll after enabling: what came before the pump asked for a wake-up will wake nobody, so it looks once more. */
TEST(pump_looks_once_more_before_it_sleeps)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){.rx_count = 16}); /* so few that each returned buffer matters */
    world_pump_idle(&world);
    CHECK(white_box_ask_for_wakeup(world.pump));
    white_box_stop_asking(world.pump);

    deliver(&world, 0, 60);
    CHECK(!white_box_ask_for_wakeup(world.pump));
    world_pump_idle(&world);
    CHECK(white_box_ask_for_wakeup(world.pump));
    white_box_stop_asking(world.pump);

    piece = receive_one(&world, 0, 60);
    nb_client_release(&world.client, &piece, 1);
    CHECK(!white_box_ask_for_wakeup(world.pump));
    world_pump_idle(&world);

    send_one(&world, 0, 60);
    CHECK(!white_box_ask_for_wakeup(world.pump));
    world_pump_idle(&world);
    CHECK(white_box_ask_for_wakeup(world.pump));
    white_box_stop_asking(world.pump);

    transmit_one(&world, 0, 60);
    CHECK(!white_box_ask_for_wakeup(world.pump));
    world_pump_idle(&world);
    world_close(&world);
}

/* The client may have been waiting for a TX buffer since before there was a pump. */
TEST(priming_wakes_a_client_that_waits_for_a_buffer)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    struct nb_pump_config config = world.pump_config;
    config.tx_ledger = nb_ledger_new(&world.tx_ledger->region);
    struct nb_pump *again = nb_pump_new(&config);
    CHECK(again != NULL);
    world.client.tx_done.header->wake = 1;
    nb_pump_prime(again);
    CHECK(is_rung(world.client.driver_doorbell_fd));
    nb_pump_free(again);
    nb_ledger_free(config.tx_ledger);
    world_close(&world);
}

/* A device holds a frame back until it has buffers for all of it: returned ones must not wait for another event. */
TEST(returned_buffers_are_asked_for_while_the_longest_frame_does_not_fit)
{
    struct world world;
    struct nb_piece pieces[128];
    world_open(&world, (struct world_config){.max_pieces = 34, .rx_count = 64});
    /* With the TX queue full, rx_free is all that the client can wake the pump by. */
    for (uint64_t i = 0; i < tx_room(&world); i++)
        send_one(&world, i, 60);
    for (uint64_t i = 0; i < 31; i++)
        deliver(&world, i, 60);
    world_pump_idle(&world);
    CHECK_EQ(fake_available(&world.device.rx), 33); /* more than half of the queue, and one too few */
    uint64_t sleeps = world.counters.sleeps;
    world_start_pump(&world);
    double deadline = seconds_now() + 10;
    while (__atomic_load_n(&world.counters.sleeps, __ATOMIC_ACQUIRE) == sleeps)
        CHECK(seconds_now() < deadline);
    CHECK_EQ(nb_client_receive(&world.client, pieces, 128), 31);
    nb_client_release(&world.client, pieces, 31);
    nb_client_flush(&world.client);
    while (fake_available(&world.device.rx) < 64)
        if (seconds_now() > deadline)
            FAIL("the returned buffers stay where they are");
    world_stop_pump(&world);
    world_close(&world);
}

/* ---- Control and INTx ----------------------------------------------------------------------------------------- */

TEST(intx_says_that_the_configuration_changed)
{
    struct world world;
    world_open(&world, (struct world_config){.intx = true});
    fake_config_changed(&world.device);
    struct nb_pump_result result;
    nb_pump_run(world.pump, &result);
    CHECK_EQ(result.event, NB_EVENT_CONFIG);
    CHECK(is_rung(world.unmask_fd));
    CHECK(!is_rung(world.intx_fd));
    CHECK_EQ(world.counters.interrupts, 1);
    world_close(&world);
}

/* Reading the ISR clears it: the change must not be forgotten over whatever else is to be told, whichever came first. */
TEST(configuration_change_and_control_at_once)
{
    for (int config_first = 0; config_first <= 1; config_first++) {
        struct world world;
        struct nb_pump_result result;
        world_open(&world, (struct world_config){.intx = true});
        if (config_first)
            fake_config_changed(&world.device);
        CHECK_EQ(eventfd_write(world.control_fd, 1), 0);
        if (!config_first)
            fake_config_changed(&world.device);
        nb_pump_run(world.pump, &result);
        CHECK_EQ(result.event, NB_EVENT_CONFIG);
        fake_intx_poll(&world.device);
        nb_pump_run(world.pump, &result);
        CHECK_EQ(result.event, NB_EVENT_CONTROL);
        world_close(&world);
    }
}

TEST(intx_for_a_frame_is_acknowledged_and_unmasked)
{
    struct world world;
    world_open(&world, (struct world_config){.intx = true});
    world.device.isr_pending = 1;
    fake_intx_poll(&world.device);
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    receive_one(&world, 0, 60);
    CHECK(is_rung(world.unmask_fd));
    CHECK(!is_rung(world.intx_fd));
    world_close(&world);
}

TEST(control_comes_back_while_frames_flow_without_end)
{
    struct world world;
    struct nb_pump_result result;
    struct nb_piece piece;
    /* No end of work: with a burst of 1 there are more rounds waiting than rounds between looks. */
    world_open(&world, (struct world_config){.rx_size = 1024, .rx_count = 1024, .burst = 1});
    for (uint64_t i = 0; i < 1024; i++)
        deliver(&world, i, 60);
    CHECK_EQ(eventfd_write(world.control_fd, 1), 0);
    nb_pump_run(world.pump, &result);
    CHECK_EQ(result.event, NB_EVENT_CONTROL);
    CHECK(world.counters.packets_rx < 1024);
    CHECK_EQ(nb_client_receive(&world.client, &piece, 1), 1);
    world_close(&world);
}

/* ---- One queue reset alone ------------------------------------------------------------------------------------ */

/* The device has been told to forget a queue, and is given it anew. */
static void attach_anew(struct world *world, struct fake_queue *queue)
{
    struct fake_queue_place place = queue->place;
    free(queue->held);
    fake_attach(&world->device, queue, place);
}

TEST(tx_queue_reset_with_frames_in_flight)
{
    struct world world;
    struct fake_chain chain;
    struct nb_piece pieces[64];
    world_open(&world, (struct world_config){0});
    for (uint64_t i = 0; i < 10; i++)
        send_one(&world, i, 60);
    world_pump_idle(&world);
    transmit_one(&world, 0, 60); /* the driver has not seen it yet */
    CHECK(fake_pop(&world.device, &world.device.tx, &chain));
    CHECK_EQ(nb_pump_reset_queue(world.pump, world.tx_queue), 9);
    CHECK_EQ(world.counters.drops[NB_DROP_DEVICE_RESET], 9);
    CHECK_EQ(world.counters.packets_tx, 1);
    attach_anew(&world, &world.device.tx);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64);
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 64), 64);
    nb_client_unallocate(&world.client, 64);
    for (uint64_t i = 0; i < 200; i++) {
        send_one(&world, i, 61);
        world_pump_idle(&world);
        transmit_one(&world, i, 61);
    }
    world_pump_idle(&world);
    CHECK_EQ(world.counters.packets_tx, 201);
    world_close(&world);
}

TEST(rx_queue_reset_in_the_middle_of_a_frame)
{
    struct world world;
    struct fake_chain chain;
    world_open(&world, (struct world_config){.max_pieces = 34});
    world.device.lie = FAKE_NUM_BUFFERS_NEVER_REACHED;
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    CHECK_EQ(white_box_gathered(world.pump), 1);
    CHECK(fake_pop(&world.device, &world.device.rx, &chain));
    CHECK_EQ(nb_pump_reset_queue(world.pump, world.rx_queue), 1);
    CHECK_EQ(world.counters.drops[NB_DROP_DEVICE_RESET], 1);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_DRIVER), 128);
    attach_anew(&world, &world.device.rx);
    for (uint64_t i = 0; i < 200; i++) {
        world_pump_idle(&world);
        deliver(&world, i, 60);
        world_pump_idle(&world);
        release_one(&world, receive_one(&world, i, 60));
    }
    CHECK_EQ(world.counters.packets_rx, 200);
    world_close(&world);
}

TEST(a_queue_that_is_none_of_the_pumps_is_not_reset)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    CHECK_EQ(nb_pump_reset_queue(world.pump, NULL), -1);
    world_close(&world);
}

/* ---- Ring positions ------------------------------------------------------------------------------------------- */

TEST(full_rings_across_the_wrap_of_their_counts)
{
    for (uint32_t before = 0; before <= 130; before += 13) {
        struct world world;
        struct nb_piece pieces[128];
        world_open(&world, (struct world_config){.rx_size = 128, .tx_size = 128, .ring_position = -before});
        for (int round = 0; round < 3; round++) {
            for (uint64_t i = 0; i < 128; i++)
                deliver(&world, i, 60);
            for (uint64_t i = 0; i < 64; i++)
                send_one(&world, i, 61);
            world_pump_idle(&world);
            CHECK_EQ(nb_client_receive(&world.client, pieces, 128), 128);
            for (uint64_t i = 0; i < 128; i++)
                CHECK(frame_is(pieces[i].data, i, 60, false));
            nb_client_release(&world.client, pieces, 128);
            for (uint64_t i = 0; i < 64; i++)
                transmit_one(&world, i, 61);
            world_pump_idle(&world);
        }
        CHECK_EQ(world.counters.packets_rx, 384);
        CHECK_EQ(world.counters.packets_tx, 192);
        world_close(&world);
    }
}

/* A buffer's leases wrap after 65,536 of them; its handle stays good. */
TEST(leases_wrap)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_size = 1, .rx_count = 1});
    for (uint64_t i = 0; i < 65540; i++) {
        deliver(&world, i, 60);
        world_pump(&world);
        release_one(&world, receive_one(&world, i, 60));
        world_pump(&world);
    }
    CHECK_EQ(world.counters.packets_rx, 65540);
    world_close(&world);
}
