/* Loads, stores and fences for memory that another processor or a device writes at the same time.
 *
 * Shared words are plain integers in the structures (cffi must be able to read those), so the C11 orderings are asked for
 * through the compiler's __atomic built-ins, here and nowhere else. x86 gives acquire and release for nothing; on weakly
 * ordered processors these are what makes the protocol right.
 */
#ifndef NB_BARRIERS_H
#define NB_BARRIERS_H

#include <stdint.h>

/* Acquire: what the other side wrote before it published this value is visible after this load. */
static inline uint16_t load_acquire_16(const uint16_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static inline uint32_t load_acquire_32(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

/* Release: everything written before is visible to whoever loads this value with acquire. */
static inline void store_release_16(uint16_t *word, uint16_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
static inline void store_release_32(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

/* Relaxed: one access that the compiler may neither split nor repeat; for words whose meaning needs no order, and for
 * copying once what the other side may still be changing. */
static inline uint8_t load_once_8(const uint8_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint16_t load_once_16(const uint16_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint32_t load_once_32(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline uint64_t load_once_64(const uint64_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED); }
static inline void store_once_16(uint16_t *word, uint16_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
static inline void store_once_32(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }
static inline void store_once_64(uint64_t *word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }

/* Store-load: the one order that acquire and release do not give. "I published, then looked whether you sleep" against
 * "I said that I sleep, then looked whether you published": without it on both sides a wake-up can be lost. */
static inline void fence_store_load(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif
