// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Calls of native functions in one process: how many, how long in all, and, where asked for, one record
 * each. The attach cookie is the function's index.
 */
#include "lp_bpf.h"
#include "lp_registers.h"

#define FUNCTIONS 512
#define ARGS 3
#define STREAM 1 /* a record for each call, not only the totals */

/* A call of bpf_session_cookie, which the loader completes with the number that this kernel gave it. */
#define SESSION_COOKIE_CALL ".byte 0x85, 0x20, 0, 0, 0x51, 0xe5, 0x51, 0xe5"
#define SESSION_RETURN_CALL ".byte 0x85, 0x20, 0, 0, 0x52, 0xe5, 0x52, 0xe5"

struct function {
    u32 flags;
    u32 reserved;
    u64 min_ns; /* shorter calls only count */
};

struct call {
    u64 start_ns; /* CLOCK_MONOTONIC */
    u64 end_ns;   /* the same as start_ns for an entry alone */
    u32 tid;      /* as seen from the reader's pid namespace */
    u32 function;
    u64 result;
    u64 args[ARGS];
};

struct open_call {
    u64 start_ns;
    u64 args[ARGS];
};

struct totals {
    u64 count;
    u64 ns;
    u64 longest_ns;
};

const volatile u32 target_tgid = 0;
const volatile u64 pidns_device = 0;
const volatile u64 pidns_inode = 0; /* 0: the initial namespace, whose numbers are at hand */

u64 lost = 0;     /* records the full ring refused */
u64 untimed = 0;  /* calls for which there was no room, or whose entry was not seen */

struct {
    MAP_INT(type, BPF_MAP_TYPE_RINGBUF);
    MAP_INT(max_entries, 4096);
} ring SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_ARRAY);
    MAP_INT(max_entries, FUNCTIONS);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, struct function);
} functions SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    MAP_INT(max_entries, FUNCTIONS);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, struct totals);
} totals SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_HASH);
    MAP_INT(max_entries, 8192);
    MAP_TYPE(key, u64);
    MAP_TYPE(value, struct open_call);
} open_calls SEC(".maps");

INLINE u32 thread_of_target(void)
{
    struct bpf_pidns_info ids = {};
    u64 both;

    if (!pidns_inode) {
        both = bpf_get_current_pid_tgid();
        return both >> 32 == target_tgid ? (u32)both : 0;
    }
    if (bpf_get_ns_current_pid_tgid(pidns_device, pidns_inode, &ids, sizeof(ids)) || ids.tgid != target_tgid)
        return 0;
    return ids.pid;
}

INLINE void count(u32 index, u64 spent)
{
    struct totals *of = bpf_map_lookup_elem(&totals, &index);

    if (!of)
        return;
    of->count++;
    of->ns += spent;
    if (spent > of->longest_ns)
        of->longest_ns = spent;
}

INLINE void finish(u32 index, u32 tid, const struct open_call *begun, u64 end, u64 result)
{
    u64 spent = end - begun->start_ns;
    struct function *function;
    struct call *call;

    count(index, spent);
    function = bpf_map_lookup_elem(&functions, &index);
    if (!function || !(function->flags & STREAM) || spent < function->min_ns)
        return;
    call = bpf_ringbuf_reserve(&ring, sizeof(*call), 0);
    if (!call) {
        __sync_fetch_and_add(&lost, 1);
        return;
    }
    call->start_ns = begun->start_ns;
    call->end_ns = end;
    call->tid = tid;
    call->function = index;
    call->result = result;
    __builtin_memcpy(call->args, begun->args, sizeof(call->args));
    bpf_ringbuf_submit(call, BPF_RB_NO_WAKEUP);
}

/* The three reads must stay apart: merged they would be a read at a computed place of the context. */
#define READ_ARGS(regs, into)                                                                                         \
    do {                                                                                                              \
        u64 first = ARG0(regs), second = ARG1(regs), third = ARG2(regs);                                              \
        asm volatile("" : "+r"(first), "+r"(second), "+r"(third));                                                    \
        (into)[0] = first;                                                                                            \
        (into)[1] = second;                                                                                           \
        (into)[2] = third;                                                                                            \
    } while (0)

/* An entry alone. */
SEC("uprobe/entry")
int entry(struct registers *regs)
{
    u32 index = (u32)bpf_get_attach_cookie(regs), tid = thread_of_target();
    struct open_call now = {};

    if (!tid)
        return 0;
    READ_ARGS(regs, now.args);
    now.start_ns = bpf_ktime_get_ns();
    finish(index, tid, &now, now.start_ns, 0);
    return 0;
}

/* Entry and return as two probes; a call is known by its thread and function. */
SEC("uprobe/begin")
int begin(struct registers *regs)
{
    u32 index = (u32)bpf_get_attach_cookie(regs), tid = thread_of_target();
    u64 key = (u64)tid << 32 | index;
    struct open_call now = {};

    if (!tid)
        return 0;
    READ_ARGS(regs, now.args);
    now.start_ns = bpf_ktime_get_ns();
    if (bpf_map_update_elem(&open_calls, &key, &now, BPF_ANY))
        __sync_fetch_and_add(&untimed, 1);
    return 0;
}

SEC("uprobe/end")
int end(struct registers *regs)
{
    u32 index = (u32)bpf_get_attach_cookie(regs), tid = thread_of_target();
    u64 key = (u64)tid << 32 | index;
    struct open_call *begun;

    if (!tid)
        return 0;
    begun = bpf_map_lookup_elem(&open_calls, &key);
    if (!begun) {
        __sync_fetch_and_add(&untimed, 1);
        return 0;
    }
    finish(index, tid, begun, bpf_ktime_get_ns(), RETURNED(regs));
    bpf_map_delete_elem(&open_calls, &key);
    return 0;
}

/* Entry and return as one probe, which keeps the time of entry itself (Linux 6.13): cheaper, and right for
 * recursion. It has no room for arguments. Returning 1 at entry says that the return is of no interest. */
SEC("uprobe/session")
int session(struct registers *regs)
{
    u32 index = (u32)bpf_get_attach_cookie(regs), tid = thread_of_target();
    struct open_call begun = {};
    u64 *cookie, returns;

    if (!tid)
        return 1;
    asm volatile(SESSION_RETURN_CALL "\n%[to] = r0" : [to] "=r"(returns) : : "r0", "r1", "r2", "r3", "r4", "r5");
    asm volatile(SESSION_COOKIE_CALL "\n%[to] = r0" : [to] "=r"(cookie) : : "r0", "r1", "r2", "r3", "r4", "r5");
    if (!(returns & 1)) {
        *cookie = bpf_ktime_get_ns();
        return 0;
    }
    begun.start_ns = *cookie;
    finish(index, tid, &begun, bpf_ktime_get_ns(), RETURNED(regs));
    return 0;
}

/* Nothing: what the trap itself costs. */
SEC("uprobe/empty")
int empty(struct registers *regs)
{
    return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
