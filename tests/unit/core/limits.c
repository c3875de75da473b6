/* What the core refuses to be made of, and the odd function that stands alone. */
#include "check.h"
#include "ledger.h"
#include "world.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

TEST(virtqueue_layout_follows_the_specification)
{
    /* virtio 1.3 §2.7: alignments 16, 2 and 4; sizes 16n, 6+2n and 6+8n. */
    for (uint32_t size = 1; size <= 32768; size *= 2) {
        struct nb_virtqueue_layout layout;
        CHECK_EQ(nb_virtqueue_layout(&(struct nb_virtqueue_config){.size = (uint16_t)size}, &layout), 0);
        CHECK_EQ(layout.desc % 16 + layout.driver % 2 + layout.device % 4, 0);
        CHECK(layout.driver >= layout.desc + 16 * size);
        CHECK(layout.device >= layout.driver + 6 + 2 * size);
        CHECK(layout.bytes >= layout.device + 6 + 8 * size);
    }
}

TEST(virtqueue_of_an_impossible_size)
{
    const uint16_t sizes[] = {0, 3, 6, 100, 255, 257, 32767, 32769, 65535};
    struct nb_virtqueue_layout layout;
    uint16_t notify;
    uint8_t memory[16];
    for (unsigned i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        struct nb_virtqueue_config config = {.size = sizes[i], .memory = memory, .notify = &notify, .kick_fd = -1};
        CHECK_EQ(nb_virtqueue_layout(&config, &layout), -1);
        CHECK(nb_virtqueue_new(&config) == NULL);
    }
}

static bool ledger_is_made(uint32_t count, uint32_t stride, uint32_t headroom)
{
    struct nb_ledger *ledger =
        nb_ledger_new(&(struct nb_region){.count = count, .stride = stride, .headroom = headroom, .id = NB_REGION_RX});
    nb_ledger_free(ledger);
    return ledger != NULL;
}

TEST(ledger_of_an_impossible_region)
{
    CHECK(ledger_is_made(1, 2048, 64));
    CHECK(ledger_is_made(1u << 24, 2048, 64));
    CHECK(!ledger_is_made((1u << 24) + 1, 2048, 64)); /* more than a handle can name */
    CHECK(!ledger_is_made(0xffffffff, 2048, 64));
    CHECK(!ledger_is_made(0, 2048, 64));
    CHECK(!ledger_is_made(1, 64, 64));
    CHECK(!ledger_is_made(1, 63, 64));
    CHECK(!ledger_is_made(1, 0, 0));
}

TEST(ledger_owner_that_there_is_not)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, -1), 0);
    CHECK_EQ(nb_ledger_owned(world.rx_ledger, NB_OWNERS), 0);
    world_close(&world);
}

static void refuse_pump(const struct nb_pump_config *config)
{
    errno = 0;
    struct nb_pump *pump = nb_pump_new(config);
    CHECK(pump == NULL);
    CHECK_EQ(errno, EINVAL);
}

#define REFUSE(...)                                                                                                    \
    do {                                                                                                               \
        struct nb_pump_config config = world.pump_config;                                                              \
        __VA_ARGS__;                                                                                                   \
        refuse_pump(&config);                                                                                          \
    } while (0)

/* Ring geometry used unchecked. */
TEST(pump_of_an_impossible_configuration)
{
    struct world world;
    world_open(&world, (struct world_config){.rx_count = 100});
    CHECK_EQ(world.pump_config.rx_active.slots, 128);
    REFUSE(config.rx_active.slots = 64);
    REFUSE(config.rx_active.slots = 0);
    REFUSE(config.rx_active.slots = 129);
    REFUSE(config.rx_active.slots = 0x80000000);
    REFUSE(config.rx_active.header = NULL);
    REFUSE(config.rx_free.slots = 64);
    REFUSE(config.rx_free.slots = 100);
    REFUSE(config.tx_active.slots = 128); /* there are 128 RX buffers that can be in it, too */
    REFUSE(config.tx_active.slots = 0);
    REFUSE(config.tx_done.slots = 32);
    REFUSE(config.tx_done.header = NULL);
    REFUSE(config.burst = 0);
    REFUSE(config.rx_max_pieces = 0);
    REFUSE(config.rx_max_pieces = 65);
    REFUSE(config.net_header_bytes = HEADROOM + 1);
    REFUSE(config.rx_max_pieces = 2; config.net_header_bytes = 10); /* no num_buffers in it */
    REFUSE(config.rx_max_pieces = 2; config.net_header_bytes = 13); /* num_buffers at an odd address */
    REFUSE(config.net_header_bytes = 17); /* more than a slot for it */
    REFUSE(config.tx_max_pieces = 0);
    REFUSE(config.tx_max_pieces = 64); /* and a header: more than the queue holds */
    REFUSE(config.tx_largest_frame = ROOM - 1);
    REFUSE(config.pair_count = 0);
    REFUSE(config.pair_count = 2); /* and nothing in the second */
    REFUSE(config.pair_count = 9);
    REFUSE(config.offloads = 1 << NB_CSUM; config.tx_slots = NULL);
    REFUSE(config.tx_copied = 1; config.tx_slots = NULL);
    REFUSE(config.tx_copied = NB_TX_MOST_COPIED + 1; config.tx_slots = world.header.device);
    REFUSE(config.tx_header_with_frame = 1; config.tx_slots = NULL);
    REFUSE(config.tx_header_with_frame = 1; config.tx_slots = world.header.device; config.net_header_bytes = 10);
    REFUSE(config.intx_fd = world.control_fd); /* INTx, and no ISR status to read */
    world_close(&world);
}

