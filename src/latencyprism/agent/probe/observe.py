"""Observing one method of a class: what is put around it, by which means, and how it is taken away again.

Two means, one meaning. **Monitoring** (CPython 3.12 and later): events of the method's own code object. The
class stays as it is, and methods that were bound and stored before attach are seen. **Wrapper** (earlier
versions, and what monitoring cannot see): the class attribute is replaced by a function with the same
signature, made for it, since passing ``*args`` on costs more than everything else in it.

Coroutine functions are wrapped on every version: a cancelled coroutine ends without any event of its code,
and what was kept for it would stay. Generators are refused. So is whatever is, or may be, traced by
torch.compile: see ``compile_marker``.
"""

# [cut
from latencyprism.agent.probe.prelude import (
    KEY,
    STALL_NS,
    TEXT_NAME,
    NotHookable,
    itemgetter,
    now_ns,
    sys,
)

# cut]

VARIABLE_ARGS, VARIABLE_KEYWORDS = 0x04, 0x08
GENERATOR, COROUTINE, DECORATED_COROUTINE, ASYNC_GENERATOR = 0x20, 0x80, 0x100, 0x200
FunctionType = type(lambda: None)
MethodType = type((lambda: None).__get__(0))
# Of a class without asking its metaclass.
mro_of, dict_of, name_of = [type.__dict__[name].__get__ for name in ("__mro__", "__dict__", "__name__")]
DECORATIONS_LIMIT = 16
MANY_LOCALS = 8


class Hook:
    """One observed method. ``on`` is False once it is taken away or dropped; both means then call nothing of
    ours.

    ``calls`` that returned and ``cost_ns``, the probe's own time in them but for the ``stalls`` of
    ``stalled_ns`` in all (one call's own time above ``limit_ns``), ``slow_at`` the numbers of the worst;
    ``only``: the class that an instance must be of, where several share the code; ``open``: running calls, by
    the id of their frame (monitoring alone); ``asked``: a person asked for it, so that no budget applies."""

    __slots__ = (
        "asked", "calls", "code", "cost_ns", "enter", "label", "leave", "limit_ns", "on", "only", "open",
        "original", "pick", "reading", "seen_calls", "seen_cost_ns", "seen_stalled_ns", "seen_stalls",
        "slow_at", "stalled_ns", "stalls", "sweep_at_ns", "undo",
    )  # fmt: skip

    def __init__(self, label, enter, leave):
        self.label, self.enter, self.leave = label, enter, leave
        self.on = True
        self.calls = self.cost_ns = self.stalls = self.stalled_ns = self.sweep_at_ns = 0
        self.seen_calls = self.seen_cost_ns = self.seen_stalls = self.seen_stalled_ns = 0
        self.slow_at = []
        self.limit_ns = STALL_NS
        self.only = self.code = self.original = self.pick = self.reading = self.undo = None
        self.asked = False
        self.open = {}

    def remove(self):
        """Take it away. False if somebody replaced the attribute since: then a pass-through stays."""
        self.on = False
        self.open.clear()
        if self.undo is not None and self.undo():
            self.undo = None
        return self.undo is None


def attribute_of(owner, name):
    """(class that defines it, what its dict holds). Never asks a metaclass or a descriptor."""
    if not isinstance(owner, type):
        raise NotHookable("not a class")
    for place in mro_of(owner):
        held = dict_of(place).get(name)
        if held is not None:
            return place, held
    raise NotHookable("no such method")


def innermost(function):
    """The plain function under decorators that name what they wrap."""
    for _ in range(DECORATIONS_LIMIT):
        inner = function.__dict__.get("__wrapped__")
        if type(inner) is not FunctionType:
            break
        function = inner
    return function


def compile_marker(owner, *functions):
    """Why these functions must not be hooked on account of torch.compile, or None. Anything put into a
    compiled region changes its guards and makes it compile again. The marks are: dynamo's own attributes on
    the function; code that dynamo holds compiled frames of; a class that was made a wrapper around its
    compiled forward; and any torch.nn.Module once dynamo is loaded, since nobody can tell from here which of
    them a region runs through."""
    for function in functions:
        marks = getattr(function, "__dict__", {})
        if marks.get("_torchdynamo_disable"):
            return None  # dynamo never goes into it
        for mark in ("_torchdynamo_orig_callable", "_torchdynamo_inline", "__original_fn"):
            if mark in marks:
                return "compiled: " + mark
    frames = sys.modules.get("torch._C._dynamo.eval_frame")
    entries = getattr(frames, "_debug_get_cache_entry_list", None)
    for function in functions:
        if entries is not None and type(function) is FunctionType and entries(function.__code__):
            return "compiled by torch.compile"
    for base in mro_of(owner):
        if name_of(base).startswith("TorchCompileW"):
            return "in a class compiled by torch.compile"
        if name_of(base) == "Module" and dict_of(base).get("__module__") == "torch.nn.modules.module":
            if "torch._dynamo" in sys.modules:
                return "a torch module, which torch.compile may run through"
    return None


