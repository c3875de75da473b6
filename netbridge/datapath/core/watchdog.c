/* Frames that the device was given to send and does not: after a while it is taken for stuck. There is no timer: the pump
 * looks now and then while it is awake, and sleeps no longer than until the next look, only while frames are on their way.
 *
 * Of received frames nothing can be said: a wire on which nothing comes looks the same as a device that is stuck.
 */
#include "counting.h"
#include "pump.h"

enum { NS_PER_MS = 1000000 };

int pump_look_for_stall(struct nb_pump *pump, int *timeout_ms)
{
    *timeout_ms = -1;
    if (pump->config.stall_ns == 0)
        return 0;
    uint64_t now = 0, oldest = 0;
    uint32_t slowest = 0;
    for (uint32_t i = 0; i < pump->config.pair_count; i++) {
        struct pump_pair *pair = &pump->pairs[i];
        if (virtqueue_in_flight(pair->tx_queue) == 0) {
            pair->stalled_since = 0;
            continue;
        }
        if (now == 0)
            now = now_ns();
        if (pair->stalled_since == 0 || pair->completed != pair->completed_before) {
            pair->stalled_since = now;
            pair->completed_before = pair->completed;
        }
        if (oldest == 0 || pair->stalled_since < oldest) {
            oldest = pair->stalled_since;
            slowest = i;
        }
    }
    if (oldest == 0)
        return 0;
    uint64_t elapsed = now - oldest;
    if (elapsed >= pump->config.stall_ns) {
        pump->stalled = slowest;
        return device_fault(NB_FAULT_STALLED);
    }
    *timeout_ms = (int)((pump->config.stall_ns - elapsed + NS_PER_MS - 1) / NS_PER_MS);
    return 0;
}

int nb_pump_stalled_pair(const struct nb_pump *pump)
{
    const struct pump_pair *pair = &pump->pairs[pump->stalled];
    return pair->was_reset && pair->completed == pair->completed_at_reset ? -1 : (int)pump->stalled;
}
