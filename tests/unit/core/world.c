/* Setting the world up and taking it down: see world.h. */
#define _GNU_SOURCE
#include "world.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "check.h"
#include "jitter.h"
#include "net_header.h"
#include "white_box.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

enum { PAGE = 4096, SHARED_WINDOWS = 3 /* RX and TX buffers, and headers: the first of a device's */ };

/* Far apart, and nothing like a pointer of this process. */
static const uint64_t RX_IOVA = 0x10000000, TX_IOVA = 0x20000000, HEADER_IOVA = 0x30000000, RX_QUEUE_IOVA = 0x7fff000000,
                      TX_QUEUE_IOVA = 0x40000000;

double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* ---- Memory --------------------------------------------------------------------------------------------------- */

static uint64_t whole_pages(uint64_t bytes) { return (bytes + PAGE - 1) & ~(uint64_t)(PAGE - 1); }

/* Maps the file between two inaccessible pages; `bytes` end where the second begins, what is before them is poisoned. */
static uint8_t *map_guarded(int fd, uint64_t bytes, int rights)
{
    uint64_t length = whole_pages(bytes);
    uint8_t *reserved = mmap(NULL, length + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(reserved != MAP_FAILED);
    uint8_t *mapped = mmap(reserved + PAGE, length, rights, MAP_SHARED | MAP_FIXED, fd, 0);
    CHECK(mapped == reserved + PAGE);
    ASAN_UNPOISON_MEMORY_REGION(mapped, length);
    ASAN_POISON_MEMORY_REGION(mapped, length - bytes);
    return mapped + (length - bytes);
}

static void unmap_guarded(uint8_t *at, uint64_t bytes)
{
    if (!at)
        return;
    uint64_t length = whole_pages(bytes);
    uint8_t *mapped = at - (length - bytes);
    ASAN_UNPOISON_MEMORY_REGION(mapped, length);
    munmap(mapped - PAGE, length + 2 * PAGE);
}

enum { NOT_AT_ALL = -1, READ = PROT_READ, READ_WRITE = PROT_READ | PROT_WRITE };

static struct shared share_memory(uint64_t bytes, int driver, int device, int client)
{
    struct shared memory = {.bytes = bytes};
    int fd = memfd_create("test", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)whole_pages(bytes)) == 0);
#if defined(__SANITIZE_THREAD__)
    uint8_t *all = map_guarded(fd, bytes, READ_WRITE);
    memory.driver = driver == NOT_AT_ALL ? NULL : all;
    memory.device = device == NOT_AT_ALL ? NULL : all;
    memory.client = client == NOT_AT_ALL ? NULL : all;
#else
    uint8_t **parties[] = {&memory.driver, &memory.device, &memory.client};
    int rights[] = {driver, device, client};
    for (int i = 0; i < 3; i++)
        *parties[i] = rights[i] == NOT_AT_ALL ? NULL : map_guarded(fd, bytes, rights[i]);
#endif
    close(fd);
    return memory;
}

static void stop_sharing(struct shared *memory)
{
#if defined(__SANITIZE_THREAD__)
    unmap_guarded(memory->device ? memory->device : memory->driver, memory->bytes);
#else
    unmap_guarded(memory->driver, memory->bytes);
    unmap_guarded(memory->device, memory->bytes);
    unmap_guarded(memory->client, memory->bytes);
#endif
}

/* Nobody has business in a headroom, but for the device's header at its end. */
static void poison_headrooms(uint8_t *base, uint32_t count, uint32_t used_before_frame)
{
    for (uint32_t i = 0; base && i < count; i++)
        ASAN_POISON_MEMORY_REGION(base + (uint64_t)i * STRIDE, (HEADROOM - used_before_frame) / 8 * 8);
}

static void poison_between(uint8_t *base, uint64_t from, uint64_t to)
{
    from = (from + 7) & ~(uint64_t)7;
    ASAN_POISON_MEMORY_REGION(base + from, to - from);
}

static void poison_queue_gaps(uint8_t *base, const struct nb_virtqueue_layout *layout, uint16_t size, bool packed)
{
    poison_between(base, layout->desc + 16u * size, layout->driver);
    poison_between(base, layout->driver + (packed ? 4 : 6 + 2u * size), layout->device);
    poison_between(base, layout->device + (packed ? 4 : 6 + 8u * size), layout->tables);
}

/* ---- Opening -------------------------------------------------------------------------------------------------- */

