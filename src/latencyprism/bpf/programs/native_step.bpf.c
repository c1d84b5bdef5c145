// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * Entry and return of native functions in one process, as records in a ring.
 *
 * `hit` and `hit_return` are generic: the attach cookie selects a `point`, which says whether to copy
 * bytes that an argument points to, whether to wake the reader, and whether repeats are of interest.
 * `ubatch` additionally walks a llama.cpp micro-batch: which sequences, at which positions, how many
 * tokens, whether an output is wanted. Positions and counts only; token values are never read.
 */
#include "lp_bpf.h"
#include "lp_registers.h"

#define POINTS 32
#define ARGS 2
#define DATA_BYTES 24
#define MAX_RUNS 64
#define MAX_GROUPS 65536

#define POINT_WAKE 1  /* wake the reader on this record */
#define POINT_FIRST 2 /* drop a hit when the thread's last hit was at this same point */

#define HIT_RETURN 1
#define HIT_UNREAD 2    /* user memory could not be read: `data` or `runs` mean nothing */
#define HIT_TRUNCATED 4 /* more runs or groups than a record holds */

struct point {
    u32 flags;
    s32 data_arg; /* argument whose pointee is copied into `data`, or -1 */
    u32 data_offset;
    u32 reserved;
};

struct hit {
    u64 time_ns; /* CLOCK_MONOTONIC */
    u32 tid;     /* as seen from the reader's pid namespace */
    u16 point;
    u8 flags;
    u8 runs;
    u64 args[ARGS]; /* first arguments; at a return the returned value in args[0] */
    u8 data[DATA_BYTES];
};

/* Consecutive tokens of one sequence. */
struct run {
    s32 sequence;
    s32 first_position;
    u32 tokens;
    u32 output; /* 1: the last token's logits are wanted */
};

struct ubatch_hit {
    struct hit hit;
    struct run runs[MAX_RUNS];
};

/* What the loader sets before the program is verified. */
const volatile u32 target_tgid = 0;
const volatile u64 pidns_device = 0;
const volatile u64 pidns_inode = 0;
const volatile u64 wake_interval_ns = 0; /* least time between two wake-ups of the reader */
const volatile u32 ubatch_tokens = 4;
const volatile u32 ubatch_sequence_tokens = 8;
const volatile u32 ubatch_sequences = 12;
const volatile u32 ubatch_positions = 40;
const volatile u32 ubatch_sequence_ids = 56;
const volatile u32 ubatch_outputs = 80;
const volatile u32 ubatch_ids_per_sequence = 0; /* 1: the id array has one entry per sequence */
const volatile u32 ubatch_returns_object = 0;   /* 1: the function returns an object, not a pointer */

u64 lost = 0;  /* records the full ring refused */
u64 seen = 0;  /* hits in the target, before POINT_FIRST */
u64 woken_ns = 0;
u64 waking_ns = 0; /* when the last record was made that may wake */

/* What the reader sets at any time: a record that may wake does if it comes so long after the one before, or once
 * such records have been late by `spare_ns` together. */
struct usual {
    u64 base_ns; /* 0: each wakes */
    u64 decode_ns, prefill_ns; /* so much more for each sequence, for each further token computed meanwhile */
    u64 typical_1024; /* what is not late, in 1024ths of what is long */
    u64 spare_ns; /* 0: however late */
    u64 late_ns;
};
struct usual usual SEC(".data") = {};

u64 sequences = 0; /* computed since the last record that may wake */
u64 tokens = 0;    /* beyond one of each sequence */

struct {
    MAP_INT(type, BPF_MAP_TYPE_RINGBUF);
    MAP_INT(max_entries, 4096);
} ring SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_ARRAY);
    MAP_INT(max_entries, POINTS);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, struct point);
} points SEC(".maps");

struct {
    MAP_INT(type, BPF_MAP_TYPE_LRU_HASH);
    MAP_INT(max_entries, 4096);
    MAP_TYPE(key, u32);
    MAP_TYPE(value, u32);
} last_point SEC(".maps");

