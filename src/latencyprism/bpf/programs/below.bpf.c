// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What kept the threads of some processes from running: for the CPU (and who had it), for a lock, a disk, a
 * socket, a page; time that interrupts took from them; what the machine did meanwhile.
 *
 * Every wait is added to its thread's totals; one of at least `min_ns` also becomes a record in the ring,
 * which never wakes its reader. What the thread waited for is told by the system call it is in, which the
 * kernel keeps with its registers: no system call has to be traced for it.
 */
#include "lp_bpf.h"

#define COMM 16
#define SYSCALLS 512
#define NO_SYSCALL -1
#define FILTER_BYTES 8192

enum kind {
    NONE,
    PREEMPTED, /* another thread got the CPU */
    YIELDED,   /* it offered the CPU itself */
    QUEUED,    /* woken, waiting for a CPU */
    THROTTLED, /* its control group has used up its quota */
    FUTEX,     /* from here on: asleep, by what its system call waits for */
    SLEEP,
    POLL,
    READ,
    WRITE,
    SYNC,
    FILES,
    CHILD,
    DEVICE,
    MEMORY,
    FAULT, /* no system call: a page is being read, or memory is being made free */
    STOPPED,
    OTHER,
    IRQ, /* from here on: time taken from a thread while it had the CPU */
    SOFTIRQ,
    RECLAIM,
    COMPACTION,
    TOTALS, /* kinds above have totals for each thread */
    SYSCALL = TOTALS,
    FAULTS,
    OOM,
    FREQUENCY,
    RETRANSMIT,
};

enum hit { SWITCH, MINE, WAKING, INTERRUPT, RARE, ENTER, HITS = 8 };

struct cfs_rq {
    int throttle_count;
} __attribute__((preserve_access_index));

struct sched_entity {
    struct cfs_rq *cfs_rq;
} __attribute__((preserve_access_index));

struct task_struct {
    s32 pid;
    s32 tgid;
    char comm[COMM];
    struct sched_entity se;
    unsigned long min_flt;
    unsigned long maj_flt;
    unsigned in_iowait : 1;
} __attribute__((preserve_access_index));

/* The system call's number lies in one place on x86-64, in another on aarch64. */
struct pt_regs {
    unsigned long orig_ax;
} __attribute__((preserve_access_index));

struct pt_regs___aarch64 {
    s32 syscallno;
} __attribute__((preserve_access_index));

struct irqaction {
    const char *name;
} __attribute__((preserve_access_index));

struct sock_common {
    u16 skc_num;
    u16 skc_dport;
} __attribute__((preserve_access_index));

struct inode {
    unsigned long i_ino;
} __attribute__((preserve_access_index));

struct file {
    struct inode *f_inode;
} __attribute__((preserve_access_index));

struct socket {
    struct file *file;
} __attribute__((preserve_access_index));

struct sock {
    struct sock_common __sk_common;
    struct socket *sk_socket;
} __attribute__((preserve_access_index));

/* A thread outside of our targets or inside: who did it. */
struct who {
    s32 tid;
    s32 tgid;
    char comm[COMM];
};

struct interval {
    u64 start_ns; /* CLOCK_MONOTONIC */
    u64 end_ns;
    s32 tid;
    s32 tgid;
    u8 kind;
    u8 iowait;   /* it waited for a block device */
    s16 syscall; /* the number, or NO_SYSCALL */
    u32 value;   /* CPU; interrupt; FAULTS: minor faults; FREQUENCY: kHz; RETRANSMIT: both ports */
    struct who culprit; /* FAULTS: tid holds the major faults; RETRANSMIT: tid and tgid the socket's inode */
};

struct totals {
    u64 ns[TOTALS];
    u64 count[TOTALS];
    u64 iowait_ns;
    u64 major_faults;
    u64 minor_faults;
};

struct thread {
    struct totals totals; /* first: the reader takes these */
    u64 on_ns;
    u64 out_ns; /* 0: it has a CPU */
    u64 wake_ns;
    u64 reclaim_ns;
    u64 compaction_ns;
    u64 syscall_ns;
    u64 major_faults; /* the kernel's own counts when last seen */
    u64 minor_faults;
    s32 syscall;
    s16 waits_in;
    u8 faults_known;
    u8 kind;
    u8 slept_in_fault;
    u8 iowait;
    u8 wake_throttled;
    u8 runnable;
    u32 out_cpu;
    struct who taker; /* who got the CPU first when it was taken away */
    struct who waker;
};

