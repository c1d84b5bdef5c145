"""How long a device was at work in a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from latencyprism.records import Span, Step
from latencyprism.timeline.device_time import Busy, DeviceWindow, with_busy

ONE, TWO = "GPU 0 (Worker 1)", "GPU 1 (Worker 2)"


def kernel(start_ns: int, end_ns: int, device: str = ONE, stream: int = 7) -> Span:
    return Span((device, f"stream {stream}"), "k", start_ns, end_ns)


def step(number: int, start_ns: int, end_ns: int) -> Step:
    return Step("vllm", 0, 0, number, start_ns, end_ns)


times = st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(times, min_size=1, max_size=12), times)
def test_covered_time_is_that_of_a_count_of_every_nanosecond(
    kernels: list[tuple[int, int]], asked: tuple[int, int]
) -> None:
    busy = Busy.of([kernel(*pair) for pair in kernels])
    covered = {ns for begin, end in kernels for ns in range(begin, end)}
    assert busy.within_ns(*asked) == len(covered & set(range(*asked)))
    assert all(end < begin for end, begin in zip(busy.ends, busy.begins[1:]))


def test_of_steps_wholly_inside_the_busiest_device_counts_and_of_others_nothing() -> None:
    kernels = [
        kernel(110, 130), kernel(120, 140, stream=9), kernel(150, 160),
        kernel(100, 200, TWO), kernel(390, 420),
    ]  # fmt: skip
    windows = [DeviceWindow.of(100, 400, kernels)]
    steps = [step(0, 50, 110), step(1, 100, 200), step(2, 200, 300), step(3, 300, 400), step(4, 350, 401)]
    filled = with_busy(steps, windows)
    assert [each.xpu_busy_ns for each in filled] == [None, 100, 0, 10, None]
    assert [each._replace(xpu_busy_ns=None) for each in filled] == steps


def test_windows_of_several_processes_each_speak_for_their_own_time() -> None:
    windows = [
        DeviceWindow.of(0, 100, [kernel(0, 30)]),
        DeviceWindow.of(80, 200, [kernel(80, 95, TWO), kernel(120, 180, TWO)]),
    ]
    filled = with_busy([step(0, 0, 50), step(1, 85, 95), step(2, 100, 200), step(3, 50, 150)], windows)
    assert [each.xpu_busy_ns for each in filled] == [30, 10, 60, None]


def test_a_window_without_any_kernel_says_nothing() -> None:
    steps = [step(0, 10, 20)]
    assert with_busy(steps, [DeviceWindow.of(0, 100, [])]) == steps
    assert with_busy(steps, []) == steps
