/* A disk that fails: preloaded, it stands before the C library, counts calls on files below a folder by their kind, and
 * answers the n-th call of one kind with an errno of its choice, once or from then on. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, CREATE, READ, WRITE, SYNC, RENAME, LIST, KINDS };

static char folder[PATH_MAX], failed[1 << 16];
static size_t length;
static int armed, wanted, number, lasting;
static long when;
static atomic_long seen[KINDS];
static pthread_mutex_t telling = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(const char *below, int kind, long at, int error, int from_then_on) {
    snprintf(folder, sizeof folder, "%s", below);
    length = strlen(folder);
    wanted = kind, when = at, number = error, lasting = from_then_on;
    armed = 1;
}

void fault_disarm(void) { armed = 0; }
long fault_seen(int kind) { return atomic_load(&seen[kind]); }
const char *fault_path(void) { return failed; }

static int trip(int kind, const char *path) {
    if (!armed || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
    long n = atomic_fetch_add(&seen[kind], 1) + 1;
    if (kind != wanted || n < when || (n > when && !lasting)) return 0;
    pthread_mutex_lock(&telling);
    size_t told = strlen(failed);
    snprintf(failed + told, sizeof failed - told, "%s\n", path);
    pthread_mutex_unlock(&telling);
    errno = number;
    return 1;
}

static void path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    path[n > 0 ? n : 0] = 0;
}

static int trip_fd(int kind, int descriptor) {
    char path[PATH_MAX];
    if (!armed) return 0;
    path_of(descriptor, path);
    return trip(kind, path);
}

static int trip_at(int kind, int base, const char *name) {
    char path[2 * PATH_MAX], parent[PATH_MAX];
    if (!armed || !name) return 0;
    if (name[0] == '/') return trip(kind, name);
    if (base == AT_FDCWD) { if (!getcwd(parent, sizeof parent)) return 0; } else path_of(base, parent);
    snprintf(path, sizeof path, "%s/%s", parent, name);
    return trip(kind, path);
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FD_CALL(kind, type, name, given, passed) \
    type name given { NEXT(name); if (trip_fd(kind, fd)) return -1; return next passed; }
#define OPENING(flags) ((flags) & O_CREAT ? CREATE : OPEN)
#define MODE int mode = 0; if (flags & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, int); va_end(rest); }

int open(const char *path, int flags, ...) { NEXT(open); MODE; return trip_at(OPENING(flags), AT_FDCWD, path) ? -1 : next(path, flags, mode); }
int open64(const char *path, int flags, ...) { NEXT(open64); MODE; return trip_at(OPENING(flags), AT_FDCWD, path) ? -1 : next(path, flags, mode); }
int openat(int fd, const char *path, int flags, ...) { NEXT(openat); MODE; return trip_at(OPENING(flags), fd, path) ? -1 : next(fd, path, flags, mode); }
int openat64(int fd, const char *path, int flags, ...) { NEXT(openat64); MODE; return trip_at(OPENING(flags), fd, path) ? -1 : next(fd, path, flags, mode); }
int mkdir(const char *path, mode_t mode) { NEXT(mkdir); return trip_at(CREATE, AT_FDCWD, path) ? -1 : next(path, mode); }
DIR *opendir(const char *path) { NEXT(opendir); return trip_at(LIST, AT_FDCWD, path) ? NULL : next(path); }

FD_CALL(READ, ssize_t, read, (int fd, void *data, size_t n), (fd, data, n))
FD_CALL(READ, ssize_t, pread, (int fd, void *data, size_t n, off_t at), (fd, data, n, at))
FD_CALL(READ, ssize_t, pread64, (int fd, void *data, size_t n, off64_t at), (fd, data, n, at))
FD_CALL(READ, ssize_t, readv, (int fd, const struct iovec *parts, int n), (fd, parts, n))
FD_CALL(WRITE, ssize_t, write, (int fd, const void *data, size_t n), (fd, data, n))
FD_CALL(WRITE, ssize_t, pwrite, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
FD_CALL(WRITE, ssize_t, pwrite64, (int fd, const void *data, size_t n, off64_t at), (fd, data, n, at))
FD_CALL(WRITE, ssize_t, writev, (int fd, const struct iovec *parts, int n), (fd, parts, n))
FD_CALL(SYNC, int, fsync, (int fd), (fd))
FD_CALL(SYNC, int, fdatasync, (int fd), (fd))
FD_CALL(SYNC, int, syncfs, (int fd), (fd))
FD_CALL(SYNC, int, sync_file_range, (int fd, off64_t at, off64_t n, unsigned how), (fd, at, n, how))

int rename(const char *from, const char *to) { NEXT(rename); return trip_at(RENAME, AT_FDCWD, to) ? -1 : next(from, to); }
int renameat(int a, const char *from, int b, const char *to) { NEXT(renameat); return trip_at(RENAME, b, to) ? -1 : next(a, from, b, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { NEXT(renameat2); return trip_at(RENAME, b, to) ? -1 : next(a, from, b, to, flags); }
int link(const char *from, const char *to) { NEXT(link); return trip_at(RENAME, AT_FDCWD, to) ? -1 : next(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) { NEXT(linkat); return trip_at(RENAME, b, to) ? -1 : next(a, from, b, to, flags); }
