/* What a client asks of the device: which frames it wants, and its MAC address. One request at a time; see docs/port.md. */
#include <poll.h>
#include <string.h>

#include "internal.h"

enum { MOST_ADDRESSES = 64, MODES = 6, ADDRESS_BYTES = 6 };

/* Everything of a FILTER after its number, as it is on the wire. */
_Static_assert(sizeof(struct netbridge_filter) == FILTER_BYTES - HEADER_BYTES - 4, "FILTER as docs/port.md has it");

static int ask(struct netbridge *port, enum message_type type, const void *body, uint32_t size, int timeout_ms)
{
    int error = netbridge_check(port);
    if (error)
        return error;
    const int64_t deadline = now_ms() + timeout_ms;
    port->answered = false;
    port->request++;
    control_request(port, type, body, size);
    while (!port->answered) {
        if (!await(port->control_fd, POLLIN, deadline))
            return fail(port, NETBRIDGE_TIMEOUT, 0, "the driver did not answer a request within %d ms", timeout_ms);
        if ((error = netbridge_check(port)))
            return error;
    }
    if (port->verdict)
        return fail(port, NETBRIDGE_REFUSED, (int)port->verdict, "the driver did not do what was asked for: %s",
                    port->answer_text);
    return 0;
}

int netbridge_set_filter(struct netbridge *port, const struct netbridge_filter *filter, int timeout_ms)
{
    if (ended(port))
        return ended(port);
    if (filter->unicast + filter->multicast > MOST_ADDRESSES)
        return fail(port, NETBRIDGE_MISUSE, 0, "filter: %u addresses: %d at most",
                    (unsigned)filter->unicast + filter->multicast, MOST_ADDRESSES);
    if (filter->modes >> MODES)
        return fail(port, NETBRIDGE_MISUSE, 0, "filter: unknown modes %#x", filter->modes);
    struct netbridge_filter whole = *filter;
    /* What is beyond the last address is nobody's business. */
    size_t used = (size_t)filter->unicast + filter->multicast;
    memset(whole.addresses[0] + used * ADDRESS_BYTES, 0, (MOST_ADDRESSES - used) * ADDRESS_BYTES);
    return ask(port, FILTER, &whole, sizeof(whole), timeout_ms);
}

int netbridge_set_mac(struct netbridge *port, const uint8_t mac[6], int timeout_ms)
{
    return ended(port) ? ended(port) : ask(port, MAC, mac, ADDRESS_BYTES, timeout_ms);
}
