/* A device that is reset under a session: what it held is taken from it and counted, and frames flow again. A device that
 * is stuck is noticed.
 */
#include "check.h"
#include "net_header.h"
#include "world.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Byte by byte, past the sanitizer, which guards the gaps between a queue's parts. */
__attribute__((no_sanitize("address"))) static void wipe(volatile uint8_t *at, uint64_t bytes)
{
    while (bytes--)
        at[bytes] = 0;
}

static struct nb_virtqueue *new_queue(const struct nb_virtqueue_config *config)
{
    struct nb_virtqueue_layout layout;
    CHECK_EQ(nb_virtqueue_layout(config, &layout), 0);
    wipe(config->memory, layout.bytes);
    struct nb_virtqueue *queue = nb_virtqueue_new(config);
    CHECK(queue != NULL);
    return queue;
}

static uint64_t salvage(struct world *world)
{
    fake_detach(&world->device);
    uint64_t lost = nb_pump_salvage(world->pump);
    nb_virtqueue_free(world->rx_queue);
    nb_virtqueue_free(world->tx_queue);
    world->rx_queue = new_queue(&world->rx_config);
    world->tx_queue = new_queue(&world->tx_config);
    /* Without offloads the driver cannot reach it, and it stays as it was. */
    if (world->header.driver)
        wipe(world->header.driver, world->header.bytes);
    return lost;
}

static void resume(struct world *world)
{
    struct nb_pump_pair pair = {world->rx_queue, world->tx_queue, world->rx_irq_fd, world->tx_irq_fd};
    CHECK_EQ(nb_pump_resume(world->pump, &pair, 1, world->header.driver, world->pump_config.tx_slots_iova), 0);
    world_attach_device(world);
}

/* The device is reset; so many frames must be lost. */
static void expect_recovery(struct world *world, uint64_t lost)
{
    uint64_t before = world->counters.drops[NB_DROP_DEVICE_RESET];
    CHECK_EQ(salvage(world), lost);
    CHECK_EQ(world->counters.drops[NB_DROP_DEVICE_RESET], before + lost);
    CHECK_EQ(nb_ledger_owned(world->rx_ledger, NB_OWNER_DEVICE), 0);
    resume(world);
    world_check_books(world);
}

static void expect_traffic(struct world *world)
{
    for (uint64_t i = 0; i < 200; i++) {
        uint32_t len = frame_length(i);
        deliver(world, i, len);
        world_pump_idle(world);
        release_one(world, receive_one(world, i, len));
        send_one(world, i, len);
        world_pump_idle(world);
        transmit_one(world, i, len);
        world_pump_idle(world);
    }
}

TEST(a_reset_with_nothing_on_its_way)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    for (int i = 0; i < 5; i++) {
        expect_traffic(&world);
        expect_recovery(&world, 0);
    }
    expect_traffic(&world);
    world_close(&world);
}

TEST(frames_that_were_not_sent_are_lost_and_their_buffers_acknowledged)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_count = 8});
    for (uint64_t i = 0; i < 8; i++)
        send_one(&world, i, 100);
    world_pump_idle(&world);
    transmit_one(&world, 0, 100); /* completed, and not collected yet: it was sent */
    expect_recovery(&world, 7);
    CHECK_EQ(world.counters.packets_tx, 1);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 8);
    expect_traffic(&world);
    world_close(&world);
}

TEST(frames_that_waited_for_room_are_lost_too)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_size = 8, .tx_count = 32, .tx_max_pieces = 2});
    for (uint64_t i = 0; i < 20; i++)
        send_one(&world, i, 100);
    world_pump_idle(&world);
    uint32_t with_the_device = nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE);
    CHECK(with_the_device >= 4);
    expect_recovery(&world, with_the_device);
    /* Those that had not been taken from the client are sent now. */
    world_pump_idle(&world);
    CHECK(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE) != 0);
    world_close(&world);
}

TEST(frames_that_were_received_before_the_reset_are_delivered)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    for (uint64_t i = 0; i < 10; i++)
        deliver(&world, i, 60 + (uint32_t)i);
    expect_recovery(&world, 0);
    CHECK_EQ(world.counters.packets_rx, 10);
    for (uint64_t i = 0; i < 10; i++)
        release_one(&world, receive_one(&world, i, 60 + (uint32_t)i));
    expect_traffic(&world);
    world_close(&world);
}

TEST(a_frame_received_in_part_is_lost)
{
    struct world world;
    world_open(&world, (struct world_config){.max_pieces = 34});
    world.device.lie = FAKE_NUM_BUFFERS_NEVER_REACHED;
    deliver(&world, 0, 9000);
    world_pump_idle(&world);
    expect_recovery(&world, 1);
    CHECK_EQ(world.counters.packets_rx, 0);
    expect_traffic(&world);
    world_close(&world);
}

