/* The kernel's driver with AF_PACKET, up to a burst of frames a system call: frames_packet receive|transmit|echo LENGTH TALLY INTERFACE */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <string.h>
#include <sys/socket.h>

#include "tally.h"

enum { BURST = 64, ROOM = 2048, MAC = 6, BACKLOG = 16 << 20 };
static uint8_t frames[BURST][ROOM];

static _Noreturn void fail(const char *what)
{
    perror(what);
    exit(1);
}

int main(int argc, char **argv)
{
    struct mmsghdr messages[BURST] = {0};
    struct iovec pieces[BURST];
    if (argc != 5)
        return 2;
    int transmits = !strcmp(argv[1], "transmit"), echoes = !strcmp(argv[1], "echo");
    size_t length = strtoul(argv[2], NULL, 10);
    volatile uint64_t *tally = tally_open(argv[3]);
    int one = 1, backlog = BACKLOG;
    int fd = socket(AF_PACKET, SOCK_RAW, 0);
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET,
        .sll_protocol = transmits ? 0 : htons(ETH_P_ALL),
        .sll_ifindex = (int)if_nametoindex(argv[4]),
    };
    if (fd < 0 || setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof(one)) ||
        setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &backlog, sizeof(backlog)) ||
        bind(fd, (struct sockaddr *)&address, sizeof(address)))
        fail("packet socket");
    for (int i = 0; i < BURST; i++) {
        memcpy(frames[i], "\xff\xff\xff\xff\xff\xff\x02\0\0\0\0\2\x88\xb5", ETH_HLEN);
        pieces[i] = (struct iovec){frames[i], transmits ? length : ROOM};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &pieces[i], .msg_iovlen = 1};
    }
    for (;;) {
        int count = BURST;
        if (!transmits) {
            count = recvmmsg(fd, messages, BURST, MSG_WAITFORONE, NULL);
            if (count < 0)
                fail("recvmmsg");
        }
        for (int i = 0; echoes && i < count; i++) {
            uint8_t mac[MAC];
            memcpy(mac, frames[i], MAC);
            memcpy(frames[i], frames[i] + MAC, MAC);
            memcpy(frames[i] + MAC, mac, MAC);
            pieces[i].iov_len = messages[i].msg_len;
        }
        for (int sent = 0; (echoes || transmits) && sent < count;) {
            int some = sendmmsg(fd, messages + sent, (unsigned)(count - sent), 0);
            if (some < 0 && errno != ENOBUFS)
                fail("sendmmsg");
            sent += some > 0 ? some : 0; /* ENOBUFS: the interface's queue is full, and has dropped one */
        }
        for (int i = 0; echoes && i < count; i++)
            pieces[i].iov_len = ROOM;
        *tally += (uint64_t)count;
    }
}