struct cpu {
    u64 hits[HITS];
    u64 since_ns; /* when the thread on this CPU got it */
    u64 softirq_ns;
    u64 irq_ns;
    u64 nested_ns;
    u64 khz;
    u64 longest_ns;     /* of those who ran here since a target lost this CPU: the longest, */
    struct who longest; /* and who that was */
};

struct settings {
    u64 min_ns;
    u64 syscall_min_ns;
};

struct call_key {
    u32 tid;
    u32 number;
};

struct call_totals {
    u64 count;
    u64 ns;
    u64 longest_ns;
};

const volatile u8 classes[SYSCALLS] = {}; /* kind of wait by system call */

/* One bit for each target, by the low bits of its number: most threads of a machine are told apart by it
 * without a look into a table. */
u8 filter[FILTER_BYTES] SEC(".data") = {};

u64 lost = 0;      /* records the full ring refused */
u64 untracked = 0; /* threads for which there was no room */

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
    MAP_INT(type, BPF_MAP_TYPE_HASH);
    MAP_INT(max_entries, 4096);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, struct thread);
} threads SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    MAP_INT(max_entries, 1);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, struct cpu);
} cpus SEC(".maps");

/* A thread is several hundred bytes: more than the stack should hold. */
struct {
    MAP_INT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
    MAP_INT(max_entries, 1);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, struct thread);
} blank SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_ARRAY);
    MAP_INT(max_entries, 1);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, struct settings);
} settings SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_LRU_HASH);
    MAP_INT(max_entries, 8192);
    MAP_TYPE(key, struct call_key);
    MAP_TYPE(value, struct call_totals);
} calls SEC(".maps");

INLINE struct cpu *this_cpu(u32 hit)
{
    u32 zero = 0;
    struct cpu *cpu = bpf_map_lookup_elem(&cpus, &zero);

    if (cpu)
        cpu->hits[hit]++;
    return cpu;
}

INLINE struct settings *limits(void)
{
    u32 zero = 0;

    return bpf_map_lookup_elem(&settings, &zero);
}

INLINE int is_target(u32 tgid)
{
    if (!(filter[(tgid >> 3) & (FILTER_BYTES - 1)] & 1 << (tgid & 7)))
        return 0;
    return bpf_map_lookup_elem(&targets, &tgid) != 0;
}

INLINE struct thread *thread_of(u32 tid)
{
    struct thread *found = bpf_map_lookup_elem(&threads, &tid), *empty;
    u32 zero = 0;

    if (found)
        return found;
    empty = bpf_map_lookup_elem(&blank, &zero);
    if (!empty)
        return 0;
    if (bpf_map_update_elem(&threads, &tid, empty, BPF_ANY)) {
        __sync_fetch_and_add(&untracked, 1);
        return 0;
    }
    return bpf_map_lookup_elem(&threads, &tid);
}

/* The thread that runs here, if it is a target's. */
INLINE struct thread *current_target(u64 *ids)
{
    *ids = bpf_get_current_pid_tgid();
    return is_target(*ids >> 32) ? thread_of((u32)*ids) : 0;
}

INLINE void name(struct who *who, struct task_struct *task)
{
    who->tid = task->pid;
    who->tgid = task->tgid;
    bpf_probe_read_kernel(who->comm, COMM, task->comm);
}

INLINE struct interval *reserve(u8 kind, u64 start, u64 end, s32 tid, s32 tgid)
{
    struct interval *record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);

    if (!record) {
        __sync_fetch_and_add(&lost, 1);
        return 0;
    }
    record->start_ns = start;
    record->end_ns = end;
    record->tid = tid;
    record->tgid = tgid;
    record->kind = kind;
    record->iowait = 0;
    record->syscall = NO_SYSCALL;
    record->value = bpf_get_smp_processor_id();
    __builtin_memset(&record->culprit, 0, sizeof(record->culprit));
    return record;
}

INLINE void submit(struct interval *record)
{
    bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
}

/* Adds to the totals; true if it is long enough for a record. */
INLINE int account(struct thread *thread, u32 kind, u64 start, u64 end)
{
    struct settings *limit = limits();
    u64 spent = end - start;

    if (kind >= TOTALS || end <= start)
        return 0;
    thread->totals.ns[kind] += spent;
    thread->totals.count[kind]++;
    return limit && spent >= limit->min_ns;
}

INLINE int throttled(struct task_struct *task)
{
    struct cfs_rq *queue;

    if (!__builtin_preserve_field_info(((struct cfs_rq *)0)->throttle_count, 2) ||
        !__builtin_preserve_field_info(((struct sched_entity *)0)->cfs_rq, 2))
        return 0;
    queue = task->se.cfs_rq;
    return queue && queue->throttle_count > 0;
}

INLINE int waits_for_io(struct task_struct *task)
{
    u64 value = 0;
    const void *at = (const void *)task + __builtin_preserve_field_info(task->in_iowait, 0);

    asm volatile("" : "+r"(at));
    switch (__builtin_preserve_field_info(task->in_iowait, 1)) {
    case 1:
        value = *(const u8 *)at;
        break;
    case 2:
        value = *(const u16 *)at;
        break;
    case 4:
        value = *(const u32 *)at;
        break;
    case 8:
        value = *(const u64 *)at;
        break;
    }
    value <<= __builtin_preserve_field_info(task->in_iowait, 4);
    return (value >> __builtin_preserve_field_info(task->in_iowait, 5)) != 0;
}

/* The number of the system call that the thread is in, or NO_SYSCALL. */
INLINE s32 syscall_of(struct task_struct *task)
{
    void *registers = bpf_task_pt_regs(task);

    if (__builtin_preserve_field_info(((struct pt_regs *)0)->orig_ax, 2))
        return (s32)((struct pt_regs *)registers)->orig_ax;
    if (__builtin_preserve_field_info(((struct pt_regs___aarch64 *)0)->syscallno, 2))
        return ((struct pt_regs___aarch64 *)registers)->syscallno;
    return NO_SYSCALL;
}

INLINE u8 class_of(s32 number)
{
    u32 at = (u32)number;

    return at < SYSCALLS ? classes[at] : 0;
}

#define TASK_STOPPED 4
#define TASK_TRACED 8
#define TASK_DEAD 0x80

INLINE void faults(struct thread *thread, struct task_struct *task, u64 now)
{
    u64 major = task->maj_flt, minor = task->min_flt, more = major - thread->major_faults;
    u64 since = thread->on_ns && thread->on_ns < now ? thread->on_ns : now;
    struct interval *record;

    if (thread->faults_known) {
        thread->totals.minor_faults += minor - thread->minor_faults;
        thread->totals.major_faults += more;
        /* The kernel counts a fault when it is over: that is after the sleep in which it was served. One that
         * was served without sleep happened at some time since the thread last got the CPU. */
        if (more && (record = reserve(FAULTS, since, thread->slept_in_fault ? since : now, task->pid, task->tgid))) {
            record->culprit.tid = (s32)more;
            record->value = (u32)(minor - thread->minor_faults);
            submit(record);
        }
    }
    thread->faults_known = 1;
    thread->major_faults = major;
    thread->minor_faults = minor;
}

INLINE void leave(struct task_struct *task, struct task_struct *next, u32 state, int preempted, u64 now, struct cpu *cpu)
{
    struct thread *thread = thread_of(task->pid);
    s32 number;
    u8 class;

    if (!thread)
        return;
    faults(thread, task, now);
    if (!preempted && state & TASK_DEAD) {
        u32 tid = task->pid;

        bpf_map_delete_elem(&threads, &tid);
        return;
    }
    number = syscall_of(task);
    class = class_of(number);
    thread->out_ns = now;
    thread->wake_ns = 0;
    thread->wake_throttled = 0;
    thread->waker.tid = 0;
    thread->iowait = 0;
    thread->waits_in = number >= 0 && number < 32767 ? number : NO_SYSCALL;
    thread->runnable = preempted || !state;
    thread->slept_in_fault = 0;
    if (thread->runnable) {
        thread->kind = throttled(task) ? THROTTLED : !preempted && class == YIELDED ? YIELDED : PREEMPTED;
        thread->out_cpu = bpf_get_smp_processor_id();
        name(&thread->taker, next);
        cpu->longest_ns = 0;
        return;
    }
    thread->iowait = waits_for_io(task);
    if (state & (TASK_STOPPED | TASK_TRACED))
        thread->kind = STOPPED;
    else if (number < 0) {
        thread->kind = FAULT;
        thread->slept_in_fault = 1;
    } else
        thread->kind = class ? class : OTHER;
}

