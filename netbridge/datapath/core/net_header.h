/* The virtio header of a frame (virtio 1.3 §5.1.6), in either direction: copied once, checked, and the copy handed on.
 *
 * Of a sent frame the copy lies in memory that no client sees. Whatever has no meaning in it is set to zero, so who it is for
 * is told what was checked and nothing else.
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
enum { NET_HDR_F_NEEDS_CSUM = 1, NET_HDR_F_DATA_VALID = 2 };
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

static inline bool net_header_received_gso_is_agreed(uint8_t gso_type, uint64_t offloads)
{
    bool ecn = gso_type & NET_HDR_GSO_ECN;
    switch (gso_type & ~NET_HDR_GSO_ECN) {
    case NET_HDR_GSO_NONE:
        return !ecn;
    case NET_HDR_GSO_TCPV4:
        return offloads & OFFLOAD(NB_GUEST_TSO4) && (!ecn || offloads & OFFLOAD(NB_GUEST_ECN));
    case NET_HDR_GSO_TCPV6:
        return offloads & OFFLOAD(NB_GUEST_TSO6) && (!ecn || offloads & OFFLOAD(NB_GUEST_ECN));
    case NET_HDR_GSO_UDP_L4:
        return offloads & (OFFLOAD(NB_GUEST_USO4) | OFFLOAD(NB_GUEST_USO6)) && !ecn;
    default:
        return false;
    }
}

/* What holds in both directions: offsets within the frame of `len` bytes, and nothing that has no meaning. */
static inline bool net_header_fits(struct net_header *header, uint32_t len)
{
    bool checksum = header->flags & NET_HDR_F_NEEDS_CSUM;
    bool segments = header->gso_type != NET_HDR_GSO_NONE;
    if (header->hdr_len > len || (segments && header->gso_size == 0))
        return false;
    if (checksum && (uint32_t)header->csum_start + header->csum_offset + 2 > len)
        return false;
    if (!segments)
        header->gso_size = 0;
    if (!checksum)
        header->csum_start = header->csum_offset = 0;
    header->num_buffers = 0;
    return true;
}

/* Checks a private copy of a sent frame's against its frame of `len` bytes, and clears what means nothing. False: it is to be
 * refused. */
static inline bool net_header_check(struct net_header *header, uint32_t len, uint64_t offloads)
{
    bool checksum = header->flags & NET_HDR_F_NEEDS_CSUM;
    if (header->flags & ~NET_HDR_F_NEEDS_CSUM || (checksum && !(offloads & OFFLOAD(NB_CSUM))))
        return false;
    /* Every segment gets a checksum of its own (§5.1.6.2.1). */
    if (header->gso_type != NET_HDR_GSO_NONE && !checksum)
        return false;
    return net_header_gso_is_agreed(header->gso_type, offloads) && net_header_fits(header, len);
}

/* The same for a received frame. Flags that are not known are passed over (§5.1.6.4.1). */
static inline bool net_header_check_received(struct net_header *header, uint32_t len, uint64_t offloads)
{
    header->flags &= NET_HDR_F_NEEDS_CSUM | NET_HDR_F_DATA_VALID;
    if (header->flags && !(offloads & OFFLOAD(NB_GUEST_CSUM)))
        return false;
    return net_header_received_gso_is_agreed(header->gso_type, offloads) && net_header_fits(header, len);
}

#endif
