/* A client of the port that only receives or only transmits, on the client library: frames_port receive|transmit LENGTH TALLY */
#include <netbridge.h>
#include <string.h>

#include "tally.h"

enum { BURST = 64, HANDSHAKE_MS = 10000, LOOK_MS = 500 };
static const uint8_t HEAD[14] = "\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\2\x88\xb5";

int main(int argc, char **argv)
{
    struct netbridge_failure failure = {0};
    struct netbridge_piece pieces[BURST];
    if (argc != 4)
        return 2;
    int transmits = !strcmp(argv[1], "transmit");
    uint32_t length = (uint32_t)atoi(argv[2]);
    volatile uint64_t *tally = tally_open(argv[3]);
    struct netbridge *port = netbridge_connect(NETBRIDGE_SOCKET, "bench", 0, HANDSHAKE_MS, &failure);
    if (!port) {
        fprintf(stderr, "frames_port: %s\n", failure.text);
        return 1;
    }
    for (int found = 0; found >= 0;) {
        int count = transmits ? netbridge_allocate(port, pieces, BURST) : netbridge_receive(port, pieces, BURST);
        if (count > 0 && transmits) {
            for (int i = 0; i < count; i++) {
                memcpy(pieces[i].data, HEAD, sizeof(HEAD));
                pieces[i].len = length;
            }
            found = netbridge_send(port, pieces, (uint32_t)count);
        } else if (count > 0) {
            found = netbridge_release(port, pieces, (uint32_t)count);
        } else if (count == 0) {
            found = netbridge_wait(port, (transmits ? NETBRIDGE_WAIT_ALLOCATE : NETBRIDGE_WAIT_RECEIVE) | NETBRIDGE_WAIT_CONTROL, LOOK_MS);
            if (found > 0 && found & NETBRIDGE_WAIT_CONTROL)
                found = netbridge_check(port);
        }
        if (count < 0)
            break;
        if (count > 0) {
            netbridge_flush(port);
            *tally += (uint64_t)count;
        }
    }
    fprintf(stderr, "frames_port: %s\n", netbridge_last_failure(port)->text);
    netbridge_close(port);
    return 1;
}
