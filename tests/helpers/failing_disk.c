/* Preloaded by tests: makes calls that change files below one folder fail, or take long, as a disk would.

   The file that FAILING_DISK_PLAN names says how, and is read before each call; without it nothing fails:

       <folder> <call> <number> <error>

   call: open (for writing), write, fsync, rename or mkdir; number: the first that fails, counted since the file was last
   changed; error: an errno, or 0 for writes that take a third of what they are given. A negative error makes one call take
   that many milliseconds. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long count;
static struct timespec changed;

/* Whether this call fails: -1 no, else the error. */
static int verdict(const char *call, const char *path) {
    const char *plan = getenv("FAILING_DISK_PLAN");
    char folder[4096], which[32];
    long number;
    int error, result = -1, pause = 0;
    struct stat facts;
    if (!plan || stat(plan, &facts)) return -1;
    FILE *file = fopen(plan, "r");
    if (!file) return -1;
    int found = fscanf(file, "%4095s %31s %ld %d", folder, which, &number, &error);
    fclose(file);
    if (found != 4 || strcmp(call, which) || strncmp(path, folder, strlen(folder))) return -1;
    pthread_mutex_lock(&lock);
    if (memcmp(&changed, &facts.st_mtim, sizeof changed)) {
        changed = facts.st_mtim;
        count = 0;
    }
    if (++count >= number && error >= 0) result = error;
    if (count == number && error < 0) pause = -error;
    pthread_mutex_unlock(&lock);
    if (pause) usleep(pause * 1000);
    return result;
}

static int verdict_at(const char *call, int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return -1;
    path[length] = 0;
    return verdict(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_IF(outcome)      \
    do {                      \
        int failure = outcome; \
        if (failure > 0) {    \
            errno = failure;  \
            return -1;        \
        }                     \
    } while (0)

static int open_any(int (*real)(const char *, int, ...), const char *path, int flags, mode_t mode) {
    if (flags & (O_WRONLY | O_RDWR)) FAIL_IF(verdict("open", path));
    return real(path, flags, mode);
}

#define OPEN(name)                                      \
    int name(const char *path, int flags, ...) {        \
        mode_t mode = 0;                                \
        if (flags & (O_CREAT | __O_TMPFILE)) {          \
            va_list rest;                               \
            va_start(rest, flags);                      \
            mode = va_arg(rest, mode_t);                \
            va_end(rest);                               \
        }                                               \
        return open_any(REAL(name), path, flags, mode); \
    }

OPEN(open)
OPEN(open64)

static size_t allowed(int error, size_t size) { return error == 0 && size > 3 ? size / 3 : size; }

ssize_t write(int descriptor, const void *data, size_t size) {
    int error = verdict_at("write", descriptor);
    FAIL_IF(error);
    return REAL(write)(descriptor, data, allowed(error, size));
}

#define PWRITE(name)                                                                \
    ssize_t name(int descriptor, const void *data, size_t size, off64_t place) {    \
        int error = verdict_at("write", descriptor);                                \
        FAIL_IF(error);                                                             \
        size_t less = allowed(error, size);                                         \
        if (fcntl(descriptor, F_GETFL) & O_DIRECT) less -= less < size ? less % 4096 : 0; \
        return REAL(pwrite64)(descriptor, data, less, place);                       \
    }

PWRITE(pwrite)
PWRITE(pwrite64)

int fsync(int descriptor) {
    FAIL_IF(verdict_at("fsync", descriptor));
    return REAL(fsync)(descriptor);
}

int rename(const char *from, const char *to) {
    FAIL_IF(verdict("rename", from));
    return REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) {
    FAIL_IF(verdict("mkdir", path));
    return REAL(mkdir)(path, mode);
}
