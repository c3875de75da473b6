/* Frames: received, released, allocated, sent. The rings are the core's (netbridge/datapath/core/client.c); here is who has
 * which buffer, so that neither the driver nor the caller can have one twice. */
#include <limits.h>
#include <stddef.h>
#include <string.h>

#include "internal.h"
#include "net_header.h"

#define SAME(field)                                                                                                    \
    _Static_assert(offsetof(struct netbridge_piece, field) == offsetof(struct nb_piece, field), "one layout")
SAME(dma_handle);
SAME(data);
SAME(len);
SAME(flags);
SAME(queue);
_Static_assert(sizeof(struct netbridge_piece) == sizeof(struct nb_piece), "one layout");
_Static_assert((int)NETBRIDGE_MORE == NB_MORE && (int)NETBRIDGE_CONTINUATION == NB_CONTINUATION &&
                   (int)NETBRIDGE_HEADER == NB_HEADER,
               "the same flags");
_Static_assert(sizeof(struct netbridge_header) == NB_NET_HEADER_BYTES, "the virtio header");

static uint32_t index_of(uint64_t dma_handle) { return (uint32_t)dma_handle & 0xffffff; }
static uint8_t region_of(uint64_t dma_handle) { return (uint8_t)(dma_handle >> 24); }


static int misuse(struct netbridge *port, const char *what) { return fail(port, NETBRIDGE_MISUSE, 0, "%s", what); }

int netbridge_receive(struct netbridge *port, struct netbridge_piece *pieces, uint32_t most)
{
    if (ended(port))
        return ended(port);
    int count = nb_client_receive(&port->native, (struct nb_piece *)pieces, most < INT_MAX ? most : INT_MAX);
    if (count < 0)
        return broken(port, NETBRIDGE_REASON_RING_FAULT, "an entry in rx_active that may not be");
    for (int i = 0; i < count; i++) {
        uint8_t *here = &port->rx_here[index_of(pieces[i].dma_handle)];
        if (*here)
            return broken(port, NETBRIDGE_REASON_RING_FAULT, "an RX buffer came twice");
        *here = true;
    }
    return count;
}

int netbridge_allocate(struct netbridge *port, struct netbridge_piece *pieces, uint32_t most)
{
    if (ended(port))
        return ended(port);
    int count = nb_client_allocate(&port->native, (struct nb_piece *)pieces, most < INT_MAX ? most : INT_MAX);
    if (count < 0)
        return broken(port, NETBRIDGE_REASON_RING_FAULT, "an entry in tx_done that may not be");
    for (int i = 0; i < count; i++) {
        uint8_t *here = &port->tx_here[index_of(pieces[i].dma_handle)];
        if (*here)
            return broken(port, NETBRIDGE_REASON_RING_FAULT, "a TX buffer came twice");
        *here = true;
        /* Whatever it says the room is: a frame may have this much. */
        pieces[i].len = netbridge_room(port);
    }
    return count;
}

/* Takes the buffers of these pieces from the client; takes none if one of them is not its own, or there twice. */
static bool take_away(uint8_t *here, uint32_t buffers, uint8_t region, const struct netbridge_piece *pieces,
                      uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t index = index_of(pieces[i].dma_handle);
        if (region_of(pieces[i].dma_handle) == region && index < buffers && here[index]) {
            here[index] = false;
            continue;
        }
        while (i-- > 0)
            here[index_of(pieces[i].dma_handle)] = true;
        return false;
    }
    return true;
}

int netbridge_release(struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count)
{
    if (ended(port))
        return ended(port);
    if (!take_away(port->rx_here, port->native.rx_count, NB_REGION_RX, pieces, count))
        return misuse(port, "release: a piece that is not held, or is there twice");
    nb_client_release(&port->native, (const struct nb_piece *)pieces, count);
    return 0;
}