static uint32_t or_default(uint32_t value, uint32_t standard) { return value ? value : standard; }

static uint32_t slots_for(uint32_t buffers)
{
    uint32_t slots = 1;
    while (slots < buffers)
        slots *= 2;
    return slots;
}

static struct nb_virtqueue_config queue_config(const struct world_config *config, uint16_t index, uint16_t size,
                                               uint64_t iova, uint32_t *notify)
{
    const struct fake_features *ring = &config->ring;
    uint16_t segments = (uint16_t)or_default(config->table_segments, 4);
    uint32_t features = (ring->packed ? NB_RING_PACKED : 0) | (ring->event_idx ? NB_RING_EVENT_IDX : 0) |
                        (ring->in_order ? NB_RING_IN_ORDER : 0) |
                        (ring->notification_data ? NB_RING_NOTIFICATION_DATA : 0);
    return (struct nb_virtqueue_config){
        .index = index,
        .size = size,
        .table_segments = !ring->indirect ? 0 : segments < size ? segments : size,
        .features = (uint16_t)features,
        .iova = iova,
        .notify = notify,
        .kick_fd = -1,
    };
}

static void open_memory(struct world *world)
{
    const struct world_config *config = &world->config;
    world->rx_config = queue_config(config, 0, config->rx_size, RX_QUEUE_IOVA, &world->rx_notify);
    world->tx_config = queue_config(config, 1, config->tx_size, TX_QUEUE_IOVA, &world->tx_notify);
    CHECK_EQ(nb_virtqueue_layout(&world->rx_config, &world->rx_layout), 0);
    CHECK_EQ(nb_virtqueue_layout(&world->tx_config, &world->tx_layout), 0);
    int client_rights = config->rx_writable ? READ_WRITE : READ;
    /* What is in front of a frame is the driver's to read only if it may be a header, and to write if it puts one there. */
    bool offers = config->offloads & TX_OFFLOADS, writes = config->tx_header_with_frame;
    bool reads = offers || writes || config->tx_copied;
    int tx_rights = writes ? READ_WRITE : reads ? READ : NOT_AT_ALL;
    world->rx = share_memory((uint64_t)config->rx_count * STRIDE, writes ? READ_WRITE : READ, READ_WRITE, client_rights);
    world->tx = share_memory((uint64_t)config->tx_count * STRIDE, tx_rights, READ, READ_WRITE);
    uint64_t slots = 1 + (reads ? config->tx_count : 0) + (config->tx_copied ? config->pairs * config->tx_size : 0);
    world->header = share_memory(slots * NB_TX_SLOT_BYTES, reads ? READ_WRITE : NOT_AT_ALL, READ, NOT_AT_ALL);
    world->rx_memory = share_memory(world->rx_layout.bytes, READ_WRITE, READ_WRITE, NOT_AT_ALL);
    world->tx_memory = share_memory(world->tx_layout.bytes, READ_WRITE, READ_WRITE, NOT_AT_ALL);
    world->rx_config.memory = world->rx_memory.driver;
    world->tx_config.memory = world->tx_memory.driver;
    for (int i = 0; i < 4; i++) {
        uint32_t rx = i == TX_DONE ? 0 : config->rx_count, tx = i < TX_ACTIVE ? 0 : config->tx_count;
        uint32_t slots = slots_for(rx + tx);
        world->rings[i] = share_memory(sizeof(struct nb_ring_header) + slots * sizeof(struct nb_entry), READ_WRITE, NOT_AT_ALL,
                                READ_WRITE);
    }
    poison_headrooms(world->rx.driver, config->rx_count, HEADER);
    poison_headrooms(world->rx.device, config->rx_count, HEADER);
    poison_headrooms(world->rx.client, config->rx_count, HEADER);
    poison_headrooms(world->tx.driver, config->tx_count, offers || writes ? HEADER : 0);
    poison_headrooms(world->tx.device, config->tx_count, writes ? HEADER : 0);
    poison_headrooms(world->tx.client, config->tx_count, offers || writes ? HEADER : 0);
    poison_queue_gaps(world->rx_memory.driver, &world->rx_layout, config->rx_size, config->ring.packed);
    poison_queue_gaps(world->rx_memory.device, &world->rx_layout, config->rx_size, config->ring.packed);
    poison_queue_gaps(world->tx_memory.driver, &world->tx_layout, config->tx_size, config->ring.packed);
    poison_queue_gaps(world->tx_memory.device, &world->tx_layout, config->tx_size, config->ring.packed);
}