INLINE void wait_record(struct thread *thread, struct task_struct *task, u8 kind, u64 start, u64 end,
                        const struct who *culprit)
{
    struct interval *record;

    if (!account(thread, kind, start, end))
        return;
    record = reserve(kind, start, end, task->pid, task->tgid);
    if (!record)
        return;
    record->iowait = thread->iowait;
    record->syscall = thread->waits_in;
    __builtin_memcpy(&record->culprit, culprit, sizeof(*culprit));
    submit(record);
}

INLINE void enter(struct task_struct *task, struct task_struct *before, u64 now, struct cpu *cpu)
{
    struct thread *thread = thread_of(task->pid);
    u64 out, wake;

    if (!thread)
        return;
    if (!thread->faults_known) {
        thread->faults_known = 1;
        thread->major_faults = task->maj_flt;
        thread->minor_faults = task->min_flt;
    }
    out = thread->out_ns;
    if (out && thread->runnable) {
        int here = thread->out_cpu == bpf_get_smp_processor_id() && cpu->longest_ns && cpu->longest.tid;

        wait_record(thread, task, thread->kind, out, now, here ? &cpu->longest : &thread->taker);
    } else if (out) {
        struct who last = {};

        wake = thread->wake_ns > out ? thread->wake_ns : now;
        if (thread->iowait)
            thread->totals.iowait_ns += wake - out;
        wait_record(thread, task, thread->kind, out, wake, &thread->waker);
        thread->iowait = 0;
        name(&last, before);
        wait_record(thread, task, thread->wake_throttled ? THROTTLED : QUEUED, wake, now, &last);
    }
    thread->on_ns = now;
    thread->out_ns = 0;
}

SEC("tp_btf/sched_switch")
int sched_switch(u64 *args)
{
    struct task_struct *prev = (void *)args[1], *next = (void *)args[2];
    u64 now = bpf_ktime_get_ns(), ran;
    struct cpu *cpu = this_cpu(SWITCH);

    if (!cpu)
        return 0;
    ran = now - cpu->since_ns;
    if (cpu->since_ns && ran > cpu->longest_ns) {
        cpu->longest_ns = ran;
        name(&cpu->longest, prev);
    }
    cpu->since_ns = now;
    if (is_target(prev->tgid)) {
        cpu->hits[MINE]++;
        leave(prev, next, (u32)args[3], args[0] & 1, now, cpu);
    }
    if (is_target(next->tgid)) {
        cpu->hits[MINE]++;
        enter(next, prev, now, cpu);
    }
    return 0;
}

SEC("tp_btf/sched_waking")
int sched_waking(u64 *args)
{
    struct task_struct *task = (void *)args[0];
    struct thread *thread;
    u64 ids;
    u32 tid;

    this_cpu(WAKING);
    if (!is_target(task->tgid))
        return 0;
    tid = task->pid;
    thread = bpf_map_lookup_elem(&threads, &tid);
    if (!thread || !thread->out_ns || thread->runnable || thread->wake_ns)
        return 0;
    thread->wake_ns = bpf_ktime_get_ns();
    thread->wake_throttled = throttled(task);
    /* Whoever runs here: the waker, or the one that an interrupt broke into. */
    ids = bpf_get_current_pid_tgid();
    thread->waker.tid = (u32)ids;
    thread->waker.tgid = ids >> 32;
    bpf_get_current_comm(thread->waker.comm, COMM);
    return 0;
}