/* What is wrong with a frame that begins with the first of these pieces, NULL for nothing; `pieces_of` is how many it has. */
static const char *why_unsendable(const struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count,
                                  uint32_t *pieces_of)
{
    const uint32_t room = netbridge_room(port);
    uint64_t length = 0;
    uint32_t i = 0;
    bool more;
    do {
        if (i == count)
            return "send: the last piece of a frame is missing";
        const uint8_t known = NETBRIDGE_MORE | (i ? NETBRIDGE_CONTINUATION : NETBRIDGE_HEADER);
        if (pieces[i].flags & ~known || !(pieces[i].flags & NETBRIDGE_CONTINUATION) != !i)
            return "send: flags that do not belong there";
        if (pieces[i].len == 0 || pieces[i].len > room)
            return "send: a piece of no bytes, or of more than its buffer holds";
        if (pieces[i].queue >= port->native.queue_pairs || pieces[i].queue != pieces[0].queue)
            return "send: a piece of no queue pair, or of another than its frame's";
        length += pieces[i].len;
        more = pieces[i++].flags & NETBRIDGE_MORE;
    } while (more);
    if (i > port->native.tx_max_pieces)
        return "send: a frame of too many pieces";
    if (length < LEAST_FRAME || length > port->native.tx_largest_frame)
        return "send: a length that is no frame's";
    if (pieces[0].flags & NETBRIDGE_HEADER && !(port->native.offloads & TX_OFFLOADS))
        return "send: a header, but the session has no offloads on the transmit side";
    *pieces_of = i;
    return NULL;
}

int netbridge_send(struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count)
{
    if (ended(port))
        return ended(port);
    for (uint32_t i = 0, pieces_of = 0; i < count; i += pieces_of) {
        const char *why = why_unsendable(port, pieces + i, count - i, &pieces_of);
        if (why)
            return misuse(port, why);
    }
    if (!take_away(port->tx_here, port->native.tx_count, NB_REGION_TX, pieces, count))
        return misuse(port, "send: a buffer that is not held, or is there twice");
    nb_client_send(&port->native, (const struct nb_piece *)pieces, count);
    return 0;
}

/* What is wrong with a received frame that is to be forwarded; NULL for nothing. */
static const char *why_unforwardable(const struct netbridge *port, const struct netbridge_piece *piece)
{
    struct netbridge_header header;
    if (piece->flags & (NETBRIDGE_MORE | NETBRIDGE_CONTINUATION))
        return "forward: a piece of a frame in several; copy those into buffers to send";
    if (piece->flags & ~NETBRIDGE_HEADER)
        return "forward: flags that do not belong there";
    if (netbridge_get_header(piece, &header) && (header.flags & NET_HDR_F_NEEDS_CSUM || header.gso_type))
        return "forward: a frame whose checksum is to be made yet, or which is to be cut; copy it, and send it with its "
               "header";
    if (piece->len < LEAST_FRAME || piece->len > port->native.rx_stride - port->native.headroom ||
        piece->len > port->native.tx_largest_frame)
        return "forward: a length that is no frame's, or is more than its buffer holds";
    if (piece->queue >= port->native.queue_pairs)
        return "forward: no such queue pair";
    return NULL;
}

int netbridge_forward(struct netbridge *port, const struct netbridge_piece *pieces, uint32_t count)
{
    if (ended(port))
        return ended(port);
    for (uint32_t i = 0; i < count; i++) {
        const char *why = why_unforwardable(port, &pieces[i]);
        if (why)
            return misuse(port, why);
    }
    if (!take_away(port->rx_here, port->native.rx_count, NB_REGION_RX, pieces, count))
        return misuse(port, "forward: a piece that is not held, or is there twice");
    nb_client_forward(&port->native, (const struct nb_piece *)pieces, count);
    return 0;
}

bool netbridge_get_header(const struct netbridge_piece *piece, struct netbridge_header *header)
{
    if (!(piece->flags & NETBRIDGE_HEADER))
        return false;
    memcpy(header, piece->data - sizeof(*header), sizeof(*header));
    return true;
}

void netbridge_set_header(struct netbridge_piece *piece, const struct netbridge_header *header)
{
    memcpy(piece->data - sizeof(*header), header, sizeof(*header));
    piece->flags |= NETBRIDGE_HEADER;
}

void netbridge_flush(struct netbridge *port)
{
    if (!ended(port))
        nb_client_flush(&port->native);
}