def hook_method(probe, owner, name, enter, leave):
    """Install a Hook. Raises NotHookable with the reason; nothing is changed then."""
    place, held = attribute_of(owner, name)
    kind = type(held) if isinstance(held, (staticmethod, classmethod)) else None
    function = held.__func__ if kind is not None else held
    # A partial object does not bind its instance, whatever it has of a descriptor in some versions.
    if (
        not callable(function)
        or not hasattr(type(function), "__get__")
        or type(function).__name__ == "partial"
    ):
        raise NotHookable("not a method")
    inner = innermost(function) if type(function) is FunctionType else None
    reason = compile_marker(owner, function, inner)
    if reason is not None:
        raise NotHookable(reason)
    flags = inner.__code__.co_flags if inner is not None else 0
    if flags & (GENERATOR | ASYNC_GENERATOR | DECORATED_COROUTINE):
        raise NotHookable("a generator")
    if flags & COROUTINE and not function.__code__.co_flags & COROUTINE:
        raise NotHookable("a coroutine under a decorator that is none")
    hook = Hook(name_of(owner) + "." + name, enter, leave)
    hook.original = function
    if kind is None and (place is not owner or (inner is not None and "<locals>" in inner.__qualname__)):
        hook.only = owner
    if inner is not None and not flags & COROUTINE and probe.monitor is not None and cheap(inner.__code__):
        hook.code = inner.__code__
        hook.pick = picker(inner.__code__)
        probe.monitor.add(hook)
        hook.undo = lambda: probe.monitor.discard(hook)
    else:
        put_wrapper(probe, hook, (place, name, held, kind), inner)
    return hook


def cheap(code):
    """Whether monitoring is: CPython 3.12 looks every local variable up to tell the arguments at a start, 0.1
    us each, and a scheduler's function has sixty. From 3.13 on they are looked up as asked for."""
    return sys.version_info >= (3, 13) or code.co_nlocals - code.co_argcount <= MANY_LOCALS


def picker(code):
    """locals of a frame that begins -> its positional arguments, as a tuple."""
    names = code.co_varnames[: code.co_argcount]
    rest = None
    if code.co_flags & VARIABLE_ARGS:
        rest = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
    if rest is not None:
        return lambda values: tuple([values[name] for name in names]) + values[rest]
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: tuple([values[name] for name in names])


# -- wrappers ----------------------------------------------------------------------------------------

HEAD = """\
def make(_lp_call, _lp_hook, _lp_now, _lp_place, _lp_fail, _lp_stalled):
    {is_async}def observed({declared}):
        if not _lp_hook.on{only}:
            return {awaits}_lp_call({passed})
        _lp_args = {args}
        _lp_state = None
        _lp_leave = _lp_hook.leave
"""
ENTER = """\
        _lp_before = _lp_now()
        try:
            _lp_state = _lp_hook.enter(_lp_args)
        except BaseException:
            _lp_leave = None
            _lp_fail()
        _lp_spent = _lp_now() - _lp_before
        _lp_hook.cost_ns += _lp_spent
        if _lp_spent > _lp_hook.limit_ns:
            _lp_stalled(_lp_hook, _lp_spent, _lp_before)
"""
CALL = """\
        _lp_start = _lp_now()
        _lp_result = {awaits}_lp_call({passed})
        _lp_end = _lp_now()
        _lp_hook.calls += 1
"""
LEAVE = """\
        if _lp_leave is not None and _lp_hook.on:
            try:
                _lp_leave(_lp_state, _lp_args, _lp_result, _lp_start, _lp_end)
            except BaseException:
                _lp_fail()
            _lp_spent = _lp_now() - _lp_end
            _lp_hook.cost_ns += _lp_spent
            if _lp_spent > _lp_hook.limit_ns:
                _lp_stalled(_lp_hook, _lp_spent, _lp_end)
"""
TAIL = """\
        return _lp_result
    return observed
"""
WITHOUT_LEAVE = """\
        _lp_hook.calls += 1
        return {awaits}_lp_call({passed})
    return observed
"""


def body(hook):
    """The wrapper's text, with what this hook needs alone: every clock reading counts."""
    if hook.leave is None:
        return HEAD + (ENTER if hook.enter is not None else "") + WITHOUT_LEAVE
    return HEAD + (ENTER if hook.enter is not None else "") + CALL + LEAVE + TAIL


