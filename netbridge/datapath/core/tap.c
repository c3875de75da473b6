/* The tap service's loop: frames between the port and a TAP device, so that the Linux stack is the one behind the port.
 *
 * A frame from the port goes into the TAP device with one writev, from DMA memory, whatever pieces it came in; one from
 * the TAP device is read with one readv into the DMA buffers that it is sent from. Either copy is the kernel's own.
 *
 * Every frame has a virtio header at the TAP device (linux/if_tun.h, IFF_VNET_HDR), of the same form as at the port. Neither
 * side's is believed: what the session has no offload for, or what does not fit its frame, goes no further.
 */
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core.h"
#include "net_header.h"

enum {
    BURST = 128, /* buffers, and frames */
    MOST_PIECES = sizeof(((struct nb_tap *)0)->partial) / sizeof(struct nb_piece),
    SPARES = BURST + MOST_PIECES,
    LEAST_FRAME = 14,
    ROUNDS_BETWEEN_LOOKS = 256,
};
_Static_assert((int)MOST_PIECES == NB_MOST_PIECES, "any frame that is sent fits the spares");
_Static_assert(sizeof(struct net_header) == NB_NET_HEADER_BYTES, "what TUNSETVNETHDRSZ was told");

/* One call of nb_client_tap. */
struct call {
    struct nb_client *client;
    struct nb_tap *tap;
    /* TX buffers that are this client's and not yet used, from `first` on. */
    struct nb_piece spare[SPARES];
    uint32_t first;
    uint32_t spares;
    int both_fd;    /* epoll: the TAP device and what the caller watches */
    bool hears_tap; /* of the TAP device it wants to know */
};

static int failed(const struct call *call)
{
    call->tap->error = errno;
    return -2;
}

/* Errors that say something of one frame, or of now; the others are the device's end. */
static bool is_refusal(int error)
{
    return error == EAGAIN || error == EINVAL || error == EIO || error == ENOBUFS || error == ENOMEM || error == EMSGSIZE;
}

/* The virtio header that goes with a received frame of `len` bytes. False: the device's is none. */
static bool received_header(const struct call *call, const struct nb_piece *first, uint32_t len, struct net_header *header)
{
    memset(header, 0, sizeof(*header));
    if (!(first->flags & NB_HEADER))
        return true;
    memcpy(header, first->data - NB_NET_HEADER_BYTES, sizeof(*header));
    return net_header_check_received(header, len, call->client->offloads);
}

/* Writes the frame in `partial`, and gives its buffers back. */
static bool write_frame(struct call *call)
{
    struct nb_tap *tap = call->tap;
    struct net_header header;
    struct iovec parts[1 + MOST_PIECES] = {{&header, sizeof(header)}};
    uint32_t len = 0;
    for (uint32_t i = 0; i < tap->pieces; i++) {
        parts[1 + i] = (struct iovec){tap->partial[i].data, tap->partial[i].len};
        len += tap->partial[i].len;
    }
    bool valid = received_header(call, &tap->partial[0], len, &header);
    ssize_t written = 0;
    if (valid)
        do
            written = writev(tap->fd, parts, (int)tap->pieces + 1);
        while (written < 0 && errno == EINTR);
    int error = written < 0 ? errno : 0;
    nb_client_release(call->client, tap->partial, tap->pieces);
    tap->pieces = 0;
    if (error && !is_refusal(error)) {
        tap->error = error;
        return false;
    }
    if (!valid) {
        tap->bad_headers++;
    } else if (error) {
        tap->refused++;
    } else {
        tap->frames_in++;
        tap->bytes_in += len;
    }
    return true;
}

/* Frames from the port into the TAP device. How many pieces came; -1: the driver broke the protocol; -2: `error`. */
static int inwards(struct call *call)
{
    struct nb_piece received[BURST];
    int count = nb_client_receive(call->client, received, BURST);
    for (int i = 0; i < count; i++) {
        bool goes_on = received[i].flags & NB_CONTINUATION;
        if (goes_on != (call->tap->pieces > 0) || call->tap->pieces == MOST_PIECES)
            return -1;
        call->tap->partial[call->tap->pieces++] = received[i];
        if (!(received[i].flags & NB_MORE) && !write_frame(call))
            return -2;
    }
    return count;
}

/* Fetches TX buffers when there are few. False: the driver broke the protocol. */
static bool fetch_spares(struct call *call)
{
    if (call->spares >= SPARES / 2)
        return true;
    memmove(call->spare, call->spare + call->first, call->spares * sizeof(call->spare[0]));
    call->first = 0;
    int allocated = nb_client_allocate(call->client, call->spare + call->spares, SPARES - call->spares);
    if (allocated < 0)
        return false;
    call->spares += (uint32_t)allocated;
    return true;
}

/* Spare buffers as places for the longest frame, how many they are, and the bytes that they hold; 0: there are not enough. */
static uint32_t places(const struct call *call, struct iovec *parts, uint32_t *room)
{
    const struct nb_client *client = call->client;
    uint32_t count = 0;
    *room = 0;
    while (*room < client->tx_largest_frame && count < client->tx_max_pieces) {
        if (count == call->spares)
            return 0;
        const struct nb_piece *spare = &call->spare[call->first + count];
        parts[count++] = (struct iovec){spare->data, spare->len};
        *room += spare->len;
    }
    return count;
}

static bool has_room(const struct call *call)
{
    struct iovec parts[MOST_PIECES];
    uint32_t room;
    return places(call, parts, &room) != 0;
}

