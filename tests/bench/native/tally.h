/* A count of frames that another process reads while it grows: eight bytes in a file. */
#ifndef TALLY_H
#define TALLY_H

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile uint64_t *tally_open(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT, 0666);
    void *page = fd >= 0 && !ftruncate(fd, 8) ? mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) : MAP_FAILED;
    if (page == MAP_FAILED) {
        perror(path);
        exit(1);
    }
    return page;
}

#endif
