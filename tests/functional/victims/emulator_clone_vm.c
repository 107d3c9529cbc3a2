/* SPDX-License-Identifier: Apache-2.0
 * Hook a VM, then make COMMAND from a child that shares the memory of the VM's
 * creator under a process id of its own (CLONE_VM without CLONE_THREAD).
 * The arguments are the requests HOOK and COMMAND; prints "RESULT ERRNO CHILD-PID-DIFFERS".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define STACK_LEN 65536

static struct {
    int vm, result, error;
    unsigned long request;
    pid_t pid;
    struct { unsigned int allow; int id; } feature;
} shared = {.feature = {1, 8}};

static int child(void *unused)
{
    (void)unused;
    shared.pid = getpid();
    shared.result = ioctl(shared.vm, shared.request, &shared.feature);
    shared.error = shared.result < 0 ? errno : 0;
    return 0;
}

int main(int argc, char **argv)
{
    char *stack = malloc(STACK_LEN);
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    int pair[2];
    if (argc != 3 || !stack || kvm < 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        return 2;
    struct { int fd; unsigned int padding; unsigned char uuid[16]; } hook = {.fd = pair[0]};
    shared.request = strtoul(argv[2], NULL, 0);
    shared.vm = ioctl(kvm, 0xAE01, 0); /* KVM_CREATE_VM */
    if (ioctl(shared.vm, strtoul(argv[1], NULL, 0), &hook) < 0)
        return 3;
    pid_t pid = clone(child, stack + STACK_LEN, CLONE_VM | SIGCHLD, NULL);
    if (shared.vm < 0 || pid < 0 || waitpid(pid, NULL, 0) != pid)
        return 2;
    printf("%d %d %d\n", shared.result, shared.error, shared.pid != getpid());
    return 0;
}
