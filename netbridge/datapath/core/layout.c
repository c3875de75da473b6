/* What api.h promises about sizes and offsets, held at compile time: the port's format is read by other programs. */
#include <stddef.h>
#include <stdint.h>

#include "core.h"
#include "virtqueue.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "virtio and the port are little-endian; so must this machine be");

_Static_assert(sizeof(struct nb_entry) == 16, "a ring entry is 16 bytes");
_Static_assert(offsetof(struct nb_entry, len) == 8 && offsetof(struct nb_entry, kind) == 12, "entry fields");
_Static_assert(offsetof(struct nb_entry, flags) == 14 && offsetof(struct nb_entry, queue) == 15, "entry fields");

_Static_assert(sizeof(struct nb_ring_header) == 128, "two cache lines, one for each side");
_Static_assert(offsetof(struct nb_ring_header, doorbell_ns) == 8, "producer's line");
_Static_assert(offsetof(struct nb_ring_header, consumed) == 64, "consumer's line");
_Static_assert(offsetof(struct nb_ring_header, wake) == 68, "consumer's line");
_Static_assert(offsetof(struct nb_ring_header, woken_ns) == 72, "consumer's line");

_Static_assert(sizeof(struct vring_desc) == 16 && sizeof(struct vring_packed_desc) == 16, "descriptors of 16 bytes");
_Static_assert(offsetof(struct vring_desc, flags) == 12 && offsetof(struct vring_desc, next) == 14, "split descriptor");
_Static_assert(offsetof(struct vring_packed_desc, id) == 12 && offsetof(struct vring_packed_desc, flags) == 14,
               "packed descriptor");
_Static_assert(sizeof(struct vring_used_elem) == 8 && offsetof(struct vring_used, ring) == 4, "used ring");
_Static_assert(offsetof(struct vring_avail, ring) == 4 && offsetof(struct vring_avail, idx) == 2, "available ring");
_Static_assert(sizeof(struct vring_packed_event) == 4, "event suppression structure");

_Static_assert(NB_DROPS == sizeof((struct nb_counters){0}.drops) / 8, "a counter for every reason to drop");
_Static_assert(NB_REFUSALS == sizeof((struct nb_counters){0}.refused_handles) / 8, "a counter for every refusal");
_Static_assert(NB_RECOVERIES == sizeof((struct nb_counters){0}.recoveries) / 8, "a counter for every recovery");
_Static_assert(NB_FAULTS == sizeof((struct nb_counters){0}.device_faults) / 8, "a counter for every device fault");
_Static_assert(NB_LATENCY_STAGES == sizeof((struct nb_counters){0}.irq_latency_ns) / sizeof(struct nb_histogram),
               "a histogram for every stage");
_Static_assert(sizeof(struct nb_counters) <= 8192, "the counters fit two pages");
_Static_assert(sizeof((struct nb_pump_config){0}.pairs) / sizeof(struct nb_pump_pair) == NB_MOST_PAIRS, "a place for every pair");
