/* SPDX-License-Identifier: Apache-2.0
 *
 * The limit: a VM's owner makes the introspection ioctls itself.
 *
 *   native ROUNDS REQUEST:ID...
 *
 * Makes a VM, then ROUNDS times HOOK and every grant, and UNHOOK. Prints one line a
 * round: microseconds of the whole, and from HOOK's return to the last grant's.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define KVM_CREATE_VM 0xae01
#define HOOK 0x4018aec8
#define UNHOOK 0xaec9

struct hook {
	int32_t fd;
	uint32_t padding;
	uint8_t uuid[16];
};

struct feature {
	uint32_t allow;
	int32_t id;
};

static double now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

int main(int argc, char **argv)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	int rounds = argc > 1 ? atoi(argv[1]) : 0;

	if (vm < 0) {
		perror("KVM_CREATE_VM");
		return 1;
	}
	while (rounds-- > 0) {
		struct hook hook = { 0 };
		double start, hooked, end;
		int pair[2], i;

		if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
			return 1;
		hook.fd = pair[0];
		start = now_us();
		if (ioctl(vm, HOOK, &hook)) {
			perror("HOOK");
			return 1;
		}
		hooked = now_us();
		for (i = 2; i < argc; i++) {
			unsigned long request = strtoul(argv[i], NULL, 16);
			struct feature feature = { 1, atoi(strchr(argv[i], ':') + 1) };

			if (ioctl(vm, request, &feature)) {
				perror(argv[i]);
				return 1;
			}
		}
		end = now_us();
		printf("%.2f %.2f\n", end - start, end - hooked);
		ioctl(vm, UNHOOK, 0);
		close(pair[0]);
		close(pair[1]);
	}
	return 0;
}
