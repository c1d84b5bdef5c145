"""Accelerators: refused where there is none or where it was not allowed; what is asked of the driver's
libraries, by stand-ins for them."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from latencyprism import inject
from latencyprism.errors import BadInput, PrismError
from latencyprism.inject import devices, needs

TENANTS = ["xpu.contention", "xpu.memory_bandwidth", "xpu.pcie", "xpu.link", "xpu.allocator"]
SETTINGS = ["xpu.clock", "xpu.power"]

CUDA = """
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
typedef unsigned long long P;
static long held;
static int note(const char *name) {
    FILE *file = fopen(getenv("STUB_CALLS"), "a"); fprintf(file, "%s\\n", name); fclose(file); return 0;
}
int cuInit(unsigned flags) { return flags; }
int cuDeviceGet(int *device, int number) { *device = number; return number > 1 ? 101 : 0; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return 0; }
int cuCtxCreate_v2(void **context, unsigned flags, int device) { *context = (void *)0x10; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSynchronize(void) { usleep(500); return 0; }
int cuMemAlloc_v2(P *address, size_t size) { held += size; *address = 0x1000; return size > FREE ? 2 : 0; }
int cuMemFree_v2(P address) { return address == 0x1000 ? note("free") : 1; }
int cuMemAllocHost_v2(void **address, size_t size) { *address = malloc(size); return 0; }
int cuMemGetInfo_v2(size_t *left, size_t *total) { *left = FREE; *total = FREE; return 0; }
int cuMemcpyDtoDAsync_v2(P to, P from, size_t size, void *stream) { return note("inside"); }
int cuMemcpyHtoDAsync_v2(P to, void *from, size_t size, void *stream) { return note("to"); }
int cuMemcpyDtoHAsync_v2(void *to, P from, size_t size, void *stream) { return note("from"); }
int cuMemcpyPeerAsync(P to, void *there, P from, void *here, size_t size, void *stream) {
    return note("peer");
}
int cuModuleLoadData(void **module, const char *text) {
    *module = (void *)0x20; return text[1] == '.' ? 0 : 1;
}
int cuModuleGetFunction(void **f, void *m, const char *name) {
    *f = (void *)0x30; return name[0] == 'b' ? 0 : 1;
}
int cuDeviceGetAttribute(int *value, int what, int device) { *value = 4; return what == 16 ? 0 : 1; }
int cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **given, void **extra) {
    return gx == 8 && bx == 1024 && **(unsigned **)given > 0 ? note("launch") : 1;
}
"""

NVML = """
#include <stdio.h>
#include <stdlib.h>
static const char *path(void) { return getenv("STUB_SETTING"); }
static unsigned get(void) {
    unsigned value = 2000; FILE *file = fopen(path(), "r");
    if (file) { fscanf(file, "%u", &value); fclose(file); }
    return value;
}
static int put(unsigned value) {
    FILE *file = fopen(path(), "w"); fprintf(file, "%u", value); fclose(file); return 0;
}
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    *device = (void *)0x1000; return index > 0 ? 2 : 0;
}
int nvmlDeviceGetMaxClockInfo(void *d, int kind, unsigned *mhz) { *mhz = 2000; return 0; }
int nvmlDeviceGetClockInfo(void *d, int kind, unsigned *mhz) { *mhz = get(); return 0; }
int nvmlDeviceSetGpuLockedClocks(void *d, unsigned least, unsigned most) {
    return least <= most ? put(most) : 2;
}
int nvmlDeviceResetGpuLockedClocks(void *d) { return put(2000); }
int nvmlDeviceGetPowerManagementLimit(void *d, unsigned *mw) { *mw = get(); return 0; }
int nvmlDeviceSetPowerManagementLimit(void *d, unsigned mw) { return put(mw); }
"""


@pytest.fixture
def pid():
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process.pid
    process.kill()
    process.wait()


@pytest.fixture
def built(tmp_path, monkeypatch):
    """``built(source, "-DFREE=...")``: both libraries are this one, and a device is said to be there."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setenv("STUB_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("STUB_SETTING", str(tmp_path / "setting"))
    monkeypatch.setattr(devices, "device_missing", lambda: None)

    def build(source, *flags):
        library = str(tmp_path / "libstub.so")
        given = ["-shared", "-fPIC", "-w", "-x", "c", "-", "-o", library, *flags]
        subprocess.run([compiler, *given], input=source, text=True, check=True, timeout=60)
        monkeypatch.setattr(devices, "DRIVER", library)
        monkeypatch.setattr(devices, "MANAGEMENT", library)
        return tmp_path

    return build


