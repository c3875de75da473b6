/* The client's side against a driver that breaks its word, and what it promises about its own buffers. */
#include "check.h"
#include "jitter.h"
#include "traffic.h"
#include "world.h"

#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>

static void expect_entry_refused(enum world_ring ring, struct nb_entry entry)
{
    struct world world;
    struct nb_piece piece;
    world_open(&world, (struct world_config){0});
    uint32_t position = ring == RX_ACTIVE ? 0 : 64; /* priming has put 64 entries into tx_done */
    if (ring == TX_DONE) {
        struct nb_piece all[64];
        CHECK_EQ(nb_client_allocate(&world.client, all, 64), 64);
    }
    forge_entry(&world, ring, position, entry);
    forge_produced(&world, ring, position + 1);
    CHECK_EQ(ring == RX_ACTIVE ? nb_client_receive(&world.client, &piece, 1) : nb_client_allocate(&world.client, &piece, 1), -1);
    world_close(&world);
}

static struct nb_entry received(uint8_t region, uint32_t index, uint32_t len)
{
    return (struct nb_entry){.dma_handle = forge_handle(SESSION, 1, region, index), .len = len, .kind = NB_RX_PACKET};
}

static struct nb_entry acknowledged(uint8_t region, uint32_t index, uint32_t len)
{
    return (struct nb_entry){.dma_handle = forge_handle(SESSION, 1, region, index), .len = len, .kind = NB_TX_PACKET_ACK};
}

/* A message longer than the receiver's space; a handle of nowhere. */
TEST(client_refuses_what_no_driver_may_write)
{
    struct nb_entry entry;
    expect_entry_refused(RX_ACTIVE, received(NB_REGION_TX, 0, 60));
    expect_entry_refused(RX_ACTIVE, received(NB_REGION_RX, 128, 60));
    expect_entry_refused(RX_ACTIVE, received(NB_REGION_RX, 0xffffff, 60));
    expect_entry_refused(RX_ACTIVE, received(NB_REGION_RX, 127, ROOM + 1));
    expect_entry_refused(RX_ACTIVE, received(NB_REGION_RX, 0, 0xffffffff));
    expect_entry_refused(RX_ACTIVE, acknowledged(NB_REGION_RX, 0, 60));
    entry = received(NB_REGION_RX, 127, ROOM + HEADER + 1);
    entry.flags = NB_CONTINUATION;
    expect_entry_refused(RX_ACTIVE, entry);
    expect_entry_refused(TX_DONE, acknowledged(NB_REGION_RX, 0, 60));
    expect_entry_refused(TX_DONE, acknowledged(NB_REGION_TX, 64, 60));
    expect_entry_refused(TX_DONE, acknowledged(NB_REGION_TX, 63, ROOM + 1));
    expect_entry_refused(TX_DONE, received(NB_REGION_TX, 0, 60));
}

TEST(client_refuses_counts_that_jump)
{
    const uint32_t ahead[] = {129, 0x80000000, 0xffffffff};
    for (unsigned i = 0; i < 3; i++) {
        struct world world;
        struct nb_piece piece;
        world_open(&world, (struct world_config){0});
        forge_produced(&world, RX_ACTIVE, ahead[i]);
        forge_produced(&world, TX_DONE, ahead[i]);
        CHECK_EQ(nb_client_receive(&world.client, &piece, 1), -1);
        CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), -1);
        /* It is told at once, and does not wait for a doorbell. */
        CHECK_EQ(nb_client_wait(&world.client, NB_WAIT_RECEIVE, -1), NB_WAIT_RECEIVE);
        world_close(&world);
    }
}

#define REFUSE(...)                                                                                                    \
    do {                                                                                                               \
        struct nb_client client = world.client;                                                                        \
        __VA_ARGS__;                                                                                                   \
        CHECK_EQ(nb_client_init(&client), -1);                                                                         \
    } while (0)