static int new_eventfd(void)
{
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
}

static void open_fds(struct world *world)
{
    world->rx_irq_fd = world->tx_irq_fd = world->intx_fd = world->unmask_fd = -1;
    if (world->config.intx) {
        world->intx_fd = new_eventfd();
        world->unmask_fd = new_eventfd();
    } else {
        world->rx_irq_fd = new_eventfd();
        world->tx_irq_fd = world->config.one_vector ? world->rx_irq_fd : new_eventfd();
    }
    world->client_doorbell_fd = new_eventfd();
    world->driver_doorbell_fd = world->client_end_of_doorbell_fd = new_eventfd();
    if (!world->config.doorbell_is_bare) {
        struct epoll_event ring = {.events = EPOLLIN | EPOLLET};
        world->client_end_of_doorbell_fd = epoll_create1(EPOLL_CLOEXEC);
        CHECK_EQ(epoll_ctl(world->client_end_of_doorbell_fd, EPOLL_CTL_ADD, world->driver_doorbell_fd, &ring), 0);
    }
    if (world->config.kicks) {
        world->rx_config.kick_fd = new_eventfd();
        world->tx_config.kick_fd = new_eventfd();
    }
    world->control_fd = new_eventfd();
    world->client_control_fd = new_eventfd();
}

static void close_fds(struct world *world)
{
    int fds[] = {world->rx_irq_fd,          world->config.one_vector ? -1 : world->tx_irq_fd,
                 world->intx_fd,            world->unmask_fd,
                 world->client_doorbell_fd, world->driver_doorbell_fd,
                 world->control_fd,         world->client_control_fd,
                 world->rx_config.kick_fd,  world->tx_config.kick_fd,
                 world->config.doorbell_is_bare ? -1 : world->client_end_of_doorbell_fd};
    for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static struct nb_ring_place place_ring(const struct world *world, int ring, bool client)
{
    const struct shared *memory = &world->rings[ring];
    return (struct nb_ring_place){
        .header = (struct nb_ring_header *)(client ? memory->client : memory->driver),
        .slots = (uint32_t)((memory->bytes - sizeof(struct nb_ring_header)) / sizeof(struct nb_entry)),
    };
}

static void attach(struct world *world, struct fake_device *device, struct fake_queue *queue,
                   const struct nb_virtqueue_config *config, const struct nb_virtqueue_layout *layout, uint32_t *notify,
                   int irq_fd)
{
    fake_attach(device, queue,
                (struct fake_queue_place){
                    .descriptors = config->iova + layout->desc,
                    .driver_area = config->iova + layout->driver,
                    .device_area = config->iova + layout->device,
                    .size = config->size,
                    .notify = notify,
                    .irq_fd = irq_fd,
                    .features = world->config.ring,
                });
    fake_start_at(queue, world->config.queue_index);
}

static void open_device(struct world *world)
{
    struct fake_device *device = &world->device;
    *device = (struct fake_device){
        .header_bytes = HEADER,
        .merges = world->config.max_pieces > 1,
        .takes_headers = world->config.offloads & TX_OFFLOADS,
        .intx_fd = world->intx_fd,
        .unmask_fd = world->unmask_fd,
        .isr = &world->isr,
    };
    fake_window_add(device, (struct fake_window){RX_IOVA, world->rx.device, world->rx.bytes, STRIDE, true, true});
    fake_window_add(device, (struct fake_window){TX_IOVA, world->tx.device, world->tx.bytes, STRIDE, true, false});
    fake_window_add(device, (struct fake_window){HEADER_IOVA, world->header.device, world->header.bytes,
                                                 NB_TX_SLOT_BYTES, true, false});
    fake_window_add(device, (struct fake_window){RX_QUEUE_IOVA, world->rx_memory.device, world->rx_memory.bytes, 0, true, true});
    fake_window_add(device, (struct fake_window){TX_QUEUE_IOVA, world->tx_memory.device, world->tx_memory.bytes, 0, true, true});
    world_attach_device(world);
}

void world_attach_device(struct world *world)
{
    struct fake_device *device = &world->device;
    device->lie = FAKE_HONEST;
    attach(world, device, &device->rx, &world->rx_config, &world->rx_layout, &world->rx_notify, world->rx_irq_fd);
    attach(world, device, &device->tx, &world->tx_config, &world->tx_layout, &world->tx_notify, world->tx_irq_fd);
}

static struct nb_ledger *new_ledger(uint8_t *base, uint64_t iova, uint32_t count, uint8_t id)
{
    struct nb_ledger *ledger = nb_ledger_new(&(struct nb_region){.base = base,
                                                                 .iova = iova,
                                                                 .count = count,
                                                                 .stride = STRIDE,
                                                                 .headroom = HEADROOM,
                                                                 .session = SESSION,
                                                                 .id = id});
    CHECK(ledger != NULL);
    return ledger;
}

/* Its queues are as long as the first pair's. It has one vector for both. */
static void open_pair(struct world *world, struct world_pair *pair, uint32_t number)
{
    uint64_t rx_iova = RX_QUEUE_IOVA + ((uint64_t)number << 32), tx_iova = TX_QUEUE_IOVA + ((uint64_t)number << 32);
    pair->irq_fd = new_eventfd();
    pair->rx_memory = share_memory(world->rx_layout.bytes, READ_WRITE, READ_WRITE, NOT_AT_ALL);
    pair->tx_memory = share_memory(world->tx_layout.bytes, READ_WRITE, READ_WRITE, NOT_AT_ALL);
    pair->rx_config = world->rx_config;
    pair->rx_config.index = (uint16_t)(2 * number);
    pair->rx_config.memory = pair->rx_memory.driver;
    pair->rx_config.iova = rx_iova;
    pair->rx_config.notify = &pair->rx_notify;
    pair->tx_config = world->tx_config;
    pair->tx_config.index = (uint16_t)(2 * number + 1);
    pair->tx_config.memory = pair->tx_memory.driver;
    pair->tx_config.iova = tx_iova;
    pair->tx_config.notify = &pair->tx_notify;
    pair->rx_queue = nb_virtqueue_new(&pair->rx_config);
    pair->tx_queue = nb_virtqueue_new(&pair->tx_config);
    struct fake_device *device = &pair->device;
    *device = (struct fake_device){.header_bytes = HEADER,
                                   .merges = world->device.merges,
                                   .takes_headers = world->device.takes_headers,
                                   .intx_fd = -1,
                                   .unmask_fd = -1};
    /* The buffers are where they are for the first. */
    for (unsigned i = 0; i < SHARED_WINDOWS; i++)
        fake_window_add(device, world->device.windows[i]);
    fake_window_add(device, (struct fake_window){rx_iova, pair->rx_memory.device, pair->rx_memory.bytes, 0, true, true});
    fake_window_add(device, (struct fake_window){tx_iova, pair->tx_memory.device, pair->tx_memory.bytes, 0, true, true});
    attach(world, device, &device->rx, &pair->rx_config, &world->rx_layout, &pair->rx_notify, pair->irq_fd);
    attach(world, device, &device->tx, &pair->tx_config, &world->tx_layout, &pair->tx_notify, pair->irq_fd);
}

static void close_pair(struct world_pair *pair)
{
    nb_virtqueue_free(pair->rx_queue);
    nb_virtqueue_free(pair->tx_queue);
    fake_detach(&pair->device);
    close(pair->irq_fd);
    stop_sharing(&pair->rx_memory);
    stop_sharing(&pair->tx_memory);
}

static void open_pump(struct world *world)
{
    const struct world_config *config = &world->config;
    world->rx_queue = nb_virtqueue_new(&world->rx_config);
    world->tx_queue = nb_virtqueue_new(&world->tx_config);
    world->rx_ledger = new_ledger(world->rx.driver, RX_IOVA, config->rx_count, NB_REGION_RX);
    world->tx_ledger = new_ledger(world->tx.driver, TX_IOVA, config->tx_count, NB_REGION_TX);
    world->pump_config = (struct nb_pump_config){
        .pairs = {{world->rx_queue, world->tx_queue, world->rx_irq_fd, world->tx_irq_fd}},
        .pair_count = config->pairs,
        .rx_ledger = world->rx_ledger,
        .tx_ledger = world->tx_ledger,
        .rx_active = place_ring(world, RX_ACTIVE, false),
        .rx_free = place_ring(world, RX_FREE, false),
        .tx_active = place_ring(world, TX_ACTIVE, false),
        .tx_done = place_ring(world, TX_DONE, false),
        .tx_slots = world->header.driver,
        .tx_slots_iova = HEADER_IOVA,
        .tx_copied = config->tx_copied,
        .tx_header_with_frame = config->tx_header_with_frame,
        .offloads = config->offloads,
        .net_header_bytes = HEADER,
        .rx_max_pieces = config->max_pieces,
        .rx_client_limit = config->client_limit,
        .burst = config->burst,
        .spin_ns = config->spin_ns,
        .yields = config->yields,
        .stall_ns = config->stall_ns,
        .tx_max_pieces = config->tx_max_pieces,
        .tx_largest_frame = config->tx_largest_frame,
        .intx_fd = world->intx_fd,
        .intx_unmask_fd = world->unmask_fd,
        .isr_status = config->intx ? &world->isr : NULL,
        .client_doorbell_fd = world->client_doorbell_fd,
        .driver_doorbell_fd = world->driver_doorbell_fd,
        .control_fd = world->control_fd,
        .counters = &world->counters,
    };
    for (uint32_t i = 1; i < config->pairs; i++) {
        struct world_pair *pair = &world->more[i - 1];
        open_pair(world, pair, i);
        world->pump_config.pairs[i] = (struct nb_pump_pair){pair->rx_queue, pair->tx_queue, pair->irq_fd, pair->irq_fd};
    }
    world->pump = nb_pump_new(&world->pump_config);
    CHECK(world->pump != NULL);
    white_box_start_at(world->pump, config->ring_position, config->queue_index);
}

static void open_client(struct world *world)
{
    struct nb_client *client = &world->client;
    *client = (struct nb_client){
        .rx_active = place_ring(world, RX_ACTIVE, true),
        .rx_free = place_ring(world, RX_FREE, true),
        .tx_active = place_ring(world, TX_ACTIVE, true),
        .tx_done = place_ring(world, TX_DONE, true),
        .rx_base = world->rx.client,
        .tx_base = world->tx.client,
        .rx_writable = world->config.rx_writable,
        .rx_count = world->config.rx_count,
        .tx_count = world->config.tx_count,
        .rx_stride = STRIDE,
        .tx_stride = STRIDE,
        .headroom = HEADROOM,
        .continuation_offset = HEADROOM - HEADER,
        .tx_largest_frame = world->config.tx_largest_frame,
        .tx_max_pieces = world->config.tx_max_pieces,
        .queue_pairs = world->config.pairs,
        .offloads = world->config.offloads,
        .client_doorbell_fd = world->client_doorbell_fd,
        .driver_doorbell_fd = world->client_end_of_doorbell_fd,
    };
    CHECK_EQ(nb_client_init(client), 0);
    client->rx_active_taken = client->rx_free_put = world->config.ring_position;
    client->tx_active_put = client->tx_done_taken = world->config.ring_position;
}

static bool ring_has(const char *feature)
{
    const char *named = getenv("CORE_RING");
    return named && strstr(named, feature);
}

void world_open(struct world *world, struct world_config config)
{
    config.ring.packed |= ring_has("packed");
    config.ring.event_idx |= ring_has("event_idx");
    config.ring.indirect |= ring_has("indirect");
    config.ring.in_order |= ring_has("in_order");
    config.ring.notification_data |= ring_has("notification_data");
    config.rx_size = (uint16_t)or_default(config.rx_size, 64);
    config.tx_size = (uint16_t)or_default(config.tx_size, 64);
    config.rx_count = or_default(config.rx_count, 128);
    config.tx_count = or_default(config.tx_count, 64);
    config.max_pieces = or_default(config.max_pieces, 1);
    config.tx_max_pieces = or_default(config.tx_max_pieces, 1);
    config.tx_largest_frame = or_default(config.tx_largest_frame, config.tx_max_pieces * ROOM);
    config.pairs = or_default(config.pairs, 1);
    config.client_limit = or_default(config.client_limit, config.rx_count);
    config.burst = or_default(config.burst, 64);
    *world = (struct world){.config = config};
    open_memory(world);
    open_fds(world);
    open_device(world);
    open_pump(world);
    open_client(world);
    nb_pump_prime(world->pump);
}

void world_close(struct world *world)
{
    if (world->device.violation[0])
        FAIL("the device saw: %s", world->device.violation);
    for (uint32_t i = 1; i < world->config.pairs; i++)
        if (world->more[i - 1].device.violation[0])
            FAIL("the device of pair %u saw: %s", i, world->more[i - 1].device.violation);
    world_check_books(world);
    world_discard(world);
}

void world_discard(struct world *world)
{
    nb_pump_free(world->pump);
    nb_ledger_free(world->rx_ledger);
    nb_ledger_free(world->tx_ledger);
    nb_virtqueue_free(world->rx_queue);
    nb_virtqueue_free(world->tx_queue);
    for (uint32_t i = 1; i < world->config.pairs; i++)
        close_pair(&world->more[i - 1]);
    fake_detach(&world->device);
    nb_client_close(&world->client);
    close_fds(world);
    struct shared *all[] = {&world->rx,        &world->tx,        &world->header,   &world->rings[0], &world->rings[1],
                            &world->rings[2], &world->rings[3], &world->rx_memory, &world->tx_memory};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++)
        stop_sharing(all[i]);
}

