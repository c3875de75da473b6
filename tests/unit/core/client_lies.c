/* A client that lies: each lie ends the pump with the refusal that names it, is counted once, and moves no buffer.
 *
 * The client writes its rings by hand here; a frame that was refused never reaches the device.
 */
#include "check.h"
#include "world.h"

#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static const uint64_t NEXT_LEASE = 1ull << 32, NEXT_SESSION = 1ull << 48, NEXT_REGION = 1ull << 24;

/* What is wrong with an entry: added to a good handle, and the rest as it is to stand. */
struct lie {
    uint64_t add;
    uint32_t len;
    uint16_t kind;
    uint8_t flags;
    uint8_t queue;
};

static void put_entry(struct world *world, enum world_ring ring, struct nb_entry entry)
{
    uint32_t *put = ring == RX_FREE ? &world->client.rx_free_put : &world->client.tx_active_put;
    forge_entry(world, ring, (*put)++, entry);
    forge_produced(world, ring, *put);
}

/* A good return, then one that is wrong in one way. */
static void refuse_return(struct lie lie, enum nb_refusal refusal)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    deliver(&world, 0, 60);
    deliver(&world, 1, 60);
    world_pump_idle(&world);
    struct nb_piece good = receive_one(&world, 0, 60), bad = receive_one(&world, 1, 60);
    put_entry(&world, RX_FREE, (struct nb_entry){.dma_handle = good.dma_handle, .kind = NB_RX_PACKET});
    put_entry(&world, RX_FREE,
              (struct nb_entry){.dma_handle = bad.dma_handle + lie.add, .len = lie.len, .kind = lie.kind, .flags = lie.flags,
                                .queue = lie.queue});
    world_expect_client_fault(&world, refusal);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 1);
    world_close(&world);
}

/* A good frame to send, then one that is wrong in one way: the device gets the one and not the other. */
static void refuse_frame(struct lie lie, enum nb_refusal refusal)
{
    struct world world;
    struct nb_piece bad;
    world_open(&world, (struct world_config){0});
    send_one(&world, 0, 60);
    CHECK_EQ(nb_client_allocate(&world.client, &bad, 1), 1);
    put_entry(&world, TX_ACTIVE,
              (struct nb_entry){.dma_handle = bad.dma_handle + lie.add, .len = lie.len, .kind = lie.kind, .flags = lie.flags,
                                .queue = lie.queue});
    world_expect_client_fault(&world, refusal);
    transmit_one(&world, 0, 60);
    CHECK_EQ(fake_available(&world.device.tx), 0);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_DEVICE), 1);
    CHECK_EQ(nb_ledger_owned(world.tx_ledger, NB_OWNER_CLIENT), 63);
    world_close(&world);
}

#define RETURNED(...) ((struct lie){.kind = NB_RX_PACKET, __VA_ARGS__})
#define SENT(...) ((struct lie){.kind = NB_TX_PACKET, .len = 60, __VA_ARGS__})

