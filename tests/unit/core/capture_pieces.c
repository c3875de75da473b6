/* Captured pieces: whatever they are, what is written is whole blocks, and nothing beyond its buffers is touched. */
#define _GNU_SOURCE
#include "check.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "capture.h"

enum { PIECE = 2000, PACKET = 6, LONGEST = 131072 };

/* Reads a file of packet blocks and returns how many there are; `captured` and `length` of the last. */
static unsigned packets(int fd, uint32_t *captured, uint32_t *length)
{
    unsigned found = 0;
    uint32_t head[7], tail;
    off_t at = 0;
    while (pread(fd, head, sizeof(head), at) > 0) {
        CHECK_EQ(head[0], PACKET);
        *captured = head[5];
        *length = head[6];
        CHECK_EQ(head[1], 44 + (*captured + 3) / 4 * 4);
        at += head[1];
        CHECK_EQ(pread(fd, &tail, 4, at - 4), 4);
        CHECK_EQ(tail, head[1]);
        found++;
    }
    return found;
}

static struct nb_capture *capture_new(uint32_t snap_length)
{
    struct nb_capture *capture = calloc(1, sizeof(*capture));
    CHECK(capture != NULL);
    capture->fd = memfd_create("capture", 0);
    capture->snap_length = snap_length;
    return capture;
}

static void capture_free(struct nb_capture *capture)
{
    close(capture->fd);
    free(capture);
}

TEST(capture_cuts_frames_and_does_not_end_with_the_longest)
{
    const uint32_t snaps[] = {0, 1, 14, PIECE, 5 * PIECE + 1, LONGEST, 0xffffffff};
    uint8_t data[PIECE];
    memset(data, 0x5a, sizeof(data));
    for (unsigned i = 0; i < sizeof(snaps) / sizeof(snaps[0]); i++) {
        struct nb_capture *capture = capture_new(snaps[i]);
        for (unsigned count = 1; count <= 80; count++) {
            for (unsigned n = 0; n < count; n++) {
                struct nb_piece piece = {.data = data, .len = PIECE};
                piece.flags = (uint16_t)((n > 0 ? NB_CONTINUATION : 0) | (n + 1 < count ? NB_MORE : 0));
                /* One call for each piece; frames of both directions at the same time. */
                capture_pieces(capture, CAPTURE_INBOUND, &piece, 1);
                capture_pieces(capture, CAPTURE_OUTBOUND, &piece, 1);
            }
            CHECK_EQ(capture->received, count);
            CHECK_EQ(capture->sent, count);
        }
        uint32_t captured, length;
        uint32_t most = snaps[i] < LONGEST ? snaps[i] : LONGEST;
        CHECK_EQ(packets(capture->fd, &captured, &length), 160);
        CHECK_EQ(length, 80 * PIECE);
        CHECK_EQ(captured, most < 80 * PIECE ? most : 80 * PIECE);
        CHECK_EQ(capture->error, 0);
        capture_free(capture);
    }
}

/* More than its buffer holds in one burst; and pieces that make no frame. */
TEST(capture_of_what_is_no_frame)
{
    struct nb_capture *capture = capture_new(LONGEST);
    uint8_t *data = calloc(1, 65536);
    struct nb_piece pieces[64];
    for (unsigned i = 0; i < 64; i++)
        pieces[i] = (struct nb_piece){.data = data, .len = 65536};
    capture_pieces(capture, CAPTURE_INBOUND, pieces, 64);
    CHECK_EQ(capture->received, 64);
    for (unsigned i = 0; i < 64; i++)
        pieces[i].flags = NB_CONTINUATION | (i < 63 ? NB_MORE : 0);
    capture_pieces(capture, CAPTURE_INBOUND, pieces, 64);
    CHECK_EQ(capture->received, 65);
    uint32_t captured, length;
    CHECK_EQ(packets(capture->fd, &captured, &length), 65);
    CHECK_EQ(length, 64 * 65536);
    CHECK_EQ(captured, LONGEST);
    /* And a file that takes nothing. */
    close(capture->fd);
    capture_pieces(capture, CAPTURE_OUTBOUND, pieces, 64);
    capture_pieces(capture, CAPTURE_OUTBOUND, pieces, 64);
    CHECK(capture->error != 0);
    capture->fd = dup(0);
    capture_free(capture);
    free(data);
}