/* Ring geometry from the handshake used unchecked. */
TEST(client_refuses_a_geometry_that_does_not_hold)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    REFUSE(client.rx_active.slots = 127);
    REFUSE(client.rx_active.slots = 64);
    REFUSE(client.rx_free.slots = 0);
    REFUSE(client.rx_free.slots = 0x80000000);
    REFUSE(client.tx_active.header = NULL);
    REFUSE(client.tx_active.slots = 128); /* the buffers of either region, but not those of both */
    REFUSE(client.tx_done.slots = 32);
    REFUSE(client.rx_base = NULL);
    REFUSE(client.tx_base = NULL);
    REFUSE(client.rx_count = 0);
    REFUSE(client.rx_count = 129);
    REFUSE(client.tx_count = (1u << 24) + 1);
    REFUSE(client.rx_stride = HEADROOM);
    REFUSE(client.tx_stride = 0);
    REFUSE(client.headroom = STRIDE);
    REFUSE(client.headroom = 0xffffffff);
    REFUSE(client.continuation_offset = HEADROOM + 1);
    REFUSE(client.queue_pairs = 0);
    REFUSE(client.tx_largest_frame = 0);
    REFUSE(client.tx_max_pieces = 0);
    REFUSE(client.tx_max_pieces = 65);
    REFUSE(client.tx_count = 10; client.tx_max_pieces = 11);
    REFUSE(client.headroom = 8; client.continuation_offset = 0; client.offloads = 1);
    world_close(&world);
}

TEST(unallocated_buffers_are_allocated_next)
{
    struct world world;
    struct nb_piece first[10], again[10];
    world_open(&world, (struct world_config){0});
    for (int round = 0; round < 100; round++) {
        CHECK_EQ(nb_client_allocate(&world.client, first, 10), 10);
        nb_client_unallocate(&world.client, 7);
        CHECK_EQ(nb_client_allocate(&world.client, again, 7), 7);
        for (int i = 0; i < 7; i++)
            CHECK_EQ(again[i].dma_handle, first[3 + i].dma_handle);
        for (int i = 0; i < 10; i++) {
            first[i].len = 60;
            first[i].flags = 0;
            frame_make(first[i].data, (uint64_t)i, 60);
        }
        nb_client_send(&world.client, first, 10);
        world_pump_idle(&world);
        for (uint64_t i = 0; i < 10; i++)
            transmit_one(&world, i, 60);
        world_pump_idle(&world);
    }
    CHECK_EQ(world.counters.packets_tx, 1000);
    world_close(&world);
}

/* nb_client_echo may come back and be called again, as often as it likes: no buffer stays behind. */
TEST(echo_keeps_no_buffers_when_it_comes_back)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    world_open(&world, (struct world_config){0});
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    for (uint64_t i = 0; i < 50; i++) {
        deliver(&world, i, 60);
        world_pump_idle(&world);
        CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), 0);
        world_pump_idle(&world);
        CHECK_EQ(fake_available(&world.device.tx), 1);
        uint8_t frame[65536];
        uint32_t len;
        struct fake_chain chain;
        CHECK(fake_collect(&world.device, &chain, frame, &len));
        CHECK_EQ(len, 60);
        CHECK(frame_is(frame, i, 60, true));
        fake_complete(&world.device, &chain);
        world_pump_idle(&world);
    }
    CHECK_EQ(counts.frames, 50);
    CHECK_EQ(counts.bytes, 3000);
    world_close(&world);
}

/* Frames of several buffers where a client may not send such: they are counted once each, and every buffer is given back. */
TEST(echo_of_frames_that_it_cannot_send)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    world_open(&world, (struct world_config){.max_pieces = 34});
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    deliver(&world, 0, 9000);
    deliver(&world, 1, 60);
    deliver(&world, 2, 4000);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), 0);
    world_pump_idle(&world);
    CHECK_EQ(counts.frames, 1);
    CHECK_EQ(counts.unsendable, 2);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 0);
    CHECK_EQ(fake_available(&world.device.tx), 1);
    world_close(&world);
}

/* Frames of every number of buffers come back whole, although sent buffers hold less than received ones, and although there
 * are too few of them for all the frames at once. */
