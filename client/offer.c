/* What WELCOME offers: five file descriptors and a page of numbers. All of it is checked, then mapped. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "internal.h"
#include "net_header.h"

_Static_assert(__BYTE_ORDER == __LITTLE_ENDIAN, "rings and messages are little-endian");

enum {
    PAGE = 4096,
    RING_ALIGNMENT = 128,
    ENTRY_BYTES = sizeof(struct nb_entry),
    RING_HEADER_BYTES = sizeof(struct nb_ring_header),
    STRIDE_ALIGNMENT = 64,
    MOST_STRIDE = 1 << 20,
    LEAST_ROOM = 60,
    READ_ONLY = 1,
    MOST_PAIRS = 256,
    SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL,
};
#define MOST_REGION_BYTES (UINT64_C(1) << 40)

enum { RX_ACTIVE, RX_FREE, TX_ACTIVE, TX_DONE, RINGS };
static const char *const RING_NAMES[] = {"rx_active", "rx_free", "tx_active", "tx_done"};
static const char *const REGION_NAMES[] = {"rx", "tx"};

/* The layouts of docs/port.md. */
struct ring {
    uint64_t offset;
    uint32_t slots;
    uint32_t reserved;
};
struct region {
    uint64_t size;
    uint32_t buffers;
    uint32_t stride;
    uint32_t flags;
    uint32_t reserved;
};
struct offer {
    uint8_t facts[16];
    uint16_t session;
    uint16_t queue_pairs;
    uint32_t headroom;
    uint32_t continuation_offset;
    uint32_t rx_limit;
    uint64_t offloads;
    uint64_t rings_size;
    uint32_t tx_largest;
    uint32_t tx_pieces;
    struct ring rings[RINGS];
    struct region regions[2];
};
_Static_assert(sizeof(struct offer) == WELCOME_BYTES - HEADER_BYTES, "WELCOME as docs/port.md has it");

#define REFUSE(...) return broken(port, NETBRIDGE_REASON_GEOMETRY, __VA_ARGS__)

static bool size_is_valid(uint64_t size) { return size >= PAGE && size <= MOST_REGION_BYTES && size % PAGE == 0; }

/* The end of a ring whose offset and slots have been bounded. */
static uint64_t ring_end(const struct ring *ring)
{
    return ring->offset + RING_HEADER_BYTES + (uint64_t)ENTRY_BYTES * ring->slots;
}

/* How many buffers can be in a ring at one time. Also what was received can be sent. */
static uint64_t buffers_in(const struct offer *offer, int ring)
{
    uint64_t rx = offer->regions[0].buffers, tx = offer->regions[1].buffers;
    return (ring == TX_DONE ? 0 : rx) + (ring >= TX_ACTIVE ? tx : 0);
}

static int check_rings(struct netbridge *port, const struct offer *offer)
{
    if (!size_is_valid(offer->rings_size))
        REFUSE("rings region: size is no multiple of %d in bounds", PAGE);
    for (int i = 0; i < RINGS; i++) {
        const struct ring *ring = &offer->rings[i];
        const char *name = RING_NAMES[i];
        if (ring->reserved != 0)
            REFUSE("ring %s: reserved field is not zero", name);
        if (ring->offset > MOST_REGION_BYTES || ring->offset % RING_ALIGNMENT)
            REFUSE("ring %s: offset is not a multiple of %d in bounds", name, RING_ALIGNMENT);
        if (ring->slots == 0 || ring->slots > MOST_BUFFERS || ring->slots & (ring->slots - 1))
            REFUSE("ring %s: %u slots is no power of two in bounds", name, ring->slots);
        if (ring_end(ring) > offer->rings_size)
            REFUSE("ring %s ends beyond the rings region", name);
        if (ring->slots < buffers_in(offer, i))
            REFUSE("ring %s: %u slots cannot hold its buffers", name, ring->slots);
        for (int j = 0; j < i; j++)
            if (ring->offset < ring_end(&offer->rings[j]) && offer->rings[j].offset < ring_end(ring))
                REFUSE("rings %s and %s overlap", RING_NAMES[j], name);
    }
    return 0;
}

