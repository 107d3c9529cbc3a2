/* SPDX-License-Identifier: Apache-2.0
 *
 * A victim that blocks in one system call and reports what that call returned to it.
 *
 *   parked CALL TIMEOUT_MS [OPTION...]
 *
 * CALL waits for a byte on stdin (ppoll, poll, epoll_wait, read) or for time
 * (nanosleep, clock_nanosleep, futex), or is "spin", which never blocks, or
 * "exit-leader", which leaves the process without its first thread. Before each call
 * it prints "ready", after it one line of results; each signal handler prints a line
 * of its own. A byte 'q' ends it.
 *
 * OPTIONs: restart (SA_RESTART), mask (a handler runs with all signals blocked),
 * block (SIGUSR1 stays blocked), churn (other threads come and go all the time),
 * worker (the kernel adds a worker thread of its own to the process), full (its stack
 * is used up to the last KiB).
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <errno.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define STACK_LEN 65536
#define GUARD_LEN 4096

static void on_signal(int number, siginfo_t *info, void *context)
{
	char line[128];
	int error = errno;
	int length = snprintf(line, sizeof(line), "signal number=%d code=%d pid=%d value=%d\n",
			      number, info->si_code, info->si_pid, info->si_value.sival_int);

	(void)context;
	if (write(1, line, length) != length)
		_exit(1);
	errno = error;
}

static void *sleep_for_ever(void *unused)
{
	for (;;)
		pause();
	return unused;
}

static void *end_at_once(void *unused)
{
	return unused;
}

static void *come_and_go(void *unused)
{
	for (;;) {
		pthread_t other;

		if (pthread_create(&other, NULL, end_at_once, NULL) == 0)
			pthread_join(other, NULL);
	}
	return unused;
}

static void start(void *(*run)(void *))
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, run, NULL))
		exit(1);
}

static void start_kernel_worker(void)
{
	struct io_uring_params params = { .flags = IORING_SETUP_SQPOLL };

	if (syscall(SYS_io_uring_setup, 4, &params) < 0) {
		perror("io_uring_setup");
		exit(1);
	}
}

static long elapsed_ms(const struct timespec *from)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (now.tv_sec - from->tv_sec) * 1000 + (now.tv_nsec - from->tv_nsec) / 1000000;
}

static long block(const char *call, long timeout_ms, int epoll_fd)
{
	struct timespec timeout = { timeout_ms / 1000, timeout_ms % 1000 * 1000000 };
	struct pollfd stdin_poll = { .fd = 0, .events = POLLIN };
	struct epoll_event event;
	static int word;

	if (!strcmp(call, "ppoll"))
		return ppoll(&stdin_poll, 1, timeout_ms < 0 ? NULL : &timeout, NULL);
	if (!strcmp(call, "poll"))
		return poll(&stdin_poll, 1, (int)timeout_ms);
	if (!strcmp(call, "epoll_wait"))
		return epoll_wait(epoll_fd, &event, 1, (int)timeout_ms);
	if (!strcmp(call, "nanosleep"))
		return nanosleep(&timeout, NULL);
	if (!strcmp(call, "clock_nanosleep")) {
		errno = clock_nanosleep(CLOCK_MONOTONIC, 0, &timeout, NULL);
		return errno ? -1 : 0;
	}
	if (!strcmp(call, "futex"))
		return syscall(SYS_futex, &word, FUTEX_WAIT, 0, &timeout, NULL, 0);
	if (!strcmp(call, "exit-leader")) {
		start(sleep_for_ever);
		pthread_exit(NULL);
	}
	if (!strcmp(call, "spin")) {
		for (;;)
			__asm__ volatile("pause");
	}
	return -2;
}

static struct {
	const char *call;
	long timeout_ms, result;
	int epoll_fd;
	char *stack;
	ucontext_t back;
} deep;

static void block_deep(void)
{
	char here;
	size_t unused = &here - deep.stack - 1024;
	volatile char *used = alloca(unused);

	used[0] = 0;
	deep.result = block(deep.call, deep.timeout_ms, deep.epoll_fd);
}

/* As block(), near the end of a stack below which nothing can be accessed. */
static long block_on_full_stack(const char *call, long timeout_ms, int epoll_fd)
{
	ucontext_t context;
	char *pages = mmap(NULL, GUARD_LEN + STACK_LEN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS,
			   -1, 0);

	if (pages == MAP_FAILED || mprotect(pages + GUARD_LEN, STACK_LEN, PROT_READ | PROT_WRITE))
		exit(1);
	block(call, 0, epoll_fd); /* binds what it calls, which takes more stack */
	deep.call = call;
	deep.timeout_ms = timeout_ms;
	deep.epoll_fd = epoll_fd;
	deep.stack = pages + GUARD_LEN;
	getcontext(&context);
	context.uc_stack.ss_sp = deep.stack;
	context.uc_stack.ss_size = STACK_LEN;
	context.uc_link = &deep.back;
	makecontext(&context, block_deep, 0);
	swapcontext(&deep.back, &context);
	munmap(pages, GUARD_LEN + STACK_LEN);
	return deep.result;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };
	struct epoll_event interest = { .events = EPOLLIN };
	int epoll_fd = epoll_create1(EPOLL_CLOEXEC);
	const char *call = argv[1];
	long timeout_ms = atol(argv[2]);
	sigset_t set;
	char byte = 0;
	int is_full = 0, i;

	for (i = 3; i < argc; i++) {
		if (!strcmp(argv[i], "restart"))
			action.sa_flags |= SA_RESTART;
		else if (!strcmp(argv[i], "mask"))
			sigfillset(&action.sa_mask);
		else if (!strcmp(argv[i], "block")) {
			sigemptyset(&set);
			sigaddset(&set, SIGUSR1);
			sigprocmask(SIG_BLOCK, &set, NULL);
		} else if (!strcmp(argv[i], "churn"))
			start(come_and_go);
		else if (!strcmp(argv[i], "worker"))
			start_kernel_worker();
		else if (!strcmp(argv[i], "full"))
			is_full = 1;
	}
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGUSR2, &action, NULL);
	sigaction(SIGRTMIN, &action, NULL);
	epoll_ctl(epoll_fd, EPOLL_CTL_ADD, 0, &interest);
	while (byte != 'q') {
		struct timespec start;
		long result;
		int error;

		clock_gettime(CLOCK_MONOTONIC, &start);
		dprintf(1, "ready\n");
		errno = 0;
		if (!strcmp(call, "read"))
			result = read(0, &byte, 1);
		else if (is_full)
			result = block_on_full_stack(call, timeout_ms, epoll_fd);
		else
			result = block(call, timeout_ms, epoll_fd);
		error = result < 0 ? errno : 0;
		sigpending(&set);
		dprintf(1, "result=%ld errno=%d elapsed_ms=%ld pending=%d\n", result, error,
			elapsed_ms(&start), sigismember(&set, SIGUSR1));
		if (strcmp(call, "read")) {
			struct pollfd stdin_poll = { .fd = 0, .events = POLLIN };

			/* Wait for the order to go on, whatever the call under test did. */
			while (poll(&stdin_poll, 1, -1) < 0)
				;
			if (read(0, &byte, 1) != 1)
				return 1;
		}
	}
	return 0;
}
