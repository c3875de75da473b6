/* A client that does what it is told, a word a line, and says what came of it: `probe SOCKET`. With `probe SOCKET N` it
 * connects N times and says how each went, then how many files it has open; `probe SOCKET 0 NAME OFFLOADS` once, as if
 * without, and asks for these offloads. */
#include <netbridge.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 64, WAIT_MS = 10000, ANSWER_MS = 10000 };

static unsigned open_files(void)
{
    unsigned found = 0;
    DIR *directory = opendir("/proc/self/fd");
    while (readdir(directory))
        found++;
    closedir(directory);
    return found;
}

static void say(struct netbridge *port, int result)
{
    if (result < 0)
        printf("%d %s\n", result, netbridge_last_failure(port)->text);
    else
        printf("%d\n", result);
}

static uint32_t checksum(const struct netbridge_piece *pieces, int count)
{
    uint32_t sum = 0;
    for (int i = 0; i < count; i++)
        for (uint32_t j = 0; j < pieces[i].len; j++)
            sum = sum * 31 + pieces[i].data[j];
    return sum;
}

static void obey(struct netbridge *port)
{
    static struct netbridge_piece received[MOST], allocated[MOST];
    int here = 0, spare = 0;
    char word[32];
    unsigned number = 0;
    while (scanf("%31s %u", word, &number) == 2) {
        int result = -99;
        if (!strcmp(word, "wait"))
            result = netbridge_wait(port, (int)number, WAIT_MS);
        else if (!strcmp(word, "arm"))
            result = netbridge_arm(port, (int)number);
        else if (!strcmp(word, "check"))
            result = netbridge_check(port);
        else if (!strcmp(word, "mtu"))
            result = (int)netbridge_facts(port)->mtu;
        else if (!strcmp(word, "receive"))
            result = here = netbridge_receive(port, received, number);
        else if (!strcmp(word, "link")) {
            const struct netbridge_facts *facts = netbridge_facts(port);
            printf("%d %u %u %02x:%02x:%02x:%02x:%02x:%02x\n", facts->link_up, facts->speed_mbps, facts->announcements,
                   facts->mac[0], facts->mac[1], facts->mac[2], facts->mac[3], facts->mac[4], facts->mac[5]);
            fflush(stdout);
            continue;
        } else if (!strcmp(word, "filter")) {
            /* So many addresses, the first a station's, the others groups'; and the VLAN of that number. */
            struct netbridge_filter filter = {.modes = NETBRIDGE_ALL_UNICAST | NETBRIDGE_NO_BROADCAST};
            filter.unicast = number > 0;
            filter.multicast = (uint8_t)(number - filter.unicast);
            for (unsigned i = 0; i < 64; i++)
                memcpy(filter.addresses[i], (uint8_t[]){i ? 1 : 2, 0, 0, 0, 0, (uint8_t)i}, 6);
            filter.vlans[number / 8] |= (uint8_t)(1 << number % 8);
            result = netbridge_set_filter(port, &filter, ANSWER_MS);
        } else if (!strcmp(word, "modes"))
            result = netbridge_set_filter(port, &(struct netbridge_filter){.modes = (uint16_t)number}, ANSWER_MS);
        else if (!strcmp(word, "mac"))
            result = netbridge_set_mac(port, (uint8_t[]){2, 0, 0, 0, 0, (uint8_t)number}, ANSWER_MS);
        else if (!strcmp(word, "reason"))
            result = netbridge_last_failure(port)->reason;
        else if (!strcmp(word, "header")) {
            struct netbridge_header header;
            result = netbridge_get_header(&received[0], &header) ? header.gso_size : -1;
        } else if (!strcmp(word, "put_header"))
            netbridge_set_header(&allocated[0], &(struct netbridge_header){.flags = 1, .csum_start = (uint16_t)number,
                                                                            .csum_offset = 6}), result = 0;
        else if (!strcmp(word, "put_flags")) {
            for (int i = 0; i < spare; i++) /* of one frame of all of them */
                allocated[i].flags = (uint8_t)((i < spare - 1 ? NETBRIDGE_MORE : 0) | (i ? NETBRIDGE_CONTINUATION : 0) |
                                               (allocated[i].flags & NETBRIDGE_HEADER));
            result = spare;
        } else if (!strcmp(word, "flag"))
            result = (allocated[0].flags = (uint8_t)number);
        else if (!strcmp(word, "queue"))
            result = (allocated[0].queue = (uint8_t)number);
        else if (!strcmp(word, "largest"))
            result = (int)netbridge_largest(port);
        else if (!strcmp(word, "sum"))
            result = (int)(checksum(received, here) & 0x7fffffff);
        else if (!strcmp(word, "flags"))
            result = received[number].flags;
        else if (!strcmp(word, "release"))
            result = netbridge_release(port, received, number);
        else if (!strcmp(word, "writable"))
            result = netbridge_rx_writable(port);
        else if (!strcmp(word, "forward"))
            result = netbridge_forward(port, received, number);
        else if (!strcmp(word, "forward_twice")) {
            struct netbridge_piece twice[] = {received[0], received[0]};
            result = netbridge_forward(port, twice, 2);
        } else if (!strcmp(word, "forward_allocated"))
            result = netbridge_forward(port, allocated, number);
        else if (!strcmp(word, "received_length"))
            result = (received[0].len = number) < 1 << 30 ? 0 : -1;
        else if (!strcmp(word, "received_queue"))
            result = (received[0].queue = (uint8_t)number);
        else if (!strcmp(word, "received_flag"))
            result = (received[0].flags = (uint8_t)number);
        else if (!strcmp(word, "overwrite")) {
            for (int i = 0; i < here; i++)
                memset(received[i].data, (int)number, received[i].len);
            result = here;
        } else if (!strcmp(word, "allocate"))
            result = spare = netbridge_allocate(port, allocated, number);
        else if (!strcmp(word, "length"))
            result = (allocated[0].len = number) < 1 << 30 ? 0 : -1;
        else if (!strcmp(word, "fill")) {
            for (int i = 0; i < spare; i++)
                memset(allocated[i].data, (int)number, allocated[i].len);
            result = spare;
        } else if (!strcmp(word, "twice")) {
            allocated[1] = allocated[0];
            result = netbridge_send(port, allocated, 2);
        } else if (!strcmp(word, "send"))
            result = netbridge_send(port, allocated, number);
        else if (!strcmp(word, "flush"))
            result = (netbridge_flush(port), 0);
        say(port, result);
        fflush(stdout);
    }
}

int main(int count, char **words)
{
    int told = count > 2 ? atoi(words[2]) : 0;
    int times = told ? told : 1;
    uint64_t offloads = count > 4 ? strtoull(words[4], NULL, 0) : 0;
    unsigned before = open_files();
    for (int i = 0; i < times; i++) {
        struct netbridge_failure failure;
        struct netbridge *port = netbridge_connect(words[1], count > 3 ? words[3] : "probe", offloads, 10000, &failure);
        if (!port)
            printf("refused %d %d %d %s\n", failure.error, failure.reason, failure.may_pass, failure.text);
        else
            printf("session %u room %u limit %u link %d\n", netbridge_session(port), netbridge_room(port),
                   netbridge_rx_limit(port), netbridge_facts(port)->link_up);
        fflush(stdout);
        if (port && !told)
            obey(port);
        netbridge_close(port);
    }
    printf("files %d\n", (int)open_files() - (int)before);
    return 0;
}