void world_check_books(const struct world *world)
{
    const char *wrong = white_box_audit(world->pump);
    if (wrong)
        FAIL("the books: %s", wrong);
}

/* ---- Running the pump ----------------------------------------------------------------------------------------- */

struct nb_pump_result world_pump(struct world *world)
{
    struct nb_pump_result result;
    eventfd_t value;
    uint64_t sleeps = world->counters.sleeps;
    CHECK_EQ(eventfd_write(world->control_fd, 1), 0);
    do
        nb_pump_run(world->pump, &result);
    while (result.event == NB_EVENT_CONTROL && world->counters.sleeps == sleeps);
    CHECK_EQ(eventfd_read(world->control_fd, &value), 0);
    return result;
}

void world_pump_idle(struct world *world)
{
    struct nb_pump_result result = world_pump(world);
    if (result.event != NB_EVENT_CONTROL)
        FAIL("the pump came back with event %d, detail %d", result.event, result.detail);
    if (world->device.violation[0])
        FAIL("the device saw: %s", world->device.violation);
    world_check_books(world);
}

static void expect_counted(const uint64_t *counters, int count, int which)
{
    for (int i = 0; i < count; i++)
        CHECK_EQ(counters[i], i == which);
}

void world_expect_client_fault(struct world *world, enum nb_refusal refusal)
{
    struct nb_pump_result result = world_pump(world);
    CHECK_EQ(result.event, NB_EVENT_CLIENT_FAULT);
    CHECK_EQ(result.detail, refusal);
    expect_counted(world->counters.refused_handles, NB_REFUSALS, (int)refusal);
    expect_counted(world->counters.device_faults, NB_FAULTS, -1);
    world_check_books(world);
}

