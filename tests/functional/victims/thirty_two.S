/* SPDX-License-Identifier: Apache-2.0 */
/* A 32-bit process that waits for ever in pause(2). */
	.globl _start
_start:
	movl $29, %eax
	int $0x80
	jmp _start
	.section .note.GNU-stack, "", @progbits
