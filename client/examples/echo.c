/* A service on Net-Bridge's port, in C: sends frames back, their MAC addresses exchanged: from where they are if the
 * driver lets it change received frames, else by a copy. One that does not fit one buffer it only counts and releases.
 *
 *     cc echo.c $(pkg-config --cflags --libs netbridge-client) -o echo && ./echo [SOCKET]
 *
 * Connects again when a session ends for a reason that passes. Ends with Ctrl-C or the driver.
 */
#include <netbridge.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { BURST = 64, MAC = 6, SHORTEST = 14, HANDSHAKE_MS = 5000 };
enum { LOOK_MS = 500 }; /* for a signal that came before the wait */

static volatile sig_atomic_t stopping;
static unsigned long long frames, unsendable;

static void stop(int number)
{
    (void)number;
    stopping = 1;
}

/* One burst, each frame changed and sent where it is. What there is to wait for, or an error. */
static int forward_burst(struct netbridge *port)
{
    struct netbridge_piece received[BURST], others[BURST];
    int count = netbridge_receive(port, received, BURST);
    int good = 0, bad = 0;
    for (int i = 0; i < count; i++) {
        struct netbridge_piece piece = received[i];
        uint8_t sender[MAC];
        if (piece.flags || piece.len < SHORTEST || piece.len > netbridge_largest(port)) {
            others[bad++] = piece; /* of a frame that does not fit one buffer */
            continue;
        }
        memcpy(sender, piece.data + MAC, MAC);
        memcpy(piece.data + MAC, piece.data, MAC);
        memcpy(piece.data, sender, MAC);
        received[good++] = piece;
    }
    int error = count < 0 ? count : netbridge_forward(port, received, (uint32_t)good);
    if (!error)
        error = netbridge_release(port, others, (uint32_t)bad);
    if (error)
        return error;
    netbridge_flush(port);
    frames += (unsigned)good;
    unsendable += (unsigned)bad;
    return NETBRIDGE_WAIT_RECEIVE;
}

/* One burst, each frame copied: as many frames as there are buffers to answer with. What there is to wait for, or an
 * error. */
static int copy_burst(struct netbridge *port, struct netbridge_piece *answers, int *spare)
{
    struct netbridge_piece received[BURST];
    int allocated = netbridge_allocate(port, answers + *spare, (uint32_t)(BURST - *spare));
    if (allocated < 0)
        return allocated;
    *spare += allocated;
    int count = netbridge_receive(port, received, (uint32_t)*spare);
    if (count < 0)
        return count;
    int used = 0;
    for (int i = 0; i < count; i++) {
        const struct netbridge_piece *from = &received[i];
        struct netbridge_piece *to = &answers[used];
        if (from->flags || from->len < SHORTEST || from->len > to->len) {
            unsendable++; /* a piece of a frame that does not fit one buffer */
            continue;
        }
        memcpy(to->data, from->data + MAC, MAC);
        memcpy(to->data + MAC, from->data, MAC);
        memcpy(to->data + 2 * MAC, from->data + 2 * MAC, from->len - 2 * MAC);
        to->len = from->len;
        used++;
    }
    int error = netbridge_send(port, answers, (uint32_t)used);
    if (!error)
        error = netbridge_release(port, received, (uint32_t)count);
    if (error)
        return error;
    netbridge_flush(port);
    frames += (unsigned)used;
    *spare -= used;
    memmove(answers, answers + used, (size_t)*spare * sizeof(*answers));
    return *spare ? NETBRIDGE_WAIT_RECEIVE : NETBRIDGE_WAIT_ALLOCATE;
}

static int echo(struct netbridge *port)
{
    struct netbridge_piece answers[BURST];
    int spare = 0;
    while (!stopping) {
        int wanted = netbridge_rx_writable(port) ? forward_burst(port) : copy_burst(port, answers, &spare);
        int found = wanted < 0 ? wanted : netbridge_wait(port, wanted, LOOK_MS);
        if (found > 0 && found & NETBRIDGE_WAIT_CONTROL)
            found = netbridge_check(port);
        if (found < 0)
            return found;
    }
    return 0;
}

int main(int count, char **words)
{
    struct netbridge_failure failure = {0};
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = stop}, NULL);
    sigaction(SIGINT, &(struct sigaction){.sa_handler = stop}, NULL);
    do {
        struct netbridge *port =
            netbridge_connect(count > 1 ? words[1] : NETBRIDGE_SOCKET, "echo-c", 0, HANDSHAKE_MS, &failure);
        if (!port)
            break;
        printf("session %u\n", netbridge_session(port));
        fflush(stdout);
        if (echo(port) < 0)
            failure = *netbridge_last_failure(port);
        netbridge_close(port);
    } while (!stopping && failure.may_pass);
    printf("%llu frames, %llu pieces not sent\n", frames, unsendable);
    if (failure.error && failure.reason != NETBRIDGE_REASON_SHUTDOWN)
        fprintf(stderr, "echo-c: %s\n", failure.text);
    return failure.error && failure.reason != NETBRIDGE_REASON_SHUTDOWN;
}
