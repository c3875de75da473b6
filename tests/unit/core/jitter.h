/* Random delays at the moments where a race would be lost: inside the core's fences and wake-up flags, and in front of the
 * calls that sleep. Off unless a case turns them on.
 */
#ifndef JITTER_H
#define JITTER_H

#include <stdint.h>

/* One call of `every` waits a little; 0: off. */
extern uint32_t jitter_every;
void jitter(void);

#endif
