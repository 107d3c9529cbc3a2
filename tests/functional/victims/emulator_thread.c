/* SPDX-License-Identifier: Apache-2.0
 * A thread that ends in the middle of an introspection ioctl, of a process that lives on.
 * The argument is the request COMMAND. Told what to do by lines on standard input:
 *   thread    starts a thread that makes COMMAND; prints its thread id
 *   end       lets a signal end that thread, and waits for it; prints "ended", and whether the
 *             call had come back before
 *   call      makes COMMAND from the main thread; prints the result and errno
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static struct { unsigned int allow; int id; } feature = {1, 8};
static unsigned long request;
static int vm, started[2];
static volatile int has_come_back;

static void end_thread(int number)
{
    (void)number;
    syscall(SYS_exit, 0);
}

static void *call(void *unused)
{
    pid_t tid = gettid();
    (void)unused;
    if (write(started[1], &tid, sizeof(tid)) == sizeof(tid)) {
        ioctl(vm, request, &feature);
        has_come_back = 1;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    char line[32];
    pthread_t thread;
    pid_t tid;

    if (argc != 2 || kvm < 0 || pipe(started) < 0)
        return 2;
    request = strtoul(argv[1], NULL, 0);
    vm = ioctl(kvm, 0xAE01, 0); /* KVM_CREATE_VM */
    signal(SIGUSR1, end_thread);
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (fgets(line, sizeof(line), stdin)) {
        if (!strcmp(line, "thread\n")) {
            if (pthread_create(&thread, NULL, call, NULL) ||
                read(started[0], &tid, sizeof(tid)) != sizeof(tid))
                return 3;
            printf("%d\n", tid);
        } else if (!strcmp(line, "end\n")) {
            pthread_kill(thread, SIGUSR1);
            pthread_join(thread, NULL);
            printf("ended %d\n", has_come_back);
        } else {
            int result = ioctl(vm, request, &feature);
            printf("%d %d\n", result, result < 0 ? errno : 0);
        }
    }
    return 0;
}