/* The calling thread's id in the reader's pid namespace if it belongs to the target, else 0. */
INLINE u32 thread_of_target(void)
{
    struct bpf_pidns_info ids = {};

    if (bpf_get_ns_current_pid_tgid(pidns_device, pidns_inode, &ids, sizeof(ids)))
        return 0;
    if (target_tgid && ids.tgid != target_tgid)
        return 0;
    return ids.pid;
}

INLINE int is_repeat(u32 tid, u32 index, const struct point *point)
{
    u32 *last = bpf_map_lookup_elem(&last_point, &tid);

    if (!last) {
        bpf_map_update_elem(&last_point, &tid, &index, BPF_ANY);
        return 0;
    }
    if (*last == index)
        return point->flags & POINT_FIRST;
    *last = index;
    return 0;
}

INLINE void fill(struct hit *hit, u32 tid, u32 index, u8 flags)
{
    hit->time_ns = bpf_ktime_get_ns();
    hit->tid = tid;
    hit->point = index;
    hit->flags = flags;
    hit->runs = 0;
}

/* A wake-up is an interrupt to this CPU: in a virtual machine it costs more than all the rest of a hit. */
INLINE u64 wake(const struct point *point, u64 now)
{
    u64 took = now - waking_ns, longest, typical, late;

    if (!(point->flags & POINT_WAKE))
        return BPF_RB_NO_WAKEUP;
    waking_ns = now;
    longest = usual.base_ns + usual.decode_ns * sequences + usual.prefill_ns * tokens;
    typical = (longest >> 10) * usual.typical_1024;
    late = usual.late_ns + took;
    late = late > typical ? late - typical : 0;
    sequences = tokens = 0;
    if (took < longest && (!usual.spare_ns || late < usual.spare_ns)) {
        usual.late_ns = late;
        return BPF_RB_NO_WAKEUP;
    }
    usual.late_ns = 0;
    if (now - woken_ns < wake_interval_ns)
        return BPF_RB_NO_WAKEUP;
    woken_ns = now;
    return BPF_RB_FORCE_WAKEUP;
}

INLINE int record(struct registers *regs, u8 flags)
{
    u32 index = (u32)bpf_get_attach_cookie(regs);
    u32 tid = thread_of_target();
    u64 first = ARG0(regs), second = ARG1(regs);
    struct point *point;
    struct hit *hit;

    /* Keeps the compiler from merging the two reads into one at a computed place of the context. */
    asm volatile("" : "+r"(first), "+r"(second));
    if (!tid)
        return 0;
    point = bpf_map_lookup_elem(&points, &index);
    if (!point)
        return 0;
    __sync_fetch_and_add(&seen, 1);
    if (is_repeat(tid, index, point))
        return 0;
    hit = bpf_ringbuf_reserve(&ring, sizeof(*hit), 0);
    if (!hit) {
        __sync_fetch_and_add(&lost, 1);
        return 0;
    }
    fill(hit, tid, index, flags);
    hit->args[0] = flags & HIT_RETURN ? RETURNED(regs) : first;
    hit->args[1] = second;
    if (point->data_arg >= 0) {
        u64 from = (point->data_arg ? second : first) + point->data_offset;

        if (bpf_probe_read_user(hit->data, DATA_BYTES, (void *)from))
            hit->flags |= HIT_UNREAD;
    } else {
        __builtin_memset(hit->data, 0, DATA_BYTES);
    }
    bpf_ringbuf_submit(hit, wake(point, hit->time_ns));
    return 0;
}

SEC("uprobe/hit")
int hit(struct registers *regs)
{
    return record(regs, 0);
}

SEC("uprobe/hit_return")
int hit_return(struct registers *regs)
{
    return record(regs, HIT_RETURN);
}

INLINE int read_u32(u32 *to, u64 from)
{
    return bpf_probe_read_user(to, sizeof(*to), (void *)from) != 0;
}

