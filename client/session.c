/* A session from connecting to closing, and waiting for something to happen in it. The rings are the core's
 * (netbridge/datapath/core/client.c). */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"
#include "port_ring.h"

_Static_assert((int)NETBRIDGE_WAIT_RECEIVE == NB_WAIT_RECEIVE && (int)NETBRIDGE_WAIT_ALLOCATE == NB_WAIT_ALLOCATE &&
                   (int)NETBRIDGE_WAIT_CONTROL == NB_WAIT_CONTROL,
               "the same bits");

bool ends_session(int error)
{
    return error && error != NETBRIDGE_MISUSE && error != NETBRIDGE_REFUSED && error != NETBRIDGE_TIMEOUT;
}

int ended(const struct netbridge *port) { return ends_session(port->failure.error) ? port->failure.error : 0; }

/* ---- Connecting */

int64_t now_ms(void) { return (int64_t)(now_ns() / 1000000); }

static bool is_name(const char *name)
{
    static const char alphabet[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    size_t length = strnlen(name, 33);
    return length >= 1 && length <= 32 && strspn(name, alphabet) == length;
}

bool await(int fd, short events, int64_t deadline)
{
    for (;;) {
        int64_t left = deadline - now_ms();
        struct pollfd look = {.fd = fd, .events = events};
        int ready = poll(&look, 1, left < 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left);
        if (ready > 0)
            return true;
        if (ready == 0 || errno != EINTR)
            return false;
    }
}

static int open_control(struct netbridge *port, const char *path, int64_t deadline)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path))
        return fail(port, NETBRIDGE_MISUSE, 0, "%.80s...: a socket's path has at most %zu bytes", path,
                    sizeof(address.sun_path) - 1);
    strcpy(address.sun_path, path);
    port->control_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (port->control_fd < 0)
        return fail(port, NETBRIDGE_SYSTEM, errno, "cannot make a socket: %s", strerror(errno));
    /* A Unix socket's queue of connections has no event for room in it; a full one is a driver that was stopped. */
    while (connect(port->control_fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        if (errno == ENOENT || errno == ECONNREFUSED)
            return fail(port, NETBRIDGE_UNAVAILABLE, errno, "no driver listens at %s; start one, or wait for it", path);
        if (errno != EAGAIN && errno != EINTR)
            return fail(port, NETBRIDGE_SYSTEM, errno, "cannot connect to %s: %s", path, strerror(errno));
        if (now_ms() >= deadline)
            return fail(port, NETBRIDGE_UNAVAILABLE, 0, "the driver at %s does not take connections; is it stopped?",
                        path);
        nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    }
    return 0;
}

static int await_welcome(struct netbridge *port, struct message *welcome, const char *path, int64_t deadline)
{
    int got;
    do {
        if (!await(port->control_fd, POLLIN, deadline))
            return fail(port, NETBRIDGE_UNAVAILABLE, 0, "the driver at %s did not answer in time; is its device ready?",
                        path);
        got = control_receive(port, welcome);
    } while (got == 0);
    if (got < 0)
        return got;
    if (welcome->type == BYE)
        return closed_by(port, welcome);
    if (welcome->type != WELCOME)
        return broken(port, NETBRIDGE_REASON_UNEXPECTED, "what answers at %.100s is no driver: no WELCOME", path);
    memcpy(port->fds, welcome->fds, sizeof(port->fds));
    return 0;
}

static int watch(struct netbridge *port)
{
    struct epoll_event event = {.events = EPOLLIN};
    port->poll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (port->poll_fd < 0 || epoll_ctl(port->poll_fd, EPOLL_CTL_ADD, port->control_fd, &event) < 0 ||
        epoll_ctl(port->poll_fd, EPOLL_CTL_ADD, port->native.driver_doorbell_fd, &event) < 0 ||
        nb_client_watch(&port->native, port->control_fd) == NB_WATCH_FAILED)
        return fail(port, NETBRIDGE_SYSTEM, errno, "cannot watch the session: %s", strerror(errno));
    return 0;
}

static int establish(struct netbridge *port, const char *path, const char *name, uint64_t offloads, int timeout_ms)
{
    struct message welcome;
    int64_t deadline = now_ms() + timeout_ms;
    int error;
    if (!is_name(name))
        return fail(port, NETBRIDGE_MISUSE, 0,
                    "a client's name is 1 to 32 letters, digits, '.', '_' or '-', and not \"%.40s\"", name);
    if ((error = open_control(port, path, deadline)))
        return error;
    port->asked_offloads = offloads;
    control_hello(port, name);
    if ((error = await_welcome(port, &welcome, path, deadline)) || (error = take_offer(port, &welcome)) ||
        (error = watch(port)))
        return error;
    port->rx_here = calloc(port->native.rx_count, 1);
    port->tx_here = calloc(port->native.tx_count, 1);
    if (!port->rx_here || !port->tx_here)
        return fail(port, NETBRIDGE_SYSTEM, ENOMEM, "no memory for a session");
    control_ready(port);
    return netbridge_check(port);
}

struct netbridge *netbridge_connect(const char *path, const char *name, uint64_t offloads, int timeout_ms,
                                    struct netbridge_failure *failure)
{
    struct netbridge *port = calloc(1, sizeof(*port));
    if (!port) {
        if (failure)
            *failure = (struct netbridge_failure){NETBRIDGE_SYSTEM, ENOMEM, false, "no memory for a session"};
        return NULL;
    }
    port->control_fd = port->poll_fd = port->native.wait_fd = -1;
    for (int i = 0; i < FDS; i++)
        port->fds[i] = -1;
    int error = establish(port, path, name, offloads, timeout_ms);
    if (failure)
        *failure = port->failure;
    if (error) {
        netbridge_close(port);
        return NULL;
    }
    return port;
}

static void close_fd(int fd)
{
    if (fd >= 0)
        close(fd);
}

void netbridge_close(struct netbridge *port)
{
    if (!port)
        return;
    if (!ended(port) && port->control_fd >= 0)
        control_bye(port, NETBRIDGE_REASON_SHUTDOWN, "");
    nb_client_close(&port->native);
    for (int i = 0; i < 3; i++)
        if (port->mappings[i].address)
            munmap(port->mappings[i].address, port->mappings[i].size);
    for (int i = 0; i < FDS; i++)
        close_fd(port->fds[i]);
    close_fd(port->poll_fd);
    close_fd(port->control_fd);
    free(port->rx_here);
    free(port->tx_here);
    free(port);
}

/* ---- What there is to know */

const struct netbridge_failure *netbridge_last_failure(const struct netbridge *port) { return &port->failure; }
const struct netbridge_facts *netbridge_facts(const struct netbridge *port) { return &port->facts; }
uint16_t netbridge_session(const struct netbridge *port) { return port->session; }
uint32_t netbridge_room(const struct netbridge *port) { return port->native.tx_stride - port->native.headroom; }
uint32_t netbridge_largest(const struct netbridge *port) { return port->native.tx_largest_frame; }
uint32_t netbridge_most_pieces(const struct netbridge *port) { return port->native.tx_max_pieces; }
uint64_t netbridge_offloads(const struct netbridge *port) { return port->native.offloads; }
uint32_t netbridge_rx_limit(const struct netbridge *port) { return port->rx_limit; }
bool netbridge_rx_writable(const struct netbridge *port) { return port->native.rx_writable; }

uint32_t netbridge_queue_pairs(const struct netbridge *port) { return port->native.queue_pairs; }
int netbridge_fd(const struct netbridge *port) { return port->poll_fd; }

int netbridge_check(struct netbridge *port)
{
    struct message message;
    int got;
    if (ended(port))
        return ended(port);
    while ((got = control_receive(port, &message)) == 1) {
        if (message.type == BYE)
            return closed_by(port, &message);
        if (message.type == WELCOME)
            for (int i = 0; i < FDS; i++)
                close(message.fds[i]);
        if (message.type == ANSWER) {
            note_answer(port, &message);
            continue;
        }
        if (message.type != LINK)
            return broken(port, NETBRIDGE_REASON_UNEXPECTED, "a message out of place in a running session");
        if (!read_facts(message.bytes + HEADER_BYTES, &port->facts))
            return broken(port, NETBRIDGE_REASON_MALFORMED, "LINK with facts that may not be");
    }
    return got;
}

/* ---- Waiting */

int netbridge_wait(struct netbridge *port, int wanted, int timeout_ms)
{
    if (ended(port))
        return ended(port);
    int found = nb_client_wait(&port->native, wanted, timeout_ms);
    if (!(found & NB_WAIT_FAILED))
        return found;
    return errno == EINTR ? 0 : fail(port, NETBRIDGE_SYSTEM, errno, "cannot wait for the driver: %s", strerror(errno));
}

int netbridge_arm(struct netbridge *port, int wanted)
{
    if (ended(port))
        return ended(port);
    const struct nb_client *native = &port->native;
    struct epoll_event event;
    int found = 0;
    (void)!epoll_wait(native->driver_doorbell_fd, &event, 1, 0); /* a bell that was rung for an earlier sleep */
    if (wanted & NETBRIDGE_WAIT_RECEIVE)
        ring_arm(&native->rx_active);
    if (wanted & NETBRIDGE_WAIT_ALLOCATE)
        ring_arm(&native->tx_done);
    fence_store_load(); /* pairs with the one in ring_must_wake */
    if (wanted & NETBRIDGE_WAIT_RECEIVE && ring_waiting(&native->rx_active, native->rx_active_taken) != 0)
        found |= NETBRIDGE_WAIT_RECEIVE;
    if (wanted & NETBRIDGE_WAIT_ALLOCATE && ring_waiting(&native->tx_done, native->tx_done_taken) != 0)
        found |= NETBRIDGE_WAIT_ALLOCATE;
    if (await(port->control_fd, POLLIN, 0))
        found |= NETBRIDGE_WAIT_CONTROL;
    return found;
}
