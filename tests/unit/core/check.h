/* The smallest test harness that serves: named cases, checks that say what was found, and one process for each case, so
 * that a sanitizer's report belongs to the case that caused it.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdbool.h>
#include <stdint.h>

/* Defines a case. test_core_native.py finds the cases by this word at the start of a line. */
#define TEST(name)                                                                                                     \
    static void name(void);                                                                                            \
    __attribute__((constructor)) static void register_##name(void) { check_register(#name, name); }                   \
    static void name(void)

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            check_failed(__FILE__, __LINE__, "%s", #condition);                                                        \
    } while (0)

/* Both sides as signed 64-bit numbers: nothing that is compared here is larger. */
#define CHECK_EQ(actual, expected)                                                                                     \
    do {                                                                                                               \
        long long actual_ = (long long)(actual), expected_ = (long long)(expected);                                    \
        if (actual_ != expected_)                                                                                      \
            check_failed(__FILE__, __LINE__, "%s is %lld, expected %s = %lld", #actual, actual_, #expected, expected_); \
    } while (0)

#define FAIL(...) check_failed(__FILE__, __LINE__, __VA_ARGS__)

void check_register(const char *name, void (*run)(void));
/* Ends the process, from whatever thread. */
void check_failed(const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4), noreturn));

int check_main(int argc, char **argv);
/* How many times as long as usual a case is to try: CORE_TIMES in the environment, or 1. */
unsigned check_times(void);

#endif