/* Makes the spare buffers that a frame of `len` bytes was read into ready to be sent. False: its header is none that the driver
 * would take. */
static bool make_ready(struct call *call, uint32_t len, struct net_header header)
{
    struct nb_piece *pieces = &call->spare[call->first];
    uint32_t count = 0;
    uint8_t begun = 0;
    /* That a checksum was looked at is of no interest to whoever sends. */
    header.flags &= NET_HDR_F_NEEDS_CSUM;
    if (!net_header_check(&header, len, call->client->offloads))
        return false;
    if (header.flags) { /* without which it asks for nothing; with offloads the headroom is as large as it */
        memcpy(pieces[0].data - NB_NET_HEADER_BYTES, &header, sizeof(header));
        begun = NB_HEADER;
    }
    for (uint32_t left = len; left; count++) {
        struct nb_piece *piece = &pieces[count];
        if (piece->len > left)
            piece->len = left;
        left -= piece->len;
        piece->flags = (uint8_t)(begun | (left ? NB_MORE : 0));
        begun = NB_CONTINUATION;
    }
    call->first += count;
    call->spares -= count;
    return true;
}

/* Frames from the TAP device to the port. How many were read; errors as above. */
static int outwards(struct call *call)
{
    struct nb_tap *tap = call->tap;
    struct net_header header;
    uint8_t beyond; /* the only way to see that a frame was cut */
    struct iovec parts[1 + MOST_PIECES + 1] = {{&header, sizeof(header)}};
    uint32_t room, count;
    int frames = 0;
    if (!fetch_spares(call))
        return -1;
    uint32_t ready = call->first; /* from there on */
    while (frames < BURST && (count = places(call, parts + 1, &room)) != 0) {
        parts[1 + count] = (struct iovec){&beyond, sizeof(beyond)};
        ssize_t length = readv(tap->fd, parts, (int)count + 2);
        if (length < 0 && errno == EINTR)
            continue;
        if (length < 0 && errno == EAGAIN)
            break;
        if (length < 0)
            return failed(call);
        frames++;
        length -= (ssize_t)sizeof(header);
        if (length > (ssize_t)room || length > (ssize_t)call->client->tx_largest_frame) {
            tap->too_long++;
        } else if (length < LEAST_FRAME || !make_ready(call, (uint32_t)length, header)) {
            tap->bad_headers++;
        } else {
            tap->frames_out++;
            tap->bytes_out += (uint64_t)length;
        }
    }
    if (call->first != ready)
        nb_client_send(call->client, &call->spare[ready], call->first - ready);
    return frames;
}

static bool is_readable(int fd)
{
    struct pollfd look = {.fd = fd, .events = POLLIN};
    return poll(&look, 1, 0) > 0;
}

/* Until there is something to do: 0, or -2. */
static int sleep_until_needed(struct call *call)
{
    /* Without buffers to read into, the TAP device is of no interest; its own queue holds what comes, or drops it. */
    bool can_read = has_room(call);
    if (can_read != call->hears_tap) {
        struct epoll_event readable = {.events = EPOLLIN};
        /* Not with no events: epoll would still tell, again and again, of a device that is gone. */
        if (epoll_ctl(call->both_fd, can_read ? EPOLL_CTL_ADD : EPOLL_CTL_DEL, call->tap->fd, &readable) < 0)
            return failed(call);
        call->hears_tap = can_read;
    }
    int wanted = NB_WAIT_CONTROL | NB_WAIT_RECEIVE | (can_read ? 0 : NB_WAIT_ALLOCATE);
    return nb_client_wait(call->client, wanted, -1) & NB_WAIT_FAILED ? failed(call) : 0;
}

static int run(struct call *call, int control_fd)
{
    for (uint32_t rounds = 1;; rounds++) {
        int in = inwards(call);
        int out = in < 0 ? in : outwards(call);
        if (out < 0)
            return out;
        if (in || out)
            nb_client_flush(call->client);
        if ((in || out) && rounds % ROUNDS_BETWEEN_LOOKS != 0)
            continue;
        if (is_readable(control_fd))
            return 0;
        if (!in && !out && sleep_until_needed(call) < 0)
            return -2;
    }
}

/* An epoll instance that watches the TAP device and `control_fd`, for the client to watch. */
static int hear_both(struct call *call, int control_fd)
{
    struct epoll_event readable = {.events = EPOLLIN};
    call->both_fd = epoll_create1(EPOLL_CLOEXEC);
    call->hears_tap = true;
    if (call->both_fd < 0 || epoll_ctl(call->both_fd, EPOLL_CTL_ADD, control_fd, &readable) < 0 ||
        epoll_ctl(call->both_fd, EPOLL_CTL_ADD, call->tap->fd, &readable) < 0)
        return NB_WATCH_FAILED;
    return nb_client_watch(call->client, call->both_fd);
}

int nb_client_tap(struct nb_client *client, struct nb_tap *tap, int control_fd)
{
    struct call call = {.client = client, .tap = tap};
    tap->error = 0;
    int before = hear_both(&call, control_fd);
    int result = before == NB_WATCH_FAILED ? failed(&call) : run(&call, control_fd);
    nb_client_watch(client, before);
    if (call.both_fd >= 0)
        close(call.both_fd);
    if (result == 0)
        nb_client_unallocate(client, call.spares); /* the caller may come back, and they are its only ones */
    return result;
}