INLINE void taken(struct thread *thread, u64 ids, u8 kind, u64 start, u64 end, u32 value, const char *what)
{
    struct interval *record;

    if (!account(thread, kind, start, end))
        return;
    record = reserve(kind, start, end, (u32)ids, ids >> 32);
    if (!record)
        return;
    record->value = value;
    if (what)
        bpf_probe_read_kernel_str(record->culprit.comm, COMM, what);
    submit(record);
}

SEC("tp_btf/irq_handler_entry")
int irq_handler_entry(u64 *args)
{
    struct cpu *cpu = this_cpu(INTERRUPT);

    if (cpu)
        cpu->irq_ns = is_target(bpf_get_current_pid_tgid() >> 32) ? bpf_ktime_get_ns() : 0;
    return 0;
}

SEC("tp_btf/irq_handler_exit")
int irq_handler_exit(u64 *args)
{
    struct irqaction *action = (void *)args[1];
    struct cpu *cpu = this_cpu(INTERRUPT);
    struct thread *thread;
    u64 now, ids;

    if (!cpu || !cpu->irq_ns)
        return 0;
    now = bpf_ktime_get_ns();
    cpu->nested_ns += now - cpu->irq_ns;
    thread = current_target(&ids);
    if (thread)
        taken(thread, ids, IRQ, cpu->irq_ns, now, (u32)args[0], action->name);
    cpu->irq_ns = 0;
    return 0;
}

SEC("tp_btf/softirq_entry")
int softirq_entry(u64 *args)
{
    struct cpu *cpu = this_cpu(INTERRUPT);

    if (!cpu)
        return 0;
    cpu->softirq_ns = is_target(bpf_get_current_pid_tgid() >> 32) ? bpf_ktime_get_ns() : 0;
    cpu->nested_ns = 0;
    return 0;
}

SEC("tp_btf/softirq_exit")
int softirq_exit(u64 *args)
{
    struct cpu *cpu = this_cpu(INTERRUPT);
    struct thread *thread;
    u64 ids, start;

    if (!cpu || !cpu->softirq_ns)
        return 0;
    /* An interrupt that came in between has its own account. */
    start = cpu->softirq_ns + cpu->nested_ns;
    thread = current_target(&ids);
    if (thread)
        taken(thread, ids, SOFTIRQ, start, bpf_ktime_get_ns(), (u32)args[0], 0);
    cpu->softirq_ns = 0;
    return 0;
}

INLINE int begin_reclaim(void)
{
    struct thread *thread;
    u64 ids;

    this_cpu(RARE);
    thread = current_target(&ids);
    if (thread)
        thread->reclaim_ns = bpf_ktime_get_ns();
    return 0;
}

INLINE int end_reclaim(void)
{
    struct thread *thread;
    u64 ids;

    this_cpu(RARE);
    thread = current_target(&ids);
    if (thread && thread->reclaim_ns) {
        taken(thread, ids, RECLAIM, thread->reclaim_ns, bpf_ktime_get_ns(), 0, 0);
        thread->reclaim_ns = 0;
    }
    return 0;
}

SEC("tp_btf/mm_vmscan_direct_reclaim_begin")
int mm_vmscan_direct_reclaim_begin(u64 *args)
{
    return begin_reclaim();
}

SEC("tp_btf/mm_vmscan_direct_reclaim_end")
int mm_vmscan_direct_reclaim_end(u64 *args)
{
    return end_reclaim();
}

SEC("tp_btf/mm_vmscan_memcg_reclaim_begin")
int mm_vmscan_memcg_reclaim_begin(u64 *args)
{
    return begin_reclaim();
}

SEC("tp_btf/mm_vmscan_memcg_reclaim_end")
int mm_vmscan_memcg_reclaim_end(u64 *args)
{
    return end_reclaim();
}

SEC("tp_btf/mm_compaction_begin")
int mm_compaction_begin(u64 *args)
{
    struct thread *thread;
    u64 ids;

    this_cpu(RARE);
    thread = current_target(&ids);
    if (thread)
        thread->compaction_ns = bpf_ktime_get_ns();
    return 0;
}

