/* What a station hears, on Net-Bridge's port, in C: broadcasts, its own frames and those of the multicast groups that are named.
 *
 *     cc listen.c $(pkg-config --cflags --libs netbridge-client) -o listen && ./listen SOCKET [01:00:5e:00:00:fb ...]
 *
 * Prints a line for each frame, with what the device says of its checksum and of what it was never cut into; and one when
 * the link, the MTU or the address changes. Ends with Ctrl-C or the driver.
 */
#include <inttypes.h>
#include <netbridge.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

enum { BURST = 64, HANDSHAKE_MS = 5000, ANSWER_MS = 5000, LOOK_MS = 500 };

static volatile sig_atomic_t stopping;

static void stop(int number)
{
    (void)number;
    stopping = 1;
}

static void print_facts(const struct netbridge_facts *facts)
{
    const uint8_t *mac = facts->mac;
    printf("link %s, MTU %" PRIu32 ", %02x:%02x:%02x:%02x:%02x:%02x\n", facts->link_up ? "up" : "down", facts->mtu, mac[0],
           mac[1], mac[2], mac[3], mac[4], mac[5]);
}

static int ask_for_groups(struct netbridge *port, int count, char **words)
{
    struct netbridge_filter filter = {0};
    for (int i = 0; i < count && i < 64; i++) {
        uint8_t *group = filter.addresses[i];
        if (sscanf(words[i], "%2" SCNx8 ":%2" SCNx8 ":%2" SCNx8 ":%2" SCNx8 ":%2" SCNx8 ":%2" SCNx8, &group[0], &group[1],
                   &group[2], &group[3], &group[4], &group[5]) != 6) {
            fprintf(stderr, "listen: %s is no address such as 01:00:5e:00:00:fb\n", words[i]);
            return NETBRIDGE_MISUSE;
        }
        filter.multicast++;
    }
    int error = netbridge_set_filter(port, &filter, ANSWER_MS);
    if (error == NETBRIDGE_REFUSED) {
        printf("every frame comes: %s\n", netbridge_last_failure(port)->text);
        error = 0;
    }
    return error;
}

static int listen_once(struct netbridge *port)
{
    struct netbridge_piece pieces[BURST];
    int found = netbridge_wait(port, NETBRIDGE_WAIT_RECEIVE | NETBRIDGE_WAIT_CONTROL, LOOK_MS);
    if (found > 0 && found & NETBRIDGE_WAIT_CONTROL) {
        const struct netbridge_facts before = *netbridge_facts(port), *now = netbridge_facts(port);
        found = netbridge_check(port);
        if (now->link_up != before.link_up || now->mtu != before.mtu || memcmp(now->mac, before.mac, sizeof(now->mac)))
            print_facts(now);
    }
    if (found < 0)
        return found;
    int count = netbridge_receive(port, pieces, BURST);
    for (int i = 0; i < count; i++) {
        struct netbridge_header header;
        printf("%s%" PRIu32 " bytes", pieces[i].flags & NETBRIDGE_CONTINUATION ? "  and " : "", pieces[i].len);
        if (netbridge_get_header(&pieces[i], &header))
            printf(", flags %u, segments of %u", header.flags, header.gso_size);
        printf("\n");
    }
    fflush(stdout);
    if (count <= 0)
        return count;
    int error = netbridge_release(port, pieces, (uint32_t)count);
    netbridge_flush(port);
    return error;
}

int main(int count, char **words)
{
    const uint64_t offloads = NETBRIDGE_GUEST_CSUM | NETBRIDGE_GUEST_TSO4 | NETBRIDGE_GUEST_TSO6;
    struct netbridge_failure failure;
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = stop}, NULL);
    sigaction(SIGINT, &(struct sigaction){.sa_handler = stop}, NULL);
    struct netbridge *port =
        netbridge_connect(count > 1 ? words[1] : NETBRIDGE_SOCKET, "listen-c", offloads, HANDSHAKE_MS, &failure);
    if (!port) {
        fprintf(stderr, "listen: %s\n", failure.text);
        return 1;
    }
    print_facts(netbridge_facts(port));
    int error = count > 2 ? ask_for_groups(port, count - 2, words + 2) : 0;
    while (!error && !stopping)
        error = listen_once(port);
    if (error && error != NETBRIDGE_MISUSE)
        fprintf(stderr, "listen: %s\n", netbridge_last_failure(port)->text);
    netbridge_close(port);
    return error != 0;
}
