/* SPDX-License-Identifier: Apache-2.0
 * A VM process without a guest, as small as can be: see fleet.py.
 *
 *   fleet_vm                    for each line "NAME UUID VCPUS" on standard input starts such a
 *                               process, and ends with it: they are killed then
 *   qemu-system-x86_64 -name guest=NAME,.. -uuid UUID -smp VCPUS .. -S
 *                               is one: a real VM with its vCPUs and one page of memory,
 *                               the main thread in ppoll(2) as QEMU's is
 *
 * A VM that is ready says "NAME PID" on standard output, in one write.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define LINE_LEN 512

static void die(const char *what)
{
	fprintf(stderr, "fleet_vm: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static int checked(int result, const char *what)
{
	if (result < 0)
		die(what);
	return result;
}

/* argv as the parent below makes it. */
static _Noreturn void be_vm(char **argv)
{
	struct kvm_userspace_memory_region region = { .memory_size = PAGE };
	const char *name = argv[2] + strlen("guest=");
	int vcpus = atoi(argv[6]);
	char line[LINE_LEN];
	int kvm, vm, i, length;

	/* Only now: a parent that ended before this could not have told. */
	checked(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl");
	checked(prctl(PR_SET_NAME, argv[0]), "prctl");
	signal(SIGPIPE, SIG_IGN); /* as QEMU does: a PREUNHOOK may raise it */
	kvm = checked(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
	vm = checked(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
	region.userspace_addr = (unsigned long)mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
						    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (region.userspace_addr == (unsigned long)MAP_FAILED)
		die("mmap");
	checked(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
	for (i = 0; i < vcpus; i++)
		checked(ioctl(vm, KVM_CREATE_VCPU, i), "KVM_CREATE_VCPU");

	length = snprintf(line, sizeof(line), "%.*s %d\n", (int)strcspn(name, ","), name, getpid());
	if (write(1, line, length) != length)
		die("standard output");
	/* Nobody may wait for the end of that pipe and find us at it. */
	checked(dup2(checked(open("/dev/null", O_RDWR | O_CLOEXEC), "/dev/null"), 1), "dup2");
	for (;;)
		ppoll(NULL, 0, NULL, NULL);
}

static void start(const char *name, const char *uuid, const char *vcpus)
{
	char guest[2 * LINE_LEN];
	const char *const argv[] = {
		"qemu-system-x86_64", "-name", guest, "-uuid", uuid, "-smp", vcpus, "-S", NULL,
	};
	pid_t child;

	snprintf(guest, sizeof(guest), "guest=%s,debug-threads=on", name);
	child = checked(fork(), "fork");
	if (child == 0) {
		signal(SIGCHLD, SIG_DFL);
		checked(dup2(checked(open("/dev/null", O_RDWR | O_CLOEXEC), "/dev/null"), 0), "dup2");
		execv("/proc/self/exe", (char *const *)argv);
		die("execv");
	}
}

/* None becomes a zombie, and none that was not killed ends unnoticed. */
static void reap(int number)
{
	char text[LINE_LEN];
	int status, saved = errno, length;
	pid_t child;

	(void)number;
	while ((child = waitpid(-1, &status, WNOHANG)) > 0) {
		if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL)
			continue;
		length = snprintf(text, sizeof(text), "fleet_vm: VM process %d ended: %s %d\n", child,
				  WIFSIGNALED(status) ? "signal" : "exit code",
				  WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
		if (write(2, text, length) != length)
			break;
	}
	errno = saved;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = reap, .sa_flags = SA_RESTART | SA_NOCLDSTOP };
	char line[LINE_LEN], name[LINE_LEN], uuid[LINE_LEN], vcpus[LINE_LEN];

	if (argc > 1)
		be_vm(argv);
	checked(sigaction(SIGCHLD, &action, NULL), "sigaction");
	while (fgets(line, sizeof(line), stdin))
		if (sscanf(line, "%s %s %s", name, uuid, vcpus) == 3)
			start(name, uuid, vcpus);
	return 0;
}
