/* What tests may see of the pump's inside. */
#ifndef WHITE_BOX_H
#define WHITE_BOX_H

#include <stdbool.h>
#include <stdint.h>

#include "ring.h"

struct nb_pump;

/* Before nb_pump_prime: all four ring counts begin at `ring_position`, both virtqueues' indices at `queue_index`. */
void white_box_start_at(struct nb_pump *pump, uint32_t ring_position, uint16_t queue_index);
/* Holds every account against every other: owners, free stack, buffers in flight, descriptors. NULL, or what is wrong. */
const char *white_box_audit(const struct nb_pump *pump);
/* What the pump does before it sleeps, and what it does when it does not sleep after all. True: it would sleep now. */
bool white_box_ask_for_wakeup(struct nb_pump *pump);
void white_box_stop_asking(struct nb_pump *pump);
/* Gives the client one more RX entry, as a round does, and rings if it must. True: it rang. */
bool white_box_hand_over_and_wake(struct nb_pump *pump, uint32_t produced);
/* Shows the device one more TX chain. True: it wants to be notified. */
bool white_box_publish(struct nb_pump *pump);
/* Adds a TX chain that the device reads, and shows what was added. */
void white_box_add(struct nb_pump *pump, const struct nb_segment *segments, uint32_t count);
void white_box_show(struct nb_pump *pump);
/* Buffers of a merged frame of which more is to come. */
uint32_t white_box_gathered(const struct nb_pump *pump);

#endif
