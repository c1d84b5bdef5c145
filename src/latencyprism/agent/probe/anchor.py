"""Unknown engines: calls of a few functions while it is searched which of them marks an iteration, and
afterwards steps from the one that was found.

Functions are named by file, name and first line, as their code objects name themselves. They are found in
modules that are loaded already; nothing is imported, and no object of the engine is asked for anything.
"""

# [cut
from latencyprism.agent.probe.observe import (
    ASYNC_GENERATOR,
    COROUTINE,
    DECORATED_COROUTINE,
    GENERATOR,
    FunctionType,
    Hook,
    compile_marker,
    innermost,
    make_wrapper,
)
from latencyprism.agent.probe.prelude import NotHookable, get_ident, now_ns, sys
from latencyprism.records.ring import H_MISSING, KIND_SPAN, KIND_STEP
from latencyprism.records.step import NULL

# cut]

HOT_CALLS, HOT_NS = 100, 50_000_000
"""A function called faster than this (2,000 times a second) marks no iteration, and is let go at once."""
UNHOOKED_SHIFT = 16
IDLE_TOLD_NS = 100_000_000
NESTED_LIMIT = 6
CodeType = type(innermost.__code__)


# -- finding a function by its code ------------------------------------------------------------------


def names_itself(code, where):
    return (code.co_filename, code.co_name, code.co_firstlineno) == where


def modules_of(file):
    """Dicts of the loaded modules that a file made; ``__main__`` knows its file by other names."""
    for name, module in list(sys.modules.items()):
        try:
            space = object.__getattribute__(module, "__dict__")  # a lazy module must stay lazy
        except AttributeError:
            continue
        if type(space) is dict and (name == "__main__" or space.get("__file__") == file):
            yield space


def functions_of(space):
    """(class or None, attribute, plain function) of a module's own functions and of its classes' methods."""
    for key, value in list(space.items()):
        if type(value) is FunctionType:
            yield None, key, value
        elif issubclass(type(value), type):
            for attribute, held in list(type.__dict__["__dict__"].__get__(value).items()):
                function = held.__func__ if type(held) in (staticmethod, classmethod) else held
                if type(function) is FunctionType:
                    yield value, attribute, function


def code_within(code, where, depth=0):
    """The code object that ``where`` names among those nested in ``code``."""
    for constant in code.co_consts:
        if type(constant) is CodeType:
            if names_itself(constant, where):
                return constant
            found = code_within(constant, where, depth + 1) if depth < NESTED_LIMIT else None
            if found is not None:
                return found
    return None


def find_function(where):
    """(class or None, attribute, function, None), or, for a function inside another, (None, None, None,
    code)."""
    nested = None
    for space in modules_of(where[0]):
        for owner, attribute, function in functions_of(space):
            inner = innermost(function)
            if names_itself(inner.__code__, where):
                return owner, attribute, function, None
            if nested is None and inner.__code__.co_filename == where[0]:
                nested = code_within(inner.__code__, where)
    if nested is None:
        raise NotHookable("not found in any loaded module")
    return None, None, None, nested


def hook_function(probe, where, enter, leave):
    """A Hook on the function that ``where`` names. Raises NotHookable with the reason."""
    owner, attribute, function, code = find_function(where)
    if owner is not None:
        hook = probe.observe(owner, attribute, enter, leave)
        if hook is None:
            raise NotHookable(probe.refused.pop())
        return hook
    if code is None:
        inner = innermost(function)
        reason = compile_marker(object, function, inner)
        if reason is not None:
            raise NotHookable(reason)
        code = inner.__code__
    if code.co_flags & (GENERATOR | ASYNC_GENERATOR | DECORATED_COROUTINE):
        raise NotHookable("a generator")
    hook = Hook(where[1], enter, leave)
    if probe.monitor is not None and not code.co_flags & COROUTINE:
        hook.code = code
        hook.pick = no_arguments
        probe.monitor.add(hook)
        hook.undo = lambda: probe.monitor.discard(hook)
    elif function is None:
        raise NotHookable("a function inside a function, which this interpreter can only show from inside")
    else:
        replace_everywhere(probe, hook, attribute, function)
    probe.hooks.append(hook)
    return hook


def no_arguments(values):
    return ()


def replace_everywhere(probe, hook, attribute, function):
    """Put a wrapper for a module's function into every module that knows it by this name."""
    hook.original = function
    new = make_wrapper(probe, hook, function, innermost(function))
    places = []
    for module in list(sys.modules.values()):
        try:
            space = object.__getattribute__(module, "__dict__")
        except AttributeError:
            continue
        if type(space) is dict and space.get(attribute) is function:
            space[attribute] = new
            places.append(space)

    def undo():
        whole = True
        for space in places:
            if space.get(attribute) is new:
                space[attribute] = function
            else:
                whole = False
        return whole

    hook.undo = undo


