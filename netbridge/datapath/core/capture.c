/* Captures a client's frames as pcapng packet blocks (draft-ietf-opsawg-pcapng, "Enhanced Packet Block"), one write for a
 * burst. The blocks around them (section, interface, statistics) are Python's: there are a few of them in a session.
 *
 * A frame of several pieces is put together first: its pieces may come, and go, at different times.
 */
#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "capture.h"

enum {
    PACKET_BLOCK = 6,
    FLAGS_OPTION = 2,
    MOST_CAPTURED = sizeof(((struct nb_capture *)0)->partial[0].data),
    OVERHEAD = 28 + 12 + 4, /* head, options and the length once more */
};

static void put_32(uint8_t **at, uint32_t value)
{
    memcpy(*at, &value, sizeof(value));
    *at += sizeof(value);
}

static void write_out(struct nb_capture *capture)
{
    uint32_t written = 0;
    while (written < capture->used && !capture->error) {
        ssize_t some = write(capture->fd, capture->buffer + written, capture->used - written);
        if (some < 0)
            capture->error = errno;
        else
            written += (uint32_t)some;
    }
    capture->used = 0;
}

static void add_packet(struct nb_capture *capture, enum capture_direction direction, uint64_t now, const uint8_t *data,
                       uint32_t captured, uint32_t length)
{
    uint32_t padded = (captured + 3) & ~3u;
    uint32_t block = padded + OVERHEAD;
    if (capture->used + block > sizeof(capture->buffer))
        write_out(capture);
    uint8_t *at = capture->buffer + capture->used;
    put_32(&at, PACKET_BLOCK);
    put_32(&at, block);
    put_32(&at, capture->interface);
    put_32(&at, (uint32_t)(now >> 32));
    put_32(&at, (uint32_t)now);
    put_32(&at, captured);
    put_32(&at, length);
    memcpy(at, data, captured);
    memset(at + captured, 0, padded - captured);
    at += padded;
    put_32(&at, FLAGS_OPTION | 4 << 16); /* code and length */
    put_32(&at, direction);
    put_32(&at, 0); /* end of options */
    put_32(&at, block);
    capture->used += block;
    if (direction == CAPTURE_INBOUND)
        capture->received++;
    else
        capture->sent++;
}

void capture_pieces(struct nb_capture *capture, enum capture_direction direction, const struct nb_piece *pieces,
                    uint32_t count)
{
    if (capture->error)
        return;
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    uint64_t now = (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
    uint32_t most = capture->snap_length < MOST_CAPTURED ? capture->snap_length : MOST_CAPTURED;
    struct nb_capture_partial *partial = &capture->partial[direction == CAPTURE_OUTBOUND];
    for (uint32_t i = 0; i < count; i++) {
        const struct nb_piece *piece = &pieces[i];
        if (!(piece->flags & (NB_MORE | NB_CONTINUATION))) {
            add_packet(capture, direction, now, piece->data, piece->len < most ? piece->len : most, piece->len);
            continue;
        }
        if (!(piece->flags & NB_CONTINUATION))
            partial->length = partial->captured = 0;
        uint32_t room = most - partial->captured;
        uint32_t some = piece->len < room ? piece->len : room;
        memcpy(partial->data + partial->captured, piece->data, some);
        partial->captured += some;
        partial->length += piece->len;
        if (!(piece->flags & NB_MORE))
            add_packet(capture, direction, now, partial->data, partial->captured, partial->length);
    }
    write_out(capture);
}

static int run(struct nb_client *client, uint64_t most)
{
    enum { BURST = 64, BURSTS_BETWEEN_LOOKS = 256 };
    struct nb_piece pieces[BURST];
    const struct nb_capture *capture = client->capture;
    uint64_t last = most <= UINT64_MAX - capture->received ? capture->received + most : UINT64_MAX;
    for (uint32_t bursts = 1;; bursts++) {
        if (capture->error || capture->received >= last)
            return 1;
        uint64_t left = last - capture->received;
        int count = nb_client_receive(client, pieces, left < BURST ? (uint32_t)left : BURST);
        if (count < 0)
            return -1;
        if (count > 0) {
            nb_client_release(client, pieces, (uint32_t)count);
            nb_client_flush(client);
        }
        if (count > 0 && bursts % BURSTS_BETWEEN_LOOKS != 0)
            continue;
        int found = nb_client_wait(client, NB_WAIT_RECEIVE | NB_WAIT_CONTROL, count > 0 ? 0 : -1);
        if (found & NB_WAIT_FAILED)
            return -2;
        if (found & NB_WAIT_CONTROL)
            return 0;
    }
}

int nb_client_capture(struct nb_client *client, int control_fd, uint64_t most)
{
    int before = nb_client_watch(client, control_fd);
    int result = before == NB_WATCH_FAILED ? -2 : run(client, most);
    nb_client_watch(client, before);
    return result;
}
