/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
 *
 * The little of the kernel's interface that these programs need, so that a compiler alone builds them:
 * no kernel headers, no generated vmlinux.h. Kernel structures carry preserve_access_index and hold only
 * the members read; the kernel puts the true offsets in when it loads the program.
 */
#ifndef LP_BPF_H
#define LP_BPF_H

typedef signed char s8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef signed short s16;
typedef signed int s32;
typedef unsigned int u32;
typedef signed long long s64;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define NOINLINE static __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))

/* How a map is described to the loader, in BTF. */
#define MAP_INT(name, value) int(*name)[value]
#define MAP_TYPE(name, type) typeof(type) *name

#define BPF_MAP_TYPE_HASH 1
#define BPF_MAP_TYPE_ARRAY 2
#define BPF_MAP_TYPE_PERCPU_ARRAY 6
#define BPF_MAP_TYPE_LRU_HASH 9
#define BPF_MAP_TYPE_RINGBUF 27

#define BPF_ANY 0
#define BPF_RB_NO_WAKEUP 1
#define BPF_RB_FORCE_WAKEUP 2

struct bpf_pidns_info {
    u32 pid;
    u32 tgid;
};

/* Helpers by their numbers, which are part of the kernel's stable interface. */
static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*bpf_map_delete_elem)(void *map, const void *key) = (void *)3;
static u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static u32 (*bpf_get_smp_processor_id)(void) = (void *)8;
static u64 (*bpf_get_current_pid_tgid)(void) = (void *)14;
static long (*bpf_get_current_comm)(void *to, u32 size) = (void *)16;
static long (*bpf_probe_read_user)(void *to, u32 size, const void *from) = (void *)112;
static long (*bpf_probe_read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static long (*bpf_probe_read_kernel_str)(void *to, u32 size, const void *from) = (void *)115;
static long (*bpf_get_ns_current_pid_tgid)(u64 dev, u64 ino, struct bpf_pidns_info *out, u32 size) = (void *)120;
static void *(*bpf_ringbuf_reserve)(void *ring, u64 size, u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *record, u64 flags) = (void *)132;
static u64 (*bpf_get_attach_cookie)(void *ctx) = (void *)174;
static void *(*bpf_task_pt_regs)(void *task) = (void *)175;
static long (*bpf_loop)(u32 turns, void *turn, void *context, u64 flags) = (void *)181;

#endif