TEST(returned_handle_of_the_other_region) { refuse_return(RETURNED(.add = NEXT_REGION), NB_REFUSE_REGION); }
TEST(returned_handle_of_no_region)
{
    refuse_return(RETURNED(.add = -NEXT_REGION), NB_REFUSE_REGION);
    refuse_return(RETURNED(.add = 254 * NEXT_REGION), NB_REFUSE_REGION);
}
TEST(returned_handle_beyond_the_last_buffer)
{
    refuse_return(RETURNED(.add = 127), NB_REFUSE_INDEX); /* buffer 1 of 128, plus 127 */
    refuse_return(RETURNED(.add = 0xffffff - 1), NB_REFUSE_INDEX);
}
TEST(returned_handle_of_an_earlier_session) { refuse_return(RETURNED(.add = -NEXT_SESSION), NB_REFUSE_SESSION); }
TEST(returned_handle_of_a_later_session) { refuse_return(RETURNED(.add = NEXT_SESSION), NB_REFUSE_SESSION); }
TEST(returned_handle_of_another_lease)
{
    refuse_return(RETURNED(.add = NEXT_LEASE), NB_REFUSE_LEASE);
    refuse_return(RETURNED(.add = -NEXT_LEASE), NB_REFUSE_LEASE);
}
/* Lease 0 is what a buffer has that was never lent. */
TEST(returned_handle_of_a_buffer_never_lent)
{
    refuse_return(RETURNED(.add = 5 - NEXT_LEASE), NB_REFUSE_OWNER);
    refuse_return(RETURNED(.add = 100 - NEXT_LEASE), NB_REFUSE_OWNER);
}
TEST(returned_entry_of_the_wrong_kind)
{
    const uint16_t kinds[] = {0, NB_TX_PACKET, NB_TX_PACKET_ACK, 4, 0x8001, 0xffff};
    for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        refuse_return((struct lie){.kind = kinds[i]}, NB_REFUSE_KIND);
}
TEST(returned_entry_with_flags)
{
    const uint8_t flags[] = {NB_MORE, NB_CONTINUATION, NB_HEADER, 0x80};
    refuse_return(RETURNED(.queue = 1), NB_REFUSE_KIND);
    for (unsigned i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
        refuse_return(RETURNED(.flags = flags[i]), NB_REFUSE_KIND);
}

/* Of an RX buffer that the client may not forward, for it never had it. */
TEST(sent_handle_of_the_other_region) { refuse_frame(SENT(.add = -NEXT_REGION), NB_REFUSE_LEASE); }
TEST(sent_handle_of_no_region) { refuse_frame(SENT(.add = NEXT_REGION), NB_REFUSE_REGION); }
TEST(sent_handle_beyond_the_last_buffer)
{
    refuse_frame(SENT(.add = 63), NB_REFUSE_INDEX);
    refuse_frame(SENT(.add = 0xffffff - 1), NB_REFUSE_INDEX);
}
TEST(sent_handle_of_an_earlier_session) { refuse_frame(SENT(.add = -NEXT_SESSION), NB_REFUSE_SESSION); }
TEST(sent_handle_of_another_lease)
{
    refuse_frame(SENT(.add = NEXT_LEASE), NB_REFUSE_LEASE);
    refuse_frame(SENT(.add = -NEXT_LEASE), NB_REFUSE_LEASE);
}
TEST(sent_entry_of_the_wrong_kind)
{
    const uint16_t kinds[] = {0, NB_RX_PACKET, NB_TX_PACKET_ACK, 4, 0xffff};
    for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
        refuse_frame((struct lie){.len = 60, .kind = kinds[i]}, NB_REFUSE_KIND);
}
TEST(sent_entry_with_flags_that_there_are_not)
{
    const uint8_t flags[] = {NB_HEADER, NB_MORE | NB_HEADER, 8, 0x80, 0xff}; /* no header without offloads */
    for (unsigned i = 0; i < sizeof(flags) / sizeof(flags[0]); i++)
        refuse_frame(SENT(.flags = flags[i]), NB_REFUSE_KIND);
}
TEST(sent_frame_shorter_than_an_ethernet_header)
{
    refuse_frame((struct lie){.kind = NB_TX_PACKET, .len = 0}, NB_REFUSE_LENGTH);
    refuse_frame((struct lie){.kind = NB_TX_PACKET, .len = SHORTEST - 1}, NB_REFUSE_LENGTH);
}
/* Buffer start checked but not its end. */
TEST(sent_frame_longer_than_its_buffer)
{
    const uint32_t lengths[] = {ROOM + 1, STRIDE, 0x10000 + 60, 0x7fffffff, 0x80000000, 0xffffffff};
    for (unsigned i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++)
        refuse_frame((struct lie){.kind = NB_TX_PACKET, .len = lengths[i]}, NB_REFUSE_LENGTH);
}

TEST(sent_frames_of_the_extreme_lengths_pass)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    send_one(&world, 0, SHORTEST);
    send_one(&world, 1, ROOM);
    world_pump_idle(&world);
    transmit_one(&world, 0, SHORTEST);
    transmit_one(&world, 1, ROOM);
    world_close(&world);
}