TEST(echo_of_frames_of_several_buffers)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    world_open(&world, (struct world_config){.max_pieces = 34, .tx_max_pieces = 34, .tx_count = 36});
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    for (uint64_t i = 0; i < 200; i++) {
        uint32_t len = (uint32_t)(SHORTEST + i * 331 % 65000);
        deliver(&world, i, len);
        deliver(&world, i + 1, 60);
        world_pump_idle(&world);
        for (uint64_t frame = i; frame < i + 2; frame++) {
            CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), 0);
            world_pump_idle(&world);
            while (fake_available(&world.device.tx)) {
                uint8_t bytes[65536];
                uint32_t sent;
                struct fake_chain chain;
                CHECK(fake_collect(&world.device, &chain, bytes, &sent));
                CHECK(sent == 60 ? frame_is(bytes, i + 1, 60, true) : frame_is(bytes, i, len, true) && sent == len);
                fake_complete(&world.device, &chain);
                world_pump_idle(&world);
            }
        }
    }
    CHECK_EQ(counts.frames, 400);
    CHECK_EQ(counts.unsendable, 0);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 0);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 36);
    world_close(&world);
}

TEST(client_refuses_frames_out_of_order)
{
    struct world world;
    struct nb_piece pieces[4];
    const uint8_t wrong[][2] = {{NB_CONTINUATION, 0}, {NB_MORE, 0}, {NB_MORE, NB_MORE}, {0, NB_CONTINUATION},
                                {NB_MORE, NB_CONTINUATION | NB_HEADER}, {NB_HEADER, 0}, {8, 0}};
    for (unsigned i = 0; i < sizeof(wrong) / sizeof(wrong[0]); i++) {
        world_open(&world, (struct world_config){0});
        for (uint32_t entry = 0; entry < 2; entry++) {
            struct nb_entry forged = received(NB_REGION_RX, entry, 60);
            forged.flags = wrong[i][entry];
            forge_entry(&world, RX_ACTIVE, entry, forged);
        }
        forge_produced(&world, RX_ACTIVE, 2);
        CHECK_EQ(nb_client_receive(&world.client, pieces, 4), -1);
        world_close(&world);
    }
}

TEST(client_refuses_a_queue_that_there_is_not)
{
    struct nb_entry entry = received(NB_REGION_RX, 0, 60);
    entry.queue = 1;
    expect_entry_refused(RX_ACTIVE, entry);
}

TEST(echo_says_when_the_driver_breaks_its_word)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    world_open(&world, (struct world_config){0});
    forge_produced(&world, RX_ACTIVE, 1000);
    CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), -1);
    world_close(&world);
}

/* A TX buffer may be smaller than an RX buffer. */
TEST(echo_of_a_frame_that_no_reply_has_room_for)
{
    struct world world;
    struct nb_echo_counts counts = {0};
    world_open(&world, (struct world_config){0});
    for (uint32_t i = 0; i < 64; i++)
        forge_entry(&world, TX_DONE, i, acknowledged(NB_REGION_TX, i, 100));
    CHECK_EQ(eventfd_write(world.client_control_fd, 1), 0);
    deliver(&world, 0, 101);
    deliver(&world, 1, 100);
    world_pump_idle(&world);
    CHECK_EQ(nb_client_echo(&world.client, world.client_control_fd, &counts), 0);
    CHECK_EQ(counts.frames, 1);
    CHECK_EQ(counts.unsendable, 1);
    world_close(&world);
}

/* Control is readable for whoever looks between bursts, and never for whoever waits for frames. */
static int control_between_bursts_only(struct pollfd *fds, nfds_t count, int timeout)
{
    (void)timeout;
    for (nfds_t i = 0; i < count; i++)
        fds[i].revents = POLLIN;
    return (int)count;
}

/* control_fd is looked at although frames never cease. */
TEST(echo_comes_back_while_frames_flow_without_end)
{
    struct world world;
    struct traffic traffic;
    struct echo echo;
    world_open(&world, (struct world_config){0});
    instead_of_poll = control_between_bursts_only;
    world_start_pump(&world);
    echo_start(&echo, &world);
    traffic_start(&traffic, &world, (struct traffic_config){.frames = 100000, .window = 8, .fixed_length = 60});
    CHECK_EQ(pthread_join(echo.thread, NULL), 0);
    CHECK_EQ(echo.verdict, 0);
    CHECK(echo.counts.bursts >= 256);
    traffic_abandon(&traffic);
    world_stop_pump(&world);
    instead_of_poll = NULL;
    world_close(&world);
}