INLINE int read_u64(u64 *to, u64 from)
{
    return bpf_probe_read_user(to, sizeof(*to), (void *)from) != 0;
}

/* What one turn of the walk hands to the next. */
struct walk {
    struct ubatch_hit *record;
    u64 positions, ids, outputs;
    u32 group_tokens;
    u32 flags;
};

/* One group of tokens of one sequence; returns 1 to stop. */
NOINLINE long walk_group(u32 group, struct walk *walk)
{
    struct ubatch_hit *record = walk->record;
    u32 first = group * walk->group_tokens, last = first + walk->group_tokens - 1;
    u32 count = record->hit.runs;
    struct run *run = &record->runs[(count - 1) & (MAX_RUNS - 1)];
    u32 sequence, position;
    u64 id;
    u8 output = 0;

    if (read_u32(&position, walk->positions + 4ull * first) ||
        read_u64(&id, walk->ids + 8ull * (ubatch_ids_per_sequence ? group : first)) || read_u32(&sequence, id) ||
        bpf_probe_read_user(&output, 1, (void *)(walk->outputs + last))) {
        walk->flags = HIT_UNREAD;
        return 1;
    }
    if (count && run->sequence == (s32)sequence && run->first_position + run->tokens == position) {
        run->tokens += walk->group_tokens;
        run->output = output != 0;
        return 0;
    }
    if (count >= MAX_RUNS) {
        walk->flags = HIT_TRUNCATED;
        return 1;
    }
    run = &record->runs[count & (MAX_RUNS - 1)];
    run->sequence = sequence;
    run->first_position = position;
    run->tokens = walk->group_tokens;
    run->output = output != 0;
    record->hit.runs = count + 1;
    return 0;
}

/* Tokens come grouped by sequence, `group_tokens` each; neighbouring groups of one sequence are joined. */
INLINE u8 walk(struct ubatch_hit *record, u64 ubatch)
{
    struct walk walk = {.record = record};
    u32 groups;

    if (read_u32(&groups, ubatch + ubatch_sequences) ||
        read_u32(&walk.group_tokens, ubatch + ubatch_sequence_tokens) ||
        read_u64(&walk.positions, ubatch + ubatch_positions) ||
        read_u64(&walk.ids, ubatch + ubatch_sequence_ids) ||
        read_u64(&walk.outputs, ubatch + ubatch_outputs))
        return HIT_UNREAD;
    if (groups > MAX_GROUPS)
        return HIT_TRUNCATED;
    bpf_loop(groups, walk_group, &walk, 0);
    return walk.flags;
}

SEC("uprobe/ubatch")
int ubatch(struct registers *regs)
{
    u32 index = (u32)bpf_get_attach_cookie(regs);
    u32 tid = thread_of_target();
    u64 first = ARG0(regs), second = ARG1(regs), third = ARG2(regs);
    struct ubatch_hit *record;
    struct point *point;
    u32 computed;

    asm volatile("" : "+r"(first), "+r"(second), "+r"(third));
    if (ubatch_returns_object && HIDDEN_RESULT) {
        first = second;
        second = third;
    }
    if (!tid)
        return 0;
    point = bpf_map_lookup_elem(&points, &index);
    if (!point)
        return 0;
    __sync_fetch_and_add(&seen, 1);
    is_repeat(tid, index, point);
    record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);
    if (!record) {
        __sync_fetch_and_add(&lost, 1);
        return 0;
    }
    fill(&record->hit, tid, index, 0);
    record->hit.args[0] = first;
    record->hit.args[1] = second;
    if (bpf_probe_read_user(record->hit.data, DATA_BYTES, (void *)second))
        record->hit.flags |= HIT_UNREAD;
    else
        record->hit.flags |= walk(record, second);
    if (!record->hit.flags && !read_u32(&computed, second + ubatch_tokens)) {
        sequences += record->hit.runs;
        tokens += computed > record->hit.runs ? computed - record->hit.runs : 0;
    }
    bpf_ringbuf_submit(record, wake(point, record->hit.time_ns));
    return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