/* ---- The same buffer twice ------------------------------------------------------------------------------------ */

TEST(same_rx_buffer_returned_twice_at_once)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    struct nb_piece piece = receive_one(&world, 0, 60);
    nb_client_release(&world.client, &piece, 1);
    nb_client_release(&world.client, &piece, 1);
    world_expect_client_fault(&world, NB_REFUSE_OWNER);
    world_close(&world);
}

TEST(same_rx_buffer_returned_again_while_the_device_has_it)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_size = 4, .rx_count = 4});
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    struct nb_piece piece = receive_one(&world, 0, 60);
    release_one(&world, piece);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_DEVICE), 4);
    release_one(&world, piece);
    world_expect_client_fault(&world, NB_REFUSE_OWNER);
    world_close(&world);
}

/* Returned, filled again, lent again: the old handle is worth nothing although the buffer is the client's. */
TEST(same_rx_buffer_returned_by_its_old_handle)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_size = 1, .rx_count = 1});
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    struct nb_piece old = receive_one(&world, 0, 60);
    release_one(&world, old);
    world_pump_idle(&world);
    deliver(&world, 1, 60);
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 1);
    release_one(&world, old);
    world_expect_client_fault(&world, NB_REFUSE_LEASE);
    world_close(&world);
}

TEST(same_tx_buffer_sent_twice)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    struct nb_piece piece = send_one(&world, 0, 60);
    nb_client_send(&world.client, &piece, 1);
    world_expect_client_fault(&world, NB_REFUSE_OWNER);
    transmit_one(&world, 0, 60);
    CHECK_EQ(fake_available(&world.device.tx), 0);
    world_close(&world);
}

TEST(same_tx_buffer_sent_by_its_old_handle)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_count = 1});
    struct nb_piece old = send_one(&world, 0, 60);
    world_pump_idle(&world);
    transmit_one(&world, 0, 60);
    world_pump_idle(&world);
    nb_client_send(&world.client, &old, 1);
    world_expect_client_fault(&world, NB_REFUSE_LEASE);
    world_close(&world);
}

/* A client may give back what it never looked at: the handle is what counts. */
TEST(rx_buffer_returned_unread)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    put_entry(&world, RX_FREE,
              (struct nb_entry){.dma_handle = forge_handle(SESSION, 1, NB_REGION_RX, 0), .kind = NB_RX_PACKET});
    world_pump_idle(&world);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 0);
    world_close(&world);
}

/* ---- Counts --------------------------------------------------------------------------------------------------- */

static void refuse_jump(enum world_ring ring, uint32_t start, uint32_t ahead)
{
    struct world world;
    world_open(&world, (struct world_config){.ring_position = start});
    forge_produced(&world, ring, start + ahead);
    world_expect_client_fault(&world, NB_REFUSE_RING_JUMP);
    world_close(&world);
}

TEST(returned_count_jumps)
{
    const uint32_t ahead[] = {129, 256, 0x7fffffff, 0x80000000, 0xffffffff};
    for (unsigned i = 0; i < sizeof(ahead) / sizeof(ahead[0]); i++) {
        refuse_jump(RX_FREE, 0, ahead[i]);
        refuse_jump(RX_FREE, UINT32_MAX - 10, ahead[i]);
    }
}

TEST(sent_count_jumps)
{
    const uint32_t ahead[] = {257, 512, 0x7fffffff, 0x80000000, 0xffffffff};
    for (unsigned i = 0; i < sizeof(ahead) / sizeof(ahead[0]); i++) {
        refuse_jump(TX_ACTIVE, 0, ahead[i]);
        refuse_jump(TX_ACTIVE, UINT32_MAX - 10, ahead[i]);
    }
}