void world_expect_device_fault(struct world *world, enum nb_device_fault fault)
{
    struct nb_pump_result result = world_pump(world);
    CHECK_EQ(result.event, NB_EVENT_DEVICE_FAULT);
    CHECK_EQ(result.detail, fault);
    expect_counted(world->counters.device_faults, NB_FAULTS, (int)fault);
    expect_counted(world->counters.refused_handles, NB_REFUSALS, -1);
}

static void *run_pump(void *argument)
{
    struct world *world = argument;
    struct timespec cpu;
    nb_pump_run(world->pump, &world->result);
    drain_stores();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &cpu);
    world->pump_cpu_seconds = (double)cpu.tv_sec + (double)cpu.tv_nsec / 1e9;
    __atomic_store_n(&world->pump_came_back, true, __ATOMIC_RELEASE);
    return NULL;
}

void world_start_pump(struct world *world)
{
    world->pump_came_back = false;
    CHECK_EQ(pthread_create(&world->pump_thread, NULL, run_pump, world), 0);
}

void world_stop_pump(struct world *world)
{
    eventfd_t value;
    CHECK_EQ(eventfd_write(world->control_fd, 1), 0);
    CHECK_EQ(pthread_join(world->pump_thread, NULL), 0);
    CHECK_EQ(eventfd_read(world->control_fd, &value), 0);
}

