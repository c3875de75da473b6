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

enum { BURST = 64, BURSTS_BETWEEN_LOOKS = 256, MAC_BYTES = 6 };

static void reflect(uint8_t *to, const uint8_t *from, uint32_t len)
{
    memcpy(to, from, len);
    if (len >= 2 * MAC_BYTES) {
        memcpy(to, from + MAC_BYTES, MAC_BYTES);
        memcpy(to + MAC_BYTES, from, MAC_BYTES);
    }
}

/* Sends back what fits one buffer; the rest is counted. Returns how many of `replies` were used. */
static uint32_t reflect_burst(const struct nb_piece *received, uint32_t count, struct nb_piece *replies,
                              struct nb_echo_counts *counts)
{
    uint32_t used = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct nb_piece *piece = &received[i];
        bool whole = !(piece->flags & (NB_MORE | NB_CONTINUATION));
        if (!whole || piece->len > replies[used].len) {
            counts->unsendable += !(piece->flags & NB_CONTINUATION);
            continue;
        }
        reflect(replies[used].data, piece->data, piece->len);
        replies[used].len = piece->len;
        counts->bytes += piece->len;
        used++;
    }
    counts->frames += used;
    return used;
}

static bool is_readable(int fd)
{
    struct pollfd look = {.fd = fd, .events = POLLIN};
    return poll(&look, 1, 0) > 0;
}

int nb_client_echo(struct nb_client *client, int control_fd, struct nb_echo_counts *counts)
{
    struct nb_piece received[BURST];
    struct nb_piece replies[BURST]; /* allocated, not yet used: the first `spare` */
    uint32_t spare = 0;
    for (;;) {
        int allocated = nb_client_allocate(client, replies + spare, BURST - spare);
        if (allocated < 0)
            return -1;
        spare += (uint32_t)allocated;
        int count = spare ? nb_client_receive(client, received, spare) : 0;
        if (count < 0)
            return -1;
        if (count > 0) {
            uint32_t used = reflect_burst(received, (uint32_t)count, replies, counts);
            nb_client_send(client, replies, used);
            nb_client_release(client, received, (uint32_t)count);
            nb_client_flush(client);
            counts->bursts++;
            spare -= used;
            memmove(replies, replies + used, spare * sizeof(replies[0]));
            if (counts->bursts % BURSTS_BETWEEN_LOOKS != 0 || !is_readable(control_fd))
                continue;
            break;
        }
        int wanted = spare ? NB_WAIT_RECEIVE : NB_WAIT_ALLOCATE;
        int found = nb_client_wait(client, wanted | NB_WAIT_CONTROL, control_fd, -1);
        if (found & NB_WAIT_FAILED)
            return -1;
        if (found & NB_WAIT_CONTROL)
            break;
    }
    nb_client_unallocate(client, spare); /* the caller may come back, and they are its only ones */
    return 0;
}