/* Within the ring's size, but nothing was written there. */
TEST(counts_run_ahead_of_their_entries)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    forge_produced(&world, RX_FREE, 128);
    world_expect_client_fault(&world, NB_REFUSE_KIND);
    world_close(&world);
    world_open(&world, (struct world_config){0});
    forge_produced(&world, TX_ACTIVE, 64);
    world_expect_client_fault(&world, NB_REFUSE_KIND);
    world_close(&world);
}

/* What the driver itself writes, and what it never reads again, is not the client's to break. */
TEST(drivers_own_rings_overwritten)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    memset(world.rings[RX_ACTIVE].client, 0xee, world.rings[RX_ACTIVE].bytes);
    memset(world.rings[TX_DONE].client, 0xee, world.rings[TX_DONE].bytes);
    for (uint64_t i = 0; i < 128; i++) {
        deliver(&world, i, 60);
        world_pump_idle(&world);
    }
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNER_CLIENT), 128);
    world_close(&world);
}

/* ---- What changes under the driver's eyes --------------------------------------------------------------------- */

struct flicker {
    struct world *world;
    uint64_t handle;
    bool stop;
};

/* An entry that is now a good one and now a bad one. */
static void *flicker_entry(void *argument)
{
    struct flicker *flicker = argument;
    struct nb_entry *entry = (struct nb_entry *)(flicker->world->client.tx_active.header + 1);
    while (!__atomic_load_n(&flicker->stop, __ATOMIC_RELAXED)) {
        uint64_t handle = __atomic_load_n(&flicker->handle, __ATOMIC_RELAXED);
        __atomic_store_n(&entry->len, 0xffffffff, __ATOMIC_RELAXED);
        __atomic_store_n(&entry->len, 60, __ATOMIC_RELAXED);
        __atomic_store_n(&entry->dma_handle, handle | 0xffffff, __ATOMIC_RELAXED);
        __atomic_store_n(&entry->dma_handle, handle, __ATOMIC_RELAXED);
    }
    return NULL;
}

/* The entry changed after publication: whatever was checked is what is used. The device would see anything else. */
TEST(entry_changes_after_publication)
{
    struct world world;
    struct nb_piece piece;
    pthread_t thread;
    uint8_t frame[65536];
    struct fake_chain chain;
    uint32_t len;
    world_open(&world, (struct world_config){.tx_count = 1}); /* so there is one slot, and the entry always in it */
    CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
    struct flicker flicker = {.world = &world, .handle = piece.dma_handle};
    CHECK_EQ(pthread_create(&thread, NULL, flicker_entry, &flicker), 0);
    for (int i = 0; i < 3000; i++) {
        put_entry(&world, TX_ACTIVE, (struct nb_entry){.dma_handle = piece.dma_handle, .len = 60, .kind = NB_TX_PACKET});
        struct nb_pump_result result = world_pump(&world);
        if (result.event == NB_EVENT_CONTROL) {
            CHECK(fake_collect(&world.device, &chain, frame, &len));
            CHECK_EQ(len, 60);
            fake_complete(&world.device, &chain);
            world_pump_idle(&world);
            CHECK_EQ(nb_client_allocate(&world.client, &piece, 1), 1);
            __atomic_store_n(&flicker.handle, piece.dma_handle, __ATOMIC_RELAXED);
        } else {
            CHECK_EQ(result.event, NB_EVENT_CLIENT_FAULT);
            CHECK(result.detail == NB_REFUSE_LENGTH || result.detail == NB_REFUSE_INDEX || result.detail == NB_REFUSE_LEASE);
            CHECK_EQ(fake_available(&world.device.tx), 0);
        }
    }
    __atomic_store_n(&flicker.stop, true, __ATOMIC_RELAXED);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    world_close(&world);
}

/* A count that is now ahead and now back: the driver keeps looking at control_fd all the while. */
static void *flicker_count(void *argument)
{
    struct flicker *flicker = argument;
    uint32_t *produced = &flicker->world->client.tx_active.header->produced;
    while (!__atomic_load_n(&flicker->stop, __ATOMIC_RELAXED)) {
        __atomic_store_n(produced, 1, __ATOMIC_RELAXED);
        __atomic_store_n(produced, 0, __ATOMIC_RELAXED);
    }
    return NULL;
}

