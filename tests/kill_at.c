/* Counts what a process does to files, and kills it, or lets an operation fail, at the k-th.

   cc -shared -fPIC -O1 -o kill_at.so kill_at.c -ldl, then LD_PRELOAD=kill_at.so. Nothing is counted before strike_at().
   Counted is what makes, writes, renames, removes or flushes anything whose path begins with a prefix. A write is cut
   in half; any other operation is not done at all. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static long counted, victim;
static int failure;
static char prefix[PATH_MAX];

/* At the k-th operation below `folder` the process is killed, or the operation fails with `error`. k = 0: none is. */
void strike_at(long k, const char *folder, int error) {
    counted = 0;
    victim = k;
    failure = error;
    snprintf(prefix, sizeof prefix, "%s", folder);
}

long operations(void) { return counted; }

/* Whether this is the operation to strike. */
static int is_struck(const char *path) {
    if (!prefix[0] || !path || strncmp(path, prefix, strlen(prefix))) return 0;
    return __sync_add_and_fetch(&counted, 1) == victim;
}

static int is_struck_of(int file) {
    char link[64], path[PATH_MAX];
    if (!prefix[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_struck(path);
}

static int strike(void) {
    if (!failure) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = failure;
    return -1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define ON_PATH(name, declared, path, ...)                   \
    int name declared {                                      \
        if (is_struck(path)) return strike();                \
        return NEXT(name)(__VA_ARGS__);                      \
    }

ON_PATH(rename, (const char *a, const char *b), b, a, b)
ON_PATH(renameat, (int i, const char *a, int j, const char *b), b, i, a, j, b)
ON_PATH(unlink, (const char *a), a, a)
ON_PATH(rmdir, (const char *a), a, a)
ON_PATH(mkdir, (const char *a, mode_t m), a, a, m)
ON_PATH(chmod, (const char *a, mode_t m), a, a, m)
ON_PATH(truncate, (const char *a, off_t n), a, a, n)

#define ON_FILE(name, declared, file, ...)                   \
    int name declared {                                      \
        if (is_struck_of(file)) return strike();             \
        return NEXT(name)(__VA_ARGS__);                      \
    }

ON_FILE(fsync, (int f), f, f)
ON_FILE(fdatasync, (int f), f, f)
ON_FILE(fchmod, (int f, mode_t m), f, f, m)
ON_FILE(ftruncate, (int f, off_t n), f, f, n)
ON_FILE(ftruncate64, (int f, off64_t n), f, f, n)

/* Removing a tree goes by the folder's descriptor. */
int unlinkat(int folder, const char *name, int flags) {
    if (name[0] == '/' ? is_struck(name) : is_struck_of(folder)) return strike();
    return NEXT(unlinkat)(folder, name, flags);
}

ssize_t write(int file, const void *data, size_t count) {
    if (is_struck_of(file)) {
        if (NEXT(write)(file, data, count / 2) < 0) return -1;
        return strike();
    }
    return NEXT(write)(file, data, count);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    if (is_struck_of(file)) {
        if (NEXT(writev)(file, parts, count / 2) < 0) return -1;
        return strike();
    }
    return NEXT(writev)(file, parts, count);
}

static int opens_to_write(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & O_CREAT; }

#define OPENING(name)                                                       \
    int name(const char *path, int flags, ...) {                            \
        va_list rest;                                                       \
        va_start(rest, flags);                                              \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                       \
        if (opens_to_write(flags) && is_struck(path)) return strike();      \
        return NEXT(name)(path, flags, mode);                               \
    }

OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                    \
    int name(int folder, const char *path, int flags, ...) {                \
        va_list rest;                                                       \
        va_start(rest, flags);                                              \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                       \
        if (opens_to_write(flags) && is_struck(path)) return strike();      \
        return NEXT(name)(folder, path, flags, mode);                       \
    }

OPENING_AT(openat)
OPENING_AT(openat64)

#define OPENING_STREAM(name)                                                \
    FILE *name(const char *path, const char *mode) {                        \
        if (strpbrk(mode, "wa+") && is_struck(path)) {                      \
            strike();                                                       \
            return NULL;                                                    \
        }                                                                   \
        return NEXT(name)(path, mode);                                      \
    }

OPENING_STREAM(fopen)
OPENING_STREAM(fopen64)
