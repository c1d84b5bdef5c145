"""A stand-in for SGLang's scheduler process, for tests: modules, classes, methods and parameters as
recorded from its source of one version, with just enough behaviour to schedule batches. Run as a process of
its own:

    sglang_stand_in.py RECORDED.json VERSION SCENARIO

It waits for a line on its input, serves the scenario, prints what it did as JSON (one entry for each batch,
in the order in which results were processed), and waits for another line. Standard library alone."""

from __future__ import annotations

import json
import sys
import time
import types
from collections import deque

from stand_in_classes import BEHAVIOUR, build

CHUNK = 64
SURE_ACCEPTED = 2  # drafts that a verification accepts of each request


class Server:
    """The loops and what they call, on the classes of one version."""

    def __init__(self, classes: dict[str, type], scenario: str) -> None:
        self.classes = classes
        self.mode = classes["ForwardMode"]
        self.overlap = "overlap" in scenario
        self.mixed = "mixed" in scenario
        self.width = 5 if "verify" in scenario else 0
        self.retract_at = 6 if "retract" in scenario else None
        self.idle_ranks = False
        self.truth: list[dict] = []
        self.next_iteration = 0
        self.retracted = 0
        scheduler = self.scheduler = object.__new__(classes["Scheduler"])
        scheduler.__dict__.update(
            running_batch=self.batch([]), waiting_queue=[], last_batch=None, chunked_req=None,
            enable_overlap=self.overlap, is_mixed_chunk=self.mixed, tp_size=1, pp_size=1, page_size=1,
            chunked_prefill_size=CHUNK, max_total_num_tokens=10_000, spec_num_total_accepted_tokens=0,
            server_args=types.SimpleNamespace(speculative_num_draft_tokens=self.width or None),
            token_to_kv_pool_allocator=types.SimpleNamespace(available_size=self.free_tokens),
            tree_cache=types.SimpleNamespace(evictable_size=lambda: 0),
        )  # fmt: skip
        for name in ("get_next_batch_to_run", "run_batch", "process_batch_result"):
            BEHAVIOUR[f"Scheduler.{name}"] = getattr(self, name)
        BEHAVIOUR["ScheduleBatch.retract_decode"] = self.retract_decode

    def free_tokens(self) -> int:
        return 10_000 - sum(r.done + len(r.output_ids) for r in self.scheduler.running_batch.reqs)

    # -- objects -------------------------------------------------------------------------------------

    def batch(self, requests: list, mode: str = "DECODE"):
        made = object.__new__(self.classes["ScheduleBatch"])
        made.__dict__.update(
            reqs=requests,
            forward_mode=self.mode[mode],
            prefix_lens=None,
            extend_lens=None,
            seq_lens_sum=None,
            decoding_reqs=None,
            chunked_req=None,
            spec_algorithm=types.SimpleNamespace(_name_="EAGLE" if self.width else "NONE"),
        )
        return made

    def request(self, rid: str, prompt: int, outputs: int, hits: int = 0):
        made = object.__new__(self.classes["Req"])
        made.__dict__.update(
            rid=rid, finished_reason=None, output_ids=[], origin_input_ids=[0] * prompt, wanted=outputs,
            done=hits, hits=hits, cached=0,
        )  # fmt: skip
        return made

    # -- what the recorded methods do ----------------------------------------------------------------

    def get_next_batch_to_run(self, scheduler, running_batch=None, last_batch=None):
        last = scheduler.last_batch
        if last is not None and last.forward_mode._name_ in ("EXTEND", "MIXED"):
            going_on = [r for r in last.reqs if r.finished_reason is None and r is not last.chunked_req]
            if scheduler.running_batch.reqs:
                scheduler.running_batch.reqs.extend(going_on)
            else:
                scheduler.running_batch = self.batch(going_on)
        batch = self.prefill() or self.decode()
        if batch is None and self.idle_ranks:
            batch = self.batch([], "IDLE")
            self.idle_ranks = False
        plan = self.classes.get("NextBatchPlan")
        if "running_batch" in type(scheduler).get_next_batch_to_run.__code__.co_varnames:
            return types.SimpleNamespace(running_batch=scheduler.running_batch, batch_to_run=batch, plan=plan)
        return batch

    def prefill(self):
        scheduler, taken, lens, before = self.scheduler, [], [], []
        running = scheduler.running_batch
        running.reqs = [r for r in running.reqs if r.finished_reason is None]
        left = scheduler.chunked_prefill_size - (len(running.reqs) if self.mixed else 0)
        assert left > 0, "decodes took all of a chunk"
        chunked, scheduler.chunked_req = scheduler.chunked_req, None
        queue = [chunked] if chunked is not None else []
        while left and (queue or scheduler.waiting_queue):
            request = queue.pop() if queue else scheduler.waiting_queue.pop(0)
            todo = len(request.origin_input_ids) + len(request.output_ids) - request.done
            tokens = min(todo, left)
            taken.append(request)
            lens.append(tokens)
            before.append(request.done)
            request.done += tokens
            left -= tokens
            if tokens < todo:
                scheduler.chunked_req = request
        if not taken:
            return None
        batch = self.batch(taken, "EXTEND")
        batch.prefix_lens, batch.extend_lens = before, lens
        batch.chunked_req = scheduler.chunked_req
        if self.mixed and running.reqs:
            batch.forward_mode = self.mode["MIXED"]
            batch.decoding_reqs = running.reqs
            batch.reqs = [*taken, *running.reqs]
            late = 0 if self.overlap else -1
            lengths = [len(r.origin_input_ids) + len(r.output_ids) + late for r in running.reqs]
            batch.prefix_lens, batch.extend_lens = before + lengths, lens + [1] * len(lengths)
            scheduler.running_batch = self.batch([])
        batch.seq_lens_sum = sum(batch.prefix_lens) + sum(batch.extend_lens)
        return batch

    def decode(self):
        batch = self.scheduler.running_batch
        left = [r for r in batch.reqs if r.finished_reason is None]
        if len(left) != len(batch.reqs):
            batch.reqs = left
        if not left:
            return None
        if self.retract_at is not None and len(self.truth) >= self.retract_at and len(left) > 1:
            self.retract_at = None
            given = type(batch).retract_decode.__code__.co_argcount - 1
            self.scheduler.waiting_queue += batch.retract_decode(*[None] * given)[0]
        batch.forward_mode = self.mode["DECODE"]
        return batch

    def retract_decode(self, batch, **unused):
        out = batch.reqs[-1]
        batch.reqs = batch.reqs[:-1]
        out.done = 0
        self.retracted += 1
        return ([out], 0.5, [])

    def run_batch(self, scheduler, batch, pp_proxy_tensors=None):
        self.next_iteration += 1
        if hasattr(type(batch), "forward_iter"):
            batch.forward_iter = self.next_iteration
        decoding = batch.forward_mode._name_ == "DECODE"
        result = object.__new__(self.classes["GenerationBatchResult"])
        width = self.width if decoding else 0
        result.__dict__.update(
            speculative_num_draft_tokens=width or None, accept_lens=None,
            num_accepted_tokens=0, num_accepted_drafts=0, num_correct_drafts=0,
        )  # fmt: skip
        if width:
            total = SURE_ACCEPTED * len(batch.reqs)
            result.num_accepted_tokens = result.num_accepted_drafts = result.num_correct_drafts = total
            scheduler.spec_num_total_accepted_tokens += total + len(batch.reqs)
        lens, before = batch.extend_lens or [], batch.prefix_lens or []
        decodes = len(batch.reqs) if decoding else len(batch.decoding_reqs or ())
        prefills = len(batch.reqs) - decodes
        context = sum(r.cached + (width or 1) for r in batch.reqs) if decoding else sum(lens) + sum(before)
        for place, request in enumerate(batch.reqs):
            if place < prefills:
                request.cached = before[place] + lens[place]
            else:
                request.cached += 1 + (SURE_ACCEPTED if width else 0)
        self.note = {
            "mode": batch.forward_mode._name_,
            "requests": len(batch.reqs),
            "prefill_requests": prefills,
            "decode_requests": decodes,
            "prefill_tokens": 0 if decoding else sum(lens[:prefills]),
            "decode_tokens": decodes * (width or 1),
            "context_tokens": context,
            "attention_work": 0 if decoding else sum(n * (n + b) for n, b in zip(lens[:prefills], before)),
            "draft_tokens": decodes * max(width - 1, 0),
            "cached_tokens": 0 if decoding else sum(
                b for r, b in zip(batch.reqs[:prefills], before) if b == r.hits
            ),
        }  # fmt: skip
        batch.note = result.note = self.note
        time.sleep(0.002)
        return result

    def process_batch_result(self, scheduler, batch, result, launch_done=None):
        if result is None:
            return
        time.sleep(0.001)
        outputs = 0
        for request in batch.reqs:
            if request.finished_reason is not None or request is batch.chunked_req:
                continue
            new = 1 + (SURE_ACCEPTED if result.note["draft_tokens"] else 0)
            request.output_ids.extend([0] * new)
            outputs += new
            if len(request.output_ids) >= request.wanted:
                request.finished_reason = "length"
        self.truth.append({**result.note, "output_tokens": outputs})

    # -- loops ---------------------------------------------------------------------------------------

    def choose(self):
        scheduler = self.scheduler
        if scheduler.get_next_batch_to_run.__code__.co_argcount > 1:
            plan = scheduler.get_next_batch_to_run(
                running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
            )
            scheduler.running_batch = plan.running_batch
            return plan.batch_to_run
        return scheduler.get_next_batch_to_run()

    def event_loop_normal(self) -> None:
        scheduler = self.scheduler
        while (batch := self.choose()) is not None:
            result = scheduler.run_batch(batch)
            scheduler.process_batch_result(batch, result)
            scheduler.last_batch = batch
        scheduler.last_batch = None

    def event_loop_overlap(self) -> None:
        scheduler, queue = self.scheduler, deque()
        while True:
            batch = self.choose()
            if batch is not None:
                result = scheduler.run_batch(batch)
                copied = self.batch(batch.reqs)
                copied.__dict__.update(batch.__dict__)
                queue.append((copied, result))
                if scheduler.last_batch is None and "DUMMY_FIRST" in self.mode.__members__:
                    first = self.batch([], "DUMMY_FIRST")
                    first.reqs = None
                    scheduler.process_batch_result(first, None)
            if scheduler.last_batch is not None:
                scheduler.process_batch_result(*queue.popleft())
            scheduler.last_batch = batch
            if batch is None:
                return


def main() -> None:
    path, version, scenario = sys.argv[1:4]
    with open(path, encoding="utf-8") as file:
        server = Server(build(json.load(file), version), scenario)
    loop = server.event_loop_overlap if server.overlap else server.event_loop_normal
    server.scheduler.waiting_queue.append(server.request("warm", 8, 2))
    loop()
    print("ready", flush=True)
    sys.stdin.readline()
    server.truth.clear()
    server.idle_ranks = "idle" in scenario
    for number in range(6):
        prompt = 150 if number == 4 else 20 + number
        server.scheduler.waiting_queue.append(
            server.request(f"r{number}", prompt, 8 + number, 16 * (number % 2))
        )
    loop()
    said = {"batches": server.truth, "retracted": server.retracted}
    said["chunk"] = server.scheduler.chunked_prefill_size
    print(json.dumps(said), flush=True)
    sys.stdin.readline()


main()