static int check_regions(struct netbridge *port, const struct offer *offer)
{
    for (int i = 0; i < 2; i++) {
        const struct region *region = &offer->regions[i];
        const char *name = REGION_NAMES[i];
        if (region->reserved != 0 || region->flags & ~(uint32_t)READ_ONLY)
            REFUSE("%s region: unknown flags", name);
        if (!size_is_valid(region->size))
            REFUSE("%s region: size is no multiple of %d in bounds", name, PAGE);
        if (region->buffers == 0 || region->buffers > MOST_BUFFERS)
            REFUSE("%s region: %u buffers is not in bounds", name, region->buffers);
        if (region->stride == 0 || region->stride > MOST_STRIDE || region->stride % STRIDE_ALIGNMENT)
            REFUSE("%s region: stride %u is no multiple of %d in bounds", name, region->stride, STRIDE_ALIGNMENT);
        if ((uint64_t)region->buffers * region->stride > region->size)
            REFUSE("%s region: %u buffers of %u bytes do not fit", name, region->buffers, region->stride);
        if (offer->headroom > region->stride - LEAST_ROOM)
            REFUSE("headroom %u leaves no room in %s buffers of %u", offer->headroom, name, region->stride);
    }
    if (offer->continuation_offset > offer->headroom)
        REFUSE("continuation_offset %u is beyond headroom %u", offer->continuation_offset, offer->headroom);
    if (offer->regions[1].flags & READ_ONLY)
        REFUSE("tx region is read-only: a client could not write the frames it sends");
    if (offer->rx_limit == 0 || offer->rx_limit > offer->regions[0].buffers)
        REFUSE("rx_limit %u is not between 1 and the %u RX buffers", offer->rx_limit, offer->regions[0].buffers);
    return 0;
}

/* How long a sent frame may be, and of how many buffers. After check_regions. */
static int check_longest_frame(struct netbridge *port, const struct offer *offer)
{
    const struct region *tx = &offer->regions[1];
    uint32_t room = tx->stride - offer->headroom;
    uint32_t most = tx->buffers < NB_MOST_PIECES ? tx->buffers : NB_MOST_PIECES;
    if (offer->tx_pieces == 0 || offer->tx_pieces > most)
        REFUSE("tx_pieces %u is not between 1 and %u", offer->tx_pieces, most);
    if (offer->tx_largest < room || offer->tx_largest > (uint64_t)room * offer->tx_pieces)
        REFUSE("tx_largest %u is not between %u and what %u buffers of that hold", offer->tx_largest, room,
               offer->tx_pieces);
    return 0;
}

/* Memory that could shrink would end its reader with SIGBUS: seals first, then the size. */
static int check_memfd(struct netbridge *port, int fd, uint64_t size, const char *name)
{
    struct stat status;
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0)
        REFUSE("%s region: not a memfd that can be sealed", name);
    if ((seals & SEALS) != SEALS)
        REFUSE("%s region: not sealed, its size could change under a reader", name);
    if (fstat(fd, &status) < 0 || !S_ISREG(status.st_mode) || (uint64_t)status.st_size != size)
        REFUSE("%s region: its memfd does not have the size it is said to have", name);
    return 0;
}

static int check_doorbells(struct netbridge *port)
{
    struct epoll_event event;
    int flags = fcntl(port->fds[CLIENT_DOORBELL_FD], F_GETFL);
    if (flags < 0 || !(flags & O_NONBLOCK))
        REFUSE("client doorbell: not opened with O_NONBLOCK");
    if (epoll_wait(port->fds[DRIVER_DOORBELL_FD], &event, 1, 0) < 0)
        REFUSE("driver doorbell: no epoll instance");
    return 0;
}

