// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What the threads of some processes waited for: one record each time a thread gets a CPU back.
 */
#include "lp_bpf.h"

#define COMM 16

struct task_struct {
    s32 pid;
    s32 tgid;
    char comm[COMM];
} __attribute__((preserve_access_index));

/* A thread that is off the CPU. */
struct wait {
    u64 on_ns;
    u64 out_ns;
    u64 wake_ns; /* 0: not woken (yet) */
    u32 state;   /* as the tracepoint gave it; 0: still runnable, the CPU was taken away */
    s32 by_pid;  /* who got the CPU instead */
    s32 waker_pid;
    u32 reserved;
    char by_comm[COMM];
};

struct switch_in {
    u64 on_ns;   /* when it had got the CPU before, 0 unknown */
    u64 out_ns;  /* when it lost the CPU */
    u64 wake_ns; /* when it was made runnable, 0: it had stayed runnable */
    u64 in_ns;   /* when it got the CPU back */
    s32 tid;
    s32 tgid;
    u32 state;
    u32 cpu;
    s32 after_pid; /* who ran on this CPU immediately before */
    s32 by_pid;    /* who got the CPU when this thread lost it */
    s32 waker_pid;
    u32 reserved;
    char comm[COMM];
    char after_comm[COMM];
    char by_comm[COMM];
};

u64 lost = 0;

struct {
    MAP_INT(type, BPF_MAP_TYPE_RINGBUF);
    MAP_INT(max_entries, 4096);
} ring SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_HASH);
    MAP_INT(max_entries, 256);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, u32);
} targets SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_LRU_HASH);
    MAP_INT(max_entries, 16384);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, struct wait);
} waits SEC(".maps");

INLINE int is_target(struct task_struct *task)
{
    u32 tgid = task->tgid;

    return bpf_map_lookup_elem(&targets, &tgid) != 0;
}

INLINE void leave(struct task_struct *task, struct task_struct *next, u32 state, u64 now)
{
    u32 tid = task->pid;
    struct wait fresh = {}, *wait = bpf_map_lookup_elem(&waits, &tid);

    if (!wait) {
        fresh.out_ns = now;
        fresh.state = state;
        fresh.by_pid = next->pid;
        bpf_probe_read_kernel(fresh.by_comm, COMM, next->comm);
        bpf_map_update_elem(&waits, &tid, &fresh, BPF_ANY);
        return;
    }
    wait->out_ns = now;
    wait->wake_ns = 0;
    wait->waker_pid = 0;
    wait->state = state;
    wait->by_pid = next->pid;
    bpf_probe_read_kernel(wait->by_comm, COMM, next->comm);
}

INLINE void enter(struct task_struct *task, struct task_struct *before, u64 now)
{
    u32 tid = task->pid;
    struct wait fresh = {}, *wait = bpf_map_lookup_elem(&waits, &tid);
    struct switch_in *record;

    if (!wait) {
        fresh.on_ns = now;
        bpf_map_update_elem(&waits, &tid, &fresh, BPF_ANY);
        return;
    }
    if (!wait->out_ns)
        return;
    record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);
    if (!record) {
        __sync_fetch_and_add(&lost, 1);
    } else {
        record->on_ns = wait->on_ns;
        record->out_ns = wait->out_ns;
        record->wake_ns = wait->wake_ns;
        record->in_ns = now;
        record->tid = tid;
        record->tgid = task->tgid;
        record->state = wait->state;
        record->cpu = bpf_get_smp_processor_id();
        record->after_pid = before->pid;
        record->by_pid = wait->by_pid;
        record->waker_pid = wait->waker_pid;
        record->reserved = 0;
        bpf_probe_read_kernel(record->comm, COMM, task->comm);
        bpf_probe_read_kernel(record->after_comm, COMM, before->comm);
        __builtin_memcpy(record->by_comm, wait->by_comm, COMM);
        bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
    }
    wait->on_ns = now;
    wait->out_ns = 0;
}

SEC("tp_btf/sched_switch")
int sched_switch(u64 *args)
{
    struct task_struct *prev = (void *)args[1], *next = (void *)args[2];
    u64 now = bpf_ktime_get_ns();

    if (is_target(prev))
        leave(prev, next, args[0] & 1 ? 0 : (u32)args[3], now);
    if (is_target(next))
        enter(next, prev, now);
    return 0;
}

INLINE int woken(struct task_struct *task)
{
    struct wait *wait;
    u32 tid;

    if (!is_target(task))
        return 0;
    tid = task->pid;
    wait = bpf_map_lookup_elem(&waits, &tid);
    if (wait && wait->out_ns && !wait->wake_ns) {
        wait->wake_ns = bpf_ktime_get_ns();
        wait->waker_pid = (u32)bpf_get_current_pid_tgid();
    }
    return 0;
}

SEC("tp_btf/sched_wakeup")
int sched_wakeup(u64 *args)
{
    return woken((void *)args[0]);
}

char _license[] SEC("license") = "Dual BSD/GPL";
