/* The client's side of the port: what a network stack calls (docs/port.md).
 *
 * The driver is trusted more than a client is, but a handle or a length out of bounds would still make this process read
 * what it should not, so both are checked before they become a pointer.
 */
#include <stddef.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "capture.h"
#include "core.h"
#include "counting.h"
#include "net_header.h"
#include "port_ring.h"

/* The client sleeps in an epoll instance of its own, which has the doorbell edge-triggered: each ring is one event, so that
 * a bell needs no quietening, and a wait is one system call. */
enum source { SOURCE_DOORBELL, SOURCE_CONTROL, SOURCES };

static int watch(const struct nb_client *client, int fd, uint32_t events, enum source source)
{
    struct epoll_event event = {.events = events, .data.u32 = source};
    return epoll_ctl(client->wait_fd, EPOLL_CTL_ADD, fd, &event);
}

void nb_client_close(struct nb_client *client)
{
    if (client->wait_fd >= 0)
        close(client->wait_fd);
    client->wait_fd = -1;
}

static bool open_wait(struct nb_client *client)
{
    client->watched_fd = -1;
    client->wait_fd = epoll_create1(EPOLL_CLOEXEC);
    if (client->wait_fd >= 0 && watch(client, client->driver_doorbell_fd, EPOLLIN | EPOLLET, SOURCE_DOORBELL) == 0)
        return true;
    nb_client_close(client);
    return false;
}

static bool region_is_valid(const uint8_t *base, uint32_t count, uint32_t stride, uint32_t headroom)
{
    return base != NULL && count != 0 && count <= MOST_BUFFERS && stride > headroom;
}

int nb_client_init(struct nb_client *client)
{
    bool valid = region_is_valid(client->rx_base, client->rx_count, client->rx_stride, client->headroom) &&
                 region_is_valid(client->tx_base, client->tx_count, client->tx_stride, client->headroom) &&
                 client->continuation_offset <= client->headroom &&
                 (!client->offloads || client->headroom >= NB_NET_HEADER_BYTES) && client->queue_pairs != 0 &&
                 client->tx_max_pieces != 0 &&
                 client->tx_max_pieces <= client->tx_count && client->tx_max_pieces <= NB_MOST_PIECES && client->tx_largest_frame != 0 &&
                 ring_is_valid(&client->rx_active, client->rx_count) &&
                 ring_is_valid(&client->rx_free, client->rx_count) &&
                 ring_is_valid(&client->tx_active, client->tx_count + client->rx_count) &&
                 ring_is_valid(&client->tx_done, client->tx_count);
    client->rx_active_taken = 0;
    client->rx_free_put = 0;
    client->tx_active_put = 0;
    client->tx_done_taken = 0;
    client->rx_unreceived = 0;
    client->rx_frame_open = false;
    client->doorbells_sent = 0;
    client->doorbells_suppressed = 0;
    client->wait_fd = -1;
    if (!valid)
        return -1;
    return open_wait(client) ? 0 : -2;
}

/* Turns an entry into a piece; false: out of bounds. */
static bool locate(const struct nb_entry *entry, uint8_t region, uint8_t *base, uint32_t count, uint32_t stride,
                   uint32_t offset, struct nb_piece *piece)
{
    uint32_t index = (uint32_t)entry->dma_handle & 0xffffff;
    if ((uint8_t)(entry->dma_handle >> 24) != region || index >= count || entry->len > stride - offset)
        return false;
    *piece = (struct nb_piece){
        .dma_handle = entry->dma_handle,
        .data = base + (uint64_t)index * stride + offset,
        .len = entry->len,
        .flags = entry->flags,
        .queue = entry->queue,
    };
    return true;
}

static int64_t takeable(const struct nb_ring_place *ring, uint32_t taken, uint32_t most)
{
    int64_t waiting = ring_waiting(ring, taken);
    return waiting > most ? most : waiting;
}

/* Whether a frame's entries follow each other as they must. */
static bool is_in_order(const struct nb_client *client, const struct nb_entry *entry)
{
    bool begins = !(entry->flags & NB_CONTINUATION);
    uint8_t known = NB_MORE | NB_CONTINUATION | (begins && client->offloads & RX_OFFLOADS ? NB_HEADER : 0);
    return begins != client->rx_frame_open && !(entry->flags & ~known) && entry->queue < client->queue_pairs;
}

int nb_client_receive(struct nb_client *client, struct nb_piece *pieces, uint32_t most)
{
    int64_t count = takeable(&client->rx_active, client->rx_active_taken, most);
    for (int64_t i = 0; i < count; i++) {
        struct nb_entry entry = ring_take(&client->rx_active, &client->rx_active_taken);
        uint32_t offset = entry.flags & NB_CONTINUATION ? client->continuation_offset : client->headroom;
        if (entry.kind != NB_RX_PACKET || !is_in_order(client, &entry) ||
            !locate(&entry, NB_REGION_RX, client->rx_base, client->rx_count, client->rx_stride, offset, &pieces[i]))
            return -1;
        client->rx_frame_open = entry.flags & NB_MORE;
    }
    if (count > 0) {
        ring_consumed(&client->rx_active, client->rx_active_taken);
        uint32_t again = client->rx_unreceived < count ? client->rx_unreceived : (uint32_t)count;
        client->rx_unreceived -= again;
        if (client->capture)
            capture_pieces(client->capture, CAPTURE_INBOUND, pieces + again, (uint32_t)count - again);
    }
    return (int)count;
}

/* As for nb_client_unallocate. */
void nb_client_unreceive(struct nb_client *client, uint32_t count)
{
    client->rx_active_taken -= count;
    client->rx_unreceived += count;
    client->rx_frame_open = false;
    ring_consumed(&client->rx_active, client->rx_active_taken);
}