/* ---- Frames --------------------------------------------------------------------------------------------------- */

static uint8_t frame_byte(uint64_t number, uint32_t at)
{
    return (uint8_t)(number * 167 + (number >> 8) * 59 + at * 7 + (at >> 8) * 3);
}

void frame_make(uint8_t *frame, uint64_t number, uint32_t len)
{
    for (uint32_t i = 0; i < len; i++)
        frame[i] = frame_byte(number, i);
}

bool frame_is(const uint8_t *frame, uint64_t number, uint32_t len, bool reflected)
{
    for (uint32_t i = 0; i < len; i++) {
        uint32_t original = !reflected || i >= 12 ? i : i < 6 ? i + 6 : i - 6;
        if (frame[i] != frame_byte(number, original))
            return false;
    }
    return true;
}

uint32_t frame_length(uint64_t number)
{
    return SHORTEST + (uint32_t)(number * 389 % (ROOM - SHORTEST + 1));
}

void deliver(struct world *world, uint64_t number, uint32_t len)
{
    uint8_t frame[65536];
    CHECK(len <= sizeof(frame));
    frame_make(frame, number, len);
    if (!fake_deliver(&world->device, frame, len))
        FAIL("the device cannot deliver %u bytes with %u buffers available%s%s", len, fake_available(&world->device.rx),
             world->device.violation[0] ? ": " : "", world->device.violation);
}