/* `what` failed for a reason, in errno, that is none of the driver's. */
static int no_resources(struct netbridge *port, const char *what)
{
    int reason = errno;
    control_bye(port, NETBRIDGE_REASON_FAILED, what);
    return fail(port, NETBRIDGE_SYSTEM, reason, "%s: %s", what, strerror(reason));
}

static int map(struct netbridge *port, struct mapping *mapping, int fd, uint64_t size, bool writable)
{
    void *address = mmap(NULL, size, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED, fd, 0);
    if (address == MAP_FAILED)
        return no_resources(port, "cannot map the driver's memory");
    *mapping = (struct mapping){address, size};
    return 0;
}

int take_offer(struct netbridge *port, const struct message *welcome)
{
    static const char *const MEMORY_NAMES[] = {"rings", "rx", "tx"};
    struct offer offer;
    int error;
    memcpy(&offer, welcome->bytes + HEADER_BYTES, sizeof(offer));
    if (offer.session == 0 || offer.queue_pairs == 0 || offer.queue_pairs > MOST_PAIRS ||
        !read_facts(offer.facts, &port->facts))
        return broken(port, NETBRIDGE_REASON_MALFORMED, "WELCOME with a session, queue pairs or facts that may not be");
    if (offer.offloads & ~(uint64_t)(TX_OFFLOADS | RX_OFFLOADS))
        return broken(port, NETBRIDGE_REASON_MALFORMED, "WELCOME with offloads that nobody knows");
    if (offer.offloads & ~port->asked_offloads)
        REFUSE("offloads %#llx, of which only %#llx were asked for", (unsigned long long)offer.offloads,
               (unsigned long long)port->asked_offloads);
    if ((error = check_regions(port, &offer)) || (error = check_longest_frame(port, &offer)) ||
        (error = check_rings(port, &offer)))
        return error;
    const uint64_t sizes[] = {offer.rings_size, offer.regions[0].size, offer.regions[1].size};
    for (int i = 0; i < 3; i++)
        if ((error = check_memfd(port, port->fds[i], sizes[i], MEMORY_NAMES[i])))
            return error;
    if ((error = check_doorbells(port)))
        return error;
    for (int i = 0; i < 3; i++)
        if ((error = map(port, &port->mappings[i], port->fds[i], sizes[i],
                         !(i == RX_FD && offer.regions[0].flags & READ_ONLY))))
            return error;
    struct nb_client *native = &port->native;
    struct nb_ring_place *places[] = {&native->rx_active, &native->rx_free, &native->tx_active, &native->tx_done};
    uint8_t *rings = port->mappings[RINGS_FD].address;
    for (int i = 0; i < RINGS; i++)
        *places[i] = (struct nb_ring_place){(struct nb_ring_header *)(rings + offer.rings[i].offset), offer.rings[i].slots};
    native->rx_base = port->mappings[RX_FD].address;
    native->rx_writable = !(offer.regions[0].flags & READ_ONLY);
    native->tx_base = port->mappings[TX_FD].address;
    native->rx_count = offer.regions[0].buffers;
    native->tx_count = offer.regions[1].buffers;
    native->rx_stride = offer.regions[0].stride;
    native->tx_stride = offer.regions[1].stride;
    native->headroom = offer.headroom;
    native->continuation_offset = offer.continuation_offset;
    native->client_doorbell_fd = port->fds[CLIENT_DOORBELL_FD];
    native->driver_doorbell_fd = port->fds[DRIVER_DOORBELL_FD];
    native->tx_largest_frame = offer.tx_largest;
    native->tx_max_pieces = offer.tx_pieces;
    native->queue_pairs = offer.queue_pairs;
    native->offloads = offer.offloads;
    port->session = offer.session;
    port->rx_limit = offer.rx_limit;
    int made = nb_client_init(native);
    if (made == -1)
        REFUSE("refused by the data path");
    return made == 0 ? 0 : no_resources(port, "cannot wait for the driver");
}