SEC("tp_btf/mm_compaction_end")
int mm_compaction_end(u64 *args)
{
    struct thread *thread;
    u64 ids;

    this_cpu(RARE);
    thread = current_target(&ids);
    if (thread && thread->compaction_ns) {
        taken(thread, ids, COMPACTION, thread->compaction_ns, bpf_ktime_get_ns(), 0, 0);
        thread->compaction_ns = 0;
    }
    return 0;
}

/* Before 6.8 the argument is the victim's number, since then its task. */
SEC("raw_tp/mark_victim")
int mark_victim(u64 *args)
{
    struct task_struct *task = (void *)args[0];
    struct interval *record;
    u64 now = bpf_ktime_get_ns();

    this_cpu(RARE);
    record = reserve(OOM, now, now, 0, 0);
    if (!record)
        return 0;
    record->culprit.tid = record->culprit.tgid = (s32)args[0];
    if (args[0] >> 32) {
        bpf_probe_read_kernel(&record->culprit.tid, 4, &task->pid);
        bpf_probe_read_kernel(&record->culprit.tgid, 4, &task->tgid);
        bpf_probe_read_kernel(record->culprit.comm, COMM, task->comm);
    }
    submit(record);
    return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int tcp_retransmit_skb(u64 *args)
{
    struct sock *socket = (void *)args[0];
    u64 now = bpf_ktime_get_ns(), inode = 0;
    struct interval *record;
    struct socket *of;
    struct file *file;
    u32 ports;

    this_cpu(RARE);
    of = socket->sk_socket;
    if (of && (file = of->file))
        inode = file->f_inode->i_ino;
    ports = (u32)socket->__sk_common.skc_num << 16 | __builtin_bswap16(socket->__sk_common.skc_dport);
    record = reserve(RETRANSMIT, now, now, 0, 0);
    if (!record)
        return 0;
    record->value = ports;
    record->culprit.tid = (u32)inode;
    record->culprit.tgid = inode >> 32;
    submit(record);
    return 0;
}

/* Some drivers report every small step: only a change by a sixteenth is news. */
SEC("tp_btf/cpu_frequency")
int cpu_frequency(u64 *args)
{
    u64 now = bpf_ktime_get_ns(), khz = (u32)args[0], change;
    struct cpu *cpu = this_cpu(RARE);
    struct interval *record;

    if (!cpu)
        return 0;
    change = khz > cpu->khz ? khz - cpu->khz : cpu->khz - khz;
    if (change * 16 < khz)
        return 0;
    cpu->khz = khz;
    record = reserve(FREQUENCY, now, now, 0, 0);
    if (!record)
        return 0;
    record->culprit.tid = (u32)args[1];
    record->value = khz;
    submit(record);
    return 0;
}

SEC("tp_btf/sys_enter")
int sys_enter(u64 *args)
{
    struct thread *thread;
    u64 ids;

    this_cpu(ENTER);
    thread = current_target(&ids);
    if (!thread)
        return 0;
    thread->syscall_ns = bpf_ktime_get_ns();
    thread->syscall = (s32)args[1];
    return 0;
}

SEC("tp_btf/sys_exit")
int sys_exit(u64 *args)
{
    struct call_totals fresh = {.count = 1}, *totals;
    struct call_key key = {};
    struct settings *limit = limits();
    struct interval *record;
    struct thread *thread;
    u64 now, ids, spent;

    this_cpu(ENTER);
    thread = current_target(&ids);
    if (!thread || !thread->syscall_ns)
        return 0;
    now = bpf_ktime_get_ns();
    spent = now - thread->syscall_ns;
    key.tid = (u32)ids;
    key.number = thread->syscall;
    totals = bpf_map_lookup_elem(&calls, &key);
    if (totals) {
        totals->count++;
        totals->ns += spent;
        if (spent > totals->longest_ns)
            totals->longest_ns = spent;
    } else {
        fresh.ns = fresh.longest_ns = spent;
        bpf_map_update_elem(&calls, &key, &fresh, BPF_ANY);
    }
    if (limit && spent >= limit->syscall_min_ns &&
        (record = reserve(SYSCALL, thread->syscall_ns, now, (u32)ids, ids >> 32))) {
        record->syscall = (s16)thread->syscall;
        submit(record);
    }
    thread->syscall_ns = 0;
    return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
