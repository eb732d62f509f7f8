/* Loaded into every process of a chaos run (LD_PRELOAD): the wall clock of all of them is ahead of the machine's by as
 * many seconds as RAY_TMPDIR/clock says, a double in host order, read at each look at the clock. The monotonic clock is
 * left alone.
 *
 * Waits until a moment of the wall clock are translated, for the kernel knows only the machine's: what waited until then
 * is woken when the machine's clock gets there, as a kernel does only at a jump. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const long WALL_SECONDS = 1000000000; /* a moment beyond is one of the wall clock: no machine runs that long */

static const volatile double *shared_offset(void) {
    static const volatile double *offset;
    static int is_looked_for;
    if (!is_looked_for) {
        const char *folder = getenv("RAY_TMPDIR");
        char path[4096];
        is_looked_for = 1;
        if (folder && snprintf(path, sizeof path, "%s/clock", folder) < (int)sizeof path) {
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd >= 0) {
                void *memory = mmap(0, sizeof(double), PROT_READ, MAP_SHARED, fd, 0);
                if (memory != MAP_FAILED) offset = memory;
                close(fd);
            }
        }
    }
    return offset;
}

static double ahead(void) {
    const volatile double *offset = shared_offset();
    return offset ? *offset : 0.0;
}

static void shift(struct timespec *moment, double seconds) {
    long whole = (long)seconds;
    moment->tv_sec += whole;
    moment->tv_nsec += (long)((seconds - (double)whole) * 1e9);
    if (moment->tv_nsec >= 1000000000) { moment->tv_nsec -= 1000000000; moment->tv_sec++; }
    if (moment->tv_nsec < 0) { moment->tv_nsec += 1000000000; moment->tv_sec--; }
}

static struct timespec of_machine(const struct timespec *moment) {
    struct timespec shifted = *moment;
    if (moment->tv_sec > WALL_SECONDS) shift(&shifted, -ahead());
    return shifted;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long next_syscall(long number, long a, long b, long c, long d, long e, long f) {
    static long (*next)(long, ...);
    if (!next) next = NEXT(syscall);
    return next(number, a, b, c, d, e, f);
}

/* Some libraries wait with futexes of their own. */
long syscall(long number, ...) {
    long a[6];
    struct timespec moment;
    va_list arguments;
    va_start(arguments, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(arguments, long);
    va_end(arguments);
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3]) {
        moment = of_machine((const struct timespec *)a[3]);
        a[3] = (long)&moment;
    }
    return next_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int status = (int)next_syscall(SYS_clock_gettime, clock, (long)now, 0, 0, 0, 0);
    if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) shift(now, ahead());
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec moment;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &moment)) return -1;
    now->tv_sec = moment.tv_sec;
    now->tv_usec = moment.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec moment;
    clock_gettime(CLOCK_REALTIME, &moment);
    if (now) *now = moment.tv_sec;
    return moment.tv_sec;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    struct timespec moment = of_machine(until);
    return NEXT(pthread_cond_timedwait)(condition, mutex, &moment);
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex, const struct timespec *restrict until) {
    struct timespec moment = of_machine(until);
    return NEXT(pthread_mutex_timedlock)(mutex, &moment);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    struct timespec moment = of_machine(until);
    return NEXT(sem_timedwait)(semaphore, &moment);
}
