/* Delays at the moments where a race would be lost, for the core under test. Off unless a case turns them on.
 *
 * - Random pauses inside the core's fences, before its stores to shared words, and around the calls that sleep.
 * - Late stores: what the core stores to a shared word stays in a buffer of the thread, seen by that thread alone, until a
 *   fence or a system call drains it, or the buffer is full. That is what a processor may do (x86 too), only far longer;
 *   so a fence that is missing is missed within a few rounds.
 */
#ifndef JITTER_H
#define JITTER_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>

/* One call in so many waits a little; 0: none does. */
extern uint32_t jitter_every;
void jitter(void);

extern bool stores_are_late;
void store_late(void *word, uint32_t value, unsigned bytes);
/* Whether this thread's own store to the word is still in the buffer, and what it was. */
bool stored_late(const void *word, uint32_t *value);
/* Every late store of this thread, in order. Also to be called when a thread is done with the core. */
void drain_stores(void);

/* Before epoll_wait(), if not NULL: when the core has looked for the last time. */
extern void (*before_epoll_wait)(void);
/* In place of poll(), if not NULL. */
extern int (*instead_of_poll)(struct pollfd *fds, nfds_t count, int timeout);
/* In place of epoll_wait(), if not NULL. */
extern int (*instead_of_epoll_wait)(int timeout);

#endif
