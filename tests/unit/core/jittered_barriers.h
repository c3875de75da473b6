/* barriers.h with the delays of jitter.h in it. Included before the sources of the core that use them. WITHOUT_JITTER:
 * barriers.h as it is, for measuring.
 */
#ifndef JITTERED_BARRIERS_H
#define JITTERED_BARRIERS_H

#include "barriers.h"
#include "jitter.h"

#ifndef WITHOUT_JITTER

static inline void jittered_fence_store_load(void)
{
    jitter();
    drain_stores();
    fence_store_load();
    jitter();
}

#define JITTERED_STORE(name, type)                                                                                     \
    static inline void jittered_##name(type *word, type value)                                                        \
    {                                                                                                                  \
        jitter();                                                                                                      \
        if (stores_are_late)                                                                                           \
            store_late(word, value, sizeof(type));                                                                     \
        else                                                                                                           \
            name(word, value);                                                                                         \
    }
#define JITTERED_LOAD(name, type)                                                                                      \
    static inline type jittered_##name(const type *word)                                                               \
    {                                                                                                                  \
        uint32_t value;                                                                                                \
        return stores_are_late && stored_late(word, &value) ? (type)value : name(word);                                \
    }
JITTERED_STORE(store_release_16, uint16_t)
JITTERED_STORE(store_release_32, uint32_t)
JITTERED_STORE(store_once_16, uint16_t)
JITTERED_STORE(store_once_32, uint32_t)
JITTERED_LOAD(load_acquire_16, uint16_t)
JITTERED_LOAD(load_acquire_32, uint32_t)
JITTERED_LOAD(load_once_16, uint16_t)
JITTERED_LOAD(load_once_32, uint32_t)

#define fence_store_load jittered_fence_store_load
#define store_release_16 jittered_store_release_16
#define store_release_32 jittered_store_release_32
#define store_once_16 jittered_store_once_16
#define store_once_32 jittered_store_once_32
#define load_acquire_16 jittered_load_acquire_16
#define load_acquire_32 jittered_load_acquire_32
#define load_once_16 jittered_load_once_16
#define load_once_32 jittered_load_once_32

#endif

#endif