struct nb_piece receive_one(struct world *world, uint64_t number, uint32_t len)
{
    struct nb_piece piece;
    CHECK_EQ(nb_client_receive(&world->client, &piece, 1), 1);
    CHECK_EQ(piece.flags, 0);
    CHECK_EQ(piece.len, len);
    CHECK(frame_is(piece.data, number, len, false));
    return piece;
}

void release_one(struct world *world, struct nb_piece piece)
{
    nb_client_release(&world->client, &piece, 1);
    nb_client_flush(&world->client);
}

struct nb_piece obtain(struct world *world, uint64_t number, uint32_t len)
{
    deliver(world, number, len);
    world_pump_idle(world);
    return receive_one(world, number, len);
}

void forward_on(struct world *world, struct nb_piece piece, uint8_t pair)
{
    piece.queue = pair;
    nb_client_forward(&world->client, &piece, 1);
    nb_client_flush(&world->client);
}

struct nb_piece send_one(struct world *world, uint64_t number, uint32_t len)
{
    struct nb_piece piece;
    CHECK_EQ(nb_client_allocate(&world->client, &piece, 1), 1);
    CHECK_EQ(piece.len, ROOM);
    frame_make(piece.data, number, len);
    piece.len = len;
    piece.flags = 0;
    nb_client_send(&world->client, &piece, 1);
    nb_client_flush(&world->client);
    return piece;
}

uint32_t tx_room(const struct world *world)
{
    return world->config.ring.indirect ? world->config.tx_size : world->config.tx_size / 2; /* header and frame */
}

void transmit_one(struct world *world, uint64_t number, uint32_t len)
{
    uint8_t frame[65536];
    uint32_t sent;
    struct fake_chain chain;
    CHECK(fake_collect(&world->device, &chain, frame, &sent));
    CHECK_EQ(sent, len);
    CHECK(frame_is(frame, number, len, false));
    fake_complete(&world->device, &chain);
}

/* ---- A client without rules ----------------------------------------------------------------------------------- */

void forge_entry(struct world *world, enum world_ring ring, uint32_t position, struct nb_entry entry)
{
    struct nb_ring_place place = place_ring(world, ring, true);
    ((struct nb_entry *)(place.header + 1))[position & (place.slots - 1)] = entry;
}

void forge_produced(struct world *world, enum world_ring ring, uint32_t produced)
{
    __atomic_store_n(&place_ring(world, ring, true).header->produced, produced, __ATOMIC_RELEASE);
}

uint64_t forge_handle(uint16_t session, uint16_t lease, uint8_t region, uint32_t index)
{
    return (uint64_t)session << 48 | (uint64_t)lease << 32 | (uint64_t)region << 24 | index;
}

bool is_rung(int doorbell_fd)
{
    struct pollfd look = {.fd = doorbell_fd, .events = POLLIN};
    return poll(&look, 1, 0) == 1;
}

void world_expect_sent(struct world *world, uint8_t fill, uint32_t len, unsigned descriptors, const void *header)
{
    static const uint8_t nothing[HEADER];
    uint8_t frame[65536];
    uint32_t sent;
    struct fake_chain chain;
    CHECK(fake_collect(&world->device, &chain, frame, &sent));
    CHECK_EQ(chain.segments, descriptors);
    CHECK_EQ(sent, len);
    CHECK_EQ(memcmp(world->device.sent_header, header ? header : nothing, HEADER), 0);
    for (uint32_t i = 0; i < len; i++)
        CHECK_EQ(frame[i], fill);
    fake_complete(&world->device, &chain);
}
