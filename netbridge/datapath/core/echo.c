/* The echo service's loop, and an example of a client: every frame goes back to its sender, the MAC addresses exchanged.
 *
 * A frame that came in one piece is changed where it is, and forwarded. One that came in several, and any of a session
 * in which received frames can only be read, is copied into TX buffers.
 */
#include <poll.h>
#include <stdbool.h>
#include <string.h>

#include "core.h"
#include "counting.h"

enum { BURST = NB_MOST_PIECES, BURSTS_BETWEEN_LOOKS = 256, MAC_BYTES = 6, LEAST_FRAME = 14 };

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

/* What came of a burst so far: pieces of it, and of the replies, that are done with, and those of them that the driver
 * has. */
struct progress {
    uint32_t done;
    uint32_t returned;
    uint32_t used;
    uint32_t sent;
};

static void send_copies(struct nb_client *client, const struct pieces *received, const struct pieces *replies,
                        struct progress *at)
{
    nb_client_send(client, replies->at + at->sent, at->used - at->sent);
    nb_client_release(client, received->at + at->returned, at->done - at->returned);
    at->sent = at->used;
    at->returned = at->done;
}

/* How many pieces from `first` on are frames that can be sent from where they are. */
static uint32_t count_forwardable(const struct nb_client *client, const struct pieces *received, uint32_t first)
{
    uint32_t i = first;
    for (; client->rx_writable && i < received->count; i++) {
        const struct nb_piece *piece = &received->at[i];
        if (piece->flags & (NB_MORE | NB_CONTINUATION) || piece->len < LEAST_FRAME ||
            piece->len > client->tx_largest_frame)
            break;
    }
    return i - first;
}

static void forward(struct nb_client *client, struct pieces *received, struct progress *at, uint32_t count,
                    struct nb_echo_counts *counts)
{
    const struct nb_piece *pieces = received->at + at->done;
    for (uint32_t i = 0; i < count; i++) {
        exchange_addresses(pieces[i].data);
        counts->bytes += pieces[i].len;
    }
    counts->frames += count;
    counts->forwarded += count;
    nb_client_forward(client, pieces, count);
    at->done = at->returned = at->done + count;
}

/* Copies the next frame, of so many pieces, into replies; one that may not be sent is counted. False: there are too
 * few. */
static bool copy(struct nb_client *client, struct pieces *received, struct pieces *replies, struct progress *at,
                 uint32_t pieces, uint64_t bytes, struct nb_echo_counts *counts)
{
    uint64_t room = 0;
    uint32_t needed = 0;
    while (room < bytes && needed < client->tx_max_pieces && at->used + needed < replies->count)
        room += replies->at[at->used + needed++].len;
    if (bytes > client->tx_largest_frame || bytes == 0 || (room < bytes && needed == client->tx_max_pieces)) {
        counts->unsendable++;
    } else if (room < bytes) {
        return false;
    } else {
        replies->at[at->used].queue = received->at[at->done].queue;
        reflect(&received->at[at->done], &replies->at[at->used], bytes);
        counts->frames++;
        counts->bytes += bytes;
        at->used += needed;
    }
    at->done += pieces;
    return true;
}

/* Sends back the whole frames, in their order, as far as there are buffers. */
static void reflect_burst(struct nb_client *client, struct pieces *received, struct pieces *replies,
                          struct nb_echo_counts *counts)
{
    struct progress at = {0};
    uint64_t bytes;
    for (;;) {
        uint32_t count = count_forwardable(client, received, at.done);
        if (count) {
            send_copies(client, received, replies, &at);
            forward(client, received, &at, count, counts);
        }
        uint32_t pieces = next_frame(received, at.done, &bytes);
        if (pieces == 0 || !copy(client, received, replies, &at, pieces, bytes, counts))
            break;
    }
    send_copies(client, received, replies, &at);
    nb_client_flush(client);
    forget_first(replies, at.used);
    forget_first(received, at.done);
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

static int run(struct nb_client *client, int control_fd, struct nb_echo_counts *counts)
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
        int found = nb_client_wait(client, (whole ? NB_WAIT_ALLOCATE : NB_WAIT_RECEIVE) | NB_WAIT_CONTROL, -1);
        if (found & NB_WAIT_FAILED)
            return -2;
        if (found & NB_WAIT_CONTROL)
            break;
    }
    /* The caller may come back, and nobody else has them. */
    nb_client_unreceive(client, received.count);
    nb_client_unallocate(client, replies.count);
    return 0;
}

int nb_client_echo(struct nb_client *client, int control_fd, struct nb_echo_counts *counts)
{
    int before = nb_client_watch(client, control_fd);
    int result = before == NB_WATCH_FAILED ? -2 : run(client, control_fd, counts);
    nb_client_watch(client, before);
    return result;
}
