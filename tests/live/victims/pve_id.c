// SPDX-License-Identifier: Apache-2.0
// Proxmox VE's QEMU takes an option "-id VMID" that does nothing but stand in the command
// line. Preloaded into another QEMU, this keeps it there and hides it from main().
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

typedef int main_function(int, char **, char **);
typedef int start_function(main_function *, int, char **, void (*)(void), void (*)(void),
			   void (*)(void), void *);

int __libc_start_main(main_function *main, int argc, char **argv, void (*init)(void),
		      void (*fini)(void), void (*rtld_fini)(void), void *stack_end)
{
	start_function *real = (start_function *)dlsym(RTLD_NEXT, "__libc_start_main");
	int from, to = 0;

	for (from = 0; from < argc; from++) {
		if (strcmp(argv[from], "-id") == 0)
			from++;
		else
			argv[to++] = argv[from];
	}
	argv[to] = NULL;
	return real(main, to, argv, init, fini, rtld_fini, stack_end);
}
