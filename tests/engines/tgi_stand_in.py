"""A stand-in for a shard of TGI's Python server, for tests: modules, classes, methods and parameters as
recorded from its source of one version, with just enough behaviour to serve a router, which is played here,
too. Run as a process of its own:

    text-generation-server serve MODEL --uds-path PATH [--sharded] RECORDED.json VERSION SCENARIO

It waits for a line on its input, serves the scenario, prints what it did as JSON (one entry for each call of
Prefill or Decode), and waits for another line. Standard library alone."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import sys
import time
import types

from stand_in_classes import BEHAVIOUR, build

CHUNK = 64
WIDTH = 3  # drafts of a request in a step
ACCEPTED = 2  # of these
LIMIT = 4  # requests of a batch
MASK = ["prefilling_mask"]
SERVICE = "/generate.v2.TextGenerationService/"


def traced(function):
    """As OpenTelemetry's decorator does: another function, which names what it wraps."""

    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)

    return inner


class Service:
    """What serves the calls; its methods are bound once, before anybody attaches."""

    def __init__(self, classes: dict[str, type], scenario: str) -> None:
        self.scenario = scenario
        if "older" in scenario:
            MASK[0] = "another_mask"
        self.chunking = "chunked" in scenario
        self.encodes = "seq2seq" in scenario
        family = "Seq2SeqLM" if self.encodes else "CausalLM" if "padded" in scenario else "FlashCausalLM"
        self.flash = family.startswith("Flash")
        self.kind = classes[f"{family}Batch"]
        self.generation = classes["Generation"]
        classes[family].generate_token = traced(classes[family].generate_token)
        self.model = object.__new__(classes[family])
        self.model.rank = int(os.environ.get("RANK", 0))
        self.model.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.cache = object.__new__(classes["Cache"])
        self.cache.cache = {}
        self.interceptor = object.__new__(classes["ExceptionInterceptor"])
        BEHAVIOUR[f"{family}.generate_token"] = self.generate
        BEHAVIOUR["Cache.set"] = self.keep
        BEHAVIOUR["ExceptionInterceptor.intercept"] = self.intercept
        self.handlers = {"Prefill": self.prefill, "Decode": self.decode, "FilterBatch": self.filter}
        self.failed = False
        self.truth: list[dict] = []
        self.next_batch = 0

    # -- what the recorded methods do ----------------------------------------------------------------

    async def intercept(self, interceptor, method, request_or_iterator, context, method_name):
        return await method(request_or_iterator)

    def keep(self, cache, entry):
        if entry is not None:
            cache.cache[entry.batch_id] = entry

    def generate(self, model, batch):
        time.sleep(0.001)
        if "fails" in self.scenario and len(self.truth) == 5 and not self.failed:
            self.failed = True
            raise RuntimeError("as a device may")
        start = time.time_ns()
        self.note(batch)
        time.sleep(0.002)
        middle = time.time_ns()
        generations, running = [], 0
        for place, request in enumerate(batch.requests):
            if self.flash and self.advance(batch, place, request):
                running += 1
                continue
            new = 1 + (ACCEPTED if self.flash and batch.drafted else 0)
            request.outputs += new
            self.truth[-1]["output_tokens"] += new
            if not self.flash:
                batch.input_lengths[place] += 1
                if batch.decoder_input_lengths is not None:
                    batch.input_lengths[place] -= 1
                    batch.decoder_input_lengths[place] += 1
            else:
                batch.all_input_ids[place] += [0] * new
            over = request.outputs >= request.wanted
            running += not over
            self.truth[-1]["finished"] += over
            if request.id % model.world_size == model.rank:
                one = object.__new__(self.generation)
                one.generated_text = "" if over else None
                generations.append(one)
        if self.flash:
            batch.prefilling = any(getattr(batch, MASK[0]))
            drafts = "drafts" in self.scenario
            shape = types.SimpleNamespace(shape=(len(batch.requests), WIDTH))
            batch.speculative_ids = shape if drafts else None
        end = time.time_ns()
        left = None if running == 0 else batch
        return generations, left, (middle - start, end - middle)

    def advance(self, batch, place, request) -> bool:
        """True where the request has prompt left after this step."""
        taken = batch.input_lengths[place]
        batch.drafted = batch.speculative_ids is not None
        new = 1 + (ACCEPTED if batch.drafted else 0)
        if getattr(batch, MASK[0])[place]:
            request.computed += taken
            batch.cache_lengths[place] += taken
            left = request.prompt - request.computed
            mask = list(getattr(batch, MASK[0]))
            mask[place] = left > 0
            setattr(batch, MASK[0], mask)
            batch.input_lengths[place] = min(left, CHUNK) if left > 0 else 1
            return left > 0
        request.computed += new
        batch.cache_lengths[place] += new
        return False

    def note(self, batch) -> None:
        """The truth, from the requests' own state and not from what the batch's lists say."""
        prompts = [r for r in batch.requests if r.outputs == 0]
        decodes = [r for r in batch.requests if r.outputs]
        chunks = [min(r.prompt - r.computed, CHUNK if self.chunking else 1 << 30) for r in prompts]
        width = WIDTH if "drafts" in self.scenario and not prompts else 0
        contexts = [r.computed + 1 + width for r in decodes] if self.flash else [
            r.prompt + r.outputs + self.encodes for r in decodes  # a decoder begins with a token of its own
        ]  # fmt: skip
        self.truth.append({
            "requests": len(batch.requests),
            "prefill_requests": len(prompts),
            "decode_requests": len(decodes),
            "prefill_tokens": sum(chunks),
            "decode_tokens": len(decodes) * (1 + width),
            "cached_tokens": sum(r.hits for r in prompts if r.computed == r.hits),
            "context_tokens": sum(contexts) + sum(r.computed for r in prompts) + sum(chunks),
            "attention_work": sum(n * (r.computed + n) for n, r in zip(chunks, prompts)),
            "draft_tokens": len(decodes) * width,
            "output_tokens": 0,
            "finished": 0,
        })  # fmt: skip

    # -- calls ---------------------------------------------------------------------------------------

    async def prefill(self, request):
        requests, cached_id = request
        time.sleep(0.001)
        batch = self.new_batch(requests)
        if cached_id is not None:
            batch = self.joined([self.cache.cache.pop(cached_id), batch])
        return self.step(batch)

    async def decode(self, ids):
        batches = [self.cache.cache.pop(one) for one in ids]
        return self.step(batches[0] if len(batches) == 1 else self.joined(batches))

    async def filter(self, request):
        batch_id, ids = request
        batch = self.cache.cache.pop(batch_id)
        places = [place for place, one in enumerate(batch.requests) if one.id in ids]
        for name in self.lists():
            values = getattr(batch, name)
            if values is not None:
                setattr(batch, name, [values[place] for place in places])
        self.cache.set(batch)
        return batch

    def step(self, batch):
        _, following, _ = self.model.generate_token(batch)
        self.cache.set(following)
        time.sleep(0.001)
        return following

    def lists(self):
        flash = (MASK[0], "cache_lengths", "all_input_ids") if self.flash else ("decoder_input_lengths",)
        return ("requests", "input_lengths", *flash)

    def new_batch(self, requests):
        batch = object.__new__(self.kind)
        self.next_batch += 1
        lengths = [min(r.prompt - r.hits, CHUNK if self.chunking else 1 << 30) for r in requests]
        batch.__dict__.update(batch_id=self.next_batch, requests=list(requests), input_lengths=lengths)
        if self.flash:
            batch.__dict__.update(
                prefilling=True, **{MASK[0]: [True] * len(requests)}, speculative_ids=None, block_tables=[],
                cache_lengths=[r.hits for r in requests], all_input_ids=[[0] * r.prompt for r in requests],
            )  # fmt: skip
        else:
            decoder = [1] * len(requests) if self.encodes else None
            batch.__dict__.update(decoder_input_lengths=decoder)
        return batch

    def joined(self, batches):
        first, *others = batches
        for other in others:
            for name in self.lists():
                if getattr(first, name) is not None:
                    setattr(first, name, getattr(first, name) + getattr(other, name))
            if self.flash:
                first.prefilling = first.prefilling or other.prefilling
        if self.flash and first.prefilling:
            first.speculative_ids = None
        return first

    # -- the router ----------------------------------------------------------------------------------

    async def call(self, name, request):
        await asyncio.sleep(0)
        try:
            return await self.interceptor.intercept(self.handlers[name], request, None, SERVICE + name)
        except RuntimeError:
            return None  # its batch is lost

    async def route(self, queue: list) -> None:
        batch = None
        while queue or batch is not None:
            held = 0 if batch is None else len(batch.requests)
            new, queue = queue[: LIMIT - held], queue[max(LIMIT - held, 0) :]
            if new:
                joins = batch.batch_id if batch is not None and self.chunking else None
                made = await self.left(await self.call("Prefill", (new, joins)))
                if joins is not None or batch is None:
                    batch = made
                    continue
                ids = [batch.batch_id] + ([made.batch_id] if made is not None else [])
                batch = await self.left(await self.call("Decode", ids))
            else:
                batch = await self.left(await self.call("Decode", [batch.batch_id]))

    async def left(self, batch):
        """Requests that are over are taken out before the next call."""
        if batch is None:
            return None
        going_on = [one.id for one in batch.requests if one.outputs < one.wanted]
        if len(going_on) < len(batch.requests):
            return await self.call("FilterBatch", (batch.batch_id, going_on))
        return batch


def request(number: int, prompt: int, outputs: int, hits: int = 0):
    return types.SimpleNamespace(
        id=number, prompt=prompt, wanted=outputs, hits=hits, computed=hits, outputs=0
    )


async def main() -> None:
    path, version, scenario = sys.argv[-3:]
    with open(path, encoding="utf-8") as file:
        service = Service(build(json.load(file), version), scenario)
    await service.route([request(0, 8, 2)])
    print("ready", flush=True)
    sys.stdin.readline()
    service.truth.clear()
    cached = 16 if service.flash else 0
    prompts = [150 if number == 2 and service.chunking else 20 + number for number in range(6)]
    await service.route(
        [request(n + 1, prompt, 9 + 3 * n, cached * (n % 2)) for n, prompt in enumerate(prompts)]
    )
    print(json.dumps({"calls": service.truth}), flush=True)
    sys.stdin.readline()


asyncio.run(main())
