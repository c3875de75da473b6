/* Random delays at the moments where a race would be lost: inside the core's fences and wake-up flags, and in front of the
 * calls that sleep. Off unless a case turns them on.
 */
#ifndef JITTER_H
#define JITTER_H

#include <poll.h>
#include <stdint.h>

/* In place of poll(), if not NULL. */
extern int (*instead_of_poll)(struct pollfd *fds, nfds_t count, int timeout);
int real_poll(struct pollfd *fds, nfds_t count, int timeout);

/* One call of `every` waits a little; 0: off. */
extern uint32_t jitter_every;
void jitter(void);

#endif
