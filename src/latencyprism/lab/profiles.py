"""What a load asks for: how many clients or requests a second, and how long prompts and answers are."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Any

from latencyprism.errors import BadInput

FIRST_PLAIN_TOKEN = 3 + 256  # the tiny vocabulary's special and single-byte tokens come first
LAST_PLAIN_TOKEN = 1200


@dataclass(frozen=True)
class Length:
    """Tokens: lognormal with this median and sigma (of the logarithm), clipped; ``sigma`` 0 is a fixed
    length."""

    median: int
    sigma: float = 0.0
    least: int = 1
    most: int = 4096

    def draw(self, rng: random.Random) -> int:
        value = self.median * math.exp(rng.gauss(0.0, self.sigma)) if self.sigma else self.median
        return max(self.least, min(self.most, round(value)))


@dataclass(frozen=True)
class Profile:
    """One kind of load; deterministic for a ``seed`` but for the times at which answers end.

    Closed loop: ``clients`` each send one request after the other, thinking ``think_ms`` (mean,
    exponential) between. Open loop, when ``rate`` (requests a second) is given: Poisson arrivals whatever
    the server does; ``clients`` then bounds those in flight, a request that must wait for that keeps its
    due time, so its TTFT includes the wait. ``prefix``: tokens that all prompts share, for prefix caching.
    Ends after ``requests`` requests or ``duration_s`` seconds, whichever is given and comes first.
    """

    name: str
    clients: int
    prompt: Length
    output: Length
    rate: float | None = None
    think_ms: float = 0.0
    prefix: int = 0
    requests: int | None = None
    duration_s: float | None = None
    context: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clients < 1 or self.prompt.least < 1 or self.output.least < 1:
            raise BadInput("a load needs at least one client, one prompt token and one output token")
        if self.rate is not None and not 0 < self.rate < 1e5:
            raise BadInput("rate must be above 0 and below 100000 requests a second", f"it is {self.rate}")

    def draw(self, rng: random.Random) -> tuple[list[int], int]:
        """Prompt (token ids) and number of output tokens of one request; together they fit the context."""
        output = min(self.output.draw(rng), self.context // 2)
        own = min(self.prompt.draw(rng), self.context - output - self.prefix - 1)
        shared = random.Random(self.seed ^ 0x5EED)
        ids = [shared.randrange(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN) for _ in range(self.prefix)]
        return ids + [rng.randrange(FIRST_PLAIN_TOKEN, LAST_PLAIN_TOKEN) for _ in range(max(1, own))], output

    def but(self, **changes: Any) -> Profile:
        """The same with some fields changed."""
        return dataclasses.replace(self, **changes)


# Heavy-tailed lengths, as the published traces of LLM services have them, scaled to a context of 2048 tokens.
_PROMPTS = Length(median=96, sigma=0.9, least=8, most=1024)
_OUTPUTS = Length(median=48, sigma=0.6, least=4, most=256)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("decode", clients=4, prompt=Length(16), output=Length(256)),
        Profile("mixed", clients=4, prompt=_PROMPTS, output=_OUTPUTS, think_ms=20.0),
        Profile("poisson", clients=32, prompt=_PROMPTS, output=_OUTPUTS, rate=2.0),
        Profile("surge", clients=12, prompt=Length(700, 0.4, 256, 1600), output=Length(32, 0.4, 8, 128)),
        Profile("prefix", clients=4, prompt=Length(32), output=Length(48), prefix=512),
    )
}


def profile(name: str) -> Profile:
    """A profile by name; raises BadInput for an unknown one."""
    try:
        return PROFILES[name]
    except KeyError:
        raise BadInput(f"no load profile called {name!r}", remedy=f"Known: {', '.join(PROFILES)}.") from None