TEST(count_flickers)
{
    struct world world;
    pthread_t thread;
    world_open(&world, (struct world_config){0});
    struct flicker flicker = {.world = &world};
    CHECK_EQ(pthread_create(&thread, NULL, flicker_count, &flicker), 0);
    world_start_pump(&world);
    sched_yield();
    world_stop_pump(&world);
    __atomic_store_n(&flicker.stop, true, __ATOMIC_RELAXED);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    /* An entry was announced that was never written, or taken back in time. */
    CHECK(world.result.event == NB_EVENT_CONTROL || world.result.detail == NB_REFUSE_KIND ||
          world.result.detail == NB_REFUSE_RING_JUMP);
    world_close(&world);
}

/* ---- Doorbells ------------------------------------------------------------------------------------------------ */

struct bell_thief {
    struct world *world;
    bool stop;
};

/* Rings and takes it away again before the driver can. */
static void *ring_and_take_away(void *argument)
{
    struct bell_thief *thief = argument;
    int fd = thief->world->client_doorbell_fd;
    eventfd_t value;
    while (!__atomic_load_n(&thief->stop, __ATOMIC_RELAXED)) {
        eventfd_write(fd, 1);
        eventfd_read(fd, &value);
    }
    return NULL;
}

/* The client holds the same open file description as the driver: it can make the doorbell blocking, and empty it between
 * the driver's seeing it and reading it. So the driver must not read it. */
TEST(client_cannot_block_the_driver_by_emptying_its_doorbell)
{
    struct world world;
    pthread_t thread;
    world_open(&world, (struct world_config){0});
    struct bell_thief thief = {.world = &world};
    CHECK_EQ(fcntl(world.client_doorbell_fd, F_SETFL, 0), 0);
    world_start_pump(&world);
    CHECK_EQ(pthread_create(&thread, NULL, ring_and_take_away, &thief), 0);
    for (double end = seconds_now() + 0.1; seconds_now() < end;)
        sched_yield();
    __atomic_store_n(&thief.stop, true, __ATOMIC_RELAXED);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    world_stop_pump(&world);
    CHECK_EQ(world.result.event, NB_EVENT_CONTROL);
    world_close(&world);
}

/* A doorbell that nobody answers fills up; the driver must not wait for room. */
TEST(client_that_never_answers_its_doorbell)
{
    for (int bare = 0; bare <= 1; bare++) {
        struct world world;
        world_open(&world, (struct world_config){.doorbell_is_bare = bare});
        if (bare)
            CHECK_EQ(eventfd_write(world.driver_doorbell_fd, 0xfffffffffffffffe), 0); /* full */
        for (uint64_t i = 0; i < 20; i++) {
            world.client.rx_active.header->wake = 1;
            deliver(&world, i, 60);
            world_pump_idle(&world);
        }
        CHECK(world.counters.wakeups_sent >= 20);
        world_close(&world);
    }
}

/* The client does what it can to the descriptor it was given, and has no hold on the driver's eventfd. */
TEST(client_cannot_block_the_driver_by_filling_its_doorbell)
{
    struct world world;
    uint64_t full = 0xfffffffffffffffe;
    world_open(&world, (struct world_config){0});
    int flags = fcntl(world.driver_doorbell_fd, F_GETFL);
    fcntl(world.client_end_of_doorbell_fd, F_SETFL, 0);
    CHECK(write(world.client_end_of_doorbell_fd, &full, sizeof(full)) < 0);
    CHECK(read(world.client_end_of_doorbell_fd, &full, sizeof(full)) < 0);
    CHECK_EQ(fcntl(world.driver_doorbell_fd, F_GETFL), flags);
    world.client.rx_active.header->wake = 1;
    deliver(&world, 0, 60);
    world_pump_idle(&world);
    CHECK(is_rung(world.client_end_of_doorbell_fd));
    world_close(&world);
}
