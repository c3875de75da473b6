/* The tap service's loop: frames between the port and a TAP device, so that the Linux stack is the one behind the port.
 *
 * A frame from the port goes into the TAP device with one writev, from DMA memory, whatever pieces it came in; one from
 * the TAP device is read into the DMA buffer that it is sent from. Either copy is the kernel's own.
 */
#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <unistd.h>

#include "core.h"

enum {
    BURST = 64,
    MOST_PIECES = sizeof(((struct nb_tap *)0)->partial) / sizeof(struct nb_piece),
    LEAST_FRAME = 14,
    ROUNDS_BETWEEN_LOOKS = 256,
};

/* One call of nb_client_tap. */
struct call {
    struct nb_client *client;
    struct nb_tap *tap;
    /* TX buffers that are this client's and not yet used. */
    struct nb_piece spare[BURST];
    uint32_t spares;
};

/* Errors that say something of one frame, or of now; the others are the device's end. */
static bool is_refusal(int error)
{
    return error == EAGAIN || error == EINVAL || error == EIO || error == ENOBUFS || error == ENOMEM || error == EMSGSIZE;
}

/* Writes the frame in `partial`, and gives its buffers back. */
static bool write_frame(struct call *call)
{
    struct iovec parts[MOST_PIECES];
    for (uint32_t i = 0; i < call->tap->pieces; i++)
        parts[i] = (struct iovec){call->tap->partial[i].data, call->tap->partial[i].len};
    ssize_t written;
    do
        written = writev(call->tap->fd, parts, (int)call->tap->pieces);
    while (written < 0 && errno == EINTR);
    int error = written < 0 ? errno : 0;
    nb_client_release(call->client, call->tap->partial, call->tap->pieces);
    call->tap->pieces = 0;
    if (error && !is_refusal(error)) {
        call->tap->error = error;
        return false;
    }
    if (error) {
        call->tap->refused++;
    } else {
        call->tap->frames_in++;
        call->tap->bytes_in += (uint64_t)written;
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

/* Frames from the TAP device to the port. How many went; errors as above. */
static int outwards(struct call *call)
{
    int allocated = nb_client_allocate(call->client, call->spare + call->spares, BURST - call->spares);
    if (allocated < 0)
        return -1;
    call->spares += (uint32_t)allocated;
    uint32_t used = 0;
    while (used < call->spares) {
        struct nb_piece *piece = &call->spare[used];
        ssize_t length = read(call->tap->fd, piece->data, piece->len);
        if (length < 0 && errno == EINTR)
            continue;
        if (length < 0 && errno != EAGAIN) {
            call->tap->error = errno;
            return -2;
        }
        if (length < LEAST_FRAME)
            break;
        if ((size_t)length > piece->len) { /* it was cut */
            call->tap->too_long++;
            continue;
        }
        piece->len = (uint32_t)length;
        call->tap->frames_out++;
        call->tap->bytes_out += (uint64_t)length;
        used++;
    }
    if (used) {
        nb_client_send(call->client, call->spare, used);
        call->spares -= used;
        memmove(call->spare, call->spare + used, call->spares * sizeof(call->spare[0]));
    }
    return (int)used;
}

static bool is_readable(int fd)
{
    struct pollfd look = {.fd = fd, .events = POLLIN};
    return poll(&look, 1, 0) > 0;
}

/* Until there is something to do: 0, or -2. `both_fd` watches the TAP device and `control_fd`. */
static int sleep_until_needed(const struct call *call, int control_fd, int both_fd)
{
    /* Without a buffer to read into, the TAP device is of no interest; its own queue holds what comes, or drops it. */
    int wanted = NB_WAIT_CONTROL | NB_WAIT_RECEIVE | (call->spares ? 0 : NB_WAIT_ALLOCATE);
    int found = nb_client_wait(call->client, wanted, call->spares ? both_fd : control_fd, -1);
    if (!(found & NB_WAIT_FAILED))
        return 0;
    call->tap->error = errno;
    return -2;
}

static int run(struct call *call, int control_fd, int both_fd)
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
        if (!in && !out && sleep_until_needed(call, control_fd, both_fd) < 0)
            return -2;
    }
}

int nb_client_tap(struct nb_client *client, struct nb_tap *tap, int control_fd)
{
    struct call call = {.client = client, .tap = tap};
    struct epoll_event readable = {.events = EPOLLIN};
    int both_fd = epoll_create1(EPOLL_CLOEXEC);
    int result = -2;
    tap->error = 0;
    if (both_fd >= 0 && epoll_ctl(both_fd, EPOLL_CTL_ADD, control_fd, &readable) == 0 &&
        epoll_ctl(both_fd, EPOLL_CTL_ADD, tap->fd, &readable) == 0)
        result = run(&call, control_fd, both_fd);
    else
        tap->error = errno;
    if (both_fd >= 0)
        close(both_fd);
    if (result == 0)
        nb_client_unallocate(client, call.spares); /* the caller may come back, and they are its only ones */
    return result;
}
