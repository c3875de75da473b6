/* The echo service's loop, and an example of a client: every frame goes back to its sender, the MAC addresses exchanged.
 *
 * The one copy is the service's own, from an RX to a TX buffer: the regions differ because a client may send from the one
 * and not from the other.
 */
#include <poll.h>
#include <stdbool.h>
#include <string.h>

#include "core.h"
#include "counting.h"

enum { BURST = NB_MOST_PIECES, BURSTS_BETWEEN_LOOKS = 256, MAC_BYTES = 6 };

/* The first `count` of the array are there, in order. */
struct pieces {
    struct nb_piece at[BURST];
    uint32_t count;
};

static void forget_first(struct pieces *pieces, uint32_t count)
{
    pieces->count -= count;
    if (pieces->count)
        memmove(pieces->at, pieces->at + count, pieces->count * sizeof(pieces->at[0]));
}

static void exchange_addresses(uint8_t *frame)
{
    uint8_t destination[MAC_BYTES];
    memcpy(destination, frame, MAC_BYTES);
    memcpy(frame, frame + MAC_BYTES, MAC_BYTES);
    memcpy(frame + MAC_BYTES, destination, MAC_BYTES);
}

/* How many of the pieces from `first` on are the next frame; 0: its end has not come yet. */
static uint32_t next_frame(const struct pieces *received, uint32_t first, uint64_t *bytes)
{
    *bytes = 0;
    for (uint32_t i = first; i < received->count; i++) {
        *bytes += received->at[i].len;
        if (!(received->at[i].flags & NB_MORE))
            return i + 1 - first;
    }
    return 0;
}

/* Copies a frame of `bytes` into as many replies as it takes. */
static void reflect(const struct nb_piece *from, struct nb_piece *to, uint64_t bytes)
{
    struct nb_piece *first = to;
    uint32_t taken = 0, filled = 0;
    uint32_t room = to->len;
    while (bytes != 0) {
        uint32_t part = from->len - taken < room - filled ? from->len - taken : room - filled;
        memcpy(to->data + filled, from->data + taken, part);
        bytes -= part;
        taken += part;
        filled += part;
        if (taken == from->len) {
            from++;
            taken = 0;
        }
        if (bytes == 0 || filled == room) {
            to->len = filled;
            to->flags = (uint8_t)((to == first ? 0 : NB_CONTINUATION) | (bytes ? NB_MORE : 0));
            to->queue = first->queue;
            filled = 0;
            if (bytes)
                room = (++to)->len;
        }
    }
    if (first->len >= 2 * MAC_BYTES)
        exchange_addresses(first->data);
}

/* Sends back the whole frames, as far as there are buffers; those that may not be sent are counted. */
static void reflect_burst(struct nb_client *client, struct pieces *received, struct pieces *replies,
                          struct nb_echo_counts *counts)
{
    uint32_t done = 0, used = 0, pieces;
    uint64_t bytes;
    while ((pieces = next_frame(received, done, &bytes)) != 0) {
        uint64_t room = 0;
        uint32_t needed = 0;
        while (room < bytes && needed < client->tx_max_pieces && used + needed < replies->count)
            room += replies->at[used + needed++].len;
        if (bytes > client->tx_largest_frame || bytes == 0 || (room < bytes && needed == client->tx_max_pieces)) {
            counts->unsendable++;
        } else if (room < bytes) {
            break;
        } else {
            replies->at[used].queue = received->at[done].queue;
            reflect(&received->at[done], &replies->at[used], bytes);
            counts->frames++;
            counts->bytes += bytes;
            used += needed;
        }
        done += pieces;
    }
    nb_client_send(client, replies->at, used);
    nb_client_release(client, received->at, done);
    nb_client_flush(client);
    forget_first(replies, used);
    forget_first(received, done);
}

static bool is_readable(int fd)
{
    struct pollfd look = {.fd = fd, .events = POLLIN};
    return poll(&look, 1, 0) > 0;
}

/* Takes what there is into `pieces`, as far as there is room. */
static int add(int (*take)(struct nb_client *, struct nb_piece *, uint32_t), struct nb_client *client, struct pieces *pieces)
{
    int count = pieces->count < BURST ? take(client, pieces->at + pieces->count, BURST - pieces->count) : 0;
    if (count > 0)
        pieces->count += (uint32_t)count;
    return count;
}

int nb_client_echo(struct nb_client *client, int control_fd, struct nb_echo_counts *counts)
{
    struct pieces received = {.count = 0};
    struct pieces replies = {.count = 0};
    for (;;) {
        int allocated = add(nb_client_allocate, client, &replies);
        int came = add(nb_client_receive, client, &received);
        uint64_t bytes;
        bool whole = next_frame(&received, 0, &bytes) != 0;
        if (allocated < 0 || came < 0 || (received.count == BURST && !whole))
            return -1;
        if (came > 0 || (allocated > 0 && whole)) {
            reflect_burst(client, &received, &replies, counts);
            counts->bursts++;
            if (counts->bursts % BURSTS_BETWEEN_LOOKS != 0 || !is_readable(control_fd))
                continue;
            break;
        }
        /* What came and cannot go yet waits for buffers. */
        int found = nb_client_wait(client, (whole ? NB_WAIT_ALLOCATE : NB_WAIT_RECEIVE) | NB_WAIT_CONTROL, control_fd, -1);
        if (found & NB_WAIT_FAILED)
            return -1;
        if (found & NB_WAIT_CONTROL)
            break;
    }
    /* The caller may come back, and nobody else has them. */
    nb_client_unreceive(client, received.count);
    nb_client_unallocate(client, replies.count);
    return 0;
}