def exact_signature(function):
    """Parts of HEAD and CALL for a wrapper that declares what ``function`` declares."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    after = code.co_argcount + code.co_kwonlyargcount
    first_default = len(names) - len(function.__defaults__ or ())
    declared = [name + ("=None" if index >= first_default else "") for index, name in enumerate(names)]
    if code.co_posonlyargcount:
        declared.insert(code.co_posonlyargcount, "/")
    passed = list(names)
    args = "".join(name + ", " for name in names)
    used = names + keywords
    if code.co_flags & VARIABLE_ARGS:
        used += (code.co_varnames[after],)
        declared.append("*" + code.co_varnames[after])
        passed.append("*" + code.co_varnames[after])
        args += "*" + code.co_varnames[after]
        after += 1
    elif keywords:
        declared.append("*")
    defaults = function.__kwdefaults__ or {}
    declared += [name + ("=None" if name in defaults else "") for name in keywords]
    passed += [name + "=" + name for name in keywords]
    if code.co_flags & VARIABLE_KEYWORDS:
        used += (code.co_varnames[after],)
        declared.append("**" + code.co_varnames[after])
        passed.append("**" + code.co_varnames[after])
    if not all(name.isidentifier() and not name.startswith("_lp_") for name in used):
        raise ValueError("a parameter without a usable name")
    return ", ".join(declared), ", ".join(passed), "(" + args + ")"


def place_keywords(inner):
    """(args, kwargs) of a call -> args with the keywords that name positional parameters put in their
    places."""
    if inner is None:
        return lambda args, named: args
    code = inner.__code__
    names = code.co_varnames[: code.co_argcount]
    values = inner.__defaults__ or ()
    defaults = dict(zip(names[len(names) - len(values) :], values))

    def place(args, named):
        if not named:
            return args
        placed = list(args)
        for name in names[len(args) :]:
            if name in named:
                placed.append(named[name])
            elif name in defaults:
                placed.append(defaults[name])
            else:
                break
        return tuple(placed)

    return place


def make_wrapper(probe, hook, function, inner):
    """The function that takes the place of ``function``; signature, names and attributes are the
    original's."""
    is_async = inner is not None and inner.__code__.co_flags & COROUTINE
    text = {"is_async": "async " if is_async else "", "awaits": "await " if is_async else "", "only": ""}
    exact = False
    if inner is function:
        try:
            text["declared"], text["passed"], text["args"] = exact_signature(function)
            exact = True
        except ValueError:
            pass
    if not exact:
        text["declared"] = text["passed"] = "*_lp_rest, **_lp_named"
        text["args"] = "_lp_place(_lp_rest, _lp_named)"
    if hook.only is not None:
        first = text["declared"].split(",")[0].split("=")[0] if exact else "_lp_rest[0]"
        text["only"] = " or _lp_hook.only not in type(" + first + ").__mro__"
    space = {"__name__": KEY}
    try:
        exec(compile(body(hook).format(**text), TEXT_NAME, "exec"), space)
    except SyntaxError:
        raise NotHookable("its parameters cannot be repeated") from None
    new = space["make"](
        function, hook, now_ns, place_keywords(inner), probe.fail, probe.stalled
    )  # fmt: skip
    if exact:
        new.__defaults__, new.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
        try:
            setattr(new, attribute, getattr(function, attribute))
        except (AttributeError, TypeError):
            pass
    new.__dict__.update(getattr(function, "__dict__", None) or {})
    new.__wrapped__ = function
    return new


def put_wrapper(probe, hook, where, inner):
    place, name, held, kind = where
    new = make_wrapper(probe, hook, hook.original, inner)
    notice_captured(probe, hook)
    if kind is not None:
        new = kind(new)
    try:
        type.__setattr__(place, name, new)
    except (TypeError, AttributeError):
        raise NotHookable("its class cannot be changed") from None

    def undo():
        if dict_of(place).get(name) is not new:
            return False
        type.__setattr__(place, name, held)
        return True

    hook.undo = undo


def notice_captured(probe, hook):
    """At the first call, look whether the object keeps methods bound before attach, which no wrapper sees."""
    enter, leave = hook.enter, hook.leave

    def first_enter(args):
        hook.enter = enter
        probe.look_for_captured(args)
        return enter(args)

    def first_leave(state, args, result, start, end):
        hook.leave = leave
        probe.look_for_captured(args)
        leave(state, args, result, start, end)

    if enter is not None:
        hook.enter = first_enter
    elif leave is not None:
        hook.leave = first_leave


def captured_in(holder, originals):
    """["attribute (Class.method)"] of ``holder``'s own attributes that are methods of these {function:
    label}."""
    found = []
    try:
        held = object.__getattribute__(holder, "__dict__")
    except AttributeError:
        return found
    if type(held) is dict and len(held) < 4096:
        for name, value in list(held.items()):
            if type(value) is MethodType and type(name) is str:
                label = originals.get(id(value.__func__))
                if label is not None:
                    found.append("%s.%s (%s)" % (type(holder).__name__, name, label))
    return found
