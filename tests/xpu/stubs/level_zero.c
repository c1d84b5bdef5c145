/* A stand-in for libze_loader.so.1, with the layouts of ze_api.h and zes_api.h. */
#include <stdint.h>
#include <string.h>

typedef uint32_t R;
typedef void *H;
typedef uint8_t Bool;
typedef struct {
    uint32_t stype; void *next; uint32_t type, vendorId, deviceId, flags, subdeviceId, coreClockRate;
    uint64_t maxMemAllocSize;
    uint32_t maxHardwareContexts, maxCommandQueuePriority, numThreadsPerEU, physicalEUSimdWidth, numEUsPerSubslice,
        numSubslicesPerSlice, numSlices;
    uint64_t timerResolution; uint32_t timestampValidBits, kernelTimestampValidBits; uint8_t uuid[16]; char name[256];
} Core;
typedef struct {
    uint32_t stype; void *next; Core core; uint32_t numSubdevices;
    char serial[64], board[64], brand[64], model[64], vendor[64], driver[64];
} Properties;
typedef struct { int32_t gen, width; int64_t maxBandwidth; } Speed;
typedef struct {
    uint32_t stype; void *next; uint32_t domain, bus, device, function; Speed maxSpeed;
    Bool haveBandwidthCounters, havePacketCounters, haveReplayCounters;
} Pci;
typedef struct { uint64_t timestamp, replay, packet, rx, tx; Speed speed; } PciStats;
typedef struct {
    uint32_t stype; void *next; uint32_t type; Bool onSubdevice; uint32_t subdeviceId; Bool canControl, events;
    double min, max;
} FreqProperties;
typedef struct {
    uint32_t stype; const void *next; double voltage, request, tdp, efficient, actual; uint32_t reasons;
} FreqState;
typedef struct { uint32_t stype; void *next; uint32_t type; Bool onSubdevice; uint32_t subdeviceId; } Placed;
typedef struct {
    uint32_t stype; void *next; uint32_t type; Bool onSubdevice; uint32_t subdeviceId; double maxTemperature;
    Bool critical, threshold1, threshold2;
} TempProperties;
typedef struct { uint64_t value, timestamp; } Counted;
typedef struct { Bool enabled; int32_t power, interval; } Sustained;
typedef struct { uint32_t stype; const void *next; uint32_t health; uint64_t free, size; } MemState;
typedef struct { uint64_t read, write, max, timestamp; } Bandwidth;
typedef struct { uint32_t stype; const void *next; uint32_t id; uint64_t memory, shared; uint32_t engines; } Process;
typedef struct { uint32_t stype; const void *next; uint64_t category[7]; } RasState;

static uint64_t turn;

static R one(uint32_t *count, H *handles, uintptr_t handle)
{
    if (handles && *count)
        handles[0] = (H)handle;
    *count = 1;
    return 0;
}
static R two(uint32_t *count, H *handles, uintptr_t handle)
{
    if (handles && *count >= 2) {
        handles[0] = (H)handle;
        handles[1] = (H)(handle + 1);
    }
    *count = 2;
    return 0;
}
R zesInit(uint32_t flags) { return flags; }
R zesDriverGet(uint32_t *count, H *h) { return one(count, h, 0x10); }
R zesDeviceGet(H driver, uint32_t *count, H *h) { return one(count, h, 0x20); }
R zesDeviceGetProperties(H d, Properties *p)
{
    if (p->stype != 1)
        return 0x78000004;
    strcpy(p->core.name, "Intel Stub Max 1550");
    memset(p->core.uuid, 0xab, 16);
    strcpy(p->driver, "1.3.26");
    return 0;
}
R zesDevicePciGetProperties(H d, Pci *p)
{
    p->bus = 0x29;
    p->haveBandwidthCounters = 1;
    p->haveReplayCounters = 1;
    return p->stype == 2 ? 0 : 0x78000004;
}
R zesDevicePciGetStats(H d, PciStats *s)
{
    turn++;
    s->timestamp = turn * 1000000;
    s->replay = 9;
    s->rx = turn * 3000000;
    s->tx = turn * 1000000;
    return 0;
}
R zesDeviceEnumFrequencyDomains(H d, uint32_t *count, H *h) { return two(count, h, 0x30); }
R zesFrequencyGetProperties(H f, FreqProperties *p)
{
    p->type = (uintptr_t)f - 0x30;
    p->max = 1600.0;
    return p->stype == 9 ? 0 : 0x78000004;
}
R zesFrequencyGetState(H f, FreqState *s)
{
    s->actual = f == (H)0x30 ? 1250.0 : -1.0;
    s->reasons = 1 << 3 | 1 << 0;
    return s->stype == 0x1b ? 0 : 0x78000004;
}
R zesDeviceEnumPowerDomains(H d, uint32_t *count, H *h) { return one(count, h, 0x40); }
R zesPowerGetEnergyCounter(H p, Counted *c)
{
    c->value = turn * 250000000;
    c->timestamp = turn * 1000000;
    return 0;
}
R zesPowerGetLimits(H p, Sustained *s, void *burst, void *peak)
{
    s->enabled = 1;
    s->power = 600000;
    return 0;
}
R zesDeviceEnumTemperatureSensors(H d, uint32_t *count, H *h) { return two(count, h, 0x50); }
R zesTemperatureGetProperties(H t, TempProperties *p)
{
    p->type = (uintptr_t)t - 0x50;
    p->maxTemperature = 105.0;
    return p->stype == 0x14 ? 0 : 0x78000004;
}
R zesTemperatureGetState(H t, double *celsius) { *celsius = t == (H)0x51 ? 57.5 : 30.0; return 0; }
R zesDeviceEnumEngineGroups(H d, uint32_t *count, H *h) { return two(count, h, 0x60); }
R zesEngineGetProperties(H e, Placed *p) { p->type = (uintptr_t)e - 0x60; return p->stype == 5 ? 0 : 0x78000004; }
R zesEngineGetActivity(H e, Counted *c)
{
    c->value = turn * (e == (H)0x61 ? 750000 : 900000);
    c->timestamp = turn * 1000000;
    return 0;
}
R zesDeviceEnumMemoryModules(H d, uint32_t *count, H *h) { return two(count, h, 0x70); }
R zesMemoryGetState(H m, MemState *s)
{
    s->size = 64ULL << 30;
    s->free = 48ULL << 30;
    return s->stype == 0x1e ? 0 : 0x78000004;
}
R zesMemoryGetBandwidth(H m, Bandwidth *b)
{
    b->max = 1000000000;
    b->read = turn * 300000000;
    b->write = turn * 100000000;
    b->timestamp = turn * 1000000;
    return 0;
}
R zesDeviceProcessesGetState(H d, uint32_t *count, Process *found)
{
    if (found) {
        if (found[0].stype != 0x16)
            return 0x78000004;
        found[0].id = 555;
        found[0].memory = 1ULL << 32;
    }
    *count = 1;
    return 0;
}
R zesDeviceEnumRasErrorSets(H d, uint32_t *count, H *h) { return two(count, h, 0x80); }
R zesRasGetProperties(H r, Placed *p) { p->type = (uintptr_t)r - 0x80; return p->stype == 0xf ? 0 : 0x78000004; }
R zesRasGetState(H r, Bool clear, RasState *s)
{
    if (clear || s->stype != 0x22)
        return 0x78000004;
    for (int i = 0; i < 7; i++)
        s->category[i] = r == (H)0x80 ? 2 : 0;
    return 0;
}
