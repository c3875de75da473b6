/* Registering, failing, and running cases: see check.h. */
#include "check.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST_CASES = 512 };

static struct {
    const char *name;
    void (*run)(void);
} cases[MOST_CASES];
static int registered;

void check_register(const char *name, void (*run)(void))
{
    if (registered == MOST_CASES)
        abort();
    cases[registered].name = name;
    cases[registered++].run = run;
}

void check_failed(const char *file, int line, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: ", file, line);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    fflush(NULL);
    /* Not exit(): other threads are still at work on what its handlers would take down. */
    _exit(1);
}

unsigned check_times(void)
{
    const char *wanted = getenv("CORE_TIMES");
    int times = wanted ? atoi(wanted) : 1;
    return times > 1 ? (unsigned)times : 1;
}

int check_main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: %s --list | CASE\n", argv[0]);
        return 2;
    }
    for (int i = 0; i < registered; i++) {
        if (!strcmp(argv[1], "--list")) {
            puts(cases[i].name);
        } else if (!strcmp(argv[1], cases[i].name)) {
            cases[i].run();
            return 0;
        }
    }
    if (!strcmp(argv[1], "--list"))
        return 0;
    fprintf(stderr, "%s: no such case\n", argv[1]);
    return 2;
}