TEST(the_client_keeps_what_it_holds)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    deliver(&world, 1, 100);
    world_pump_idle(&world);
    struct nb_piece held = receive_one(&world, 1, 100);
    expect_recovery(&world, 0);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 1);
    CHECK(frame_is(held.data, 1, 100, false));
    release_one(&world, held);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 0);
    world_close(&world);
}

TEST(a_frame_that_the_client_is_still_sending_survives)
{
    struct world world;
    struct nb_piece pieces[2];
    uint8_t expected[300], frame[65536];
    uint32_t len;
    struct fake_chain chain;
    world_open(&world, (struct world_config){.tx_max_pieces = 2});
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 2), 2);
    frame_make(expected, 7, 300);
    memcpy(pieces[0].data, expected, 100);
    memcpy(pieces[1].data, expected + 100, 200);
    pieces[0].len = 100;
    pieces[0].flags = NB_MORE;
    pieces[1].len = 200;
    pieces[1].flags = NB_CONTINUATION;
    nb_client_send(&world.client, &pieces[0], 1);
    nb_client_flush(&world.client);
    world_pump_idle(&world);
    expect_recovery(&world, 0);
    nb_client_send(&world.client, &pieces[1], 1);
    nb_client_flush(&world.client);
    world_pump_idle(&world);
    CHECK(fake_collect(&world.device, &chain, frame, &len));
    CHECK_EQ(len, 300);
    CHECK(memcmp(frame, expected, 300) == 0);
    fake_complete(&world.device, &chain);
    world_pump_idle(&world);
    world_close(&world);
}

/* Nothing of it is left in the books: its buffers are sent one by one, the longer way. */
TEST(a_frame_in_pieces_that_was_lost_does_not_come_back_with_the_next)
{
    struct world world;
    struct nb_piece pieces[2];
    world_open(&world, (struct world_config){.tx_max_pieces = 2, .tx_count = 2, .offloads = TX_OFFLOADS});
    CHECK_EQ(nb_client_allocate(&world.client, pieces, 2), 2);
    for (uint32_t i = 0; i < 2; i++) {
        pieces[i].len = 100;
        pieces[i].flags = i ? NB_CONTINUATION : NB_MORE;
    }
    nb_client_send(&world.client, pieces, 2);
    world_pump_idle(&world);
    expect_recovery(&world, 1);
    for (uint64_t i = 0; i < 2; i++) {
        CHECK_EQ(nb_client_allocate(&world.client, pieces, 1), 1);
        frame_make(pieces[0].data, i, 100);
        memset(pieces[0].data - HEADER, 0, HEADER);
        pieces[0].len = 100;
        pieces[0].flags = NB_HEADER;
        nb_client_send(&world.client, pieces, 1);
        world_pump_idle(&world);
        transmit_one(&world, i, 100);
    }
    world_pump_idle(&world);
    world_close(&world);
}

TEST(after_every_lie_of_a_device_the_session_goes_on)
{
    for (int lie = FAKE_HONEST + 1; lie < FAKE_LIES; lie++) {
        struct world world;
        world_open(&world, (struct world_config){.max_pieces = 34});
        deliver(&world, 0, 100);
        world_pump_idle(&world);
        release_one(&world, receive_one(&world, 0, 100));
        world.device.lie = (enum fake_lie)lie;
        deliver(&world, 1, 200);
        (void)world_pump(&world);
        salvage(&world);
        resume(&world);
        world_check_books(&world);
        struct nb_piece piece;
        while (nb_client_receive(&world.client, &piece, 1) == 1)
            release_one(&world, piece);
        world_pump_idle(&world);
        expect_traffic(&world);
        world_close(&world);
    }
}

TEST(queues_that_do_not_suit_the_session_are_refused)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_max_pieces = 4});
    salvage(&world);
    struct nb_pump_pair pair = {world.rx_queue, world.tx_queue, world.rx_irq_fd, world.tx_irq_fd};
    struct nb_pump_pair other_vector = pair;
    other_vector.tx_irq_fd = world.rx_irq_fd;
    uint64_t iova = world.pump_config.tx_slots_iova;
    CHECK_EQ(nb_pump_resume(world.pump, &pair, 2, world.header.driver, iova), -1);
    CHECK_EQ(nb_pump_resume(world.pump, &pair, 0, world.header.driver, iova), -1);
    CHECK_EQ(nb_pump_resume(world.pump, &other_vector, 1, world.header.driver, iova), -1);
    resume(&world);
    expect_traffic(&world);
    world_close(&world);
}

/* Forwarded frames: completed, in flight in two ways, and in the backlog of one pair while the other goes on. */
TEST(frames_that_were_being_forwarded_are_lost_and_their_buffers_are_not)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_size = 8, .tx_copied = NB_TX_MOST_COPIED, .client_limit = 100});
    for (uint64_t i = 0; i < 20; i++) {
        uint32_t len = i % 2 ? 1000 : 60;
        deliver(&world, i, len);
        world_pump_idle(&world);
        struct nb_piece piece = receive_one(&world, i, len);
        nb_client_forward(&world.client, &piece, 1);
    }
    world_pump_idle(&world);
    transmit_one(&world, 0, 60);
    uint32_t lost = nb_virtqueue_in_flight(world.tx_queue) - 1;
    CHECK(lost >= 4);
    uint32_t waiting = nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT);
    expect_recovery(&world, lost);
    CHECK_EQ(world.counters.packets_tx, 1);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), waiting);
    /* Those that had not been taken from the client are sent now. */
    world_pump_idle(&world);
    for (uint64_t i = 20 - waiting; i < 20; i++) {
        transmit_one(&world, i, i % 2 ? 1000 : 60);
        world_pump_idle(&world);
    }
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 0);
    expect_traffic(&world);
    world_close(&world);
}

/* A queue may have another size than before: what belongs to its places is laid out anew. */
TEST(a_device_with_a_shorter_queue_after_its_reset)
{
    struct world world;
    world_open(&world, (struct world_config){.pairs = 2, .tx_copied = NB_TX_MOST_COPIED});
    struct world_pair *second = &world.more[0];
    salvage(&world);
    nb_virtqueue_free(world.tx_queue);
    nb_virtqueue_free(second->rx_queue);
    nb_virtqueue_free(second->tx_queue);
    struct nb_virtqueue_config shorter = world.tx_config;
    shorter.size /= 2;
    world.tx_queue = new_queue(&shorter);
    second->rx_queue = new_queue(&second->rx_config);
    second->tx_queue = new_queue(&second->tx_config);
    struct nb_pump_pair pairs[] = {{world.rx_queue, world.tx_queue, world.rx_irq_fd, world.tx_irq_fd},
                                   {second->rx_queue, second->tx_queue, second->irq_fd, second->irq_fd}};
    CHECK_EQ(nb_pump_resume(world.pump, pairs, 2, world.header.driver, world.pump_config.tx_slots_iova), 0);
    world_attach_device(&world);
    world_close(&world); /* with its audit */
}

/* ---- A device that is stuck ------------------------------------------------------------------------------------ */

enum { STALL_MS = 20 };

TEST(a_device_that_completes_nothing_is_stuck)
{
    struct world world;
    world_open(&world, (struct world_config){.stall_ns = STALL_MS * 1000000ull});
    send_one(&world, 0, 100);
    struct nb_pump_result result;
    nb_pump_run(world.pump, &result); /* nobody wakes it: it comes back by itself */
    CHECK_EQ(result.event, NB_EVENT_DEVICE_FAULT);
    CHECK_EQ(result.detail, NB_FAULT_STALLED);
    CHECK_EQ(world.counters.device_faults[NB_FAULT_STALLED], 1);
    expect_recovery(&world, 1);
    expect_traffic(&world);
    world_close(&world);
}

/* One transmit queue is reset alone; the client has its buffers, and frames flow again both ways. */
TEST(a_queue_that_does_not_move_is_reset_alone)
{
    struct world world;
    world_open(&world, (struct world_config){.stall_ns = STALL_MS * 1000000ull});
    deliver(&world, 0, 60);
    for (uint64_t i = 0; i < 5; i++)
        send_one(&world, i, 100);
    struct nb_pump_result result;
    nb_pump_run(world.pump, &result);
    CHECK_EQ(result.detail, NB_FAULT_STALLED);
    CHECK_EQ(nb_pump_stalled_pair(world.pump), 0);
    transmit_one(&world, 0, 100); /* one more before the device lets go of the queue: it was sent */
    struct fake_queue_place place = world.device.tx.place;
    free(world.device.tx.held);
    CHECK_EQ(nb_pump_reset_queue(world.pump, world.tx_queue), 4);
    fake_attach(&world.device, &world.device.tx, place);
    CHECK_EQ(world.counters.drops[NB_DROP_DEVICE_RESET], 4);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 64);
    world_check_books(&world);
    release_one(&world, receive_one(&world, 0, 60)); /* the receive queue was not touched */
    expect_traffic(&world);
    CHECK_EQ(world.counters.packets_tx, 201);
    world_close(&world);
}

TEST(a_device_without_frames_to_send_is_not_stuck)
{
    struct world world;
    world_open(&world, (struct world_config){.stall_ns = STALL_MS * 1000000ull});
    send_one(&world, 0, 100);
    world_pump_idle(&world);
    transmit_one(&world, 0, 100);
    world_pump_idle(&world);
    uint64_t before = world.counters.sleeps;
    world_start_pump(&world);
    struct timespec pause = {.tv_nsec = 4 * STALL_MS * 1000000};
    nanosleep(&pause, NULL);
    uint64_t sleeps = world.counters.sleeps - before;
    world_stop_pump(&world);
    CHECK_EQ(world.result.event, NB_EVENT_CONTROL);
    if (sleeps > 1)
        FAIL("an idle pump woke %llu times", (unsigned long long)sleeps);
    world_close(&world);
}
