/* barriers.h with a delay around its fence and before each of the stores that a wake-up hangs on. Included before the
 * sources of the core that use them. WITHOUT_JITTER: barriers.h as it is, for measuring.
 */
#ifndef JITTERED_BARRIERS_H
#define JITTERED_BARRIERS_H

#include "barriers.h"
#include "jitter.h"

#ifndef WITHOUT_JITTER

static inline void jittered_fence_store_load(void)
{
    jitter();
    fence_store_load();
    jitter();
}
static inline void jittered_store_once_16(uint16_t *word, uint16_t value)
{
    jitter();
    store_once_16(word, value);
}
static inline void jittered_store_once_32(uint32_t *word, uint32_t value)
{
    jitter();
    store_once_32(word, value);
}
#define fence_store_load jittered_fence_store_load
#define store_once_16 jittered_store_once_16
#define store_once_32 jittered_store_once_32

#endif

#endif
