/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
 *
 * Arguments and result of a probed function, by architecture.
 */
#ifndef LP_REGISTERS_H
#define LP_REGISTERS_H

#if defined(LP_X86_64)
struct registers {
    u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};
#define ARG0(regs) ((regs)->di)
#define ARG1(regs) ((regs)->si)
#define ARG2(regs) ((regs)->dx)
#define HIDDEN_RESULT 1 /* the place of a returned object is passed as the first argument */
#define RETURNED(regs) ((regs)->ax)
#elif defined(LP_AARCH64)
struct registers {
    u64 x[31], sp, pc, pstate;
};
#define ARG0(regs) ((regs)->x[0])
#define ARG1(regs) ((regs)->x[1])
#define ARG2(regs) ((regs)->x[2])
#define HIDDEN_RESULT 0 /* it has a register of its own, x8 */
#define RETURNED(regs) ((regs)->x[0])
#else
#error "define LP_X86_64 or LP_AARCH64"
#endif

#endif
