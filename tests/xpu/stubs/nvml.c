/* A stand-in for libnvidia-ml.so.1: the functions that are called, with the layouts of nvml.h. -DHANG: power never
   comes back. -DREFUSE: every getter says "not supported". */
#include <string.h>
#include <unistd.h>

typedef int R;
typedef struct device *D;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char text[32]; } Pci;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Use;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process;
typedef union { double d; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; } Value;
typedef struct { unsigned id, scope; long long timestamp, latency; int kind; R result; Value value; } Field;
typedef struct { D device; unsigned long long kind, data; unsigned gpu_instance, compute_instance; } Event;

static int told;
#ifdef REFUSE
#define ANSWER return 3
#else
#define ANSWER return 0
#endif

R nvmlInit_v2(void) { return 0; }
R nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(R code) { return code == 3 ? "Not Supported" : "Unknown Error"; }
R nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "580.1", size); ANSWER; }
R nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
R nvmlDeviceGetHandleByIndex_v2(unsigned index, D *device)
{
    if (index == 1)
        return 4; /* no permission */
    *device = (D)0x1000;
    return 0;
}
R nvmlDeviceGetName(D d, char *text, unsigned size) { strncpy(text, "NVIDIA Stub 80GB", size); ANSWER; }
R nvmlDeviceGetUUID(D d, char *text, unsigned size) { strncpy(text, "GPU-0001", size); ANSWER; }
R nvmlDeviceGetPciInfo_v3(D d, Pci *pci)
{
    memset(pci, 0, sizeof *pci);
    strcpy(pci->text, "00000000:3B:00.0");
    ANSWER;
}
R nvmlDeviceGetClockInfo(D d, int kind, unsigned *mhz) { *mhz = kind == 1 ? 1755 : 2619; ANSWER; }
R nvmlDeviceGetMaxClockInfo(D d, int kind, unsigned *mhz) { *mhz = 1980; ANSWER; }
R nvmlDeviceGetCurrentClocksThrottleReasons(D d, unsigned long long *bits)
{
    *bits = 0x1 | 0x4 | 0x40 | 0x10000;
    ANSWER;
}
R nvmlDeviceGetPowerUsage(D d, unsigned *mw)
{
#ifdef HANG
    for (;;)
        pause();
#endif
    *mw = 301500;
    ANSWER;
}
R nvmlDeviceGetEnforcedPowerLimit(D d, unsigned *mw) { *mw = 700000; ANSWER; }
R nvmlDeviceGetTemperature(D d, int sensor, unsigned *celsius) { *celsius = 61; ANSWER; }
R nvmlDeviceGetUtilizationRates(D d, Use *use) { use->gpu = 97; use->memory = 41; ANSWER; }
R nvmlDeviceGetMemoryInfo(D d, Memory *memory)
{
    memory->total = 80ULL << 30;
    memory->free = 60ULL << 30;
    memory->used = 20ULL << 30;
    ANSWER;
}
R nvmlDeviceGetPcieThroughput(D d, int way, unsigned *kb) { *kb = way ? 2000000 : 1000000; ANSWER; }
R nvmlDeviceGetPcieReplayCounter(D d, unsigned *count) { *count = 7; ANSWER; }
R nvmlDeviceGetNvLinkState(D d, unsigned link, unsigned *up)
{
    *up = link < 3;
    return link < 4 ? 0 : 3;
}
R nvmlDeviceGetFieldValues(D d, int count, Field *field)
{
    field->result = field->scope == 0xFFFFFFFFu ? 0 : 2;
    field->kind = 3;
    field->value.ull = field->id == 138 ? 5000 : 6000;
    ANSWER;
}
R nvmlDeviceGetTotalEccErrors(D d, int kind, int counter, unsigned long long *count)
{
    *count = kind ? 1 : 12;
    ANSWER;
}
R nvmlDeviceGetComputeRunningProcesses_v3(D d, unsigned *count, Process *found)
{
    if (*count < 2)
        return 7;
    memset(found, 0, 2 * sizeof *found);
    found[0].pid = 4242;
    found[0].used = 3ULL << 30;
    found[1].pid = 4343;
    found[1].used = ~0ULL; /* not available */
    *count = 2;
    ANSWER;
}
R nvmlEventSetCreate(void **set) { *set = (void *)0x2000; ANSWER; }
R nvmlEventSetFree(void *set) { return 0; }
R nvmlDeviceRegisterEvents(D d, unsigned long long kinds, void *set) { return set == (void *)0x2000 ? 0 : 2; }
R nvmlEventSetWait_v2(void *set, Event *event, unsigned timeout)
{
    if (told++)
        return 10; /* timeout */
    event->kind = 8;
    event->data = 79;
    return 0;
}