/* Headers in received frames' buffers, where a forwarded frame's is put, that are not where words of 32 bits may be; buffers
 * too short for whole lines to be copied from. */
TEST(pump_that_cannot_forward_from_its_buffers)
{
    struct world world;
    world_open(&world, (struct world_config){.tx_copied = NB_TX_MOST_COPIED, .tx_header_with_frame = true});
    struct nb_region odd = world.rx_ledger->region, shallow = odd;
    odd.headroom = HEADROOM - 2;
    shallow.stride = HEADROOM + NB_TX_MOST_COPIED - 4;
    struct nb_ledger *odd_ledger = nb_ledger_new(&odd), *shallow_ledger = nb_ledger_new(&shallow);
    REFUSE(config.rx_ledger = odd_ledger);
    REFUSE(config.rx_ledger = shallow_ledger);
    nb_ledger_free(odd_ledger);
    nb_ledger_free(shallow_ledger);
    world_close(&world);
}

/* Header and frame take a descriptor each: with one nothing could ever be sent. */
TEST(pump_with_a_tx_queue_of_one_descriptor)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    struct nb_virtqueue_config tx_config = world.tx_config;
    tx_config.size = 1;
    struct nb_virtqueue *queue = nb_virtqueue_new(&tx_config);
    REFUSE(config.pairs[0].tx_queue = queue);
    nb_virtqueue_free(queue);
    world_close(&world);
}

/* An fd that cannot be waited for: no pump, and nothing left open. */
TEST(pump_with_an_fd_that_epoll_refuses)
{
    struct world world;
    world_open(&world, (struct world_config){0});
    struct nb_pump_config config = world.pump_config;
    int file = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    int next = dup(file);
    close(next);
    config.control_fd = file;
    CHECK(nb_pump_new(&config) == NULL);
    config.control_fd = 9999;
    CHECK(nb_pump_new(&config) == NULL);
    CHECK_EQ(errno, EBADF);
    CHECK_EQ(dup(file), next); /* the same number is free: no fd was leaked */
    close(next);
    close(file);
    world_close(&world);
}

TEST(freeing_nothing)
{
    nb_pump_free(NULL);
    nb_ledger_free(NULL);
    nb_virtqueue_free(NULL);
}

static void add(struct nb_histogram *histogram, uint64_t value, int bucket)
{
    uint64_t before = histogram->buckets[bucket];
    nb_histogram_add(histogram, value);
    CHECK_EQ(histogram->buckets[bucket], before + 1);
}

TEST(histogram_buckets_are_quarters_of_powers_of_two)
{
    struct nb_histogram histogram = {0};
    for (int i = 0; i < 4; i++)
        add(&histogram, (uint64_t)i, i);
    for (int power = 2; power < 40; power++)
        for (int quarter = 0; quarter < 4; quarter++) {
            uint64_t from = (uint64_t)(4 + quarter) << (power - 2);
            uint64_t next = (uint64_t)(5 + quarter) << (power - 2);
            add(&histogram, from, 4 * power + quarter);
            add(&histogram, next - 1, 4 * power + quarter);
        }
    CHECK_EQ(histogram.count, 4 + 2 * 4 * 38);
    CHECK_EQ(histogram.max_ns, (1ull << 40) - 1);
    add(&histogram, 1ull << 40, 159);
    add(&histogram, UINT64_MAX, 159);
    CHECK(histogram.max_ns == UINT64_MAX);
}
