"""``engine.tokenizer``: every call of some methods takes more CPU time, as a slow tokenizer in Python does.

``places``: (module, class, method, ms added to each call). The thread only watches the lease.
"""

# [cut
from latencyprism.inject.tenant.base import W_COUNT, Cannot, os, sys, time

# cut]


def burn(tenant, added_ns):
    """Of this thread's own CPU time; the lease may end meanwhile."""
    end = time.thread_time_ns() + added_ns
    while time.thread_time_ns() < end:
        pass
    tenant.harmed(added_ns)
    tenant.words[W_COUNT] += 1


def slowed(original, tenant, added_ns):
    def call(*args, **kwargs):
        if not state["off"] and os.getpid() == tenant.pid:
            try:
                burn(tenant, added_ns)
            except ValueError:  # it ended meanwhile: the words are gone
                state["off"] = True
        return original(*args, **kwargs)

    state = {"off": False}
    call.__name__ = getattr(original, "__name__", "call")
    call.__doc__ = getattr(original, "__doc__", None)
    call.__wrapped__ = original
    return call, state


def hook(tenant, owner, name, added_ns):
    """Wrap ``owner.name``; what undoes it is kept."""
    own = name in vars(owner)
    original = vars(owner)[name] if own else getattr(owner, name)
    if not callable(original) or isinstance(original, type):
        return False
    wrapper, state = slowed(original, tenant, added_ns)
    setattr(owner, name, wrapper)

    def undo():
        state["off"] = True
        if vars(owner).get(name) is wrapper:
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

    tenant.undo.append(undo)
    return True


def harm(tenant):
    hooked = 0
    for module, owner_name, name, added_ms in tenant.config["places"]:
        owner = getattr(sys.modules.get(module), owner_name, None)
        if isinstance(owner, type) and hasattr(owner, name):
            hooked += hook(tenant, owner, name, int(added_ms * 1e6))
    if not hooked:
        places = ["%s:%s.%s" % tuple(place[:3]) for place in tenant.config["places"]]
        raise Cannot("it has none of %s" % ", ".join(places))

    def work():
        tenant.sleep(0.05)
        return 0

    return work
