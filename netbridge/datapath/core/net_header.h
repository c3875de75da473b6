/* The virtio header of a frame that a client wants sent (virtio 1.3 §5.1.6): copied once, checked, and then the device's.
 *
 * The copy lies in memory that no client sees. Whatever has no meaning in it is set to zero, so the device is told what was
 * checked and nothing else.
 */
#ifndef NB_NET_HEADER_H
#define NB_NET_HEADER_H

#include <stdbool.h>
#include <stdint.h>

#include "core.h"

/* struct virtio_net_hdr */
struct net_header {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t hdr_len;
    uint16_t gso_size;
    uint16_t csum_start;
    uint16_t csum_offset;
    uint16_t num_buffers;
};
enum { NET_HDR_F_NEEDS_CSUM = 1 };
enum { NET_HDR_GSO_NONE = 0, NET_HDR_GSO_TCPV4 = 1, NET_HDR_GSO_TCPV6 = 4, NET_HDR_GSO_UDP_L4 = 5, NET_HDR_GSO_ECN = 0x80 };

#define OFFLOAD(name) (UINT64_C(1) << (name))
/* Offloads that let a client put a header in front of what it sends; and those that bring one with what it receives. */
#define TX_OFFLOADS                                                                                                    \
    (OFFLOAD(NB_CSUM) | OFFLOAD(NB_HOST_TSO4) | OFFLOAD(NB_HOST_TSO6) | OFFLOAD(NB_HOST_ECN) | OFFLOAD(NB_HOST_USO))
#define RX_OFFLOADS                                                                                                    \
    (OFFLOAD(NB_GUEST_CSUM) | OFFLOAD(NB_GUEST_TSO4) | OFFLOAD(NB_GUEST_TSO6) | OFFLOAD(NB_GUEST_ECN) |                \
     OFFLOAD(NB_GUEST_USO4) | OFFLOAD(NB_GUEST_USO6))

static inline bool net_header_gso_is_agreed(uint8_t gso_type, uint64_t offloads)
{
    bool ecn = gso_type & NET_HDR_GSO_ECN;
    switch (gso_type & ~NET_HDR_GSO_ECN) {
    case NET_HDR_GSO_NONE:
        return !ecn;
    case NET_HDR_GSO_TCPV4:
        return offloads & OFFLOAD(NB_HOST_TSO4) && (!ecn || offloads & OFFLOAD(NB_HOST_ECN));
    case NET_HDR_GSO_TCPV6:
        return offloads & OFFLOAD(NB_HOST_TSO6) && (!ecn || offloads & OFFLOAD(NB_HOST_ECN));
    case NET_HDR_GSO_UDP_L4:
        return offloads & OFFLOAD(NB_HOST_USO) && !ecn;
    default:
        return false;
    }
}

/* Checks a private copy against its frame of `len` bytes, and clears what means nothing. False: it is to be refused. */
static inline bool net_header_check(struct net_header *header, uint32_t len, uint64_t offloads)
{
    bool checksum = header->flags & NET_HDR_F_NEEDS_CSUM;
    bool segments = header->gso_type != NET_HDR_GSO_NONE;
    if (header->flags & ~NET_HDR_F_NEEDS_CSUM || (checksum && !(offloads & OFFLOAD(NB_CSUM))))
        return false;
    if (!net_header_gso_is_agreed(header->gso_type, offloads))
        return false;
    if (header->hdr_len > len)
        return false;
    if (checksum && (uint32_t)header->csum_start + header->csum_offset + 2 > len)
        return false;
    /* Every segment gets a checksum of its own (§5.1.6.2.1). */
    if (segments && (!checksum || header->gso_size == 0))
        return false;
    if (!segments)
        header->gso_size = 0;
    if (!checksum)
        header->csum_start = header->csum_offset = 0;
    header->num_buffers = 0;
    return true;
}

#endif