# -- the search --------------------------------------------------------------------------------------


class Candidate:
    """Every call of one function in the loop's thread becomes a record, as long as there are not too many."""

    def __init__(self, probe, index, thread):
        self.probe = probe
        self.index = index
        self.thread = thread
        self.hook = None
        self.calls = 0
        self.since_ns = now_ns()

    def enter(self, args):
        self.calls += 1
        if self.calls >= HOT_CALLS:
            now = now_ns()
            if now - self.since_ns < HOT_NS:
                return self.let_go()
            self.calls = 0
            self.since_ns = now
        return get_ident() == self.thread

    def leave(self, counted, args, result, start, end):
        if counted and self.probe.alive:
            self.probe.emit(KIND_SPAN, (self.index, start, end, 0))

    def let_go(self):
        self.probe.words[H_MISSING] |= 1 << self.index
        if self.hook in self.probe.hooks:
            self.probe.hooks.remove(self.hook)
        self.hook.remove()
        return False


def search(probe, config):
    """Hook the candidates; what could not be hooked is told in ``H_MISSING`` and in words."""
    missing = []
    for name, (file, function, line) in config["hooks"].items():
        candidate = Candidate(probe, int(name), config["thread"])
        try:
            candidate.hook = hook_function(
                probe, (file, function, int(line)), candidate.enter, candidate.leave
            )
        except NotHookable as error:
            probe.words[H_MISSING] |= 1 << UNHOOKED_SHIFT + int(name)
            missing.append("%s: %s" % (function, error))
    return missing


# -- the watch ---------------------------------------------------------------------------------------


class Iterations:
    """A step for every call of the anchor. With a witness, a function that works in every real iteration, a
    call in which it did not is a turn of an idle loop and no step."""

    def __init__(self, probe, with_witness):
        self.probe = probe
        self.with_witness = with_witness
        self.worked = False
        self.step = 0
        self.last_end = 0
        self.idle_told = 0
        self.gc_seen = probe.gc_ns
        self.hooks = []
        self.thread = None
        self.cost_seen = 0

    def enter(self, args):
        self.worked = False

    def witness(self, args):
        self.worked = True

    def leave(self, state, args, result, start, end):
        probe = self.probe
        if not probe.alive:
            return
        if self.thread is None:
            self.thread = get_ident()
        elif self.thread != get_ident():
            probe.dropped()
            return
        if self.with_witness and not self.worked:
            # Now and then all the same: a record is what notices the lease and commands.
            if end - self.idle_told > IDLE_TOLD_NS:
                self.idle_told = end
                probe.emit(KIND_SPAN, (-1, start, end, 0))
            return
        gc_ns = probe.gc_ns - self.gc_seen
        self.gc_seen = probe.gc_ns
        gap = start - self.last_end if 0 < self.last_end <= start else NULL
        self.last_end = end
        step = self.step
        self.step = step + 1
        spent = 0
        for hook in self.hooks:
            spent += hook.cost_ns
        own = spent - self.cost_seen
        self.cost_seen = spent
        probe.emit(KIND_STEP, (
            step, start, end,
            NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
            NULL, NULL, NULL,
            NULL, NULL, NULL,
            NULL, NULL, NULL, NULL, gap, gc_ns,
            NULL, NULL, NULL, NULL, own, own,
        ))  # fmt: skip
        if probe.alive:
            probe.cost(own, own)


def mark(probe, config):
    hooks = config["hooks"]
    iterations = Iterations(probe, "witness" in hooks)
    missing = []
    for name, enter, leave in (
        ("witness", iterations.witness, None),
        ("anchor", iterations.enter, iterations.leave),
    ):
        if name in hooks:
            file, function, line = hooks[name]
            try:
                iterations.hooks.append(hook_function(probe, (file, function, int(line)), enter, leave))
            except NotHookable as error:
                missing.append("%s: %s" % (function, error))
                if name == "witness":
                    iterations.with_witness = False
    if missing and not any(True for hook in iterations.hooks if hook.leave is not None):
        raise RuntimeError("nothing to hook: " + ", ".join(missing))
    return missing


def reader(probe, config):
    """The role says whether it is searched or watched; returns the functions that were not found."""
    return search(probe, config) if config["role"] == "search" else mark(probe, config)
