"""Which of the attributes that a reader will read are known to the live classes.

Looks at classes alone, through ``type``'s own descriptors: no instance, no property, no metaclass and no
module hook of the target's is asked, so nothing of it runs. What a class body or any of its methods names
counts as there; a name that is nowhere in a class or its bases is certain to be gone. Runs inside the target.
"""

# [cut
import sys

# cut]

_mro_of = type.__dict__["__mro__"].__get__
_dict_of = type.__dict__["__dict__"].__get__
NAMES_LIMIT = 20000
DECORATIONS = 8


def class_at(module, name):
    """A class of a module that is imported already, else None."""
    found = sys.modules.get(module)
    try:
        found = object.__getattribute__(found, "__dict__").get(name)
    except AttributeError:
        return None
    return found if type in _mro_of(type(found)) else None  # isinstance would ask its __class__


def names_in(owner):
    """Every name that a class and its bases define, declare, or mention in a method."""
    names = set()
    for place in _mro_of(owner):
        if place is object:
            continue
        held = _dict_of(place)
        names.update(held)
        for key in (
            "__annotations__",
            "__annotations_cache__",
            "__dataclass_fields__",
            "__struct_fields__",
            "__slots__",
        ):
            value = held.get(key)
            if type(value) in (dict, tuple, list):
                names.update(name for name in value if type(name) is str)
            elif type(value) is str:
                names.add(value)
        for value in held.values():
            value = getattr(value, "__func__", value) if type(value) in (staticmethod, classmethod) else value
            code = value.__code__ if type(value) is type(names_in) else None
            if code is not None:
                names.update(code.co_names)
                if code.co_name == "__annotate__":  # 3.14: annotations not yet evaluated
                    names.update(name for name in code.co_consts if type(name) is str)
        if len(names) > NAMES_LIMIT:
            break
    return names


def missing_fields(fields):
    """``{"module:Class|Class": [names]}`` -> what no such class has: ``Class.name`` or ``module.Class``."""
    missing = []
    for place, wanted in fields.items():
        module, _, owners = place.partition(":")
        for name in owners.split("|"):
            owner = class_at(module, name)
            if owner is None:
                missing.append(module + "." + name)
                continue
            known = names_in(owner)
            missing += [name + "." + one for one in wanted if one not in known]
    return missing


def function_of(owner, method):
    """The plain function behind a method and the decorators that name what they wrap; None if there is
    none."""
    found = None
    for place in _mro_of(owner) if owner is not None else ():
        found = _dict_of(place).get(method)
        if found is not None:
            break
    for _ in range(DECORATIONS):
        inner = found.__dict__.get("__wrapped__") if type(found) is type(names_in) else None
        if inner is None:
            break
        found = inner
    return found if type(found) is type(names_in) else None


def changed_parameters(hooks, parameters):
    """Hooked functions whose first parameters after self are not those that the reader takes. A function that
    is not there at all is told where it is hooked."""
    changed = []
    for name, wanted in parameters.items():
        module, owners, method = hooks.get(name, ("", "", ""))
        for owner_name in owners.split("|"):
            function = function_of(class_at(module, owner_name), method)
            if function is None:
                continue
            code = function.__code__
            if tuple(code.co_varnames[1 : code.co_argcount][: len(wanted)]) != tuple(wanted):
                changed.append("parameters of %s.%s" % (owner_name, method))
    return changed


def verified(reader):
    """``reader``, its account of what is missing preceded by what ``config`` says it will read and cannot."""

    def verifying(probe, config):
        # Before the hooks are put in: wrappers have code of their own.
        missing = missing_fields(config.get("fields", {}))
        missing += changed_parameters(config.get("hooks", {}), config.get("parameters", {}))
        return missing + reader(probe, config)

    return verifying