@pytest.mark.parametrize("cause", TENANTS + SETTINGS)
def test_without_a_device_it_is_refused(pid, cause, monkeypatch):
    monkeypatch.setattr(devices, "device_missing", lambda: "there is no NVIDIA device (/dev/nvidiactl)")
    with pytest.raises(PrismError, match="no NVIDIA device"):
        inject.start(cause, pid, allow_device_settings=True)


@pytest.mark.parametrize("cause", SETTINGS)
def test_settings_want_to_be_allowed(pid, cause):
    with pytest.raises(BadInput, match="--allow-device-settings"):
        inject.start(cause, pid)


@pytest.mark.parametrize(
    ("cause", "call"),
    list(zip(TENANTS, ["launch", "inside", "to", "peer", "free"], strict=True)),
)
def test_a_tenant_works_for_its_share_and_ends(built, pid, cause, call):
    folder = built(CUDA, "-DDEVICES=2", "-DFREE=(20ULL<<30)")
    with inject.start(cause, pid, 0.5, 1.5) as injection:
        injection.wait()
    effect = injection.effect_check()
    assert effect.asked == pytest.approx(2 / 3) and 0.3 < effect.measured < 1.0, effect.text
    assert len(injection.truth()) == 1 and (folder / "calls").read_text().split().count(call) > 20


@pytest.mark.parametrize(
    ("cause", "flags", "device", "why"),
    [
        ("xpu.link", ["-DDEVICES=1", "-DFREE=(20ULL<<30)"], 0, "no link"),
        ("xpu.allocator", ["-DDEVICES=1", "-DFREE=(1ULL<<30)"], 0, "too few"),
        ("xpu.memory_bandwidth", ["-DDEVICES=1", "-DFREE=(1ULL<<20)"], 0, "cuMemAlloc_v2 says 2"),
        ("xpu.contention", ["-DDEVICES=1", "-DFREE=0"], 7, "cuDeviceGet says 101"),
    ],
)
def test_what_the_driver_refuses_is_told(built, pid, cause, flags, device, why):
    built(CUDA, *flags)
    with inject.start(cause, pid, 0.5, 5.0, device=device) as injection:
        injection.wait()
    effect = injection.effect_check()
    assert not effect.effective and why in effect.text and injection.truth() == []


@pytest.mark.parametrize("cause", SETTINGS)
def test_a_setting_is_lowered_and_put_back(built, pid, cause):
    folder = built(NVML)
    with inject.start(cause, pid, 1.0, 1.5, allow_device_settings=True) as injection:
        injection.wait()
    effect = injection.effect_check()
    assert effect.effective and effect.measured == effect.asked == 1000, effect.text
    assert len(injection.truth()) == 1
    assert (folder / "setting").read_text() == "2000"


def test_a_setting_is_put_back_when_the_actor_is_killed(built, pid):
    folder = built(NVML)
    with inject.start("xpu.power", pid, 1.0, 60.0, allow_device_settings=True) as injection:
        (keeper,) = injection.helper_pids
        end = time.monotonic() + 5
        while not (folder / "setting").exists() and time.monotonic() < end:
            time.sleep(0.01)
        with open(f"/proc/{keeper}/task/{keeper}/children") as file:
            (actor,) = file.read().split()
        os.kill(int(actor), signal.SIGKILL)
        injection.wait()
    assert (folder / "setting").read_text() == "2000"


def test_a_library_that_is_not_there_is_told(built, pid, monkeypatch):
    monkeypatch.setattr(devices, "device_missing", lambda: None)
    monkeypatch.setattr(devices, "MANAGEMENT", "/no/such/library.so")
    monkeypatch.setattr(devices, "DRIVER", "/no/such/library.so")
    for cause in ("xpu.power", "xpu.pcie"):
        with inject.start(cause, pid, 1.0, 5.0, allow_device_settings=True) as injection:
            injection.wait()
        assert "library.so" in injection.effect_check().text and not injection.effect_check().effective


def test_a_machine_without_a_device_says_so():
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a device")
    words = [sys.executable, "-m", "latencyprism", "inject", "--list"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert needs.device_missing() in done.stdout and done.stdout.count("CANNOT WORK HERE") >= 7