void nb_client_release(struct nb_client *client, const struct nb_piece *pieces, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        ring_put(&client->rx_free, &client->rx_free_put,
                 (struct nb_entry){.dma_handle = pieces[i].dma_handle, .kind = NB_RX_PACKET});
    ring_publish(&client->rx_free, client->rx_free_put);
}

int nb_client_allocate(struct nb_client *client, struct nb_piece *pieces, uint32_t most)
{
    int64_t count = takeable(&client->tx_done, client->tx_done_taken, most);
    for (int64_t i = 0; i < count; i++) {
        struct nb_entry entry = ring_take(&client->tx_done, &client->tx_done_taken);
        if (entry.kind != NB_TX_PACKET_ACK || !locate(&entry, NB_REGION_TX, client->tx_base, client->tx_count,
                                                      client->tx_stride, client->headroom, &pieces[i]))
            return -1;
    }
    if (count > 0)
        ring_consumed(&client->tx_done, client->tx_done_taken);
    return (int)count;
}

/* The entries are still in the ring: the driver puts one into a buffer's place only after the buffer came back. */
void nb_client_unallocate(struct nb_client *client, uint32_t count)
{
    client->tx_done_taken -= count;
    ring_consumed(&client->tx_done, client->tx_done_taken);
}

/* `flags`: those that are sent as they stand. */
static inline void send_pieces(struct nb_client *client, const struct nb_piece *pieces, uint32_t count, uint8_t flags)
{
    /* Before they are the driver's, which may give them to be overwritten at once. */
    if (client->capture)
        capture_pieces(client->capture, CAPTURE_OUTBOUND, pieces, count);
    for (uint32_t i = 0; i < count; i++)
        ring_put(&client->tx_active, &client->tx_active_put,
                 (struct nb_entry){
                     .dma_handle = pieces[i].dma_handle,
                     .len = pieces[i].len,
                     .kind = NB_TX_PACKET,
                     .flags = pieces[i].flags & flags,
                     .queue = pieces[i].queue,
                 });
    ring_publish(&client->tx_active, client->tx_active_put);
}

void nb_client_send(struct nb_client *client, const struct nb_piece *pieces, uint32_t count)
{
    send_pieces(client, pieces, count, UINT8_MAX);
}

void nb_client_forward(struct nb_client *client, const struct nb_piece *pieces, uint32_t count)
{
    send_pieces(client, pieces, count, (uint8_t)~NB_HEADER);
}

void nb_client_flush(struct nb_client *client)
{
    bool for_buffers = ring_must_wake(&client->rx_free);
    bool for_frames = ring_must_wake(&client->tx_active);
    if (for_buffers || for_frames) {
        doorbell_ring(client->client_doorbell_fd);
        client->doorbells_sent++;
    } else {
        client->doorbells_suppressed++;
    }
}

static int already_there(const struct nb_client *client, int wanted)
{
    int found = 0;
    if (wanted & NB_WAIT_RECEIVE && ring_waiting(&client->rx_active, client->rx_active_taken) != 0)
        found |= NB_WAIT_RECEIVE;
    if (wanted & NB_WAIT_ALLOCATE && ring_waiting(&client->tx_done, client->tx_done_taken) != 0)
        found |= NB_WAIT_ALLOCATE;
    return found;
}

static void arm(struct nb_client *client, int wanted)
{
    if (wanted & NB_WAIT_RECEIVE)
        ring_arm(&client->rx_active);
    if (wanted & NB_WAIT_ALLOCATE)
        ring_arm(&client->tx_done);
}

static void disarm(struct nb_client *client, int wanted)
{
    if (wanted & NB_WAIT_RECEIVE)
        ring_disarm(&client->rx_active);
    if (wanted & NB_WAIT_ALLOCATE)
        ring_disarm(&client->tx_done);
}

static void account_wakeup(struct nb_client *client)
{
    uint64_t now = now_ns();
    uint64_t rung = load_once_64(&client->rx_active.header->doorbell_ns);
    store_once_64(&client->rx_active.header->woken_ns, now);
    if (client->wakeups && rung != 0 && rung <= now)
        nb_histogram_add(client->wakeups, now - rung);
}

int nb_client_watch(struct nb_client *client, int control_fd)
{
    int before = client->watched_fd;
    if (control_fd == before || control_fd == NB_WATCH_FAILED)
        return before;
    if (control_fd >= 0 && watch(client, control_fd, EPOLLIN, SOURCE_CONTROL) < 0)
        return NB_WATCH_FAILED;
    if (before >= 0)
        (void)!epoll_ctl(client->wait_fd, EPOLL_CTL_DEL, before, NULL);
    client->watched_fd = control_fd;
    return before;
}

int nb_client_wait(struct nb_client *client, int wanted, int timeout_ms)
{
    /* No time for the loop's second turn: a doorbell left over from an earlier sleep may end a bounded wait early. */
    for (;;) {
        struct epoll_event events[SOURCES];
        arm(client, wanted);
        fence_store_load(); /* pairs with the one in ring_must_wake */
        int found = already_there(client, wanted);
        int ready = epoll_wait(client->wait_fd, events, SOURCES, found ? 0 : timeout_ms);
        disarm(client, wanted);
        if (ready < 0)
            return errno == EINTR && wanted & NB_WAIT_CONTROL ? NB_WAIT_CONTROL : NB_WAIT_FAILED;
        for (int i = 0; i < ready; i++) {
            if (events[i].data.u32 == SOURCE_CONTROL)
                found |= NB_WAIT_CONTROL;
            else
                account_wakeup(client);
        }
        found |= already_there(client, wanted);
        if (found || timeout_ms >= 0)
            return found;
    }
}
